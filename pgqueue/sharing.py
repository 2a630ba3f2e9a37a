"""Whether a worker is to give back jobs that it holds ahead of its slots: they would start sooner with another worker,
or are not to start, because their queue was paused meanwhile.

Only hints: jobs that are given back in vain wait as pending ones instead, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from pgqueue import dialect
from pgqueue.dialect import json_text, now, seconds_from_now
from pgqueue.schema import Tables
from pgqueue.store import PENDING, claim_filters, is_paused


def others_may_be_free(
    connection: sa.Connection, tables: Tables, *, queue: str, worker: str, tasks: Sequence[str], seconds: float
) -> bool:
    """Whether another worker of this queue showed a sign of life within so many seconds, and may have nothing to do:
    no other job of these tasks could be claimed. Never in a paused queue. One statement."""
    parameters = {"of_queue": queue, "worker": worker, "tasks": list(tasks), "seconds": -seconds}
    ((free,),) = dialect.execute(connection, _others_may_be_free(tables), parameters)
    return bool(free)


def was_paused(connection: sa.Connection, tables: Tables, *, queue: str) -> bool:
    """Whether nothing is to be started from this queue now."""
    ((paused,),) = dialect.execute(connection, _was_paused(tables), {"of_queue": queue})
    return bool(paused)


@cache
def _was_paused(tables: Tables) -> sa.Select[Any]:
    queues = tables.queues
    return sa.select(sa.exists().where(queues.c.name == sa.bindparam("of_queue", type_=sa.Text()), is_paused(queues)))


@cache
def _others_may_be_free(tables: Tables) -> sa.Select[Any]:
    workers, queues = tables.workers, tables.queues
    queue = sa.bindparam("of_queue", type_=sa.Text())
    others = sa.exists().where(
        workers.c.id != sa.bindparam("worker", type_=sa.Text()),
        workers.c.heartbeat_at > seconds_from_now(sa.bindparam("seconds", type_=sa.Float())),
        json_text(workers.c.queues, queue).is_not(None),
    )
    paused = sa.exists().where(queues.c.name == queue, is_paused(queues))
    return sa.select(sa.and_(others, sa.not_(paused), sa.not_(_claimable(tables, queue))))


def _claimable(tables: Tables, queue: sa.BindParameter[str]) -> sa.ColumnElement[bool]:
    """Whether a job could be claimed, limits aside. On PostgreSQL lane by lane, as claims look for them."""
    jobs = tables.jobs
    due = [
        jobs.c.queue == queue,
        jobs.c.status == PENDING,
        jobs.c.waits_for.is_(None),
        jobs.c.run_at <= now(),
        claim_filters(tables, queue, of_tasks=True),
    ]
    one = sa.select(jobs.c.id)
    if tables.dialect_name != dialect.POSTGRESQL:
        return one.where(*due).exists()
    lane = dialect.lanes(jobs, queue).subquery("lane")
    of_lane = one.where(*due, jobs.c.priority == lane.c.priority).order_by(jobs.c.run_at, jobs.c.id)
    first = of_lane.limit(1).correlate(lane).lateral("due")
    return sa.select(first.c.id).select_from(lane.join(first, sa.true())).exists()
