"""What a policy makes of an error, by its class."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqueue import ConfigurationError, Retry, RetryAfter, Snooze
from pgqueue.executor import cancelled_itself, outcome_of, timed_out
from pgqueue.job import Discarded, ErrorInfo, Failed, Snoozed
from pgqueue.retry import DELAY_SECONDS_MAX

BOOM = ErrorInfo("shop.Boom", "boom")


class Refused(Exception): ...


class RefusedForNow(Refused): ...


class Busy(RefusedForNow, ConnectionError): ...


CLASSES: list[type[BaseException]] = [Exception, OSError, ConnectionError, Refused, RefusedForNow, Busy, KeyError]


def verdict(policy: Retry, kind: type[BaseException]) -> str:
    match policy.judge(kind, BOOM):
        case Failed():
            return "retry"
        case Discarded():
            return "discard"
        case Snoozed(delay):
            return f"snooze {delay:g}"


@pytest.mark.parametrize(
    ("policy", "kind", "expected"),
    [
        (Retry(), Refused, "retry"),
        (Retry(discard_on=Refused), Refused, "discard"),
        (Retry(discard_on=(Refused,)), RefusedForNow, "discard"),
        (Retry(discard_on=(RefusedForNow,)), Refused, "retry"),
        (Retry(snooze_on={Refused: 30}), Busy, "snooze 30"),
        (Retry(snooze_on={Refused: timedelta(minutes=2)}), Refused, "snooze 120"),
        (Retry(retry_on=ConnectionError), Busy, "retry"),
        (Retry(retry_on=[ConnectionError]), Refused, "discard"),
        (Retry(retry_on=(OSError,), snooze_on={Refused: 5}), RefusedForNow, "snooze 5"),
        (Retry(discard_on=(Refused,), snooze_on={RefusedForNow: 5}), Busy, "snooze 5"),
        (Retry(discard_on=(Refused,), snooze_on={RefusedForNow: 5}), Refused, "discard"),
        (Retry(discard_on=(Refused,), retry_on=(RefusedForNow,)), Busy, "retry"),
        (Retry(discard_on=(Exception,), retry_on=(Refused,)), KeyError, "discard"),
        # Of two unrelated ancestors, the one that Python would ask first.
        (Retry(discard_on=(ConnectionError,), snooze_on={RefusedForNow: 5}), Busy, "snooze 5"),
    ],
)
def test_the_most_specific_class_decides_what_becomes_of_an_error(
    policy: Retry, kind: type[BaseException], expected: str
) -> None:
    assert verdict(policy, kind) == expected


@given(st.permutations(CLASSES), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.sampled_from(CLASSES))
def test_an_error_follows_the_first_of_its_ancestors_that_is_named(
    order: list[type[BaseException]], retry: int, discard: int, snooze: int, kind: type[BaseException]
) -> None:
    retry_on = tuple(order[:retry])
    discard_on = tuple(order[retry : retry + discard])
    snooze_on = dict.fromkeys(order[retry + discard :][:snooze], 7.0)
    policy = Retry(retry_on=retry_on or None, discard_on=discard_on, snooze_on=snooze_on)

    decided = verdict(policy, kind)

    named = [ancestor for ancestor in kind.__mro__ if ancestor in {*retry_on, *discard_on, *snooze_on}]
    if not named:
        assert decided == ("discard" if retry_on else "retry")
    else:
        expected = {**dict.fromkeys(retry_on, "retry"), **dict.fromkeys(discard_on, "discard")}
        assert decided == expected.get(named[0], "snooze 7")


def test_every_verdict_keeps_the_error_and_names_the_setting_that_decided() -> None:
    discarded = Retry(discard_on=Refused).judge(Refused, BOOM)
    unnamed = Retry(retry_on=KeyError).judge(Refused, BOOM)
    snoozed = Retry(snooze_on={Refused: 90}).judge(Refused, BOOM)

    assert discarded == Discarded("shop.Boom is not to be retried (discard_on)", BOOM)
    assert unnamed == Discarded("shop.Boom is not among the errors to be retried (retry_on)", BOOM)
    assert snoozed == Snoozed(90.0, "shop.Boom: runs again in 90 s (snooze_on)", BOOM)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(lambda policy: timed_out(policy, 3.0), TimeoutError), (cancelled_itself, asyncio.CancelledError)],
    ids=["timeout", "cancelled-itself"],
)
def test_what_ends_an_attempt_without_being_raised_by_it_is_judged_by_its_class(
    make: Callable[[Retry], Any], kind: type[BaseException]
) -> None:
    assert isinstance(make(Retry(discard_on=kind)), Discarded)
    assert isinstance(make(Retry(snooze_on={kind: 1})), Snoozed)
    assert isinstance(make(Retry()), Failed)


def test_retry_after_is_a_failure_with_a_delay_whatever_the_policy_says() -> None:
    outcome = outcome_of(RetryAfter(timedelta(minutes=1), "HTTP 429"), Retry(retry_on=KeyError, discard_on=Exception))

    assert isinstance(outcome, Failed)
    assert outcome.delay_seconds == 60.0
    assert (outcome.error.type, outcome.error.message) == ("pgqueue.errors.RetryAfter", "HTTP 429")


@pytest.mark.parametrize(
    "delay", [-1, float("nan"), DELAY_SECONDS_MAX + 1, "soon", "5", True, None, timedelta(seconds=-1)]
)
def test_a_delay_that_is_none_is_a_failure_that_says_so(delay: Any) -> None:
    outcome = outcome_of(RetryAfter(delay), Retry())

    assert isinstance(outcome, Failed)
    assert outcome.delay_seconds is None
    assert outcome.error.message == f"RetryAfter needs a delay between 0 and 3162240000 seconds, got {delay}"


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"retry_on": ()}, "retry_on names no error, so nothing would be retried; say max_retries=0"),
        ({"retry_on": "KeyError"}, "retry_on must be an exception class or several of them, got 'KeyError'"),
        ({"retry_on": 3}, "retry_on must be an exception class or several of them, got 3"),
        ({"retry_on": (KeyError("x"),)}, "retry_on must name exception classes, got KeyError('x')"),
        ({"discard_on": (int,)}, "discard_on must name exception classes, got <class 'int'>"),
        ({"discard_on": {KeyError: 3}}, "discard_on must be an exception class or several of them"),
        ({"discard_on": (Snooze,)}, "discard_on names Snooze, which already says how the attempt ends"),
        ({"snooze_on": (KeyError,)}, "snooze_on must map exception classes to seconds or timedeltas, such as {Busy:"),
        ({"snooze_on": {"KeyError": 3}}, "snooze_on must name exception classes, got 'KeyError'"),
        ({"snooze_on": {KeyError: 0}}, "snooze_on of KeyError must be seconds or a timedelta of more than 0"),
        ({"snooze_on": {KeyError: -1}}, "snooze_on of KeyError must be seconds or a timedelta of more than 0"),
        ({"snooze_on": {KeyError: "30"}}, "snooze_on of KeyError must be seconds or a timedelta of more than 0"),
        ({"snooze_on": {KeyError: float("inf")}}, "at most 3162240000 seconds, got inf"),
        (
            {"retry_on": (KeyError,), "discard_on": (OSError, KeyError)},
            "KeyError is in both retry_on and discard_on; which of the two is meant?",
        ),
        ({"discard_on": KeyError, "snooze_on": {KeyError: 3}}, "KeyError is in both discard_on and snooze_on"),
        ({"retry_on": KeyError, "snooze_on": {KeyError: 3}}, "KeyError is in both retry_on and snooze_on"),
    ],
)
def test_an_impossible_choice_of_errors_is_refused_with_its_rule(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Retry(**settings)

    assert rule in str(refused.value)


def test_a_policy_by_error_can_still_be_compared_and_hashed() -> None:
    one = Retry(retry_on=KeyError, snooze_on={OSError: 3})
    same = Retry(retry_on=(KeyError,), snooze_on={OSError: timedelta(seconds=3)})

    assert (one, hash(one)) == (same, hash(same))
