"""The statements of the hot path, and what a worker needs beside: one function an operation.

A function takes the connection first, works in the transaction it finds there, and never commits, logs or
retries. Statements are built once per set of tables and parameters only vary.

Locks: the statements that touch many jobs (claim, extend, sweep, and those of `operations`) skip rows that somebody
else has locked and so never wait. Only `finish` waits, and a claim token makes its rows belong to one worker.
Therefore no two of these statements can wait for each other, unless the same claims are finished twice at once: then
PostgreSQL may end one of the two as a deadlock, where the planner does not go by primary key. Both may be tried again.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple

import pydantic_core
import sqlalchemy as sa

from pgqueue import dialect
from pgqueue.arguments import RUN_AT_MIN
from pgqueue.dialect import (
    IdArray,
    TextArray,
    id_among,
    id_in,
    json_of,
    microseconds,
    no_earlier,
    now,
    seconds_from_now,
    seconds_since,
    statement_now,
    text_in,
)
from pgqueue.engine import idle_milliseconds
from pgqueue.errors import DuplicateJob
from pgqueue.job import (
    ASKED_TO_STOP,
    FINAL_STATUSES,
    ClaimedJob,
    EnqueueResult,
    ErrorInfo,
    EventType,
    JobStatus,
    JoinedPayloads,
    NewJob,
    OnConflict,
    SweepResult,
    Transition,
)
from pgqueue.lanes import Lane
from pgqueue.retry import DELAY_SECONDS_MAX
from pgqueue.schema import OPEN_WITH_KEY, Tables

#: No moment of a job lies before.
EARLIEST = RUN_AT_MIN

#: Literals, never parameters: a plan for any value of a parameter cannot use a partial index.
PENDING: sa.ColumnClause[str] = sa.literal_column("'pending'")
RUNNING: sa.ColumnClause[str] = sa.literal_column("'running'")
COMPLETED: sa.ColumnClause[str] = sa.literal_column("'completed'")
DEAD: sa.ColumnClause[str] = sa.literal_column("'dead'")
CANCELLED: sa.ColumnClause[str] = sa.literal_column("'cancelled'")
FINAL: sa.ColumnClause[str] = sa.literal_column("(" + ", ".join(f"'{status}'" for status in FINAL_STATUSES) + ")")

#: What `slot` says of a job: that it holds one; that others wait for its end, too; that it was offered one.
HELD: sa.ColumnClause[str] = sa.literal_column("'held'")
AWAITED: sa.ColumnClause[str] = sa.literal_column("'awaited'")
OFFERED: sa.ColumnClause[str] = sa.literal_column("'offered'")

#: Whose limits a row of `limits` or `rate_buckets` has.
QUEUE: sa.ColumnClause[str] = sa.literal_column("'queue'")
TASK: sa.ColumnClause[str] = sa.literal_column("'task'")

#: The columns by which jobs share limits.
LIMIT_KEYS = ("concurrency_key", "ordering_key", "rate_key")

#: For `id_among`.
IDS = sa.bindparam("ids", type_=IdArray())

#: Jobs per INSERT of a bulk enqueue.
INSERT_JOBS_MAX = 1_000

#: From so many on, completions of one claim have a statement of their own.
ALIKE_JOBS_MIN = 8

#: Bytes of payload per INSERT of a bulk enqueue.
INSERT_BYTES_MAX = 8 * 1024 * 1024

#: How often an enqueue looks again when the job that has its unique key finishes at that very moment.
CONFLICT_ROUNDS_MAX = 5

#: The last number of an attempt that the column can hold.
ATTEMPT_MAX: sa.ColumnClause[int] = sa.literal_column("2147483647")

#: The error of an attempt that a sweep ended.
WORKER_LOST = ErrorInfo("WorkerLost", "the worker did not finish within its lease")

Claim = tuple[int, uuid.UUID]  # a job's id and the token it was claimed with


# Enqueue ---------------------------------------------------------------------------------------------------


def insert_job(
    connection: sa.Connection,
    tables: Tables,
    job: NewJob,
    *,
    on_conflict: OnConflict = OnConflict.SKIP,
    actor: str = "enqueue",
) -> EnqueueResult:
    """Store one job. With a unique key that an open job of the task has, `on_conflict` decides."""
    for _ in range(CONFLICT_ROUNDS_MAX):
        inserted = _try_to_insert(connection, tables, job)
        if inserted is not None:
            return EnqueueResult(inserted)
        if on_conflict is OnConflict.REPLACE:
            replaced = replace_pending(connection, tables, job, actor)
            if replaced is not None:
                return EnqueueResult(replaced, inserted=False)
        found = connection.execute(_key_holder(tables), {"task": job.task, "unique_key": job.unique_key}).one_or_none()
        if found is None:
            continue  # it finished in between
        if on_conflict is OnConflict.SKIP:
            return EnqueueResult(found.id, inserted=False)
        if on_conflict is OnConflict.REPLACE and found.status == JobStatus.PENDING:
            continue  # it was put back to pending in between
        why = "it is running, so its payload can no longer be replaced" if on_conflict is OnConflict.REPLACE else ""
        raise DuplicateJob(
            f"task {job.task!r} already has the {found.status} job {found.id} with the unique key "
            f"{job.unique_key!r}" + (f": {why}" if why else "")
        )
    raise DuplicateJob(
        f"task {job.task!r}: the unique key {job.unique_key!r} changed hands {CONFLICT_ROUNDS_MAX} times "
        "while this job was being enqueued; try again"
    )


def _try_to_insert(connection: sa.Connection, tables: Tables, job: NewJob) -> int | None:
    """The id of the new job; None when its unique key is taken."""
    parameters = _parameters(job)
    inserted = dialect.execute(connection, _insert_job(tables, tuple(parameters)), parameters)
    return inserted[0][0] if inserted else None


def insert_jobs(
    connection: sa.Connection,
    tables: Tables,
    template: NewJob,
    payloads_json: Sequence[str],
    keys: Sequence[Sequence[str | None]] | None = None,
) -> list[int]:
    """Store a job like `template` for each payload; their ids, in the payloads' order.

    keys: for each of them its concurrency_key, ordering_key and rate_key, when they have any.
    """
    parameters = _parameters(template)
    insert = _insert_jobs(tables, tuple(parameters), keys is not None)
    del parameters["payload"]
    ids: list[int] = []
    if isinstance(payloads_json, JoinedPayloads):
        for array in payloads_json.arrays:
            ids.extend(row[0] for row in dialect.execute(connection, insert, {**parameters, "payloads": array}))
        return ids
    for chunk in _chunks(payloads_json):
        parameters["payloads"] = f"[{','.join(chunk)}]"
        if keys is not None:
            of_chunk = keys[len(ids) : len(ids) + len(chunk)]
            rows = [dict(zip(("n", *LIMIT_KEYS), (n, *of_job), strict=True)) for n, of_job in enumerate(of_chunk)]
            parameters["keys"] = json.dumps(rows)
        ids.extend(row[0] for row in dialect.execute(connection, insert, parameters))
    return ids


def insert_keyed_jobs(
    connection: sa.Connection, tables: Tables, wanted: Sequence[NewJob], early: Sequence[float] | None = None
) -> dict[str, int]:
    """Store jobs that differ only in payload and keys, in this order; the ids of those whose unique key is free, by
    that key.

    early: by how many seconds each is due earlier.
    """
    parameters = _parameters(wanted[0])
    names = tuple(name for name in parameters if name not in ("unique_key", *LIMIT_KEYS))
    insert = _insert_keyed_jobs(tables, names, wanted[0].period_seconds is not None, early is not None)
    rows = [
        {"n": n, "payload": job.payload_json, "unique_key": job.unique_key, "early": early[n] if early else None}
        | {name: getattr(job, name) for name in LIMIT_KEYS}
        for n, job in enumerate(wanted)
    ]
    common = {name: parameters[name] for name in names if name != "payload"}
    inserted = connection.execute(insert, {**common, "rows": json.dumps(rows)}).all()
    return {row.unique_key: row.id for row in inserted}


def is_released(tables: Tables) -> sa.ColumnElement[bool]:
    """A condition on unique_periods: the job that began the period is dead or cancelled, so it holds nobody up.

    A scalar subquery, which goes by primary key: of an EXISTS the planner may make a join with all dead jobs.
    """
    holder, periods = tables.jobs.alias("holder"), tables.unique_periods
    status = sa.select(holder.c.status).where(holder.c.id == periods.c.job_id).correlate(periods).scalar_subquery()
    return sa.func.coalesce(status, sa.literal_column("''")).in_([DEAD, CANCELLED])


def _chunks(payloads_json: Sequence[str]) -> Iterable[list[str]]:
    chunk: list[str] = []
    size = 0
    for payload in payloads_json:
        if chunk and (len(chunk) == INSERT_JOBS_MAX or size + len(payload) > INSERT_BYTES_MAX):
            yield chunk
            chunk, size = [], 0
        chunk.append(payload)
        size += len(payload)
    if chunk:
        yield chunk


def _parameters(job: NewJob) -> dict[str, Any]:
    """Those of its INSERT: what differs from the defaults of the columns. Their names say what the statement is."""
    parameters: dict[str, Any] = {"task": job.task, "payload": job.payload_json}
    if job.queue != DEFAULTS.queue:
        parameters["queue"] = job.queue
    if job.priority != DEFAULTS.priority:
        parameters["priority"] = job.priority
    if job.max_retries != DEFAULTS.max_retries:
        parameters["max_retries"] = job.max_retries
    if job.metadata_json != DEFAULTS.metadata_json:
        parameters["metadata"] = job.metadata_json
    if job.delay_seconds is not None:
        parameters["delay"] = job.delay_seconds
    if job.run_at is not None:
        parameters["run_at"] = job.run_at
    if job.unique_key is not None:
        parameters["unique_key"] = job.unique_key
    if job.expires_seconds is not None:
        parameters["expires_seconds"] = job.expires_seconds
    if job.expires_at is not None:
        parameters["expires_at"] = job.expires_at
    if job.concurrency_key is not None:
        parameters["concurrency_key"] = job.concurrency_key
    if job.ordering_key is not None:
        parameters["ordering_key"] = job.ordering_key
    if job.rate_key is not None:
        parameters["rate_key"] = job.rate_key
    return parameters


#: A job that sets nothing has what the defaults of the columns give it.
DEFAULTS = NewJob("", "{}")

_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "priority": sa.SmallInteger(),
    "max_retries": sa.SmallInteger(),
    "run_at": dialect.UTCDateTime(),
    "expires_at": dialect.UTCDateTime(),
}


def _values(names: Iterable[str]) -> dict[str, Any]:
    """The columns that these parameters set, and to what."""
    values: dict[str, Any] = {}
    for name in names:
        if name == "delay":
            values["run_at"] = seconds_from_now(sa.bindparam(name, type_=sa.Float()))
        elif name == "expires_seconds":
            values["expires_at"] = seconds_from_now(sa.bindparam(name, type_=sa.Float()))
        elif name in ("payload", "metadata"):
            values[name] = json_of(sa.bindparam(name, type_=sa.Text()))
        else:
            values[name] = sa.bindparam(name, type_=_TYPES.get(name, sa.Text()))
    return values


@cache
def _insert_job(tables: Tables, names: tuple[str, ...]) -> Any:
    jobs = tables.jobs
    statement = dialect.insert(tables.dialect_name, jobs)
    if "unique_key" in names:
        statement = statement.on_conflict_do_nothing(
            index_elements=[jobs.c.task, jobs.c.unique_key], index_where=sa.text(OPEN_WITH_KEY)
        )
    return statement.values(_values(names)).returning(jobs.c.id)


@cache
def _insert_jobs(tables: Tables, names: tuple[str, ...], has_keys: bool) -> sa.Insert:
    jobs = tables.jobs
    payloads, payload, position = dialect.documents(tables.dialect_name, "payloads")
    columns = _values(names) | {"payload": payload}
    source = payloads
    if has_keys:
        texts = [sa.column(name, sa.Text) for name in LIMIT_KEYS]
        keys = dialect.rows(tables.dialect_name, "keys", sa.column("n", sa.Integer), *texts)
        source = payloads.join(keys, keys.c.n == position - dialect.first_position(tables.dialect_name))
        columns |= {name: keys.c[name] for name in LIMIT_KEYS}
    select = sa.select(*(value.label(name) for name, value in columns.items())).select_from(source)
    return sa.insert(jobs).from_select(list(columns), select.order_by(position)).returning(jobs.c.id)


@cache
def _insert_keyed_jobs(tables: Tables, names: tuple[str, ...], by_period: bool, is_early: bool) -> Any:
    jobs, periods = tables.jobs, tables.unique_periods
    texts = [sa.column(name, sa.Text) for name in ("payload", "unique_key", *LIMIT_KEYS)]
    numbers = (sa.column("n", sa.Integer), *([sa.column("early", sa.Double)] if is_early else []))
    rows = dialect.rows(tables.dialect_name, "rows", *numbers, *texts)
    columns = _values(names) | {
        "payload": json_of(rows.c.payload),
        **{name: rows.c[name] for name in ("unique_key", *LIMIT_KEYS)},
    }
    if is_early:
        columns["run_at"] = dialect.seconds_before(columns.get("run_at", now()), rows.c.early)
    select = sa.select(*(value.label(name) for name, value in columns.items())).where(rows.c.n >= 0)
    if by_period:
        period = sa.select(periods.c.until).where(
            periods.c.task == columns["task"],
            periods.c.unique_key == rows.c.unique_key,
            periods.c.until > now(),
            sa.not_(is_released(tables)),
        )
        select = select.where(period.correlate(rows).scalar_subquery().is_(None))
    return (
        dialect.insert(tables.dialect_name, jobs)
        .from_select(list(columns), select.order_by(rows.c.n))
        .on_conflict_do_nothing(index_elements=[jobs.c.task, jobs.c.unique_key], index_where=sa.text(OPEN_WITH_KEY))
        .returning(jobs.c.id, jobs.c.unique_key)
    )


@cache
def _key_holder(tables: Tables) -> sa.Select[Any]:
    jobs = tables.jobs
    return sa.select(jobs.c.id, jobs.c.status).where(
        jobs.c.task == sa.bindparam("task"),
        jobs.c.unique_key == sa.bindparam("unique_key"),
        sa.text("status IN ('pending', 'running')"),
    )


def replace_pending(connection: sa.Connection, tables: Tables, job: NewJob, actor: str) -> int | None:
    """Give a pending job with the same unique key this payload and these settings; its id, None if there is none.

    It has all its retries again: what failed was the payload before.
    One that others wait behind, or that was offered a slot, keeps its queue and keys: they are found by these.
    """
    jobs = tables.jobs
    is_free = nobody_waits_for(jobs)
    moved = {"queue": job.queue, **{name: getattr(job, name) for name in LIMIT_KEYS}}
    parameters = _parameters(job)
    moments = [name for name in parameters if name in ("delay", "run_at", "expires_seconds", "expires_at")]
    replaced = connection.execute(
        sa.update(jobs)
        .where(jobs.c.task == job.task, jobs.c.unique_key == job.unique_key, jobs.c.status == PENDING)
        .values(
            payload=json_of(sa.literal(job.payload_json, sa.Text())),
            metadata=json_of(sa.literal(job.metadata_json, sa.Text())),
            priority=job.priority,
            max_retries=job.max_retries,
            waits_for=sa.null(),
            retries=0,
            error=sa.null(),
            progress=sa.null(),
            **{
                name: sa.case((is_free, sa.literal(value, sa.Text())), else_=jobs.c[name])
                for name, value in moved.items()
            },
            **{"run_at": now(), "expires_at": sa.null(), **_values(moments)},
        )
        .returning(jobs.c.id),
        {name: parameters[name] for name in moments},
    ).scalar_one_or_none()
    if replaced is not None:
        record(
            connection,
            tables,
            [
                {
                    "job_id": replaced,
                    "queue": job.queue,
                    "task": job.task,
                    "event": EventType.REPLACE,
                    "actor": actor,
                    "from_status": JobStatus.PENDING,
                    "to_status": JobStatus.PENDING,
                    "reason": "enqueued again with the same unique key",
                }
            ],
        )
    return replaced


# Claim, extend, finish -------------------------------------------------------------------------------------


def lanes(
    connection: sa.Connection, tables: Tables, *, queue: str, tasks: Sequence[str] | None = None
) -> tuple[list[Lane], bool]:
    """For each priority that pending jobs of one queue have, the highest first, the mark right before the first job, if
    that is due; and whether claims from the queue have to keep limits (False when nothing is pending). For PostgreSQL.
    """
    parameters = {"of_queue": queue, **({} if tasks is None else {"tasks": list(tasks)})}
    rows = dialect.execute(connection, _lanes(tables, tasks is not None), parameters)
    return [(priority, run_at, id_before) for priority, run_at, id_before, _ in rows], any(row[-1] for row in rows)


def is_any_pending(connection: sa.Connection, tables: Tables, *, queue: str) -> bool:
    """Whether there is a lane at all: a third of the work of `lanes`, for an idle worker. For PostgreSQL."""
    return bool(dialect.execute(connection, _first_lane(tables), {"of_queue": queue}))


@cache
def _first_lane(tables: Tables) -> sa.Select[Any]:
    """In the order of the index for claims, or the planner may hope to meet a pending job early in the table."""
    jobs = tables.jobs
    queue = sa.bindparam("of_queue", type_=sa.Text())
    pending = sa.select(jobs.c.priority).where(
        jobs.c.queue == queue, jobs.c.status == PENDING, jobs.c.waits_for.is_(None)
    )
    return pending.order_by(jobs.c.priority.desc()).limit(sa.literal_column("1"))


@cache
def _lanes(tables: Tables, of_tasks: bool) -> sa.Select[Any]:
    """What is not due yet marks no front: before it will come what is enqueued meanwhile."""
    jobs = tables.jobs
    queue = sa.bindparam("of_queue", type_=sa.Text())
    lane = dialect.lanes(jobs, queue, jobs.c.run_at, jobs.c.id).subquery("lane")
    is_due = lane.c.run_at <= now()
    return sa.select(
        lane.c.priority,
        sa.case((is_due, lane.c.run_at)).label("run_at"),
        sa.case((is_due, lane.c.id - sa.literal_column("1")), else_=sa.literal_column("0")).label("id_before"),
        has_limits(tables, queue, of_tasks).label("limited"),
    )


def claim(
    connection: sa.Connection,
    tables: Tables,
    *,
    queue: str,
    worker: str,
    token: uuid.UUID,
    limit: int,
    lease: float,
    tasks: Sequence[str] | None = None,
    flush: bool = True,
    marks: Sequence[Lane] | None = None,
) -> list[ClaimedJob]:
    """Claim up to `limit` due jobs of one queue, for `lease` seconds, under a token never used before.

    Only jobs of the named tasks, when names are given. Highest priority first, then longest due, then lowest id. On
    PostgreSQL only from these lanes, behind their marks, when some are given. Nothing from a paused queue.

    flush=False, for a transaction of its own: its commit does not wait for the disk. A server that crashes right then
    forgets the claim, and the fence refuses whatever its holder writes.
    """
    parameters: dict[str, Any] = {
        "of_queue": queue,
        "worker": worker,
        "token": token,
        "limit": limit,
        "lease": lease,
    }
    if tasks is not None:
        parameters["tasks"] = list(tasks)
    if tables.dialect_name == dialect.POSTGRESQL:
        if marks is None:
            marks, _ = lanes(connection, tables, queue=queue)
        parameters["lanes"] = lanes_document(marks)
    rows = dialect.execute(connection, _claim(tables, tasks is not None, flush), parameters)
    return claimed_jobs(rows, queue=queue, worker=worker, token=token)


def claimed_jobs(rows: Iterable[Any], *, queue: str, worker: str, token: uuid.UUID) -> list[ClaimedJob]:
    """The rows that a claim returned (`claimed_columns`), in the order of claims."""
    moments = _Moments()
    claimed = [
        ClaimedJob(
            job_id,
            queue,
            task,
            payload,
            priority,
            moments[run_at],
            attempt,
            retries,
            max_retries,
            worker,
            token,
            moments[created_at],
            metadata,
            None if expired is None else -expired,
        )
        for (
            job_id,
            task,
            payload,
            priority,
            run_at,
            attempt,
            retries,
            max_retries,
            created_at,
            metadata,
            expired,
        ) in rows
    ]
    # An UPDATE returns its rows in no particular order.
    claimed.sort(key=lambda job: (-job.priority, job.run_at, job.id))
    return claimed


class _Moments(dict[int, datetime]):
    """By microseconds since 1970. Jobs of one transaction share theirs, so most are made once for many jobs."""

    def __missing__(self, microseconds: int) -> datetime:
        moment = self[microseconds] = datetime.fromtimestamp(microseconds / 1_000_000, UTC)
        return moment


def lanes_document(marks: Sequence[Lane]) -> str:
    return json.dumps(
        [
            {"priority": priority, "run_at": run_at.isoformat() if run_at else "-infinity", "id": job_id}
            for priority, run_at, job_id in marks
        ]
    )


@cache
def _claim(tables: Tables, of_tasks: bool, flush: bool) -> sa.Update:
    jobs = tables.jobs
    queue = sa.bindparam("of_queue", type_=sa.Text())
    filters = sa.and_(sa.not_(has_limits(tables, queue, of_tasks)), claim_filters(tables, queue, of_tasks))
    if not flush:
        filters = sa.and_(filters, dialect.with_settings(tables.dialect_name, synchronous_commit=dialect.OFF))
    limit = sa.bindparam("limit", type_=sa.Integer())
    ids = dialect.due(tables.dialect_name, jobs, [jobs.c.id], queue, filters, limit)
    return (
        sa.update(jobs)
        .where(id_in(jobs.c.id, ids.scalar_subquery()))
        .values(claim_values(jobs))
        .returning(*claimed_columns(jobs))
    )


def claim_filters(tables: Tables, queue: sa.BindParameter[str], of_tasks: bool) -> sa.ColumnElement[bool]:
    """What keeps a due job from being claimed: the parameters are `of_queue`, and `tasks` if `of_tasks`."""
    jobs, queues = tables.jobs, tables.queues
    paused = (
        sa.select(sa.literal_column("1")).select_from(queues).where(queues.c.name == queue, is_paused(queues)).exists()
    )
    # Not as an OR: planning compares each arm of one with the conditions of all indexes.
    unexpired = (jobs.c.expires_at <= now()).is_not(sa.true())
    filters: sa.ColumnElement[bool] = sa.and_(sa.not_(paused), unexpired)
    if of_tasks:
        filters = sa.and_(filters, text_in(jobs.c.task, sa.bindparam("tasks", type_=TextArray())))
    return filters


def has_limits(tables: Tables, queue: sa.BindParameter[str], of_tasks: bool) -> sa.ColumnElement[bool]:
    """Whether claims from the queue have to keep limits: then `within_limits.claim` makes them."""
    return sa.exists(sa.select(sa.literal_column("1")).where(concern(tables.limits, queue, of_tasks)))


def concern(limits: sa.Table, queue: sa.BindParameter[str], of_tasks: bool) -> sa.ColumnElement[bool]:
    """Which rows of limits concern claims from the queue; of the parameter `tasks`, if `of_tasks`."""
    of_task = limits.c.scope == TASK
    if of_tasks:
        of_task = sa.and_(of_task, text_in(limits.c.name, sa.bindparam("tasks", type_=TextArray())))
    return sa.and_(sa.or_(sa.and_(limits.c.scope == QUEUE, limits.c.name == queue), of_task), are_kept(limits))


def nobody_waits_for(jobs: sa.Table) -> sa.ColumnElement[bool]:
    """No claim has to find that the job ended, or which keys it had."""
    return sa.and_(sa.func.coalesce(jobs.c.slot, HELD) == HELD, sa.not_(jobs.c.leads_order))


def are_kept(limits: sa.Table) -> sa.ColumnElement[bool]:
    """Whether a row of limits concerns claims."""
    numbers = (limits.c.concurrency, limits.c.key_concurrency, limits.c.rate, limits.c.promote_after)
    return sa.or_(sa.func.coalesce(*numbers).is_not(None), limits.c.ordered, limits.c.releasing)


def claim_values(jobs: sa.Table) -> dict[str, Any]:
    """What a claim writes: the parameters are `worker`, `token` and `lease`."""
    return {
        "status": RUNNING,
        "claimed_by": sa.bindparam("worker", type_=sa.Text()),
        "claim_token": sa.bindparam("token", type_=sa.Uuid()),
        "claimed_at": now(),
        "claim_expires_at": seconds_from_now(sa.bindparam("lease", type_=sa.Float())),
        # A row that plain SQL brought to the last number must not stop the claims of its queue.
        "attempt": sa.case((jobs.c.attempt < ATTEMPT_MAX, jobs.c.attempt + sa.literal_column("1")), else_=ATTEMPT_MAX),
    }


def claimed_columns(jobs: sa.Table) -> list[sa.ColumnElement[Any]]:
    return [
        jobs.c.id,
        jobs.c.task,
        sa.cast(jobs.c.payload, sa.Text),
        jobs.c.priority,
        microseconds(jobs.c.run_at).label("run_at"),
        jobs.c.attempt,
        jobs.c.retries,
        jobs.c.max_retries,
        microseconds(jobs.c.created_at).label("created_at"),
        sa.cast(jobs.c.metadata, sa.Text),
        seconds_since(jobs.c.expires_at).label("expired"),
    ]


def extend(connection: sa.Connection, tables: Tables, claims: Iterable[Claim], *, lease: float) -> dict[int, bool]:
    """Let these claims end `lease` seconds from now; the ids of those that are still held, and whether somebody asked
    them to stop.

    A job whose row is locked (it is being finished, or swept, at this moment) counts as held if its token still
    matches, and is not extended.
    """
    document = _claims_document(claims)
    dialect.execute(connection, _extend(tables), {"claims": document, "lease": lease})
    held = dialect.execute(connection, _held(tables), {"claims": document})
    return {job_id: bool(asked) for job_id, asked in held}


def _claims_document(claims: Iterable[Claim]) -> str:
    return json.dumps([{"id": job_id, "token": token.hex} for job_id, token in claims])


@cache
def _held(tables: Tables, lock: bool = False) -> sa.Select[Any]:
    jobs = tables.jobs
    claims = dialect.rows(tables.dialect_name, "claims", sa.column("id", sa.BigInteger), sa.column("token", sa.Uuid))
    held = sa.select(jobs.c.id).join(claims, sa.and_(jobs.c.id == claims.c.id, jobs.c.claim_token == claims.c.token))
    if lock:
        return held.with_for_update(of=jobs, skip_locked=True)
    return held.add_columns(jobs.c.cancel_requested_at.is_not(None).label("asked"))


@cache
def _extend(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    return (
        sa.update(jobs)
        .where(id_in(jobs.c.id, _held(tables, lock=True).scalar_subquery()))
        .values(claim_expires_at=seconds_from_now(sa.bindparam("lease", type_=sa.Float())))
    )


def asked_to_stop(connection: sa.Connection, tables: Tables, *, worker: str) -> list[Claim]:
    """Of the claims that a worker holds, those that somebody asked to stop."""
    asked = dialect.execute(connection, _asked_to_stop(tables), {"worker": worker})
    return [(job_id, token) for job_id, token in asked]


@cache
def _asked_to_stop(tables: Tables) -> sa.Select[Any]:
    jobs = tables.jobs
    return sa.select(jobs.c.id, jobs.c.claim_token).where(
        jobs.c.claimed_by == sa.bindparam("worker", type_=sa.Text()),
        jobs.c.cancel_requested_at.is_not(None),
        jobs.c.status == RUNNING,
    )


def finish(connection: sa.Connection, tables: Tables, transitions: Sequence[Transition], *, actor: str) -> set[int]:
    """Write how attempts ended, with their events; the ids of the jobs that were written.

    A job that is missing in the result was claimed again or finished by somebody else: nothing of it was written.
    One that somebody asked to stop and that is not completed becomes cancelled, and its transition is changed to say
    so.
    """
    if len({transition.job_id for transition in transitions}) < len(transitions):
        # A job that this worker lost and claimed again: both ends must meet the fence, one after the other.
        first = {transition.job_id: transition for transition in reversed(transitions)}
        chosen = {id(transition) for transition in first.values()}
        again = [transition for transition in transitions if id(transition) not in chosen]
        once = finish(connection, tables, list(first.values()), actor=actor)
        return once | finish(connection, tables, again, actor=actor)

    completed = [transition for transition in transitions if transition.status is JobStatus.COMPLETED]
    others = [transition for transition in transitions if transition.status is not JobStatus.COMPLETED]
    written: set[int] = set()
    alike, completed = _alike(completed)
    for token, ids in alike.items():
        parameters = {"ids": sorted(ids), "token": token}
        written.update(job_id for (job_id,) in dialect.execute(connection, _complete_alike(tables), parameters))
    if completed:
        finished = {"finished": _completed_document(completed)}
        written.update(job_id for (job_id,) in dialect.execute(connection, _complete(tables), finished))
    if others:
        moved = {row.id: row for row in connection.execute(_move(tables), {"finished": _moved_document(others)})}
        written.update(moved)
        for transition in others:
            row = moved.get(transition.job_id)
            if row is not None and row.status != transition.status:
                transition.become_cancelled()
        record(
            connection,
            tables,
            [
                {
                    "job_id": transition.job_id,
                    "queue": moved[transition.job_id].queue,
                    "task": moved[transition.job_id].task,
                    "event": transition.event,
                    "actor": actor,
                    "attempt": transition.attempt,
                    "from_status": JobStatus.RUNNING,
                    "to_status": transition.status,
                    "reason": transition.reason,
                    "error": transition.error.as_dict() if transition.error else None,
                    "worker": moved[transition.job_id].claimed_by,
                    "claimed_at": moved[transition.job_id].claimed_at,
                }
                for transition in others
                if transition.job_id in moved
            ],
        )
    return written


def already_written(
    connection: sa.Connection, tables: Tables, transitions: Sequence[Transition], *, actor: str
) -> set[int]:
    """Of transitions that `finish` refused: the ids of the jobs that stand as these would have left them.

    An earlier try was committed although its answer was lost.
    """
    jobs = tables.jobs
    standing = connection.execute(
        sa.select(jobs.c.id, jobs.c.attempt, jobs.c.status).where(
            id_among(jobs.c.id, IDS),
            jobs.c.claimed_by == actor,
            jobs.c.claim_token.is_(None),
        ),
        {"ids": [transition.job_id for transition in transitions]},
    )
    found = {(row.id, row.attempt, row.status) for row in standing}
    return {t.job_id for t in transitions if (t.job_id, t.attempt, str(t.status)) in found}


def _alike(completed: Sequence[Transition]) -> tuple[dict[uuid.UUID, list[int]], list[Transition]]:
    """Completions without a result, by the claim they come from where it has many of them; and all others."""
    alike: dict[uuid.UUID, list[int]] = {}
    others: list[Transition] = []
    for token, of_claim in by_claim(completed).items():
        ids = [transition.job_id for transition in of_claim if transition.result_json is None]
        if len(ids) >= ALIKE_JOBS_MIN:
            alike[token] = ids
            others += [transition for transition in of_claim if transition.result_json is not None]
        else:
            others += of_claim
    return alike, others


def by_claim(transitions: Iterable[Transition]) -> dict[uuid.UUID, list[Transition]]:
    """Transitions by the claim they end."""
    claims: dict[uuid.UUID, list[Transition]] = {}
    token: uuid.UUID | None = None
    of_claim: list[Transition] = []
    for transition in transitions:
        if transition.claim_token is not token:  # those of one claim come together; a UUID takes long to hash
            token = transition.claim_token
            of_claim = claims.setdefault(token, [])
        of_claim.append(transition)
    return claims


def _completed_document(transitions: Sequence[Transition]) -> str:
    ordered = sorted(transitions, key=lambda transition: transition.job_id)
    rows = [{"id": t.job_id, "token": t.claim_token.hex, "result": t.result_json} for t in ordered]
    return pydantic_core.to_json(rows).decode()


def _moved_document(transitions: Sequence[Transition]) -> str:
    ordered = sorted(transitions, key=lambda transition: transition.job_id)
    return json.dumps(
        [
            {
                "id": t.job_id,
                "token": t.claim_token.hex,
                "status": t.status,
                # Whatever a policy said: that an attempt ended must not fail to be written.
                "delay": None if t.delay_seconds is None else min(t.delay_seconds, DELAY_SECONDS_MAX),
                "charge": int(t.charge_retry),
                "error": json.dumps(t.error.as_dict()) if t.error else None,
            }
            for t in ordered
        ]
    )


@cache
def _complete_alike(tables: Tables) -> sa.Update:
    """Completions without a result, of one claim: half the work for the database that `_complete` is."""
    jobs = tables.jobs
    return (
        sa.update(jobs)
        .where(
            id_among(jobs.c.id, IDS),
            jobs.c.claim_token == sa.bindparam("token", type_=sa.Uuid()),
        )
        .values(status=COMPLETED, claim_token=sa.null(), claim_expires_at=sa.null(), finished_at=statement_now())
        .returning(jobs.c.id)
    )


def complete_in_transaction(
    connection: sa.Connection, tables: Tables, transition: Transition, *, frozen_after: float
) -> bool:
    """Write a completion among other work of its transaction; False when its claim was lost.

    As `finish`. From here to the commit the job's row is locked, so in the same round trip the server is told to end
    the transaction when nothing is heard of it for `frozen_after` seconds.
    """
    parameters = {
        "job_id": transition.job_id,
        "token": transition.claim_token,
        "document": transition.result_json,
        "milliseconds": idle_milliseconds(frozen_after),
    }
    return bool(dialect.execute(connection, _complete_in_transaction(tables), parameters))


@cache
def _complete_in_transaction(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    return (
        sa.update(jobs)
        .where(
            jobs.c.id == sa.bindparam("job_id", type_=sa.BigInteger()),
            jobs.c.claim_token == sa.bindparam("token", type_=sa.Uuid()),
            dialect.with_settings(
                tables.dialect_name,
                idle_in_transaction_session_timeout=sa.bindparam("milliseconds", type_=sa.Text()),
            ),
        )
        .values(
            status=COMPLETED,
            claim_token=sa.null(),
            claim_expires_at=sa.null(),
            finished_at=statement_now(),
            result=json_of(sa.bindparam("document", type_=sa.Text())),
        )
        .returning(jobs.c.id)
    )


@cache
def _complete(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    finished = dialect.rows(
        tables.dialect_name,
        "finished",
        sa.column("id", sa.BigInteger),
        sa.column("token", sa.Uuid),
        sa.column("result", sa.Text),
    )
    # The token is NULL unless the job is running, so it is the whole fence. Naming the status as well would
    # lead the planner to the index of running jobs, which is slow while an old snapshot is held.
    return (
        sa.update(jobs)
        .where(jobs.c.id == finished.c.id, jobs.c.claim_token == finished.c.token)
        .values(
            status=COMPLETED,
            claim_token=sa.null(),
            claim_expires_at=sa.null(),
            finished_at=statement_now(),
            result=json_of(finished.c.result),
        )
        .returning(jobs.c.id)
    )


@cache
def _move(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    finished = dialect.rows(
        tables.dialect_name,
        "finished",
        sa.column("id", sa.BigInteger),
        sa.column("token", sa.Uuid),
        sa.column("status", sa.Text),
        sa.column("delay", sa.Double),
        sa.column("charge", sa.Integer),
        sa.column("error", sa.Text),
    )
    asked = jobs.c.cancel_requested_at.is_not(None)  # its worker may not know of it yet
    return (
        sa.update(jobs)
        .where(jobs.c.id == finished.c.id, jobs.c.claim_token == finished.c.token)
        .values(
            status=sa.case((asked, CANCELLED), else_=finished.c.status),
            claim_token=sa.null(),
            claim_expires_at=sa.null(),
            cancel_requested_at=sa.null(),
            run_at=sa.case(
                (sa.and_(finished.c.delay.is_not(None), sa.not_(asked)), seconds_from_now(finished.c.delay)),
                else_=jobs.c.run_at,
            ),
            retries=jobs.c.retries + sa.case((asked, sa.literal_column("0")), else_=finished.c.charge),
            error=sa.func.coalesce(json_of(finished.c.error), jobs.c.error),
            finished_at=sa.case((sa.or_(asked, finished.c.status != PENDING), now())),
            prune_at=sa.case((sa.and_(finished.c.status == DEAD, sa.not_(asked)), prune_at_of_dead(tables))),
        )
        .returning(jobs.c.id, jobs.c.queue, jobs.c.task, jobs.c.status, jobs.c.claimed_by, jobs.c.claimed_at)
    )


def prune_at_of_dead(tables: Tables) -> sa.ColumnElement[Any]:
    """When a job that dies now is to be deleted, as its task was declared; whoever finds it may not know the task."""
    jobs, limits = tables.jobs, tables.limits
    until = sa.select(seconds_from_now(limits.c.keep_dead)).where(
        limits.c.scope == TASK, limits.c.name == jobs.c.task, limits.c.keep_dead.is_not(None)
    )
    return until.correlate(jobs).scalar_subquery()


def release_claim(connection: sa.Connection, tables: Tables, token: uuid.UUID, *, actor: str) -> list[int]:
    """Give back every job of one claim: its worker never learnt whether the claim was made."""
    jobs = tables.jobs
    asked = jobs.c.cancel_requested_at.is_not(None)
    released = connection.execute(
        sa.update(jobs)
        .where(jobs.c.status == RUNNING, jobs.c.claim_token == token)
        .values(
            status=sa.case((asked, CANCELLED), else_=PENDING),
            claim_token=sa.null(),
            claim_expires_at=sa.null(),
            cancel_requested_at=sa.null(),
            finished_at=sa.case((asked, now())),
        )
        .returning(
            jobs.c.id,
            jobs.c.queue,
            jobs.c.task,
            jobs.c.attempt,
            jobs.c.status,
            jobs.c.claimed_by,
            jobs.c.claimed_at,
        )
    ).all()
    for status, event in ((JobStatus.PENDING, EventType.RELEASE), (JobStatus.CANCELLED, EventType.CANCEL)):
        record_all(
            connection,
            tables,
            [row for row in released if row.status == status],
            event=event,
            actor=actor,
            from_status=JobStatus.RUNNING,
            to_status=status,
            reason="its worker did not receive the claim, or had stopped"
            if event is EventType.RELEASE
            else ASKED_TO_STOP,
        )
    return [row.id for row in released]


class Overdue(NamedTuple):
    """The earliest moments that have come of what a sweep sees to; None where none has."""

    lapsed: datetime | None  #: when a lease ran out
    expired: datetime | None  #: when a pending job expired
    prunable: datetime | None  #: when a job that has ended was to be pruned


SINCE_EVER = Overdue(EARLIEST, EARLIEST, EARLIEST)


def upkeep(connection: sa.Connection, tables: Tables, since: Overdue = SINCE_EVER) -> tuple[Overdue, datetime]:
    """What there is to see to, looking for nothing from before these moments; and up to which moment that was looked
    for. One statement."""
    bounds = {f"since_{name}": moment for name, moment in since._asdict().items()}
    ((*moments, present),) = dialect.execute(connection, _upkeep(tables), bounds)
    return Overdue(*moments), present


@cache
def _upkeep(tables: Tables) -> sa.Select[Any]:
    """By the earliest moment in an index, because the plan of an EXISTS may hope to meet one early in the table."""
    jobs = tables.jobs
    looks: dict[str, tuple[Any, ...]] = {
        "lapsed": (jobs.c.claim_expires_at, jobs.c.status == RUNNING),
        "expired": (jobs.c.expires_at, jobs.c.status == PENDING),
        "prunable": (jobs.c.prune_at,),
    }
    earliest = [
        sa.select(moment)
        .where(*conditions, moment < now(), is_since(moment, f"since_{name}"))
        .order_by(moment)
        .limit(sa.literal_column("1"))
        .scalar_subquery()
        .label(name)
        for name, (moment, *conditions) in looks.items()
    ]
    return sa.select(*earliest, now().label("until"))


def is_since(moment: sa.Column[Any], name: str = "since") -> sa.ColumnElement[bool]:
    """Whether it is no earlier than the parameter says."""
    return no_earlier(moment, sa.bindparam(name, type_=moment.type))


def sweep(
    connection: sa.Connection, tables: Tables, *, limit: int, actor: str, since: datetime = EARLIEST
) -> SweepResult:
    """Take up to `limit` jobs from workers whose lease has run out: pending again with a retry charged, or dead; or
    cancelled, where somebody had asked them to stop.

    One statement, which checks the lease again once it has the row's lock: a job that was just finished or
    extended is left alone.

    since: look for no lease that ran out before.
    """
    swept = dialect.execute(connection, _sweep(tables), {"limit": limit, "since": since})
    for status in (JobStatus.PENDING, JobStatus.DEAD, JobStatus.CANCELLED):
        record_all(
            connection,
            tables,
            [row for row in swept if row.status == status],
            event=EventType.SWEEP,
            actor=actor,
            from_status=JobStatus.RUNNING,
            to_status=status,
            reason=lambda row: (
                f"the lease of {row.claimed_by} ran out"
                + (" after the job was asked to stop" if row.status == JobStatus.CANCELLED else "")
            ),
            error=WORKER_LOST,
        )
    return SweepResult(
        returned=[row.id for row in swept if row.status == JobStatus.PENDING],
        dead=[row.id for row in swept if row.status == JobStatus.DEAD],
        cancelled=[row.id for row in swept if row.status == JobStatus.CANCELLED],
    )


@cache
def _sweep(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    expired = (
        sa.select(jobs.c.id)
        .where(jobs.c.status == RUNNING, jobs.c.claim_expires_at < now(), is_since(jobs.c.claim_expires_at))
        .order_by(jobs.c.claim_expires_at)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
        .with_for_update(skip_locked=True)
    )
    asked = jobs.c.cancel_requested_at.is_not(None)
    exhausted = jobs.c.retries >= jobs.c.max_retries
    return (
        sa.update(jobs)
        .where(id_in(jobs.c.id, expired.scalar_subquery()))
        .values(
            status=sa.case((asked, CANCELLED), (exhausted, DEAD), else_=PENDING),
            retries=jobs.c.retries
            + sa.case((sa.or_(asked, exhausted), sa.literal_column("0")), else_=sa.literal_column("1")),
            finished_at=sa.case((sa.or_(asked, exhausted), now())),
            prune_at=sa.case((sa.and_(exhausted, sa.not_(asked)), prune_at_of_dead(tables))),
            cancel_requested_at=sa.null(),
            claim_token=sa.null(),
            claim_expires_at=sa.null(),
            error=json_of(sa.literal(json.dumps(WORKER_LOST.as_dict()), sa.Text())),
        )
        .returning(
            jobs.c.id,
            jobs.c.queue,
            jobs.c.task,
            jobs.c.attempt,
            jobs.c.status,
            jobs.c.claimed_by,
            jobs.c.claimed_at,
        )
    )


# What a worker needs beside ----------------------------------------------------------------------------------


def is_paused(queues: sa.Table) -> sa.ColumnElement[bool]:
    return sa.and_(queues.c.paused_at.is_not(None), (queues.c.paused_until <= now()).is_not(sa.true()))


@dataclass(frozen=True, slots=True)
class OpenJobs:
    """What a draining worker still has to wait for."""

    due: int  #: pending and due, or pending because an attempt failed
    running: int
    next_run_seconds: float | None  #: until the next of the pending ones that failed before is due


def open_jobs(connection: sa.Connection, tables: Tables, queues: Sequence[str], tasks: Sequence[str]) -> OpenJobs:
    """How many jobs of these queues and tasks are due, retrying or running."""
    row = connection.execute(_open_jobs(tables), {"queues": list(queues), "tasks": list(tasks)}).one()
    wait = row.next_run_seconds
    return OpenJobs(row.due, row.running, None if wait is None else max(0.0, -wait))


@cache
def _open_jobs(tables: Tables) -> sa.Select[Any]:
    jobs = tables.jobs
    ours = sa.and_(
        text_in(jobs.c.queue, sa.bindparam("queues", type_=TextArray())),
        text_in(jobs.c.task, sa.bindparam("tasks", type_=TextArray())),
    )
    awaited = sa.or_(jobs.c.run_at <= now(), jobs.c.retries > 0)
    pending = sa.select(sa.func.count().label("due"), seconds_since(sa.func.min(jobs.c.run_at)).label("wait")).where(
        jobs.c.status == PENDING, awaited, ours
    )
    running = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.status == RUNNING, ours)
    due = pending.subquery("due")
    return sa.select(due.c.due, running.scalar_subquery().label("running"), due.c.wait.label("next_run_seconds"))


def beat(connection: sa.Connection, tables: Tables, worker: Mapping[str, Any]) -> None:
    """Record that a worker is alive; `worker` holds the columns of its row."""
    documents = {name: json.dumps(worker[name]) for name in ("queues", "tasks")}
    dialect.execute(connection, _beat(tables), {**worker, **documents})


@cache
def _beat(tables: Tables) -> sa.Executable:
    workers = tables.workers
    beaten: sa.Executable = (
        dialect.insert(tables.dialect_name, workers)
        .values(
            {name: sa.bindparam(name, type_=workers.c[name].type) for name in ("id", "host", "pid", "version")}
            | {name: json_of(sa.bindparam(name, type_=sa.Text())) for name in ("queues", "tasks")}
        )
        .on_conflict_do_update(index_elements=[workers.c.id], set_={"heartbeat_at": now()})
    )
    return beaten


def forget_worker(connection: sa.Connection, tables: Tables, worker_id: str) -> None:
    connection.execute(sa.delete(tables.workers).where(tables.workers.c.id == worker_id))


def forget_silent_workers(connection: sa.Connection, tables: Tables, *, seconds: float) -> None:
    """Drop the rows of workers that gave no sign of life for so long. Their jobs are the sweep's business."""
    workers = tables.workers
    connection.execute(
        sa.delete(workers).where(workers.c.heartbeat_at < seconds_from_now(sa.literal(-seconds, sa.Float())))
    )


# Events ----------------------------------------------------------------------------------------------------


def record(connection: sa.Connection, tables: Tables, events: Sequence[Mapping[str, Any]]) -> None:
    if events:
        connection.execute(sa.insert(tables.job_events), list(events))


def record_all(
    connection: sa.Connection,
    tables: Tables,
    rows: Sequence[sa.Row[Any]],
    *,
    event: EventType,
    actor: str,
    from_status: str | None,
    to_status: str | None,
    reason: Any,
    error: ErrorInfo | None = None,
) -> None:
    """The same event for each row of jobs; `reason` is a text or a function from the row to one.

    What ended an attempt (from running) also says whose it was and when it began.
    """
    ended = from_status == JobStatus.RUNNING
    record(
        connection,
        tables,
        [
            {
                "job_id": row.id,
                "queue": row.queue,
                "task": row.task,
                "event": event,
                "actor": actor,
                "attempt": row.attempt,
                "from_status": from_status,
                "to_status": to_status,
                "reason": reason(row) if callable(reason) else reason,
                "error": error.as_dict() if error else None,
                "worker": row.claimed_by if ended else None,
                "claimed_at": row.claimed_at if ended else None,
            }
            for row in rows
        ],
    )
