"""Limits that cannot be kept are refused where they are declared, naming what to do."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest

from pgqueue import ConfigurationError, PerKey, PgQueue, Rate
from pgqueue.admission import Limits


@pytest.fixture
def queue() -> PgQueue:
    return PgQueue("sqlite:///unused.db")


def work(tenant: int, n: int = 0) -> None: ...


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"concurrency": 0},
            r"concurrency of task 'work' must be a whole number of at least 1 and at most 2147483647, got 0",
        ),
        ({"concurrency": -3}, "at least 1 and at most 2147483647, got -3"),
        ({"concurrency": 1.5}, "whole number"),
        ({"concurrency": True}, "whole number"),
        ({"concurrency": "4"}, "whole number"),
        ({"concurrency": PerKey("customer", 2)}, r"'customer', which its function does not have; it has tenant, n"),
        ({"rate": 5}, r"rate of task 'work' must be a Rate"),
        ({"rate": Rate(5, key="customer")}, "'customer', which its function does not have"),
        ({"ordered_by": "customer"}, "'customer', which its function does not have"),
        ({"ordered_by": 7}, "names the parameter 7"),
    ],
)
def test_a_task_with_limits_that_cannot_be_is_refused(queue: PgQueue, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        queue.task(**options)(work)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("tenant", 0), "limit of PerKey must be a whole number of at least 1 and at most 2147483647, got 0"),
        (("tenant", 2, 0), "total of PerKey"),
        (("tenant", 5, 3), "the total is less than what one key may have"),
    ],
)
def test_a_limit_per_key_that_cannot_be_is_refused(arguments: tuple[Any, ...], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        PerKey(*arguments)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1 and at most 2147483647, got 0"),
        ({"max_depth": 0}, "max_depth must be"),
        ({"max_depth": 5, "on_full": "wait"}, "on_full must be 'error', 'block' or 'drop', got 'wait'"),
        ({"on_full": "drop"}, "max_depth and on_full belong together"),
        ({"max_depth": 5, "on_full": "block", "block_timeout": -1}, "block_timeout must be between 0 and"),
        ({"max_depth": 5, "on_full": "block", "block_timeout": math.nan}, "block_timeout must be between 0 and"),
        ({"max_depth": 5, "on_full": "block", "block_timeout": "5s"}, "block_timeout must be seconds or a timedelta"),
        ({"promote_after": 0}, "promote_after must be a number more than 0"),
        ({"promote_after": -1.0}, "promote_after must be a number more than 0"),
        ({"rate": Rate(1, key="tenant")}, "cannot have a key"),
        ({"rate": 10}, "must be a Rate"),
    ],
)
def test_a_queue_with_limits_that_cannot_be_is_refused(queue: PgQueue, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        queue.queue("images", **options)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "either a queue or a task"),
        ({"queue": "a", "task": "b"}, "either a queue or a task"),
        ({"queue": "a", "speed": 3}, "got 'speed'"),
        ({"queue": "a", "key_concurrency": 3}, "key_concurrency is a limit of tasks, and 'a' is a queue"),
        ({"task": "a", "promote_after": 3}, "promote_after is a limit of queues, and 'a' is a task"),
        ({"task": "a"}, "name at least one limit to change"),
        ({"task": "a", "burst": 3}, "rate and burst belong together"),
        ({"task": "a", "rate": None, "burst": 3}, "rate and burst belong together"),
        ({"task": "a", "rate": Rate(5, burst=2), "burst": 3}, "not in both"),
        ({"task": "a", "rate": Rate(5, key="n")}, "the key of a rate is declared with the task"),
        ({"task": "a", "rate": 10**400}, "rate must be a number"),
        ({"task": "a", "rate": 1e-300}, "make the rate larger, or the burst smaller"),
        ({"queue": "a", "max_depth": None, "on_full": "drop"}, "max_depth and on_full belong together"),
        ({"queue": "a", "on_full": "drop"}, "max_depth and on_full belong together"),
        ({"queue": "a", "promote_after": "5m"}, "promote_after must be seconds or a timedelta"),
        ({"queue": "a", "promote_after": math.nan}, "promote_after must be a number more than 0"),
        ({"task": "a", "concurrency": 0}, "at least 1"),
    ],
)
def test_a_change_that_cannot_be_is_refused(pgq: PgQueue, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        pgq.set_limits(**arguments)


def test_a_change_of_a_limit_leaves_what_belongs_to_it_as_it_is(pgq: PgQueue) -> None:
    pgq.set_limits(queue="a", max_depth=5, on_full="drop", rate=Rate(60, per="minute", burst=7))
    pgq.set_limits(queue="a", promote_after=timedelta(minutes=1))

    changed = pgq.set_limits(queue="a", max_depth=9, rate=2.0)
    lifted = pgq.set_limits(queue="a", max_depth=None, rate=None, promote_after=None)

    assert changed == Limits(rate=2.0, burst=7, max_depth=9, on_full="drop", promote_after=60.0)
    assert lifted == Limits()


def test_a_change_of_limits_fills_in_the_defaults(pgq: PgQueue) -> None:
    assert pgq.set_limits(queue="a", max_depth=5, rate=2) == Limits(rate=2, burst=1, max_depth=5, on_full="error")


def test_who_reset_limits_and_why_is_on_record(pgq: PgQueue) -> None:
    pgq.set_limits(queue="a", concurrency=5)

    pgq.reset_limits(queue="a", actor="ann", reason="the rush is over")

    with pgq.reading() as connection:
        *_, event = connection.execute(pgq.tables.job_events.select().order_by("id")).all()
    assert (event.actor, event.reason) == ("ann", "no limits: the rush is over")


@pytest.mark.parametrize("name", ["concurrency_key", "ordering_key", "rate_key"])
@pytest.mark.parametrize("key", ["", "x" * 513, 5, "a\0b", "\ud800"])
def test_a_key_that_cannot_be_stored_is_refused(queue: PgQueue, name: str, key: Any) -> None:
    task = queue.task(work)

    with pytest.raises(ConfigurationError, match=name):
        task.using(**{name: key})
