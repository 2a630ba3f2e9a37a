"""Jobs that are not worth running any more: `expires_at` has passed before they were started.

As in `store`: a function takes the connection first, works in the transaction it finds there, and never commits. That
no expired job is claimed is the claim's own condition; here it becomes visible that it will not be run.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache

import sqlalchemy as sa

from pgqueue.dialect import id_in, json_of, now
from pgqueue.job import EXPIRED, EventType, JobStatus
from pgqueue.schema import Tables
from pgqueue.store import DEAD, EARLIEST, PENDING, is_since, prune_at_of_dead, record_all

#: The most jobs that one statement finds expired.
EXPIRE_JOBS_MAX = 500


def expire(
    connection: sa.Connection,
    tables: Tables,
    *,
    actor: str,
    limit: int = EXPIRE_JOBS_MAX,
    since: datetime = EARLIEST,
) -> list[int]:
    """Let up to `limit` pending jobs that have expired be dead; their ids. Skips what others have locked.

    since: look for none that expired before.
    """
    expired = connection.execute(_expire(tables), {"limit": limit, "since": since}).all()
    record_all(
        connection,
        tables,
        expired,
        event=EventType.EXPIRE,
        actor=actor,
        from_status=JobStatus.PENDING,
        to_status=JobStatus.DEAD,
        reason="expired",
    )
    return [row.id for row in expired]


@cache
def _expire(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    expired = (
        sa.select(jobs.c.id)
        .where(jobs.c.status == PENDING, jobs.c.expires_at <= now(), is_since(jobs.c.expires_at))
        .order_by(jobs.c.expires_at)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
        .with_for_update(skip_locked=True)
    )
    return (
        sa.update(jobs)
        .where(id_in(jobs.c.id, expired.scalar_subquery()))
        .values(
            status=DEAD,
            finished_at=now(),
            waits_for=sa.null(),
            prune_at=prune_at_of_dead(tables),
            error=json_of(sa.literal(json.dumps(EXPIRED.as_dict()), sa.Text())),
        )
        .returning(jobs.c.id, jobs.c.queue, jobs.c.task, jobs.c.attempt)
    )
