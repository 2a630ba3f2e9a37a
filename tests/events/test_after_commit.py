"""job:enqueued is told after the commit of the application's transaction, and only then."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support import wait_for

from pgqueue import JobEvent, PgQueue, Task
from pgqueue.engine import make_async_engine, parse_url
from pgqueue.events import Listeners


@pytest.fixture
def heard(pgq: PgQueue) -> list[JobEvent]:
    heard: list[JobEvent] = []
    pgq.on("job:enqueued", heard.append)
    return heard


@pytest.fixture
def work(pgq: PgQueue) -> Task[..., Any]:
    @pgq.task
    def work(n: int = 0) -> None: ...

    return work


def numbers(pgq: PgQueue, heard: list[JobEvent]) -> list[int]:
    """What the jobs that were told of carry, once all is delivered."""
    assert pgq._listeners.deliver(60)
    return [event.payload.get("n", 0) for event in heard]


def test_nothing_is_told_before_a_session_commits(
    pgq: PgQueue, engine: sa.Engine, work: Task[..., Any], heard: list[JobEvent]
) -> None:
    with Session(engine) as session:
        result = work.enqueue(session, n=1)
        before = numbers(pgq, heard)
        session.commit()
        after = numbers(pgq, heard)
        session.commit()

    assert (before, after, numbers(pgq, heard)) == ([], [1], [1])
    assert [event.job_id for event in heard] == [result.id]


def test_nothing_is_told_before_a_connection_commits(
    pgq: PgQueue, engine: sa.Engine, work: Task[..., Any], heard: list[JobEvent]
) -> None:
    with engine.connect() as connection:
        work.enqueue(connection, n=1)
        before = numbers(pgq, heard)
        connection.commit()
        after = numbers(pgq, heard)
        work.enqueue(connection, n=2)
        connection.rollback()
        work.enqueue(connection, n=3)
        connection.commit()

    assert (before, after, numbers(pgq, heard)) == ([], [1], [1, 3])


def test_what_was_told_of_can_be_read(pgq: PgQueue, engine: sa.Engine, work: Task[..., Any]) -> None:
    seen: list[str] = []
    pgq.on("job:enqueued", lambda event: seen.append(pgq.get_job(event.job_id).status))

    for n in range(20):
        with engine.begin() as connection:
            work.enqueue(connection, n=n)

    wait_for(lambda: len(seen) == 20, "20 events")
    assert seen == ["pending"] * 20


def test_nothing_is_told_of_what_is_rolled_back_to_a_savepoint(
    pgq: PgQueue, engine: sa.Engine, work: Task[..., Any], heard: list[JobEvent]
) -> None:
    with Session(engine) as session, session.begin():
        work.enqueue(session, n=1)
        with session.begin_nested() as outer:
            work.enqueue(session, n=2)
            with session.begin_nested():
                work.enqueue(session, n=3)
            outer.rollback()
        with session.begin_nested():
            work.enqueue(session, n=4)
            with session.begin_nested() as inner:
                work.enqueue(session, n=5)
                inner.rollback()

    assert numbers(pgq, heard) == [1, 4]


def test_nothing_is_told_of_a_savepoint_that_began_before_the_first_enqueue(
    pgq: PgQueue, engine: sa.Engine, work: Task[..., Any], heard: list[JobEvent]
) -> None:
    with engine.begin() as connection:
        savepoint = connection.begin_nested()
        work.enqueue(connection, n=1)
        savepoint.rollback()
        work.enqueue(connection, n=2)

    assert numbers(pgq, heard) == [2]


def test_a_session_inside_of_an_outer_transaction_is_told_of_once_that_commits(
    pgq: PgQueue, engine: sa.Engine, work: Task[..., Any], heard: list[JobEvent]
) -> None:
    with engine.connect() as connection:
        with connection.begin():
            with Session(connection) as session:
                work.enqueue(session, n=1)
                session.commit()
            before = numbers(pgq, heard)
        after = numbers(pgq, heard)

    assert (before, after) == ([], [1])


def test_a_deferred_constraint_that_fails_the_commit_leaves_nothing_to_tell(pg: PgQueue) -> None:
    heard: list[JobEvent] = []
    pg.on("job:enqueued", heard.append)

    @pg.task
    def work(n: int) -> None: ...

    with pg.engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE parents (id int PRIMARY KEY)")
        connection.exec_driver_sql("CREATE TABLE children (id int REFERENCES parents DEFERRABLE INITIALLY DEFERRED)")
        connection.commit()
        work.enqueue(connection, n=1)
        connection.exec_driver_sql("INSERT INTO children VALUES (1)")
        with pytest.raises(sa.exc.IntegrityError):
            connection.commit()
        connection.rollback()
        work.enqueue(connection, n=2)
        connection.commit()

    assert numbers(pg, heard) == [2]


def test_every_way_to_enqueue_is_told_of(
    pgq: PgQueue, engine: sa.Engine, work: Task[..., Any], heard: list[JobEvent]
) -> None:
    with Session(engine) as session, session.begin():
        work.enqueue(session, n=1)
        ids = work.enqueue_many(session, [{"n": 2}, {"n": 3}])
        session.add(work.using(metadata={"a": 1}).new(n=4))
        pgq.enqueue(session, "work", {"n": 5})

    assert sorted(numbers(pgq, heard)) == [1, 2, 3, 4, 5]
    assert {event.job_id for event in heard if event.payload["n"] in (2, 3)} == set(ids)
    assert [event.metadata for event in heard if event.payload["n"] == 4] == [{"a": 1}]


async def _enqueue_async(pgq: PgQueue, work: Task[..., Any]) -> None:
    engine = make_async_engine(parse_url(pgq.url))
    try:
        async with AsyncSession(engine) as session, session.begin():
            await work.enqueue_async(session, n=1)
            await work.enqueue_many_async(session, [{"n": 2}])
        async with engine.begin() as connection:
            await work.enqueue_async(connection, n=3)
        async with AsyncSession(engine) as session:
            await work.enqueue_async(session, n=4)
            await session.rollback()
    finally:
        await engine.dispose()


def test_asynchronous_transactions_are_told_of_after_their_commit(
    pgq: PgQueue, work: Task[..., Any], heard: list[JobEvent]
) -> None:
    asyncio.run(_enqueue_async(pgq, work))

    assert numbers(pgq, heard) == [1, 2, 3]


def test_an_autocommitting_connection_is_told_of_at_once(pg: PgQueue) -> None:
    heard: list[JobEvent] = []
    pg.on("job:enqueued", heard.append)

    @pg.task
    def work(n: int) -> None: ...

    engine = sa.create_engine(pg.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        work.enqueue(connection, n=1)

        assert numbers(pg, heard) == [1]


def test_a_connection_that_broke_in_its_transaction_has_nothing_to_tell(
    pgq: PgQueue, engine: sa.Engine, work: Task[..., Any], heard: list[JobEvent]
) -> None:
    with engine.connect() as connection:
        work.enqueue(connection, n=1)
        connection.invalidate()
        connection.rollback()
        work.enqueue(connection, n=2)
        connection.commit()

    assert numbers(pgq, heard) == [2]


def test_a_commit_in_two_phases_is_told_of_after_the_second(pg: PgQueue) -> None:
    heard: list[JobEvent] = []
    pg.on("job:enqueued", heard.append)

    @pg.task
    def work(n: int) -> None: ...

    with pg.engine.connect() as connection:
        for n, ends in enumerate(("commit", "rollback", "commit")):
            transaction = connection.begin_twophase()
            work.enqueue(connection, n=n)
            transaction.prepare()
            before = numbers(pg, heard)
            assert n not in before
            getattr(transaction, ends)()

    assert numbers(pg, heard) == [0, 2]


def test_whatever_goes_wrong_with_telling_the_commit_has_succeeded(
    pgq: PgQueue,
    engine: sa.Engine,
    work: Task[..., Any],
    heard: list[JobEvent],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    with monkeypatch.context() as broken:
        broken.setattr(Listeners, "tell", fail)
        with Session(engine) as session, session.begin():
            work.enqueue(session, n=1)
    with Session(engine) as session, session.begin():
        work.enqueue(session, n=2)

    assert numbers(pgq, heard) == [2]
    assert len(pgq.list_jobs()) == 2
    assert "could not be told" in caplog.text


def test_a_listener_that_gets_no_thread_hears_of_it_once_it_gets_one(
    pgq: PgQueue,
    engine: sa.Engine,
    work: Task[..., Any],
    heard: list[JobEvent],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("pgqueue"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        for n in (1, 2):
            with Session(engine) as session, session.begin():
                work.enqueue(session, n=n)
        assert not pgq._listeners.deliver(5.0)  # at once: nobody will
    with Session(engine) as session, session.begin():
        work.enqueue(session, n=3)

    assert numbers(pgq, heard) == [1, 2, 3]
    assert caplog.text.count("gets no thread") == 1
    assert "went out" not in caplog.text


def test_a_job_that_a_unique_key_kept_out_is_not_told_of(
    pgq: PgQueue, engine: sa.Engine, work: Task[..., Any], heard: list[JobEvent]
) -> None:
    unique = work.using(unique_key="k")
    with engine.begin() as connection:
        unique.enqueue(connection, n=1)
        unique.enqueue(connection, n=2)
        unique.using(on_conflict="replace").enqueue(connection, n=3)

    assert numbers(pgq, heard) == [1]
