"""Which of the due jobs may start now, where limits have to be kept: policy, as a pure function.

A claim under limits hands over the due jobs in the order of claims, and what is in use at that moment. The answer
says which may start, and what each of the others waits for. A job that waits is out of the way of later claims
until what it waits for comes free.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, NamedTuple

from pgqueue.errors import ConfigurationError
from pgqueue.retry import DELAY_SECONDS_MAX

Period = Literal["second", "minute", "hour", "day"]
OnFull = Literal["error", "block", "drop"]

_PERIOD_SECONDS: dict[str, float] = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86_400.0}

#: The largest limit: the column is an integer.
LIMIT_MAX = 2**31 - 1

#: Clocks count in milliseconds: a token that lacks so little has come. What is lacking stays owed.
TOKEN_TOLERANCE = 0.001

#: A job with this waits for an earlier job of its ordering key,
WAITS_FOR_ORDER = "order"
#: for a job of its task to end,
WAITS_FOR_TASK = "task"
#: for one of its task and concurrency key to end,
WAITS_FOR_KEY = "key:"
#: or for a token of its task and rate key.
WAITS_FOR_RATE = "rate:"


@dataclass(frozen=True, slots=True)
class PerKey:
    """A limit for each value of one of the task's parameters: ``PerKey("tenant", 2)``.

    field: the parameter's name.
    limit: how many jobs with the same value may run at once.
    total: how many jobs of the task altogether; None: any number.
    """

    field: str
    limit: int
    total: int | None = None

    def __post_init__(self) -> None:
        checked_limit("limit of PerKey", self.limit)
        if self.total is not None:
            checked_limit("total of PerKey", self.total)
            if self.total < self.limit:
                raise ConfigurationError(
                    f"PerKey({self.field!r}, {self.limit}, total={self.total}): the total is less than what one key "
                    "may have; make the limit smaller or the total larger"
                )


@dataclass(frozen=True, slots=True)
class Rate:
    """How many jobs may start in a time, as a token bucket: ``Rate(100, per="minute")``.

    count, per: how many in the long run, in a second, minute, hour or day, or in so many seconds.
    burst: how many may start at once after a quiet time. With 1, the default, they start evenly spread, and never
    more than `count` (and one) in any such time.
    key: a parameter of the task; each of its values has a bucket of its own.
    """

    count: float
    per: Period | float | timedelta = "second"
    burst: int = 1
    key: str | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.count) or not 0 < self.count <= LIMIT_MAX:
            raise ConfigurationError(
                f"count of Rate must be a number more than 0 and at most {LIMIT_MAX}, got {self.count!r}"
            )
        if isinstance(self.per, str) and self.per not in _PERIOD_SECONDS:
            raise ConfigurationError(f"per of Rate must be {', '.join(_PERIOD_SECONDS)} or seconds, got {self.per!r}")
        if not isinstance(self.per, str | timedelta) and not _is_number(self.per):
            raise ConfigurationError(f"per of Rate must be {', '.join(_PERIOD_SECONDS)} or seconds, got {self.per!r}")
        if not 0 < self.seconds <= DELAY_SECONDS_MAX:
            raise ConfigurationError(
                f"per of Rate must be more than 0 and at most {DELAY_SECONDS_MAX:.0f} seconds, got {self.per!r}"
            )
        checked_limit("burst of Rate", self.burst)
        _check_bucket(self.per_second, self.burst)

    @property
    def seconds(self) -> float:
        if isinstance(self.per, str):
            return _PERIOD_SECONDS[self.per]
        return self.per.total_seconds() if isinstance(self.per, timedelta) else float(self.per)

    @property
    def per_second(self) -> float:
        return self.count / self.seconds


@dataclass(frozen=True, slots=True)
class Limits:
    """What a queue or a task is limited to; None: not limited in that way."""

    concurrency: int | None = None  #: jobs running at once, of all workers together
    key_concurrency: int | None = None  #: the same, of each concurrency key
    rate: float | None = None  #: jobs started per second in the long run, for each rate key
    burst: int | None = None  #: jobs that may start at once after a quiet time; with a rate
    max_depth: int | None = None  #: pending jobs of a queue beyond which an enqueue is refused
    on_full: OnFull | None = None  #: what an enqueue does then
    promote_after: float | None = None  #: seconds after which a due job of a queue goes before all others

    def __post_init__(self) -> None:
        for name in ("concurrency", "key_concurrency", "burst", "max_depth"):
            if getattr(self, name) is not None:
                checked_limit(name, getattr(self, name))
        for name in ("rate", "promote_after"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= LIMIT_MAX):
                raise ConfigurationError(f"{name} must be a number more than 0 and at most {LIMIT_MAX}, got {value!r}")
        if (self.rate is None) != (self.burst is None):
            raise ConfigurationError("rate and burst belong together: give both or neither")
        if self.rate is not None and self.burst is not None:
            _check_bucket(self.rate, self.burst)
        if self.on_full is not None and self.on_full not in ("error", "block", "drop"):
            raise ConfigurationError(f"on_full must be 'error', 'block' or 'drop', got {self.on_full!r}")
        if (self.max_depth is None) != (self.on_full is None):
            raise ConfigurationError("max_depth and on_full belong together: give both or neither")

    @property
    def holds_slots(self) -> bool:
        return self.concurrency is not None or self.key_concurrency is not None


def checked_limit(name: str, limit: object) -> int:
    if isinstance(limit, int) and not isinstance(limit, bool) and 1 <= limit <= LIMIT_MAX:
        return limit
    raise ConfigurationError(f"{name} must be a whole number of at least 1 and at most {LIMIT_MAX}, got {limit!r}")


def _check_bucket(per_second: float, burst: int) -> None:
    """Refuse what would be full again at a moment that no database knows."""
    if burst > per_second * DELAY_SECONDS_MAX:
        raise ConfigurationError(
            f"at {per_second:g} jobs a second it would take more than {DELAY_SECONDS_MAX:.0f} seconds until "
            f"{burst} may start at once (burst): make the rate larger, or the burst smaller"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# The decision ----------------------------------------------------------------------------------------------

Bucket = tuple[str, str, str]  # queue or task, its name, the rate key


class Candidate(NamedTuple):
    """A due job that a claim might take."""

    id: int
    task: str
    concurrency_key: str | None = None
    ordering_key: str | None = None
    rate_key: str | None = None
    tracked: bool = False  #: whether it was offered a slot, or held one whose end others wait for


@dataclass(frozen=True, slots=True)
class InUse:
    """What is in use when the decision is made."""

    queue: int = 0  #: slots of the queue's limit
    tasks: Mapping[str, int] = field(default_factory=dict)  #: slots of each task's limit
    keys: Mapping[tuple[str, str], int] = field(default_factory=dict)  #: of each task and concurrency key
    tokens: Mapping[Bucket, float] = field(default_factory=dict)  #: left in each bucket; a missing one is full
    leaders: Mapping[str, int] = field(default_factory=dict)  #: of each ordering key, the job that runs or is next


@dataclass(slots=True)
class Admission:
    """The decision."""

    admitted: list[int] = field(default_factory=list)
    waits: dict[int, str] = field(default_factory=dict)  #: what each of these jobs waits for
    behind: dict[int, int] = field(default_factory=dict)  #: of those that wait for their turn: the job they wait for
    spent: dict[Bucket, int] = field(default_factory=dict)  #: tokens
    wanting: set[Bucket] = field(default_factory=set)  #: buckets that jobs wait for


def admit(
    candidates: Sequence[Candidate],
    *,
    want: int,
    queue_name: str,
    queue: Limits | None,
    tasks: Mapping[str, Limits],
    in_use: InUse,
) -> Admission:
    """Which of the candidates, in their order, may start: `want` of them at most.

    Jobs after the last one that was wanted, or that the queue's own limits let through, are not judged.
    """
    decision = Admission()
    queue_slots = math.inf if queue is None or queue.concurrency is None else queue.concurrency - in_use.queue
    task_running, key_running = dict(in_use.tasks), dict(in_use.keys)

    def has_token(bucket: Bucket, limits: Limits) -> bool:
        if in_use.tokens.get(bucket, limits.burst or 0) - decision.spent.get(bucket, 0) >= 1 - TOKEN_TOLERANCE:
            return True
        decision.wanting.add(bucket)
        return False

    def spend(bucket: Bucket) -> None:
        decision.spent[bucket] = decision.spent.get(bucket, 0) + 1

    of_queue: Bucket = ("queue", queue_name, "")
    queue_with_rate = queue if queue is not None and queue.rate is not None else None
    for job in candidates:
        if len(decision.admitted) >= want or len(decision.admitted) >= queue_slots:
            break
        if queue_with_rate is not None and not has_token(of_queue, queue_with_rate):
            break
        if job.ordering_key is not None:
            leader = in_use.leaders.get(job.ordering_key, job.id)
            if leader != job.id:
                decision.waits[job.id] = WAITS_FOR_ORDER
                decision.behind[job.id] = leader
                continue
        limits = tasks.get(job.task)
        if limits is not None:
            if limits.concurrency is not None:
                running = task_running.get(job.task, 0)
                if running >= limits.concurrency:
                    decision.waits[job.id] = WAITS_FOR_TASK
                    continue
            key = None
            if limits.key_concurrency is not None and job.concurrency_key is not None:
                key = (job.task, job.concurrency_key)
                if key_running.get(key, 0) >= limits.key_concurrency:
                    decision.waits[job.id] = WAITS_FOR_KEY + job.concurrency_key
                    continue
            if limits.rate is not None:
                of_task: Bucket = ("task", job.task, job.rate_key or "")
                if not has_token(of_task, limits):
                    decision.waits[job.id] = WAITS_FOR_RATE + (job.rate_key or "")
                    continue
                spend(of_task)
            if limits.concurrency is not None:
                task_running[job.task] = running + 1
            if key is not None:
                key_running[key] = key_running.get(key, 0) + 1
        decision.admitted.append(job.id)
        if queue_with_rate is not None:
            spend(of_queue)
    return decision
