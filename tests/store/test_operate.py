"""What people do to jobs and queues: replay, cancel, delete, pause, resume, look, prune."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import (
    add,
    add_one,
    age,
    claim,
    claim_one,
    completed,
    died,
    events,
    everything,
    expire,
    external,
    finish,
    is_postgresql,
    make_due,
    retried,
    row,
    seconds_until_due,
    statuses,
    sweep,
)

from pgqueue import ConfigurationError, DuplicateJob, IllegalTransition, JobNotFound, PgQueue, dead_letter, operations
from pgqueue.actor import default_actor
from pgqueue.dialect import seconds_from_now
from pgqueue.job import JobStatus

DAY = 86_400.0


def bring_to(pgq: PgQueue, status: str, **options: Any) -> int:
    """A job of its own queue in this status."""
    job_id = add_one(pgq, queue=f"of-{status}", **options)
    if status in ("running", "completed", "dead"):
        job = claim_one(pgq, queue=f"of-{status}")
        if status != "running":
            finish(pgq, completed(job, '"done"') if status == "completed" else died(job))
    elif status == "cancelled":
        pgq.cancel(job_id)
    assert statuses(pgq)[job_id] == status
    return job_id


# Replay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["dead", "cancelled"])
def test_a_replayed_job_is_due_now_with_all_its_retries(pgq: PgQueue, status: str) -> None:
    job_id = add_one(pgq, max_retries=2, priority=3)
    finish(pgq, retried(claim_one(pgq)))
    if status == "dead":
        finish(pgq, died(claim_one(pgq)))
    else:
        pgq.cancel(job_id)
    make_due(pgq)
    before = row(pgq, job_id)

    pgq.replay(job_id, actor="cli:ann", reason="the printer works again")

    after = row(pgq, job_id)
    assert (after.status, after.retries, after.finished_at) == ("pending", 0, None)
    assert -5 < seconds_until_due(pgq, job_id) <= 0
    changed = {name for name in before._fields if getattr(before, name) != getattr(after, name)}
    assert changed == {"status", "retries", "finished_at", "run_at"}
    event = pgq.job_events(job_id)[-1]
    assert (event["event"], event["actor"], event["reason"]) == ("replay", "cli:ann", "the printer works again")
    assert (event["from_status"], event["to_status"], event["attempt"]) == (status, "pending", before.attempt)


def test_a_replayed_job_counts_its_attempts_on_and_may_use_every_retry_again(pgq: PgQueue) -> None:
    job_id = add_one(pgq, max_retries=1)
    for _ in range(2):
        claim_one(pgq)
        expire(pgq)
        sweep(pgq)
    assert statuses(pgq)[job_id] == "dead"

    pgq.replay(job_id)
    again = claim_one(pgq)
    expire(pgq)

    assert (again.attempt, again.retries) == (3, 0)
    assert list(sweep(pgq).returned) == [job_id]


@pytest.mark.parametrize("status", ["pending", "running", "completed"])
def test_only_a_dead_or_cancelled_job_can_be_replayed(pgq: PgQueue, status: str) -> None:
    job_id = bring_to(pgq, status)
    before = everything(pgq)

    with pytest.raises(IllegalTransition, match=f"job {job_id} is {status}; only a dead or cancelled job can become"):
        pgq.replay(job_id)

    assert everything(pgq) == before


@pytest.mark.parametrize("holder", ["pending", "running"])
def test_a_replay_does_not_take_a_unique_key_from_an_open_job(pgq: PgQueue, holder: str) -> None:
    old = bring_to(pgq, "dead", unique_key="k")
    new = bring_to(pgq, holder, unique_key="k")
    before = everything(pgq)

    with pytest.raises(DuplicateJob, match=f"job {old} cannot be replayed"):
        pgq.replay(old)

    assert everything(pgq) == before
    assert new != old


def test_a_replay_has_its_unique_key_again_when_the_holder_has_finished(pgq: PgQueue) -> None:
    old = bring_to(pgq, "dead", unique_key="k")
    bring_to(pgq, "completed", unique_key="k")

    pgq.replay(old)

    with pgq.begin() as connection:
        again = external(pgq).using(unique_key="k").enqueue(connection, n=1)
    assert (again.id, again.inserted) == (old, False)


# Cancel and delete -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [None, 3600])
def test_a_pending_job_can_be_cancelled_and_is_not_claimed(pgq: PgQueue, delay: float | None) -> None:
    job_id = add_one(pgq, delay=delay)

    pgq.cancel(job_id, actor="cli:ann", reason="ordered twice")

    make_due(pgq)
    assert claim(pgq) == []
    assert row(pgq, job_id).finished_at is not None
    (event,) = pgq.job_events(job_id)
    assert (event["event"], event["actor"], event["reason"]) == ("cancel", "cli:ann", "ordered twice")
    assert (event["from_status"], event["to_status"]) == ("pending", "cancelled")


def test_a_running_job_can_be_cancelled_by_force_and_its_worker_writes_nothing_more(pgq: PgQueue) -> None:
    add(pgq)
    job = claim_one(pgq)

    assert pgq.cancel(job.id, force=True) is JobStatus.CANCELLED

    before = everything(pgq)
    assert finish(pgq, completed(job)) == finish(pgq, died(job)) == set()
    expire(pgq)
    assert sweep(pgq).count == 0
    assert everything(pgq) == before
    stored = row(pgq, job.id)
    assert (stored.status, stored.claim_token, stored.claim_expires_at) == ("cancelled", None, None)
    assert stored.claimed_by == "worker-1"


@pytest.mark.parametrize("status", ["completed", "dead", "cancelled"])
def test_a_final_job_cannot_be_cancelled(pgq: PgQueue, status: str) -> None:
    job_id = bring_to(pgq, status)
    before = everything(pgq)

    with pytest.raises(IllegalTransition, match=f"job {job_id} is {status}; only a pending or running job"):
        pgq.cancel(job_id)

    assert everything(pgq) == before


@pytest.mark.parametrize("status", ["pending", "completed", "dead", "cancelled"])
def test_a_deleted_job_is_gone_and_what_was_recorded_of_it_stays(pgq: PgQueue, status: str) -> None:
    job_id = bring_to(pgq, status)
    recorded = events(pgq, job_id)
    others = add(pgq, 2)

    pgq.delete(job_id, actor="cli:ann", reason="by mistake")

    assert list(statuses(pgq)) == others
    assert events(pgq, job_id) == [*recorded, "delete"]
    event = pgq.job_events(job_id)[-1]
    assert (event["actor"], event["reason"]) == ("cli:ann", "by mistake")
    assert (event["from_status"], event["to_status"]) == (status, None)


def test_a_running_job_cannot_be_deleted(pgq: PgQueue) -> None:
    job_id = bring_to(pgq, "running")
    before = everything(pgq)

    with pytest.raises(IllegalTransition, match=f"job {job_id} is running; cancel it first"):
        pgq.delete(job_id)

    assert everything(pgq) == before


def test_the_id_of_a_deleted_job_is_not_given_to_another(pgq: PgQueue) -> None:
    """Its events would become those of the other job, and an old fence would fit."""
    first, last = add(pgq, 2)
    pgq.delete(last)

    assert add_one(pgq) > last > first


CALLS: dict[str, Callable[[PgQueue, int], Any]] = {
    "get_job": lambda pgq, job_id: pgq.get_job(job_id),
    "replay": lambda pgq, job_id: pgq.replay(job_id),
    "cancel": lambda pgq, job_id: pgq.cancel(job_id),
    "delete": lambda pgq, job_id: pgq.delete(job_id),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_job_that_is_not_there_is_named(pgq: PgQueue, call: str) -> None:
    add(pgq)
    before = everything(pgq)

    for job_id in (0, -1, 4711, 2**63 - 1, 2**63, -(2**63) - 1, 10**30):
        with pytest.raises(JobNotFound, match=f"there is no job {job_id}; it may have been deleted or pruned"):
            CALLS[call](pgq, job_id)

    assert everything(pgq) == before


def test_a_job_that_never_was_has_no_events(pgq: PgQueue) -> None:
    assert pgq.job_events(4711) == pgq.job_events(10**30) == []


def test_who_acts_is_the_systems_user_when_nobody_is_named(pgq: PgQueue) -> None:
    job_id = add_one(pgq)

    pgq.cancel(job_id)
    pgq.replay(job_id)
    pgq.delete(job_id)

    assert {event["actor"] for event in pgq.job_events(job_id)} == {default_actor()}


def test_any_reason_can_be_recorded(pgq: PgQueue) -> None:
    """Bytes of a command line that are no text arrive as lone surrogates."""
    job_id = add_one(pgq)
    odd = 'it\'s "so": 100 % :x {y}\n\x00 \udce4 é' + "z" * 1_000_000

    pgq.cancel(job_id, reason=odd, actor="a\x00\udce4")
    pgq.replay(job_id, reason=odd, actor="a\x00\udce4")
    pgq.delete(job_id, reason=odd, actor="a\x00\udce4")
    pgq.pause("default", reason=odd, actor="a\x00\udce4")
    pgq.resume("default", reason=odd, actor="a\x00\udce4")

    recorded = pgq.job_events(job_id) + queue_events(pgq)
    assert [event["event"] for event in recorded] == ["cancel", "replay", "delete", "pause", "resume"]
    assert all(event["reason"].startswith('it\'s "so": 100 % :x {y}\n␀ ? éz') for event in recorded)
    assert all(len(event["reason"]) < 100_000 for event in recorded)
    assert {event["actor"] for event in recorded} == {"a␀?"}


def queue_events(pgq: PgQueue) -> list[dict[str, Any]]:
    table = pgq.tables.job_events
    with pgq.begin() as connection:
        found = connection.execute(sa.select(table).where(table.c.job_id.is_(None)).order_by(table.c.id))
        return [dict(event._mapping) for event in found]


@pytest.mark.parametrize("change", ["cancel", "replay", "delete"])
def test_of_two_operators_at_once_one_changes_the_job_and_the_other_is_told(pgq: PgQueue, change: str) -> None:
    start = "dead" if change == "replay" else "pending"
    job_id = bring_to(pgq, start)
    ready = threading.Barrier(2)

    def act(actor: str) -> str:
        ready.wait()
        try:
            getattr(pgq, change)(job_id, actor=actor)
        except (IllegalTransition, JobNotFound):
            return "told"
        return "changed"

    with ThreadPoolExecutor(2) as threads:
        ends = sorted(threads.map(act, ["ann", "bob"]))

    assert ends == ["changed", "told"]
    assert events(pgq, job_id).count(change) == 1


# Pause and resume ------------------------------------------------------------------------------------------


def test_a_paused_queue_gives_nothing_until_it_is_resumed(pgq: PgQueue) -> None:
    job_id = add_one(pgq)

    pgq.pause("default")
    paused = pgq.claim("w")
    was_paused = pgq.resume("default")

    assert (paused, was_paused) == ([], True)
    assert claim_one(pgq).id == job_id


def test_a_pause_says_until_when(pgq: PgQueue) -> None:
    for duration in (90, 90.0, timedelta(seconds=90)):
        pgq.pause("default", duration=duration)

        (summary,) = pgq.queues()

        assert summary.paused
        assert summary.paused_until is not None
        assert timedelta(seconds=60) < summary.paused_until - datetime.now(UTC) <= timedelta(seconds=95)


def test_a_second_pause_replaces_the_first(pgq: PgQueue) -> None:
    pgq.pause("default", duration=90)
    pgq.pause("default")
    (endless,) = pgq.queues()
    pgq.pause("default", duration=90)
    (limited,) = pgq.queues()

    assert (endless.paused, endless.paused_until) == (True, None)
    assert limited.paused_until is not None


def test_running_jobs_of_a_paused_queue_can_be_finished_extended_and_swept(pgq: PgQueue) -> None:
    add(pgq, 3)
    first, second, third = claim(pgq, limit=3)

    pgq.pause("default")

    pgq.ack(first)
    pgq.extend(second)
    expire(pgq, [third.id])
    assert list(sweep(pgq).returned) == [third.id]
    assert claim(pgq) == []


def test_jobs_can_be_enqueued_into_a_paused_queue(pgq: PgQueue) -> None:
    pgq.pause("default")

    job_id = add_one(pgq)

    pgq.resume("default")
    assert claim_one(pgq).id == job_id


def test_a_pause_concerns_one_queue(pgq: PgQueue) -> None:
    mail = add_one(pgq, queue="mail")

    pgq.pause("default")

    assert claim_one(pgq, queue="mail").id == mail


def test_pause_and_resume_are_recorded(pgq: PgQueue) -> None:
    pgq.pause("mail", duration=90, actor="cli:ann")
    pgq.pause("mail", reason="the printer is on fire", actor="cli:bob")
    pgq.resume("mail", actor="cli:ann", reason="it is out")

    assert [
        (event["queue"], event["event"], event["actor"], event["reason"], event["task"]) for event in queue_events(pgq)
    ] == [
        ("mail", "pause", "cli:ann", "for 90 s", None),
        ("mail", "pause", "cli:bob", "the printer is on fire", None),
        ("mail", "resume", "cli:ann", "it is out", None),
    ]


def test_resuming_a_queue_that_is_not_paused_changes_nothing(pgq: PgQueue) -> None:
    pgq.pause("mail")
    pgq.resume("mail")
    before = everything(pgq)

    assert (pgq.resume("mail"), pgq.resume("never-seen")) == (False, False)
    assert everything(pgq) == before


def test_a_pause_that_ended_by_itself_is_none_to_end(pgq: PgQueue) -> None:
    pgq.pause("mail", duration=90)
    with pgq.begin() as connection:
        connection.execute(sa.update(pgq.tables.queues).values(paused_until=datetime(2020, 1, 1, tzinfo=UTC)))

    assert pgq.queues() == []
    assert pgq.resume("mail") is False
    assert [event["event"] for event in queue_events(pgq)] == ["pause"]


def test_a_pause_that_cannot_be_is_refused(pgq: PgQueue) -> None:
    before = everything(pgq)

    for duration in (0, -1, float("nan"), float("inf"), 1e300, 10**400, timedelta.max, "90", True):
        with pytest.raises(ConfigurationError, match="duration"):
            pgq.pause("mail", duration=duration)  # type: ignore[arg-type]
    for queue in ("", 'a"b', "a;b", None):
        for call in (pgq.pause, pgq.resume):
            with pytest.raises(ConfigurationError, match="queue name must be"):
                call(queue)  # type: ignore[operator]

    assert everything(pgq) == before


# Look ------------------------------------------------------------------------------------------------------


def test_jobs_are_listed_newest_first_and_page_by_page(pgq: PgQueue) -> None:
    ids = add(pgq, 7)
    pages, before_id = [], None

    while page := [job.id for job in pgq.list_jobs(limit=3, before_id=before_id)]:
        pages.append(page)
        before_id = page[-1]

    assert pages == [ids[:3:-1], ids[3:0:-1], ids[:1]]


def test_a_list_has_fifty_jobs_unless_told(pgq: PgQueue) -> None:
    ids = add(pgq, 51)

    assert [job.id for job in pgq.list_jobs()] == ids[:0:-1]


@pytest.mark.parametrize("status", list(JobStatus))
def test_jobs_are_filtered_by_status(pgq: PgQueue, status: JobStatus) -> None:
    made = {name: bring_to(pgq, name) for name in JobStatus}

    assert [job.id for job in pgq.list_jobs(status=status)] == [made[status]]


def test_filters_hold_together(pgq: PgQueue) -> None:
    wanted = add(pgq, 2, queue="mail", task="send")
    add(pgq, 2, queue="mail", task="other")
    add(pgq, 2, task="send")
    final = add_one(pgq, queue="mail", task="send")
    pgq.cancel(final)

    found = pgq.list_jobs(status="pending", queue="mail", task="send", before_id=final)

    assert [job.id for job in found] == wanted[::-1]
    assert pgq.list_jobs(queue="nowhere") == pgq.list_jobs(task='it\'s "none"; --') == []


def test_a_page_may_begin_anywhere(pgq: PgQueue) -> None:
    ids = add(pgq, 2)

    assert [job.id for job in pgq.list_jobs(before_id=10**30)] == ids[::-1]
    assert pgq.list_jobs(before_id=-(10**30)) == pgq.list_jobs(before_id=0) == []


def test_a_filter_that_cannot_be_is_refused(pgq: PgQueue) -> None:
    for status in ("retrying", "", "dead' OR 'a'='a"):
        with pytest.raises(ConfigurationError, match="status must be one of pending, running"):
            pgq.list_jobs(status=status)
    for limit in (0, -1, 2**31, "5"):
        with pytest.raises(ConfigurationError, match="limit must be"):
            pgq.list_jobs(limit=limit)  # type: ignore[arg-type]


def test_a_job_shows_all_of_its_row(pgq: PgQueue) -> None:
    job_id = add_one(pgq, priority=2, unique_key="k", metadata={"a": 1})
    finish(pgq, retried(claim_one(pgq)))

    job = pgq.get_job(job_id)

    assert {name: getattr(job, name) for name in row(pgq, job_id)._fields} == row(pgq, job_id)._asdict()
    assert isinstance(job.created_at, datetime)
    assert job.created_at.tzinfo is not None


def test_a_summary_counts_where_the_jobs_of_each_queue_stand(pgq: PgQueue) -> None:
    add(pgq, 2)
    make_due(pgq, seconds_ago=90)
    add(pgq, 3, delay=3600)
    for end in (retried, died, completed, completed, None):
        add(pgq, queue="mail")
        job = claim_one(pgq, queue="mail")
        if end:
            finish(pgq, retried(job, 3600) if end is retried else end(job))  # type: ignore[operator]
    pgq.cancel(add_one(pgq, queue="mail"))
    pgq.pause("empty")

    default, empty, mail = pgq.queues()

    assert (default.queue, default.ready, default.scheduled, default.retrying, default.paused) == (
        "default",
        2,
        3,
        0,
        False,
    )
    assert default.oldest_ready_seconds is not None
    assert 85 < default.oldest_ready_seconds < 150
    assert mail == operations.QueueSummary("mail", scheduled=1, retrying=1, running=1, completed=2, dead=1, cancelled=1)
    assert empty == operations.QueueSummary("empty", paused=True)


def test_without_jobs_and_pauses_there_is_nothing_to_sum_up(pgq: PgQueue) -> None:
    assert pgq.queues() == []


# Prune -----------------------------------------------------------------------------------------------------


def test_prune_deletes_what_became_final_long_ago_with_its_events(pgq: PgQueue) -> None:
    old = bring_to(pgq, "completed"), bring_to(pgq, "cancelled")
    age(pgq, seconds_ago=8 * DAY)
    kept = [bring_to(pgq, status) for status in JobStatus]

    pruned = pgq.prune(older_than=timedelta(days=7))

    assert pruned == 2
    assert list(statuses(pgq)) == kept
    assert [events(pgq, job_id) for job_id in old] == [[], []]
    assert events(pgq, kept[-1]) == ["cancel"]


def test_prune_keeps_dead_jobs_unless_they_are_named(pgq: PgQueue) -> None:
    done, dead = bring_to(pgq, "completed"), bring_to(pgq, "dead")
    age(pgq, seconds_ago=8 * DAY)

    assert pgq.prune(older_than=DAY, statuses=["cancelled"]) == 0
    assert pgq.prune(older_than=DAY, statuses=["dead"]) == 1
    assert list(statuses(pgq)) == [done]
    assert pgq.prune(older_than=DAY) == 1
    assert events(pgq, dead) == []


def test_an_age_of_zero_prunes_everything_final(pgq: PgQueue) -> None:
    made = [bring_to(pgq, status) for status in JobStatus]
    age(pgq, seconds_ago=1)

    assert pgq.prune(older_than=0, statuses=["completed", "dead", "cancelled"]) == 3
    assert list(statuses(pgq)) == made[:2]


def test_prune_looks_at_when_a_job_became_final_and_not_when_it_was_enqueued(pgq: PgQueue) -> None:
    job_id = bring_to(pgq, "completed")
    with pgq.begin() as connection:
        connection.execute(sa.update(pgq.tables.jobs).values(created_at=datetime(2020, 1, 1, tzinfo=UTC)))

    assert pgq.prune(older_than=DAY) == 0
    assert list(statuses(pgq)) == [job_id]


def test_a_replayed_job_is_not_pruned(pgq: PgQueue) -> None:
    job_id = bring_to(pgq, "dead")
    age(pgq, seconds_ago=8 * DAY)

    pgq.replay(job_id)

    assert pgq.prune(older_than=0, statuses=["dead", "cancelled", "completed"]) == 0


def test_prune_works_in_short_transactions_and_tells_of_each(pgq: PgQueue) -> None:
    add(pgq, 2_500)
    finish(pgq, *(completed(job) for job in claim(pgq, limit=2_500)))
    age(pgq, seconds_ago=8 * DAY)
    told: list[tuple[int, int]] = []

    def tell(count: int) -> None:
        told.append((count, len(statuses(pgq))))  # as another connection sees it: this batch is committed

    assert pgq.prune(older_than=DAY, pruned=tell) == 2_500
    assert told == [(1_000, 1_500), (1_000, 500), (500, 0)]


def test_one_batch_deletes_no_more_than_its_limit_and_says_where_to_go_on(pgq: PgQueue) -> None:
    ids = add(pgq, 5)
    finish(pgq, *(completed(job) for job in claim(pgq, limit=5)))
    age(pgq, seconds_ago=8 * DAY)

    batches = []
    after_id: int | None = 0
    while after_id is not None:
        with pgq.begin() as connection:
            count, after_id = operations.prune(connection, pgq.tables, older_than=DAY, after_id=after_id, limit=2)
        batches.append((count, after_id, len(statuses(pgq))))

    assert batches == [(2, ids[1], 3), (2, ids[3], 1), (1, None, 0)]


def test_prune_passes_over_rows_that_somebody_has_locked(pg: PgQueue) -> None:
    """It never waits: neither for the application nor for another prune."""
    ids = add(pg, 3)
    finish(pg, *(completed(job) for job in claim(pg, limit=3)))
    age(pg, seconds_ago=8 * DAY)

    with pg.engine.connect() as holder:
        holder.execute(sa.select(pg.tables.jobs.c.id).where(pg.tables.jobs.c.id == ids[1]).with_for_update())
        pruned = pg.prune(older_than=DAY)

    assert (pruned, list(statuses(pg))) == (2, [ids[1]])
    assert pg.prune(older_than=DAY) == 1


def test_a_job_that_is_being_replayed_is_not_pruned(pg: PgQueue) -> None:
    job_id = bring_to(pg, "cancelled")
    age(pg, seconds_ago=8 * DAY)

    with pg.engine.begin() as operator:
        dead_letter.replay_job(operator, pg.tables, job_id, actor="ann", reason=None)
        during = pg.prune(older_than=DAY)

    assert (during, pg.prune(older_than=0)) == (0, 0)
    assert statuses(pg) == {job_id: "pending"}


def test_several_prunes_at_once_delete_each_job_once(pgq: PgQueue) -> None:
    count = 3_000 if is_postgresql(pgq) else 1_500
    add(pgq, count)
    finish(pgq, *(completed(job) for job in claim(pgq, limit=count)))
    age(pgq, seconds_ago=8 * DAY)
    ready = threading.Barrier(4)

    def prune() -> int:
        ready.wait()
        return pgq.prune(older_than=DAY)

    with ThreadPoolExecutor(4) as threads:
        pruned = [future.result() for future in [threads.submit(prune) for _ in range(4)]]

    assert sum(pruned) + pgq.prune(older_than=DAY) == count
    assert statuses(pgq) == {}


def test_a_prune_that_cannot_be_is_refused(pgq: PgQueue) -> None:
    bring_to(pgq, "completed")
    age(pgq, seconds_ago=8 * DAY)
    before = everything(pgq)

    for older_than in (-1, float("nan"), float("inf"), 1e300, 10**400, timedelta.max, "7", None, True):
        with pytest.raises(ConfigurationError, match="older_than"):
            pgq.prune(older_than=older_than)  # type: ignore[arg-type]
    for statuses_given in (["pending"], ["running"], ["completed", "'; --"], []):
        with pytest.raises(ConfigurationError, match="can be pruned"):
            pgq.prune(older_than=0, statuses=statuses_given)
    with pytest.raises(ConfigurationError, match=r"statuses must be several, such as \['dead'\], got 'dead'"):
        pgq.prune(older_than=0, statuses="dead")

    assert everything(pgq) == before


# Beside a long history -------------------------------------------------------------------------------------


def test_a_page_of_jobs_says_where_the_next_one_goes_on(pgq: PgQueue) -> None:
    ids = add(pgq, 5)

    first = pgq.page_of_jobs(limit=3)
    second = pgq.page_of_jobs(limit=3, before_id=first.before_id)

    assert [job.id for job in first.jobs + second.jobs] == ids[::-1]
    assert (first.before_id, second.before_id) == (ids[2], None)
    assert first.complete
    assert second.complete


def test_a_page_that_looks_through_some_jobs_only_says_how_far_it_got(pgq: PgQueue) -> None:
    ids = add(pgq, 2, queue="rare") + add(pgq, 4)

    looks, before_id = [], None
    while not looks or before_id is not None:
        page = pgq.page_of_jobs(queue="rare", within=3, before_id=before_id)
        before_id = page.before_id
        looks.append(([job.id for job in page.jobs], before_id, page.complete))

    assert looks == [([], ids[3], False), ([ids[1], ids[0]], ids[0], False), ([], None, True)]


@pytest.mark.parametrize("status", ["pending", "running", "dead", "cancelled"])
def test_jobs_that_have_an_index_are_found_however_many_finished_since(
    pgq: PgQueue, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "NEWEST_JOBS", 2)
    old = bring_to(pgq, status)
    add(pgq, 8, queue="newer")
    finish(pgq, *(completed(job) for job in claim(pgq, queue="newer", limit=8)))

    page = pgq.page_of_jobs(status=status, limit=2, within=1)

    assert ([job.id for job in page.jobs], page.before_id, page.complete) == ([old], None, True)
    assert pgq.list_jobs(status=status, before_id=old, limit=2) == []


def test_pending_jobs_are_listed_newest_first_whatever_their_priority(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "NEWEST_JOBS", 1)
    ids = [add_one(pgq, priority=priority, delay=60 * priority) for priority in (3, 1, 2)]
    add(pgq, 8, queue="newer")
    finish(pgq, *(completed(job) for job in claim(pgq, queue="newer", limit=8)))

    assert [job.id for job in pgq.list_jobs(status="pending", limit=2)] == ids[:0:-1]


@pytest.mark.parametrize("within", [0, -1, True, "many"])
def test_a_page_looks_through_one_job_at_least(pgq: PgQueue, within: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"within must be at least 1, or None, got {within!r}"):
        pgq.page_of_jobs(within=within)


def test_beside_a_long_history_finished_jobs_are_estimated_and_all_others_counted(
    pg: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "COUNT_BLOCKS_MAX", 1)
    add(pg, 3_000)
    finish(pg, *(completed(job) for job in claim(pg, limit=3_000)))
    add(pg, 7)
    add(pg, 2, delay=60)
    claim_one(pg)
    dead = bring_to(pg, "dead")
    pg.pause("mail")

    summaries = {summary.queue: summary for summary in pg.queues()}

    default = summaries["default"]
    assert (default.ready, default.scheduled, default.running, default.estimated) == (6, 2, 1, True)
    assert default.oldest_ready_seconds is not None
    assert 1_500 < default.completed < 6_000
    assert default.completed % 100 == 0, "an estimate that looks like a count"
    assert summaries[pg.get_job(dead).queue].dead == 1
    assert summaries["mail"].paused
    assert {summary.queue: summary.completed for summary in pg.queues(exact=True)}["default"] == 3_000
    assert not any(summary.estimated for summary in pg.queues(exact=True))


def test_a_prune_walks_past_what_it_keeps_step_by_step(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "PRUNE_WINDOW_JOBS", 2)
    ids = add(pgq, 6)
    finish(pgq, *(completed(job) for job in claim(pgq, limit=6)))
    age(pgq, [ids[0], ids[3], ids[4]], seconds_ago=8 * DAY)
    set_created_at(pgq, ids[:4], seconds_ago=9 * DAY)
    told: list[int] = []

    assert pgq.prune(older_than=DAY, pruned=told.append) == 3
    assert told == [1, 1, 1, 0]


def test_a_prune_ends_with_the_jobs_that_were_enqueued_since(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "PRUNE_WINDOW_JOBS", 2)
    add(pgq, 6)
    finish(pgq, *(completed(job) for job in claim(pgq, limit=6)))
    told: list[int] = []

    assert pgq.prune(older_than=DAY, pruned=told.append) == 0
    assert told == [0]


def set_created_at(pgq: PgQueue, ids: list[int], *, seconds_ago: float) -> None:
    jobs = pgq.tables.jobs
    moment = seconds_from_now(sa.literal(-seconds_ago, sa.Float()))
    with pgq.begin() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id.in_(ids)).values(created_at=moment))
