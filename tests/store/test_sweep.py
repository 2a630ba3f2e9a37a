"""Sweeping: jobs whose lease ran out go back to pending with a retry charged, or are dead."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from jobs import (
    add,
    add_one,
    claim,
    claim_one,
    completed,
    events,
    everything,
    expire,
    finish,
    is_postgresql,
    retried,
    row,
    statuses,
    sweep,
)

from pgqueue import PgQueue


def test_an_expired_job_is_pending_again_with_a_retry_charged(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    job = claim_one(pgq, worker="worker-7")
    expire(pgq)

    swept = sweep(pgq)

    stored = row(pgq, job_id)
    assert (list(swept.returned), list(swept.dead), swept.count) == ([job_id], [], 1)
    assert (stored.status, stored.attempt, stored.retries) == ("pending", 1, 1)
    assert (stored.claim_token, stored.claim_expires_at, stored.finished_at) == (None, None, None)
    assert (stored.run_at, stored.claimed_by) == (job.run_at, "worker-7")
    assert stored.error == {
        "type": "WorkerLost",
        "message": "the worker did not finish within its lease",
        "traceback": "",
    }


def test_a_sweep_is_recorded_with_who_lost_the_job_and_who_took_it(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    claim(pgq, worker="worker-7")
    expire(pgq)

    sweep(pgq, actor="worker-8")

    (event,) = pgq.job_events(job_id)
    assert (event["event"], event["actor"], event["attempt"]) == ("sweep", "worker-8", 1)
    assert (event["from_status"], event["to_status"]) == ("running", "pending")
    assert event["reason"] == "the lease of worker-7 ran out"
    assert (event["queue"], event["task"]) == ("default", "work")


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_a_job_that_loses_its_worker_every_time_ends_dead(pgq: PgQueue, max_retries: int) -> None:
    job_id = add_one(pgq, max_retries=max_retries)

    for _ in range(max_retries):
        claim_one(pgq)
        expire(pgq)
        assert list(sweep(pgq).returned) == [job_id]
    claim_one(pgq)
    expire(pgq)
    last = sweep(pgq)

    stored = row(pgq, job_id)
    assert (list(last.returned), list(last.dead)) == ([], [job_id])
    assert (stored.status, stored.attempt, stored.retries) == ("dead", max_retries + 1, max_retries)
    assert stored.finished_at is not None
    assert claim(pgq) == []
    assert [(event["event"], event["to_status"]) for event in pgq.job_events(job_id)] == [
        *[("sweep", "pending")] * max_retries,
        ("sweep", "dead"),
    ]


def test_retries_of_failures_and_of_lost_workers_come_from_one_allowance(pgq: PgQueue) -> None:
    job_id = add_one(pgq, max_retries=1)
    finish(pgq, retried(claim_one(pgq)))
    claim_one(pgq)
    expire(pgq)

    assert list(sweep(pgq).dead) == [job_id]


def test_a_swept_job_can_be_claimed_at_once(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    claim(pgq)
    expire(pgq)
    sweep(pgq)

    again = claim_one(pgq)

    assert (again.id, again.attempt, again.retries) == (job_id, 2, 1)


def test_what_has_not_expired_is_left_alone(pgq: PgQueue) -> None:
    add(pgq, 4)
    add(pgq, delay=60)
    first, second, _ = claim(pgq, limit=3)
    finish(pgq, completed(first))
    expire(pgq, [second.id])
    sweep(pgq)
    before = everything(pgq)

    assert sweep(pgq).count == 0
    assert everything(pgq) == before


def test_all_queues_and_tasks_are_swept(pgq: PgQueue) -> None:
    ids = {add_one(pgq), add_one(pgq, queue="mail"), add_one(pgq, task="other", queue="images")}
    for queue in ("default", "mail", "images"):
        claim(pgq, queue=queue)
    pgq.pause("mail")
    expire(pgq)

    assert set(sweep(pgq).returned) == ids


def test_a_sweep_takes_no_more_than_its_limit_and_the_longest_expired_first(pgq: PgQueue) -> None:
    ids = add(pgq, 5)
    claim(pgq, limit=5)
    for position, job_id in enumerate(ids):
        expire(pgq, [job_id], seconds_ago=10 + 60 * (position % 3))

    swept = [set(sweep(pgq, limit=2).returned) for _ in range(4)]

    assert [len(batch) for batch in swept] == [2, 2, 1, 0]
    assert ids[2] in swept[0]
    assert swept[0] <= {ids[2], ids[1], ids[4]}
    assert set().union(*swept) == set(ids)


def test_jobs_with_and_without_retries_are_swept_together(pgq: PgQueue) -> None:
    some, none = add_one(pgq), add_one(pgq, max_retries=0)
    claim(pgq, limit=2)
    expire(pgq)

    swept = sweep(pgq)

    assert (list(swept.returned), list(swept.dead)) == ([some], [none])
    assert statuses(pgq) == {some: "pending", none: "dead"}


def test_a_sweep_passes_over_rows_that_somebody_has_locked(pg: PgQueue) -> None:
    ids = add(pg, 3)
    claim(pg, limit=3)
    expire(pg)

    with pg.engine.connect() as holder:
        holder.execute(sa.select(pg.tables.jobs.c.id).where(pg.tables.jobs.c.id == ids[1]).with_for_update())
        first = sweep(pg)
    second = sweep(pg)

    assert (set(first.returned), set(second.returned)) == ({ids[0], ids[2]}, {ids[1]})


def test_a_job_that_was_finished_meanwhile_is_not_swept(pg: PgQueue) -> None:
    """The finish commits while the sweep runs: whether locked or finished, the job is none of its business."""
    add(pg)
    job = claim_one(pg)
    expire(pg)

    with pg.engine.connect() as worker:
        pg.ack(job, session=worker)
        during = sweep(pg)
        worker.commit()
    after = sweep(pg)

    assert (during.count, after.count) == (0, 0)
    assert statuses(pg)[job.id] == "completed"
    assert events(pg, job.id) == []


def test_each_expired_job_is_swept_once_by_many_sweepers(pgq: PgQueue) -> None:
    sweepers, count = (12, 600) if is_postgresql(pgq) else (6, 200)
    ids = add(pgq, count)
    claim(pgq, limit=count)
    expire(pgq)
    ready = threading.Barrier(sweepers)

    def sweep_all(number: int) -> list[int]:
        taken: list[int] = []
        ready.wait()
        while (swept := sweep(pgq, limit=7, actor=f"sweeper-{number}")).count:
            taken.extend(swept.returned)
        return taken

    with ThreadPoolExecutor(sweepers) as threads:
        taken = [job_id for result in threads.map(sweep_all, range(sweepers)) for job_id in result]
    taken.extend(sweep(pgq, limit=count).returned)  # what was locked by another one when a sweeper saw no more

    assert sorted(taken) == ids
    jobs, job_events = pgq.tables.jobs, pgq.tables.job_events
    with pgq.begin() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(job_events)) == count
        assert set(connection.scalars(sa.select(jobs.c.retries))) == {1}
