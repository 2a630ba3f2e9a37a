"""Jobs of tasks and queues with limits, for tests."""

from __future__ import annotations

from typing import Any

from pgqueue import ClaimedJob, PgQueue, Task


def put(pgq: PgQueue, task: Task[..., Any], count: int = 1, **options: Any) -> list[int]:
    with pgq.begin() as connection:
        return task.using(**options).enqueue_many(connection, [{"n": n} for n in range(count)])


def claim(pgq: PgQueue, limit: int = 100, *, queue: str = "default") -> list[ClaimedJob]:
    return pgq.claim("worker", queue=queue, limit=limit)


def ids(jobs: list[ClaimedJob]) -> list[int]:
    return [job.id for job in jobs]


def waiting(pgq: PgQueue) -> dict[int, str | None]:
    return {job.id: job.waits_for for job in pgq.list_jobs(status="pending", limit=1000)}
