"""The application that pgqueue's workers run, and how it enqueues: the ordinary decorator, the ordinary calls.

Workers are started by the ordinary command line: pgqueue worker pgqueue_app:pgq
"""

from __future__ import annotations

import os
from typing import Any

import recorder
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from pgqueue import PgQueue, migration

pgq = PgQueue()


@pgq.task
def noop(n: int) -> None:
    recorder.run(n)


@pgq.task
async def noop_async(n: int) -> None:
    recorder.run(n)


#: Which of the tasks the enqueueing verbs use.
TASKS = {"def": noop, "async def": noop_async}


def chosen_task() -> Any:
    return TASKS[os.environ.get("BENCH_TASK", "def")]


def setup(url: str) -> None:
    migration.upgrade(create_engine(url), pgq.schema)


def bulk(url: str, jobs: int, chunk: int) -> dict[str, float]:
    from program import chunks, timed

    task = chosen_task()
    with Session(create_engine(url)) as session:
        session.connection()

        def work() -> None:
            for numbers in chunks(jobs, chunk):
                ids = task.enqueue_many(session, [{"n": n} for n in numbers])
                assert len(ids) == len(numbers)
                session.commit()

        return timed(work)


def single(url: str, jobs: int) -> dict[str, float]:
    from program import timed

    task = chosen_task()
    pgq.connect_to(url)
    with Session(create_engine(url)) as session:
        session.connection()

        def work() -> None:
            for n in range(jobs):
                task.enqueue(session, n=n)
                session.commit()

        return timed(work)


def latency(url: str, gaps: list[float]) -> Any:
    from program import at_odd_moments

    task = chosen_task()
    pgq.connect_to(url)
    with Session(create_engine(url)) as session:
        return at_odd_moments(gaps, lambda n: task.enqueue(session, n=n), session.commit)


if __name__ == "__main__":
    from program import main

    main({"setup": setup, "bulk": bulk, "single": single, "latency": latency})
