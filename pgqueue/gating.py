"""Which limits a claim has to keep, and the lock on them: of the claims under the same limits one decides at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from pgqueue import dialect, store
from pgqueue.admission import WAITS_FOR_TASK, Limits
from pgqueue.engine import LOCK_NOT_AVAILABLE, LockNotWon, idle_milliseconds
from pgqueue.schema import ENDED, Tables

#: How long a claim waits for those that go before it, and how long it may do nothing before the server ends it. It
#: takes milliseconds.
CLAIM_WAITS_SECONDS = 0.5
CLAIM_IDLE_SECONDS = 5.0

#: The limits that concern claims.
_OF_CLAIMS = ("concurrency", "key_concurrency", "rate", "burst", "promote_after")

#: Tokens per second, and the most that a bucket holds; by scope and name.
Rates = dict[tuple[str, str], tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Gates:
    """The limits that a claim has locked."""

    queue_name: str
    queue: Limits | None
    tasks: Mapping[str, Limits]
    ordered: bool
    releasing: Sequence[str]  # tasks
    something_ended: bool  # that others wait for; as it was when the claim began to wait for the locks

    @property
    def holding(self) -> list[str] | None:
        """The tasks whose jobs hold a slot while they run; None: all."""
        if self.queue is not None and self.queue.concurrency is not None:
            return None
        return [name for name, limits in self.tasks.items() if limits.holds_slots]

    @property
    def limited(self) -> list[str]:
        """The tasks of which only so many may run."""
        return [name for name, limits in self.tasks.items() if limits.concurrency is not None]

    @property
    def keyed(self) -> bool:
        return any(limits.key_concurrency is not None for limits in self.tasks.values())

    def slots(self, slot: tuple[str, str]) -> int:
        """How many of a slot there are."""
        task, what = slot
        limits = self.tasks[task]
        return (limits.concurrency if what == WAITS_FOR_TASK else limits.key_concurrency) or 0

    @property
    def rates(self) -> Rates:
        of_tasks: Rates = {
            ("task", name): (limits.rate, limits.burst)
            for name, limits in self.tasks.items()
            if limits.rate is not None and limits.burst is not None
        }
        if self.queue is not None and self.queue.rate is not None and self.queue.burst is not None:
            of_tasks["queue", self.queue_name] = (self.queue.rate, self.queue.burst)
        return of_tasks


def are_kept(connection: sa.Connection, tables: Tables, *, queue: str, tasks: Sequence[str] | None) -> bool:
    """Whether claims from the queue have to keep limits."""
    parameters = {"of_queue": queue, **({} if tasks is None else {"tasks": list(tasks)})}
    return bool(connection.execute(_are_kept(tables, tasks is not None), parameters).scalar_one())


@cache
def _are_kept(tables: Tables, of_tasks: bool) -> sa.Select[Any]:
    return sa.select(store.has_limits(tables, sa.bindparam("of_queue", type_=sa.Text()), of_tasks))


def lock(
    connection: sa.Connection,
    tables: Tables,
    queue: str,
    tasks: Sequence[str] | None,
    *,
    lease: float,
    flush: bool,
    bounded: bool,
) -> Gates | None:
    """Lock the limits of a queue and of the tasks, in one order; None when there are none to keep.

    If `bounded`, the server ends the transaction when it is idle for CLAIM_IDLE_SECONDS, or as long as the lease; and
    LockNotWon is raised when those that go before it take longer than CLAIM_WAITS_SECONDS. Both hold to its end.
    Without `flush` its commit does not wait for the disk.
    """
    parameters: dict[str, Any] = {"of_queue": queue, **({} if tasks is None else {"tasks": list(tasks)})}
    if bounded and tables.dialect_name == dialect.POSTGRESQL:
        parameters |= {
            "waits": idle_milliseconds(CLAIM_WAITS_SECONDS),
            "milliseconds": idle_milliseconds(min(lease, CLAIM_IDLE_SECONDS)),
        }
    try:
        rows = dialect.execute(connection, _lock_limits(tables, tasks is not None, flush, bounded), parameters)
    except sa.exc.OperationalError as error:
        if bounded and getattr(error.orig, "sqlstate", None) == LOCK_NOT_AVAILABLE:
            raise LockNotWon from error
        raise
    if not rows:
        return None
    limits = {(row.scope, row.name): Limits(**{name: getattr(row, name) for name in _OF_CLAIMS}) for row in rows}
    return Gates(
        queue,
        limits.get(("queue", queue)),
        {name: found for (scope, name), found in limits.items() if scope == "task"},
        ordered=any(row.ordered for row in rows if row.scope == "queue"),
        releasing=[row.name for row in rows if row.releasing],
        something_ended=bool(rows[0].something_ended),
    )


@cache
def _lock_limits(tables: Tables, of_tasks: bool, flush: bool, bounded: bool) -> sa.Select[Any]:
    limits = tables.limits
    queue = sa.bindparam("of_queue", type_=sa.Text())
    # Of any task and queue: each condition more costs as much planning as the whole look.
    ended = sa.exists(sa.select(sa.literal_column("1")).select_from(tables.jobs).where(sa.text(f"({ENDED})")))
    columns = [limits.c[name] for name in ("scope", "name", *_OF_CLAIMS, "ordered", "releasing")]
    settings: dict[str, sa.ColumnElement[str]] = {} if flush else {"synchronous_commit": dialect.OFF}
    if bounded:
        settings["lock_timeout"] = sa.bindparam("waits", type_=sa.Text())
        settings["idle_in_transaction_session_timeout"] = sa.bindparam("milliseconds", type_=sa.Text())
    return (
        sa.select(*columns, ended.label("something_ended"))
        .where(store.concern(limits, queue, of_tasks), dialect.with_settings(tables.dialect_name, **settings))
        .order_by(limits.c.scope, limits.c.name)
        .with_for_update(of=limits)
    )
