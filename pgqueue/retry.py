"""When a failed attempt is tried again, and what becomes of a job after an attempt: policy, as pure functions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from pgqueue.errors import ConfigurationError
from pgqueue.job import (
    Cancelled,
    ClaimedJob,
    Completed,
    Discarded,
    EventType,
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


@dataclass(frozen=True, slots=True)
class Retry:
    """How failed attempts of a task are retried. Times are in seconds.

    The n-th retry (n from 1) waits, before jitter and at most `cap`:

    * ``"exponential"``: ``base * 2 ** (n - 1)``; with ``base=2``: 2, 4, 8, 16, …
    * ``"linear"``: ``base * n``
    * ``"constant"``: ``base``
    * a callable: what it returns for n; `cap` when it fails or returns no number

    With `jitter` the wait is drawn evenly from the upper half of that ("equal jitter" of M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015): retries of many jobs spread out, and none
    comes at once.
    """

    max_retries: int = 3  #: retries after the first attempt; 0: a failed attempt makes the job dead
    backoff: Backoff | Callable[[int], float | timedelta] = "exponential"
    base: float = 2.0
    cap: float = 300.0
    jitter: bool = True

    def __post_init__(self) -> None:
        checked_max_retries(self.max_retries)
        if not callable(self.backoff) and self.backoff not in ("exponential", "linear", "constant"):
            raise ConfigurationError(
                "backoff must be 'exponential', 'linear', 'constant' or a function from the retry's number "
                f"to seconds, got {self.backoff!r}"
            )
        for name in ("base", "cap"):
            seconds = getattr(self, name)
            if not isinstance(seconds, int | float) or not 0 <= seconds <= DELAY_SECONDS_MAX:
                raise ConfigurationError(
                    f"{name} must be a number of seconds between 0 and {DELAY_SECONDS_MAX:.0f}, got {seconds!r}"
                )

    def delay(self, retry: int, random: float) -> float:
        """Seconds to wait before the `retry`-th retry (from 1); `random` in [0, 1) decides the jitter."""
        if callable(self.backoff):
            wait = self._call(self.backoff, retry)
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

    def _call(self, backoff: Callable[[int], float | timedelta], retry: int) -> float:
        """What the application's function says. Its mistakes must not keep a failure from being recorded."""
        try:
            wait = as_seconds(backoff(retry))
        except Exception:
            logger.exception("the backoff function %r failed; the retry waits its cap, %g s", backoff, self.cap)
            return self.cap
        return self.cap if math.isnan(wait) else wait


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
    """

    if isinstance(outcome, Completed):
        return Transition(job.id, job.claim_token, job.attempt, JobStatus.COMPLETED, result_json=outcome.result_json)

    def become(status: JobStatus, event: EventType | None = None, **what: Any) -> Transition:
        return Transition(job.id, job.claim_token, job.attempt, status, event, **what)

    match outcome:
        case Failed(error) if job.retries < job.max_retries:
            wait = policy.delay(job.retries + 1, random)
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
        case Snoozed(delay_seconds, reason):
            return become(JobStatus.PENDING, EventType.SNOOZE, delay_seconds=delay_seconds, reason=reason)
        case Released(reason, delay_seconds):
            return become(JobStatus.PENDING, EventType.RELEASE, delay_seconds=delay_seconds, reason=reason)
