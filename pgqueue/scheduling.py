"""What applications and operators do with schedules."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqueue import schedules
from pgqueue.actor import who, why
from pgqueue.arguments import checked_text
from pgqueue.cron import NewSchedule, Schedule
from pgqueue.dialect import POSTGRESQL
from pgqueue.enqueueing import Task
from pgqueue.errors import ConfigurationError
from pgqueue.handle import JobHandle
from pgqueue.registry import Registry
from pgqueue.scheduled import enqueue, new_schedule
from pgqueue.steps import Steps, change, insert, look
from pgqueue.transaction import (
    AsyncTransaction,
    MustAwait,
    SyncTransaction,
    checked_async,
    open_root,
    open_transaction,
    wake_after_commit,
)


class Schedules:
    """The schedules of a queue, as `pgq.schedules`.

    What changes one commits by itself, or with `session` in your transaction. Workers see it within seconds.
    """

    def __init__(self, pgq: Registry) -> None:
        self._pgq = pgq

    def upsert(
        self,
        session: SyncTransaction,
        name: str,
        *,
        cron: str,
        task: Task[..., Any] | str,
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
        opened, _ = open_transaction(session, "schedules.upsert", self._pgq._job_class)
        return self._pgq._take_in(opened, "schedules.upsert", self._upsert(new, enabled, actor, reason))

    def upsert_async(
        self,
        session: AsyncTransaction,
        name: str,
        *,
        cron: str,
        task: Task[..., Any] | str,
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
            lambda: self._pgq._take_in_async(
                opened, "schedules.upsert_async", self._upsert(new, enabled, actor, reason)
            ),
            f"schedules.upsert_async() of schedule {name!r}",
            opened,
        )

    def get(self, name: str) -> Schedule:
        """The schedule of that name. Raises ScheduleNotFound."""
        return self._pgq._take(self._get(name))

    async def get_async(self, name: str) -> Schedule:
        """As `get`, without blocking the event loop."""
        return await self._pgq._take_async(self._get(name))

    def _get(self, name: str) -> Steps[Schedule]:
        checked_text("the name of a schedule", name, is_optional=False)
        return look(lambda connection: schedules.get(connection, self._pgq.tables, name))

    def enable(
        self,
        name: str,
        *,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> bool:
        """Let a schedule make jobs, from its next tick on; False when it did before. Raises ScheduleNotFound."""
        return self._pgq._take_in(session, "schedules.enable", self._set_enabled(name, True, reason, actor))

    async def enable_async(
        self,
        name: str,
        *,
        session: AsyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> bool:
        """As `enable`, without blocking the event loop; `session` is an AsyncSession or AsyncConnection."""
        steps = self._set_enabled(name, True, reason, actor)
        return await self._pgq._take_in_async(session, "schedules.enable_async", steps)

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
        return self._pgq._take_in(session, "schedules.disable", self._set_enabled(name, False, reason, actor))

    async def disable_async(
        self,
        name: str,
        *,
        session: AsyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> bool:
        """As `disable`, without blocking the event loop; `session` is an AsyncSession or AsyncConnection."""
        steps = self._set_enabled(name, False, reason, actor)
        return await self._pgq._take_in_async(session, "schedules.disable_async", steps)

    def _set_enabled(self, name: str, enabled: bool, reason: str | None, actor: str | None) -> Steps[bool]:
        checked_text("the name of a schedule", name, is_optional=False)
        by, because = who(actor), why(reason)
        return change(
            lambda connection: schedules.set_enabled(
                connection, self._pgq._tables_of(connection), name, enabled, actor=by, reason=because
            )
        )

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
        return self._pgq._take_in(session, "schedules.run_now", self._run_now(name, reason, actor))

    async def run_now_async(
        self,
        name: str,
        *,
        session: AsyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> JobHandle:
        """As `run_now`, without blocking the event loop; `session` is an AsyncSession or AsyncConnection."""
        steps = self._run_now(name, reason, actor)
        return await self._pgq._take_in_async(session, "schedules.run_now_async", steps)

    def _run_now(self, name: str, reason: str | None, actor: str | None) -> Steps[JobHandle]:
        checked_text("the name of a schedule", name, is_optional=False)
        by, because = who(actor), why(reason)

        def run(target: Session | sa.Connection, connection: sa.Connection) -> JobHandle:
            tables = self._pgq._tables_of(connection)
            schedule = schedules.get(connection, tables, name, lock=True)  # first, as a scheduler does
            result = enqueue(target, connection, tables, schedule, self._pgq.tasks)
            if result.inserted:
                schedules.record_run(connection, tables, schedule, result.id, actor=by, reason=because)
                if connection.dialect.name == POSTGRESQL:
                    wake_after_commit(target, connection, schedule.queue, self._pgq._wake_sender)
            transaction = open_root(connection) if result.inserted else None
            return JobHandle(result.id, result.inserted, queue=self._pgq, transaction=transaction)

        return insert(run)

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
        self._pgq._take_in(session, "schedules.delete", self._delete(name, reason, actor))

    async def delete_async(
        self,
        name: str,
        *,
        session: AsyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None:
        """As `delete`, without blocking the event loop; `session` is an AsyncSession or AsyncConnection."""
        await self._pgq._take_in_async(session, "schedules.delete_async", self._delete(name, reason, actor))

    def _delete(self, name: str, reason: str | None, actor: str | None) -> Steps[None]:
        checked_text("the name of a schedule", name, is_optional=False)
        by, because = who(actor), why(reason)
        return change(
            lambda connection: schedules.delete(
                connection, self._pgq._tables_of(connection), name, actor=by, reason=because
            )
        )

    def list(self) -> Sequence[Schedule]:
        """Every schedule, by name."""
        return self._pgq._take(self._list())

    async def list_async(self) -> Sequence[Schedule]:
        """As `list`, without blocking the event loop."""
        return await self._pgq._take_async(self._list())

    def _list(self) -> Steps[Sequence[Schedule]]:
        return look(lambda connection: schedules.all_schedules(connection, self._pgq.tables))

    def _new(
        self,
        name: str,
        cron: str,
        task: Task[..., Any] | str,
        payload: Mapping[str, Any] | None,
        tz: str,
        catchup: str,
        overlap: bool,
    ) -> NewSchedule:
        found = self._pgq.get_task(task) if isinstance(task, str) else task
        return new_schedule(found, name, cron, payload, tz, catchup, overlap)

    def _upsert(self, new: NewSchedule, enabled: bool | None, actor: str | None, reason: str | None) -> Steps[Schedule]:
        if enabled is not None and not isinstance(enabled, bool):
            raise ConfigurationError(f"enabled must be True, False or None, got {enabled!r}")
        by, because = who(actor), why(reason)
        return change(
            lambda connection: schedules.upsert(
                connection, self._pgq._tables_of(connection), new, enabled=enabled, actor=by, reason=because
            )
        )
