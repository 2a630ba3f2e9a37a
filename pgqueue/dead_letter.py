"""What people do to dead jobs: replay, edit and purge them. One function an operation, as in `store`.

Batches lock rows in the order of their ids and skip what others have locked. A job that cannot be replayed, because
an open job has its unique key meanwhile, is left out and named; it never keeps the others of its batch from being
replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from pgqueue import offers, operations, store, uniqueness
from pgqueue.dialect import TextArray, id_among, json_of, now, text_in
from pgqueue.engine import LockNotWon, savepoint, waiting_at_most
from pgqueue.errors import DuplicateJob, IllegalTransition
from pgqueue.job import EventType, JobStatus
from pgqueue.operations import JobFilter
from pgqueue.schema import Tables

REPLAYABLE = (JobStatus.DEAD, JobStatus.CANCELLED)
EDITABLE = (JobStatus.PENDING, *REPLAYABLE)

KEY_IS_TAKEN = "another job of its task with the same unique key is pending or running"

#: How long an edit waits for a transaction that is enqueueing a job with its new unique key.
EDIT_WAITS_SECONDS = 0.1


# One job ---------------------------------------------------------------------------------------------------


def replay_job(connection: sa.Connection, tables: Tables, job_id: int, *, actor: str, reason: str | None) -> str:
    """Put a dead or cancelled job back to pending, due now, with all its retries; the queue it is in.

    Raises JobNotFound, IllegalTransition, or DuplicateJob when another open job has its unique key meanwhile.
    """
    before = operations.lock_job(connection, tables, job_id)
    if before.status not in REPLAYABLE:
        raise IllegalTransition(
            f"job {job_id} is {before.status}; only a {' or '.join(REPLAYABLE)} job can become {JobStatus.PENDING}"
        )
    try:
        with savepoint(connection):
            _put_back(connection, tables, [before.id])
    except sa.exc.IntegrityError:
        raise DuplicateJob(f"job {job_id} cannot be replayed: {KEY_IS_TAKEN}") from None
    _record_replays(connection, tables, [before], actor=actor, reason=reason)
    queue: str = before.queue
    return queue


@dataclass(frozen=True, slots=True)
class Editable:
    """What an edit has to know of the job it changes. Its row is locked."""

    row: sa.Row[Any]
    task: str
    status: str
    payload_json: str = field(repr=False)
    unique_key: str | None = field(repr=False)
    limit_keys: Mapping[str, str | None] = field(repr=False)


def lock_for_edit(connection: sa.Connection, tables: Tables, job_id: int) -> Editable:
    """A job that may be edited. Raises JobNotFound, or IllegalTransition when it is running or completed."""
    jobs = tables.jobs
    payload_json = sa.cast(jobs.c.payload, sa.Text).label("payload_json")
    keys = [jobs.c[name] for name in store.LIMIT_KEYS]
    row = operations.lock_job(connection, tables, job_id, payload_json, jobs.c.unique_key, *keys)
    if row.status not in EDITABLE:
        hint = "; cancel it, or wait for its end" if row.status == JobStatus.RUNNING else ""
        raise IllegalTransition(
            f"job {job_id} is {row.status}; only a {', '.join(EDITABLE[:-1])} or {EDITABLE[-1]} job can be edited{hint}"
        )
    limit_keys = {name: row._mapping[name] for name in store.LIMIT_KEYS}
    return Editable(row, row.task, row.status, row.payload_json, row.unique_key, limit_keys)


def edit_job(
    connection: sa.Connection,
    tables: Tables,
    job: Editable,
    values: Mapping[str, Any],
    *,
    actor: str,
    reason: str,
) -> None:
    """Write columns of a job that is locked. Raises DuplicateJob when an open job has its new unique key.

    It does not wait long for somebody who is just enqueueing that key, and who may be waiting for this job.
    """
    jobs = tables.jobs
    written = {
        name: json_of(sa.literal(value, sa.Text())) if name == "payload" else value for name, value in values.items()
    }
    try:
        with waiting_at_most(connection, EDIT_WAITS_SECONDS) if "unique_key" in values else savepoint(connection):
            connection.execute(sa.update(jobs).where(jobs.c.id == job.row.id).values(written))
    except LockNotWon:
        raise DuplicateJob(
            f"job {job.row.id} cannot be edited so at this moment: another transaction is enqueueing a job of its task "
            "with the unique key that belongs to the new payload; try again"
        ) from None
    except sa.exc.IntegrityError:
        raise DuplicateJob(
            f"job {job.row.id} cannot be edited so: another job of its task, with the unique key that belongs to the "
            "new payload, is pending or running"
        ) from None
    new_key = values.get("unique_key", job.unique_key)
    if job.unique_key is not None and new_key is not None and new_key != job.unique_key:
        uniqueness.move_period(connection, tables, job.task, job.row.id, job.unique_key, new_key)
    store.record_all(
        connection,
        tables,
        [job.row],
        event=EventType.EDIT,
        actor=actor,
        from_status=job.status,
        to_status=job.status,
        reason=reason,
    )


# Many jobs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step of many did."""

    done: Sequence[int]
    skipped: Mapping[int, str] = field(default_factory=dict)
    queues: frozenset[str] = frozenset()  #: of the jobs that were replayed
    after_id: int | None = None  #: go on after this one; None: that was all


def replay_ids(
    connection: sa.Connection, tables: Tables, ids: Sequence[int], *, actor: str, reason: str | None
) -> Batch:
    """Replay these jobs as far as they can be: each is either done or skipped, with the reason."""
    jobs = tables.jobs
    among = sa.and_(id_among(jobs.c.id, store.IDS), jobs.c.status.in_(REPLAYABLE))
    rows = connection.execute(_lock(tables).where(among).order_by(jobs.c.id), {"ids": sorted(ids)}).all()
    done, skipped = _replay(connection, tables, rows, actor=actor, reason=reason)
    missing = sorted(set(ids) - {row.id for row in rows})
    if missing:
        found = connection.execute(
            sa.select(jobs.c.id, jobs.c.status).where(id_among(jobs.c.id, store.IDS)), {"ids": missing}
        )
        statuses = {row.id: row.status for row in found}
        skipped |= {job_id: _why_not(statuses.get(job_id)) for job_id in missing}
    return Batch([row.id for row in done], skipped, frozenset(row.queue for row in done))


def _why_not(status: str | None) -> str:
    if status is None:
        return "there is no such job; it may have been deleted or pruned"
    if status in REPLAYABLE:
        return "another transaction is changing it at this moment"
    return f"it is {status}; only a {' or '.join(REPLAYABLE)} job can be replayed"


def replay_dead(
    connection: sa.Connection,
    tables: Tables,
    wanted: JobFilter,
    *,
    after_id: int,
    limit: int,
    actor: str,
    reason: str | None,
) -> Batch:
    """Replay up to `limit` dead jobs that fit the filter, upwards from `after_id`."""
    rows = connection.execute(_dead(tables, _lock(tables), wanted, after_id, limit)).all()
    done, skipped = _replay(connection, tables, rows, actor=actor, reason=reason)
    return Batch(
        [row.id for row in done],
        skipped,
        frozenset(row.queue for row in done),
        rows[-1].id if len(rows) == limit else None,
    )


def would_replay(connection: sa.Connection, tables: Tables, wanted: JobFilter, *, after_id: int, limit: int) -> Batch:
    """What `replay_dead` would do with these, as far as can be told now. Changes nothing."""
    jobs = tables.jobs
    rows = connection.execute(
        _dead(tables, sa.select(jobs.c.id, jobs.c.queue, jobs.c.task, jobs.c.unique_key), wanted, after_id, limit)
    ).all()
    able, skipped = _without_taken(connection, tables, rows)
    return Batch([row.id for row in able], skipped, after_id=rows[-1].id if len(rows) == limit else None)


def purge_dead(
    connection: sa.Connection,
    tables: Tables,
    wanted: JobFilter,
    *,
    after_id: int,
    limit: int,
    actor: str,
    reason: str | None,
) -> Batch:
    """Delete up to `limit` dead jobs that fit the filter, and their events but for one that says who did it."""
    jobs, events = tables.jobs, tables.job_events
    # A job that a claim has still to find ended, for the slot it held, stays until then.
    lock = _lock(tables).where(offers.are_done_with(tables))
    rows = connection.execute(_dead(tables, lock, wanted, after_id, limit)).all()
    ids = [row.id for row in rows]
    if not ids:
        return Batch([])
    uniqueness.release(connection, tables, rows)
    for column in (events.c.job_id, jobs.c.id):
        connection.execute(sa.delete(column.table).where(id_among(column, store.IDS)), {"ids": ids})
    store.record_all(
        connection,
        tables,
        rows,
        event=EventType.DELETE,
        actor=actor,
        from_status=JobStatus.DEAD,
        to_status=None,
        reason=reason or "purged",
    )
    return Batch(ids, after_id=ids[-1] if len(ids) == limit else None)


def count_dead(connection: sa.Connection, tables: Tables, wanted: JobFilter, *, limit: int | None = None) -> int:
    """How many dead jobs fit the filter, counted up to `limit`."""
    jobs = tables.jobs
    some = sa.select(jobs.c.id).where(jobs.c.status == store.DEAD, *operations.conditions(jobs, wanted)).limit(limit)
    return connection.execute(sa.select(sa.func.count()).select_from(some.subquery())).scalar_one()


def _lock(tables: Tables) -> sa.Select[Any]:
    jobs = tables.jobs
    return sa.select(
        jobs.c.id, jobs.c.queue, jobs.c.task, jobs.c.attempt, jobs.c.status, jobs.c.unique_key
    ).with_for_update(skip_locked=True)


def _dead(tables: Tables, select: sa.Select[Any], wanted: JobFilter, after_id: int, limit: int) -> sa.Select[Any]:
    jobs = tables.jobs
    return (
        select.where(jobs.c.id > after_id, jobs.c.status == store.DEAD, *operations.conditions(jobs, wanted))
        .order_by(jobs.c.id)
        .limit(limit)
    )


def _replay(
    connection: sa.Connection, tables: Tables, rows: Sequence[sa.Row[Any]], *, actor: str, reason: str | None
) -> tuple[list[sa.Row[Any]], dict[int, str]]:
    """Replay locked jobs; those that were, and why the others were not."""
    able, skipped = _without_taken(connection, tables, rows)
    free = [row for row in able if row.unique_key is None]
    # Keys are taken in their order, as by enqueues, or two who take many could wait for each other.
    keyed = sorted((row for row in able if row.unique_key is not None), key=lambda row: (row.task, row.unique_key))
    if free:
        _put_back(connection, tables, [row.id for row in free])
    if keyed and not _try_to_put_back(connection, tables, [row.id for row in keyed]):
        # Somebody enqueued one of these keys at this very moment: find out which.
        refused = {row.id for row in keyed if not _try_to_put_back(connection, tables, [row.id])}
        skipped |= dict.fromkeys(sorted(refused), KEY_IS_TAKEN)
        able = [row for row in able if row.id not in refused]
    _record_replays(connection, tables, able, actor=actor, reason=reason)
    return able, skipped


def _without_taken(
    connection: sa.Connection, tables: Tables, rows: Sequence[sa.Row[Any]]
) -> tuple[list[sa.Row[Any]], dict[int, str]]:
    """The rows whose unique key is free, of those with the same key the oldest; and why the others cannot be."""
    jobs = tables.jobs
    keyed = [row for row in rows if row.unique_key is not None]
    if not keyed:
        return list(rows), {}
    holders = connection.execute(
        sa.select(jobs.c.id, jobs.c.task, jobs.c.unique_key).where(
            text_in(jobs.c.task, sa.bindparam("tasks", type_=TextArray())),
            text_in(jobs.c.unique_key, sa.bindparam("keys", type_=TextArray())),
            sa.text("status IN ('pending', 'running')"),
        ),
        {"tasks": sorted({row.task for row in keyed}), "keys": [row.unique_key for row in keyed]},
    )
    taken: dict[tuple[str, str], int] = {(row.task, row.unique_key): row.id for row in holders}
    able, skipped = [], {}
    for row in rows:
        holder = None if row.unique_key is None else taken.setdefault((row.task, row.unique_key), row.id)
        if holder in (None, row.id):
            able.append(row)
        else:
            skipped[row.id] = f"job {holder} of its task has the same unique key"
    return able, skipped


def _try_to_put_back(connection: sa.Connection, tables: Tables, ids: Sequence[int]) -> bool:
    try:
        with savepoint(connection):
            _put_back(connection, tables, ids, one_by_one=True)
    except sa.exc.IntegrityError:
        return False
    return True


def _put_back(connection: sa.Connection, tables: Tables, ids: Sequence[int], *, one_by_one: bool = False) -> None:
    """Pending, due now, with all retries. The error stays until an attempt ends otherwise.

    one_by_one: in the order of `ids`.
    """
    jobs = tables.jobs
    connection.execute(
        sa.update(jobs)
        .where(id_among(jobs.c.id, store.IDS))
        .values(
            status=store.PENDING,
            retries=0,
            run_at=now(),
            finished_at=sa.null(),
            cancel_requested_at=sa.null(),
            prune_at=sa.null(),
            expires_at=sa.null(),
            progress=sa.null(),
        ),
        [{"ids": [job_id]} for job_id in ids] if one_by_one else {"ids": list(ids)},
    )


def _record_replays(
    connection: sa.Connection, tables: Tables, rows: Sequence[sa.Row[Any]], *, actor: str, reason: str | None
) -> None:
    for status in REPLAYABLE:
        store.record_all(
            connection,
            tables,
            [row for row in rows if row.status == status],
            event=EventType.REPLAY,
            actor=actor,
            from_status=status,
            to_status=JobStatus.PENDING,
            reason=reason,
        )
