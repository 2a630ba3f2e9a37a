"""`pgqueue worker`: its options, its end, and its signals, with real processes."""

from __future__ import annotations

import gc
import signal
from pathlib import Path

import pytest
from command import Command, running, write_application
from support import wait_for

from pgqueue import PgQueue

CODE = '''
import gc
import sys
import threading
import time
from pathlib import Path

from pgqueue import Discard, PgQueue, Retry

pgq = PgQueue()
folder = Path(__file__).parent


@pgq.task
def work(n: int = 0) -> int:
    return 2 * n


@pgq.task
def give_up() -> None:
    raise Discard("no such customer")


@pgq.task(queue="images")
def resize() -> None: ...


@pgq.task
def wait() -> None:
    """Until the file `go` is there."""
    (folder / "waiting").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)


@pgq.task
def frozen() -> int:
    return gc.get_freeze_count()


@pgq.task
def read() -> str:
    return sys.stdin.read()
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an application."""
    write_application(tmp_path, "shop_worker", CODE, monkeypatch)
    return tmp_path


@pytest.fixture
def pgqueue(url: str, folder: Path) -> Command:
    """The command, run in this process and in that directory."""
    return Command(url)


def statuses(pgq: PgQueue) -> dict[str, str]:
    return {job.task: job.status for job in pgq.list_jobs()}


def test_a_drain_works_until_the_queues_are_empty_and_exits_0(pgqueue: Command, pgq: PgQueue) -> None:
    pgqueue("enqueue", "work", '{"n": 21}')

    result = pgqueue("worker", "shop_worker:pgq", "--drain")

    assert result.stdout == ""
    assert "starts on" in result.stderr
    assert pgq.list_jobs()[0].result == 42


def test_a_drain_that_leaves_dead_jobs_exits_8(pgqueue: Command, pgq: PgQueue) -> None:
    pgqueue("enqueue", "give_up")
    pgqueue("enqueue", "work")

    pgqueue("worker", "shop_worker:pgq", "--drain", code=8)

    assert statuses(pgq) == {"give_up": "dead", "work": "completed"}


def test_a_worker_logs_what_became_of_its_jobs_and_nothing_of_the_libraries(folder: Path) -> None:
    pgqueue = Command()  # on the local file, which Alembic creates

    idle = pgqueue("worker", "shop_worker:pgq", "--drain").stderr
    pgqueue("enqueue", "give_up")
    pgqueue("enqueue", "work")
    busy = pgqueue("worker", "shop_worker:pgq", "--drain", code=8).stderr
    verbose = pgqueue("db", "upgrade", "-v").stderr

    assert idle.endswith("stopped: nothing done\n")
    assert "task give_up, job 1, attempt 1 failed with pgqueue.errors.Discard; no such customer\n" in busy
    assert busy.endswith("stopped: 1 completed, 1 dead\n")
    assert "alembic" not in idle + busy
    assert "alembic" in verbose


def test_dead_jobs_of_earlier_days_do_not_make_a_drain_fail(pgqueue: Command) -> None:
    pgqueue("enqueue", "give_up")
    pgqueue("worker", "shop_worker:pgq", "--drain", code=8)

    pgqueue("worker", "shop_worker:pgq", "--drain")


def test_without_queues_a_worker_takes_those_that_its_tasks_name(pgqueue: Command, pgq: PgQueue) -> None:
    pgqueue("enqueue", "work")
    pgqueue("enqueue", "resize", "--queue", "images")
    pgqueue("enqueue", "work", "--queue", "elsewhere")

    result = pgqueue("worker", "shop_worker:pgq", "--drain", "--concurrency", "3")

    assert "queues default=3, images=3" in result.stderr
    assert pgqueue.json("jobs", "list", "--status", "pending")[0]["queue"] == "elsewhere"


def test_queues_can_be_repeated_or_separated_by_commas(pgqueue: Command) -> None:
    result = pgqueue(
        *("worker", "shop_worker:pgq", "--drain", "--concurrency", "7"),
        *("--queue", "images=4,mails", "--queue", "default=20"),
    )

    assert "queues images=4, mails=7, default=20" in result.stderr


def test_the_app_comes_from_the_environment_as_well(url: str, pgqueue: Command, pgq: PgQueue) -> None:
    pgqueue("enqueue", "work")

    Command(url, PGQUEUE_APP="shop_worker:pgq")("worker", "--drain")

    assert statuses(pgq) == {"work": "completed"}


def test_a_worker_stops_after_so_many_jobs(pgqueue: Command, pgq: PgQueue) -> None:
    for _ in range(5):
        pgqueue("enqueue", "work")

    pgqueue("worker", "shop_worker:pgq", "--max-jobs", "3")

    assert sorted(job.status for job in pgq.list_jobs()) == ["completed"] * 3 + ["pending"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queue", "a=0"], "concurrency of queue 'a' must be"),
        (["--queue", "a=x"], "expected NAME or NAME=CONCURRENCY"),
        (["--queue", "a,a"], "queue 'a' is named twice"),
        (["--queue", "a;b"], "queue name must be"),
        (["--concurrency", "0"], "concurrency of queue 'default' must be"),
        (["--lease", "0.1"], "lease must be at least"),
        (["--lease", "10s", "--heartbeat", "9s"], "heartbeat_interval must be"),
        (["--poll-interval", "0"], "poll_interval must be"),
        (["--sweep-interval", "0"], "sweep_interval must be"),
        (["--prefetch", "-1"], "prefetch must be"),
        (["--max-jobs", "0"], "max_jobs must be"),
        (["--processes", "0"], "'--processes'"),
        (["--lease", "-5"], "'--lease'"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_starts(
    sqlite_url: str, folder: Path, arguments: list[str], message: str
) -> None:
    result = Command(sqlite_url)("worker", "shop_worker:pgq", *arguments, code=2)

    assert message in result.stderr
    assert "starts" not in result.stderr


def test_a_worker_without_an_app_or_tasks_says_what_is_missing(
    sqlite_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_application(folder, "shop_empty", "from pgqueue import PgQueue\npgq = PgQueue()", monkeypatch)

    assert "which app?" in Command(sqlite_url)("worker", code=2).stderr
    assert "this worker knows no tasks" in Command(sqlite_url)("worker", "shop_empty:pgq", code=2).stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_refuses_to_start_where_it_cannot_work(
    empty_pg_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    worker = ("worker", "shop_worker:pgq", "--processes", processes)

    assert "pgqueue db upgrade" in Command(empty_pg_url)(*worker, code=6).stderr
    write_application(folder, "shop_worker", CODE, monkeypatch)
    assert "cannot use" in Command("postgresql://ada@127.0.0.1:1/shop")(*worker, code=5).stderr


def test_signals_do_what_they_did_before_once_a_worker_has_ended(pgqueue: Command) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    pgqueue("worker", "shop_worker:pgq", "--drain")

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_a_worker_has_loaded_is_left_out_of_its_collections_until_it_ends(pgqueue: Command, pgq: PgQueue) -> None:
    pgqueue("enqueue", "frozen")

    pgqueue("worker", "shop_worker:pgq", "--drain")

    assert pgq.list_jobs()[0].result > 10_000
    assert gc.get_freeze_count() == 0


WORKER = ("worker", "shop_worker:pgq", "--poll-interval", "100ms")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_running_jobs_end_and_exits_0(
    url: str, pgqueue: Command, pgq: PgQueue, folder: Path, number: signal.Signals
) -> None:
    pgqueue("enqueue", "wait")

    with running(*WORKER, cwd=folder, url=url) as worker:
        wait_for((folder / "waiting").exists, "the job to start")
        worker.signal(number)
        wait_for(lambda: f"{number.name}: stopping" in worker.output(), "the worker to stop")
        pgqueue("enqueue", "work")
        (folder / "go").touch()
        code = worker.wait()

    assert code == 0, worker.output()
    assert statuses(pgq) == {"wait": "completed", "work": "pending"}


def test_a_job_that_does_not_end_in_time_is_given_back_uncharged(
    url: str, pgqueue: Command, pgq: PgQueue, folder: Path
) -> None:
    pgqueue("enqueue", "wait")

    with running(*WORKER, "--shutdown-timeout", "100ms", cwd=folder, url=url) as worker:
        wait_for((folder / "waiting").exists, "the job to start")
        worker.signal(signal.SIGTERM)
        code = worker.wait()

    (job,) = pgq.list_jobs()
    assert code == 0, worker.output()
    assert (job.status, job.attempt, job.retries) == ("pending", 1, 0)


@pytest.mark.parametrize(("second", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_gives_the_job_back_and_ends_at_once(
    url: str, pgqueue: Command, pgq: PgQueue, folder: Path, second: signal.Signals, expected: int
) -> None:
    pgqueue("enqueue", "wait")

    with running(*WORKER, cwd=folder, url=url) as worker:
        wait_for((folder / "waiting").exists, "the job to start")
        worker.signal(signal.SIGTERM)
        wait_for(lambda: "waiting up to" in worker.output(), "the worker to wait")
        worker.signal(second)
        code = worker.wait()

    (job,) = pgq.list_jobs()
    assert code == expected, worker.output()
    assert (job.status, job.retries) == ("pending", 0)


@pytest.mark.parametrize(("signals", "expected"), [(1, 0), (2, 143)])
def test_signals_go_through_a_supervisor_to_the_worker_with_the_job(
    pg_url: str, pg: PgQueue, folder: Path, signals: int, expected: int
) -> None:
    Command(pg_url)("enqueue", "wait")

    with running(*WORKER, "--processes", "2", cwd=folder, url=pg_url) as supervisor:
        wait_for((folder / "waiting").exists, "the job to start")
        supervisor.signal(signal.SIGTERM)
        wait_for(lambda: "waiting up to" in supervisor.output(), "its worker to wait")
        if signals == 2:
            supervisor.signal(signal.SIGTERM)
        else:
            (folder / "go").touch()
        code = supervisor.wait()

    (job,) = pg.list_jobs()
    assert code == expected, supervisor.output()
    assert (job.status, job.retries) == ("completed" if signals == 1 else "pending", 0)


def test_workers_stop_when_their_supervisor_is_killed(pg_url: str, pg: PgQueue, folder: Path) -> None:
    Command(pg_url)("enqueue", "wait")

    with running(*WORKER, "--processes", "2", cwd=folder, url=pg_url) as supervisor:
        wait_for((folder / "waiting").exists, "the job to start")
        supervisor.signal(signal.SIGKILL)
        supervisor.wait()
        wait_for(lambda: supervisor.output().count("the supervisor is gone: stopping") == 2, "both workers to stop")
        (folder / "go").touch()
        wait_for(lambda: pg.workers() == [], "both workers to end")

    assert [job.status for job in pg.list_jobs()] == ["completed"]


def test_several_processes_drain_together_and_a_dead_job_makes_it_8(pg_url: str, pg: PgQueue, folder: Path) -> None:
    pgqueue = Command(pg_url)
    for _ in range(20):
        pgqueue("enqueue", "work")
    pgqueue("enqueue", "give_up")

    with running(*WORKER, "--processes", "2", "--drain", cwd=folder, url=pg_url) as supervisor:
        code = supervisor.wait()

    assert code == 8, supervisor.output()
    assert {job.status for job in pg.list_jobs(task="work")} == {"completed"}


def test_several_processes_share_the_local_file_that_nobody_named(folder: Path) -> None:
    pgqueue = Command()
    pgqueue("enqueue", "read")

    with running(*WORKER, "--processes", "2", "--drain", cwd=folder) as supervisor:
        code = supervisor.wait()

    assert code == 0, supervisor.output()
    assert supervisor.output().count("no database was named") == 1
    assert pgqueue.json("jobs", "show", "1")["result"] == ""  # the supervisor's pipe is not for the tasks
