"""The application that pgqueue's workers run, and how it enqueues: the ordinary decorator, the ordinary calls.

Workers are started by the ordinary command line: pgqueue worker pgqueue_app:pgq
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import recorder
from sqlalchemy import BigInteger, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgqueue import PgQueue, migration

pgq = PgQueue()


class Base(DeclarativeBase):
    pass


class Order(Base):
    """A row of the application's own."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    job: Mapped[int]


@pgq.task
def noop(n: int) -> None:
    recorder.run(n)


@pgq.task(keep_completed=0)
def noop_deleted(n: int) -> None:
    recorder.run(n)


@pgq.task
async def noop_async(n: int) -> None:
    recorder.run(n)


@pgq.task
def silent(n: int) -> None:
    """Notes nothing, so that all memory of its worker is the worker's own."""


@pgq.task(transactional=True)
def write_order(session: Session, n: int) -> None:
    session.add(Order(job=n))
    recorder.run(n)


#: Which of the tasks is enqueued is said by BENCH_TASK.
TASKS: dict[str, Any] = {task.name: task for task in (noop, noop_deleted, noop_async, silent, write_order)}
TASK = os.environ.get("BENCH_TASK", "noop")


class Producer:
    """An application with an engine and a session of its own."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.task = TASKS[TASK]

    def many(self, numbers: range) -> None:
        ids = self.task.enqueue_many(self.session, [{"n": n} for n in numbers])
        assert len(ids) == len(numbers)
        self.session.commit()

    def one(self, n: int) -> None:
        self.task.enqueue(self.session, n=n)

    def commit(self) -> None:
        self.session.commit()


@contextmanager
def producer(url: str) -> Iterator[Producer]:
    pgq.connect_to(url)  # for the wake-ups, which have a connection of their own
    with Session(create_engine(url)) as session:
        session.connection()
        session.rollback()
        yield Producer(session)
    pgq.dispose()


def setup(url: str) -> None:
    engine = create_engine(url)
    migration.upgrade(engine, pgq.schema)
    Base.metadata.create_all(engine)


if __name__ == "__main__":
    from program import main

    main(setup=setup, producer=producer)
