"""A database that goes away and comes back: said once, overcome without help, nothing lost and nothing charged."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support import PATIENCE_SECONDS, execute, rows, scalar, wait_for
from working import Gate, enqueue, enqueue_many, events, statuses, table, wait_for_status, working

from pgqueue import PgQueue, current_job, loop, store
from pgqueue import engine as engine_module

GONE, BACK = "the database cannot be used", "the database can be used again"


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Open at the end of the test, so that no thread waits behind it."""
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no test waits for seconds after a long outage."""
    monkeypatch.setattr(loop, "BACKOFF_SECONDS_MAX", 0.2)


def logged(caplog: pytest.LogCaptureFixture, text: str) -> int:
    """How many lines say that."""
    return sum(text in record.getMessage() for record in caplog.records)


class Outage:
    """Takes one database of the server away: its connections are ended and new ones refused, until it is over."""

    def __init__(self, url: str) -> None:
        self._name = sa.make_url(url).database
        self._engine = sa.create_engine(
            sa.make_url(url).set(database="postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool
        )

    def begin(self) -> None:
        self._run(f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS false")
        # A session that has not got round to dying yet answers nobody, but its connection still looks sound.
        end_all = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self._name}'"
        wait_for(lambda: not rows(self._engine, end_all), "the sessions to be gone")

    def end(self) -> None:
        self._run(f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS true")

    def _run(self, sql: str) -> None:
        with self._engine.connect() as connection:
            connection.execute(sa.text(sql))


@pytest.fixture
def outage(pg_url: str) -> Iterator[Outage]:
    outage = Outage(pg_url)
    yield outage
    outage.end()


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The parts of workers that have met an outage so far."""
    names: set[str] = set()
    original = loop.Outage.met

    def note(outage: loop.Outage, name: str, error: Exception) -> None:
        original(outage, name, error)
        names.add(name.removeprefix("pgqueue-"))

    monkeypatch.setattr(loop.Outage, "met", note)
    return names


# The database is away --------------------------------------------------------------------------------------


def test_an_outage_is_logged_once_overcome_and_loses_nothing(
    pg: PgQueue, gate: Gate, outage: Outage, met: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    @pg.task
    def held_up() -> str:
        gate.pass_through()
        return "done meanwhile"

    @pg.task
    def quick() -> None: ...

    running = enqueue_many(held_up, 3)

    with working(pg, queues={"default": 4}, heartbeat_interval=0.1, sweep_interval=0.1) as worker:
        wait_for(lambda: gate.inside == 3, "the jobs to run")
        outage.begin()
        wait_for(lambda: met >= {"claim", "heartbeat", "sweep"}, "the worker to meet the outage")
        gate.open()
        wait_for(lambda: "finish" in met, "the ends of the jobs to meet it")
        outage.end()
        wait_for(lambda: logged(caplog, BACK), "the outage to be over")
        wait_for_status(pg, enqueue(quick), "completed")

    assert [pg.get_job(job_id).result for job_id in running] == ["done meanwhile"] * 3
    assert statuses(pg) == {"completed": 4}
    assert rows(pg.engine, "SELECT DISTINCT attempt, retries FROM pgqueue.jobs") == [(1, 0)]
    assert (worker.report.completed, worker.report.lost) == (4, 0)
    assert (logged(caplog, GONE), logged(caplog, BACK)) == (1, 1)
    assert [record for record in caplog.records if record.levelno > logging.WARNING or record.exc_info] == []


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_transactional_task_that_finds_no_database_has_not_begun(
    pg: PgQueue, gate: Gate, outage: Outage, met: set[str], kind: str
) -> None:
    attempts = []

    @pg.task
    def held_up() -> None:
        gate.pass_through()

    def transactional(session: Session) -> None:
        attempts.append(current_job().attempt)

    async def transactional_async(session: AsyncSession) -> None:
        attempts.append(current_job().attempt)

    chosen: Any = transactional if kind == "def" else transactional_async
    task = pg.task(name="transactional", transactional=True)(chosen)
    enqueue(held_up)
    job_id = enqueue(task)

    def kept_back() -> int:
        return len(worker._finisher._unwritten) + worker._finisher._ended.qsize()

    with working(pg, queues={"default": 1}, prefetch=5) as worker:
        wait_for(lambda: gate.inside and statuses(pg) == {"running": 2}, "both jobs to be claimed")
        outage.begin()
        gate.open()
        wait_for(lambda: "finish" in met and kept_back() == 2, "the ends of both jobs to be kept back")
        outage.end()
        wait_for_status(pg, job_id, "completed")

    assert attempts == [2]
    assert pg.get_job(job_id).retries == 0
    assert [event["reason"] for event in pg.job_events(job_id)] == [
        "the database could not be reached to begin the task's transaction"
    ]


def test_a_worker_stops_in_an_outage_and_says_what_it_leaves_behind(
    pg: PgQueue, gate: Gate, outage: Outage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @pg.task
    def held_up() -> None:
        gate.pass_through()

    monkeypatch.setattr("pgqueue.worker.FINISH_SECONDS", 0.2)
    job_id = enqueue(held_up)

    with working(pg) as worker:
        wait_for(lambda: gate.inside, "the job to run")
        outage.begin()
        gate.open()
        worker.stop()
        worker.join(PATIENCE_SECONDS)
    wait_for(lambda: not worker._finisher.is_alive(), "its last try to write the end")
    outage.end()

    assert logged(caplog, "the database cannot be reached: 1 jobs stay claimed until their lease ends") == 1
    assert pg.get_job(job_id).status == "running"


# A connection breaks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["claim", "finish", "heartbeat", "sweep", "listen"])
def test_a_part_of_the_worker_whose_connection_was_ended_goes_on_with_another(
    pg: PgQueue, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    @pg.task
    def work() -> None: ...

    other = pg.external_task("other", queue="other")
    pids = note_connections(pg)
    with working(pg, heartbeat_interval=0.1, sweep_interval=0.1) as worker:
        wait_for_status(pg, enqueue(work), "completed")
        broken = wait_for(lambda: pids.get(part), f"the connection of {part}")
        assert scalar(pg.engine, "SELECT pg_terminate_backend(:pid)", pid=broken)

        heard_of = pg.workers()[0]["heartbeat_at"]
        lapsed = enqueue(other)
        pg.claim("a worker that died", queue="other")
        execute(
            pg.engine, "UPDATE pgqueue.jobs SET claim_expires_at = now() - interval '1 s' WHERE id = :id", id=lapsed
        )
        job_id = enqueue(work)
        wait_for_status(pg, job_id, "completed")
        wait_for_status(pg, lapsed, "pending")
        wait_for(lambda: pg.workers()[0]["heartbeat_at"] > heard_of, "a heartbeat")
        wait_for(lambda: pids[part] != broken, "another connection")

    assert (pg.get_job(job_id).attempt, pg.get_job(job_id).retries) == (1, 0)
    assert (worker.report.completed, worker.report.swept, worker.report.lost) == (2, 1, 0)
    assert logged(caplog, GONE) == 0
    assert logged(caplog, f"pgqueue-{part}: the connection broke, making a new one") == (part != "listen")


def test_connections_that_the_server_ends_for_being_idle_are_no_outage(
    pg: PgQueue, pg_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = sa.make_url(pg_url).update_query_dict({"options": "-c idle_session_timeout=500ms"})
    impatient = PgQueue(options)

    @impatient.task
    def work() -> None: ...

    pids = note_connections(impatient)
    with working(impatient, poll_interval=0.5) as worker:
        for _ in range(3):
            wait_for_status(pg, enqueue(work), "completed")
            wait_for(lambda: not is_connected(pg, pids["finish"]), "the idle connection to be ended")
    impatient.dispose()

    assert (worker.report.completed, worker.report.lost) == (3, 0)
    assert logged(caplog, GONE) == 0


def note_connections(pg: PgQueue) -> dict[str, int]:
    """The server process behind the present connection of each part of the workers."""
    pids: dict[str, int] = {}

    def note(dbapi_connection: Any, record: Any, fairy: Any) -> None:
        pids[threading.current_thread().name.removeprefix("pgqueue-")] = dbapi_connection.info.backend_pid

    event.listen(pg.engine, "checkout", note)
    return pids


def is_connected(pg: PgQueue, pid: int) -> bool:
    return bool(scalar(pg.engine, "SELECT count(*) FROM pg_stat_activity WHERE pid = :pid", pid=pid))


# SQLite ----------------------------------------------------------------------------------------------------


@contextmanager
def locked(sqlite_url: str) -> Iterator[None]:
    """Another process writes, and takes its time."""
    connection = sqlite3.connect(str(sa.make_url(sqlite_url).database), isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def test_a_file_that_is_locked_for_long_is_an_outage_that_is_overcome(
    sqlite_url: str, gate: Gate, met: set[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_module, "SQLITE_BUSY_SECONDS", 0.05)
    pgq = PgQueue(sqlite_url)

    @pgq.task
    def held_up() -> str:
        gate.pass_through()
        return "done meanwhile"

    job_id = enqueue(held_up)

    with working(pgq, heartbeat_interval=0.1, sweep_interval=0.1) as worker:
        wait_for(lambda: gate.inside, "the job to run")
        with locked(sqlite_url):
            wait_for(lambda: met >= {"claim", "heartbeat", "sweep"}, "the worker to meet the lock")
            gate.open()
            wait_for(lambda: "finish" in met, "the end of the job to meet it")
        job = wait_for_status(pgq, job_id, "completed")
        wait_for(lambda: logged(caplog, BACK), "the outage to be over")
    pgq.dispose()

    assert (job.attempt, job.retries, job.result) == (1, 0, "done meanwhile")
    assert (worker.report.completed, worker.report.lost) == (1, 0)
    assert (logged(caplog, GONE), logged(caplog, BACK)) == (1, 1)
    assert logged(caplog, "has been locked by another process") == 1


# What is no outage -----------------------------------------------------------------------------------------


def test_a_failure_that_is_not_the_databases_is_logged_once_with_its_traceback_until_it_is_over(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upkeep, tries = store.upkeep, []

    def fail_three_times(*arguments: Any) -> Any:
        tries.append(1)
        if len(tries) <= 3:
            raise ZeroDivisionError("a bug")
        return upkeep(*arguments)

    monkeypatch.setattr(store, "upkeep", fail_three_times)

    @pgq.task
    def work() -> None: ...

    with working(pgq, sweep_interval=0.05):
        wait_for(lambda: len(tries) >= 5, "the sweep to work again")
        wait_for_status(pgq, enqueue(work), "completed")

    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == "pgqueue-sweep: failed, trying again until it works"
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_an_end_that_the_database_refuses_does_not_hold_up_the_others(
    pgq: PgQueue, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    @pgq.task
    def work(n: int) -> int:
        gate.pass_through()
        return n

    refuse_result(pgq, "13")
    ids = {n: enqueue(work, n=n) for n in (12, 13, 14)}

    with working(pgq) as worker:
        wait_for(lambda: gate.inside == 3, "all jobs to run")
        gate.open()
        wait_for(lambda: worker.report.completed + worker.report.dead == 3, "all ends to be written")

    assert statuses(pgq) == {"completed": 2, "dead": 1}
    refused = pgq.get_job(ids[13])
    assert (refused.status, refused.result) == ("dead", None)
    assert refused.error["type"] == "Refused"  # type: ignore[index]
    assert events(pgq, ids[13]) == ["dead"]
    assert (worker.report.completed, worker.report.dead, worker.report.lost) == (2, 1, 0)
    assert logged(caplog, f"the database refused how job {ids[13]} ended") == 1


def refuse_result(pgq: PgQueue, result: str) -> None:
    """A rule of the database's owner that pgqueue knows nothing of."""
    jobs = table(pgq, "jobs")
    if pgq.engine.dialect.name == "postgresql":
        execute(pgq.engine, f"ALTER TABLE {jobs} ADD CONSTRAINT refused CHECK (result::text <> '{result}')")
    else:
        execute(
            pgq.engine,
            f"CREATE TRIGGER refused BEFORE UPDATE ON {jobs} WHEN CAST(NEW.result AS text) = '{result}' "
            "BEGIN SELECT RAISE(ABORT, 'refused'); END",
        )
