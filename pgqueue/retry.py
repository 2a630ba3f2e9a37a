"""When a failed attempt is tried again, and what becomes of a job after an attempt: policy, as pure functions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from pgqueue.errors import ConfigurationError, TaskSignal
from pgqueue.job import (
    EXPIRED,
    Cancelled,
    ClaimedJob,
    Completed,
    Discarded,
    ErrorInfo,
    EventType,
    Expired,
    Failed,
    JobStatus,
    Outcome,
    Released,
    Snoozed,
    Transition,
)

Backoff = Literal["exponential", "linear", "constant"]

logger = logging.getLogger(__name__)

#: The longest wait, a hundred years: a moment after the year 9999 could be stored, but not be read again.
DELAY_SECONDS_MAX = 100 * 366 * 86_400.0

#: The longest backoff where a policy names none.
CAP_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Retry:
    """How failed attempts of a task are retried. Times are in seconds.

    The n-th retry (n from 1) waits, before jitter and at most `cap`:

    * ``"exponential"``: ``base * 2 ** (n - 1)``; with ``base=2``: 2, 4, 8, 16, …
    * ``"linear"``: ``base * n``
    * ``"constant"``: ``base``
    * a callable: what it returns for n; `cap` when it fails or returns no number

    `base` and `cap` may be timedeltas. Without a `cap` it is 300 seconds, or `base` where that is longer.

    With `jitter` the wait is drawn evenly from the upper half of that ("equal jitter" of M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015): retries of many jobs spread out, and none
    comes at once.

    By the error's class: `discard_on` makes the job dead at once, `snooze_on` runs it again after so long without
    charging a retry, and everything else is retried; or, when `retry_on` is given, only what it names is, and every
    other error makes the job dead at once. Of several classes that fit, the most specific one decides. What the
    task raises to say how its attempt ends (RetryAfter, Snooze, Discard, Cancel) is none of these.
    """

    max_retries: int = 3  #: retries after the first attempt; 0: a failed attempt makes the job dead
    backoff: Backoff | Callable[[int], float | timedelta] = "exponential"
    base: float | timedelta = 2.0
    cap: float | timedelta | None = None
    jitter: bool = True
    retry_on: type[BaseException] | Iterable[type[BaseException]] | None = None  #: None: all
    discard_on: type[BaseException] | Iterable[type[BaseException]] = ()
    snooze_on: Mapping[type[BaseException], float | timedelta] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checked_max_retries(self.max_retries)
        if not callable(self.backoff) and self.backoff not in ("exponential", "linear", "constant"):
            raise ConfigurationError(
                "backoff must be 'exponential', 'linear', 'constant' or a function from the retry's number "
                f"to seconds, got {self.backoff!r}"
            )
        object.__setattr__(self, "base", _checked_wait("base", self.base))
        cap = max(CAP_SECONDS, as_seconds(self.base)) if self.cap is None else _checked_wait("cap", self.cap)
        object.__setattr__(self, "cap", cap)
        if not isinstance(self.jitter, bool):
            raise ConfigurationError(f"jitter must be True or False, got {self.jitter!r}")
        if self.retry_on is not None:
            object.__setattr__(self, "retry_on", _checked_errors("retry_on", self.retry_on))
            if not self.retry_on:
                raise ConfigurationError("retry_on names no error, so nothing would be retried; say max_retries=0")
        object.__setattr__(self, "discard_on", _checked_errors("discard_on", self.discard_on))
        object.__setattr__(self, "snooze_on", _checked_snoozes(self.snooze_on))
        self._refuse_contradictions()

    def delay(self, retry: int, random: float) -> float:
        """Seconds to wait before the `retry`-th retry (from 1); `random` in [0, 1) decides the jitter."""
        assert isinstance(self.base, float)
        assert isinstance(self.cap, float)
        if callable(self.backoff):
            wait = self._call(self.backoff, retry, self.cap)
        elif self.backoff == "exponential":
            try:
                wait = math.ldexp(self.base, retry - 1)
            except OverflowError:
                wait = self.cap
        elif self.backoff == "linear":
            wait = self.base * retry
        else:
            wait = self.base
        wait = min(max(wait, 0.0), self.cap)
        return wait * ((1 + random) / 2) if self.jitter else wait

    def judge(self, kind: type[BaseException], error: ErrorInfo) -> Failed | Discarded | Snoozed:
        """How an attempt ended that raised an error of class `kind`."""
        assert isinstance(self.discard_on, tuple)
        assert self.retry_on is None or isinstance(self.retry_on, tuple)
        for ancestor in kind.__mro__:
            if ancestor in self.snooze_on:
                delay = as_seconds(self.snooze_on[ancestor])
                return Snoozed(delay, f"{error.type}: runs again in {delay:g} s (snooze_on)", error)
            if ancestor in self.discard_on:
                return Discarded(f"{error.type} is not to be retried (discard_on)", error)
            if self.retry_on is not None and ancestor in self.retry_on:
                return Failed(error)
        if self.retry_on is not None:
            return Discarded(f"{error.type} is not among the errors to be retried (retry_on)", error)
        return Failed(error)

    def _refuse_contradictions(self) -> None:
        chosen: dict[object, str] = {}
        for name in ("retry_on", "discard_on", "snooze_on"):
            for error in getattr(self, name) or ():
                if chosen.setdefault(error, name) != name:
                    raise ConfigurationError(
                        f"{error.__name__} is in both {chosen[error]} and {name}; which of the two is meant?"
                    )

    def _call(self, backoff: Callable[[int], float | timedelta], retry: int, cap: float) -> float:
        """What the application's function says. Its mistakes must not keep a failure from being recorded."""
        try:
            wait = as_seconds(backoff(retry))
        except Exception:
            logger.exception("the backoff function %r failed; the retry waits its cap, %g s", backoff, cap)
            return cap
        return cap if math.isnan(wait) else wait


def _checked_wait(name: str, wait: object) -> float:
    seconds = as_seconds(wait) if isinstance(wait, timedelta) else wait
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds <= DELAY_SECONDS_MAX:
        return float(seconds)
    raise ConfigurationError(
        f"{name} must be a number of seconds between 0 and {DELAY_SECONDS_MAX:.0f}, or a timedelta, got {wait!r}"
    )


def _checked_errors(name: str, errors: object) -> tuple[type[BaseException], ...]:
    if isinstance(errors, type):
        errors = (errors,)
    if not isinstance(errors, Iterable) or isinstance(errors, str | Mapping):
        raise ConfigurationError(f"{name} must be an exception class or several of them, got {errors!r}")
    checked = tuple(errors)
    for error in checked:
        if not isinstance(error, type) or not issubclass(error, BaseException):
            raise ConfigurationError(f"{name} must name exception classes, got {error!r}")
        if issubclass(error, TaskSignal):
            raise ConfigurationError(
                f"{name} names {error.__name__}, which already says how the attempt ends; leave it away"
            )
    return checked


def _checked_snoozes(snoozes: object) -> dict[type[BaseException], float]:
    if not isinstance(snoozes, Mapping):
        raise ConfigurationError(
            f"snooze_on must map exception classes to seconds or timedeltas, such as {{Busy: 30}}, got {snoozes!r}"
        )
    checked = {}
    for error in _checked_errors("snooze_on", list(snoozes)):
        try:
            seconds = math.nan if isinstance(snoozes[error], bool | str) else as_seconds(snoozes[error])
        except (TypeError, ValueError, OverflowError):
            seconds = math.nan
        if not 0 < seconds <= DELAY_SECONDS_MAX:
            raise ConfigurationError(
                f"snooze_on of {error.__name__} must be seconds or a timedelta of more than 0 and at most "
                f"{DELAY_SECONDS_MAX:.0f} seconds, got {snoozes[error]!r}"
            )
        checked[error] = seconds
    return checked


def checked_max_retries(retries: object) -> int:
    if isinstance(retries, int) and not isinstance(retries, bool) and 0 <= retries <= 32767:
        return retries
    raise ConfigurationError(f"max_retries must be a whole number between 0 and 32767, got {retries!r}")


def as_seconds(duration: float | timedelta) -> float:
    """A duration in seconds."""
    return duration.total_seconds() if isinstance(duration, timedelta) else float(duration)


def decide(job: ClaimedJob, outcome: Outcome, policy: Retry, random: float) -> Transition:
    """What becomes of `job` after an attempt that ended in `outcome`. `random` in [0, 1) is for the jitter.

    The allowance is the job's own `max_retries`, fixed when it was enqueued; the policy gives the waiting time.
    A job that was asked to stop and did not complete is cancelled, however its attempt ended.
    """

    if isinstance(outcome, Completed):
        transition = Transition(job.id, job.claim_token, job.attempt, JobStatus.COMPLETED)
        # Few have one, and to give it by name makes a transition take half as long again.
        if outcome.result_json is not None:
            transition.result_json = outcome.result_json
        return transition
    transition = _decide(job, outcome, policy, random)
    if job.cancel_requested and transition.status is not JobStatus.CANCELLED:
        transition.become_cancelled()
    return transition


def _decide(job: ClaimedJob, outcome: Outcome, policy: Retry, random: float) -> Transition:
    def become(status: JobStatus, event: EventType | None = None, **what: Any) -> Transition:
        return Transition(job.id, job.claim_token, job.attempt, status, event, **what)

    match outcome:
        case Completed():
            raise AssertionError("decided already")
        case Failed(error, delay) if job.retries < job.max_retries:
            wait = policy.delay(job.retries + 1, random) if delay is None else delay
            return become(
                JobStatus.PENDING,
                EventType.RETRY,
                delay_seconds=wait,
                charge_retry=True,
                error=error,
                reason=f"retry {job.retries + 1} of {job.max_retries} in {wait:.1f} s",
            )
        case Failed(error):
            return become(
                JobStatus.DEAD,
                EventType.DEAD,
                error=error,
                reason=f"{job.retries} of {job.max_retries} retries used" if job.max_retries else "no retries allowed",
            )
        case Discarded(reason, error):
            return become(JobStatus.DEAD, EventType.DEAD, error=error, reason=reason)
        case Cancelled(reason):
            return become(JobStatus.CANCELLED, EventType.CANCEL, reason=reason)
        case Snoozed(delay_seconds, reason, error):
            return become(JobStatus.PENDING, EventType.SNOOZE, delay_seconds=delay_seconds, reason=reason, error=error)
        case Expired():
            return become(JobStatus.DEAD, EventType.EXPIRE, error=EXPIRED, reason="expired")
        case Released(reason, delay_seconds):
            return become(JobStatus.PENDING, EventType.RELEASE, delay_seconds=delay_seconds, reason=reason)
