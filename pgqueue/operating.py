"""What operators do to jobs and queues while all is well: cancel, delete, pause, resume and prune."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta

import sqlalchemy as sa

from pgqueue import operations
from pgqueue.actor import who, why
from pgqueue.arguments import checked_id, duration_seconds
from pgqueue.errors import ConfigurationError
from pgqueue.events import EventName, event_of_stored
from pgqueue.job import FINAL_STATUSES, Job, JobStatus
from pgqueue.notifier import STOP
from pgqueue.registry import Registry
from pgqueue.retry import DELAY_SECONDS_MAX
from pgqueue.steps import Steps, change
from pgqueue.task import checked_name


class Operator(Registry):
    """Calls that change jobs and queues."""

    def cancel(
        self, job_id: int, *, force: bool = False, reason: str | None = None, actor: str | None = None
    ) -> JobStatus:
        """Withdraw a job that is pending or running; its status then.

        CANCELLED: it was pending, and is cancelled. RUNNING: its worker was asked to stop it, and will do so within
        about a second: an `async def` task is cancelled, the process of an isolated one is killed, and a `def` task
        in a thread sees `current_job().cancel_requested` become true. If it returns all the same, it is completed;
        however else its attempt ends, it is cancelled.
        With `force` a running job is cancelled at once, too: whatever its worker writes later is refused.
        Raises JobNotFound, or IllegalTransition when it is final.
        """
        return self._take(self._cancel(job_id, force, reason, actor))

    async def cancel_async(
        self, job_id: int, *, force: bool = False, reason: str | None = None, actor: str | None = None
    ) -> JobStatus:
        """As `cancel`, without blocking the event loop."""
        return await self._take_async(self._cancel(job_id, force, reason, actor))

    def _cancel(self, job_id: int, force: bool, reason: str | None, actor: str | None) -> Steps[JobStatus]:
        by, because = who(actor), why(reason)
        checked_id(job_id)

        def cancel(connection: sa.Connection) -> tuple[JobStatus, list[Job]]:
            status = operations.cancel_job(connection, self.tables, job_id, actor=by, reason=because, force=force)
            ended = [job_id] if status is JobStatus.CANCELLED else []
            return status, self._stored(connection, ended, EventName.CANCELLED)

        status, cancelled = yield from change(
            cancel, wakes=lambda done: [f"{STOP}{job_id}"] if force or done[0] is JobStatus.RUNNING else []
        )
        self._listeners.tell(event_of_stored(EventName.CANCELLED, job, because) for job in cancelled)
        return status

    def delete(self, job_id: int, *, reason: str | None = None, actor: str | None = None) -> None:
        """Delete a job that is not running; its events stay."""
        self._take(self._delete(job_id, reason, actor))

    async def delete_async(self, job_id: int, *, reason: str | None = None, actor: str | None = None) -> None:
        """As `delete`, without blocking the event loop."""
        await self._take_async(self._delete(job_id, reason, actor))

    def _delete(self, job_id: int, reason: str | None, actor: str | None) -> Steps[None]:
        by, because = who(actor), why(reason)
        checked_id(job_id)
        return change(
            lambda connection: operations.delete_job(connection, self.tables, job_id, actor=by, reason=because)
        )

    def pause(
        self,
        queue: str,
        *,
        duration: float | timedelta | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None:
        """Let nothing be claimed from a queue, for a time or until `resume`. Running jobs go on."""
        self._take(self._pause(queue, duration, reason, actor))

    async def pause_async(
        self,
        queue: str,
        *,
        duration: float | timedelta | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None:
        """As `pause`, without blocking the event loop."""
        await self._take_async(self._pause(queue, duration, reason, actor))

    def _pause(
        self, queue: str, duration: float | timedelta | None, reason: str | None, actor: str | None
    ) -> Steps[None]:
        checked_name("queue", queue)
        seconds = None if duration is None else duration_seconds("duration", duration)
        if seconds is not None and not 0 < seconds <= DELAY_SECONDS_MAX:
            raise ConfigurationError(
                f"the duration of a pause must be more than 0 and at most {DELAY_SECONDS_MAX:.0f} seconds, "
                f"got {duration!r}"
            )
        by, because = who(actor), why(reason)
        return change(
            lambda connection: operations.pause_queue(
                connection, self.tables, queue, seconds=seconds, actor=by, reason=because
            )
        )

    def resume(self, queue: str, *, reason: str | None = None, actor: str | None = None) -> bool:
        """End the pause of a queue; whether there was one."""
        return self._take(self._resume(queue, reason, actor))

    async def resume_async(self, queue: str, *, reason: str | None = None, actor: str | None = None) -> bool:
        """As `resume`, without blocking the event loop."""
        return await self._take_async(self._resume(queue, reason, actor))

    def _resume(self, queue: str, reason: str | None, actor: str | None) -> Steps[bool]:
        checked_name("queue", queue)
        by, because = who(actor), why(reason)
        return change(
            lambda connection: operations.resume_queue(connection, self.tables, queue, actor=by, reason=because),
            wakes=lambda ended: [queue] if ended else [],
        )

    def prune(
        self,
        *,
        older_than: float | timedelta,
        statuses: Sequence[str] = (JobStatus.COMPLETED, JobStatus.CANCELLED),
        pruned: Callable[[int], None] = lambda count: None,
    ) -> int:
        """Delete jobs that became final longer ago than `older_than`, in short transactions; how many.

        Dead jobs are kept unless `statuses` names them. `pruned` is told of each batch.
        What was recorded of jobs that are gone, such as who deleted them, is deleted when it is as old.
        """
        return self._take(self._prune(older_than, statuses, pruned))

    async def prune_async(
        self,
        *,
        older_than: float | timedelta,
        statuses: Sequence[str] = (JobStatus.COMPLETED, JobStatus.CANCELLED),
        pruned: Callable[[int], None] = lambda count: None,
    ) -> int:
        """As `prune`, without blocking the event loop."""
        return await self._take_async(self._prune(older_than, statuses, pruned))

    def _prune(
        self, older_than: float | timedelta, statuses: Sequence[str], pruned: Callable[[int], None]
    ) -> Steps[int]:
        seconds = duration_seconds("older_than", older_than)
        if not 0 <= seconds <= DELAY_SECONDS_MAX:
            raise ConfigurationError(
                f"older_than must be between 0 and {DELAY_SECONDS_MAX:.0f} seconds, got {older_than!r}"
            )
        if isinstance(statuses, str):
            raise ConfigurationError(f"statuses must be several, such as ['dead'], got {statuses!r}")
        if not statuses:
            raise ConfigurationError(f"name at least one status whose jobs can be pruned: {', '.join(FINAL_STATUSES)}")
        for status in statuses:
            if status not in FINAL_STATUSES:
                raise ConfigurationError(f"only {', '.join(FINAL_STATUSES)} jobs can be pruned, got {str(status)!r}")
        total = 0
        after_id: int | None = 0
        chosen = [JobStatus(status) for status in statuses]
        while after_id is not None:
            prune = functools.partial(
                operations.prune, tables=self.tables, older_than=seconds, statuses=chosen, after_id=after_id
            )
            count, after_id = yield from change(prune)
            total += count
            pruned(count)
        after_id = 0
        while after_id is not None:
            prune_events = functools.partial(
                operations.prune_events, tables=self.tables, older_than=seconds, after_id=after_id
            )
            _, after_id = yield from change(prune_events)
        return total

    def _stored(self, connection: sa.Connection, job_ids: Sequence[int], *told: EventName) -> list[Job]:
        """The jobs as they stand, if anybody listens to what is to be told of them."""
        if not job_ids or self._listeners.wanted.isdisjoint(told):
            return []
        return operations.get_jobs(connection, self.tables, job_ids)
