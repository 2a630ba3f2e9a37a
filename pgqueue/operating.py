"""What operators do to jobs and queues while all is well: cancel, delete, pause, resume and prune."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import sqlalchemy as sa

from pgqueue import operations
from pgqueue.actor import who, why
from pgqueue.arguments import duration_seconds
from pgqueue.dialect import POSTGRESQL
from pgqueue.errors import ConfigurationError
from pgqueue.events import EventName, event_of_stored
from pgqueue.job import FINAL_STATUSES, Job, JobStatus
from pgqueue.notifier import STOP
from pgqueue.registry import Registry
from pgqueue.retry import DELAY_SECONDS_MAX
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
        with self.begin() as connection:
            status = operations.cancel_job(
                connection, self.tables, job_id, actor=who(actor), reason=why(reason), force=force
            )
            ended = [job_id] if status is JobStatus.CANCELLED else []
            cancelled = self._stored(connection, ended, EventName.CANCELLED)
        self._listeners.tell(event_of_stored(EventName.CANCELLED, job, why(reason)) for job in cancelled)
        if self.tables.dialect_name == POSTGRESQL and (force or status is JobStatus.RUNNING):
            self._wake_sender({f"{STOP}{job_id}"}, True)
        return status

    def _stored(self, connection: sa.Connection, job_ids: Sequence[int], *told: EventName) -> list[Job]:
        """The jobs as they stand, if anybody listens to what is to be told of them."""
        if not job_ids or self._listeners.wanted.isdisjoint(told):
            return []
        return operations.get_jobs(connection, self.tables, job_ids)

    def delete(self, job_id: int, *, reason: str | None = None, actor: str | None = None) -> None:
        """Delete a job that is not running; its events stay."""
        self._run(
            lambda connection: operations.delete_job(
                connection, self.tables, job_id, actor=who(actor), reason=why(reason)
            )
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
        checked_name("queue", queue)
        seconds = None if duration is None else duration_seconds("duration", duration)
        if seconds is not None and not 0 < seconds <= DELAY_SECONDS_MAX:
            raise ConfigurationError(
                f"the duration of a pause must be more than 0 and at most {DELAY_SECONDS_MAX:.0f} seconds, "
                f"got {duration!r}"
            )
        with self.begin() as connection:
            operations.pause_queue(
                connection, self.tables, queue, seconds=seconds, actor=who(actor), reason=why(reason)
            )

    def resume(self, queue: str, *, reason: str | None = None, actor: str | None = None) -> bool:
        """End the pause of a queue; whether there was one."""
        checked_name("queue", queue)
        with self.begin() as connection:
            ended = operations.resume_queue(connection, self.tables, queue, actor=who(actor), reason=why(reason))
        if ended and self.tables.dialect_name == POSTGRESQL:
            self._wake_sender({queue}, True)
        return ended

    def prune(
        self,
        *,
        older_than: float | timedelta,
        statuses: Sequence[str] = (JobStatus.COMPLETED, JobStatus.CANCELLED),
        pruned: Callable[[int], None] = lambda count: None,
    ) -> int:
        """Delete jobs that became final longer ago than `older_than`, in short transactions; how many.

        Dead jobs are kept unless `statuses` names them. `pruned` is told of each batch.
        """
        seconds = duration_seconds("older_than", older_than)
        if not 0 <= seconds <= DELAY_SECONDS_MAX:
            raise ConfigurationError(
                f"older_than must be between 0 and {DELAY_SECONDS_MAX:.0f} seconds, got {older_than!r}"
            )
        if not statuses:
            raise ConfigurationError(f"name at least one status whose jobs can be pruned: {', '.join(FINAL_STATUSES)}")
        for status in statuses:
            if status not in FINAL_STATUSES:
                raise ConfigurationError(f"only {', '.join(FINAL_STATUSES)} jobs can be pruned, got {str(status)!r}")
        total = 0
        after_id: int | None = 0
        while after_id is not None:
            with self.begin() as connection:
                count, after_id = operations.prune(
                    connection,
                    self.tables,
                    older_than=seconds,
                    statuses=[JobStatus(status) for status in statuses],
                    after_id=after_id,
                )
            total += count
            pruned(count)
        return total
