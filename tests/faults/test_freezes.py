"""Workers that are frozen past their lease and then go on, believing that they still hold their jobs."""

from __future__ import annotations

import pytest
from faults import ledger
from faults.campaign import runs_started, wait_for_status, wait_until_all_final
from faults.fleet import Fleet
from sqlalchemy.orm import Session
from support import scalar, wait_for

from pgqueue import PgQueue


@pytest.mark.parametrize("task", ["hold", "hold_async", "hold_plain"])
def test_a_worker_frozen_past_its_lease_changes_nothing_when_it_goes_on(
    pg_fleet: tuple[PgQueue, Fleet], task: str
) -> None:
    pgq, fleet = pg_fleet
    job = enqueue(pgq, task, until="done")
    frozen = fleet.worker()
    wait_for(lambda: runs_started(pgq) == 1, "the job to run")

    frozen.freeze()
    fleet.open_gate("done")
    second = fleet.worker()
    wait_for_status(pgq, job, "completed")
    row = pgq.get_job(job)
    frozen.thaw()
    frozen.wait_output("claim lost: job")
    frozen.terminate()

    assert frozen.exit_code() == 0
    after = pgq.get_job(job)
    assert (after.attempt, after.result, after.finished_at) == (2, 2, row.finished_at)
    assert f":{second.pid}:" in str(after.claimed_by)
    assert ledger.audit(pgq) == []


def test_a_worker_frozen_at_the_very_commit_loses_the_job_to_the_sweep_and_commits_nothing(
    pg_fleet: tuple[PgQueue, Fleet],
) -> None:
    pgq, fleet = pg_fleet
    job = enqueue(pgq, "freeze")
    frozen = fleet.worker()
    frozen.wait_frozen()

    fleet.worker()
    wait_for_status(pgq, job, "completed")
    frozen.thaw()
    frozen.wait_output("claim lost: job")
    frozen.terminate()

    assert frozen.exit_code() == 0
    assert pgq.get_job(job).result == 2
    assert ledger.audit(pgq) == []


def test_jobs_that_a_frozen_worker_had_not_started_run_elsewhere_and_are_not_started_when_it_goes_on(
    pg_fleet: tuple[PgQueue, Fleet],
) -> None:
    pgq, fleet = pg_fleet
    enqueue(pgq, "hold", until="done")
    frozen = fleet.worker(queues={"default": 1}, prefetch=20)
    wait_for(lambda: runs_started(pgq) == 1, "the first job to run")
    with Session(pgq.engine) as session, session.begin():
        pgq.tasks["charge"].enqueue_many(session, [{}] * 20)
    wait_for(lambda: running(pgq) == 21, "the frozen worker to claim ahead")

    frozen.freeze()
    fleet.open_gate("done")
    fleet.worker()
    wait_until_all_final(pgq)
    frozen.thaw()
    frozen.wait_output("claim lost: job")
    frozen.terminate()

    assert frozen.exit_code() == 0
    assert scalar(pgq.engine, "SELECT count(*) FROM runs WHERE pid = :pid", pid=frozen.pid) == 1
    assert ledger.audit(pgq) == []


def enqueue(pgq: PgQueue, task: str, **payload: str) -> int:
    with Session(pgq.engine) as session, session.begin():
        return pgq.tasks[task].enqueue(session, **payload).id


def running(pgq: PgQueue) -> int:
    count: int = scalar(pgq.engine, "SELECT count(*) FROM pgqueue.jobs WHERE status = 'running'")
    return count
