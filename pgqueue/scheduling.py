"""What applications and operators do with schedules, and the jobs that schedules make."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

from pgqueue import schedules, store
from pgqueue.actor import who, why
from pgqueue.cron import CronRule, NewSchedule, Schedule, checked_catchup
from pgqueue.dialect import POSTGRESQL
from pgqueue.engine import errors_explained
from pgqueue.errors import ConfigurationError, InvalidPayload
from pgqueue.handle import JobHandle, Queue
from pgqueue.job import EnqueueResult, Job, NewJob, OnConflict
from pgqueue.schema import Tables
from pgqueue.task import TaskDefinition, checked_name
from pgqueue.transaction import (
    AsyncTransaction,
    MustAwait,
    SyncTransaction,
    Wake,
    checked_async,
    open_root,
    open_transaction,
    run_in_transaction,
    wake_after_commit,
)

T = TypeVar("T")

#: What of a task's settings for one enqueue a schedule can carry.
CARRIED_OPTIONS = ("queue", "priority", "max_retries")

#: Where a job's metadata names its schedule, and the tick that it was made for.
SCHEDULE_KEY, TICK_KEY = "schedule", "tick_at"


class SchedulableTask(Protocol):
    """`client.Task`, as schedules see it."""

    definition: TaskDefinition
    options: Any

    def _template(self) -> NewJob: ...


class Owner(Queue, Protocol):
    """`client.PgQueue`, as schedules see it."""

    @property
    def _wake_sender(self) -> Wake: ...

    @property
    def tasks(self) -> Mapping[str, Any]: ...

    @property
    def _job_class(self) -> type[Job] | None: ...

    def _tables_of(self, connection: sa.Connection) -> Tables: ...

    def get_task(self, name: str) -> Any: ...

    def begin(self) -> AbstractContextManager[sa.Connection]: ...


class Schedules:
    """The schedules of a queue, as `pgq.schedules`.

    What changes one commits by itself, or with `session` in your transaction. Workers see it within seconds.
    """

    def __init__(self, pgq: Owner) -> None:
        self._pgq = pgq

    def upsert(
        self,
        session: SyncTransaction,
        name: str,
        *,
        cron: str,
        task: SchedulableTask | str,
        payload: Mapping[str, Any] | None = None,
        tz: str = "UTC",
        catchup: str = "latest",
        overlap: bool = True,
        enabled: bool | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> Schedule:
        """Make the schedule of that name, or let it be like this from now on, in the transaction of `session`.

        task: a task or its name; with `task.using(queue=…, priority=…, max_retries=…)` its jobs get these.
        payload: of each job; checked against the task here and now.
        cron, tz, catchup, overlap: as for `PgQueue.cron`.
        enabled: None leaves a schedule that exists as it is; a new one is enabled.

        A changed expression or time zone counts from now on: nothing is enqueued for the past because of it. Raises
        ConfigurationError, InvalidPayload, TaskNotFound or WrongSession.
        """
        new = self._new(name, cron, task, payload, tz, catchup, overlap)
        _, connection = open_transaction(session, "schedules.upsert", self._pgq._job_class)
        return self._upsert(connection, new, enabled, actor, reason)

    def upsert_async(
        self,
        session: AsyncTransaction,
        name: str,
        *,
        cron: str,
        task: SchedulableTask | str,
        payload: Mapping[str, Any] | None = None,
        tz: str = "UTC",
        catchup: str = "latest",
        overlap: bool = True,
        enabled: bool | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> Awaitable[Schedule]:
        """As `upsert`, for an AsyncSession or AsyncConnection. Must be awaited."""
        opened = checked_async(session, "schedules.upsert_async")
        new = self._new(name, cron, task, payload, tz, catchup, overlap)
        return MustAwait(
            lambda: run_in_transaction(
                opened,
                "schedules.upsert_async",
                self._pgq._job_class,
                lambda _, connection: self._upsert(connection, new, enabled, actor, reason),
            ),
            f"schedules.upsert_async() of schedule {name!r}",
            opened,
        )

    def get(self, name: str) -> Schedule:
        """The schedule of that name. Raises ScheduleNotFound."""
        with self._pgq.reading() as connection:
            return schedules.get(connection, self._pgq.tables, name)

    def enable(
        self,
        name: str,
        *,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> bool:
        """Let a schedule make jobs, from its next tick on; False when it did before. Raises ScheduleNotFound."""
        return self._set_enabled(name, True, session, reason, actor)

    def disable(
        self,
        name: str,
        *,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> bool:
        """Let a schedule make no more jobs, whatever the code declares; False when it made none before.

        Its open jobs go on. Raises ScheduleNotFound.
        """
        return self._set_enabled(name, False, session, reason, actor)

    def run_now(
        self,
        name: str,
        *,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> JobHandle:
        """Enqueue a job of a schedule out of turn, enabled or not; its ticks stay as they are.

        With overlap=False nothing is enqueued while the job before is open; the result then names that one. Raises
        ScheduleNotFound, or QueueFull as an enqueue does.
        """
        with self._in_transaction("schedules.run_now", session) as (target, connection):
            tables = self._pgq._tables_of(connection)
            schedule = schedules.get(connection, tables, name, lock=True)  # first, as a scheduler does
            result = enqueue(target, connection, tables, schedule, self._pgq.tasks)
            if result.inserted:
                schedules.record_run(connection, tables, schedule, result.id, actor=who(actor), reason=why(reason))
                if connection.dialect.name == POSTGRESQL:
                    wake_after_commit(target, connection, schedule.queue, self._pgq._wake_sender)
            transaction = open_root(connection) if result.inserted else None
            return JobHandle(result.id, result.inserted, queue=self._pgq, transaction=transaction)

    def delete(
        self,
        name: str,
        *,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None:
        """Delete a schedule; its jobs stay. One that code declares comes back when a worker with that code starts:
        `disable` it instead. Raises ScheduleNotFound."""
        with self._in_transaction("schedules.delete", session) as (_, connection):
            tables = self._pgq._tables_of(connection)
            schedules.delete(connection, tables, name, actor=who(actor), reason=why(reason))

    def list(self) -> Sequence[Schedule]:
        """Every schedule, by name."""
        with self._pgq.reading() as connection:
            return schedules.all_schedules(connection, self._pgq.tables)

    def _new(
        self,
        name: str,
        cron: str,
        task: SchedulableTask | str,
        payload: Mapping[str, Any] | None,
        tz: str,
        catchup: str,
        overlap: bool,
    ) -> NewSchedule:
        found = self._pgq.get_task(task) if isinstance(task, str) else task
        return new_schedule(found, name, cron, payload, tz, catchup, overlap)

    def _upsert(
        self, connection: sa.Connection, new: NewSchedule, enabled: bool | None, actor: str | None, reason: str | None
    ) -> Schedule:
        if enabled is not None and not isinstance(enabled, bool):
            raise ConfigurationError(f"enabled must be True, False or None, got {enabled!r}")
        tables = self._pgq._tables_of(connection)
        with errors_explained(connection.engine.url):
            return schedules.upsert(connection, tables, new, enabled=enabled, actor=who(actor), reason=why(reason))

    def _set_enabled(
        self, name: str, enabled: bool, session: SyncTransaction | None, reason: str | None, actor: str | None
    ) -> bool:
        call = "schedules.enable" if enabled else "schedules.disable"
        with self._in_transaction(call, session) as (_, connection):
            tables = self._pgq._tables_of(connection)
            return schedules.set_enabled(connection, tables, name, enabled, actor=who(actor), reason=why(reason))

    @contextmanager
    def _in_transaction(self, call: str, session: SyncTransaction | None) -> Iterator[tuple[Any, sa.Connection]]:
        """The caller's transaction, or one of its own."""
        if session is None:
            with self._pgq.begin() as connection:
                yield connection, connection
        else:
            target, connection = open_transaction(session, call, self._pgq._job_class)
            with errors_explained(connection.engine.url):
                yield target, connection


def new_schedule(
    task: SchedulableTask,
    name: str | None,
    cron: str,
    payload: Mapping[str, Any] | None,
    tz: str,
    catchup: str,
    overlap: bool,
) -> NewSchedule:
    """A checked schedule of a task. Raises ConfigurationError or InvalidPayload."""
    if not hasattr(task, "definition"):
        raise ConfigurationError(f"a schedule's task is a task or the name of one, got {type(task).__name__}")
    definition = task.definition
    name = definition.name if name is None else checked_name("schedule", name)
    if not isinstance(overlap, bool):
        raise ConfigurationError(f"overlap of schedule {name!r} must be True or False, got {overlap!r}")
    for option in fields(task.options):
        if option.name not in CARRIED_OPTIONS and getattr(task.options, option.name) != option.default:
            hint = "; overlap=False keeps a second job away" if option.name == "unique_key" else ""
            raise ConfigurationError(
                f"schedule {name!r} of task {definition.name!r}: using({option.name}=…) cannot be kept for later jobs, "
                f"only {', '.join(CARRIED_OPTIONS)} can{hint}"
            )
    template = task._template()
    return NewSchedule(
        name=name,
        rule=CronRule(cron, tz),
        task=definition.name,
        payload_json=definition.encode({} if payload is None else payload),
        queue=template.queue,
        priority=template.priority,
        max_retries=template.max_retries,
        catchup=checked_catchup(catchup),
        overlap=overlap,
    )


def enqueue(
    target: Any,
    connection: sa.Connection,
    tables: Tables,
    schedule: Schedule,
    tasks: Mapping[str, Any],
    tick: datetime | None = None,
) -> EnqueueResult:
    """Store the job that a schedule makes, for a tick or out of turn: as an enqueue of its task would.

    Of a task that is not known here, or whose payload fits no more, the job is what the row says. Then it waits for a
    worker that knows the task, or its attempt fails and says why. A queue that is full raises QueueFull for a tick at
    once, whatever it does to others: a tick can wait.

    The key of a schedule without overlap stands back behind that of a task which is unique. As its jobs have one
    payload, they have one key.
    """
    metadata = {SCHEDULE_KEY: schedule.name}
    if tick is not None:
        metadata[TICK_KEY] = tick.astimezone(UTC).isoformat().replace("+00:00", "Z")
    unique_key = None if schedule.overlap else f"schedule:{schedule.name}"
    plain = NewJob(
        task=schedule.task,
        payload_json=schedule.payload_json,
        queue=schedule.queue,
        priority=schedule.priority,
        max_retries=schedule.max_retries,
        unique_key=unique_key,
        metadata_json=json.dumps(metadata),
    )
    task: Any = tasks.get(schedule.task)
    if task is not None:
        payload: dict[str, Any] | None = None
        has_own_key = task.definition.unique is not None
        with suppress(ConfigurationError, ValueError, RecursionError):  # a row that somebody made by SQL
            task = task.using(
                queue=schedule.queue,
                priority=schedule.priority,
                max_retries=schedule.max_retries,
                unique_key=None if has_own_key else unique_key,
                on_conflict=OnConflict.SKIP,
                metadata=metadata,
            )
            payload = schedule.payload
        if payload is not None:
            task, payload = task._seen_by_middleware(payload)
            job = plain
            with suppress(InvalidPayload):
                job = task._new_job((), payload)
            if has_own_key and job.unique_key is None:
                job = replace(job, unique_key=unique_key, period_seconds=None)
            handle = task._insert(target, connection, job, may_block=tick is None)
            return EnqueueResult(handle.id, handle.inserted)
    return store.insert_job(connection, tables, plain, on_conflict=OnConflict.SKIP, actor=who(None))
