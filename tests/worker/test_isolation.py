"""A task in a process of its own: whatever happens to that process happens to its job alone."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import isolated_tasks
import pytest
from isolated_tasks import crash, look, look_async, plain, starved, stuck, takes, waits
from support import python, wait_for
from working import drain, enqueue, enqueue_many, events, wait_for_status, working

from pgqueue import ConfigurationError, PgQueue, Worker


@pytest.fixture
def pgq(url: str) -> Iterator[PgQueue]:
    isolated_tasks.pgq.connect_to(url)
    yield isolated_tasks.pgq
    isolated_tasks.pgq.dispose()


def is_alive(pid: int) -> bool:
    """Zombies are dead."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def pids_in(path: Path) -> list[int]:
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


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


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("exit", "pgqueue.errors.ProcessDied", "the process of the task exited with code 3 before the task returned"),
        ("segfault", "pgqueue.errors.ProcessDied", "the process of the task was ended by SIGSEGV"),
        ("kill", "pgqueue.errors.ProcessDied", "was ended by SIGKILL (the system does that when memory runs out)"),
        ("sys.exit", "SystemExit", "4"),
        ("discard", "pgqueue.errors.Discard", "no use"),
        ("raises", "ValueError", "raises"),
    ],
)
def test_a_crash_fails_its_own_job_alone(pgq: PgQueue, how: str, kind: str, message: str) -> None:
    good = [enqueue(look), *enqueue_many(plain, 2)]
    bad = enqueue(crash, how=how)
    good += [enqueue(look), *enqueue_many(plain, 2)]

    report = drain(pgq, queues={"default": 2})

    job = pgq.get_job(bad)
    assert job.status == "dead"
    assert job.error is not None
    assert job.error["type"] == kind
    assert message in job.error["message"]
    assert {pgq.get_job(job_id).status for job_id in good} == {"completed"}
    assert (report.completed, report.dead, report.lost) == (6, 1, 0)


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
    program = tmp_path / "killed_worker.py"
    program.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path[:] = {sys.path!r}
        import isolated_tasks
        from pgqueue import Worker
        if __name__ == "__main__":
            isolated_tasks.pgq.connect_to({url!r})
            Worker(isolated_tasks.pgq).run()
        """)
    )

    with python(program) as worker:
        (pid,) = wait_for(lambda: pids_in(pids), "the task to run")
        assert is_alive(pid)
        worker.signal(signal.SIGKILL)
        wait_for(lambda: not is_alive(pid), "the process to end")


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
