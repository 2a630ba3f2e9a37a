"""Which jobs of a task count as the same: a rule, and the key that it gives a payload. Pure functions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pgqueue.errors import ConfigurationError
from pgqueue.job import OnConflict
from pgqueue.retry import DELAY_SECONDS_MAX, as_seconds

#: How keys begin that were made from a payload.
COMPUTED = "sha256:"


@dataclass(frozen=True, slots=True)
class Unique:
    """At most one pending or running job of a task has the same values of some parameters.

    by: names of parameters; None: all of them.
    period: seconds or a timedelta. For so long after a job was enqueued there is no second one, even if it has
    completed. A job that is dead or cancelled, or was deleted, holds nobody up.
    on_conflict: what an enqueue does that finds such a job: "skip" it, "raise" DuplicateJob, or "replace" the payload
    and settings of the one that is pending.
    """

    by: Sequence[str] | None = None
    period: float | timedelta | None = None
    on_conflict: OnConflict | str = OnConflict.SKIP

    def __post_init__(self) -> None:
        if self.by is not None:
            if isinstance(self.by, str) or not isinstance(self.by, Sequence):
                raise ConfigurationError(
                    f"Unique(by=…) takes the names of parameters, such as by=('file',), got {self.by!r}"
                )
            if not self.by or not all(isinstance(name, str) for name in self.by):
                raise ConfigurationError(
                    f"Unique(by=…) must name at least one parameter, each as a string, got {self.by!r}; "
                    "by=None takes all of them"
                )
            if len(set(self.by)) < len(self.by):
                raise ConfigurationError(f"Unique(by=…) names a parameter twice: {self.by!r}")
            object.__setattr__(self, "by", tuple(self.by))
        if self.period is not None:
            object.__setattr__(self, "period", _checked_period(self.period))
        if self.on_conflict not in tuple(OnConflict):
            raise ConfigurationError(
                f"Unique(on_conflict=…) must be one of {', '.join(OnConflict)}, got {self.on_conflict!r}"
            )
        object.__setattr__(self, "on_conflict", OnConflict(self.on_conflict))

    @property
    def period_seconds(self) -> float | None:
        return None if self.period is None else as_seconds(self.period)


def _checked_period(period: object) -> float:
    if isinstance(period, bool) or not isinstance(period, int | float | timedelta):
        raise ConfigurationError(f"Unique(period=…) must be seconds or a timedelta, got {type(period).__name__}")
    try:
        seconds = as_seconds(period)
    except OverflowError:
        seconds = math.inf
    if not 0 < seconds <= DELAY_SECONDS_MAX:
        raise ConfigurationError(
            f"Unique(period=…) must be more than 0 and at most {DELAY_SECONDS_MAX:.0f} seconds, got {period!r}"
        )
    return seconds


def unique_key(values: Mapping[str, Any]) -> str:
    """The key of these values. A hash, so that it always fits, and shows nothing of a payload where keys are shown."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return COMPUTED + hashlib.sha256(canonical.encode()).hexdigest()


def settled(value: Any, stored: Any) -> Any:
    """`stored`, the JSON of `value`, with the elements of sets in one order: Python's is another in each process."""
    if isinstance(value, set | frozenset) and isinstance(stored, list):
        items = [settled(item, plain) for item, plain in zip(value, stored, strict=False)]
        return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, list | tuple) and isinstance(stored, list):
        return [settled(item, plain) for item, plain in zip(value, stored, strict=False)]
    if isinstance(value, dict) and isinstance(stored, dict) and len(value) == len(stored):
        return {key: settled(item, stored[key]) for item, key in zip(value.values(), stored, strict=True)}
    return stored
