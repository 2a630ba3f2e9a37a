"""When a failed attempt is tried again: the policy as a pure function."""

from __future__ import annotations

import math
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqueue import ConfigurationError, Retry
from pgqueue.job import (
    Cancelled,
    ClaimedJob,
    Completed,
    Discarded,
    ErrorInfo,
    EventType,
    Failed,
    JobStatus,
    Outcome,
    Released,
    Snoozed,
)
from pgqueue.retry import DELAY_SECONDS_MAX, decide

BOOM = ErrorInfo("ValueError", "boom")

seconds = st.floats(min_value=0, max_value=DELAY_SECONDS_MAX)
policies = st.builds(
    Retry,
    backoff=st.sampled_from(["exponential", "linear", "constant"]),
    base=seconds,
    cap=seconds,
    jitter=st.booleans(),
)
retry_numbers = st.integers(min_value=1, max_value=32767)
randoms = st.floats(min_value=0, max_value=1, exclude_max=True)


def claimed(retries: int = 0, max_retries: int = 3) -> ClaimedJob:
    now = datetime.now(UTC)
    return ClaimedJob(7, "default", "t", "{}", 0, now, retries + 1, retries, max_retries, "w", uuid.uuid4(), now, "{}")


@given(policies, retry_numbers, randoms)
def test_a_delay_lies_between_zero_and_the_cap(policy: Retry, retry: int, random: float) -> None:
    assert 0 <= policy.delay(retry, random) <= policy.cap


@given(policies, retry_numbers, randoms)
def test_a_later_retry_never_waits_less_for_the_same_random_number(policy: Retry, retry: int, random: float) -> None:
    assert policy.delay(retry, random) <= policy.delay(retry + 1, random)


@given(policies, retry_numbers, randoms)
def test_jitter_draws_from_the_upper_half_of_the_wait(policy: Retry, retry: int, random: float) -> None:
    whole = Retry(backoff=policy.backoff, base=policy.base, cap=policy.cap, jitter=False).delay(retry, random)
    jittered = Retry(backoff=policy.backoff, base=policy.base, cap=policy.cap, jitter=True).delay(retry, random)

    assert whole / 2 <= jittered <= whole


@given(retry_numbers, randoms, randoms)
def test_without_jitter_the_random_number_does_not_matter(retry: int, one: float, other: float) -> None:
    policy = Retry(jitter=False)

    assert policy.delay(retry, one) == policy.delay(retry, other)


@pytest.mark.parametrize(
    ("policy", "waits"),
    [
        (Retry(backoff="exponential", base=2, cap=300, jitter=False), [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]),
        (Retry(backoff="linear", base=10, cap=35, jitter=False), [10, 20, 30, 35, 35]),
        (Retry(backoff="constant", base=7, jitter=False), [7, 7, 7]),
        (Retry(backoff="constant", base=timedelta(minutes=30), jitter=False), [1800, 1800]),
        (Retry(backoff="constant", base=1800, cap=timedelta(minutes=10), jitter=False), [600, 600]),
        (Retry(backoff="exponential", base=200, jitter=False), [200, 300, 300]),
        (Retry(backoff=lambda n: n * n, cap=10, jitter=False), [1, 4, 9, 10]),
        (Retry(backoff=lambda n: timedelta(minutes=n), cap=90, jitter=False), [60, 90]),
        (Retry(backoff="exponential", base=0, jitter=False), [0] * 2000),
    ],
    ids=[
        "exponential",
        "linear",
        "constant",
        "half an hour",
        "capped",
        "default cap",
        "function",
        "function-timedelta",
        "no-wait",
    ],
)
def test_each_backoff_waits_as_documented(policy: Retry, waits: list[float]) -> None:
    assert [policy.delay(retry, 0.5) for retry in range(1, len(waits) + 1)] == waits


def test_a_power_too_large_for_a_float_waits_the_cap() -> None:
    policy = Retry(base=1e9, cap=60.0, jitter=False)

    assert policy.delay(32767, 0.0) == 60.0


def _raises(retry: int) -> float:
    raise KeyError("no such retry")


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        (_raises, 90.0),
        (lambda retry: None, 90.0),
        (lambda retry: "soon", 90.0),
        (lambda retry: math.nan, 90.0),
        (lambda retry: math.inf, 90.0),
        (lambda retry: -5.0, 0.0),
    ],
    ids=["raises", "none", "string", "nan", "infinity", "negative"],
)
def test_a_backoff_function_gone_wrong_still_gives_a_delay(backoff: Any, expected: float) -> None:
    assert Retry(backoff=backoff, cap=90.0, jitter=False).delay(1, 0.0) == expected


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"max_retries": -1}, "max_retries must be a whole number between 0 and 32767, got -1"),
        ({"max_retries": 32768}, "max_retries must be a whole number between 0 and 32767, got 32768"),
        ({"max_retries": 1.5}, "max_retries must be a whole number between 0 and 32767, got 1.5"),
        ({"max_retries": True}, "max_retries must be a whole number between 0 and 32767, got True"),
        ({"backoff": "cubic"}, "backoff must be 'exponential', 'linear', 'constant' or a function"),
        ({"base": -1}, "base must be a number of seconds between 0 and 3162240000, or a timedelta, got -1"),
        ({"base": "2"}, "base must be a number of seconds between 0 and 3162240000, or a timedelta, got '2'"),
        ({"base": True}, "base must be a number of seconds"),
        ({"base": timedelta(seconds=-1)}, "base must be a number of seconds"),
        ({"cap": True}, "cap must be a number of seconds"),
        ({"cap": 10**400}, "cap must be a number of seconds"),
        ({"jitter": "yes"}, "jitter must be True or False, got 'yes'"),
        ({"cap": math.inf}, "cap must be a number of seconds between 0 and 3162240000, or a timedelta, got inf"),
        ({"cap": math.nan}, "cap must be a number of seconds between 0 and 3162240000, or a timedelta, got nan"),
    ],
)
def test_an_impossible_policy_is_refused_with_its_rule(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Retry(**settings)

    assert rule in str(refused.value)


def test_a_policy_without_retries_is_possible() -> None:
    assert Retry(max_retries=0).max_retries == 0


# decide ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1, 3])
@pytest.mark.parametrize(
    ("outcome", "status", "event"),
    [
        (Completed(), JobStatus.COMPLETED, None),
        (Completed('"x"'), JobStatus.COMPLETED, None),
        (Discarded("bad", BOOM), JobStatus.DEAD, EventType.DEAD),
        (Cancelled("unwanted"), JobStatus.CANCELLED, EventType.CANCEL),
        (Snoozed(5.0, "later"), JobStatus.PENDING, EventType.SNOOZE),
        (Released("stopping"), JobStatus.PENDING, EventType.RELEASE),
    ],
)
def test_outcomes_other_than_failure_charge_no_retry_however_many_are_left(
    outcome: Outcome, status: JobStatus, event: EventType | None, retries: int
) -> None:
    job = claimed(retries, max_retries=3)

    transition = decide(job, outcome, Retry(), random=0.5)

    assert (transition.status, transition.event, transition.charge_retry) == (status, event, False)
    assert (transition.job_id, transition.claim_token, transition.attempt) == (job.id, job.claim_token, job.attempt)


@given(st.integers(0, 50), st.integers(0, 50), randoms)
def test_a_failure_is_retried_exactly_while_retries_are_left(retries: int, max_retries: int, random: float) -> None:
    policy = Retry()

    transition = decide(claimed(retries, max_retries), Failed(BOOM), policy, random)

    assert transition.error == BOOM
    if retries < max_retries:
        assert (transition.status, transition.event) == (JobStatus.PENDING, EventType.RETRY)
        assert transition.charge_retry
        assert transition.delay_seconds == policy.delay(retries + 1, random)
    else:
        assert (transition.status, transition.event) == (JobStatus.DEAD, EventType.DEAD)
        assert not transition.charge_retry


def test_the_allowance_is_the_jobs_own_not_the_policys() -> None:
    transition = decide(claimed(0, max_retries=0), Failed(BOOM), Retry(max_retries=9), random=0.5)

    assert transition.status is JobStatus.DEAD
    assert transition.reason == "no retries allowed"


outcomes = st.one_of(
    st.just(Completed()),
    st.builds(Failed, st.just(BOOM), st.none() | seconds),
    st.builds(Snoozed, seconds, st.text(), st.none() | st.just(BOOM)),
    st.builds(Discarded, st.text(), st.just(BOOM)),
    st.builds(Cancelled, st.text()),
    st.builds(Released, st.text(), st.none() | seconds),
)


@given(outcomes, st.integers(0, 5), st.integers(0, 5), policies, randoms)
def test_every_outcome_becomes_one_fenced_write_that_keeps_the_books(
    outcome: Outcome, retries: int, max_retries: int, policy: Retry, random: float
) -> None:
    job = claimed(retries, max_retries)

    written = decide(job, outcome, policy, random)

    assert (written.job_id, written.claim_token, written.attempt) == (job.id, job.claim_token, job.attempt)
    assert (written.event is None) == (written.status is JobStatus.COMPLETED) == isinstance(outcome, Completed)
    # A retry is charged exactly for a failure that is tried again, and never beyond the allowance.
    assert written.charge_retry == (written.event is EventType.RETRY)
    assert written.charge_retry == (isinstance(outcome, Failed) and retries < max_retries)
    assert written.delay_seconds is None or (written.status is JobStatus.PENDING and written.delay_seconds >= 0)
    if written.charge_retry and outcome.delay_seconds is not None:  # type: ignore[union-attr]
        assert written.delay_seconds == outcome.delay_seconds  # type: ignore[union-attr]
    # What went wrong is never lost, and never made up.
    assert written.error == getattr(outcome, "error", None)
    assert written.reason is not None or written.event is None


@given(outcomes, st.integers(0, 5), st.integers(0, 5), policies, randoms)
def test_a_job_that_was_asked_to_stop_is_cancelled_unless_it_completed(
    outcome: Outcome, retries: int, max_retries: int, policy: Retry, random: float
) -> None:
    job = claimed(retries, max_retries)
    job.cancel_requested = True

    written = decide(job, outcome, policy, random)

    assert (written.job_id, written.claim_token, written.attempt) == (job.id, job.claim_token, job.attempt)
    if isinstance(outcome, Completed):
        assert (written.status, written.event) == (JobStatus.COMPLETED, None)
    else:
        assert (written.status, written.event) == (JobStatus.CANCELLED, EventType.CANCEL)
    assert (written.charge_retry, written.delay_seconds) == (False, None)
    assert written.error == getattr(outcome, "error", None)


def test_reasons_tell_where_a_job_stands() -> None:
    policy = Retry(base=2, jitter=False)

    assert decide(claimed(1), Failed(BOOM), policy, 0.0).reason == "retry 2 of 3 in 4.0 s"
    assert decide(claimed(3), Failed(BOOM), policy, 0.0).reason == "3 of 3 retries used"


def test_a_snooze_and_a_release_carry_their_delay() -> None:
    assert decide(claimed(), Snoozed(5.0, "later"), Retry(), 0.0).delay_seconds == 5.0
    assert decide(claimed(), Released("r", 2.0), Retry(), 0.0).delay_seconds == 2.0
    assert decide(claimed(), Released("r"), Retry(), 0.0).delay_seconds is None
