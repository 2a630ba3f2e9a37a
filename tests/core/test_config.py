"""A setting that cannot work is refused where it is made, with its rule."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest

from pgqueue import ConfigurationError, WorkerConfig
from pgqueue.config import DEFAULT_CONCURRENCY, checked_lease, checked_schema, parse_queues


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"queues": {}}, "a worker needs at least one queue"),
        ({"queues": {"a b": 1}}, "queue name must be 1 to 128 letters"),
        ({"queues": {"a": 0}}, "concurrency of queue 'a' must be a whole number between 1 and 1000, got 0"),
        ({"queues": {"a": -1}}, "concurrency of queue 'a' must be a whole number between 1 and 1000, got -1"),
        ({"queues": {"a": 1001}}, "concurrency of queue 'a' must be a whole number between 1 and 1000, got 1001"),
        ({"queues": {"a": 1.5}}, "concurrency of queue 'a' must be a whole number between 1 and 1000, got 1.5"),
        ({"queues": {"a": True}}, "concurrency of queue 'a' must be a whole number between 1 and 1000, got True"),
        ({"lease": 0.1}, "lease must be at least 0.5 seconds and at most 3162240000, got 0.1"),
        ({"lease": math.inf}, "lease must be at least 0.5 seconds and at most 3162240000, got inf"),
        ({"lease": math.nan}, "lease must be at least 0.5 seconds and at most 3162240000, got nan"),
        (
            {"lease": 10, "heartbeat_interval": 0},
            "heartbeat_interval must be more than 0 and at most half of the lease",
        ),
        (
            {"lease": 10, "heartbeat_interval": 6},
            "heartbeat_interval must be more than 0 and at most half of the lease",
        ),
        ({"poll_interval": 0}, "poll_interval must be more than 0 seconds, got 0"),
        ({"poll_interval": math.nan}, "poll_interval must be more than 0 seconds, got nan"),
        ({"sweep_interval": -1}, "sweep_interval must be more than 0 seconds, got -1"),
        ({"shutdown_timeout": -1}, "shutdown_timeout must be 0 seconds or more, got -1"),
        ({"shutdown_timeout": math.inf}, "shutdown_timeout must be 0 seconds or more, got inf"),
        ({"prefetch": -1}, "prefetch must be between 0 and 10000, got -1"),
        ({"prefetch": 10_001}, "prefetch must be between 0 and 10000, got 10001"),
        ({"max_jobs": 0}, "max_jobs must be at least 1, got 0"),
        ({"max_jobs": 1.5}, "max_jobs must be a whole number, got 1.5"),
        ({"max_jobs": True}, "max_jobs must be a whole number, got True"),
        ({"prefetch": "5"}, "prefetch must be a whole number, got '5'"),
        ({"lease": "5s"}, "lease must be a number of seconds, got '5s'"),
        ({"lease": None}, "lease must be a number of seconds, got None"),
        ({"lease": True}, "lease must be a number of seconds, got True"),
        ({"poll_interval": timedelta(seconds=1)}, "poll_interval must be a number of seconds, got datetime.timedelta"),
        ({"poll_interval": 1e300}, "poll_interval must be more than 0 seconds"),
        ({"drain": "no"}, "drain must be True or False, got 'no'"),
        ({"listen": 0}, "listen must be True or False, got 0"),
        ({"queues": ["a"]}, "queues must map names to how many jobs at once, got ['a']"),
        ({"name": ""}, "name must be a text of printable characters, got ''"),
        ({"name": "a\0"}, "name must be a text of printable characters"),
    ],
)
def test_an_impossible_worker_setting_is_refused_with_its_rule(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        WorkerConfig(**settings)

    assert rule in str(refused.value)


def test_the_heartbeat_is_a_third_of_the_lease_unless_given() -> None:
    assert WorkerConfig(lease=30).heartbeat_seconds == 10
    assert WorkerConfig(lease=30, heartbeat_interval=2).heartbeat_seconds == 2


def test_zero_is_a_possible_shutdown_timeout_and_prefetch() -> None:
    config = WorkerConfig(shutdown_timeout=0, prefetch=0)

    assert (config.shutdown_timeout, config.prefetch) == (0, 0)


@pytest.mark.parametrize("seconds", [0.5, 1, 3600])
def test_a_lease_of_half_a_second_or_more_is_taken(seconds: float) -> None:
    assert checked_lease(seconds) == seconds


# Queues ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specifications", "queues"),
    [
        (["a"], {"a": DEFAULT_CONCURRENCY}),
        (["a=4"], {"a": 4}),
        (["a=4", "b"], {"a": 4, "b": DEFAULT_CONCURRENCY}),
        (["a=4,b=2", "c=1"], {"a": 4, "b": 2, "c": 1}),
        (["a=4, b=2"], {"a": 4, "b": 2}),
        ([], {}),
    ],
)
def test_queues_are_named_with_or_without_a_concurrency(specifications: list[str], queues: dict[str, int]) -> None:
    assert parse_queues(specifications, DEFAULT_CONCURRENCY) == queues


@pytest.mark.parametrize(
    ("specification", "rule"),
    [
        ("", "queue name must be 1 to 128 letters"),
        ("a=", "queue 'a=': expected NAME or NAME=CONCURRENCY"),
        ("a=x", "queue 'a=x': expected NAME or NAME=CONCURRENCY"),
        ("a=-1", "queue 'a=-1': expected NAME or NAME=CONCURRENCY"),
        ("a=1.5", "queue 'a=1.5': expected NAME or NAME=CONCURRENCY"),
        ("a=²", "queue 'a=²': expected NAME or NAME=CONCURRENCY"),
        ("a;b=1", "queue name must be 1 to 128 letters"),
        ("a,a", "queue 'a' is named twice"),
        ("a=1,a=2", "queue 'a' is named twice"),
    ],
)
def test_a_queue_that_cannot_be_read_is_refused(specification: str, rule: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_queues([specification], 1)

    assert rule in str(refused.value)


# Schemas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pgqueue", "tenant_1", "_q", "a" * 48])
def test_a_plain_schema_name_is_taken(name: str) -> None:
    assert checked_schema(name) == name


@pytest.mark.parametrize(
    "name", ["", "a-b", 'a"b', "a'b", "a;b", "a b", "A", "1a", "pg_queue", "ä", "a" * 49, "a.b", None, 5]
)
def test_a_schema_name_that_would_need_quoting_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="schema must be at most 48 lower-case letters"):
        checked_schema(name)
