"""Let time pass for a test: everything that was stored becomes older, while the database's clock stays as it is.

As in `store`: a function takes the connection first, works in the transaction it finds there, and never commits.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import cache

import sqlalchemy as sa

from pgqueue.dialect import TextArray, now, seconds_before, text_in
from pgqueue.schema import Tables
from pgqueue.store import PENDING

#: What stays: no decision about a job depends on it, or it only says which workers are there.
_STAYING = {("schedules", "declared_at"), ("schedules", "created_at"), ("schedules", "updated_at")}


def travel(connection: sa.Connection, tables: Tables, *, seconds: float) -> None:
    """Make every moment in pgqueue's tables so many seconds older: due times, leases, expiry, periods, schedules."""
    # Moments of ticks are keys, and would run into each other. Nothing is lost: next_tick_at says what is settled.
    connection.execute(sa.delete(tables.schedule_ticks))
    for statement in _age(tables):
        connection.execute(statement, {"seconds": seconds})


@cache
def _age(tables: Tables) -> list[sa.Update]:
    ageing = {
        "jobs": tables.jobs,
        "job_events": tables.job_events,
        "queues": tables.queues,
        "workers": tables.workers,
        "rate_buckets": tables.rate_buckets,
        "schedules": tables.schedules,
        "unique_periods": tables.unique_periods,
    }
    seconds = sa.bindparam("seconds", type_=sa.Float())
    moment = type(now.type)
    return [
        sa.update(table).values(
            {
                column: seconds_before(column, seconds)
                for column in table.c
                if isinstance(column.type, moment) and (name, column.name) not in _STAYING
            }
        )
        for name, table in ageing.items()
    ]


def let_lapse(connection: sa.Connection, tables: Tables, job_id: int, token: uuid.UUID) -> None:
    """Let the lease of this claim be over, if it still holds."""
    jobs = tables.jobs
    connection.execute(
        sa.update(jobs)
        .where(jobs.c.id == job_id, jobs.c.claim_token == token)
        .values(claim_expires_at=seconds_before(now(), sa.literal(1.0, sa.Float())))
    )


def due_queues(connection: sa.Connection, tables: Tables, *, tasks: Sequence[str]) -> list[str]:
    """The queues in which jobs of these tasks are due."""
    return [row.queue for row in connection.execute(_due_queues(tables), {"tasks": list(tasks)})]


@cache
def _due_queues(tables: Tables) -> sa.Select[tuple[str]]:
    jobs = tables.jobs
    of_tasks = text_in(jobs.c.task, sa.bindparam("tasks", type_=TextArray()))
    return (
        sa.select(jobs.c.queue)
        .where(jobs.c.status == PENDING, jobs.c.run_at <= now(), of_tasks)
        .distinct()
        .order_by(jobs.c.queue)
    )
