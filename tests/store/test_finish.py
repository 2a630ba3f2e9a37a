"""Finishing: how an attempt ended is written once, by the claim that holds the job, with its event."""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest
from jobs import (
    add,
    claim,
    claim_one,
    completed,
    died,
    events,
    everything,
    expire,
    finish,
    retried,
    row,
    seconds_until_due,
    statuses,
    sweep,
)

from pgqueue import JobStatus, PgQueue
from pgqueue.job import ClaimedJob, ErrorInfo, EventType, Transition


def test_a_completed_job_keeps_its_result_and_loses_its_claim(pgq: PgQueue) -> None:
    add(pgq)
    job = claim_one(pgq, worker="worker-7")

    written = finish(pgq, completed(job, '{"width": 3}'))

    stored = row(pgq, job.id)
    assert written == {job.id}
    assert (stored.status, stored.result) == ("completed", {"width": 3})
    assert (stored.claim_token, stored.claim_expires_at) == (None, None)
    assert (stored.claimed_by, stored.attempt, stored.retries) == ("worker-7", 1, 0)
    assert stored.finished_at >= stored.claimed_at
    assert events(pgq, job.id) == []


@pytest.mark.parametrize(
    ("result_json", "result"),
    [(None, None), ("null", None), ("0", 0), ('""', ""), ("[]", []), ("false", False), ('"é\\n"', "é\n"), ("1.5", 1.5)],
)
def test_any_json_can_be_a_result(pgq: PgQueue, result_json: str | None, result: object) -> None:
    add(pgq)

    finish(pgq, completed(claim_one(pgq), result_json))

    assert pgq.list_jobs()[0].result == result


def test_a_retried_job_is_pending_again_with_its_retry_charged(pgq: PgQueue) -> None:
    add(pgq, unique_key="k")
    job = claim_one(pgq)

    assert finish(pgq, retried(job, delay=90), actor="worker-7") == {job.id}

    stored = row(pgq, job.id)
    assert (stored.status, stored.attempt, stored.retries) == ("pending", 1, 1)
    assert (stored.claim_token, stored.claim_expires_at, stored.finished_at) == (None, None, None)
    assert stored.error == {"type": "ValueError", "message": "no", "traceback": "Traceback …"}
    assert 80 < seconds_until_due(pgq, job.id) <= 90
    (event,) = pgq.job_events(job.id)
    assert (event["event"], event["actor"], event["attempt"]) == ("retry", "worker-7", 1)
    assert (event["from_status"], event["to_status"], event["reason"]) == ("running", "pending", "failed")
    assert (event["queue"], event["task"], event["error"]) == ("default", "work", stored.error)


def test_a_dead_job_is_final_with_its_error(pgq: PgQueue) -> None:
    add(pgq)
    job = claim_one(pgq)

    finish(pgq, died(job))

    stored = row(pgq, job.id)
    assert (stored.status, stored.retries, stored.error["message"]) == ("dead", 0, "no")
    assert stored.finished_at is not None
    assert events(pgq, job.id) == ["dead"]


def test_a_cancelled_job_is_final_and_keeps_the_error_of_an_earlier_attempt(pgq: PgQueue) -> None:
    add(pgq)
    finish(pgq, retried(claim_one(pgq)))
    job = claim_one(pgq)

    finish(pgq, Transition(job.id, job.claim_token, 2, JobStatus.CANCELLED, EventType.CANCEL, reason="not wanted"))

    stored = row(pgq, job.id)
    assert (stored.status, stored.error["message"]) == ("cancelled", "no")
    assert stored.finished_at is not None
    assert events(pgq, job.id) == ["retry", "cancel"]


def test_a_released_job_keeps_its_place_and_pays_nothing(pgq: PgQueue) -> None:
    add(pgq)
    job = claim_one(pgq)

    finish(pgq, Transition(job.id, job.claim_token, 1, JobStatus.PENDING, EventType.RELEASE, reason="stopping"))

    stored = row(pgq, job.id)
    assert (stored.status, stored.retries, stored.run_at, stored.error) == ("pending", 0, job.run_at, None)
    assert claim_one(pgq).attempt == 2


def test_a_snoozed_job_is_due_later_and_pays_nothing(pgq: PgQueue) -> None:
    add(pgq)
    job = claim_one(pgq)

    finish(
        pgq, Transition(job.id, job.claim_token, 1, JobStatus.PENDING, EventType.SNOOZE, delay_seconds=90, reason="z")
    )

    assert row(pgq, job.id).retries == 0
    assert 80 < seconds_until_due(pgq, job.id) <= 90
    assert events(pgq, job.id) == ["snooze"]


@pytest.mark.parametrize("delay", [0.0, 0.25, 1e9, 1e12, 1e300])
def test_a_delay_of_any_length_can_be_written_and_read(pgq: PgQueue, delay: float) -> None:
    """Recording a failure must not be able to fail."""
    add(pgq)
    job = claim_one(pgq)

    assert finish(pgq, retried(job, delay=delay)) == {job.id}

    assert abs(seconds_until_due(pgq, job.id) - min(delay, 100 * 366 * 86_400)) < 30


def test_an_error_with_any_text_can_be_written_and_read(pgq: PgQueue) -> None:
    add(pgq)
    job = claim_one(pgq)
    error = ErrorInfo("a'b\"c", "100 % :x {y} \\u0000 \\ é 😀 \x01", "line\n" * 4_000)

    finish(pgq, replace(retried(job), error=error, reason='it\'s "so": %s'))

    assert row(pgq, job.id).error == error.as_dict()
    assert pgq.job_events(job.id)[0]["error"] == error.as_dict()


# Fences ----------------------------------------------------------------------------------------------------


def every_end(job: ClaimedJob) -> list[Transition]:
    """Everything a worker may write about an attempt."""
    ended = Transition(job.id, job.claim_token, job.attempt, JobStatus.CANCELLED, EventType.CANCEL, reason="r")
    return [
        completed(job, '"late"'),
        retried(job, delay=5),
        died(job),
        ended,
        replace(ended, status=JobStatus.PENDING, event=EventType.RELEASE),
        replace(ended, status=JobStatus.PENDING, event=EventType.SNOOZE, delay_seconds=5.0),
    ]


ENDS = range(6)


@pytest.mark.parametrize("end", ENDS)
def test_a_wrong_token_writes_nothing(pgq: PgQueue, end: int) -> None:
    add(pgq)
    job = claim_one(pgq)
    before = everything(pgq)

    written = finish(pgq, replace(every_end(job)[end], claim_token=uuid.uuid4()))

    assert written == set()
    assert everything(pgq) == before


@pytest.mark.parametrize("end", ENDS)
def test_a_job_that_was_claimed_again_is_out_of_reach_of_the_old_claim(pgq: PgQueue, end: int) -> None:
    add(pgq)
    old = claim_one(pgq, worker="old")
    expire(pgq)
    sweep(pgq)
    new = claim_one(pgq, worker="new")
    before = everything(pgq)

    written = finish(pgq, every_end(old)[end])

    assert written == set()
    assert everything(pgq) == before
    assert finish(pgq, completed(new)) == {new.id}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("after", ["completed", "dead", "cancelled", "pending", "deleted"])
def test_a_job_that_is_not_running_takes_nothing_from_its_old_claim(pgq: PgQueue, after: str, end: int) -> None:
    add(pgq)
    job = claim_one(pgq)
    if after == "completed":
        finish(pgq, completed(job))
    elif after == "dead":
        finish(pgq, died(job))
    elif after == "pending":
        finish(pgq, retried(job))
    else:
        pgq.cancel(job.id, force=True)
        if after == "deleted":
            pgq.delete(job.id)
    before = everything(pgq)

    assert finish(pgq, every_end(job)[end]) == set()
    assert everything(pgq) == before


def test_a_late_end_within_an_expired_lease_that_nobody_swept_still_counts(pgq: PgQueue) -> None:
    """The lease only says when others may take the job; until somebody does, the work is not thrown away."""
    add(pgq)
    job = claim_one(pgq)
    expire(pgq)

    assert finish(pgq, completed(job)) == {job.id}


def test_of_a_batch_only_the_lost_jobs_are_left_out(pgq: PgQueue) -> None:
    add(pgq, 6)
    jobs = claim(pgq, limit=6)
    lost = jobs[1], jobs[4]
    expire(pgq, [job.id for job in lost])
    sweep(pgq)
    before = {job.id: row(pgq, job.id) for job in lost}

    written = finish(
        pgq, completed(jobs[0]), completed(jobs[1]), retried(jobs[2]), died(jobs[3]), died(jobs[4]), completed(jobs[5])
    )

    assert written == {jobs[0].id, jobs[2].id, jobs[3].id, jobs[5].id}
    assert [statuses(pgq)[job.id] for job in jobs] == [
        "completed",
        "pending",
        "pending",
        "dead",
        "pending",
        "completed",
    ]
    assert {job.id: row(pgq, job.id) for job in lost} == before
    assert events(pgq, jobs[4].id) == ["sweep"]


def test_two_ends_of_the_same_claim_in_one_batch_are_one(pgq: PgQueue) -> None:
    add(pgq)
    job = claim_one(pgq)

    finish(pgq, retried(job), died(job), retried(job))

    assert events(pgq, job.id) == ["retry"]
    assert row(pgq, job.id).retries == 1


@pytest.mark.parametrize("old_first", [True, False])
def test_ends_of_an_old_and_a_new_claim_in_one_batch_each_meet_the_fence(pgq: PgQueue, old_first: bool) -> None:
    """As for a worker that lost a job, claimed it again, and writes both ends at once."""
    add(pgq)
    old = claim_one(pgq)
    expire(pgq)
    sweep(pgq)
    new = claim_one(pgq)
    ends = [died(old), completed(new, '"new"')]

    finish(pgq, *(ends if old_first else reversed(ends)))

    stored = row(pgq, new.id)
    assert (stored.status, stored.result) == ("completed", "new")
    assert events(pgq, new.id) == ["sweep"]


def test_an_empty_batch_writes_nothing(pgq: PgQueue) -> None:
    add(pgq)
    before = everything(pgq)

    assert finish(pgq) == set()
    assert everything(pgq) == before


def test_a_large_batch_is_written_whole(pgq: PgQueue) -> None:
    add(pgq, 1_500)
    jobs = claim(pgq, limit=1_500)

    written = finish(pgq, *(completed(job, str(job.id)) if job.id % 3 else retried(job) for job in jobs))

    assert written == {job.id for job in jobs}
    assert all(job.result == job.id for job in pgq.list_jobs(status="completed", limit=2_000))


def test_a_rolled_back_finish_writes_neither_job_nor_event(pgq: PgQueue) -> None:
    add(pgq, 2)
    first, second = claim(pgq, limit=2)
    before = everything(pgq)

    with pgq.engine.connect() as connection:
        pgq.ack(first, session=connection)
        pgq.nack(second, error="no", session=connection)
        connection.rollback()

    assert everything(pgq) == before
