"""Connections that break: ended by the server, cut at any message, and above all cut between a COMMIT and its
answer, when the client cannot know what happened."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from faults import ledger
from faults.campaign import enqueue_load, statuses, unfinished, wait_until_all_final, wait_until_completed
from faults.fleet import Fleet
from faults.proxy import Fault, Message, proxy
from sqlalchemy.orm import Session
from support import rows, scalar, wait_for

from pgqueue import PgQueue

LONG_LEASE = 1_000.0

RELEASED = "SELECT count(*) FROM pgqueue.job_events WHERE event = 'release'"


def test_ending_every_connection_of_the_workers_again_and_again_loses_nothing_and_repeats_no_effect(
    pg_fleet: tuple[PgQueue, Fleet],
) -> None:
    pgq, fleet = pg_fleet
    ids = enqueue_load(pgq, 600)
    workers = fleet.workers(3)
    ended = []

    for strike in range(1, 13):
        wait_until_completed(pgq, 40 * strike, f"progress before strike {strike}")
        wait_for(lambda: scalar(pgq.engine, CONNECTIONS_OF_WORKERS) >= len(workers), "workers to be connected again")
        ended.append(scalar(pgq.engine, END_CONNECTIONS_OF_WORKERS))
    wait_until_all_final(pgq)

    assert min(ended) >= len(workers)
    assert sum(ended) >= 5 * len(workers) * len(ended), "claimer, finisher, heartbeat, sweeper and listener"
    assert statuses(pgq) == {"completed": 600}
    assert ledger.audit(pgq, acknowledged=ids) == []
    assert all(worker.alive for worker in workers)


CONNECTIONS_OF_WORKERS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'pgqueue'
"""

END_CONNECTIONS_OF_WORKERS = CONNECTIONS_OF_WORKERS.replace("count(*)", "count(pg_terminate_backend(pid))")


@pytest.mark.parametrize("fault", [Fault.DROP_ANSWER, Fault.CUT])
def test_when_the_commit_of_a_transactional_job_is_cut_off_its_effect_still_happens_exactly_once(
    pg_fleet: tuple[PgQueue, Fleet], fault: Fault
) -> None:
    pgq, fleet = pg_fleet
    ids = enqueue_load(pgq, 60, seconds=0.0)
    commits = 0

    def cut_every_third_commit_of_an_effect(message: Message) -> Fault:
        nonlocal commits
        if not message.commits("INSERT INTO effects"):
            return Fault.NONE
        commits += 1
        return fault if commits % 3 == 0 else Fault.NONE

    with proxy(pgq.url.render_as_string(hide_password=False), cut_every_third_commit_of_an_effect) as between:
        worker = fleet.worker(url=between.url, lease=LONG_LEASE)
        wait_until_all_final(pgq)
        worker.terminate()
        code = worker.exit_code()

    charged = scalar(pgq.engine, "SELECT sum(retries) FROM pgqueue.jobs")
    assert code == 0
    assert between.faults >= 20
    assert statuses(pgq) == {"completed": 60}
    assert ledger.audit(pgq, acknowledged=ids) == []
    assert charged == (0 if fault is Fault.DROP_ANSWER else between.faults)


def test_jobs_of_a_claim_whose_answer_was_lost_are_released_and_run_soon_with_no_retry_charged(
    pg_fleet: tuple[PgQueue, Fleet],
) -> None:
    pgq, fleet = pg_fleet
    ids = enqueue_load(pgq, 40, seconds=0.0)

    def drop_the_answers_to_the_first_claims(message: Message) -> Fault:
        # What a lost claim held is released before the next claim is made.
        if message.commits("SET status='running'") and scalar(pgq.engine, RELEASED) < 12:
            return Fault.DROP_ANSWER
        return Fault.NONE

    with proxy(pgq.url.render_as_string(hide_password=False), drop_the_answers_to_the_first_claims) as between:
        worker = fleet.worker(url=between.url, lease=LONG_LEASE)
        wait_for(lambda: unfinished(pgq) == 0, "all jobs to be final", timeout=20)
        worker.terminate()
        code = worker.exit_code()

    events = "SELECT DISTINCT event, reason FROM pgqueue.job_events"
    assert code == 0
    assert rows(pgq.engine, events) == [("release", "its worker did not receive the claim, or had stopped")]
    assert scalar(pgq.engine, RELEASED) == 12, "three claims of four slots"
    assert scalar(pgq.engine, "SELECT sum(retries) FROM pgqueue.jobs") == 0
    assert ledger.audit(pgq, acknowledged=ids) == []


def test_an_end_whose_commit_was_cut_off_is_written_again_and_changes_nothing_the_second_time(
    pg_fleet: tuple[PgQueue, Fleet],
) -> None:
    pgq, fleet = pg_fleet
    with Session(pgq.engine) as session, session.begin():
        pgq.tasks["note"].enqueue_many(session, [{}] * 60)
    ends = 0

    def cut_every_second_commit_of_ends(message: Message) -> Fault:
        nonlocal ends
        if not message.commits("SET status='completed'"):
            return Fault.NONE
        ends += 1
        return {0: Fault.DROP_ANSWER, 2: Fault.CUT}.get(ends % 4, Fault.NONE)

    with proxy(pgq.url.render_as_string(hide_password=False), cut_every_second_commit_of_ends) as between:
        worker = fleet.worker(url=between.url, lease=LONG_LEASE, prefetch=0)
        wait_until_all_final(pgq)
        worker.terminate()
        code = worker.exit_code()

    assert code == 0
    assert between.faults >= 2
    assert statuses(pgq) == {"completed": 60}
    assert ledger.audit(pgq) == []
    assert scalar(pgq.engine, "SELECT count(*) FROM pgqueue.job_events") == 0


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.DROP_ANSWER])
def test_connections_cut_at_any_message_lose_nothing_repeat_no_effect_and_leave_nothing_stuck(
    pg_fleet: tuple[PgQueue, Fleet], fault: Fault
) -> None:
    pgq, fleet = pg_fleet
    ids = enqueue_load(pgq, 100, seconds=0.0)
    cut_at = cuts(random.Random(9))

    def cut_now_and_then(message: Message) -> Fault:
        return fault if cut_at(message.number) else Fault.NONE

    with proxy(pgq.url.render_as_string(hide_password=False), cut_now_and_then) as between:
        worker = fleet.worker(url=between.url)
        wait_until_all_final(pgq)
        worker.terminate()
        code = worker.exit_code()

    assert code == 0
    assert between.faults >= 20
    assert statuses(pgq) == {"completed": 100}
    assert ledger.audit(pgq, acknowledged=ids) == []


def cuts(chance: random.Random) -> Callable[[int], bool]:
    """Whether to cut at the message of a number: once in about a hundred, in no regular pattern."""
    following = 100

    def due(number: int) -> bool:
        nonlocal following
        if number < following:
            return False
        following = number + chance.randrange(50, 150)
        return True

    return due
