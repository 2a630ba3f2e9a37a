"""Limits that cannot be kept are refused where they are declared, naming what to do."""

from __future__ import annotations

from typing import Any

import pytest

from pgqueue import ConfigurationError, PerKey, PgQueue, Rate


@pytest.fixture
def queue() -> PgQueue:
    return PgQueue("sqlite:///unused.db")


def work(tenant: int, n: int = 0) -> None: ...


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"concurrency": 0}, r"concurrency of task 'work' must be a whole number of at least 1, got 0"),
        ({"concurrency": -3}, "at least 1, got -3"),
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
        (("tenant", 0), "limit of PerKey must be a whole number of at least 1, got 0"),
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
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1, got 0"),
        ({"max_depth": 0}, "max_depth must be"),
        ({"max_depth": 5, "on_full": "wait"}, "on_full must be 'error', 'block' or 'drop', got 'wait'"),
        ({"on_full": "drop"}, "max_depth and on_full belong together"),
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
        ({"task": "a", "rate": 3.0}, "rate and burst belong together"),
        ({"task": "a", "concurrency": 0}, "at least 1"),
    ],
)
def test_a_change_that_cannot_be_is_refused(pgq: PgQueue, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        pgq.set_limits(**arguments)


@pytest.mark.parametrize("name", ["concurrency_key", "ordering_key", "rate_key"])
@pytest.mark.parametrize("key", ["", "x" * 513, 5, "a\0b", "\ud800"])
def test_a_key_that_cannot_be_stored_is_refused(queue: PgQueue, name: str, key: Any) -> None:
    task = queue.task(work)

    with pytest.raises(ConfigurationError, match=name):
        task.using(**{name: key})
