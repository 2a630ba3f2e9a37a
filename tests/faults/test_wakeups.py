"""Notifications that do not arrive: delivery rests on polling."""

from __future__ import annotations

import threading

import sqlalchemy as sa
from faults import ledger
from faults.campaign import wait_until_all_final
from faults.fleet import Fleet, Member
from sqlalchemy.orm import Session
from support import execute, rows, scalar, wait_for

from pgqueue import PgQueue

#: Long enough to tell a poll from a wake-up, and what a busy machine may add to either.
POLL_SECONDS, SLACK_SECONDS = 1.0, 1.5

NEVER = 1_000.0


def test_with_notifications_a_job_need_not_wait_for_the_poll(pg_fleet: tuple[PgQueue, Fleet]) -> None:
    pgq, fleet = pg_fleet
    start_idle(pgq, fleet, poll_interval=NEVER)

    enqueue_one_by_one(pgq, 3)

    assert max(pick_up_delays(pgq)) < SLACK_SECONDS
    assert ledger.audit(pgq) == []


def test_a_worker_that_does_not_listen_picks_jobs_up_within_its_poll_interval(
    pg_fleet: tuple[PgQueue, Fleet],
) -> None:
    pgq, fleet = pg_fleet
    start_idle(pgq, fleet, poll_interval=POLL_SECONDS, listen=False)

    enqueue_one_by_one(pgq, 3)

    assert max(pick_up_delays(pgq)) < POLL_SECONDS + SLACK_SECONDS
    assert listener(pgq) is None
    assert ledger.audit(pgq) == []


def test_a_worker_whose_listener_is_cut_off_again_and_again_picks_jobs_up_within_its_poll_interval(
    pg_fleet: tuple[PgQueue, Fleet],
) -> None:
    pgq, fleet = pg_fleet
    start_idle(pgq, fleet, poll_interval=POLL_SECONDS)
    over = threading.Event()
    cut = 0

    def cut_off() -> None:
        nonlocal cut
        while not over.wait(0.01):
            cut += len(rows(pgq.engine, TERMINATE_LISTENERS))

    cutter = threading.Thread(target=cut_off)
    cutter.start()
    try:
        wait_for(lambda: cut > 0, "the listener to be cut off")
        enqueue_one_by_one(pgq, 3)
    finally:
        over.set()
        cutter.join()

    assert max(pick_up_delays(pgq)) < POLL_SECONDS + SLACK_SECONDS
    assert cut >= 2, "the listener came back and was cut off again"
    assert ledger.audit(pgq) == []


def test_a_listener_that_was_cut_off_comes_back_by_itself(pg_fleet: tuple[PgQueue, Fleet]) -> None:
    pgq, fleet = pg_fleet
    start_idle(pgq, fleet, poll_interval=NEVER)
    before = listener(pgq)

    execute(pgq.engine, TERMINATE_LISTENERS)
    wait_for(lambda: listener(pgq) not in (None, before), "the listener to be back")
    enqueue_one_by_one(pgq, 3)

    assert max(pick_up_delays(pgq)) < SLACK_SECONDS
    assert ledger.audit(pgq) == []


def test_a_disposed_queue_that_has_sent_wake_ups_leaves_no_connection_open(pg_url: str) -> None:
    pgq = PgQueue(pg_url)
    pgq.external_task("note")
    with Session(pgq.engine) as session, session.begin():
        pgq.tasks["note"].enqueue(session)
    watcher = sa.create_engine(pg_url, poolclass=sa.NullPool)
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    wait_for(lambda: scalar(watcher, others + " AND query LIKE 'NOTIFY%'") == 1, "the wake-up")

    pgq.dispose()

    wait_for(lambda: scalar(watcher, others) == 0, "the connections to be closed", timeout=5)


TERMINATE_LISTENERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"
)


def listener(pgq: PgQueue) -> int | None:
    """The server process that a worker listens on."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"
    pid: int | None = scalar(pgq.engine, query)
    return pid


def start_idle(pgq: PgQueue, fleet: Fleet, **config: object) -> Member:
    """A worker that has looked once and found nothing."""
    worker = fleet.worker(**config)
    enqueue_one_by_one(pgq, 1)
    execute(pgq.engine, "TRUNCATE pgqueue.jobs, runs")
    return worker


def enqueue_one_by_one(pgq: PgQueue, count: int) -> None:
    """Each job when the one before is done, so that each has to be picked up by itself."""
    for _ in range(count):
        with Session(pgq.engine) as session, session.begin():
            pgq.tasks["note"].enqueue(session)
        wait_until_all_final(pgq)


def pick_up_delays(pgq: PgQueue) -> list[float]:
    """Seconds from the enqueue to the claim, by the database's clock."""
    query = "SELECT extract(epoch FROM claimed_at - created_at) FROM pgqueue.jobs"
    return [float(row[0]) for row in rows(pgq.engine, query)]
