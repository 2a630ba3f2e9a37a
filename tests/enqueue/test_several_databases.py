"""A session may keep classes in different databases: jobs go where the mapped class goes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from jobs import statuses
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgqueue import PgQueue


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def elsewhere() -> Iterator[sa.Engine]:
    """Another database, without pgqueue's tables."""
    engine = sa.create_engine("sqlite://")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_a_session_with_several_databases_enqueues_where_jobs_are_bound_to(pgq: PgQueue, elsewhere: sa.Engine) -> None:
    work = pgq.external_task("work")
    with Session(binds={Base: elsewhere, pgq.Job: pgq.engine}) as session:
        session.add(Note())
        work.enqueue(session, n=1)
        work.enqueue_many(session, [{"n": 2}])
        session.add(work.new(n=3))
        session.commit()

    (job, *_) = claimed = pgq.claim("consumer", limit=3)
    with Session(binds={Base: elsewhere, pgq.Job: pgq.engine}) as session:
        pgq.ack(job, session=session)
        session.commit()

    assert len(claimed) == 3
    assert sorted(statuses(pgq).values()) == ["completed", "running", "running"]


def test_an_asynchronous_session_with_several_databases_enqueues_where_jobs_are_bound_to(
    pgq: PgQueue, elsewhere: sa.Engine
) -> None:
    work = pgq.external_task("work")

    async def enqueue() -> None:
        other = create_async_engine("sqlite+aiosqlite://")
        async with AsyncSession(binds={Base: other, pgq.Job: pgq.async_engine}) as session:
            await work.enqueue_async(session, n=1)
            await work.enqueue_many_async(session, [{"n": 2}])
            await session.commit()
        await pgq.async_engine.dispose()
        await other.dispose()

    asyncio.run(enqueue())

    assert list(statuses(pgq).values()) == ["pending", "pending"]


def test_a_session_that_is_bound_as_a_whole_needs_no_word_of_jobs(pgq: PgQueue) -> None:
    unnamed = PgQueue()
    with Session(pgq.engine) as session:
        unnamed.external_task("work").enqueue(session)
        session.commit()

    assert list(statuses(pgq).values()) == ["pending"]
