"""How long ended jobs stay."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import add, add_one, claim, claim_one, completed, died, events, expire, put, retried, row, statuses
from sqlalchemy.orm import Session
from support import scalar, wait_for
from working import drain, enqueue, enqueue_many, table, working

from pgqueue import ConfigurationError, Discard, JobNotFound, PgQueue, Retry, operations, retention
from pgqueue.job import ClaimedJob, Transition


def kept(transition: Transition, seconds: float | None) -> Transition:
    transition.keep_seconds = seconds
    return transition


def finish(pgq: PgQueue, *transitions: Transition) -> set[int]:
    with pgq.begin() as connection:
        return retention.finish(connection, pgq.tables, transitions, actor="worker-1")


def prune_due(pgq: PgQueue, limit: int = 1_000) -> int:
    with pgq.begin() as connection:
        return retention.prune_due(connection, pgq.tables, limit=limit)


def seconds_until_pruned(pgq: PgQueue, job_id: int) -> float:
    found = row(pgq, job_id)
    seconds: float = (found.prune_at - found.finished_at).total_seconds()
    return seconds


def make_prunable(pgq: PgQueue, *ids: int) -> None:
    put(pgq, ids, prune_at=sa.literal_column("'2020-01-01 00:00:00.000'"))


def count_events(pgq: PgQueue) -> Any:
    return scalar(pgq.engine, f"SELECT count(*) FROM {table(pgq, 'job_events')}")


# Tasks


def test_jobs_of_a_task_without_retention_are_kept(pgq: PgQueue) -> None:
    @pgq.task
    def work() -> int:
        return 1

    job_id = enqueue(work)
    drain(pgq)

    assert row(pgq, job_id).status == "completed"
    assert row(pgq, job_id).prune_at is None


@pytest.mark.parametrize("count", [1, 20])
def test_a_completed_job_is_kept_as_long_as_its_task_says(pgq: PgQueue, count: int) -> None:
    @pgq.task(keep_completed=timedelta(hours=1), keep_dead=7200)
    def work() -> dict[str, int]:
        return {"a": 1}

    ids = enqueue_many(work, count)
    drain(pgq)

    for job_id in ids:
        assert row(pgq, job_id).result == {"a": 1}
        assert seconds_until_pruned(pgq, job_id) == pytest.approx(3600, abs=10)


def test_a_dead_job_is_kept_as_long_as_its_task_says(pgq: PgQueue) -> None:
    @pgq.task(keep_completed=0, keep_dead=7200)
    def work() -> None:
        raise Discard("no")

    job_id = enqueue(work)
    drain(pgq)

    assert row(pgq, job_id).status == "dead"
    assert seconds_until_pruned(pgq, job_id) == pytest.approx(7200, abs=10)
    assert events(pgq, job_id) == ["dead"]


@pytest.mark.parametrize("count", [1, 20])
def test_a_task_that_keeps_nothing_leaves_no_completed_jobs(pgq: PgQueue, count: int) -> None:
    ran = []

    @pgq.task(keep_completed=0)
    def work() -> str:
        ran.append(1)
        return "a result that is thrown away"

    enqueue_many(work, count)
    report = drain(pgq)

    assert len(ran) == count
    assert report.completed == count
    assert report.lost == 0
    assert statuses(pgq) == {}
    assert count_events(pgq) == 0


def test_a_job_that_was_retried_takes_its_events_with_it(pgq: PgQueue) -> None:
    failures = [ValueError("first")]

    @pgq.task(keep_completed=0, retry=Retry(base=0.0))
    def work() -> None:
        if failures:
            raise failures.pop()

    enqueue(work)
    drain(pgq)

    assert statuses(pgq) == {}
    assert count_events(pgq) == 0


def test_a_job_that_replaced_another_takes_its_events_with_it(pgq: PgQueue) -> None:
    @pgq.task(keep_completed=0)
    def work(n: int) -> None: ...

    unique = work.using(unique_key="a", on_conflict="replace")
    enqueue(unique, n=1)
    enqueue(unique, n=2)
    assert count_events(pgq) == 1

    drain(pgq)

    assert count_events(pgq) == 0


def test_a_job_that_was_edited_or_replayed_takes_its_events_with_it(pgq: PgQueue) -> None:
    @pgq.task(keep_completed=0)
    def work(n: int) -> None: ...

    enqueue_many(work, 3, n=1)
    edited, replayed = enqueue(work, n=1), enqueue(work, n=1)
    pgq.edit(edited, priority=3)
    pgq.cancel(replayed)
    pgq.replay(replayed)
    assert count_events(pgq) == 3

    drain(pgq)

    assert statuses(pgq) == {}
    assert count_events(pgq) == 0


def test_a_prune_deletes_what_was_recorded_of_jobs_that_are_gone_when_it_is_as_old(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "PRUNE_WINDOW_JOBS", 3)
    deleted = add(pgq, 7)
    for job_id in deleted:
        pgq.delete(job_id)
    kept = add_one(pgq)
    pgq.edit(kept, priority=3)
    pgq.pause("default")
    assert count_events(pgq) == 9

    pgq.prune(older_than=3600)
    assert count_events(pgq) == 9
    assert pgq.prune(older_than=0) == 0

    assert events(pgq, kept) == ["edit"]
    assert count_events(pgq) == 2


def test_a_transactional_task_may_keep_nothing_too(pgq: PgQueue) -> None:
    @pgq.task(transactional=True, keep_completed=0)
    def work(session: Session) -> None:
        session.connection()

    enqueue(work)
    report = drain(pgq)

    assert report.completed == 1
    assert statuses(pgq) == {}


def test_the_result_of_a_job_that_was_not_kept_is_an_error_that_says_why(pgq: PgQueue) -> None:
    @pgq.task(keep_completed=0)
    def work() -> None: ...

    with Session(pgq.engine) as session, session.begin():
        enqueued = work.enqueue(session)
    drain(pgq)

    with pytest.raises(JobNotFound, match="keep_completed"):
        enqueued.result()


def test_a_consumer_that_is_no_task_keeps_jobs_as_their_task_says(pgq: PgQueue) -> None:
    work = pgq.external_task("work", keep_completed=0, keep_dead=60)
    enqueue_many(work, 2)
    first, second = pgq.claim("me", limit=2)

    pgq.ack(first)
    pgq.nack(second, dead=True, error="no")

    assert statuses(pgq) == {second.id: "dead"}
    assert seconds_until_pruned(pgq, second.id) == pytest.approx(60, abs=10)


def test_a_job_that_dies_with_its_worker_is_kept_as_its_task_says(pgq: PgQueue) -> None:
    @pgq.task(keep_dead=3600, retry=Retry(max_retries=0))
    def work() -> None: ...

    lost = enqueue(work)
    other = add_one(pgq, task="unknown_here", max_retries=0)
    claim(pgq, limit=2, worker="gone")
    expire(pgq)

    with working(pgq, sweep_interval=0.05):
        wait_for(lambda: statuses(pgq) == {lost: "dead", other: "dead"}, "the sweep")

    assert seconds_until_pruned(pgq, lost) == pytest.approx(3600, abs=10)
    assert row(pgq, other).prune_at is None


@pytest.mark.parametrize("end", ["swept", "expired", "given up"])
def test_a_dead_job_is_kept_as_its_task_says_when_somebody_finds_it_who_does_not_know_the_task(
    pgq: PgQueue, end: str
) -> None:
    work = pgq.external_task("work", keep_dead=3600).using(max_retries=0)
    other = PgQueue(pgq.engine)
    if end == "expired":
        job_id = enqueue(work.using(expires_in=0.001))
        assert pgq.claim("nobody", queue="elsewhere") == []
        put(pgq, [job_id], expires_at=sa.literal_column("'2020-01-01 00:00:00.000'"))
        other.claim("me")
    else:
        job_id = enqueue(work)
        assert len(pgq.claim("gone")) == 1
        expire(pgq) if end == "swept" else other.nack(other_claim(pgq, other, job_id), dead=True)
        other.claim("me")

    assert row(pgq, job_id).status == "dead"
    assert seconds_until_pruned(pgq, job_id) == pytest.approx(3600, abs=10)


def other_claim(pgq: PgQueue, other: PgQueue, job_id: int) -> ClaimedJob:
    return other.get_claim(job_id, row(pgq, job_id).claim_token)


def test_a_task_that_no_longer_says_how_long_its_dead_jobs_are_kept_is_believed(pgq: PgQueue) -> None:
    pgq.external_task("work", keep_dead=3600)
    pgq.declare_limits()
    later = PgQueue(pgq.engine)
    job_id = enqueue(later.external_task("work", concurrency=1).using(max_retries=0))
    later.claim("gone")
    expire(pgq)

    pgq.claim("me")

    assert (row(pgq, job_id).status, row(pgq, job_id).prune_at) == ("dead", None)
    assert [found.name for found in later.list_limits()] == ["work"]


@pytest.mark.parametrize("option", ["keep_completed", "keep_dead"])
@pytest.mark.parametrize("duration", [-1, float("nan"), float("inf"), "7d", True, timedelta(days=40_000)])
def test_a_retention_must_be_a_time(option: str, duration: Any) -> None:
    with pytest.raises(ConfigurationError, match=option):
        PgQueue("sqlite://").task(**{option: duration})(lambda: None)  # type: ignore[call-overload]


# Statements


@pytest.fixture
def claimed(pgq: PgQueue) -> list[ClaimedJob]:
    add(pgq, 4)
    return claim(pgq, limit=4)


def test_transitions_of_all_kinds_are_written_together(pgq: PgQueue, claimed: list[ClaimedJob]) -> None:
    plain, hour, none, dead = claimed

    written = finish(
        pgq,
        completed(plain, "1"),
        kept(completed(hour, "2"), 3600.0),
        kept(completed(none), 0.0),
        kept(died(dead), 60.0),
    )

    assert written == {job.id for job in claimed}
    assert statuses(pgq) == {plain.id: "completed", hour.id: "completed", dead.id: "dead"}
    assert row(pgq, plain.id).prune_at is None
    assert seconds_until_pruned(pgq, hour.id) == pytest.approx(3600, abs=10)
    assert seconds_until_pruned(pgq, dead.id) == pytest.approx(60, abs=10)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_claim_that_was_lost_writes_and_deletes_nothing(pgq: PgQueue, seconds: float) -> None:
    add(pgq, 1)
    lost = claim_one(pgq)
    expire(pgq)
    pgq.claim("other")  # sweeps and claims again

    assert finish(pgq, kept(completed(lost), seconds)) == set()
    assert finish(pgq, kept(died(lost), seconds)) == set()
    assert row(pgq, lost.id).status == "running"
    assert row(pgq, lost.id).prune_at is None
    assert events(pgq, lost.id) == ["sweep"]


def test_both_ends_of_a_job_that_was_lost_and_claimed_again_meet_the_fence(pgq: PgQueue) -> None:
    add(pgq, 1)
    lost = claim_one(pgq)
    expire(pgq)
    (again,) = pgq.claim("worker-1")

    assert finish(pgq, kept(completed(lost), 0.0), kept(completed(again), 0.0)) == {again.id}
    assert statuses(pgq) == {}
    assert count_events(pgq) == 0


def test_a_deletion_whose_answer_was_lost_counts_as_written(pgq: PgQueue, claimed: list[ClaimedJob]) -> None:
    first, second, third, _ = claimed
    deletions = [kept(completed(job), 0.0) for job in (first, second)]
    finish(pgq, deletions[0], kept(completed(third), 60.0))

    with pgq.begin() as connection:
        found = retention.already_written(
            connection, pgq.tables, [*deletions, kept(completed(third), 60.0)], actor="worker-1"
        )

    assert found == {first.id, third.id}


def test_a_job_that_others_may_wait_for_stays_until_they_were_let_go(pgq: PgQueue, claimed: list[ClaimedJob]) -> None:
    holder, leader, plain, _ = claimed
    put(pgq, [holder.id], slot="awaited")
    put(pgq, [leader.id], leads_order=True)

    written = finish(pgq, *(kept(completed(job), 0.0) for job in (holder, leader, plain)))

    assert written == {holder.id, leader.id, plain.id}
    assert prune_due(pgq) == 0
    assert set(statuses(pgq).items()) >= {(holder.id, "completed"), (leader.id, "completed")}
    put(pgq, [holder.id, leader.id], slot=None, leads_order=False)
    assert prune_due(pgq) == 2


def test_only_jobs_whose_time_has_come_are_pruned_with_their_events(pgq: PgQueue) -> None:
    ids = add(pgq, 4)
    due, later, pending, ever = claim(pgq, limit=4)
    finish(pgq, died(due), kept(completed(later), 60.0), retried(pending), died(ever))
    make_prunable(pgq, due.id, pending.id)

    assert prune_due(pgq) == 1

    assert set(statuses(pgq)) == set(ids) - {due.id}
    assert events(pgq, due.id) == []
    assert events(pgq, pending.id) == ["retry"]


def test_pruning_goes_in_steps_and_skips_what_is_locked(pg: PgQueue) -> None:
    ids = add(pg, 5)
    finish(pg, *(kept(completed(job), 1.0) for job in claim(pg, limit=5)))
    make_prunable(pg, *ids)

    with pg.engine.begin() as other:
        other.execute(sa.text("SELECT FROM pgqueue.jobs WHERE id = :id FOR UPDATE"), {"id": ids[0]})
        assert prune_due(pg, limit=3) == 3
        assert prune_due(pg, limit=3) == 1

    assert prune_due(pg) == 1


def test_a_replayed_job_is_kept_again(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    finish(pgq, kept(died(claim_one(pgq)), 0.0))

    pgq.replay(job_id)

    assert row(pgq, job_id).prune_at is None
    assert prune_due(pgq) == 0


def test_a_worker_deletes_jobs_whose_time_has_come(pgq: PgQueue) -> None:
    @pgq.task(keep_completed=0.01)
    def work() -> None: ...

    enqueue_many(work, 30)

    with working(pgq, sweep_interval=0.05):
        wait_for(lambda: statuses(pgq) == {}, "the jobs to be deleted")
