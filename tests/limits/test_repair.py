"""Slots, turns and locks that nobody was told of: found again in a bounded time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import sqlalchemy as sa
from limited import claim, ids, put, waiting

from pgqueue import PgQueue, consuming, gating, overlooked, within_limits

# Slots that were offered to jobs that nobody claims -----------------------------------------------------------


def test_a_slot_of_a_key_offered_to_a_job_of_a_paused_queue_does_not_keep_other_queues_waiting(pgq: PgQueue) -> None:
    pgq.set_limits(task="work", key_concurrency=1)
    task = pgq.external_task("work").using(concurrency_key="a")
    (_,) = put(pgq, task)
    (holder,) = claim(pgq)
    (held_back,) = put(pgq, task, queue="paused")
    (waits,) = put(pgq, task, queue="other")
    assert claim(pgq, queue="paused") == claim(pgq, queue="other") == []
    pgq.pause("paused")

    pgq.ack(holder)

    (second,) = claim(pgq, queue="other") + claim(pgq, queue="other")
    assert second.id == waits
    pgq.resume("paused")
    assert claim(pgq, queue="paused") == []
    pgq.ack(second)
    assert ids(claim(pgq, queue="paused")) == [held_back]


def test_slots_of_many_keys_offered_to_an_unserved_queue_are_all_found_by_the_others(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlooked, "AROUND_JOBS_MAX", 7)
    overlooked._lines.cache_clear()
    pgq.set_limits(task="work", key_concurrency=1)
    task = pgq.external_task("work")
    keys = [f"key-{n:02}" for n in range(30)]
    with pgq.begin() as connection:
        for key in keys:
            task.using(concurrency_key=key).enqueue(connection)
    holders = claim(pgq)
    with pgq.begin() as connection:
        for queue in ("unserved", "default"):
            for key in keys:
                task.using(concurrency_key=key, queue=queue).enqueue(connection)
    assert claim(pgq, queue="unserved") == claim(pgq) == []

    pgq.ack(holders)
    started = [job for _ in range(2 * len(keys)) for job in claim(pgq)]

    assert len(started) == len(keys)
    overlooked._lines.cache_clear()


# Jobs that are deleted at a bad moment -----------------------------------------------------------------------


def test_a_slot_left_by_a_deleted_job_while_the_next_is_locked_is_found_by_the_next_claim_that_may_have_it(
    pg: PgQueue,
) -> None:
    pg.set_limits(task="work", key_concurrency=1)
    task = pg.external_task("work").using(concurrency_key="a")
    put(pg, task)
    (holder,) = claim(pg)
    (offered,) = put(pg, task, priority=1, queue="other")
    (waits,) = put(pg, task)
    assert claim(pg, queue="other") == claim(pg) == []
    pg.ack(holder)
    offer_what_was_freed(pg)
    assert waiting(pg) == {offered: None, waits: "key:a"}

    with pg.engine.connect() as connection:
        pg.edit(waits, priority=3, session=connection)
        pg.delete(offered)
        assert claim(pg) == []
        connection.commit()

    assert ids(claim(pg)) == [waits]


def test_a_turn_left_by_a_deleted_job_while_the_next_is_locked_is_found_by_the_next_claim(pg: PgQueue) -> None:
    task = pg.external_task("work")
    leader, follows = put(pg, task, 2, ordering_key="a")
    (job,) = claim(pg)
    assert claim(pg) == []
    pg.nack(job, delay=3600)

    with pg.engine.connect() as connection:
        pg.edit(follows, priority=3, session=connection)
        pg.delete(leader)
        assert claim(pg) == []
        connection.commit()

    assert ids(claim(pg)) == [follows]


def test_a_busy_queue_looks_around_as_well(pg: PgQueue) -> None:
    pg.set_limits(task="work", key_concurrency=1)
    keyed, free = pg.external_task("work").using(concurrency_key="a"), pg.external_task("free")
    put(pg, keyed)
    (holder,) = claim(pg)
    put(pg, keyed, queue="unserved")
    (waits,) = put(pg, keyed, priority=-1)
    assert claim(pg, queue="unserved") == claim(pg) == []
    put(pg, free, 300)

    pg.ack(holder)

    claimed = [claim(pg, 1)[0].id for _ in range(300)]
    assert waits in claimed or waiting(pg)[waits] is None


# Claims that look at many in vain -----------------------------------------------------------------------------


def test_a_consumers_claim_goes_on_behind_jobs_that_all_have_to_wait(pgq: PgQueue) -> None:
    pgq.set_limits(task="work", key_concurrency=1)
    task = pgq.external_task("work")
    put(pgq, task, 700, concurrency_key="a")
    (last,) = put(pgq, task, concurrency_key="b")
    assert len(claim(pgq, 1)) == 1

    assert ids(claim(pgq, 1)) == [last]


def test_a_consumers_claim_ends_when_it_has_looked_at_very_many(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consuming, "CLAIM_ROUNDS_MAX", 1)
    pgq.set_limits(task="work", key_concurrency=1)
    task = pgq.external_task("work")
    put(pgq, task, 400, concurrency_key="a")
    (last,) = put(pgq, task, concurrency_key="b")
    assert len(claim(pgq, 1)) == 1

    assert claim(pgq, 1) == []
    assert ids(claim(pgq, 1)) == [last]


# Processes that freeze, and long transactions of the application ----------------------------------------------


def test_a_claim_waits_only_a_moment_for_one_that_is_frozen(pg: PgQueue) -> None:
    pg.set_limits(task="work", concurrency=2)
    jobs = put(pg, pg.external_task("work"))

    with pg.engine.connect() as frozen:
        frozen.execute(sa.select(pg.tables.limits).with_for_update())
        asked_at = time.monotonic()
        assert claim(pg) == []
        waited = time.monotonic() - asked_at

    assert gating.CLAIM_WAITS_SECONDS <= waited < 10
    assert ids(claim(pg)) == jobs


def test_the_server_ends_a_claim_that_is_frozen(pg: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gating, "CLAIM_IDLE_SECONDS", 0.2)
    pg.set_limits(task="work", concurrency=2)
    jobs = put(pg, pg.external_task("work"))

    with pg.engine.connect() as frozen:
        claim_on(frozen, pg)
        while claim(pg) == []:
            pass
        frozen.invalidate()

    assert [job.status for job in pg.list_jobs()] == ["running"] * len(jobs)


def test_an_edit_in_a_long_transaction_of_the_application_stops_no_claims(pg: PgQueue) -> None:
    pg.set_limits(task="work", concurrency=2)

    @pg.task(name="work")
    def work(n: int = 0) -> None: ...

    edited, other = put(pg, work, 2)
    with pg.engine.connect() as connection:
        pg.edit(edited, payload={"n": 7}, session=connection)
        claimed = claim(pg)
        connection.commit()

    assert ids(claimed) == [other]
    assert ids(claim(pg)) == [edited]


def offer_what_was_freed(pgq: PgQueue) -> None:
    """What the beginning of a claim does, in a queue that has nothing to claim."""
    assert claim(pgq, queue="empty") == []


def claim_on(connection: sa.Connection, pgq: PgQueue) -> Any:
    import uuid

    return within_limits.claim(
        connection, pgq.tables, queue="default", worker="w", token=uuid.uuid4(), limit=1, lease=30.0
    )
