"""A task in a process of its own: whatever happens to that process happens to its job alone."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import isolated_tasks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isolated_tasks import (
    crash,
    enqueues,
    look,
    look_async,
    misbehaves,
    patient,
    plain,
    reports,
    reports_much,
    starved,
    stuck,
    takes,
    waits,
)
from jobs import claim_one
from support import python, wait_for
from working import drain, enqueue, enqueue_many, events, wait_for_status, working

from pgqueue import ClaimedJob, ConfigurationError, PgQueue, Worker, isolated, isolation, reporting


@pytest.fixture
def pgq(url: str) -> Iterator[PgQueue]:
    isolated_tasks.pgq.connect_to(url)
    yield isolated_tasks.pgq
    isolated_tasks.pgq.dispose()


@pytest.fixture
def on_sqlite(sqlite_url: str) -> Iterator[PgQueue]:
    """For what has nothing to do with the database."""
    isolated_tasks.pgq.connect_to(sqlite_url)
    yield isolated_tasks.pgq
    isolated_tasks.pgq.dispose()


def is_alive(pid: int) -> bool:
    """Zombies are dead."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def pids_in(path: Path) -> list[int]:
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def worker_program(folder: Path, url: str, run: str) -> Path:
    program = folder / "worker_program.py"
    program.write_text(
        textwrap.dedent(f"""
        import logging
        import signal
        import sys
        sys.path[:] = {sys.path!r}
        import isolated_tasks
        from pgqueue import Worker, WorkerConfig
        from pgqueue.supervisor import run_worker
        if __name__ == "__main__":
            logging.basicConfig(level=logging.INFO)
            isolated_tasks.pgq.connect_to({url!r})
            {run}
        """)
    )
    return program


def test_a_task_runs_in_another_process_which_is_used_again(pgq: PgQueue) -> None:
    ids = [enqueue(look) for _ in range(4)]
    ids_async = [enqueue(look_async, n=n) for n in range(2)]

    drain(pgq, queues={"default": 1})

    results: list[dict[str, Any]] = [pgq.get_job(job_id).result for job_id in ids]
    assert [(found["id"], found["attempt"], found["payload"]) for found in results] == [(i, 1, {}) for i in ids]
    assert {found["parent"] for found in results} == {os.getpid()}
    (pid,) = {found["pid"] for found in results}
    assert pid != os.getpid()
    assert not is_alive(pid)
    assert [pgq.get_job(job_id).result for job_id in ids_async] == [0, 1]


def test_a_crash_fails_its_own_job_alone(on_sqlite: PgQueue) -> None:
    ways = {
        "exit": ("pgqueue.errors.ProcessDied", "the process of the task exited with code 3 before the task returned"),
        "segfault": ("pgqueue.errors.ProcessDied", "the process of the task was ended by SIGSEGV"),
        "kill": ("pgqueue.errors.ProcessDied", "was ended by SIGKILL (the system does that when memory runs out)"),
        "sys.exit": ("SystemExit", "4"),
        "discard": ("pgqueue.errors.Discard", "no use"),
        "raises": ("ValueError", "raises"),
    }
    good, bad = [enqueue(look), *enqueue_many(plain, 2)], {}
    for how in ways:
        bad[how] = enqueue(crash, how=how)
        good += [enqueue(look), enqueue(plain)]

    report = drain(on_sqlite, queues={"default": 2})

    for how, (kind, message) in ways.items():
        job = on_sqlite.get_job(bad[how])
        assert (job.status, job.error and job.error["type"]) == ("dead", kind)
        assert message in job.error["message"]  # type: ignore[index]
    assert {on_sqlite.get_job(job_id).status for job_id in good} == {"completed"}
    assert (report.completed, report.dead, report.lost) == (15, 6, 0)


def test_at_the_timeout_the_process_and_all_that_it_has_started_are_killed(pgq: PgQueue, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    job_id = enqueue(stuck, pid_file=str(pids))

    drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.error["type"]) == ("dead", "TimeoutError")  # type: ignore[index]
    assert job.error["message"] == "the attempt took longer than its timeout of 0.5 s"  # type: ignore[index]
    assert len(pids_in(pids)) == 2
    wait_for(lambda: not any(map(is_alive, pids_in(pids))), "the processes to end")


def test_a_request_to_stop_kills_the_process(pgq: PgQueue, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    job_id = enqueue(waits, pid_file=str(pids))

    with working(pgq) as worker:
        wait_for(lambda: pids_in(pids), "the task to run")
        pgq.cancel(job_id)
        job = wait_for_status(pgq, job_id, "cancelled")
        wait_for(lambda: not is_alive(pids_in(pids)[0]), "the process to end")
        wait_for(lambda: worker._slots["default"].running == 0, "its slot to be free")
        assert pgq.get_job(enqueue_and_wait(pgq)).status == "completed"

    assert (job.attempt, job.retries) == (1, 0)
    assert events(pgq, job_id) == ["cancel_requested", "cancel"]
    assert (worker.report.cancelled, worker.report.lost) == (1, 0)


def enqueue_and_wait(pgq: PgQueue) -> int:
    job_id = enqueue(look)
    wait_for_status(pgq, job_id, "completed")
    return job_id


def test_a_stopping_worker_kills_the_process_and_gives_the_job_back_uncharged(pgq: PgQueue, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    job_id = enqueue(waits, pid_file=str(pids))

    with working(pgq, shutdown_timeout=0.05) as worker:
        wait_for(lambda: pids_in(pids), "the task to run")

    job = pgq.get_job(job_id)
    assert (job.status, job.retries) == ("pending", 0)
    assert events(pgq, job_id) == ["release"]
    assert not is_alive(pids_in(pids)[0])
    assert (worker.report.released, worker.report.lost) == (1, 0)


def test_a_task_that_takes_more_memory_than_it_may_fails_and_the_next_one_does_not(pgq: PgQueue) -> None:
    ids = [enqueue(takes, mib=4096), enqueue(takes, mib=1), enqueue(starved)]

    drain(pgq, queues={"default": 1})

    jobs = [pgq.get_job(job_id) for job_id in ids]
    assert [job.status for job in jobs] == ["dead", "completed", "dead"]
    assert [job.error and job.error["type"] for job in jobs] == ["MemoryError", None, "MemoryError"]
    assert "memory_limit is 1,048,576 bytes, but the process has taken" in jobs[2].error["message"]  # type: ignore[index]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it takes until the child next looks")
def test_a_worker_that_is_killed_takes_its_processes_along(pgq: PgQueue, url: str, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    enqueue(waits, pid_file=str(pids))
    program = worker_program(tmp_path, url, "Worker(isolated_tasks.pgq).run()")

    with python(program) as worker:
        (pid,) = wait_for(lambda: pids_in(pids), "the task to run")
        assert is_alive(pid)
        worker.signal(signal.SIGKILL)
        wait_for(lambda: not is_alive(pid), "the process to end")


# What a process says, and does not say ----------------------------------------------------------------------


def test_what_a_task_reports_in_its_process_is_written_and_told_as_of_any_other(pgq: PgQueue, tmp_path: Path) -> None:
    seen, go, told = tmp_path / "seen", tmp_path / "go", []
    job_id = enqueue(reports, seen=str(seen), go=str(go))

    with pgq.on("job:progress", lambda event: told.append((event.job_id, event.progress))), working(pgq):
        wait_for(lambda: told, "the first report to be told")  # of quick ones only the last is sure to be
        seen.touch()
        wait_for(lambda: (pgq.get_job(job_id).progress or {}).get("note") == "step 2", "the third report")
        running = pgq.get_job(job_id).status
        go.touch()
        job = wait_for_status(pgq, job_id, "completed")
        assert pgq._listeners.deliver(60)

    assert running == "running"
    last = {"done": 3, "total": 3, "note": None}
    assert job.progress is not None
    assert {**job.progress, **last} == job.progress
    assert told[0] == (job_id, {"done": 0, "total": 3, "note": "step 0"})
    assert told[-1] == (job_id, last)


def test_of_very_many_reports_the_last_counts_and_few_are_sent(
    on_sqlite: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    report = isolation._report
    monkeypatch.setattr(isolation, "_report", lambda job, content: (sent.append(content), report(job, content)))
    job_id = enqueue(reports_much, count=20_000)

    drain(on_sqlite)

    progress = on_sqlite.get_job(job_id).progress
    assert progress is not None
    assert (progress["done"], progress["total"]) == (20_000, 20_000)
    assert len(sent) < 200


def test_rubbish_from_a_process_fails_its_own_job_alone(on_sqlite: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "EXIT_SECONDS", 0.2)
    problems = {
        "no message": "was killed by its worker: it sent what is no message before the task returned",
        "truncated": "the process of the task exited with code 0 before the task returned",
        "exits well": "the process of the task exited with code 0 before the task returned",
        "closes its files": "hung up on its worker, which killed it, before the task returned",
    }
    bad = {how: enqueue(misbehaves, how=how) for how in problems}
    good = enqueue(look)

    report = drain(on_sqlite, queues={"default": 2})

    errors = {how: on_sqlite.get_job(job_id).error or {} for how, job_id in bad.items()}
    assert {error["type"] for error in errors.values()} == {"pgqueue.errors.ProcessDied"}
    assert [how for how in problems if problems[how] not in errors[how]["message"]] == []
    assert on_sqlite.get_job(good).status == "completed"
    assert (report.completed, report.dead, report.lost) == (1, 4, 0)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (b"\xff\xfe{", "what is no message"),
        (b"", "what is no message"),
        (b"7", "what is no message"),
        (b"[1, 2]", "what is no message"),
        (b"[" * 200_000, "what is no message"),
        (b'["claim", "Nothing", {}]', "an outcome that there is not"),
        (b'["claim", ["Completed"], {}]', "an outcome that there is not"),
        (b'["claim", "Released", {"reason": "so"}]', "an outcome that there is not"),
        (b'["claim", "Completed", {"result_json": [5]}]', "an outcome that cannot be read"),
        (b'["claim", "Snoozed", {"delay_seconds": "soon", "reason": "so"}]', "an outcome that cannot be read"),
        (b'["claim", "Failed", null]', "an outcome that cannot be read"),
    ],
)
def test_a_message_that_cannot_be_is_refused(message: bytes, problem: str) -> None:
    with pytest.raises(isolation._Rubbish, match=problem):
        isolation.decoded(*isolation.opened(message)[1:])


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"done": "much", "total": None, "note": None},
        {"done": float("inf"), "total": None, "note": None},
        {"done": 1, "total": True, "note": None},
        {"done": 1, "total": 2, "note": ["a"]},
    ],
)
def test_a_report_that_cannot_be_is_refused(on_sqlite: PgQueue, content: Any) -> None:
    enqueue(look)

    with pytest.raises(isolation._Rubbish, match="progress that cannot be read"):
        isolation._report(claim_one(on_sqlite), content)


def test_a_message_that_is_announced_as_endless_is_not_read() -> None:
    with pytest.raises(isolation._Rubbish, match=r"it announced a message of 4,611,686,018,427,387,904 bytes"):
        isolation.receive(lambda count: (2**62).to_bytes(count))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.data())
def test_a_message_arrives_in_whatever_pieces(message: bytes, data: st.DataObject) -> None:
    stream = len(message).to_bytes(isolation.LENGTH_BYTES) + message + b"the next one"

    def read(count: int) -> bytes:
        nonlocal stream
        size = data.draw(st.integers(1, count))
        piece, stream = stream[:size], stream[size:]
        return piece

    assert isolation.receive(read) == message
    assert stream == b"the next one"


@pytest.mark.parametrize(("how", "result"), [("speaks for another", "as usual"), ("forks", "the task")])
def test_a_process_speaks_for_no_job_but_its_own(on_sqlite: PgQueue, how: str, result: str) -> None:
    ids = [enqueue(misbehaves, how=how), enqueue(misbehaves, how="nothing")]

    drain(on_sqlite, queues={"default": 1})

    assert [(on_sqlite.get_job(job_id).status, on_sqlite.get_job(job_id).result) for job_id in ids] == [
        ("completed", result),
        ("completed", "as usual"),
    ]


def test_a_worker_takes_no_larger_message_than_it_wants(on_sqlite: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "MESSAGE_BYTES_MAX", 10_000)
    bad, good = enqueue(misbehaves, how="returns much"), enqueue(look)

    drain(on_sqlite, queues={"default": 1})

    assert "it announced a message of 100," in on_sqlite.get_job(bad).error["message"]  # type: ignore[index]
    assert on_sqlite.get_job(good).status == "completed"


@pytest.mark.parametrize(("how", "reason"), [("returns much", "larger than 10,000 bytes"), ("nothing", None)])
def test_a_process_does_not_send_what_its_worker_would_not_take(
    on_sqlite: PgQueue, monkeypatch: pytest.MonkeyPatch, how: str, reason: str | None
) -> None:
    monkeypatch.setattr(isolated, "MESSAGE_BYTES_MAX", 10_000)
    ours, theirs = socket.socketpair()
    enqueue(misbehaves, how=how)
    job = claim_one(on_sqlite)
    asked = {**isolation.reference_of(misbehaves, misbehaves.definition).to_json(), "memory_limit": None}

    with ours, theirs, monkeypatch.context() as reporters:
        line = isolated.Line(theirs)
        reporters.setitem(reporting.reporters, job.claimed_by, line.report)
        claim, _, content = isolation.opened(isolated.outcome_of_job(line, job, asked))

    assert claim == str(job.claim_token)
    assert (reason or "") in content.get("reason", "")
    assert ("result_json" in content) is (reason is None)


def test_a_job_is_not_charged_for_what_became_of_its_process_before(
    on_sqlite: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = enqueue(look), enqueue(look)
    run = isolation.Processes.run

    def run_and_kill(self: isolation.Processes, *arguments: Any) -> Any:
        outcome = run(self, *arguments)
        with monkeypatch.context() as unseen:  # it dies just after one has looked
            unseen.setattr(isolation._Child, "has_died", lambda child: False)
            for child in self._idle:
                os.kill(child._process.pid, signal.SIGKILL)
        return outcome

    take = isolation.Processes._take

    def take_unseen(self: isolation.Processes) -> Any:
        with monkeypatch.context() as unseen:
            unseen.setattr(isolation._Child, "has_died", lambda child: False)
            return take(self)

    monkeypatch.setattr(isolation.Processes, "run", run_and_kill)
    monkeypatch.setattr(isolation.Processes, "_take", take_unseen)

    report = drain(on_sqlite, queues={"default": 1})

    assert [(on_sqlite.get_job(job_id).status, on_sqlite.get_job(job_id).attempt) for job_id in (first, second)] == [
        ("completed", 1),
        ("completed", 1),
    ]
    assert (report.completed, report.retried) == (2, 0)


def test_whatever_goes_wrong_with_a_process_the_slot_goes_on(
    on_sqlite: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = enqueue(look), enqueue(plain)

    def broken(self: isolation.Processes) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(isolation.Processes, "_take", broken)

    drain(on_sqlite, queues={"default": 1})

    assert on_sqlite.get_job(bad).error["type"] == "RuntimeError"  # type: ignore[index]
    assert on_sqlite.get_job(good).status == "completed"


def test_a_job_that_is_lost_while_its_process_starts_is_not_begun(
    on_sqlite: PgQueue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job_id = enqueue(waits, pid_file=str(tmp_path / "pids"))
    take, starting, started = isolation.Processes._take, threading.Event(), threading.Event()

    def slow(self: isolation.Processes) -> Any:
        starting.set()
        assert started.wait(60)
        return take(self)

    monkeypatch.setattr(isolation.Processes, "_take", slow)

    with working(on_sqlite, lease=1.0) as worker:
        assert starting.wait(60)
        on_sqlite.cancel(job_id, force=True)
        wait_for(lambda: worker.report.lost, "the worker to see that it lost the job")
        started.set()
        wait_for(lambda: worker._slots["default"].running == 0, "its slot to be free")

    assert not (tmp_path / "pids").exists()


def test_a_process_that_does_not_die_holds_up_nobody_who_wants_to_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stuck in the kernel outlives SIGKILL for a while; the worker's heartbeat must not wait for it."""
    child = isolation._Child()
    with monkeypatch.context() as stuck:
        stuck.setattr(os, "killpg", lambda *_: None)
        ending = threading.Thread(target=child.end)
        ending.start()
        wait_for(lambda: child.is_over, "somebody to wait for its end")

        stopping = threading.Thread(target=child.kill)
        stopping.start()
        stopping.join(10)
        was_held_up = stopping.is_alive()
    os.killpg(child._process.pid, signal.SIGKILL)
    ending.join(60)

    assert not was_held_up
    assert child._process.returncode == -signal.SIGKILL


def test_a_worker_whose_application_ignores_its_children_sees_their_end_all_the_same(
    on_sqlite: PgQueue, sqlite_url: str, tmp_path: Path
) -> None:
    bad, good = enqueue(crash, how="exit"), enqueue(look)
    run = "signal.signal(signal.SIGCHLD, signal.SIG_IGN); Worker(isolated_tasks.pgq, WorkerConfig(drain=True)).run()"
    program = worker_program(tmp_path, sqlite_url, run)

    with python(program) as worker:
        assert worker.wait() == 0

    assert on_sqlite.get_job(bad).error["type"] == "pgqueue.errors.ProcessDied"  # type: ignore[index]
    assert on_sqlite.get_job(good).status == "completed"


def test_processes_leave_nothing_behind(on_sqlite: PgQueue) -> None:
    def left() -> tuple[int, int, set[str]]:
        children = {
            pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
        }
        return len(os.listdir("/proc/self/fd")), threading.active_count(), children

    drain(on_sqlite)  # what is made once
    files, threads, children = left()
    for how in ("exit", "raises"):
        enqueue(crash, how=how)
    enqueue(misbehaves, how="no message")
    enqueue_many(look, 200)

    drain(on_sqlite, queues={"default": 2})

    assert left() == (files, threads, children)


def test_a_signal_to_every_process_of_a_service_lets_an_isolated_task_end(
    on_sqlite: PgQueue, sqlite_url: str, tmp_path: Path
) -> None:
    pids, go = tmp_path / "pids", tmp_path / "go"
    job_id = enqueue(patient, pid_file=str(pids), go=str(go))
    program = worker_program(tmp_path, sqlite_url, "run_worker(Worker(isolated_tasks.pgq))")

    with python(program) as worker:
        (pid,) = wait_for(lambda: pids_in(pids), "the task to run")
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
        worker.signal(signal.SIGTERM)
        wait_for(lambda: "stopping" in worker.output(), "the worker to stop")
        go.touch()
        assert worker.wait() == 0

    job = on_sqlite.get_job(job_id)
    assert (job.status, job.result, job.attempt) == ("completed", "done", 1)


def test_ctrl_c_at_a_terminal_lets_an_isolated_task_end(on_sqlite: PgQueue, sqlite_url: str, tmp_path: Path) -> None:
    pids, go = tmp_path / "pids", tmp_path / "go"
    job_id = enqueue(patient, pid_file=str(pids), go=str(go))
    program = worker_program(tmp_path, sqlite_url, "run_worker(Worker(isolated_tasks.pgq))")

    with python(program) as worker:
        wait_for(lambda: pids_in(pids), "the task to run")
        os.killpg(os.getpgid(worker.pid), signal.SIGINT)  # as the terminal does: to all in its foreground
        wait_for(lambda: "stopping" in worker.output(), "the worker to stop")
        assert is_alive(pids_in(pids)[0])
        go.touch()
        assert worker.wait() == 0

    assert on_sqlite.get_job(job_id).result == "done"


# Where it runs ---------------------------------------------------------------------------------------------


def test_a_task_enqueues_into_its_workers_database_whatever_its_module_and_environment_say(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PGQUEUE_DATABASE_URL", f"sqlite:///{tmp_path / 'another.db'}")
    enqueue(enqueues)

    drain(pgq)

    assert [(job.task, job.status) for job in pgq.list_jobs()] == [("plain", "completed"), ("enqueues", "completed")]


def test_middleware_goes_around_a_task_in_its_process_wherever_it_is_defined(
    on_sqlite: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_sqlite, "_run_middleware", [])
    importlib.reload(importlib.import_module("isolated_middleware"))
    on_sqlite._run_middleware[:] = on_sqlite._run_middleware[-2:]
    job_id = enqueue(enqueues)

    drain(on_sqlite)

    assert on_sqlite.get_job(job_id).result == "outer inner"


def test_a_task_does_not_run_in_a_process_that_lacks_its_middleware(
    on_sqlite: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_sqlite, "_run_middleware", [])

    @on_sqlite.middleware("run")
    def only_here(job: ClaimedJob) -> Iterator[None]:
        yield

    job_id = enqueue(enqueues)

    drain(on_sqlite)

    job = on_sqlite.get_job(job_id)
    assert job.error is not None
    assert job.error["type"] == "pgqueue.errors.ConfigurationError"
    assert "only_here" in job.error["message"]
    assert [job.task for job in on_sqlite.list_jobs()] == ["enqueues"]


# Other systems ---------------------------------------------------------------------------------------------


def test_where_processes_cannot_be_started_a_worker_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "IS_POSIX", False)

    with pytest.raises(ConfigurationError, match='isolation="process", which needs Linux or another POSIX system'):
        Worker(isolated_tasks.pgq)


def test_where_memory_is_not_limited_a_worker_says_so(
    on_sqlite: PgQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(isolation, "IS_LINUX", False)
    monkeypatch.setattr(isolated, "IS_LINUX", False)
    monkeypatch.setattr("resource.setrlimit", unsupported)

    Worker(on_sqlite)
    with isolated.limited(2**62):
        pass

    assert "the memory_limit of task takes may not be kept" in caplog.text


def unsupported(*_: object) -> None:
    raise ValueError("current limit exceeds maximum limit")


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_where_one_cannot_look_without_reaping_a_crash_is_seen_all_the_same(
    on_sqlite: PgQueue, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.delattr(os, "waitid")
    bad, good = enqueue(crash, how=how), enqueue(look)

    drain(on_sqlite, queues={"default": 1})

    assert on_sqlite.get_job(bad).error["type"] == "pgqueue.errors.ProcessDied"  # type: ignore[index]
    assert "before the task returned" in on_sqlite.get_job(bad).error["message"]  # type: ignore[index]
    assert "hung up" not in on_sqlite.get_job(bad).error["message"]  # type: ignore[index]
    assert on_sqlite.get_job(good).status == "completed"


def test_where_the_system_does_not_tell_a_process_looks_whether_its_worker_lives(tmp_path: Path) -> None:
    child, worker = tmp_path / "child.py", tmp_path / "worker.py"
    child.write_text(
        "import os, sys, time\n"
        "from pgqueue import isolated\n"
        "isolated.IS_LINUX, isolated.WATCH_SECONDS = False, 0.01\n"
        "isolated.end_with(int(sys.argv[1]))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    worker.write_text(
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {str(child)!r}, str(os.getpid())], start_new_session=True)\n"
        "time.sleep(60)\n"
    )

    with python(worker) as process:
        pid = int(wait_for(process.output, "the child to start"))
        assert is_alive(pid)
        process.signal(signal.SIGKILL)
        wait_for(lambda: not is_alive(pid), "the child to end")


# Bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"isolation": "thread"}, "isolation of task 'work' must be None or 'process', got 'thread'"),
        ({"isolation": "process", "transactional": True}, "task 'work' is transactional, so it cannot be isolated"),
        ({"memory_limit": 2**30}, "memory_limit of task 'work' needs isolation=\"process\""),
        ({"isolation": "process", "memory_limit": "1G"}, "must be a whole number of bytes"),
        ({"isolation": "process", "memory_limit": 0}, "must be a whole number of bytes"),
        ({"isolation": "process", "memory_limit": True}, "must be a whole number of bytes"),
    ],
)
def test_an_isolation_that_cannot_work_is_refused(options: dict[str, Any], problem: str) -> None:
    def work(session: Any = None) -> None: ...

    with pytest.raises(ConfigurationError) as refused:
        PgQueue().task(**options)(work)

    assert problem in str(refused.value)


def undecorated() -> None: ...


def in_main() -> None: ...


in_main.__module__ = "__main__"


@pytest.mark.parametrize("where", ["local", "undecorated", "main"])
def test_a_worker_does_not_start_with_a_task_that_its_processes_could_not_import(where: str) -> None:
    queue = PgQueue("sqlite:///nowhere.db")

    def local() -> None: ...

    functions = {"local": local, "undecorated": undecorated, "main": in_main}
    queue.task(isolation="process")(functions[where])
    problem = {
        "local": "it is defined inside of a function; define it at the top of its module",
        "undecorated": "that is not the task; use @pgq.task as a decorator",
        "main": "__main__ is another module there; move the task into a module and import that",
    }[where]

    with pytest.raises(ConfigurationError, match="its process must be able to import it") as refused:
        Worker(queue)

    assert problem in str(refused.value)
