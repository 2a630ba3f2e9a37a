"""Unique keys that come from payloads, in bulk and with periods. One function an operation, as in `store`.

Whatever happens at the same time, a database constraint decides: the partial unique index over open jobs, and the
primary key of `unique_periods`, whose row one enqueue at a time can take.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import sqlalchemy as sa

from pgqueue import dialect, store
from pgqueue.dialect import TextArray, id_among, now, seconds_from_now, text_in
from pgqueue.engine import commits_by_itself, savepoint
from pgqueue.errors import DuplicateJob
from pgqueue.job import EnqueueResult, JobStatus, NewJob, OnConflict
from pgqueue.schema import Tables

MICROSECOND = 1e-6


def insert_unique_jobs(
    connection: sa.Connection,
    tables: Tables,
    template: NewJob,
    payloads_json: Sequence[str],
    unique_keys: Sequence[str],
    keys: Sequence[Sequence[str | None]] | None = None,
    *,
    on_conflict: OnConflict,
    actor: str,
) -> list[EnqueueResult]:
    """Store a job like `template` for each payload whose unique key is free; what became of each, in their order.

    A key is taken by an open job of the task and, where the template has a period, by one that was enqueued within it.
    Of payloads with the same key the first is stored, with OnConflict.REPLACE the last. Raises DuplicateJob as
    `on_conflict` says; then nothing was stored.

    Keys are taken in their own order, or two such calls could wait for each other. So that the jobs start in the order
    of the payloads all the same, each is due a microsecond before the next. Those with an ordering key, which goes by
    ids, are stored in the order of the payloads.
    """
    chosen: dict[str, int] = {}
    for position, key in enumerate(unique_keys):
        if key in chosen and on_conflict is OnConflict.RAISE:
            raise DuplicateJob(
                f"task {template.task!r}: the payloads {chosen[key]} and {position}, counted from 0, have the same "
                f"unique key {key!r}"
            )
        if on_conflict is OnConflict.REPLACE or key not in chosen:
            chosen[key] = position
    at_once = dialect.writes_at_once(tables.dialect_name)
    by_key = at_once and not any(of_job[store.LIMIT_KEYS.index("ordering_key")] for of_job in keys or ())
    if by_key:
        chosen = dict(sorted(chosen.items()))
    wanted: dict[str, NewJob] = {}
    for key, position in chosen.items():
        of_job: dict[str, Any] = dict(zip(store.LIMIT_KEYS, keys[position], strict=True) if keys else ())
        of_job |= {"payload_json": payloads_json[position], "unique_key": key}
        wanted[key] = replace(template, **of_job)
    early = _early(template, chosen, len(payloads_json)) if by_key and len(chosen) > 1 else None
    # What can change hands is undone with what was stored before it.
    all_or_none = len(chosen) > 1 or template.period_seconds is not None
    for _ in range(store.CONFLICT_ROUNDS_MAX):
        with suppress(_KeysChangedHands), savepoint(connection) if all_or_none else nullcontext():
            results: dict[str, EnqueueResult] = {}
            for start in range(0, len(chosen), store.INSERT_JOBS_MAX):
                some = dict(islice(wanted.items(), start, start + store.INSERT_JOBS_MAX))
                results |= _insert_some(connection, tables, some, early, on_conflict=on_conflict, actor=actor)
            return [
                results[key] if chosen[key] == position else EnqueueResult(results[key].id, inserted=False)
                for position, key in enumerate(unique_keys)
            ]
    raise DuplicateJob(
        f"task {template.task!r}: unique keys changed hands {store.CONFLICT_ROUNDS_MAX} times while these jobs were "
        "being enqueued; try again"
    )


class _KeysChangedHands(Exception):
    """While it was looked who has them. All keys are given up and taken again, in their order."""


def _early(template: NewJob, positions: Mapping[str, int], count: int) -> dict[str, float]:
    """By how many seconds the job of each key is due earlier. What is due at once stays due at once."""
    last = count if template.delay_seconds is None and template.run_at is None else 0
    return {key: (last - position) * MICROSECOND for key, position in positions.items()}


def _insert_some(
    connection: sa.Connection,
    tables: Tables,
    wanted: dict[str, NewJob],
    early: Mapping[str, float] | None,
    *,
    on_conflict: OnConflict,
    actor: str,
) -> dict[str, EnqueueResult]:
    template = next(iter(wanted.values()))
    with_periods = template.period_seconds is not None
    sooner = None if early is None else [early[key] for key in wanted]
    inserted = store.insert_keyed_jobs(connection, tables, list(wanted.values()), sooner)
    if template.period_seconds is not None and inserted:
        inserted = _begin_periods(connection, tables, template.task, template.period_seconds, inserted)
    results = {key: EnqueueResult(job_id) for key, job_id in inserted.items()}
    taken = [key for key in wanted if key not in results]
    holders = _holders(connection, tables, template.task, taken, with_periods) if taken else {}
    for key in taken:
        holder = holders.get(key)
        met = holder and _meet(connection, tables, wanted[key], holder, on_conflict=on_conflict, actor=actor)
        if met is None:
            raise _KeysChangedHands
        results[key] = met
    return results


def _meet(
    connection: sa.Connection,
    tables: Tables,
    job: NewJob,
    holder: sa.Row[Any],
    *,
    on_conflict: OnConflict,
    actor: str,
) -> EnqueueResult | None:
    """What becomes of a job whose key is taken; None: look again."""
    if on_conflict is OnConflict.SKIP:
        return EnqueueResult(holder.id, inserted=False)
    if on_conflict is OnConflict.REPLACE and holder.status == JobStatus.PENDING:
        replaced = store.replace_pending(connection, tables, job, actor)
        return None if replaced is None else EnqueueResult(replaced, inserted=False)
    if holder.status in (JobStatus.PENDING, JobStatus.RUNNING):
        what = f"already has the {holder.status} job {holder.id} with the unique key {job.unique_key!r}"
    else:
        what = (
            f"had the job {holder.id} with the unique key {job.unique_key!r} enqueued less than "
            f"{job.period_seconds:g} s ago"
        )
    if on_conflict is OnConflict.REPLACE:
        what += f": it is {holder.status or 'gone'}, so its payload can no longer be replaced"
    raise DuplicateJob(f"task {job.task!r} {what}")


def _begin_periods(
    connection: sa.Connection, tables: Tables, task: str, seconds: float, inserted: Mapping[str, int]
) -> dict[str, int]:
    """Let the periods of new jobs begin; those that got theirs. The others lost it to an enqueue at this very moment,
    and are taken back."""
    rows = [{"unique_key": key, "id": inserted[key]} for key in sorted(inserted)]
    begun = set(
        connection.execute(_begin(tables), {"periods": json.dumps(rows), "of_task": task, "seconds": seconds}).scalars()
    )
    lost = sorted(job_id for key, job_id in inserted.items() if key not in begun)
    if lost and not commits_by_itself(connection):
        raise _KeysChangedHands
    if lost:
        connection.execute(sa.delete(tables.jobs).where(id_among(tables.jobs.c.id, store.IDS)), {"ids": lost})
    return {key: job_id for key, job_id in inserted.items() if key in begun}


@cache
def _begin(tables: Tables) -> Any:
    periods = tables.unique_periods
    new = dialect.rows(tables.dialect_name, "periods", sa.column("unique_key", sa.Text), sa.column("id", sa.BigInteger))
    select = (
        sa.select(
            sa.bindparam("of_task", type_=sa.Text()).label("task"),
            new.c.unique_key,
            seconds_from_now(sa.bindparam("seconds", type_=sa.Float())).label("until"),
            new.c.id,
        )
        .where(new.c.id.is_not(None))  # SQLite would take ON CONFLICT for the ON of a join
        .order_by(new.c.unique_key)
    )
    return _begin_from(tables, select).returning(periods.c.unique_key)


def _begin_from(tables: Tables, select: sa.Select[Any]) -> Any:
    """Let periods begin, with their task, key, end and job, where none lasts."""
    periods = tables.unique_periods
    insert = dialect.insert(tables.dialect_name, periods).from_select(["task", "unique_key", "until", "job_id"], select)
    return insert.on_conflict_do_update(
        index_elements=[periods.c.task, periods.c.unique_key],
        set_={"until": insert.excluded.until, "job_id": insert.excluded.job_id},
        where=sa.or_(periods.c.until <= now(), _is_released_now(tables)),
    )


def _is_released_now(tables: Tables) -> sa.TextClause:
    """`store.is_released` as text: SQLAlchemy leaves the schema away in a subquery of ON CONFLICT DO UPDATE."""
    period = dialect.quoted(tables.unique_periods, with_schema=False)
    return sa.text(
        f"coalesce((SELECT holder.status FROM {dialect.quoted(tables.jobs)} AS holder "  # noqa: S608 — names
        f"WHERE holder.id = {period}.job_id), '') IN ('dead', 'cancelled')"
    )


def _holders(
    connection: sa.Connection, tables: Tables, task: str, keys: list[str], with_periods: bool
) -> dict[str, sa.Row[Any]]:
    """Who has these unique keys: open jobs, or else those whose period lasts. Of the latter, status may be None."""
    parameters = {"of_task": task, "keys": keys}
    found: dict[str, sa.Row[Any]] = {}
    if with_periods:
        found = {row.unique_key: row for row in connection.execute(_period_holders(tables), parameters)}
    return found | {row.unique_key: row for row in connection.execute(_open_holders(tables), parameters)}


def count_free(connection: sa.Connection, tables: Tables, template: NewJob, keys: Sequence[str]) -> int:
    """How many of these unique keys nobody has."""
    wanted = set(keys)
    return len(
        wanted - _holders(connection, tables, template.task, sorted(wanted), template.period_seconds is not None).keys()
    )


@cache
def _open_holders(tables: Tables) -> sa.Select[Any]:
    jobs = tables.jobs
    return sa.select(jobs.c.id, jobs.c.status, jobs.c.unique_key).where(
        jobs.c.task == sa.bindparam("of_task", type_=sa.Text()),
        text_in(jobs.c.unique_key, sa.bindparam("keys", type_=TextArray())),
        sa.text("status IN ('pending', 'running')"),
    )


@cache
def _period_holders(tables: Tables) -> sa.Select[Any]:
    jobs, periods = tables.jobs, tables.unique_periods
    return (
        sa.select(periods.c.job_id.label("id"), jobs.c.status, periods.c.unique_key)
        .select_from(periods.outerjoin(jobs, jobs.c.id == periods.c.job_id))
        .where(
            periods.c.task == sa.bindparam("of_task", type_=sa.Text()),
            text_in(periods.c.unique_key, sa.bindparam("keys", type_=TextArray())),
            periods.c.until > now(),
            sa.not_(store.is_released(tables)),
        )
    )


def release(connection: sa.Connection, tables: Tables, rows: Sequence[sa.Row[Any]]) -> None:
    """End the periods of jobs that are being deleted, in the order of their keys, as enqueues begin them."""
    periods = tables.unique_periods
    keyed = [{"of_task": row.task, "key": row.unique_key, "id": row.id} for row in rows if row.unique_key is not None]
    keyed.sort(key=lambda row: (row["of_task"], row["key"]))
    if keyed:
        connection.execute(
            sa.delete(periods).where(
                periods.c.task == sa.bindparam("of_task", type_=sa.Text()),
                periods.c.unique_key == sa.bindparam("key", type_=sa.Text()),
                periods.c.job_id == sa.bindparam("id", type_=sa.BigInteger()),
            ),
            keyed,
        )


def move_period(connection: sa.Connection, tables: Tables, task: str, job_id: int, old: str, new: str) -> None:
    """Let the period that a job began be that of its new key, unless one of another job lasts there."""
    parameters = {"of_task": task, "id": job_id, "old": old, "new": new}
    for statement in _move(tables):
        connection.execute(statement, parameters)


@cache
def _move(tables: Tables) -> tuple[Any, sa.Delete]:
    periods = tables.unique_periods
    own = sa.and_(
        periods.c.task == sa.bindparam("of_task", type_=sa.Text()),
        periods.c.unique_key == sa.bindparam("old", type_=sa.Text()),
        periods.c.job_id == sa.bindparam("id", type_=sa.BigInteger()),
    )
    moved = sa.select(
        periods.c.task, sa.bindparam("new", type_=sa.Text()).label("unique_key"), periods.c.until, periods.c.job_id
    ).where(own)
    return _begin_from(tables, moved), sa.delete(periods).where(own)


def forget_periods(connection: sa.Connection, tables: Tables, *, limit: int) -> int:
    """Delete up to `limit` periods that are over; how many."""
    return connection.execute(_forget(tables), {"limit": limit}).rowcount


@cache
def _forget(tables: Tables) -> sa.Delete:
    periods = tables.unique_periods
    over = (
        sa.select(periods.c.task, periods.c.unique_key)
        .where(periods.c.until < now())
        .order_by(periods.c.until)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
        .with_for_update(skip_locked=True)
    )
    return sa.delete(periods).where(sa.tuple_(periods.c.task, periods.c.unique_key).in_(over), periods.c.until < now())
