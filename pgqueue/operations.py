"""What people do to jobs and queues, and what they see of them: one function an operation, as in `store`.

A function takes the connection first, works in the transaction it finds there, and never commits, logs or retries.
Each change locks one job, or skips what is locked by others, and writes down who did it and why.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa

from pgqueue import dialect, offers, store, uniqueness
from pgqueue.dialect import UTCDateTime, id_among, json_text, now, seconds_from_now, seconds_since
from pgqueue.errors import ClaimLost, IllegalTransition, JobNotFound
from pgqueue.job import FINAL_STATUSES, ClaimedJob, EventType, Job, JobStatus
from pgqueue.schema import CLAIMABLE, Tables

#: Pending and running jobs are looked for among so many of the newest before the whole table.
NEWEST_JOBS = 1_000

#: Up to so many blocks of 8 kB the table of jobs is counted, about 30,000 jobs. Of a larger one, finished jobs are
#: estimated from about this many blocks.
COUNT_BLOCKS_MAX, SAMPLE_BLOCKS = 1_000, 100

#: How the indexes of pending and running jobs say it.
OPEN_CONDITIONS = {
    JobStatus.PENDING: (CLAIMABLE, "status = 'pending' AND waits_for IS NOT NULL"),
    JobStatus.RUNNING: ("status = 'running'",),
}

#: How many jobs one step of a prune walks past at most.
PRUNE_WINDOW_JOBS = 5_000

# What people do to single jobs -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs are meant; every condition that is given must hold."""

    status: str | None = None
    queue: str | None = None
    task: str | None = None
    error_type: str | None = None  #: of the last failed attempt, with its module or without
    since: datetime | float | None = None  #: final, or enqueued when still open, since then, or so many seconds ago
    until: datetime | float | None = None  #: likewise, before then
    tags: Mapping[str, str] | None = None  #: keys of metadata and their values


def conditions(jobs: sa.FromClause, wanted: JobFilter) -> list[sa.ColumnElement[bool]]:
    """A filter as conditions on jobs, or on a subquery with their columns."""
    found: list[sa.ColumnElement[bool]] = []
    if wanted.status is not None:
        found.append(jobs.c.status == sa.literal_column(f"'{JobStatus(wanted.status)}'"))
    if wanted.queue is not None:
        found.append(jobs.c.queue == wanted.queue)
    if wanted.task is not None:
        found.append(jobs.c.task == wanted.task)
    if wanted.error_type is not None:
        found.append(_is_named(json_text(jobs.c.error, sa.literal("type", sa.Text())), wanted.error_type))
    moment = (
        jobs.c.finished_at
        if wanted.status in FINAL_STATUSES
        else sa.func.coalesce(jobs.c.finished_at, jobs.c.created_at, type_=UTCDateTime())
    )
    if wanted.since is not None:
        found.append(moment >= _moment(wanted.since))
    if wanted.until is not None:
        found.append(moment < _moment(wanted.until))
    for key, value in (wanted.tags or {}).items():
        found.append(json_text(jobs.c.metadata, sa.literal(key, sa.Text())) == value)
    return found


def _is_named(error_type: Any, name: str) -> sa.ColumnElement[bool]:
    """Whether an error's type is this class: with its module, as it is stored, or without."""
    ending = f".{name}"
    end = sa.func.substr(error_type, sa.func.length(error_type) - (len(ending) - 1), type_=sa.Text())
    return sa.or_(error_type == name, end == ending)


def _moment(value: datetime | float) -> Any:
    if isinstance(value, datetime):
        return sa.literal(value, UTCDateTime())
    return seconds_from_now(sa.literal(-value, sa.Float()))


def get_job(connection: sa.Connection, tables: Tables, job_id: int) -> Job:
    """The job with that id, as a plain object; JSON that Python cannot read stays text. Raises JobNotFound."""
    row = connection.execute(_readable(tables.jobs).where(tables.jobs.c.id == bounded(job_id))).one_or_none()
    if row is None:
        raise JobNotFound(f"there is no job {job_id}; it may have been deleted or pruned")
    return Job(**_read(tables.jobs, row))


def get_jobs(connection: sa.Connection, tables: Tables, job_ids: Sequence[int]) -> list[Job]:
    """Those of the jobs that exist, as `get_job` gives them."""
    query = _readable(tables.jobs).where(id_among(tables.jobs.c.id, store.IDS)).order_by(tables.jobs.c.id)
    return [Job(**_read(tables.jobs, row)) for row in connection.execute(query, {"ids": list(job_ids)})]


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of jobs, newest first."""

    jobs: list[Job]
    before_id: int | None  #: where the next page goes on; None: there is nothing more
    complete: bool = True  #: False: only some of the jobs were looked through, down to `before_id`


def get_claim(connection: sa.Connection, tables: Tables, job_id: int, token: uuid.UUID) -> ClaimedJob:
    """The job that is held with this token. Raises JobNotFound, or ClaimLost when another or nobody holds it."""
    row = connection.execute(_get_claim(tables), {"id": bounded(job_id), "token": token}).one_or_none()
    if row is None:
        raise JobNotFound(f"there is no job {job_id}; it may have been deleted or pruned")
    queue, worker, is_held, *claimed = row
    if not is_held:
        raise ClaimLost(
            f"the claim on job {job_id} was lost: its lease ran out and it was claimed again, or it was finished or "
            "cancelled"
        )
    (job,) = store.claimed_jobs([claimed], queue=queue, worker=worker, token=token)
    return job


@cache
def _get_claim(tables: Tables) -> sa.Select[Any]:
    jobs = tables.jobs
    is_held = sa.func.coalesce(jobs.c.claim_token == sa.bindparam("token", type_=sa.Uuid()), sa.false())
    return sa.select(jobs.c.queue, jobs.c.claimed_by, is_held, *store.claimed_columns(jobs)).where(
        jobs.c.id == sa.bindparam("id", type_=sa.BigInteger())
    )


def list_jobs(
    connection: sa.Connection,
    tables: Tables,
    wanted: JobFilter = JobFilter(),
    *,
    before_id: int | None = None,
    limit: int = 50,
    within: int | None = None,
) -> JobPage:
    """Jobs that fit the filters, newest first.

    within: look through so many jobs at most where no index leads to those that fit; None: through all.
    """
    jobs = tables.jobs
    status = wanted.status
    newer = [jobs.c.id < bounded(before_id)] if before_id is not None else []

    def page(table: sa.FromClause, *more: sa.ColumnElement[bool], order: Any = None) -> list[Job]:
        query = _readable(table).where(*conditions(table, wanted), *more).limit(limit)
        query = query.order_by(table.c.id.desc() if order is None else order)
        return [Job(**_read(jobs, row)) for row in connection.execute(query)]

    def newest(count: int) -> list[Job]:
        return page(sa.select(jobs).where(*newer).order_by(jobs.c.id.desc()).limit(count).subquery("newest"))

    found: list[Job]
    if status is not None and JobStatus(status) in OPEN_CONDITIONS:
        # Most often they are among the newest. Where they are not, the way down the primary key may lead past all jobs
        # that ever finished, so it is barred: an expression has no index.
        found = newest(max(NEWEST_JOBS, 2 * limit))
        if len(found) < limit:
            parts = _parts(jobs, OPEN_CONDITIONS[JobStatus(status)], jobs.columns)
            newer = [parts.c.id < bounded(before_id)] if before_id is not None else []
            found = page(parts, *newer, order=sa.desc(parts.c.id + sa.literal_column("0")))
    elif status in (JobStatus.DEAD, JobStatus.CANCELLED) or within is None or wanted == JobFilter():
        found = page(jobs, *newer)
    else:
        found = newest(within)
        if len(found) < limit:
            passed = sa.select(jobs.c.id).where(*newer).order_by(jobs.c.id.desc()).offset(within - 1).limit(1)
            end = connection.execute(passed).scalar_one_or_none()
            return JobPage(found, end, complete=end is None)
    return JobPage(found, found[-1].id if len(found) == limit else None)


def jobs_after(connection: sa.Connection, tables: Tables, wanted: JobFilter, *, after_id: int, limit: int) -> list[Job]:
    """Jobs that fit the filter, oldest first, from the first one after `after_id`."""
    jobs = tables.jobs
    query = _readable(jobs).where(jobs.c.id > after_id, *conditions(jobs, wanted)).order_by(jobs.c.id).limit(limit)
    return [Job(**_read(jobs, row)) for row in connection.execute(query)]


def list_events(connection: sa.Connection, tables: Tables, job_id: int) -> list[dict[str, Any]]:
    """What was recorded of a job, oldest first."""
    events = tables.job_events
    query = _readable(events).where(events.c.job_id == bounded(job_id)).order_by(events.c.id)
    return [_read(events, row) for row in connection.execute(query)]


def bounded(job_id: int) -> int:
    """The nearest id that fits into the column: what people type may be longer."""
    return max(-(2**63), min(job_id, 2**63 - 1))


def _readable(table: sa.FromClause) -> sa.Select[Any]:
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


def cancel_job(
    connection: sa.Connection, tables: Tables, job_id: int, *, actor: str, reason: str | None, force: bool = False
) -> JobStatus:
    """Withdraw a job that is not final; its status then. Raises JobNotFound or IllegalTransition.

    A pending one is cancelled. A running one goes on: its worker is asked to stop it. With `force` it is cancelled,
    too, and what its worker writes later is refused by the fence.
    """
    before = lock_job(connection, tables, job_id, tables.jobs.c.cancel_requested_at)
    if before.status == JobStatus.RUNNING and not force:
        if before.cancel_requested_at is None:
            jobs = tables.jobs
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(cancel_requested_at=now()))
            store.record_all(
                connection,
                tables,
                [before],
                event=EventType.CANCEL_REQUESTED,
                actor=actor,
                from_status=JobStatus.RUNNING,
                to_status=JobStatus.RUNNING,
                reason=reason,
            )
        return JobStatus.RUNNING
    change_job(
        connection,
        tables,
        job_id,
        allowed=(JobStatus.PENDING, JobStatus.RUNNING),
        event=EventType.CANCEL,
        to_status=JobStatus.CANCELLED,
        actor=actor,
        reason=reason,
        values={
            "claim_token": sa.null(),
            "claim_expires_at": sa.null(),
            "cancel_requested_at": sa.null(),
            "finished_at": now(),
        },
    )
    return JobStatus.CANCELLED


def delete_job(connection: sa.Connection, tables: Tables, job_id: int, *, actor: str, reason: str | None) -> None:
    """Delete a job that is not running. What was recorded of it stays. Raises JobNotFound or IllegalTransition."""
    jobs = tables.jobs
    with offers.passing_on(connection, tables, bounded(job_id)):
        before = lock_job(connection, tables, job_id, jobs.c.unique_key)
        if before.status == JobStatus.RUNNING:
            raise IllegalTransition(f"job {job_id} is running; cancel it first")
        uniqueness.release(connection, tables, [before])
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


def change_job(
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
    """Change one job if its status allows it, and record that. Raises JobNotFound or IllegalTransition."""
    before = lock_job(connection, tables, job_id)
    if before.status not in allowed:
        raise IllegalTransition(
            f"job {job_id} is {before.status}; only a {' or '.join(allowed)} job can become {to_status}"
        )
    jobs = tables.jobs
    changed = {"status": to_status, "waits_for": sa.null(), **values}
    connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(**changed))
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


def lock_job(connection: sa.Connection, tables: Tables, job_id: int, *more: sa.ColumnElement[Any]) -> sa.Row[Any]:
    """What an event says of a job, and `more`; nobody else changes it before this transaction ends."""
    jobs = tables.jobs
    found: Any = connection.execute(
        sa.select(
            jobs.c.id,
            jobs.c.queue,
            jobs.c.task,
            jobs.c.attempt,
            jobs.c.status,
            jobs.c.claimed_by,
            jobs.c.claimed_at,
            *more,
        )
        .where(jobs.c.id == bounded(job_id))
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
    estimated: bool = False  #: completed and cancelled are estimates, of two digits; everything else is counted


def summarize_queues(connection: sa.Connection, tables: Tables, *, exact: bool = False) -> list[QueueSummary]:
    """A summary of every queue that has jobs or settings, by name.

    To count the finished jobs of a long history takes seconds. So in a large table, on PostgreSQL, they are estimated
    unless `exact`, and a queue that has few of them and nothing else may be missing.
    """
    queues = tables.queues
    blocks = _blocks(connection, tables) if not exact else 0
    counted = connection.execute(_counts(tables.jobs) if blocks <= COUNT_BLOCKS_MAX else _open_counts(tables.jobs))
    summaries: dict[str, dict[str, Any]] = {row.queue: dict(row._mapping) for row in counted}
    if blocks > COUNT_BLOCKS_MAX:
        share = min(SAMPLE_BLOCKS / blocks, 1.0)
        for row in connection.execute(_finished_sample(tables.jobs, share)):
            summary = summaries.setdefault(row.queue, {"queue": row.queue})
            summary.update({name: _two_digits(row._mapping[name] / share) for name in FINISHED})
        for summary in summaries.values():
            summary["estimated"] = True
    paused = connection.execute(sa.select(queues.c.name, queues.c.paused_until).where(store.is_paused(queues)))
    for row in paused:
        summaries.setdefault(row.name, {"queue": row.name}).update(paused=True, paused_until=row.paused_until)
    return [QueueSummary(**summaries[name]) for name in sorted(summaries)]


FINISHED = ("completed", "cancelled")


def _blocks(connection: sa.Connection, tables: Tables) -> int:
    """How many blocks of 8 kB the table of jobs has; on SQLite, which takes no samples, 0."""
    if tables.dialect_name == dialect.SQLITE:
        return 0
    size: int = connection.execute(
        sa.text("SELECT pg_relation_size(CAST(:jobs AS regclass)) / 8192"),
        {"jobs": f"{tables.schema}.{tables.jobs.name}"},
    ).scalar_one()
    return size


def _counts(jobs: sa.FromClause) -> sa.Select[Any]:
    def count(*conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        return sa.func.count(sa.case((sa.and_(*conditions), 1)))

    pending, due = jobs.c.status == store.PENDING, jobs.c.run_at <= now()
    return sa.select(
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


def _open_counts(jobs: sa.Table) -> sa.Select[Any]:
    """The same of the jobs that are not completed or cancelled."""
    conditions = [*itertools.chain(*OPEN_CONDITIONS.values()), "status = 'dead'"]
    return _counts(_parts(jobs, conditions, [jobs.c.queue, jobs.c.status, jobs.c.run_at, jobs.c.retries]))


def _parts(jobs: sa.Table, conditions: Iterable[str], columns: Iterable[sa.ColumnElement[Any]]) -> sa.FromClause:
    """The jobs that fulfil one of the conditions, which exclude each other: each part by its own index."""
    parts = [sa.select(*columns).where(sa.text(condition)) for condition in conditions]
    return sa.union_all(*parts).subquery("parts")


def _finished_sample(jobs: sa.Table, share: float) -> sa.Select[Any]:
    """Completed and cancelled jobs by queue in a share of the table's blocks, the same ones each time."""
    sampled = sa.tablesample(jobs, sa.func.system(share * 100), name="sampled", seed=sa.literal_column("0"))
    return (
        sa.select(
            sampled.c.queue,
            sa.func.count(sa.case((sampled.c.status == store.COMPLETED, 1))).label("completed"),
            sa.func.count(sa.case((sampled.c.status == store.CANCELLED, 1))).label("cancelled"),
        )
        .where(sampled.c.status.in_((store.COMPLETED, store.CANCELLED)))
        .group_by(sampled.c.queue)
    )


def _two_digits(number: float) -> int:
    """An estimate should not look like a count."""
    return int(float(f"{number:.1e}"))


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

    Works upwards from `after_id`, past some thousand jobs at most. Returns how many were deleted and the id to go on
    after; None: that was all. It ends with the jobs that were enqueued since: no later job can have become final
    before, unless its row was written to say so, and then a later prune gets there.
    """
    jobs, events = tables.jobs, tables.job_events
    long_ago = seconds_from_now(sa.literal(-older_than, sa.Float()))
    is_old = sa.or_(jobs.c.created_at < long_ago, jobs.c.finished_at < long_ago)
    last_id, is_last, any_old = _window(connection, jobs, is_old, after_id)
    if not any_old:
        return 0, None
    status: sa.ColumnClause[str] = sa.literal_column("(" + ", ".join(f"'{JobStatus(name)}'" for name in statuses) + ")")
    doomed: Any = connection.execute(
        sa.select(jobs.c.id, jobs.c.task, jobs.c.status, jobs.c.unique_key)
        .where(
            jobs.c.id > after_id,
            jobs.c.id <= last_id,
            jobs.c.status.op("IN")(status),
            jobs.c.finished_at < long_ago,
            offers.are_done_with(tables),
        )
        .order_by(jobs.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    ids = [row.id for row in doomed]
    if ids:
        uniqueness.release(connection, tables, [row for row in doomed if row.status != JobStatus.COMPLETED])
        for column in (events.c.job_id, jobs.c.id):
            connection.execute(sa.delete(column.table).where(id_among(column, store.IDS)), {"ids": ids})
    if len(ids) == limit:
        return len(ids), ids[-1]
    return len(ids), None if is_last else last_id


def _window(
    connection: sa.Connection, table: sa.Table, is_old: sa.ColumnElement[bool], after_id: int
) -> tuple[int, bool, bool]:
    """The next PRUNE_WINDOW_JOBS rows: the last id, whether these were all, and whether any is old."""
    passed = (
        sa.select(table.c.id, is_old.label("is_old"))
        .where(table.c.id > after_id)
        .order_by(table.c.id)
        .limit(PRUNE_WINDOW_JOBS)
        .subquery("passed")
    )
    old = sa.func.count(sa.case((passed.c.is_old, 1)))
    last_id, count, count_old = connection.execute(sa.select(sa.func.max(passed.c.id), sa.func.count(), old)).one()
    return last_id, count < PRUNE_WINDOW_JOBS, count_old > 0


def prune_events(
    connection: sa.Connection, tables: Tables, *, older_than: float, after_id: int = 0
) -> tuple[int, int | None]:
    """Delete events that are older than so many seconds and whose jobs are gone; as `prune`, some thousand at a time.

    What happened to queues stays.
    """
    jobs, events = tables.jobs, tables.job_events
    is_old = events.c.at < seconds_from_now(sa.literal(-older_than, sa.Float()))
    last_id, is_last, any_old = _window(connection, events, is_old, after_id)
    if not any_old:
        return 0, None
    # By primary key, for each event: of a NOT EXISTS the planner may make a join with all jobs.
    job = sa.select(jobs.c.id).where(jobs.c.id == events.c.job_id).correlate(events).scalar_subquery()
    window = sa.and_(events.c.id > after_id, events.c.id <= last_id)
    orphans = sa.delete(events).where(window, is_old, events.c.job_id.is_not(None), job.is_(None))
    return connection.execute(orphans).rowcount, None if is_last else last_id
