"""A job exists if and only if the transaction that enqueued it committed: with every kind of session."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import external, is_postgresql, statuses
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from support import scalar

from pgqueue import InvalidPayload, PgQueue, store


class Base(DeclarativeBase):
    pass


class Order(Base):
    """A table of the application."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


@contextmanager
def plain_session(pgq: PgQueue) -> Iterator[Any]:
    with Session(pgq.engine) as session:
        yield session


@contextmanager
def scoped(pgq: PgQueue) -> Iterator[Any]:
    registry = scoped_session(sessionmaker(pgq.engine))
    yield registry
    registry.remove()


@contextmanager
def core_connection(pgq: PgQueue) -> Iterator[Any]:
    with pgq.engine.connect() as connection:
        yield connection


@asynccontextmanager
async def async_session(pgq: PgQueue) -> AsyncIterator[Any]:
    async with AsyncSession(pgq.async_engine) as session:
        yield session


@asynccontextmanager
async def async_scoped(pgq: PgQueue) -> AsyncIterator[Any]:
    registry = async_scoped_session(async_sessionmaker(pgq.async_engine), scopefunc=asyncio.current_task)
    yield registry
    await registry.remove()


@asynccontextmanager
async def async_connection(pgq: PgQueue) -> AsyncIterator[Any]:
    async with pgq.async_engine.connect() as connection:
        yield connection


Way = Callable[[PgQueue], AbstractContextManager[Any]]
AsyncWay = Callable[[PgQueue], AbstractAsyncContextManager[Any]]

each_way = pytest.mark.parametrize("way", [plain_session, scoped, core_connection])
each_async_way = pytest.mark.parametrize("way", [async_session, async_scoped, async_connection])


def run(pgq: PgQueue, work: Coroutine[Any, Any, None]) -> None:
    async def worked() -> None:
        try:
            await work
        finally:
            await pgq.async_engine.dispose()

    asyncio.run(worked())


def committed_jobs(pgq: PgQueue) -> int:
    """How many jobs another connection sees; on SQLite without waiting for a writer."""
    if is_postgresql(pgq):
        count: int = scalar(pgq.engine, "SELECT count(*) FROM pgqueue.jobs")
        return count
    reader = sqlite3.connect(pgq.url.database or "")
    try:
        (count,) = reader.execute("SELECT count(*) FROM pgqueue_jobs").fetchone()
    finally:
        reader.close()
    return count


# Commit and rollback ---------------------------------------------------------------------------------------


@each_way
def test_a_job_is_there_after_the_commit_and_not_before(pgq: PgQueue, way: Way) -> None:
    with way(pgq) as session:
        job_id = external(pgq).enqueue(session, n=1).id
        before = committed_jobs(pgq)
        session.commit()

    assert before == 0
    assert statuses(pgq) == {job_id: "pending"}


@each_way
def test_a_rolled_back_transaction_leaves_no_job(pgq: PgQueue, way: Way) -> None:
    with way(pgq) as session:
        external(pgq).enqueue(session, n=1)
        external(pgq).enqueue_many(session, [{"n": 2}, {"n": 3}])
        session.rollback()

    assert statuses(pgq) == {}


@each_way
def test_a_session_that_is_closed_without_commit_leaves_no_job(pgq: PgQueue, way: Way) -> None:
    with way(pgq) as session:
        external(pgq).enqueue(session, n=1)

    assert statuses(pgq) == {}


@each_way
def test_a_session_can_enqueue_again_after_commit_and_after_rollback(pgq: PgQueue, way: Way) -> None:
    with way(pgq) as session:
        first = external(pgq).enqueue(session, n=1).id
        session.commit()
        external(pgq).enqueue(session, n=2)
        session.rollback()
        third = external(pgq).enqueue(session, n=3).id
        session.commit()

    assert sorted(statuses(pgq)) == [first, third]


@each_way
def test_a_savepoint_that_is_rolled_back_takes_only_its_own_jobs_with_it(pgq: PgQueue, way: Way) -> None:
    with way(pgq) as session:
        kept = external(pgq).enqueue(session, n=1).id
        savepoint = session.begin_nested()
        external(pgq).enqueue(session, n=2)
        savepoint.rollback()
        later = external(pgq).enqueue(session, n=3).id
        session.commit()

    assert sorted(statuses(pgq)) == [kept, later]


@each_way
def test_a_savepoint_inside_a_savepoint_is_undone_with_the_outer_one(pgq: PgQueue, way: Way) -> None:
    with way(pgq) as session:
        outer = session.begin_nested()
        external(pgq).enqueue(session, n=1)
        inner = session.begin_nested()
        external(pgq).enqueue(session, n=2)
        inner.commit()
        outer.rollback()
        kept = external(pgq).enqueue(session, n=3).id
        session.commit()

    assert list(statuses(pgq)) == [kept]


@each_way
def test_a_released_savepoint_counts_only_when_its_transaction_commits(pgq: PgQueue, way: Way) -> None:
    with way(pgq) as session:
        with session.begin_nested():
            external(pgq).enqueue(session, n=1)
        session.rollback()

    assert statuses(pgq) == {}


@each_async_way
def test_an_asynchronous_commit_stores_the_job(pgq: PgQueue, way: AsyncWay) -> None:
    async def work() -> None:
        async with way(pgq) as session:
            await external(pgq).enqueue_async(session, n=1)
            await external(pgq).enqueue_many_async(session, [{"n": 2}, {"n": 3}])
            assert committed_jobs(pgq) == 0
            await session.commit()

    run(pgq, work())

    assert len(statuses(pgq)) == 3


@each_async_way
def test_an_asynchronous_rollback_leaves_no_job(pgq: PgQueue, way: AsyncWay) -> None:
    async def work() -> None:
        async with way(pgq) as session:
            await external(pgq).enqueue_async(session, n=1)
            await session.rollback()

    run(pgq, work())

    assert statuses(pgq) == {}


@each_async_way
def test_an_asynchronous_savepoint_that_is_rolled_back_takes_only_its_own_jobs(pgq: PgQueue, way: AsyncWay) -> None:
    kept = []

    async def work() -> None:
        async with way(pgq) as session:
            kept.append((await external(pgq).enqueue_async(session, n=1)).id)
            savepoint = await session.begin_nested()
            await external(pgq).enqueue_async(session, n=2)
            await savepoint.rollback()
            await session.commit()

    run(pgq, work())

    assert list(statuses(pgq)) == kept


@each_async_way
def test_an_exception_in_an_asynchronous_transaction_leaves_no_job(pgq: PgQueue, way: AsyncWay) -> None:
    async def work() -> None:
        async with way(pgq) as session, session.begin():
            await external(pgq).enqueue_async(session, n=1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(pgq, work())

    assert statuses(pgq) == {}


# Together with the application's rows ----------------------------------------------------------------------


def test_a_row_of_the_application_and_its_job_commit_together_or_not_at_all(pgq: PgQueue) -> None:
    Base.metadata.create_all(pgq.engine)

    def place_order(order_id: int, *, fail: bool) -> None:
        with Session(pgq.engine) as session, session.begin():
            session.add(Order(id=order_id))
            external(pgq).enqueue(session, order_id=order_id)
            if fail:
                raise ZeroDivisionError

    place_order(1, fail=False)
    with pytest.raises(ZeroDivisionError):
        place_order(2, fail=True)

    assert scalar(pgq.engine, "SELECT count(*) FROM orders") == 1
    assert [job.payload for job in pgq.list_jobs()] == [{"order_id": 1}]


def test_a_job_is_undone_when_the_applications_own_statement_fails_at_commit(pgq: PgQueue) -> None:
    Base.metadata.create_all(pgq.engine)
    with Session(pgq.engine) as session, session.begin():
        session.add(Order(id=1))

    with Session(pgq.engine) as session:
        external(pgq).enqueue(session, order_id=1)
        session.add(Order(id=1))
        with pytest.raises(sa.exc.IntegrityError):
            session.commit()

    assert statuses(pgq) == {}


def test_a_commit_flushes_the_sessions_new_objects_once_and_commits_once(pgq: PgQueue) -> None:
    Base.metadata.create_all(pgq.engine)
    happened = []
    with Session(pgq.engine) as session:
        sa.event.listen(session, "after_flush", lambda *_: happened.append("flush"))
        sa.event.listen(session, "after_commit", lambda *_: happened.append("commit"))

        session.add(Order(id=1))
        session.add(external(pgq).new(n=1))
        external(pgq).enqueue(session, n=2)
        session.commit()

    assert happened == ["flush", "commit"]
    assert len(statuses(pgq)) == 2


def test_enqueue_does_not_flush_what_the_session_holds(pgq: PgQueue) -> None:
    Base.metadata.create_all(pgq.engine)
    with Session(pgq.engine) as session:
        order = Order(id=1)
        session.add(order)

        external(pgq).enqueue(session, n=1)

        assert order in session.new


def test_a_session_on_an_engine_of_the_application_may_enqueue(pgq: PgQueue) -> None:
    theirs = sa.create_engine(pgq.url)
    try:
        with Session(theirs) as session, session.begin():
            job_id = external(pgq).enqueue(session, n=1).id
        with Session(theirs) as session:
            external(pgq).enqueue(session, n=2)
            session.rollback()
    finally:
        theirs.dispose()

    assert list(statuses(pgq)) == [job_id]


def test_a_session_inside_an_outer_transaction_is_undone_with_it(pgq: PgQueue) -> None:
    """The way test suites of applications isolate their tests."""
    with pgq.engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            external(pgq).enqueue(session, n=1)
            session.commit()
        outer.rollback()

    assert statuses(pgq) == {}


# Two-phase commit ------------------------------------------------------------------------------------------


def test_a_two_phase_session_stores_the_job_when_it_commits(pg: PgQueue) -> None:
    with Session(pg.engine, twophase=True) as session:
        external(pg).enqueue(session, n=1)
        session.prepare()
        before = committed_jobs(pg)
        session.commit()

    assert before == 0
    assert list(statuses(pg).values()) == ["pending"]


def test_a_two_phase_session_that_is_rolled_back_after_prepare_leaves_no_job(pg: PgQueue) -> None:
    with Session(pg.engine, twophase=True) as session:
        external(pg).enqueue(session, n=1)
        session.prepare()
        session.rollback()

    assert statuses(pg) == {}
    assert scalar(pg.engine, "SELECT count(*) FROM pg_prepared_xacts") == 0


@pytest.mark.parametrize(("end", "jobs"), [("commit", 1), ("rollback", 0)])
def test_a_two_phase_transaction_of_a_connection_decides_about_its_jobs(pg: PgQueue, end: str, jobs: int) -> None:
    with pg.engine.connect() as connection:
        transaction = connection.begin_twophase()
        external(pg).enqueue(connection, n=1)
        transaction.prepare()
        getattr(transaction, end)()

    assert committed_jobs(pg) == jobs


# Autocommit ------------------------------------------------------------------------------------------------


def test_an_autocommit_connection_stores_each_job_at_once(pg: PgQueue) -> None:
    with pg.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        external(pg).enqueue(connection, n=1)
        at_once = committed_jobs(pg)
        external(pg).using(unique_key="a").enqueue(connection, n=2)
        again = external(pg).using(unique_key="a").enqueue(connection, n=3)

    assert at_once == 1
    assert not again.inserted
    assert committed_jobs(pg) == 2


# The ORM's own spelling ------------------------------------------------------------------------------------


def test_a_job_added_to_a_session_is_stored_by_its_commit(pgq: PgQueue) -> None:
    with Session(pgq.engine) as session:
        job = external(pgq).new(n=1)
        session.add(job)
        session.commit()
        job_id, status, attempt = job.id, job.status, job.attempt

    assert (status, attempt) == ("pending", 0)
    assert statuses(pgq) == {job_id: "pending"}


def test_a_job_added_to_a_session_has_its_id_after_the_flush(pgq: PgQueue) -> None:
    with Session(pgq.engine) as session:
        job = external(pgq).new(n=1)
        session.add(job)
        session.flush()

        assert job.id > 0


def test_a_job_added_to_a_session_goes_with_its_rollback(pgq: PgQueue) -> None:
    with Session(pgq.engine) as session:
        session.add(external(pgq).new(n=1))
        session.flush()
        session.rollback()

    assert statuses(pgq) == {}


def test_a_job_added_inside_a_savepoint_goes_with_its_rollback(pgq: PgQueue) -> None:
    with Session(pgq.engine) as session:
        session.add(external(pgq).new(n=1))
        savepoint = session.begin_nested()
        session.add(external(pgq).new(n=2))
        session.flush()
        savepoint.rollback()
        session.commit()

    assert [job.payload for job in pgq.list_jobs()] == [{"n": 1}]


def test_jobs_added_to_an_asynchronous_session_are_stored_by_its_commit(pgq: PgQueue) -> None:
    async def work() -> None:
        async with AsyncSession(pgq.async_engine) as session:
            job = external(pgq).new(n=1)
            session.add(job)
            await session.flush()
            assert job.id > 0
            await session.commit()

    run(pgq, work())

    assert len(statuses(pgq)) == 1


def test_an_added_job_and_an_enqueued_one_are_stored_alike(pgq: PgQueue) -> None:
    task = external(pgq).using(queue="mail", priority=7, max_retries=1, unique_key="k", metadata={"trace": "t"})
    with Session(pgq.engine) as session, session.begin():
        session.add(task.new(n=1))
    with Session(pgq.engine) as session, session.begin():
        task.using(unique_key="other").enqueue(session, n=1)

    added, enqueued = (vars(job) for job in reversed(pgq.list_jobs()))
    for different in ("id", "unique_key", "run_at", "created_at"):
        del added[different], enqueued[different]
    assert added == enqueued


def test_jobs_can_be_queried_and_joined_as_mapped_objects(pgq: PgQueue) -> None:
    with Session(pgq.engine) as session, session.begin():
        external(pgq).enqueue(session, n=1)
        external(pgq).enqueue(session, n=2)

    with Session(pgq.engine) as session:
        found = session.scalars(sa.select(pgq.Job).where(pgq.Job.task == "work").order_by(pgq.Job.id)).all()

        assert [job.payload["n"] for job in found] == [1, 2]


# Many at once ----------------------------------------------------------------------------------------------


@each_way
def test_the_ids_of_a_bulk_enqueue_are_in_the_order_of_its_payloads(pgq: PgQueue, way: Way) -> None:
    count = 2 * store.INSERT_JOBS_MAX + 7
    with way(pgq) as session:
        ids = external(pgq).enqueue_many(session, [{"n": n} for n in range(count)])
        session.commit()

    jobs = pgq.tables.jobs
    with pgq.begin() as connection:
        numbers = {job_id: payload["n"] for job_id, payload in connection.execute(sa.select(jobs.c.id, jobs.c.payload))}
    assert [numbers[job_id] for job_id in ids] == list(range(count))


def test_a_bulk_enqueue_is_split_by_size_as_well_as_by_number(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "INSERT_BYTES_MAX", 1_000)
    statements = []
    sa.event.listen(pgq.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    with pgq.begin() as connection:
        ids = external(pgq).enqueue_many(connection, [{"text": "x" * 300} for _ in range(10)])

    assert len([sql for sql in statements if sql.startswith("INSERT")]) == 4
    assert len(set(ids)) == len(statuses(pgq)) == 10


def test_a_payload_larger_than_a_chunk_is_stored_in_a_chunk_of_its_own(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "INSERT_BYTES_MAX", 100)

    with pgq.begin() as connection:
        ids = external(pgq).enqueue_many(connection, [{"text": "x" * 300}, {"n": 1}, {"text": "y" * 300}])

    assert len(ids) == 3


def test_a_bulk_enqueue_of_nothing_stores_nothing(pgq: PgQueue) -> None:
    with pgq.begin() as connection:
        ids = external(pgq).enqueue_many(connection, [])

    assert ids == []
    assert statuses(pgq) == {}


def test_a_bulk_enqueue_takes_a_generator(pgq: PgQueue) -> None:
    with pgq.begin() as connection:
        ids = external(pgq).enqueue_many(connection, ({"n": n} for n in range(3)))

    assert [pgq.get_job(job_id).payload for job_id in ids] == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_one_bad_payload_among_many_keeps_all_of_them_out(pgq: PgQueue) -> None:
    @pgq.task
    def double(n: int) -> None: ...

    payloads: list[Any] = [{"n": n} for n in range(store.INSERT_JOBS_MAX + 5)]
    payloads[-1] = {"n": "many"}

    with pgq.begin() as connection, pytest.raises(InvalidPayload, match="'double' does not fit: n: "):
        double.enqueue_many(connection, payloads)

    assert statuses(pgq) == {}


def test_a_generator_that_fails_half_way_keeps_all_payloads_out(pgq: PgQueue) -> None:
    def broken() -> Iterator[dict[str, int]]:
        yield {"n": 1}
        raise ZeroDivisionError

    with pgq.begin() as connection, pytest.raises(ZeroDivisionError):
        external(pgq).enqueue_many(connection, broken())

    assert statuses(pgq) == {}


def test_a_database_error_in_a_later_chunk_undoes_the_earlier_ones(pg: PgQueue) -> None:
    with pg.begin() as connection:
        connection.execute(sa.text("ALTER TABLE pgqueue.jobs ADD CHECK (payload ->> 'n' <> '1003')"))

    with pytest.raises(sa.exc.IntegrityError), Session(pg.engine) as session, session.begin():
        external(pg).enqueue_many(session, [{"n": n} for n in range(1_010)])

    assert statuses(pg) == {}


@each_way
def test_a_bulk_enqueue_uses_the_options_for_every_job(pgq: PgQueue, way: Way) -> None:
    task = external(pgq).using(queue="mail", priority=3, max_retries=9, metadata={"trace": "t"})

    with way(pgq) as session:
        task.enqueue_many(session, [{"n": 1}, {"n": 2}])
        session.commit()

    assert {(job.queue, job.priority, job.max_retries, job.metadata["trace"]) for job in pgq.list_jobs()} == {
        ("mail", 3, 9, "t")
    }


def test_enqueue_by_name_is_the_same_as_by_task(pgq: PgQueue) -> None:
    external(pgq)

    with Session(pgq.engine) as session, session.begin():
        enqueued = pgq.enqueue(session, "work", {"n": 1}, priority=4, queue="mail")

    job = pgq.get_job(enqueued.id)
    assert (job.task, job.payload, job.priority, job.queue) == ("work", {"n": 1}, 4, "mail")
