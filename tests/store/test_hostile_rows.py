"""Rows that only plain SQL can write must not stop the jobs beside them."""

from __future__ import annotations

import jobs
import pytest
import sqlalchemy as sa

from pgqueue import PgQueue


@pytest.mark.parametrize("spare", [0, 1])
def test_a_job_at_its_last_number_of_attempts_does_not_stop_the_queue(pgq: PgQueue, spare: int) -> None:
    ids = jobs.add(pgq, 3)
    table = pgq.tables.jobs
    with pgq.begin() as connection:
        connection.execute(sa.update(table).where(table.c.id == ids[1]).values(attempt=2**31 - 1 - spare))

    claimed = jobs.claim(pgq, limit=3)

    assert [job.id for job in claimed] == ids
    assert [job.attempt for job in claimed] == [1, 2**31 - 1, 1]
    assert jobs.finish(pgq, *map(jobs.completed, claimed)) == set(ids)
