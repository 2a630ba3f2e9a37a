"""A job that has been due for long enough goes before all others of its queue."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from limited import claim, ids, put

from pgqueue import PgQueue


def long_due(minutes: int) -> datetime:
    return datetime.now(UTC) - timedelta(minutes=minutes)


def test_a_job_that_was_due_for_long_goes_first_whatever_its_priority(pgq: PgQueue) -> None:
    pgq.queue("default", promote_after=timedelta(minutes=10))
    task = pgq.external_task("work")
    urgent = put(pgq, task, 3, priority=9)
    (old,) = put(pgq, task, priority=-5, at=long_due(11))
    (younger,) = put(pgq, task, priority=-5, at=long_due(9))

    claimed = [claim(pgq, 1)[0].id for _ in range(5)]

    assert claimed == [old, *urgent, younger]


def test_without_promotion_priorities_alone_decide(pgq: PgQueue) -> None:
    task = pgq.external_task("work")
    (old,) = put(pgq, task, priority=-5, at=long_due(60))
    urgent = put(pgq, task, 3, priority=9)

    assert ids(claim(pgq)) == [*urgent, old]


def test_jobs_that_were_due_for_long_and_others_may_come_in_one_claim(pgq: PgQueue) -> None:
    pgq.queue("default", promote_after=600)
    task = pgq.external_task("work")
    old = put(pgq, task, 2, at=long_due(60))
    new = put(pgq, task, 2, priority=3)

    assert set(ids(claim(pgq))) == {*old, *new}
    assert claim(pgq) == []
