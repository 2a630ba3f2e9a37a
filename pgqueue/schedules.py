"""The statements on schedules and their ticks, one function an operation, as in `store`.

A tick is settled under its schedule's row lock: its row in `schedule_ticks` and its job are one transaction, and the
primary key of that row decides that there is no second. Whoever finds a schedule locked goes on to the next one.

A schedule that code declares carries the moment at which a worker last found it there (`declared_at`). One that no
running worker declares any more stops, and the declaration of the worker that was started last counts: so old and new
workers can run side by side, and whichever stay in the end win.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa

from pgqueue import dialect, store
from pgqueue.cron import UNDECLARED_SECONDS, NewSchedule, Schedule
from pgqueue.dialect import TextArray, UTCDateTime, json_of, now, seconds_from_now, seconds_since, text_in
from pgqueue.engine import is_locked
from pgqueue.errors import ScheduleNotFound
from pgqueue.job import EventType
from pgqueue.schema import Tables

#: A running worker says so often that it still declares its schedules.
RENEW_SECONDS = 30.0

#: A worker that does not know a schedule's task leaves a tick for so long to those that do.
UNKNOWN_TASK_SECONDS = 15.0

#: The row of a tick is kept for so long.
TICKS_KEPT_SECONDS = 7 * 86_400.0

#: Rows of ticks deleted in one statement.
PRUNE_TICKS_MAX = 1_000

#: What `declared_by` says of a schedule that comes from code.
BY_CODE = "code"

#: How long a scheduler waits for a lock.
LOCK_MILLISECONDS = 300

#: How often an upsert looks again when somebody else makes, or deletes, the schedule at that very moment.
_ROUNDS_MAX = 5

# What is due -----------------------------------------------------------------------------------------------


def seconds_until_due(
    connection: sa.Connection, tables: Tables, *, tasks: Sequence[str], aside: Sequence[str]
) -> float | None:
    """How long until the next tick that is this worker's to settle; None when there is none.

    tasks: those that it knows. aside: schedules to leave alone.
    """
    ((since_known, since_any),) = dialect.execute(
        connection, _next_due(tables), {"tasks": list(tasks), "aside": list(aside)}
    )
    waits = [-since_known] if since_known is not None else []
    if since_any is not None:
        waits.append(UNKNOWN_TASK_SECONDS - since_any)
    return min(waits, default=None)


@cache
def _next_due(tables: Tables) -> sa.Select[Any]:
    schedules = tables.schedules
    earliest = sa.select(seconds_since(sa.func.min(schedules.c.next_tick_at))).where(_ticks(schedules))
    return sa.select(
        earliest.where(text_in(schedules.c.task, _TASKS)).scalar_subquery().label("known"),
        earliest.scalar_subquery().label("any"),
    )


def lock_due(
    connection: sa.Connection, tables: Tables, *, tasks: Sequence[str], aside: Sequence[str], limit: int
) -> list[tuple[Schedule, datetime]]:
    """Schedules with a tick that is due, locked, longest due first; each with the database's now."""
    parameters = {"tasks": list(tasks), "aside": list(aside), "limit": limit}
    return [(_read(row), row.now) for row in connection.execute(_lock_due(tables), parameters)]


@cache
def _lock_due(tables: Tables) -> sa.Select[Any]:
    schedules = tables.schedules
    late = seconds_from_now(sa.literal(-UNKNOWN_TASK_SECONDS, sa.Float()))
    return (
        sa.select(*_columns(schedules), now().label("now"))
        .where(
            _ticks(schedules),
            schedules.c.next_tick_at <= now(),
            sa.or_(text_in(schedules.c.task, _TASKS), schedules.c.next_tick_at <= late),
        )
        .order_by(schedules.c.next_tick_at, schedules.c.name)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
        .with_for_update(skip_locked=True)
    )


_TASKS = sa.bindparam("tasks", type_=TextArray())


def _ticks(schedules: sa.Table) -> sa.ColumnElement[bool]:
    """The schedule makes jobs, and is none to leave alone."""
    fresh = seconds_from_now(sa.literal(-UNDECLARED_SECONDS, sa.Float()))
    return sa.and_(
        schedules.c.enabled,
        sa.or_(schedules.c.declared_at.is_(None), schedules.c.declared_at > fresh),
        sa.not_(text_in(schedules.c.name, sa.bindparam("aside", type_=TextArray()))),
    )


def wait_briefly(connection: sa.Connection) -> None:
    """Let no statement of the present transaction wait long for another one, in which an application may have enqueued
    the same unique key. Shorter than the server waits before it looks for a deadlock, so that nobody else is a victim
    of one."""
    if connection.dialect.name == dialect.POSTGRESQL:
        connection.execute(sa.text("SELECT set_config('lock_timeout', :milliseconds, true)"), _LOCK_TIMEOUT)


_LOCK_TIMEOUT = {"milliseconds": str(LOCK_MILLISECONDS)}


def add_tick(connection: sa.Connection, tables: Tables, name: str, tick: datetime, job_id: int | None) -> bool:
    """Write down a tick of a schedule, and the job it gets; False when somebody has done so already."""
    taken = connection.execute(_add_tick(tables), {"schedule": name, "tick_at": tick, "job_id": job_id})
    return taken.one_or_none() is not None


@cache
def _add_tick(tables: Tables) -> Any:
    ticks = tables.schedule_ticks
    return (
        dialect.insert(tables.dialect_name, ticks)
        .on_conflict_do_nothing(index_elements=[ticks.c.schedule, ticks.c.tick_at])
        .returning(ticks.c.schedule)
    )


def settled(
    connection: sa.Connection,
    tables: Tables,
    schedule: Schedule,
    *,
    next_tick_at: datetime,
    missed: tuple[datetime, datetime] | None,
    actor: str,
) -> None:
    """Go on to the next tick of a locked schedule, and write down the first and last of those that get no job."""
    schedules = tables.schedules
    connection.execute(sa.update(schedules).where(schedules.c.name == schedule.name).values(next_tick_at=next_tick_at))
    if missed is not None:
        first, last = (tick.isoformat() for tick in missed)
        ticks = f"its tick of {first}" if first == last else f"its ticks from {first} to {last}"
        _record(connection, tables, schedule, actor, f"made no job for {ticks}, missed (catchup={schedule.catchup})")


def prune_ticks(connection: sa.Connection, tables: Tables) -> int:
    """Delete rows of ticks that are no longer of use, up to PRUNE_TICKS_MAX; how many."""
    old = connection.execute(_old_ticks(tables), {"limit": PRUNE_TICKS_MAX}).all()
    if old:
        connection.execute(_delete_tick(tables), [{"name": row.schedule, "tick": row.tick_at} for row in old])
    return len(old)


@cache
def _old_ticks(tables: Tables) -> sa.Select[Any]:
    ticks = tables.schedule_ticks
    return (
        sa.select(ticks.c.schedule, ticks.c.tick_at)
        .where(ticks.c.created_at < seconds_from_now(sa.literal(-TICKS_KEPT_SECONDS, sa.Float())))
        .order_by(ticks.c.created_at)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
        .with_for_update(skip_locked=True)
    )


@cache
def _delete_tick(tables: Tables) -> sa.Delete:
    ticks = tables.schedule_ticks
    return sa.delete(ticks).where(
        ticks.c.schedule == sa.bindparam("name"), ticks.c.tick_at == sa.bindparam("tick", type_=UTCDateTime())
    )


# What code declares ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Declared:
    """What became of a worker's declarations."""

    overridden: list[str] = field(default_factory=list)  #: somebody changed these since; they stay so
    locked: list[str] = field(default_factory=list)  #: somebody is at these; to be declared again soon


def declare(
    connection: sa.Connection, tables: Tables, declared: Iterable[NewSchedule], *, starting: bool, actor: str
) -> Declared:
    """Publish what a worker's code declares. Waits for nobody who changes a schedule just now.

    starting: the worker has just started, so its declarations count. Otherwise it only says that it is still there,
    and steps in for workers that declared something else and are gone.
    """
    wanted = {schedule.name: schedule for schedule in declared}
    found = connection.execute(_standing(tables), {"names": sorted(wanted)}).all()
    standing = {row.name: _read(row) for row in found}
    moment: datetime = found[0].now if found else connection.execute(sa.select(now())).scalar_one()
    result = Declared()
    changes: dict[str, dict[str, Any]] = {}
    for name, new in sorted(wanted.items()):
        row = standing.get(name)
        if row is None:
            if starting and not _insert_unlocked(connection, tables, new, moment):
                result.locked.append(name)
        elif row.declared_seconds is None:
            if not _is_same(row, new):
                result.overridden.append(name)
        elif _is_same(row, new):
            if row.declared_seconds > RENEW_SECONDS / 2:
                changes[name] = {}
        elif starting or row.declared_seconds > UNDECLARED_SECONDS:
            changes[name] = {**_definition(new), **_next_tick(row, new, moment), "updated_at": now()}
    if changes:
        schedules = tables.schedules
        free = {row.name: _read(row) for row in connection.execute(_lock_declared(tables), {"names": sorted(changes)})}
        for name, row in free.items():
            # Another worker may have declared the same just now, and somebody else settled ticks since.
            values = {} if _is_same(row, wanted[name]) else changes[name]
            connection.execute(sa.update(schedules).where(schedules.c.name == name).values(declared_at=now(), **values))
            if values:
                new = wanted[name]
                _record(connection, tables, new, actor, f"changed by the code: {_describe(new)}")
        result.locked += sorted(changes.keys() - free)
    return result


def _insert_unlocked(connection: sa.Connection, tables: Tables, new: NewSchedule, moment: datetime) -> bool:
    """Make a schedule that code declares; False when somebody is just making it."""
    try:
        with connection.begin_nested():
            _insert(connection, tables, new, moment, actor=BY_CODE, by_code=True)
    except sa.exc.DBAPIError as error:
        if not is_locked(error):
            raise
        return False
    return True


@cache
def _standing(tables: Tables) -> sa.Select[Any]:
    schedules = tables.schedules
    return sa.select(*_columns(schedules), now().label("now")).where(text_in(schedules.c.name, _NAMES))


@cache
def _lock_declared(tables: Tables) -> sa.Select[Any]:
    """Those that still come from code, and that nobody has locked."""
    schedules = tables.schedules
    return (
        sa.select(*_columns(schedules))
        .where(text_in(schedules.c.name, _NAMES), schedules.c.declared_at.is_not(None))
        .order_by(schedules.c.name)
        .with_for_update(skip_locked=True)
    )


_NAMES = sa.bindparam("names", type_=TextArray())


# What people and applications do ---------------------------------------------------------------------------


def upsert(
    connection: sa.Connection,
    tables: Tables,
    new: NewSchedule,
    *,
    enabled: bool | None,
    actor: str,
    reason: str | None,
) -> Schedule:
    """Make a schedule, or let it be like this from now on. Nothing is enqueued for the past because of it."""
    for _ in range(_ROUNDS_MAX):
        moment: datetime = connection.execute(sa.select(now())).scalar_one()
        before = _lock(connection, tables, new.name)
        if before is None:
            if not _insert(connection, tables, new, moment, actor=actor, enabled=enabled is not False):
                continue
            _record(connection, tables, new, actor, f"made: {_describe(new)}", reason)
            break
        stays = before.enabled if enabled is None else enabled
        if before.declared_seconds is None and before.enabled == stays and _is_same(before, new):
            break
        values = {**_definition(new), **_next_tick(before, new, moment)}
        if stays and not before.enabled:
            values["next_tick_at"] = new.rule.next_after(moment)
        schedules = tables.schedules
        connection.execute(
            sa.update(schedules)
            .where(schedules.c.name == new.name)
            .values(**values, enabled=stays, declared_by=actor, declared_at=None, updated_at=now())
        )
        _record(connection, tables, new, actor, f"changed: {_describe(new)}", reason)
        break
    return get(connection, tables, new.name)


def get(connection: sa.Connection, tables: Tables, name: str, *, lock: bool = False) -> Schedule:
    """The schedule of that name. Raises ScheduleNotFound."""
    schedules = tables.schedules
    query = _with_last_tick(tables).where(schedules.c.name == name)
    row = connection.execute(query.with_for_update(of=schedules) if lock else query).one_or_none()
    if row is None:
        raise ScheduleNotFound(f"there is no schedule {name!r}")
    return _read(row)


def all_schedules(connection: sa.Connection, tables: Tables) -> list[Schedule]:
    """Every schedule, by name."""
    return [_read(row) for row in connection.execute(_with_last_tick(tables).order_by(tables.schedules.c.name))]


def set_enabled(
    connection: sa.Connection, tables: Tables, name: str, enabled: bool, *, actor: str, reason: str | None
) -> bool:
    """Let a schedule make jobs, from its next tick on, or none; False when it did so before."""
    schedule = get(connection, tables, name, lock=True)
    if schedule.enabled == enabled:
        return False
    values: dict[str, Any] = {"enabled": enabled, "updated_at": now()}
    if enabled:
        values["next_tick_at"] = schedule.rule.next_after(connection.execute(sa.select(now())).scalar_one())
    schedules = tables.schedules
    connection.execute(sa.update(schedules).where(schedules.c.name == name).values(**values))
    _record(connection, tables, schedule, actor, "enabled" if enabled else "disabled", reason)
    return True


def delete(connection: sa.Connection, tables: Tables, name: str, *, actor: str, reason: str | None) -> None:
    """Delete a schedule; its jobs stay. Raises ScheduleNotFound."""
    schedule = get(connection, tables, name, lock=True)
    connection.execute(sa.delete(tables.schedules).where(tables.schedules.c.name == name))
    _record(connection, tables, schedule, actor, "deleted", reason)


def record_run(
    connection: sa.Connection, tables: Tables, schedule: Schedule, job_id: int, *, actor: str, reason: str | None
) -> None:
    """Write down that somebody had a schedule make a job out of turn."""
    _record(connection, tables, schedule, actor, "run now", reason, job_id=job_id)


def _lock(connection: sa.Connection, tables: Tables, name: str) -> Schedule | None:
    schedules = tables.schedules
    row = connection.execute(
        sa.select(*_columns(schedules)).where(schedules.c.name == name).with_for_update()
    ).one_or_none()
    return None if row is None else _read(row)


def _insert(
    connection: sa.Connection,
    tables: Tables,
    new: NewSchedule,
    moment: datetime,
    *,
    actor: str,
    by_code: bool = False,
    enabled: bool = True,
) -> bool:
    schedules = tables.schedules
    inserted = connection.execute(
        dialect.insert(tables.dialect_name, schedules)
        .values(
            name=new.name,
            **_definition(new),
            next_tick_at=new.rule.next_after(moment),
            enabled=enabled,
            declared_by=actor,
            declared_at=now() if by_code else None,
        )
        .on_conflict_do_nothing(index_elements=[schedules.c.name])
        .returning(schedules.c.name)
    )
    return inserted.one_or_none() is not None


def _definition(new: NewSchedule) -> dict[str, Any]:
    """What a declaration says, as values of the row."""
    return {
        "cron": new.rule.expression,
        "timezone": new.rule.timezone,
        "task": new.task,
        "payload": json_of(sa.literal(new.payload_json, sa.Text())),
        "queue": new.queue,
        "priority": new.priority,
        "max_retries": new.max_retries,
        "catchup": str(new.catchup),
        "overlap": new.overlap,
    }


def _is_same(row: Schedule, new: NewSchedule) -> bool:
    same = all(
        getattr(row, name) == value for name, value in _definition(new).items() if name not in ("payload", "overlap")
    )
    return same and row.overlap == new.overlap and _decoded(row.payload_json) == _decoded(new.payload_json)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _next_tick(row: Schedule, new: NewSchedule, moment: datetime) -> dict[str, Any]:
    """A rule that changes starts now. What else changes leaves open what is open."""
    if (row.cron, row.timezone) == (new.rule.expression, new.rule.timezone):
        return {}
    return {"next_tick_at": new.rule.next_after(moment)}


def _describe(new: NewSchedule) -> str:
    return f"{new.rule.expression!r} in {new.rule.timezone}, catchup={new.catchup}"


# Rows ------------------------------------------------------------------------------------------------------


def _columns(schedules: sa.Table) -> list[Any]:
    plain = (
        "name",
        "cron",
        "timezone",
        "task",
        "queue",
        "priority",
        "max_retries",
        "catchup",
        "overlap",
        "enabled",
        "declared_by",
        "next_tick_at",
        "created_at",
        "updated_at",
    )
    return [
        *(schedules.c[name] for name in plain),
        sa.cast(schedules.c.payload, sa.Text).label("payload_json"),
        seconds_since(schedules.c.declared_at).label("declared_seconds"),
    ]


def _with_last_tick(tables: Tables) -> sa.Select[Any]:
    schedules, ticks = tables.schedules, tables.schedule_ticks
    last: sa.ScalarSelect[Any] = (
        sa.select(sa.type_coerce(sa.func.max(ticks.c.tick_at), UTCDateTime()))
        .where(ticks.c.schedule == schedules.c.name, ticks.c.job_id.is_not(None))
        .scalar_subquery()
    )
    return sa.select(*_columns(schedules), last.label("last_tick_at"))


def _read(row: Any) -> Schedule:
    return Schedule(**{name: value for name, value in row._mapping.items() if name != "now"})


def _record(
    connection: sa.Connection,
    tables: Tables,
    schedule: Schedule | NewSchedule,
    actor: str,
    what: str,
    reason: str | None = None,
    job_id: int | None = None,
) -> None:
    store.record(
        connection,
        tables,
        [
            {
                "job_id": job_id,
                "queue": schedule.queue,
                "task": schedule.task,
                "event": EventType.SCHEDULE,
                "actor": actor,
                "reason": f"schedule {schedule.name!r} {what}" + (f": {reason}" if reason else ""),
            }
        ],
    )
