"""What can be configured, its defaults and its limits, checked when made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pgqueue.errors import ConfigurationError
from pgqueue.retry import DELAY_SECONDS_MAX
from pgqueue.task import checked_name

T = TypeVar("T")

DEFAULT_SCHEMA = "pgqueue"
DEFAULT_QUEUE = "default"
DEFAULT_CONCURRENCY = 10

#: Used by the command line when no URL is given: a file in the working directory.
LOCAL_URL = "sqlite:///pgqueue.db"

URL_VARIABLES = ("PGQUEUE_DATABASE_URL", "DATABASE_URL")

#: Heartbeats per lease. One may be late and one lost before a live worker loses its claim.
HEARTBEATS_PER_LEASE = 3

LEASE_SECONDS_MIN = 0.5


def checked_schema(name: object) -> str:
    """`name` if it can be a schema on PostgreSQL and a table prefix on SQLite without quoting."""
    if (
        isinstance(name, str)
        and name.isascii()
        and name.isidentifier()
        and name == name.lower()
        and len(name) <= 48
        and not name.startswith("pg_")
    ):
        return name
    raise ConfigurationError(
        "schema must be at most 48 lower-case letters, digits and underscores, not start with a digit "
        f"or with 'pg_', got {name!r}"
    )


def checked_lease(seconds: float) -> float:
    if LEASE_SECONDS_MIN <= seconds <= DELAY_SECONDS_MAX:
        return float(seconds)
    raise ConfigurationError(
        f"lease must be at least {LEASE_SECONDS_MIN} seconds and at most {DELAY_SECONDS_MAX:.0f}, got {seconds!r}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """How a worker works. Times are in seconds."""

    queues: Mapping[str, int] = field(default_factory=lambda: {DEFAULT_QUEUE: DEFAULT_CONCURRENCY})
    """Jobs run at once, by queue."""
    name: str | None = None
    """Shown in `claimed_by` in front of what makes the worker unique; None: the host's name."""
    lease: float = 30.0
    """A claim ends so long after the last sign of life of its worker."""
    heartbeat_interval: float | None = None
    """Between two extensions of the leases; None: a third of the lease."""
    poll_interval: float = 1.0
    """How long a worker with nothing to do waits before it looks again, when nothing wakes it."""
    sweep_interval: float = 5.0
    """Between two searches for claims of dead workers."""
    shutdown_timeout: float = 25.0
    """How long a stopping worker waits for running jobs before it gives them back. Kubernetes kills after 30."""
    prefetch: int | None = None
    """Jobs claimed ahead of free slots, per queue; None: about 100 ms of work, from the measured run time."""
    listen: bool = True
    """Wake up by LISTEN (PostgreSQL); switch off behind a pooler in transaction mode."""
    drain: bool = False
    """Stop when the queues are empty."""
    schedules: bool = True
    """Enqueue what schedules say. A draining worker never does."""
    max_jobs: int | None = None
    """Stop after so many jobs; None: never."""

    def __post_init__(self) -> None:
        self._check_types()
        if not self.queues:
            raise ConfigurationError("a worker needs at least one queue")
        for queue, concurrency in self.queues.items():
            checked_name("queue", queue)
            if not isinstance(concurrency, int) or isinstance(concurrency, bool) or not 1 <= concurrency <= 1000:
                raise ConfigurationError(
                    f"concurrency of queue {queue!r} must be a whole number between 1 and 1000, got {concurrency!r}"
                )
        checked_lease(self.lease)
        if not 0 < self.heartbeat_seconds <= self.lease / 2:
            raise ConfigurationError(
                "heartbeat_interval must be more than 0 and at most half of the lease "
                f"({self.lease / 2:g} s), got {self.heartbeat_interval!r}"
            )
        for name in ("poll_interval", "sweep_interval"):
            if not 0 < getattr(self, name) <= DELAY_SECONDS_MAX:
                raise ConfigurationError(f"{name} must be more than 0 seconds, got {getattr(self, name)!r}")
        if not 0 <= self.shutdown_timeout <= DELAY_SECONDS_MAX:
            raise ConfigurationError(f"shutdown_timeout must be 0 seconds or more, got {self.shutdown_timeout!r}")
        if self.prefetch is not None and not 0 <= self.prefetch <= 10_000:
            raise ConfigurationError(f"prefetch must be between 0 and 10000, got {self.prefetch!r}")
        if self.max_jobs is not None and self.max_jobs < 1:
            raise ConfigurationError(f"max_jobs must be at least 1, got {self.max_jobs!r}")

    def _check_types(self) -> None:
        if not isinstance(self.queues, Mapping):
            raise ConfigurationError(f"queues must map names to how many jobs at once, got {self.queues!r}")
        if self.name is not None and not (isinstance(self.name, str) and self.name and self.name.isprintable()):
            raise ConfigurationError(f"name must be a text of printable characters, got {self.name!r}")
        for names, kinds, what in _TYPES:
            for name in names:
                value = getattr(self, name)
                if isinstance(value, bool) is not (kinds is bool) or not isinstance(value, kinds):
                    if value is None and name in _OPTIONAL:
                        continue
                    raise ConfigurationError(f"{name} must be {what}, got {value!r}")

    @property
    def heartbeat_seconds(self) -> float:
        return self.lease / HEARTBEATS_PER_LEASE if self.heartbeat_interval is None else self.heartbeat_interval


#: Settings of a worker by type.
_TYPES: tuple[tuple[tuple[str, ...], type | tuple[type, ...], str], ...] = (
    (
        ("lease", "heartbeat_interval", "poll_interval", "sweep_interval", "shutdown_timeout"),
        (int, float),
        "a number of seconds",
    ),
    (("prefetch", "max_jobs"), int, "a whole number"),
    (("listen", "drain", "schedules"), bool, "True or False"),
)
_OPTIONAL = ("heartbeat_interval", "prefetch", "max_jobs")


def parse_queues(specifications: Iterable[str], concurrency: T) -> dict[str, int | T]:
    """Queues and their concurrency from `name` or `name=number`, as the command line takes them; `concurrency` is
    for those without a number."""
    queues: dict[str, int | T] = {}
    for specification in specifications:
        for part in specification.split(","):
            name, separator, number = part.strip().partition("=")
            checked_name("queue", name)
            if separator and not (number.isascii() and number.isdigit()):
                raise ConfigurationError(f"queue {part.strip()!r}: expected NAME or NAME=CONCURRENCY")
            if name in queues:
                raise ConfigurationError(f"queue {name!r} is named twice")
            queues[name] = int(number) if separator else concurrency
    return queues


DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_duration(text: str, *, bare_numbers: bool = True) -> float:
    """Seconds from `90`, `1.5s`, `5m`, `1h30m`, `7d`, as the command line takes them.

    bare_numbers: whether a number without a unit is taken, as seconds.
    """
    expected = "expected a number with a unit (ms, s, m, h, d or w), such as 30s, 5m, 1h30m or 7d"
    if bare_numbers and re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        seconds = float(text)
    elif re.fullmatch(r"([0-9]+(\.[0-9]+)?(ms|[smhdw]))+", text):
        parts = re.findall(r"([0-9.]+)(ms|[smhdw])", text)
        seconds = sum(float(number) * DURATION_UNITS[unit] for number, unit in parts)
    else:
        raise ConfigurationError(f"{expected}, got {text!r}")
    if seconds > DELAY_SECONDS_MAX:
        raise ConfigurationError(
            f"a duration is at most {DELAY_SECONDS_MAX / DURATION_UNITS['d']:.0f} days, got {text!r}"
        )
    return seconds
