"""Two sweeps, a late finish and others at one job at once, in every order: no deadlock, one end, one event.

Each operation is taken one step at a time: its statement, then its commit. See interleaving.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from interleaving import Work, orders, play, unexpected
from jobs import add, claim, claim_one, completed, died, everything, expire, retried, row

from pgqueue import ClaimedJob, IllegalTransition, PgQueue, operations, store
from pgqueue.job import Transition


def sweeps(pg: PgQueue, actor: str) -> Work:
    return lambda connection: store.sweep(connection, pg.tables, limit=100, actor=actor)


def finishes(pg: PgQueue, *jobs: ClaimedJob, how: Callable[[ClaimedJob], Any] = completed) -> Work:
    ends = [how(job) for job in jobs]
    return lambda connection: store.finish(connection, pg.tables, ends, actor="worker-1")


def extends(pg: PgQueue, *jobs: ClaimedJob) -> Work:
    claims = [(job.id, job.claim_token) for job in jobs]
    return lambda connection: store.extend(connection, pg.tables, claims, lease=600)


def cancels(pg: PgQueue, job: ClaimedJob, *, force: bool = True) -> Work:
    return lambda connection: operations.cancel_job(
        connection, pg.tables, job.id, actor="operator", reason=None, force=force
    )


def claims(pg: PgQueue) -> Work:
    return lambda connection: store.claim(
        connection, pg.tables, queue="default", worker="worker-2", token=uuid.uuid4(), limit=100, lease=60
    )


@pytest.mark.parametrize("how", [completed, retried, died])
def test_two_sweeps_and_a_late_finish_end_a_job_once_in_every_order(
    pg: PgQueue, how: Callable[[ClaimedJob], Any]
) -> None:
    for order in orders(3):
        if order.index((1, "run")) < order.index((0, "run")):
            continue  # the two sweeps are alike
        (job_id,) = add(pg, max_retries=0)
        job = claim_one(pg)
        expire(pg)

        first, second, written = play(
            pg, [sweeps(pg, "sweeper-1"), sweeps(pg, "sweeper-2"), finishes(pg, job, how=how)], order
        )

        assert unexpected([first, second, written]) == [], order
        ends = [*first.dead, *second.dead, *written]
        assert ends == [job_id], order
        stored = row(pg, job_id)
        if written:
            assert stored.status == how(job).status, order
            expected = [] if how is completed else [how(job).event]
        else:
            assert stored.status == "dead", order
            expected = ["sweep"]
        assert [event["event"] for event in pg.job_events(job_id)] == expected, order
        clear(pg)


def clear(pg: PgQueue) -> None:
    with pg.begin() as connection:
        connection.execute(sa.delete(pg.tables.jobs))


def test_a_sweep_a_finish_and_a_heartbeat_agree_in_every_order(pg: PgQueue) -> None:
    for order in orders(3):
        ids = add(pg, 3)
        jobs = claim(pg, limit=3)
        expire(pg)

        swept, written, held = play(pg, [sweeps(pg, "s"), finishes(pg, *jobs[:2]), extends(pg, *jobs[1:])], order)

        assert unexpected([swept, written, held]) == [], order
        assert not set(swept.returned) & written, order
        for job in jobs:
            stored = row(pg, job.id)
            if job.id in written:
                assert (stored.status, stored.retries) == ("completed", 0), order
            elif job.id in swept.returned:
                assert (stored.status, stored.retries) == ("pending", 1), order
            else:
                assert (stored.status, stored.claim_token) == ("running", job.claim_token), order
                assert job.id in held, order
        assert len(ids) == 3
        clear(pg)


def test_a_cancel_a_sweep_and_a_finish_end_a_job_once_in_every_order(pg: PgQueue) -> None:
    for order in orders(3):
        (job_id,) = add(pg, max_retries=0)
        job = claim_one(pg)
        expire(pg)

        cancelled, swept, written = play(pg, [cancels(pg, job), sweeps(pg, "s"), finishes(pg, job, how=died)], order)

        assert unexpected([cancelled, swept, written]) == [], order
        ends = [cancelled == "cancelled", bool(swept.dead), bool(written)]
        assert ends.count(True) == 1, order
        (event,) = pg.job_events(job_id)
        assert event["event"] == ["cancel", "sweep", "dead"][ends.index(True)], order
        clear(pg)


@pytest.mark.parametrize("how", [completed, retried, died])
def test_a_request_to_stop_a_sweep_and_a_finish_end_a_job_once_in_every_order(
    pg: PgQueue, how: Callable[[ClaimedJob], Transition]
) -> None:
    for order in orders(3):
        (job_id,) = add(pg, max_retries=3)
        job = claim_one(pg)
        expire(pg)

        asked, swept, written = play(
            pg, [cancels(pg, job, force=False), sweeps(pg, "s"), finishes(pg, job, how=how)], order
        )

        assert unexpected([asked, swept, written]) == [], order
        stored = row(pg, job_id)
        kinds = [event["event"] for event in pg.job_events(job_id)]
        assert [swept.count, len(written)].count(1) == 1, order
        ended = [] if stored.status == "completed" else ["sweep" if swept.count else "cancel"]
        if asked == "running":  # before the end: whatever else the end was to be, the job is cancelled
            assert stored.status == ("completed" if how is completed and written else "cancelled"), order
            assert kinds == ["cancel_requested", *ended], order
            assert stored.retries == 0, order
        elif asked == "cancelled":  # after the end, while it waited to be tried again
            assert stored.status == "cancelled", order
            assert kinds[-1] == "cancel", order
        else:  # after the end
            assert isinstance(asked, IllegalTransition), order
            assert stored.status in ("completed", "dead"), order
        clear(pg)


def test_a_sweep_and_two_claims_give_an_expired_job_to_one_claimer_in_every_order(pg: PgQueue) -> None:
    for order in orders(3):
        if order.index((2, "run")) < order.index((1, "run")):
            continue  # the two claims are alike
        expired, fresh = add(pg, 2)
        claim_one(pg)
        expire(pg)

        swept, first, second = play(pg, [sweeps(pg, "s"), claims(pg), claims(pg)], order)

        assert unexpected([swept, first, second]) == [], order
        taken = sorted(job.id for job in [*first, *second])
        assert list(swept.returned) == [expired], order
        assert taken in ([fresh], [expired, fresh]), order
        clear(pg)


@pytest.mark.parametrize("reverse", [False, True])
def test_batches_over_the_same_jobs_do_not_deadlock_whatever_their_order(pg: PgQueue, reverse: bool) -> None:
    """An old and a new claim of the same jobs, finished at once, in opposite orders."""
    for order in orders(2):
        add(pg, 20, max_retries=9)
        old = claim(pg, limit=20)
        expire(pg)
        with pg.begin() as connection:
            store.sweep(connection, pg.tables, limit=100, actor="s")
        new = claim(pg, limit=20)

        late, written = play(
            pg, [finishes(pg, *reversed(old) if reverse else old, how=retried), finishes(pg, *new, how=retried)], order
        )

        assert unexpected([late, written]) == [], order
        assert (late, written) == (set(), {job.id for job in new}), order
        clear(pg)


def test_a_finish_that_is_rolled_back_leaves_the_job_to_the_next_sweep(pg: PgQueue) -> None:
    (job_id,) = add(pg)
    job = claim_one(pg)
    expire(pg)
    before = everything(pg)

    with pg.engine.connect() as worker:
        store.finish(worker, pg.tables, [completed(job)], actor="worker-1")
        worker.rollback()

    assert everything(pg) == before
    with pg.begin() as connection:
        assert list(store.sweep(connection, pg.tables, limit=10, actor="s").returned) == [job_id]
