"""Processes that are killed: workers in the middle of jobs, jobs that kill their worker, enqueuers."""

from __future__ import annotations

import random

from faults import ledger
from faults.campaign import (
    enqueue_load,
    freeze_a_busy_one,
    statuses,
    unfinished,
    wait_until_all_final,
    wait_until_completed,
)
from faults.fleet import Fleet
from sqlalchemy.orm import Session
from support import rows, scalar, wait_for

from pgqueue import PgQueue

JOBS = 800
KILLS = 50


def test_fifty_workers_killed_in_the_middle_of_their_jobs_lose_nothing_and_repeat_no_effect(
    pg_fleet: tuple[PgQueue, Fleet],
) -> None:
    pgq, fleet = pg_fleet
    ids = enqueue_load(pgq, JOBS)
    workers = fleet.workers(5)
    chance = random.Random(50)

    def feed() -> None:
        """However long a kill takes, there are jobs to be killed in."""
        if unfinished(pgq) < 100:
            ids.extend(enqueue_load(pgq, 100))

    for kill in range(1, KILLS + 1):
        wait_until_completed(pgq, 12 * kill, f"progress before kill {kill}")
        victim = freeze_a_busy_one(pgq, workers, chance, feed=feed)
        victim.kill()
        workers.remove(victim)
        workers.append(fleet.worker())
    wait_until_all_final(pgq)

    assert ledger.audit(pgq, acknowledged=ids) == []
    assert statuses(pgq) == {"completed": len(ids)}
    swept = rows(pgq.engine, "SELECT DISTINCT reason FROM pgqueue.job_events WHERE event = 'sweep'")
    assert len(swept) >= KILLS, "each of the killed workers held jobs"


def test_a_job_that_kills_its_worker_every_time_ends_up_dead_and_those_beside_it_complete(
    pg_fleet: tuple[PgQueue, Fleet],
) -> None:
    pgq, fleet = pg_fleet
    with Session(pgq.engine) as session, session.begin():
        poison = pgq.tasks["poison"].enqueue(session).id
        # Those beside it are charged as well when their worker dies; the default of three retries outlasts its two.
        innocent = pgq.tasks["charge"].using(max_retries=3).enqueue_many(session, [{}] * 40)

    killed = 0
    while pgq.get_job(poison).status != "dead":
        worker = fleet.worker(queues={"default": 1}, prefetch=10)
        wait_for(
            lambda worker=worker: not worker.alive or pgq.get_job(poison).status == "dead", "the job to kill its worker"
        )
        killed += not worker.alive
    fleet.worker()
    wait_until_all_final(pgq)

    job = pgq.get_job(poison)
    assert (killed, job.attempt, job.retries, job.error["type"]) == (3, 3, 2, "WorkerLost")
    assert {pgq.get_job(other).status for other in innocent} == {"completed"}
    assert ledger.audit(pgq) == []


def test_after_enqueuers_were_killed_at_random_a_job_exists_exactly_if_its_business_row_does(
    pg_fleet: tuple[PgQueue, Fleet],
) -> None:
    pgq, fleet = pg_fleet
    workers = fleet.workers(1)
    chance = random.Random(8)

    for _ in range(12):
        enqueuers = [fleet.enqueuer() for _ in range(2)]
        goal = placed(pgq) + chance.randrange(1, 12)
        wait_for(lambda goal=goal: placed(pgq) >= goal, "new orders")
        for enqueuer in enqueuers:
            enqueuer.kill()
    wait_until_all_final(pgq)

    assert ledger.audit_orders(pgq) == []
    assert ledger.audit(pgq) == []
    interrupted = scalar(pgq.engine, "SELECT last_value FROM orders_id_seq") - placed(pgq)
    assert interrupted >= 6, "kills in the middle of a transaction"
    assert workers[0].alive


def placed(pgq: PgQueue) -> int:
    count: int = scalar(pgq.engine, "SELECT count(*) FROM orders")
    return count
