"""Workers that are asked to stop: whole interpreters, from their start to their exit code."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import ledger
from faults.campaign import runs_started, statuses
from faults.fleet import Fleet, environment
from sqlalchemy.orm import Session
from support import Process, rows, scalar, wait_for

from pgqueue import PgQueue

HOLDERS = ("hold", "hold_async", "hold_plain")


@pytest.fixture
def start(pg_fleet: tuple[PgQueue, Fleet], tmp_path: Path) -> Iterator[object]:
    """Starts a worker as a program of its own."""
    started: list[Process] = []

    def start_worker(**config: object) -> Process:
        options = json.dumps(pg_fleet[1].options(**config))
        command = [sys.executable, "-m", "faults.app", "worker"]
        started.append(Process(command, cwd=tmp_path, **environment(FAULTS_OPTIONS=options)))
        return started[-1]

    yield start_worker
    for process in started:
        print(process.output())
        process.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_told_to_stop_finishes_its_running_jobs_and_claims_no_more(
    pg_fleet: tuple[PgQueue, Fleet], start, number: signal.Signals
) -> None:
    pgq, fleet = pg_fleet
    enqueue_holders(pgq)
    worker = start()
    wait_for(lambda: runs_started(pgq) == 3, "three jobs to run")

    worker.signal(number)
    wait_for(lambda: "waiting up to" in worker.output(), "the worker to wait for its jobs")
    with Session(pgq.engine) as session, session.begin():
        pgq.tasks["note"].enqueue_many(session, [{}] * 10)
    fleet.open_gate("done")

    assert worker.wait() == 0
    assert statuses(pgq) == {"completed": 3, "pending": 10}
    untouched = "SELECT count(*) FROM pgqueue.jobs WHERE status = 'pending' AND attempt = 0"
    assert scalar(pgq.engine, untouched) == 10
    assert pgq.workers() == []
    fleet.worker(drain=True).exit_code()
    assert ledger.audit(pgq) == []


def test_a_worker_under_load_that_is_told_to_stop_leaves_nothing_claimed_and_charges_nothing(
    pg_fleet: tuple[PgQueue, Fleet], start
) -> None:
    pgq, fleet = pg_fleet
    with Session(pgq.engine) as session, session.begin():
        pgq.tasks["note"].enqueue_many(session, [{}] * 1_000)
    worker = start()
    wait_for(lambda: runs_started(pgq) > 100, "the worker to be busy")

    worker.signal(signal.SIGTERM)

    assert worker.wait() == 0
    left = statuses(pgq)
    assert set(left) == {"completed", "pending"}
    assert scalar(pgq.engine, "SELECT sum(retries) FROM pgqueue.jobs") == 0
    fleet.worker(drain=True).exit_code()
    assert ledger.audit(pgq) == []


def test_jobs_that_outlast_the_shutdown_timeout_are_given_back_uncharged(
    pg_fleet: tuple[PgQueue, Fleet], start
) -> None:
    pgq, fleet = pg_fleet
    enqueue_holders(pgq)
    worker = start(shutdown_timeout=0.3, lease=30)
    wait_for(lambda: runs_started(pgq) == 3, "three jobs to run")

    worker.signal(signal.SIGTERM)

    assert worker.wait() == 0
    assert_released(pgq)
    fleet.open_gate("done")
    fleet.worker(drain=True).exit_code()
    assert ledger.audit(pgq) == []
    assert statuses(pgq) == {"completed": 3}


def test_a_second_signal_stops_a_worker_at_once_and_gives_its_jobs_back_uncharged(
    pg_fleet: tuple[PgQueue, Fleet], start
) -> None:
    pgq, fleet = pg_fleet
    enqueue_holders(pgq)
    worker = start(shutdown_timeout=1_000, lease=30)
    wait_for(lambda: runs_started(pgq) == 3, "three jobs to run")
    worker.signal(signal.SIGTERM)
    wait_for(lambda: "waiting up to" in worker.output(), "the worker to wait for its jobs")

    worker.signal(signal.SIGTERM)

    worker.wait(timeout=15)
    assert_released(pgq)
    fleet.open_gate("done")
    fleet.worker(drain=True).exit_code()
    assert ledger.audit(pgq) == []
    assert statuses(pgq) == {"completed": 3}


def test_a_signal_that_the_system_gives_to_another_thread_stops_the_worker_too(
    pg_fleet: tuple[PgQueue, Fleet], start
) -> None:
    pgq, _ = pg_fleet
    worker = start()

    with Session(pgq.engine) as session, session.begin():
        pgq.tasks["stop_worker"].enqueue(session)

    assert worker.wait(timeout=20) == 0
    assert ledger.audit(pgq) == []


def enqueue_holders(pgq: PgQueue) -> None:
    with Session(pgq.engine) as session, session.begin():
        for task in HOLDERS:
            pgq.tasks[task].enqueue(session, until="done")


def assert_released(pgq: PgQueue) -> None:
    jobs = rows(pgq.engine, "SELECT status, attempt, retries, run_at <= now() FROM pgqueue.jobs")
    assert jobs == [("pending", 1, 0, True)] * 3
    assert rows(pgq.engine, "SELECT DISTINCT event FROM pgqueue.job_events") == [("release",)]
    assert scalar(pgq.engine, "SELECT count(*) FROM effects") == 0
