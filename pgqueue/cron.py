"""When schedules tick: cron expressions in a time zone, and what is done about ticks that were missed. Pure functions.

Local times and the changes of clocks follow Debian's cron. An expression with a `*` in its second, minute or hour
field says *how often*: it ticks whenever the local clock shows a time that fits, so an hour that does not exist has no
ticks, and one that occurs twice has them twice. One without says *at what time of day*: it ticks once for each such
time; one that does not exist is made up for at the moment the clock jumps, and of one that occurs twice the first
counts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from pgqueue.errors import ConfigurationError
from pgqueue.task import checked_name

#: A tick that nobody came to within this time was missed.
MISSED_SECONDS = 60.0

#: Of the ticks that were missed so many are made up for, the latest ones, with catchup="all".
CATCHUP_TICKS_MAX = 1_000

#: Ticks that are settled in one transaction, about.
TICKS_PER_PASS = 100

#: A schedule from code that no worker declared for so long makes no jobs: it was removed from the code.
UNDECLARED_SECONDS = 180.0

#: No sensible expression is longer.
EXPRESSION_CHARACTERS_MAX = 256

SECOND, DAY = timedelta(seconds=1), timedelta(days=1)

#: Where the search for a first tick begins, to see whether there is any.
_SOME_DAY = datetime(2024, 1, 1, tzinfo=UTC)


class Catchup(StrEnum):
    """What is done about ticks that came while no worker was there to see to them."""

    NONE = "none"  #: nothing: the next tick is the next to run
    LATEST = "latest"  #: one job, for the latest of them
    ALL = "all"  #: a job for each, up to CATCHUP_TICKS_MAX


@dataclass(frozen=True, slots=True)
class CronRule:
    """A cron expression and the time zone that its hours are in. Raises ConfigurationError for what cannot be."""

    expression: str  #: minute, hour, day of month, month, day of week; in front of them, if wanted, the second
    timezone: str = "UTC"
    zone: ZoneInfo = field(init=False, repr=False, compare=False)
    _is_time_of_day: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "zone", _zone(self.timezone))
        if not isinstance(self.expression, str) or not 0 < len(self.expression) <= EXPRESSION_CHARACTERS_MAX:
            raise ConfigurationError(
                f"a cron expression is a text of at most {EXPRESSION_CHARACTERS_MAX} characters, such as '0 3 * * *', "
                f"got {str(self.expression)[:EXPRESSION_CHARACTERS_MAX]!r}"
            )
        fields = self.expression.split()
        object.__setattr__(self, "_is_time_of_day", not any("*" in part for part in fields[:-3]))
        try:
            CronSim(self.expression, _SOME_DAY.replace(tzinfo=None))
        except (CronSimError, ValueError, AssertionError) as error:
            raise ConfigurationError(
                f"cron expression {self.expression!r}: {str(error) or 'cannot be read'}; expected minute, hour, day of "
                "month, month and day of week, such as '0 3 * * *', or six fields with the second in front"
            ) from None
        self.next_after(_SOME_DAY)

    def next_after(self, moment: datetime) -> datetime:
        """The first tick later than `moment`, in UTC. Raises ConfigurationError when there is none for 50 years."""
        return next(self.ticks_after(moment))

    def ticks_after(self, moment: datetime) -> Iterator[datetime]:
        """The ticks later than `moment` in their order, in UTC."""
        try:
            yield from self._ticks_after(moment)
        except OverflowError:  # a moment that somebody stored by SQL
            raise ConfigurationError(f"cron expression {self.expression!r}: no tick before the year 10000") from None

    def _ticks_after(self, moment: datetime) -> Iterator[datetime]:
        at = moment.astimezone(UTC).replace(microsecond=0)
        offset = self._offset(at)
        while True:
            # As long as the clock is not changed, local time runs like any other.
            change: datetime | None = None
            for wanted in self._local_times_after(at + offset):
                tick = wanted.replace(tzinfo=UTC) - offset
                change = self._change_between(at, tick, offset)
                if change is not None:
                    break
                at = tick
                if not (self._is_time_of_day and tick.astimezone(self.zone).fold):
                    yield tick
            assert change is not None
            before, offset = offset, self._offset(change)
            if self._is_time_of_day and wanted < (change + offset).replace(tzinfo=None) and offset > before:
                at = change
                yield change
            else:
                at = change - SECOND

    def _local_times_after(self, local: datetime) -> Iterator[datetime]:
        """Naive times that the expression fits, whatever the clock does."""
        yield from CronSim(self.expression, local.replace(tzinfo=None))
        raise ConfigurationError(f"cron expression {self.expression!r}: that time never comes")

    def _offset(self, moment: datetime) -> timedelta:
        offset = moment.astimezone(self.zone).utcoffset()
        assert offset is not None
        return offset

    def _change_between(self, start: datetime, end: datetime, offset: timedelta) -> datetime | None:
        """The first moment after `start`, and not after `end`, at which local time is not `offset` from UTC."""
        probe = start
        while probe < end:
            same, probe = probe, min(probe + DAY, end)
            if self._offset(probe) != offset:
                while probe - same > SECOND:
                    middle = same + (probe - same) // SECOND // 2 * SECOND
                    if self._offset(middle) == offset:
                        same = middle
                    else:
                        probe = middle
                return probe
        return None


def _zone(name: object) -> ZoneInfo:
    try:
        return ZoneInfo(name)  # type: ignore[arg-type]
    except (LookupError, ValueError, TypeError, OSError):
        raise ConfigurationError(
            f"there is no time zone {str(name)[:128]!r}; expected a name such as 'UTC' or 'Europe/Zurich' (where the "
            "system has no time zones, `pip install tzdata` brings them)"
        ) from None


# Ticks that are due ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be done about the ticks of a schedule that have come."""

    ticks: list[datetime]  #: those that get a job, the earliest first
    next_tick_at: datetime  #: the first tick that is not settled then; not later than now when there are more
    skipped: tuple[datetime, datetime] | None = None  #: the first and the last of those that get none


def settle(rule: CronRule, catchup: Catchup, since: datetime, now: datetime) -> Due:
    """What is to be done at `now` about the ticks from `since` on, both moments by the database's clock."""
    # Whatever zone its sessions are in: within one, Python reckons by the clock on the wall.
    since, now = since.astimezone(UTC), now.astimezone(UTC)
    first = rule.next_after(since - SECOND if since.microsecond == 0 else since)
    if first > now:
        return Due([], first)
    if catchup is Catchup.ALL:
        return _settle_all(rule, first, now)
    latest = _latest_tick(rule, first, now)
    following = rule.next_after(latest)
    if catchup is Catchup.NONE and (now - latest).total_seconds() > MISSED_SECONDS:
        return Due([], following, (first, latest))
    return Due([latest], following, (first, _tick_before(rule, first, latest)) if first < latest else None)


def _settle_all(rule: CronRule, first: datetime, now: datetime) -> Due:
    ticks = _ticks_until(rule, first - SECOND, now, CATCHUP_TICKS_MAX + 1)
    skipped = None
    if len(ticks) > CATCHUP_TICKS_MAX:
        ticks = _latest_ticks(rule, first, now)
        if ticks[0] > first:
            skipped = (first, _tick_before(rule, first, ticks[0]))
    if len(ticks) > TICKS_PER_PASS:
        return Due(ticks[:TICKS_PER_PASS], ticks[TICKS_PER_PASS], skipped)
    return Due(ticks, rule.next_after(ticks[-1]), skipped)


def _latest_tick(rule: CronRule, first: datetime, now: datetime) -> datetime:
    """The last tick not later than `now`; `first` is one. By halving the time between: that may be years."""
    if rule.next_after(first) > now:
        return first  # as nearly always
    latest, end = first, now
    while end > latest:
        following = rule.next_after(latest + (end - latest) // SECOND // 2 * SECOND)
        if following <= now:
            latest = following
        elif end - latest < 2 * SECOND:
            break
        else:
            end = latest + (end - latest) // SECOND // 2 * SECOND
    return latest


def _tick_before(rule: CronRule, first: datetime, tick: datetime) -> datetime:
    return _latest_tick(rule, first, tick - SECOND)


def _latest_ticks(rule: CronRule, first: datetime, now: datetime) -> list[datetime]:
    """The last CATCHUP_TICKS_MAX ticks not later than `now`, of more than that."""
    early, late = first, now
    while late - early > SECOND:
        middle = early + (late - early) // SECOND // 2 * SECOND
        if len(_ticks_until(rule, middle, now, CATCHUP_TICKS_MAX + 1)) > CATCHUP_TICKS_MAX:
            early = middle
        else:
            late = middle
    return _ticks_until(rule, late, now, CATCHUP_TICKS_MAX)


def _ticks_until(rule: CronRule, after: datetime, until: datetime, limit: int) -> list[datetime]:
    ticks = itertools.takewhile(lambda tick: tick <= until, rule.ticks_after(after))
    return list(itertools.islice(ticks, limit))


# Schedules -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewSchedule:
    """A schedule to be stored; every value checked, the payload already JSON text."""

    name: str
    rule: CronRule
    task: str
    payload_json: str = field(repr=False)
    queue: str
    priority: int
    max_retries: int
    catchup: Catchup
    overlap: bool

    def __post_init__(self) -> None:
        checked_name("schedule", self.name)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A row of the `schedules` table: what is enqueued by the clock."""

    name: str
    cron: str  #: minute, hour, day of month, month, day of week; in front of them, if there are six, the second
    timezone: str  #: where those hours are
    task: str  #: of the jobs it makes
    payload_json: str = field(repr=False)
    queue: str
    priority: int
    max_retries: int
    catchup: str  #: one of Catchup
    overlap: bool  #: False: no job while the one before is pending or running
    enabled: bool  #: False: it makes no jobs by itself
    declared_by: str  #: "code", or who changed it since
    next_tick_at: datetime  #: no tick before is open
    created_at: datetime
    updated_at: datetime
    declared_seconds: float | None = None  #: since a worker last declared it; None: it does not come from code
    last_tick_at: datetime | None = None  #: the last tick that got a job, if that is on record

    @property
    def is_declared(self) -> bool:
        """False: it comes from code, but no running worker has that code any more. It makes no jobs."""
        return self.declared_seconds is None or self.declared_seconds <= UNDECLARED_SECONDS

    @property
    def payload(self) -> dict[str, Any]:
        """The payload, decoded; ValueError when somebody stored what Python's JSON cannot read."""
        decoded: dict[str, Any] = json.loads(self.payload_json)
        return decoded

    @property
    def rule(self) -> CronRule:
        """Raises ConfigurationError when the row's expression or time zone cannot be read."""
        return CronRule(self.cron, self.timezone)

    def next_ticks(self, count: int = 5) -> list[datetime]:
        """The next ticks, in UTC, as the row stands."""
        since = self.next_tick_at.astimezone(UTC)
        if since.microsecond == 0:
            since -= SECOND
        return list(itertools.islice(self.rule.ticks_after(since), count))


def checked_catchup(catchup: object) -> Catchup:
    if catchup in tuple(Catchup):
        return Catchup(catchup)  # type: ignore[arg-type]
    raise ConfigurationError(f"catchup must be one of {', '.join(Catchup)}, got {catchup!r}")
