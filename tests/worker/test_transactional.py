"""Transactional tasks: their rows, their result and their completion are committed together, once, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from support import PATIENCE_SECONDS, execute, rows, scalar, wait_for
from working import drain, enqueue, enqueue_many, events, seize, wait_for_status, working

from pgqueue import Cancel, Discard, IllegalTransition, PgQueue, Retry, Snooze, Task, current_job

AT_ONCE = Retry(max_retries=3, backoff="constant", base=0.0, jitter=False)


class Base(DeclarativeBase):
    pass


class Effect(Base):
    """What a task did. No constraint keeps an attempt from doing it twice: the tests count."""

    __tablename__ = "effects"

    id: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]


class Once(Base):
    """A row that can be there once."""

    __tablename__ = "once"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


@pytest.fixture
def pgq(pgq: PgQueue) -> PgQueue:
    """With the application's tables."""
    Base.metadata.create_all(pgq.engine)
    return pgq


@pytest.fixture
def pg(pg: PgQueue) -> PgQueue:
    """Likewise."""
    Base.metadata.create_all(pg.engine)
    return pg


Register = Callable[..., Task[..., Any]]


@pytest.fixture(params=["def", "async def"])
def transactional(request: pytest.FixtureRequest) -> Register:
    """Registers a transactional task from what it does with its session, as a `def` and as an `async def` task."""

    def register(pgq: PgQueue, work: Callable[[Session], Any], **options: Any) -> Task[..., Any]:
        def task(session: Session) -> Any:
            return work(session)

        async def task_async(session: AsyncSession) -> Any:
            return await session.run_sync(work)

        chosen: Any = task if request.param == "def" else task_async
        registered: Task[..., Any] = pgq.task(name="task", transactional=True, **{"retry": AT_ONCE, **options})(chosen)
        return registered

    return register


def leave_effect(session: Session) -> None:
    """Insert a row that tells the attempt."""
    session.add(Effect(attempt=current_job().attempt))
    session.flush()


def effects(pgq: PgQueue) -> list[int]:
    """The attempts whose effects were committed."""
    return [row[0] for row in rows(pgq.engine, "SELECT attempt FROM effects ORDER BY id")]


# Together --------------------------------------------------------------------------------------------------


def test_rows_result_and_enqueued_jobs_are_there_when_the_job_is_completed(
    pgq: PgQueue, transactional: Register
) -> None:
    follow_up = pgq.external_task("follow_up", queue="elsewhere")

    def work(session: Session) -> dict[str, int]:
        leave_effect(session)
        follow_up.enqueue(session)
        return {"answer": 42}

    job_id = enqueue(transactional(pgq, work))

    report = drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.attempt, job.result) == ("completed", 1, {"answer": 42})
    assert effects(pgq) == [1]
    assert [job.task for job in pgq.list_jobs(status="pending")] == ["follow_up"]
    assert (report.completed, report.lost) == (1, 0)


def test_rows_enqueued_jobs_and_completion_are_of_one_transaction(pg: PgQueue, transactional: Register) -> None:
    follow_up = pg.external_task("follow_up", queue="elsewhere")

    def work(session: Session) -> None:
        leave_effect(session)
        follow_up.enqueue(session)

    enqueue(transactional(pg, work))

    drain(pg)

    writers = rows(
        pg.engine, "SELECT status, xmin::text FROM pgqueue.jobs UNION SELECT 'effect', xmin::text FROM effects"
    )
    assert {row[0] for row in writers} == {"completed", "pending", "effect"}
    assert len({row[1] for row in writers}) == 1


def test_a_job_ends_when_it_is_completed_not_when_its_transaction_began(pgq: PgQueue, transactional: Register) -> None:
    """The database's now() would be the start of the transaction, and every run would seem to take no time."""

    def work(session: Session) -> None:
        session.execute(sa.text("SELECT 1"))
        time.sleep(0.2)

    job_id = enqueue(transactional(pgq, work))

    drain(pgq)

    job = pgq.get_job(job_id)
    assert job.finished_at is not None
    assert job.claimed_at is not None
    assert (job.finished_at - job.claimed_at).total_seconds() >= 0.19


def test_what_a_task_added_and_did_not_flush_is_written(pgq: PgQueue, transactional: Register) -> None:
    enqueue(transactional(pgq, lambda session: session.add(Effect(attempt=1))))

    drain(pgq)

    assert effects(pgq) == [1]


def test_objects_of_the_session_can_be_read_after_the_commit(pgq: PgQueue, transactional: Register) -> None:
    kept = []

    def work(session: Session) -> None:
        effect = Effect(attempt=current_job().attempt)
        session.add(effect)
        kept.append(effect)

    enqueue(transactional(pgq, work))

    drain(pgq)

    assert (kept[0].id, kept[0].attempt) == (1, 1)


def test_a_savepoint_that_a_task_rolls_back_takes_only_its_own_rows(pgq: PgQueue, transactional: Register) -> None:
    def work(session: Session) -> None:
        with session.begin_nested():
            leave_effect(session)
        with session.begin_nested() as savepoint:
            session.add(Effect(attempt=99))
            session.flush()
            savepoint.rollback()

    job_id = enqueue(transactional(pgq, work))

    drain(pgq)

    assert pgq.get_job(job_id).status == "completed"
    assert effects(pgq) == [1]


def test_a_task_that_takes_everything_back_itself_is_completed(pgq: PgQueue, transactional: Register) -> None:
    def work(session: Session) -> str:
        leave_effect(session)
        session.rollback()
        return "nothing to do"

    job_id = enqueue(transactional(pgq, work))

    drain(pgq)

    assert (pgq.get_job(job_id).status, pgq.get_job(job_id).result) == ("completed", "nothing to do")
    assert effects(pgq) == []


def test_each_job_has_a_session_of_its_own(pgq: PgQueue, transactional: Register) -> None:
    sessions = []

    def work(session: Session) -> None:
        sessions.append(session)
        leave_effect(session)

    enqueue_many(transactional(pgq, work), 5)

    drain(pgq)

    assert len({id(session) for session in sessions}) == 5
    assert effects(pgq) == [1] * 5


# Not at all ------------------------------------------------------------------------------------------------


def test_what_a_failed_attempt_wrote_and_enqueued_is_rolled_back(pgq: PgQueue, transactional: Register) -> None:
    follow_up = pgq.external_task("follow_up", queue="elsewhere")

    def work(session: Session) -> None:
        leave_effect(session)
        follow_up.enqueue(session)
        if current_job().attempt < 3:
            raise ValueError("not yet")

    job_id = enqueue(transactional(pgq, work))

    drain(pgq)

    assert (pgq.get_job(job_id).status, pgq.get_job(job_id).retries) == ("completed", 2)
    assert events(pgq, job_id) == ["retry", "retry"]
    assert effects(pgq) == [3]
    assert len(pgq.list_jobs(task="follow_up")) == 1


@pytest.mark.parametrize(
    ("signal", "status"),
    [(Discard("hopeless"), "dead"), (Cancel("unwanted"), "cancelled"), (Snooze(3600), "pending")],
    ids=["discard", "cancel", "snooze"],
)
def test_what_an_attempt_wrote_that_ends_otherwise_is_rolled_back(
    pgq: PgQueue, transactional: Register, signal: Exception, status: str
) -> None:
    def work(session: Session) -> None:
        leave_effect(session)
        raise signal

    job_id = enqueue(transactional(pgq, work))

    drain(pgq)

    assert (pgq.get_job(job_id).status, pgq.get_job(job_id).retries) == (status, 0)
    assert effects(pgq) == []


def test_a_result_that_is_not_json_takes_the_rows_with_it(pgq: PgQueue, transactional: Register) -> None:
    def work(session: Session) -> object:
        leave_effect(session)
        return session.scalars(sa.select(Effect)).one()

    job_id = enqueue(transactional(pgq, work))

    drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.attempt) == ("dead", 1)
    assert "its return value cannot be stored" in job.error["message"]  # type: ignore[index]
    assert effects(pgq) == []


def test_rows_that_the_database_refuses_at_the_end_are_a_failed_attempt(pgq: PgQueue, transactional: Register) -> None:
    execute(pgq.engine, "INSERT INTO once (id) VALUES (1)")

    def work(session: Session) -> None:
        leave_effect(session)
        session.add(Once(id=current_job().attempt))  # flushed after the task has returned

    job_id = enqueue(transactional(pgq, work))

    drain(pgq)

    assert pgq.get_job(job_id).status == "completed"
    assert pgq.job_events(job_id)[0]["error"]["type"] == "sqlalchemy.exc.IntegrityError"
    assert effects(pgq) == [2]


@pytest.mark.parametrize("taken", ["seized", "cancelled"])
def test_a_claim_that_was_lost_meanwhile_takes_the_rows_with_it(
    pgq: PgQueue, transactional: Register, taken: str, caplog: pytest.LogCaptureFixture
) -> None:
    def work(session: Session) -> str:
        job_id = current_job().id
        if taken == "seized":
            seize(pgq, job_id)
        else:
            pgq.cancel(job_id, force=True)
        leave_effect(session)
        return "too late"

    job_id = enqueue(transactional(pgq, work))

    report = drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.result) == ("pending" if taken == "seized" else "cancelled", None)
    assert effects(pgq) == []
    assert (report.completed, report.lost) == (0, 1)
    assert f"claim lost: job {job_id}" in caplog.text


# A session that is the worker's ----------------------------------------------------------------------------


@pytest.mark.parametrize("commit", [Session.commit, lambda session: session.connection().commit()])
def test_a_task_that_commits_its_session_or_the_connection_below_has_failed(
    pgq: PgQueue, transactional: Register, commit: Callable[[Session], None]
) -> None:
    def work(session: Session) -> None:
        leave_effect(session)
        commit(session)

    job_id = enqueue(transactional(pgq, work, retry=Retry(max_retries=0)))

    drain(pgq)

    job = pgq.get_job(job_id)
    assert job.status == "dead"
    assert job.error["type"] == "pgqueue.errors.IllegalTransition"  # type: ignore[index]
    assert "the transactional task 'task' committed its session" in job.error["message"]  # type: ignore[index]
    assert effects(pgq) == []


def test_a_task_that_ignores_that_its_commit_was_refused_has_committed_nothing_by_itself(
    pgq: PgQueue, transactional: Register
) -> None:
    seen = []

    def work(session: Session) -> None:
        leave_effect(session)
        with pytest.raises(IllegalTransition):
            session.commit()
        if current_job().attempt == 1:
            raise ValueError("and now it fails")
        seen.append(session.scalars(sa.select(Effect.attempt)).all())

    job_id = enqueue(transactional(pgq, work))

    drain(pgq)

    assert pgq.get_job(job_id).status == "completed"
    assert seen == [[2]]
    assert effects(pgq) == [2]


# Nothing is held up ----------------------------------------------------------------------------------------


def test_a_task_that_has_not_used_its_session_yet_holds_nobody_up(pgq: PgQueue, transactional: Register) -> None:
    """On SQLite a transaction that has begun keeps everybody else from writing."""

    def work(session: Session) -> None:
        with pgq.engine.begin() as other:
            other.execute(sa.insert(Effect).values(attempt=0))
        leave_effect(session)

    job_id = enqueue(transactional(pgq, work))

    drain(pgq)

    assert pgq.get_job(job_id).status == "completed"
    assert effects(pgq) == [0, 1]


# Stopped on the way ----------------------------------------------------------------------------------------


def test_an_async_task_is_rolled_back_at_its_timeout(pgq: PgQueue) -> None:
    @pgq.task(transactional=True, timeout=0.05, retry=AT_ONCE)
    async def slow(session: AsyncSession) -> None:
        await session.run_sync(leave_effect)
        if current_job().attempt == 1:
            await asyncio.sleep(3600)

    job_id = enqueue(slow)

    drain(pgq)

    assert pgq.get_job(job_id).status == "completed"
    assert pgq.job_events(job_id)[0]["error"]["type"] == "TimeoutError"
    assert effects(pgq) == [2]


def test_an_async_task_that_a_stopping_worker_cancels_is_rolled_back(pgq: PgQueue) -> None:
    wrote = threading.Event()

    @pgq.task(transactional=True)
    async def endless(session: AsyncSession) -> None:
        await session.run_sync(leave_effect)
        wrote.set()
        await asyncio.sleep(3600)

    job_id = enqueue(endless)

    with working(pgq, shutdown_timeout=0.05):
        wait_for(wrote.is_set, "the task to write")

    job = pgq.get_job(job_id)
    assert (job.status, job.retries) == ("pending", 0)
    first, *later = pgq.job_events(job_id)
    assert (first["event"], first["reason"]) == ("release", "the worker stopped while the job was running")
    # On SQLite the claimer may have waited for the task's transaction, and claimed the job again after its release.
    assert all(event["reason"] == "its worker did not receive the claim, or had stopped" for event in later)
    assert effects(pgq) == []


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_task_that_ends_after_its_job_was_given_back_has_no_effect(
    pgq: PgQueue, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def late(session: Session) -> str:
        began.set()
        assert go_on.wait(PATIENCE_SECONDS)
        leave_effect(session)
        return "too late"

    async def late_async(session: AsyncSession) -> str:
        began.set()
        while not go_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        await session.run_sync(leave_effect)
        return "too late"

    chosen: Any = late if kind == "def" else late_async
    job_id = enqueue(pgq.task(name="late", transactional=True)(chosen))

    with working(pgq, shutdown_timeout=0.05) as worker:
        wait_for(began.is_set, "the task to run")
        worker.stop()
        wait_for_status(pgq, job_id, "pending")
        go_on.set()
        wait_for(lambda: "changes nothing" in caplog.text, "the outcome to be refused")

    job = pgq.get_job(job_id)
    assert (job.status, job.retries, job.result) == ("pending", 0, None)
    assert effects(pgq) == []
    assert (worker.report.released, worker.report.completed) == (1, 0)


# What only PostgreSQL does ---------------------------------------------------------------------------------


def test_a_constraint_that_is_violated_at_the_commit_is_a_failed_attempt(pg: PgQueue, transactional: Register) -> None:
    execute(pg.engine, "CREATE TABLE parent (id integer PRIMARY KEY)")
    execute(pg.engine, "CREATE TABLE child (parent_id integer REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")

    def work(session: Session) -> None:
        leave_effect(session)
        session.execute(sa.text("INSERT INTO child VALUES (1)"))
        if current_job().attempt == 2:
            session.execute(sa.text("INSERT INTO parent VALUES (1)"))

    job_id = enqueue(transactional(pg, work))

    report = drain(pg)

    job = pg.get_job(job_id)
    assert (job.status, job.retries) == ("completed", 1)
    assert pg.job_events(job_id)[0]["error"]["type"] == "sqlalchemy.exc.IntegrityError"
    assert effects(pg) == [2]
    assert (report.completed, report.retried, report.lost) == (1, 1, 0)


@pytest.mark.parametrize("caught", [False, True], ids=["raised", "caught"])
def test_an_attempt_whose_transaction_the_server_ended_has_failed(
    pg: PgQueue, transactional: Register, caught: bool
) -> None:
    def work(session: Session) -> None:
        leave_effect(session)
        if current_job().attempt == 1:
            session.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = '10ms'"))
            pid = session.scalar(sa.text("SELECT pg_backend_pid()"))
            wait_for(lambda: not is_connected(pg, pid), "the server to end the idle transaction")
            if not caught:
                session.execute(sa.text("SELECT 1"))

    job_id = enqueue(transactional(pg, work))

    drain(pg)

    assert (pg.get_job(job_id).status, pg.get_job(job_id).retries) == ("completed", 1)
    assert pg.job_events(job_id)[0]["error"]["type"].startswith("sqlalchemy.exc.")
    assert effects(pg) == [2]


def is_connected(pg: PgQueue, pid: int | None) -> bool:
    return bool(scalar(pg.engine, "SELECT count(*) FROM pg_stat_activity WHERE pid = :pid", pid=pid))


def test_a_lost_serialization_is_a_failed_attempt(pg: PgQueue, transactional: Register) -> None:
    execute(pg.engine, "INSERT INTO once (id) VALUES (1)")

    def work(session: Session) -> None:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        session.execute(sa.text("SELECT 1"))
        if current_job().attempt == 1:
            execute(pg.engine, "UPDATE once SET id = 2")
        session.execute(sa.text("UPDATE once SET id = id + 10"))
        leave_effect(session)

    job_id = enqueue(transactional(pg, work))

    drain(pg)

    assert (pg.get_job(job_id).status, pg.get_job(job_id).retries) == ("completed", 1)
    assert scalar(pg.engine, "SELECT id FROM once") == 12
    assert effects(pg) == [2]
