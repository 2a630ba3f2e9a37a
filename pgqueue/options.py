"""How one enqueue differs from its task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pgqueue.arguments import check_due, delay_seconds, expiry_seconds, is_unicode
from pgqueue.errors import ConfigurationError
from pgqueue.job import OnConflict
from pgqueue.retry import checked_max_retries
from pgqueue.schema import KEY_CHARACTERS_MAX
from pgqueue.task import checked_name, checked_priority


@dataclass(frozen=True, slots=True)
class EnqueueOptions:
    """How one enqueue differs from its task's settings."""

    queue: str | None = None
    priority: int | None = None
    max_retries: int | None = None
    delay: float | timedelta | None = None
    at: datetime | None = None
    unique_key: str | None = None
    on_conflict: OnConflict | None = None  #: None: as the task's `Unique` says, or else "skip"
    metadata: Mapping[str, Any] | None = None
    expires_in: float | timedelta | None = None
    expires_at: datetime | None = None
    concurrency_key: str | None = None
    ordering_key: str | None = None
    rate_key: str | None = None

    def __post_init__(self) -> None:
        if self.queue is not None:
            checked_name("queue", self.queue)
        if self.priority is not None:
            checked_priority(self.priority)
        if self.max_retries is not None:
            checked_max_retries(self.max_retries)
        if self.delay is not None and self.at is not None:
            raise ConfigurationError("give either delay or at, not both")
        if self.delay is not None:
            delay_seconds(self.delay)
        if self.at is not None:
            check_due("at", self.at)
        if self.expires_in is not None and self.expires_at is not None:
            raise ConfigurationError("give either expires_in or expires_at, not both")
        if self.expires_in is not None:
            expiry_seconds(self.expires_in)
        if self.expires_at is not None:
            check_due("expires_at", self.expires_at)
            if self.at is not None and self.expires_at <= self.at:
                raise ConfigurationError(
                    f"the job would expire before it is due: expires_at is {self.expires_at}, at is {self.at}; make "
                    "expires_at later, or give expires_in, which counts from when the job is due"
                )
        for name in ("unique_key", "concurrency_key", "ordering_key", "rate_key"):
            _check_key(name, getattr(self, name))
        if self.on_conflict is not None and self.on_conflict not in tuple(OnConflict):
            raise ConfigurationError(f"on_conflict must be one of {', '.join(OnConflict)}, got {self.on_conflict!r}")


def _check_key(name: str, key: object) -> None:
    if key is None:
        return
    if not isinstance(key, str) or not 1 <= len(key) <= KEY_CHARACTERS_MAX:
        raise ConfigurationError(f"{name} must be a string of 1 to {KEY_CHARACTERS_MAX} characters")
    if "\0" in key or not is_unicode(key):
        raise ConfigurationError(f"{name} must not contain NUL characters or lone surrogates")
