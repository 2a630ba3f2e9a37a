"""What the tests of the worker need: jobs, a worker that runs beside the test, and gates that hold tasks up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from support import PATIENCE_SECONDS, rows, wait_for

from pgqueue import Job, PgQueue, Task, Worker, WorkerConfig, WorkerReport


def enqueue(task: Task[..., Any], **payload: Any) -> int:
    """Enqueue one job and commit; its id."""
    with task.pgq.engine.begin() as connection:
        return task.enqueue(connection, **payload).id


def enqueue_many(task: Task[..., Any], count: int, **payload: Any) -> list[int]:
    with task.pgq.engine.begin() as connection:
        return task.enqueue_many(connection, [payload] * count)


def table(pgq: PgQueue, name: str) -> str:
    """How plain SQL names a table of pgqueue: with the schema on PostgreSQL, with the prefix on SQLite."""
    return f"pgqueue.{name}" if pgq.engine.dialect.name == "postgresql" else f"pgqueue_{name}"


def drain(pgq: PgQueue, **settings: Any) -> WorkerReport:
    """Work in this thread until the queues are empty."""
    return Worker(pgq, WorkerConfig(drain=True, **settings)).run()


@contextmanager
def working(pgq: PgQueue, **settings: Any) -> Iterator[Worker]:
    """A worker beside the test, stopped at its end; the end fails when the worker does not stop."""
    worker = Worker(pgq, WorkerConfig(**{"poll_interval": 0.05, **settings})).start()
    try:
        yield worker
    finally:
        worker.stop()
        worker.join(PATIENCE_SECONDS)


def wait_for_status(pgq: PgQueue, job_id: int, status: str) -> Job:
    """The job, once it has that status."""

    def arrived() -> Job | None:
        job = pgq.get_job(job_id)
        return job if job.status == status else None

    job = wait_for(arrived, f"job {job_id} to become {status}")
    assert job is not None
    return job


def statuses(pgq: PgQueue) -> dict[str, int]:
    """How many jobs stand where."""
    counted = rows(pgq.engine, f"SELECT status, count(*) FROM {table(pgq, 'jobs')} GROUP BY status")
    return {row[0]: row[1] for row in counted}


def events(pgq: PgQueue, job_id: int) -> list[str]:
    """The kinds of what was recorded of a job, in order."""
    return [event["event"] for event in pgq.job_events(job_id)]


def seize(pgq: PgQueue, job_id: int) -> None:
    """Take a running job away from its worker, as a sweep after a lost lease would."""
    with pgq.engine.begin() as connection:
        jobs = pgq.tables.jobs
        taken = connection.execute(
            sa.update(jobs)
            .where(jobs.c.id == job_id, jobs.c.status == "running")
            .values(status="pending", claim_token=None, claim_expires_at=None, run_at=FAR_AWAY)
        )
        assert taken.rowcount == 1


#: So that a job that was seized is not claimed again during the test.
FAR_AWAY = sa.literal_column("'2100-01-01 00:00:00.000'")


class Gate:
    """Holds tasks up until the test opens it, and counts them: how many came, are inside, were inside at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = threading.Event()
        self.came = 0
        self.inside = 0
        self.inside_max = 0

    def open(self) -> None:
        self._open.set()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def pass_through(self) -> None:
        """For `def` tasks."""
        self._enter()
        try:
            assert self._open.wait(PATIENCE_SECONDS), "the test never opened the gate"
        finally:
            self._leave()

    async def pass_through_async(self) -> None:
        """For `async def` tasks."""
        self._enter()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not self._open.is_set():
                    await asyncio.sleep(0.002)
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            self.came += 1
            self.inside += 1
            self.inside_max = max(self.inside_max, self.inside)

    def _leave(self) -> None:
        with self._lock:
            self.inside -= 1
