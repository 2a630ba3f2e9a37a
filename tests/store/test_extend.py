"""Extending: a lease is prolonged by the claim that holds it, and only by that."""

from __future__ import annotations

import uuid
from dataclasses import replace

import sqlalchemy as sa
from jobs import (
    add,
    claim,
    claim_one,
    completed,
    everything,
    expire,
    finish,
    row,
    seconds_of_lease,
    statuses,
    sweep,
)

from pgqueue import ClaimedJob, PgQueue, store


def extend(pgq: PgQueue, *jobs: ClaimedJob, lease: float = 300.0) -> set[int]:
    with pgq.begin() as connection:
        return set(store.extend(connection, pgq.tables, [(job.id, job.claim_token) for job in jobs], lease=lease))


def test_an_extended_lease_ends_so_long_from_now(pgq: PgQueue) -> None:
    add(pgq, 2)
    first, second = claim(pgq, limit=2, lease=60)

    held = extend(pgq, first, lease=300)

    assert held == {first.id}
    assert 290 < seconds_of_lease(pgq, first.id) <= 300
    assert 50 < seconds_of_lease(pgq, second.id) <= 60


def test_a_lease_can_be_made_shorter(pgq: PgQueue) -> None:
    add(pgq)
    job = claim_one(pgq, lease=600)

    extend(pgq, job, lease=10)

    assert seconds_of_lease(pgq, job.id) <= 10


def test_an_extended_job_is_not_swept(pgq: PgQueue) -> None:
    add(pgq)
    job = claim_one(pgq)
    expire(pgq)

    assert extend(pgq, job) == {job.id}
    assert sweep(pgq).count == 0


def test_extending_changes_nothing_but_the_end_of_the_lease(pgq: PgQueue) -> None:
    add(pgq)
    job = claim_one(pgq)
    before = row(pgq, job.id)._asdict()

    extend(pgq, job)

    after = row(pgq, job.id)._asdict()
    assert {name for name in before if before[name] != after[name]} == {"claim_expires_at"}


def test_lost_claims_are_not_extended_and_not_named_as_held(pgq: PgQueue) -> None:
    add(pgq, 4)
    held, finished, swept, taken = claim(pgq, limit=4)
    finish(pgq, completed(finished))
    expire(pgq, [swept.id, taken.id])
    sweep(pgq)
    again = [job for job in claim(pgq, limit=2) if job.id == taken.id]
    before = everything(pgq)

    assert extend(pgq, finished, swept, taken, replace(held, claim_token=uuid.uuid4())) == set()
    assert everything(pgq) == before
    assert extend(pgq, held, finished, *again) == {held.id, taken.id}


def test_nothing_to_extend_is_nothing_held(pgq: PgQueue) -> None:
    assert extend(pgq) == set()


def test_many_leases_are_extended_at_once(pgq: PgQueue) -> None:
    add(pgq, 1_200)
    jobs = claim(pgq, limit=1_200)

    assert extend(pgq, *jobs) == {job.id for job in jobs}
    assert min(seconds_of_lease(pgq, job.id) for job in jobs[:3]) > 200


def test_a_heartbeat_does_not_wait_for_a_job_that_is_being_finished(pg: PgQueue) -> None:
    """It counts as held as long as its token stands, and the others are extended."""
    add(pg, 2)
    finishing, other = claim(pg, limit=2, lease=60)

    with pg.engine.connect() as connection:
        pg.ack(finishing, session=connection)
        held = extend(pg, finishing, other)
        connection.commit()

    assert held == {finishing.id, other.id}
    assert seconds_of_lease(pg, other.id) > 200
    assert statuses(pg)[finishing.id] == "completed"
    assert extend(pg, finishing, other) == {other.id}


def test_a_heartbeat_leaves_no_lease_behind_on_a_job_that_was_locked(pg: PgQueue) -> None:
    add(pg)
    job = claim_one(pg, lease=60)

    with pg.engine.connect() as connection:
        connection.execute(sa.select(pg.tables.jobs.c.id).with_for_update())
        extend(pg, job, lease=600)

    assert seconds_of_lease(pg, job.id) <= 60
