"""Claiming: the right jobs, in the right order, each to one claimer."""

from __future__ import annotations

import itertools
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from jobs import (
    add,
    add_one,
    claim,
    claim_one,
    events,
    everything,
    external,
    is_postgresql,
    make_due,
    row,
    seconds_of_lease,
    statuses,
)

from pgqueue import PgQueue, store

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_a_claim_takes_a_due_job_and_says_all_that_an_attempt_needs(pgq: PgQueue) -> None:
    job_id = add_one(pgq, priority=4, max_retries=2, metadata={"trace": "t"})

    job = claim_one(pgq, worker="worker-7")

    stored = row(pgq, job_id)
    assert (job.id, job.queue, job.task, job.payload, job.priority) == (job_id, "default", "work", {"n": 0}, 4)
    assert (job.attempt, job.retries, job.max_retries, job.metadata) == (1, 0, 2, {"trace": "t"})
    assert (job.run_at, job.created_at) == (stored.run_at, stored.created_at)
    assert (job.claimed_by, job.claim_token) == ("worker-7", stored.claim_token)


def test_a_claimed_row_shows_who_holds_it_and_until_when(pgq: PgQueue) -> None:
    job_id = add_one(pgq)

    claim(pgq, worker="worker-7", lease=30)

    stored = row(pgq, job_id)
    assert (stored.status, stored.claimed_by, stored.attempt) == ("running", "worker-7", 1)
    assert 25 < seconds_of_lease(pgq, job_id) <= 30
    assert stored.claimed_at is not None
    assert stored.finished_at is None


def test_the_happy_path_of_a_claim_leaves_no_event(pgq: PgQueue) -> None:
    job_id = add_one(pgq)

    claim(pgq)

    assert events(pgq, job_id) == []


def test_every_claim_has_a_token_of_its_own(pgq: PgQueue) -> None:
    add(pgq, 2)

    first, second = claim_one(pgq), claim_one(pgq)

    assert first.claim_token != second.claim_token
    assert first.fence != second.fence


def test_nothing_is_claimed_from_an_empty_queue(pgq: PgQueue) -> None:
    assert claim(pgq, limit=100) == []


@pytest.mark.parametrize("status", ["running", "completed", "dead", "cancelled"])
def test_only_pending_jobs_are_claimed(pgq: PgQueue, status: str) -> None:
    add(pgq)
    (job,) = claim(pgq)
    if status == "completed":
        pgq.ack(job)
    elif status == "dead":
        pgq.nack(job, dead=True)
    elif status == "cancelled":
        pgq.cancel(job.id)
    before = everything(pgq)

    assert claim(pgq, limit=10) == []
    assert everything(pgq) == before


# Limit and order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "claimed"), [(1, 1), (3, 3), (5, 5), (6, 5), (1_000, 5)])
def test_no_more_jobs_are_claimed_than_the_limit(pgq: PgQueue, limit: int, claimed: int) -> None:
    add(pgq, 5)

    jobs = claim(pgq, limit=limit)

    assert len(jobs) == claimed
    assert list(statuses(pgq).values()).count("running") == claimed


def test_jobs_come_by_priority_then_due_time_then_id(pgq: PgQueue) -> None:
    moments = [datetime(2020, 1, 1, tzinfo=UTC) + timedelta(hours=hours) for hours in (0, 1, 2)]
    wanted = list(itertools.product([3, 0, -2], moments, range(2)))
    shuffled = [wanted[(7 * position) % len(wanted)] for position in range(len(wanted))]
    made = [((-priority, at), add_one(pgq, priority=priority, at=at)) for priority, at, _ in shuffled]

    together = [job.id for job in claim(pgq, limit=len(made) - 5)]
    one_by_one = [claim_one(pgq).id for _ in range(5)]

    assert together + one_by_one == [job_id for _, job_id in sorted(made)]


def test_a_limit_takes_from_several_priorities_when_the_highest_has_too_few(pgq: PgQueue) -> None:
    low, high = add(pgq, 3, priority=-5), add(pgq, 2, priority=5)

    jobs = claim(pgq, limit=4)

    assert [job.id for job in jobs] == [*high, *low[:2]]


def test_many_priorities_are_each_a_lane(pgq: PgQueue) -> None:
    ids = {priority: add_one(pgq, priority=priority) for priority in range(-60, 60, 3)}

    jobs = claim(pgq, limit=1_000)

    assert [job.id for job in jobs] == [ids[priority] for priority in sorted(ids, reverse=True)]


def test_the_lanes_of_a_queue_are_the_priorities_of_its_pending_jobs(pg: PgQueue) -> None:
    for priority in (0, 7, -7, 7):
        add_one(pg, priority=priority)
    add_one(pg, priority=3, queue="other")
    add_one(pg, priority=5)
    claim_one(pg)  # of the two with 7
    claim_one(pg)
    claim_one(pg)  # the one with 5

    with pg.begin() as connection:
        fronts, limited = store.lanes(connection, pg.tables, queue="default")

    assert ([priority for priority, _, _ in fronts], limited) == ([0, -7], False)


def test_a_lane_begins_right_before_its_first_pending_job_if_that_is_due(pg: PgQueue) -> None:
    add_one(pg, at=NOON)
    add_one(pg, at=NOON)
    later = add_one(pg, at=NOON + timedelta(seconds=1))
    earlier = add_one(pg, at=NOON)
    add_one(pg, at=datetime.now(UTC) + timedelta(hours=1), priority=5)
    claim(pg, limit=2)

    with pg.begin() as connection:
        fronts, _ = store.lanes(connection, pg.tables, queue="default")

    assert fronts == [(5, None, 0), (0, NOON, earlier - 1)]
    assert [job.id for job in claim(pg, limit=10, marks=fronts)] == [earlier, later]


def test_a_claim_with_marks_takes_what_lies_behind_them_in_these_lanes(pg: PgQueue) -> None:
    early, late = NOON, NOON + timedelta(microseconds=1)
    add_one(pg, at=early, priority=9)
    first, second = add_one(pg, at=early), add_one(pg, at=early)
    third = add_one(pg, at=late)
    low = add_one(pg, at=early, priority=-9)

    jobs = claim(pg, limit=10, marks=[(0, early, first), (-9, None, 0)])

    assert [job.id for job in jobs] == [second, third, low]


def test_a_claim_without_lanes_takes_nothing(pg: PgQueue) -> None:
    add_one(pg)

    assert claim(pg, marks=[]) == []


# Due -------------------------------------------------------------------------------------------------------


def test_a_job_that_is_due_now_is_claimed_in_the_transaction_that_enqueued_it(pgq: PgQueue) -> None:
    """`run_at` and the claim's `now()` are then the same moment."""
    with pgq.begin() as connection:
        job_id = external(pgq).enqueue(connection).id

        jobs = store.claim(connection, pgq.tables, queue="default", worker="w", token=uuid.uuid4(), limit=1, lease=60)

    assert [job.id for job in jobs] == [job_id]


def test_a_job_of_the_future_is_not_claimed_until_it_is_due(pgq: PgQueue) -> None:
    job_id = add_one(pgq, delay=3600)
    assert claim(pgq, limit=10) == []

    make_due(pgq)

    assert claim_one(pgq).id == job_id


def test_a_job_of_the_future_does_not_hide_due_ones_however_high_its_priority(pgq: PgQueue) -> None:
    add(pgq, 5, delay=3600, priority=9)
    due = add_one(pgq, priority=1)

    assert claim_one(pgq).id == due


# Queues, tasks, pauses -------------------------------------------------------------------------------------


def test_a_claim_takes_from_one_queue_only(pgq: PgQueue) -> None:
    add(pgq, 2, queue="mail", priority=9)
    own = add(pgq, 2)

    assert [job.id for job in claim(pgq, limit=10)] == own


def test_a_claim_takes_only_jobs_of_tasks_that_the_worker_knows(pgq: PgQueue) -> None:
    add(pgq, 3, task="unknown", priority=9)
    known = [add_one(pgq, task="known"), add_one(pgq, task="other")]

    jobs = claim(pgq, limit=10, tasks=["other", "known", "never used", 'it\'s "odd", {}'])

    assert [job.id for job in jobs] == known
    assert list(statuses(pgq).values()).count("pending") == 3


def test_a_worker_that_knows_no_task_claims_nothing(pgq: PgQueue) -> None:
    add(pgq)

    assert claim(pgq, limit=10, tasks=[]) == []


def test_nothing_is_claimed_from_a_paused_queue(pgq: PgQueue) -> None:
    add(pgq, 2)
    other = add_one(pgq, queue="mail")
    pgq.pause("default")

    assert claim(pgq, limit=10) == []
    assert claim_one(pgq, queue="mail").id == other


def test_a_pause_ends_by_itself(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    pgq.pause("default", duration=3600)
    assert claim(pgq) == []

    with pgq.begin() as connection:
        connection.execute(sa.update(pgq.tables.queues).values(paused_until=datetime(2020, 1, 1, tzinfo=UTC)))

    assert claim_one(pgq).id == job_id


# Several claimers ------------------------------------------------------------------------------------------


def test_each_job_goes_to_exactly_one_of_many_concurrent_claimers(pgq: PgQueue) -> None:
    claimers, count = (16, 2_000) if is_postgresql(pgq) else (8, 400)
    half = add(pgq, count // 2), add(pgq, count // 2, priority=1)
    ready = threading.Barrier(claimers)

    def claim_all(number: int) -> list[tuple[int, uuid.UUID]]:
        taken: list[tuple[int, uuid.UUID]] = []
        ready.wait()
        while jobs := claim(pgq, limit=1 + number % 7, worker=f"worker-{number}"):
            taken.extend((job.id, job.claim_token) for job in jobs)
        return taken

    with ThreadPoolExecutor(claimers) as threads:
        taken = [job for result in threads.map(claim_all, range(claimers)) for job in result]

    assert sorted(job_id for job_id, _ in taken) == sorted([*half[0], *half[1]])
    jobs = pgq.tables.jobs
    with pgq.begin() as connection:
        stored = connection.execute(sa.select(jobs.c.id, jobs.c.claim_token, jobs.c.attempt)).all()
    assert {(found.id, found.claim_token) for found in stored} == set(taken)
    assert {found.attempt for found in stored} == {1}


def test_a_claim_passes_over_rows_that_somebody_has_locked(pg: PgQueue) -> None:
    first, second, third = add(pg, 3)
    high = add_one(pg, priority=5)

    with pg.engine.connect() as holder:
        holder.execute(sa.select(pg.tables.jobs.c.id).where(pg.tables.jobs.c.id.in_([first, high])).with_for_update())
        jobs = claim(pg, limit=10)

    assert [job.id for job in jobs] == [second, third]


def test_a_claim_does_not_wait_for_a_job_that_another_transaction_is_claiming(pg: PgQueue) -> None:
    first, second = add(pg, 2)

    with pg.engine.connect() as rival:
        taken = store.claim(rival, pg.tables, queue="default", worker="rival", token=uuid.uuid4(), limit=1, lease=60)
        own = claim(pg, limit=10)
        rival.rollback()

    assert ([job.id for job in taken], [job.id for job in own]) == ([first], [second])
    assert claim_one(pg).id == first


PLANNER_SWITCHES = [
    "enable_seqscan",
    "enable_indexscan",
    "enable_indexonlyscan",
    "enable_bitmapscan",
    "enable_nestloop",
    "enable_hashjoin",
    "enable_mergejoin",
    "enable_sort",
]


def test_limit_and_order_hold_under_every_plan(pg: PgQueue) -> None:
    """With `IN (SELECT … LIMIT n)` some of these plans run the subquery again for each row and take more than n."""
    with pg.begin() as connection:
        work = external(pg)
        for priority in (0, 5, -5):
            work.using(priority=priority).enqueue_many(connection, [{"n": n} for n in range(20)])
        work.using(priority=7, delay=3600).enqueue_many(connection, [{"n": n} for n in range(20)])
    with pg.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(sa.text("ANALYZE pgqueue.jobs"))
    expected = [job.id for job in reversed(pg.list_jobs(limit=1_000)) if job.priority == 5]
    expected += [job.id for job in reversed(pg.list_jobs(limit=1_000)) if job.priority == 0]

    wrong = []
    with pg.engine.connect() as connection:
        connection.execute(sa.text("SET jit = off"))  # what is switched off counts as so dear that all is compiled
        connection.commit()
        for chosen in itertools.product(["on", "off"], repeat=len(PLANNER_SWITCHES)):
            switches = dict(zip(PLANNER_SWITCHES, chosen, strict=True))
            connection.execute(sa.select(*(sa.func.set_config(name, value, True) for name, value in switches.items())))
            jobs = store.claim(
                connection, pg.tables, queue="default", worker="w", token=uuid.uuid4(), limit=25, lease=60
            )
            connection.rollback()
            if [job.id for job in jobs] != expected[:25]:
                wrong.append(switches)

    assert wrong == []
