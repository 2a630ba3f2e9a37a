"""How long ended jobs stay: the ends of jobs whose task says so, and the deletion of those whose time has come.

As in `store`: a function takes the connection first, works in the transaction it finds there, and never commits.

A completed job costs nothing extra: the statement that completes it says when it is to be deleted, or deletes it. That
one stays a moment longer if others may wait for it (`limits`): it is deleted once they were let go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import pydantic_core
import sqlalchemy as sa

from pgqueue import dialect, store, uniqueness
from pgqueue.dialect import id_among, json_of, now, seconds_from_now, statement_now
from pgqueue.job import JobStatus, Transition
from pgqueue.schema import Tables
from pgqueue.store import COMPLETED, DEAD, EARLIEST, FINAL, IDS

#: The most jobs deleted in one transaction.
PRUNE_JOBS_MAX = 1_000


def finish(connection: sa.Connection, tables: Tables, transitions: Sequence[Transition], *, actor: str) -> set[int]:
    """As `store.finish`, for transitions of which some have `keep_seconds`."""
    plain = [t for t in transitions if t.keep_seconds is None]
    doomed = [t for t in transitions if t.keep_seconds == 0 and t.status is JobStatus.COMPLETED]
    kept = [t for t in transitions if t.keep_seconds and t.status is JobStatus.COMPLETED]
    dying = [t for t in transitions if t.keep_seconds is not None and t.status is not JobStatus.COMPLETED]
    written: set[int] = set()
    if doomed:
        gone, left = _delete(connection, tables, doomed)
        written |= gone
        kept += left
    if kept:
        written |= _complete(connection, tables, kept)
    if plain or dying:
        # In their order: of two ends of one job the first has lost its claim.
        left = [t for t in transitions if t.keep_seconds is None or t.status is not JobStatus.COMPLETED]
        finished = store.finish(connection, tables, left, actor=actor)
        died = [t for t in dying if t.job_id in finished and t.status is JobStatus.DEAD]  # and was not cancelled
        keep_dead(connection, tables, {t.job_id: t.keep_seconds or 0.0 for t in died})
        written |= finished
    return written


def already_written(
    connection: sa.Connection, tables: Tables, transitions: Sequence[Transition], *, actor: str
) -> set[int]:
    """As `store.already_written`: a job that was to be deleted, and is gone, stands as it should."""
    doomed = {t.job_id for t in transitions if t.keep_seconds == 0 and t.status is JobStatus.COMPLETED}
    written = store.already_written(connection, tables, transitions, actor=actor)
    if doomed:
        jobs = tables.jobs
        there = connection.execute(sa.select(jobs.c.id).where(id_among(jobs.c.id, IDS)), {"ids": sorted(doomed)})
        written |= doomed.difference(there.scalars())
    return written


def _delete(
    connection: sa.Connection, tables: Tables, transitions: Sequence[Transition]
) -> tuple[set[int], list[Transition]]:
    """Delete completed jobs, with their events; the ids of those that are gone, and the transitions of the others."""
    gone: set[int] = set()
    left: list[Transition] = []
    with_events: list[int] = []
    for token, of_claim in store.by_claim(transitions).items():
        parameters = {"ids": sorted(transition.job_id for transition in of_claim), "token": token}
        deleted = dict(dialect.execute(connection, _delete_alike(tables), parameters))
        gone |= deleted.keys()
        left += [transition for transition in of_claim if transition.job_id not in deleted]
        with_events += [job_id for job_id, has_events in deleted.items() if has_events]
    if with_events:
        dialect.execute(connection, _delete_events(tables), {"ids": sorted(with_events)})
    return gone, left


@cache
def _delete_alike(tables: Tables) -> Any:
    jobs = tables.jobs
    # Text, because SQLAlchemy leaves the table away in a RETURNING of SQLite. No EXISTS, of which the planner may make
    # a join with all events.
    has_events: sa.ColumnClause[bool] = sa.literal_column(
        f"(SELECT e.id FROM {dialect.quoted(tables.job_events)} AS e "  # noqa: S608 — names
        f"WHERE e.job_id = {dialect.quoted(jobs)}.id LIMIT 1) IS NOT NULL"
    )
    return (
        sa.delete(jobs)
        .where(
            id_among(jobs.c.id, IDS),
            jobs.c.claim_token == sa.bindparam("token", type_=sa.Uuid()),
            store.nobody_waits_for(jobs),
        )
        .returning(jobs.c.id, has_events.label("has_events"))
    )


@cache
def _delete_events(tables: Tables) -> sa.Delete:
    return sa.delete(tables.job_events).where(id_among(tables.job_events.c.job_id, IDS))


def _complete(connection: sa.Connection, tables: Tables, transitions: Sequence[Transition]) -> set[int]:
    """Complete jobs, and say when each is to be deleted."""
    ordered = sorted(transitions, key=lambda transition: transition.job_id)
    rows = [
        {"id": t.job_id, "token": t.claim_token.hex, "keep": t.keep_seconds, "result": t.result_json} for t in ordered
    ]
    document = pydantic_core.to_json(rows).decode()
    return {job_id for (job_id,) in dialect.execute(connection, _complete_keeping(tables), {"finished": document})}


@cache
def _complete_keeping(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    finished = dialect.rows(
        tables.dialect_name,
        "finished",
        sa.column("id", sa.BigInteger),
        sa.column("token", sa.Uuid),
        sa.column("keep", sa.Double),
        sa.column("result", sa.Text),
    )
    return (
        sa.update(jobs)
        .where(jobs.c.id == finished.c.id, jobs.c.claim_token == finished.c.token)
        .values(
            status=COMPLETED,
            claim_token=sa.null(),
            claim_expires_at=sa.null(),
            finished_at=statement_now(),
            result=json_of(finished.c.result),
            prune_at=seconds_from_now(finished.c.keep),
        )
        .returning(jobs.c.id)
    )


def keep_dead(connection: sa.Connection, tables: Tables, seconds: Mapping[int, float]) -> None:
    """Say when dead jobs are to be deleted: so many seconds from now, by id. Others stay as they are."""
    by_seconds: dict[float, list[int]] = {}
    for job_id, keep in seconds.items():
        by_seconds.setdefault(keep, []).append(job_id)
    for keep, ids in by_seconds.items():
        connection.execute(_keep_dead(tables), {"ids": sorted(ids), "keep": keep})


@cache
def _keep_dead(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    return (
        sa.update(jobs)
        .where(id_among(jobs.c.id, IDS), jobs.c.status == DEAD)
        .values(prune_at=seconds_from_now(sa.bindparam("keep", type_=sa.Double())))
    )


def outdated(
    connection: sa.Connection, tables: Tables, keep_dead: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Of how long dead jobs of these tasks are kept: what the database does not know yet."""
    limits = tables.limits
    of_tasks = sa.select(limits.c.name, limits.c.keep_dead).where(limits.c.scope == "task")
    known = {row.name: row.keep_dead for row in connection.execute(of_tasks)}
    return {task: keep_dead[task] for task in sorted(keep_dead) if known.get(task) != keep_dead[task]}


def declare(connection: sa.Connection, tables: Tables, keep_dead: Mapping[str, float | None]) -> None:
    """Make known how long dead jobs of these tasks are kept: to whoever sweeps one, or finds it expired."""
    limits = tables.limits
    for task, seconds in keep_dead.items():
        put = dialect.insert(tables.dialect_name, limits).values(scope="task", name=task, keep_dead=seconds)
        connection.execute(
            put.on_conflict_do_update(index_elements=[limits.c.scope, limits.c.name], set_={"keep_dead": seconds})
        )


def prune_due(
    connection: sa.Connection, tables: Tables, *, limit: int = PRUNE_JOBS_MAX, since: datetime = EARLIEST
) -> int:
    """Delete up to `limit` ended jobs whose time has come, with their events; how many. Skips what others have
    locked.

    since: look for none whose time came before.
    """
    due = connection.execute(_due_to_prune(tables), {"limit": limit, "since": since}).all()
    ids = sorted(row.id for row in due)
    if ids:
        uniqueness.release(connection, tables, [row for row in due if row.status != JobStatus.COMPLETED])
        connection.execute(_delete_events(tables), {"ids": ids})
        connection.execute(sa.delete(tables.jobs).where(id_among(tables.jobs.c.id, IDS)), {"ids": ids})
    return len(ids)


@cache
def _due_to_prune(tables: Tables) -> sa.Select[Any]:
    jobs = tables.jobs
    return (
        sa.select(jobs.c.id, jobs.c.task, jobs.c.status, jobs.c.unique_key)
        # The status, because a job that plain SQL put back to pending must not be lost.
        .where(
            jobs.c.prune_at <= now(),
            jobs.c.status.op("IN")(FINAL),
            store.nobody_waits_for(jobs),
            store.is_since(jobs.c.prune_at),
        )
        .order_by(jobs.c.prune_at)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
        .with_for_update(skip_locked=True)
    )
