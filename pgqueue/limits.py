"""The limits of queues and tasks as they are kept: what the code declares, and what people set while workers run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa

from pgqueue import dialect, offers, store
from pgqueue.admission import WAITS_FOR_KEY, WAITS_FOR_TASK, Limits
from pgqueue.dialect import id_in, now
from pgqueue.engine import LockNotWon, waiting_at_most
from pgqueue.job import EventType
from pgqueue.schema import Tables
from pgqueue.store import AWAITED, PENDING, QUEUE, RUNNING

#: How often, and how long each time, a new limit waits for jobs that are running and locked.
COUNT_TRIES, COUNT_WAITS_SECONDS = 50, 0.1

#: Of the jobs that wait for a limit that was raised, so many keys are let go at once; the others as slots come free.
RAISED_KEYS_MAX = 10_000

Scope = Literal["queue", "task"]

#: Who set limits that the application's code declares.
CODE = "code"

_COLUMNS = ("concurrency", "key_concurrency", "rate", "burst", "max_depth", "on_full", "promote_after")


@dataclass(frozen=True, slots=True)
class LimitsRow:
    """The limits of a queue or a task as they are kept."""

    scope: Scope
    name: str
    limits: Limits
    declared_by: str  #: "code", or who changed it since
    updated_at: datetime


def list_limits(connection: sa.Connection, tables: Tables) -> list[LimitsRow]:
    """All limits there are, of queues and then of tasks, by name."""
    rows = connection.execute(sa.select(tables.limits).order_by(tables.limits.c.scope, tables.limits.c.name))
    listed = [LimitsRow(row.scope, row.name, _limits_of(row), row.declared_by, row.updated_at) for row in rows]
    return [row for row in listed if row.limits != Limits() or row.declared_by != CODE]


def get_limits(
    connection: sa.Connection, tables: Tables, scope: Scope, name: str, *, lock: bool = False
) -> Limits | None:
    """The limits of a queue or a task; with `lock`, nobody else changes them before this transaction ends."""
    limits = tables.limits
    query = sa.select(limits).where(limits.c.scope == scope, limits.c.name == name)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    return None if row is None else _limits_of(row)


def _limits_of(row: sa.Row[Any]) -> Limits:
    return Limits(**{name: getattr(row, name) for name in _COLUMNS})


def outdated(
    connection: sa.Connection,
    tables: Tables,
    declared: Mapping[tuple[Scope, str], Limits],
    tasks: Iterable[str],
) -> dict[tuple[Scope, str], Limits]:
    """Of the limits that the code declares: those that are not known yet, and were not changed by somebody since;
    for those of `tasks` that lost theirs: none."""
    known = {(row.scope, row.name): row for row in connection.execute(sa.select(tables.limits))}
    wanted = dict(declared)
    for task in tasks:
        if ("task", task) in known:
            wanted.setdefault(("task", task), Limits())

    def is_outdated(key: tuple[Scope, str]) -> bool:
        row = known.get(key)
        return row is None or (row.declared_by == CODE and _limits_of(row) != wanted[key])

    return {key: wanted[key] for key in sorted(wanted) if is_outdated(key)}


def declare(connection: sa.Connection, tables: Tables, limits: Mapping[tuple[Scope, str], Limits]) -> None:
    """Make known what the code declares, unless somebody changed it since it was looked at."""
    of = tables.limits
    for (scope, name), wanted in limits.items():
        row = sa.select(of.c.declared_by).where(of.c.scope == scope, of.c.name == name).with_for_update()
        if connection.execute(row).scalar_one_or_none() in (None, CODE):
            put_limits(connection, tables, scope, name, wanted, declared_by=CODE)


def put_limits(
    connection: sa.Connection,
    tables: Tables,
    scope: Scope,
    name: str,
    wanted: Limits,
    *,
    declared_by: str,
    actor: str | None = None,
    reason: str | None = None,
) -> bool:
    """Set the limits of a queue or a task from now on, for every worker; False when they were so already.

    Jobs that are running count from now on, too. What workers are claiming at this very moment may still pass.
    actor: who does it; `declared_by` unless given.
    """
    limits = tables.limits
    before = get_limits(connection, tables, scope, name, lock=True) or Limits()
    values = {column: getattr(wanted, column) for column in _COLUMNS}
    changed = {"declared_by": declared_by, "updated_at": now(), "releasing": scope == "task"}
    put = dialect.insert(tables.dialect_name, limits).values(scope=scope, name=name, **values, **changed)
    connection.execute(
        put.on_conflict_do_update(index_elements=[limits.c.scope, limits.c.name], set_={**values, **changed})
    )
    if before == wanted:
        return False
    if wanted.holds_slots:
        _count_running(connection, tables, scope, name)
    if scope == "task":
        _raise(connection, tables, name, before, wanted)
    if wanted.rate != before.rate:
        buckets = tables.rate_buckets
        connection.execute(
            sa.update(buckets)
            .where(buckets.c.scope == scope, buckets.c.name == name, buckets.c.ripe_at > now())
            .values(ripe_at=now())
        )
    store.record(
        connection,
        tables,
        [
            {
                "queue": name if scope == "queue" else "*",
                "task": name if scope == "task" else None,
                "event": EventType.LIMIT,
                "actor": actor or declared_by,
                "reason": f"{describe(wanted)}{f': {reason}' if reason else ''}",
            }
        ],
    )
    return True


def describe(limits: Limits) -> str:
    """The limits in words, such as ``concurrency 4, rate 2/s``."""
    parts = [
        f"{column.replace('_', ' ')} {getattr(limits, column):g}{'/s' if column == 'rate' else ''}"
        for column in _COLUMNS
        if column != "on_full" and getattr(limits, column) is not None
    ]
    return ", ".join(parts) or "no limits"


def _count_running(connection: sa.Connection, tables: Tables, scope: Scope, name: str) -> None:
    """Let jobs that run already hold a slot."""
    jobs = tables.jobs
    running = (
        sa.select(jobs.c.id)
        .where(jobs.c.status == RUNNING, (jobs.c.queue if scope == "queue" else jobs.c.task) == name)
        .order_by(jobs.c.id)
        .with_for_update()
    )
    held = sa.update(jobs).where(id_in(jobs.c.id, running.scalar_subquery()), jobs.c.status == RUNNING)
    # A worker that ends several of them takes them in an order of its own: let it go first when we meet half-way.
    for _ in range(COUNT_TRIES):
        with suppress(LockNotWon), waiting_at_most(connection, COUNT_WAITS_SECONDS):
            connection.execute(held.values(slot=AWAITED))
            return
    connection.execute(held.values(slot=AWAITED))


def _raise(connection: sa.Connection, tables: Tables, task: str, before: Limits, wanted: Limits) -> None:
    """Where a limit grew, offer the new slots to jobs that wait for one."""
    slots: dict[tuple[str, str], int] = {}
    more = _growth(before.concurrency, wanted.concurrency)
    if more:
        slots[task, WAITS_FOR_TASK] = more
    more = _growth(before.key_concurrency, wanted.key_concurrency)
    if more:
        jobs = tables.jobs
        waiting = (
            sa.select(jobs.c.waits_for)
            .where(jobs.c.task == task, jobs.c.waits_for.is_not(None), jobs.c.waits_for.like(f"{WAITS_FOR_KEY}%"))
            .distinct()
            .limit(RAISED_KEYS_MAX)
        )
        slots |= {(task, what): more for what in connection.execute(waiting).scalars()}
    if slots:
        offers.offer_slots(connection, tables, slots)


def _growth(before: int | None, after: int | None) -> int:
    """How many slots more there are; what is no limit any more is let go by claims."""
    return 0 if before is None or after is None else max(0, min(after - before, offers.FREED_JOBS_MAX))


def note_ordered(connection: sa.Connection, tables: Tables, queue: str) -> bool:
    """Make claims from the queue keep the order of ordering keys, once the transaction commits, and for ever; True
    when they do so already."""
    limits = tables.limits
    of_queue = sa.and_(limits.c.scope == QUEUE, limits.c.name == queue)
    ordered = connection.execute(sa.select(limits.c.ordered).where(of_queue)).scalar_one_or_none()
    if ordered is None:
        put = dialect.insert(tables.dialect_name, limits).values(scope="queue", name=queue, ordered=sa.true())
        connection.execute(put.on_conflict_do_nothing())
    if not ordered:
        connection.execute(sa.update(limits).where(of_queue, sa.not_(limits.c.ordered)).values(ordered=sa.true()))
    return bool(ordered)


def depth(connection: sa.Connection, tables: Tables, queue: str, *, at_most: int) -> int:
    """How many jobs of the queue are pending; it stops counting at `at_most`."""
    jobs = tables.jobs
    of_queue = [jobs.c.queue == queue, jobs.c.status == PENDING]
    counted = 0
    for waits in (jobs.c.waits_for.is_(None), jobs.c.waits_for.is_not(None)):
        some = sa.select(sa.literal_column("1").label("one")).where(*of_queue, waits).limit(at_most).subquery()
        counted += connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one()
    return min(counted, at_most)
