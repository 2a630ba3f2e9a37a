"""Jobs for tests: made, claimed, moved in time by UPDATE, and looked at."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from pgqueue import PgQueue, Task, store
from pgqueue.dialect import POSTGRESQL, UTCDateTime, seconds_from_now
from pgqueue.job import ClaimedJob, ErrorInfo, EventType, JobStatus, Transition
from pgqueue.lanes import Lane


def external(pgq: PgQueue, name: str = "work") -> Task[..., Any]:
    """A task that takes any payload."""
    return pgq.external_task(name)


def add(pgq: PgQueue, count: int = 1, *, task: str = "work", **options: Any) -> list[int]:
    """Enqueue and commit jobs with the payloads {"n": 0}, {"n": 1}, …; their ids."""
    with pgq.begin() as connection:
        made = external(pgq, task).using(**options)
        if count == 1:
            return [made.enqueue(connection, n=0).id]
        return made.enqueue_many(connection, [{"n": n} for n in range(count)])


def add_one(pgq: PgQueue, **options: Any) -> int:
    return add(pgq, **options)[0]


def claim(
    pgq: PgQueue,
    *,
    limit: int = 1,
    worker: str = "worker-1",
    queue: str = "default",
    lease: float = 60.0,
    tasks: list[str] | None = None,
    marks: list[Lane] | None = None,
) -> list[ClaimedJob]:
    """Claim and commit, without a sweep before it."""
    with pgq.begin() as connection:
        return store.claim(
            connection,
            pgq.tables,
            queue=queue,
            worker=worker,
            token=uuid.uuid4(),
            limit=limit,
            lease=lease,
            tasks=tasks,
            marks=marks,
        )


def claim_one(pgq: PgQueue, **options: Any) -> ClaimedJob:
    (job,) = claim(pgq, **options)
    return job


def sweep(pgq: PgQueue, *, limit: int = 100, actor: str = "sweeper") -> Any:
    with pgq.begin() as connection:
        return store.sweep(connection, pgq.tables, limit=limit, actor=actor)


def finish(pgq: PgQueue, *transitions: Transition, actor: str = "worker-1") -> set[int]:
    with pgq.begin() as connection:
        return store.finish(connection, pgq.tables, transitions, actor=actor)


def completed(job: ClaimedJob, result_json: str | None = None) -> Transition:
    return Transition(job.id, job.claim_token, job.attempt, JobStatus.COMPLETED, result_json=result_json)


def retried(job: ClaimedJob, delay: float = 0.0) -> Transition:
    """A failed attempt that is to be retried."""
    return Transition(
        job.id,
        job.claim_token,
        job.attempt,
        JobStatus.PENDING,
        EventType.RETRY,
        delay_seconds=delay,
        charge_retry=True,
        error=ErrorInfo("ValueError", "no", "Traceback …"),
        reason="failed",
    )


def died(job: ClaimedJob) -> Transition:
    return Transition(
        job.id,
        job.claim_token,
        job.attempt,
        JobStatus.DEAD,
        EventType.DEAD,
        error=ErrorInfo("ValueError", "no", "Traceback …"),
        reason="failed for good",
    )


def expire(pgq: PgQueue, ids: Iterable[int] | None = None, *, seconds_ago: float = 60.0) -> None:
    """Let the leases of these jobs (of all running ones) have ended in the past."""
    _move(pgq, "claim_expires_at", -seconds_ago, pgq.tables.jobs.c.status == "running", ids)


def make_due(pgq: PgQueue, ids: Iterable[int] | None = None, *, seconds_ago: float = 60.0) -> None:
    """Let these jobs (all pending ones) have been due for a while."""
    _move(pgq, "run_at", -seconds_ago, pgq.tables.jobs.c.status == "pending", ids)


def age(pgq: PgQueue, ids: Iterable[int] | None = None, *, seconds_ago: float) -> None:
    """Let these jobs (all final ones) have become final so long ago."""
    _move(pgq, "finished_at", -seconds_ago, pgq.tables.jobs.c.finished_at.is_not(None), ids)


def _move(
    pgq: PgQueue, column: str, seconds: float, condition: sa.ColumnElement[bool], ids: Iterable[int] | None
) -> None:
    jobs = pgq.tables.jobs
    chosen = condition if ids is None else sa.and_(condition, jobs.c.id.in_(list(ids)))
    moment = seconds_from_now(sa.literal(seconds, sa.Float()))
    with pgq.begin() as connection:
        connection.execute(sa.update(jobs).where(chosen).values({column: moment}))


def put(pgq: PgQueue, ids: Iterable[int], **values: Any) -> None:
    """Set columns of these jobs, as plain SQL would."""
    jobs = pgq.tables.jobs
    with pgq.begin() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id.in_(list(ids))).values(values))


def row(pgq: PgQueue, job_id: int) -> Any:
    """The whole row of a job."""
    with pgq.begin() as connection:
        return connection.execute(sa.select(pgq.tables.jobs).where(pgq.tables.jobs.c.id == job_id)).one()


def statuses(pgq: PgQueue) -> dict[int, str]:
    """The status of every job by id."""
    jobs = pgq.tables.jobs
    with pgq.begin() as connection:
        return {found.id: found.status for found in connection.execute(sa.select(jobs.c.id, jobs.c.status))}


def events(pgq: PgQueue, job_id: int) -> list[str]:
    """The kinds of what was recorded of a job, oldest first."""
    return [event["event"] for event in pgq.job_events(job_id)]


def everything(pgq: PgQueue) -> dict[str, list[Any]]:
    """Every row of every table: what must be the same before and after a call that changes nothing."""
    tables = pgq.tables
    with pgq.begin() as connection:
        return {
            table.name: [
                tuple(found) for found in connection.execute(sa.select(table).order_by(*table.primary_key.columns))
            ]
            for table in (tables.jobs, tables.job_events, tables.queues, tables.workers)
        }


def seconds_until_due(pgq: PgQueue, job_id: int) -> float:
    """From the database's now to the job's `run_at`."""
    return _seconds_until(pgq, job_id, "run_at")


def seconds_of_lease(pgq: PgQueue, job_id: int) -> float:
    """From the database's now to the end of the job's lease."""
    return _seconds_until(pgq, job_id, "claim_expires_at")


def _seconds_until(pgq: PgQueue, job_id: int, column: str) -> float:
    jobs = pgq.tables.jobs
    now = seconds_from_now(sa.literal(0.0, sa.Float()))
    with pgq.begin() as connection:
        moment, present = connection.execute(
            sa.select(jobs.c[column], sa.type_coerce(now, UTCDateTime())).where(jobs.c.id == job_id)
        ).one()
    seconds: float = (moment - present).total_seconds()
    return seconds


def is_postgresql(pgq: PgQueue) -> bool:
    return pgq.tables.dialect_name == POSTGRESQL
