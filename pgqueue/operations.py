"""What people do to jobs and queues, and what they see of them: one function an operation, as in `store`.

A function takes the connection first, works in the transaction it finds there, and never commits, logs or retries.
Each change locks one job, or skips what is locked by others, and writes down who did it and why.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from pgqueue import dialect, store
from pgqueue.dialect import id_among, now, seconds_from_now, seconds_since
from pgqueue.errors import DuplicateJob, IllegalTransition, JobNotFound
from pgqueue.job import FINAL_STATUSES, EventType, Job, JobStatus
from pgqueue.schema import Tables

# What people do to single jobs -----------------------------------------------------------------------------


def get_job(connection: sa.Connection, tables: Tables, job_id: int) -> Job:
    """The job with that id, as a plain object; JSON that Python cannot read stays text. Raises JobNotFound."""
    row = connection.execute(_readable(tables.jobs).where(tables.jobs.c.id == _bounded(job_id))).one_or_none()
    if row is None:
        raise JobNotFound(f"there is no job {job_id}; it may have been deleted or pruned")
    return Job(**_read(tables.jobs, row))


def list_jobs(
    connection: sa.Connection,
    tables: Tables,
    *,
    status: str | None = None,
    queue: str | None = None,
    task: str | None = None,
    before_id: int | None = None,
    limit: int = 50,
) -> list[Job]:
    """Jobs that fit the filters, newest first."""
    jobs = tables.jobs
    query = _readable(jobs).order_by(jobs.c.id.desc()).limit(limit)
    if status is not None:
        query = query.where(jobs.c.status == sa.literal_column(f"'{JobStatus(status)}'"))
    if queue is not None:
        query = query.where(jobs.c.queue == queue)
    if task is not None:
        query = query.where(jobs.c.task == task)
    if before_id is not None:
        query = query.where(jobs.c.id < _bounded(before_id))
    return [Job(**_read(jobs, row)) for row in connection.execute(query)]


def list_events(connection: sa.Connection, tables: Tables, job_id: int) -> list[dict[str, Any]]:
    """What was recorded of a job, oldest first."""
    events = tables.job_events
    query = _readable(events).where(events.c.job_id == _bounded(job_id)).order_by(events.c.id)
    return [_read(events, row) for row in connection.execute(query)]


def _bounded(job_id: int) -> int:
    """The nearest id that fits into the column: what people type may be longer."""
    return max(-(2**63), min(job_id, 2**63 - 1))


def _readable(table: sa.Table) -> sa.Select[Any]:
    """The rows of a table with their JSON still text: one undecodable document must not hide the others."""
    return sa.select(
        *(
            sa.cast(column, sa.Text).label(column.name) if isinstance(column.type, sa.JSON) else column
            for column in table.columns
        )
    )


def _read(table: sa.Table, row: sa.Row[Any]) -> dict[str, Any]:
    """The fields of such a row. A document that Python's JSON cannot read stays text."""
    fields: dict[str, Any] = dict(row._mapping)
    for name, value in fields.items():
        if value is not None and isinstance(table.columns[name].type, sa.JSON):
            with contextlib.suppress(ValueError, RecursionError):
                fields[name] = json.loads(value)
    return fields


def cancel_job(connection: sa.Connection, tables: Tables, job_id: int, *, actor: str, reason: str | None) -> None:
    """Withdraw a job that is not final. A running one is finished as cancelled: what its worker writes later is
    refused by the fence. Raises JobNotFound or IllegalTransition."""
    _change_job(
        connection,
        tables,
        job_id,
        allowed=(JobStatus.PENDING, JobStatus.RUNNING),
        event=EventType.CANCEL,
        to_status=JobStatus.CANCELLED,
        actor=actor,
        reason=reason,
        values={"claim_token": sa.null(), "claim_expires_at": sa.null(), "finished_at": now()},
    )


def replay_job(connection: sa.Connection, tables: Tables, job_id: int, *, actor: str, reason: str | None) -> None:
    """Put a dead or cancelled job back to pending, due now, with all its retries.

    Raises JobNotFound, IllegalTransition, or DuplicateJob when another open job has its unique key meanwhile.
    """
    try:
        with connection.begin_nested():
            _change_job(
                connection,
                tables,
                job_id,
                allowed=(JobStatus.DEAD, JobStatus.CANCELLED),
                event=EventType.REPLAY,
                to_status=JobStatus.PENDING,
                actor=actor,
                reason=reason,
                values={"retries": 0, "finished_at": sa.null(), "run_at": now()},
            )
    except sa.exc.IntegrityError:
        raise DuplicateJob(
            f"job {job_id} cannot be replayed: another job of its task with the same unique key is pending or running"
        ) from None


def delete_job(connection: sa.Connection, tables: Tables, job_id: int, *, actor: str, reason: str | None) -> None:
    """Delete a job that is not running. What was recorded of it stays. Raises JobNotFound or IllegalTransition."""
    jobs = tables.jobs
    before = _lock_job(connection, tables, job_id)
    if before.status == JobStatus.RUNNING:
        raise IllegalTransition(f"job {job_id} is running; cancel it first")
    connection.execute(sa.delete(jobs).where(jobs.c.id == job_id))
    store.record_all(
        connection,
        tables,
        [before],
        event=EventType.DELETE,
        actor=actor,
        from_status=before.status,
        to_status=None,
        reason=reason,
    )


def _change_job(
    connection: sa.Connection,
    tables: Tables,
    job_id: int,
    *,
    allowed: Sequence[JobStatus],
    event: EventType,
    to_status: JobStatus,
    actor: str,
    reason: str | None,
    values: Mapping[str, Any],
) -> None:
    before = _lock_job(connection, tables, job_id)
    if before.status not in allowed:
        raise IllegalTransition(
            f"job {job_id} is {before.status}; only a {' or '.join(allowed)} job can become {to_status}"
        )
    jobs = tables.jobs
    connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(status=to_status, **values))
    store.record_all(
        connection,
        tables,
        [before],
        event=event,
        actor=actor,
        from_status=before.status,
        to_status=to_status,
        reason=reason,
    )


def _lock_job(connection: sa.Connection, tables: Tables, job_id: int) -> sa.Row[Any]:
    jobs = tables.jobs
    found: Any = connection.execute(
        sa.select(jobs.c.id, jobs.c.queue, jobs.c.task, jobs.c.attempt, jobs.c.status)
        .where(jobs.c.id == _bounded(job_id))
        .with_for_update()
    ).one_or_none()
    if found is None:
        raise JobNotFound(f"there is no job {job_id}; it may have been deleted or pruned")
    row: sa.Row[Any] = found
    return row


# Queues ----------------------------------------------------------------------------------------------------


def pause_queue(
    connection: sa.Connection,
    tables: Tables,
    queue: str,
    *,
    seconds: float | None,
    actor: str,
    reason: str | None,
) -> None:
    """Let nothing be claimed from a queue, for so many seconds or until it is resumed."""
    queues = tables.queues
    until = sa.null() if seconds is None else seconds_from_now(sa.literal(seconds, sa.Float()))
    values = {"paused_at": now(), "paused_until": until}
    connection.execute(
        dialect.insert(tables.dialect_name, queues)
        .values(name=queue, **values)
        .on_conflict_do_update(index_elements=[queues.c.name], set_=values)
    )
    reason = reason or (f"for {seconds:g} s" if seconds is not None else None)
    store.record(connection, tables, [{"queue": queue, "event": EventType.PAUSE, "actor": actor, "reason": reason}])


def resume_queue(connection: sa.Connection, tables: Tables, queue: str, *, actor: str, reason: str | None) -> bool:
    """End the pause of a queue; whether there was one."""
    queues = tables.queues
    ended = connection.execute(
        sa.update(queues)
        .where(queues.c.name == queue, store.is_paused(queues))
        .values(paused_at=sa.null(), paused_until=sa.null())
    ).rowcount
    if ended:
        store.record(
            connection,
            tables,
            [{"queue": queue, "event": EventType.RESUME, "actor": actor, "reason": reason}],
        )
    return bool(ended)


@dataclass(frozen=True, slots=True)
class QueueSummary:
    """How many jobs of a queue stand where. `ready` and `scheduled` together are its pending jobs."""

    queue: str
    ready: int = 0  #: pending and due
    scheduled: int = 0  #: pending, due later
    retrying: int = 0  #: those of ready and scheduled that failed before
    running: int = 0
    completed: int = 0
    dead: int = 0
    cancelled: int = 0
    oldest_ready_seconds: float | None = None  #: how long the longest waiting due job has been due
    paused: bool = False
    paused_until: datetime | None = None


def summarize_queues(connection: sa.Connection, tables: Tables) -> list[QueueSummary]:
    """A summary of every queue that has jobs or settings, by name."""
    jobs, queues = tables.jobs, tables.queues

    def count(*conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        return sa.func.count(sa.case((sa.and_(*conditions), 1)))

    pending, due = jobs.c.status == store.PENDING, jobs.c.run_at <= now()
    counted = connection.execute(
        sa.select(
            jobs.c.queue,
            count(pending, due).label("ready"),
            count(pending, sa.not_(due)).label("scheduled"),
            count(pending, jobs.c.retries > 0).label("retrying"),
            count(jobs.c.status == store.RUNNING).label("running"),
            count(jobs.c.status == store.COMPLETED).label("completed"),
            count(jobs.c.status == store.DEAD).label("dead"),
            count(jobs.c.status == store.CANCELLED).label("cancelled"),
            seconds_since(sa.func.min(sa.case((sa.and_(pending, due), jobs.c.run_at)))).label("oldest_ready_seconds"),
        ).group_by(jobs.c.queue)
    )
    summaries: dict[str, dict[str, Any]] = {row.queue: dict(row._mapping) for row in counted}
    paused = connection.execute(sa.select(queues.c.name, queues.c.paused_until).where(store.is_paused(queues)))
    for row in paused:
        summaries.setdefault(row.name, {"queue": row.name}).update(paused=True, paused_until=row.paused_until)
    return [QueueSummary(**summaries[name]) for name in sorted(summaries)]


# Workers ---------------------------------------------------------------------------------------------------


def list_workers(connection: sa.Connection, tables: Tables) -> list[dict[str, Any]]:
    workers = tables.workers
    query = sa.select(workers, seconds_since(workers.c.heartbeat_at).label("silent_seconds")).order_by(workers.c.id)
    return [dict(row._mapping) for row in connection.execute(query)]


# Prune -----------------------------------------------------------------------------------------------------


def prune(
    connection: sa.Connection,
    tables: Tables,
    *,
    older_than: float,
    statuses: Sequence[JobStatus] = FINAL_STATUSES,
    after_id: int = 0,
    limit: int = 1_000,
) -> tuple[int, int | None]:
    """Delete up to `limit` jobs, and their events, that became final more than `older_than` seconds ago.

    Works upwards from `after_id`. Returns how many were deleted and the id to go on after; None: that was all.
    """
    jobs, events = tables.jobs, tables.job_events
    status: sa.ColumnClause[str] = sa.literal_column("(" + ", ".join(f"'{JobStatus(name)}'" for name in statuses) + ")")
    doomed = connection.execute(
        sa.select(jobs.c.id)
        .where(
            jobs.c.id > after_id,
            jobs.c.status.op("IN")(status),
            jobs.c.finished_at < seconds_from_now(sa.literal(-older_than, sa.Float())),
        )
        .order_by(jobs.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).scalars()
    ids = list(doomed)
    if not ids:
        return 0, None
    for column in (events.c.job_id, jobs.c.id):
        connection.execute(sa.delete(column.table).where(id_among(column, store.IDS)), {"ids": ids})
    return len(ids), ids[-1] if len(ids) == limit else None
