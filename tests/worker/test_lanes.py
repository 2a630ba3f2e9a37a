"""What a worker finds although its claims go on behind the last job claimed."""

from __future__ import annotations

import threading
import uuid

import pytest
from jobs import add
from sqlalchemy.orm import Session
from working import enqueue, wait_for_status, working

from pgqueue import PgQueue, Snooze, Task, current_job, store

LONG = 3_600.0


@pytest.fixture
def work(pg: PgQueue) -> Task[..., object]:
    @pg.task
    def work() -> None:
        pass

    return work


def test_a_job_that_was_committed_after_later_ones_were_claimed_is_found(pg: PgQueue, work: Task[..., object]) -> None:
    with working(pg, poll_interval=LONG), Session(pg.engine) as late:
        first = work.enqueue(late).id  # due from now on, for whoever will see it
        wait_for_status(pg, enqueue(work), "completed")

        late.commit()

        wait_for_status(pg, first, "completed")


def test_a_job_of_a_priority_that_was_never_used_before_is_found(pg: PgQueue, work: Task[..., object]) -> None:
    with working(pg, poll_interval=LONG):
        wait_for_status(pg, enqueue(work), "completed")

        jobs = [enqueue(work.using(priority=priority)) for priority in (5, -5)]  # type: ignore[arg-type]

        for job in jobs:
            wait_for_status(pg, job, "completed")


def test_a_job_that_comes_back_is_found_behind_those_claimed_meanwhile(pg: PgQueue) -> None:
    claimed_meanwhile = threading.Event()

    @pg.task
    def come_back() -> None:
        if current_job().attempt == 1:
            assert claimed_meanwhile.wait(30)
            raise Snooze(0)

    @pg.task
    def work() -> None:
        claimed_meanwhile.set()

    with working(pg, poll_interval=0.1):
        job = enqueue(come_back)
        enqueue(work)

        wait_for_status(pg, job, "completed")


def test_claims_behind_a_mark_read_no_entries_of_jobs_claimed_before_while_a_snapshot_keeps_them(pg: PgQueue) -> None:
    add(pg, 3_000)
    returned = "SELECT pg_stat_get_xact_tuples_returned('pgqueue.jobs_claim'::regclass)"
    read = []
    marks = None
    with pg.engine.connect().execution_options(isolation_level="REPEATABLE READ") as reader:
        reader.exec_driver_sql("SELECT count(*) FROM pgqueue.jobs")
        for _ in range(5):
            with pg.begin() as connection:
                before = connection.exec_driver_sql(returned).scalar_one()
                jobs = store.claim(
                    connection,
                    pg.tables,
                    queue="default",
                    worker="w",
                    token=uuid.uuid4(),
                    limit=500,
                    lease=60,
                    marks=marks,
                )
                read.append(connection.exec_driver_sql(returned).scalar_one() - before)
                marks = [(0, jobs[-1].run_at, jobs[-1].id)]

    assert read[1:] == [500] * 4
