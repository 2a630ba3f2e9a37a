"""Checks of what callers pass to more than one call: ids, names, payloads, durations and moments.

A check raises ConfigurationError or InvalidPayload, and what is named `checked_…` or `…_seconds` returns the value.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pgqueue.config import checked_lease
from pgqueue.errors import ConfigurationError, InvalidPayload
from pgqueue.retry import DELAY_SECONDS_MAX, as_seconds
from pgqueue.task import checked_name, encode_json

#: The largest LIMIT that both databases take as an integer.
LIMIT_MAX = 2**31 - 1

#: Moments outside of these are a mistake, and some could be stored but not be read again.
RUN_AT_MIN, RUN_AT_MAX = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)


def checked_limit(limit: object) -> None:
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= LIMIT_MAX:
        raise ConfigurationError(f"limit must be at least 1 and at most {LIMIT_MAX}, got {limit!r}")


def checked_id(job_id: object) -> int:
    if not isinstance(job_id, int) or isinstance(job_id, bool):
        raise ConfigurationError(f"a job's id is a whole number, got {type(job_id).__name__}")
    return job_id


def checked_tasks(tasks: Sequence[str]) -> list[str]:
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not all(isinstance(name, str) for name in tasks):
        raise ConfigurationError(f"tasks must be a list of tasks' names, got {tasks!r}")
    return [checked_name("task", name) for name in tasks]


def no_such(what: str, name: object, known: Iterable[str]) -> str:
    """What is said of a name that is none of those there are."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"there is no {what} {name!r}{hint}; there are: {', '.join(names)}"


def checked_text(name: str, value: object, *, is_optional: bool = True) -> None:
    if value is None and is_optional:
        return
    if not isinstance(value, str):
        raise ConfigurationError(f"{name} must be a string, got {type(value).__name__}")
    if "\0" in value or not is_unicode(value):
        raise ConfigurationError(f"{name} must not contain NUL characters or lone surrogates")


def require_mapping(payload: object, task: str) -> None:
    if not isinstance(payload, Mapping) or not all(isinstance(key, str) for key in payload):
        raise InvalidPayload(
            f"payload of task {task!r} must be a mapping of its parameters, got {type(payload).__name__}"
        )


def checked_payloads(payloads: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if isinstance(payloads, str | bytes | Mapping) or not isinstance(payloads, Iterable):
        raise InvalidPayload(f"enqueue_many() takes an iterable of payloads, got {type(payloads).__name__}")
    return list(payloads)


def metadata_json_of(metadata: Mapping[str, Any] | None) -> str:
    if metadata is None:
        return "{}"
    if not isinstance(metadata, Mapping):
        raise InvalidPayload(f"metadata must be a mapping, got {type(metadata).__name__}")
    return encode_json(dict(metadata), "metadata")


def decoded(text: str) -> dict[str, Any]:
    """A payload or metadata of a job, from its JSON text."""
    value: dict[str, Any] = json.loads(text)
    return value


def lease_seconds(lease: float | timedelta) -> float:
    duration_seconds("lease", lease)
    return checked_lease(lease.total_seconds() if isinstance(lease, timedelta) else lease)


def delay_seconds(delay: float | timedelta) -> float:
    return time_seconds("delay", delay)


def expiry_seconds(expires_in: float | timedelta) -> float:
    seconds = duration_seconds("expires_in", expires_in)
    if not 0 < seconds <= DELAY_SECONDS_MAX:
        raise ConfigurationError(
            f"expires_in must be more than 0 and at most {DELAY_SECONDS_MAX:.0f} seconds, counted from when the job is "
            f"due, got {expires_in!r}"
        )
    return seconds


def time_seconds(name: str, duration: float | timedelta) -> float:
    seconds = duration_seconds(name, duration)
    if not 0 <= seconds <= DELAY_SECONDS_MAX:
        raise ConfigurationError(f"{name} must be between 0 and {DELAY_SECONDS_MAX:.0f} seconds, got {duration!r}")
    return seconds


def duration_seconds(name: str, duration: object) -> float:
    """Seconds, infinitely many when no float can hold them."""
    if isinstance(duration, bool) or not isinstance(duration, int | float | timedelta):
        raise ConfigurationError(f"{name} must be seconds or a timedelta, got {type(duration).__name__}")
    try:
        return as_seconds(duration)
    except OverflowError:
        return float("inf")


def check_due(name: str, moment: object) -> None:
    if not isinstance(moment, datetime):
        raise ConfigurationError(f"{name} must be a datetime, got {type(moment).__name__}")
    if moment.tzinfo is None or moment.utcoffset() is None:
        raise ConfigurationError(
            f"{name} must say its time zone, got the naive {moment!r}; for example datetime.now(UTC)"
        )
    if not RUN_AT_MIN <= moment < RUN_AT_MAX:
        raise ConfigurationError(
            f"{name} must lie between the years {RUN_AT_MIN.year} and {RUN_AT_MAX.year}, got {moment!r}"
        )


def checked_moment(name: str, value: datetime | timedelta | float | None) -> datetime | float | None:
    """A moment, or how many seconds ago it was by the database's clock."""
    if value is None:
        return None
    if isinstance(value, datetime):
        check_due(name, value)
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | timedelta):
        raise ConfigurationError(
            f"{name} must be an aware datetime, or how long ago: seconds or a timedelta; got {type(value).__name__}"
        )
    seconds = duration_seconds(name, value)
    if not 0 <= seconds <= DELAY_SECONDS_MAX:
        raise ConfigurationError(f"{name} must be between 0 and {DELAY_SECONDS_MAX:.0f} seconds ago, got {value!r}")
    return seconds


def is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
