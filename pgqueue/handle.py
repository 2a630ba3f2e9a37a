"""What an enqueue returns: the job's id, and ways to wait for its end."""

from __future__ import annotations

import asyncio
import functools
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from pgqueue import operations, results
from pgqueue.arguments import duration_seconds
from pgqueue.database import Database
from pgqueue.errors import ConfigurationError, JobCancelled, JobFailed, JobNotFound, PgqueueError, ResultTimeout
from pgqueue.job import Job, JobStatus
from pgqueue.results import Standing
from pgqueue.steps import Steps, look

#: The first wait between two looks at a job, what each one grows by, and the longest.
LOOK_SECONDS_MIN, LOOK_SECONDS_FACTOR, LOOK_SECONDS_MAX = 0.01, 1.5, 1.0

#: How long a job may be missing, when nothing is known of the transaction that enqueues it.
MISSING_SECONDS = 1.0

#: Of a job that was not stored because its queue was full.
DROPPED_ID = 0

#: The largest id that a job can have.
ID_MAX = 2**63 - 1


class JobHandle:
    """What an enqueue did, and ways to ask for more. It holds no session, and can be pickled: then it is only `id` and
    `inserted`.

    id: of the job.
    inserted: False when the unique key was taken; then `id` is the job that has it. Or when the queue was full and
    drops what does not fit; then `id` is 0, which no job has.
    """

    __slots__ = ("_queue", "_transaction", "id", "inserted")

    def __init__(
        self,
        id: int,
        inserted: bool = True,
        *,
        queue: Database | None = None,
        transaction: sa.RootTransaction | None = None,
    ) -> None:
        self.id = id
        self.inserted = inserted
        self._queue = queue
        self._transaction = None if transaction is None else weakref.ref(transaction)

    def result(self, timeout: float | timedelta | None = None) -> Any:
        """Wait until the job has ended, and return what its task returned, as JSON has it.

        timeout: seconds, or a timedelta; None: as long as it takes.
        Raises JobFailed when the job is dead, JobCancelled, JobNotFound, or ResultTimeout, which is a TimeoutError.
        """
        return wait(self._of(), self._waiting(timeout))[0]

    async def result_async(self, timeout: float | timedelta | None = None) -> Any:
        """As `result`, without blocking the event loop."""
        return (await wait_async(self._of(), self._waiting(timeout)))[0]

    def job(self) -> Job:
        """The job as it stands. Raises JobNotFound."""
        return self._of()._take(self._look())

    async def job_async(self) -> Job:
        """As `job`, without blocking the event loop."""
        return await self._of()._take_async(self._look())

    def status(self) -> JobStatus:
        """Where the job stands. Raises JobNotFound."""
        return JobStatus(self.job().status)

    async def status_async(self) -> JobStatus:
        """As `status`, without blocking the event loop."""
        return JobStatus((await self.job_async()).status)

    def progress(self) -> dict[str, Any] | None:
        """What the job's task last reported: done, total, note, and when (`at`); None: nothing yet. Raises
        JobNotFound."""
        return self.job().progress

    async def progress_async(self) -> dict[str, Any] | None:
        """As `progress`, without blocking the event loop."""
        return (await self.job_async()).progress

    def _look(self) -> Steps[Job]:
        self._require_committed()
        tables = self._of().tables
        return look(lambda connection: operations.get_job(connection, tables, self.id))

    def _waiting(self, timeout: float | timedelta | None) -> Waiting:
        self._require_committed()
        # What was inserted in a transaction that is over is there, or will never be.
        return Waiting([self.id], timeout, missing_seconds=0.0 if self._transaction else MISSING_SECONDS)

    def _require_committed(self) -> None:
        if self.id == DROPPED_ID:
            raise JobNotFound("no job was stored: its queue was full, and drops jobs then (on_full='drop')")
        transaction = self._transaction() if self._transaction is not None else None
        if transaction is not None and transaction.is_active:
            raise JobNotFound(
                f"job {self.id} is not there yet: the transaction that enqueues it is still open. Commit it (leave its "
                "`with` block) before you ask for the job"
            )

    def _of(self) -> Database:
        if self._queue is None:
            raise ConfigurationError(
                f"this handle was pickled, which leaves only its id: use pgq.result({self.id}), or "
                f"pgq.get_job({self.id})"
            )
        return self._queue

    def __repr__(self) -> str:
        return f"JobHandle(id={self.id}, inserted={self.inserted})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JobHandle) and (self.id, self.inserted) == (other.id, other.inserted)

    def __hash__(self) -> int:
        return hash((self.id, self.inserted))

    def __reduce__(self) -> tuple[Any, ...]:
        return JobHandle, (self.id, self.inserted)


def wait(queue: Database, waiting: Waiting) -> list[Any]:
    """The results of all jobs waited for."""
    while waiting.ids:
        with queue.reading() as connection:
            found = results.look(connection, queue.tables, waiting.ids)
        pause = waiting.take(found)
        if pause:
            time.sleep(pause)
    return waiting.ended()


async def wait_async(queue: Database, waiting: Waiting) -> list[Any]:
    while waiting.ids:
        find = functools.partial(results.look, tables=queue.tables, ids=waiting.ids)
        pause = waiting.take(await queue.read_async(find))
        if pause:
            await asyncio.sleep(pause)
    return waiting.ended()


class Waiting:
    """What is known of jobs that somebody waits for.

    return_errors: the error of a job that did not complete takes the place of its result, instead of being raised.
    """

    def __init__(
        self,
        ids: Iterable[int | JobHandle],
        timeout: float | timedelta | None,
        *,
        missing_seconds: float = MISSING_SECONDS,
        return_errors: bool = False,
    ) -> None:
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise ConfigurationError(
                f"expected several jobs, as enqueues returned them, or ids, got {type(ids).__name__}"
            )
        self._order = [_checked_id(job_id) for job_id in ids]
        self.ids: Sequence[int] = list(dict.fromkeys(self._order))  #: of the jobs that have not ended yet
        self._timeout = _checked_timeout(timeout)
        self._began = time.monotonic()
        self._missing_seconds = missing_seconds
        self._return_errors = return_errors
        self._seen: set[int] = set()
        self._ended: dict[int, Any] = {}
        self._pause = LOOK_SECONDS_MIN

    def take(self, found: Mapping[int, Standing]) -> float:
        """Note where the jobs stand. Returns how long to wait before the next look."""
        passed = time.monotonic() - self._began
        over = self._timeout is not None and passed >= self._timeout
        self._seen.update(found)
        missing_long = passed >= self._missing_seconds or over
        left = []
        for job_id in self.ids:
            standing = found.get(job_id)
            if standing is None and (job_id in self._seen or missing_long):
                self._end(job_id, _not_found(job_id))
            elif standing is None or standing.status in (JobStatus.PENDING, JobStatus.RUNNING):
                left.append(job_id)
            else:
                self._end(job_id, _end_of(job_id, standing))
        self.ids = left
        if not left:
            return 0.0
        if over:
            raise ResultTimeout(_overdue(left, self._timeout or 0.0))
        pause, self._pause = self._pause, min(self._pause * LOOK_SECONDS_FACTOR, LOOK_SECONDS_MAX)
        return pause if self._timeout is None else min(pause, self._timeout - passed)

    def ended(self) -> list[Any]:
        """The results, in the order of the ids."""
        return [self._ended[job_id] for job_id in self._order]

    def _end(self, job_id: int, end: Any) -> None:
        if isinstance(end, PgqueueError) and not self._return_errors:
            raise end
        self._ended[job_id] = end


def _end_of(job_id: int, standing: Standing) -> Any:
    """The result, or the error that stands for it."""
    if standing.status is JobStatus.COMPLETED:
        return standing.result
    if standing.status is JobStatus.CANCELLED:
        return JobCancelled(f"job {job_id} was cancelled", job_id)
    kind = standing.error.type if standing.error else ""
    return JobFailed(f"job {job_id} is dead" + (f": it failed with {kind}" if kind else ""), job_id, standing.error)


def _not_found(job_id: int) -> JobNotFound:
    return JobNotFound(
        f"there is no job {job_id}: was its transaction committed? If it was, the job has been deleted or pruned, or "
        "its task keeps no ended jobs (retention: keep_completed, keep_dead)"
    )


def _overdue(ids: Sequence[int], timeout: float) -> str:
    shown = ", ".join(map(str, ids[:10])) + (", …" if len(ids) > 10 else "")
    return f"job{'s' if len(ids) > 1 else ''} {shown} did not end within {timeout:g} s"


def _checked_id(job_id: object) -> int:
    if isinstance(job_id, JobHandle):
        job_id = job_id.id
    if isinstance(job_id, int) and not isinstance(job_id, bool) and 1 <= job_id <= ID_MAX:
        return job_id
    raise ConfigurationError(f"expected the id of a job, a whole number of at least 1, got {job_id!r}")


def _checked_timeout(timeout: object) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, int | float | timedelta) and not isinstance(timeout, bool):
        seconds = duration_seconds("timeout", timeout)
        if seconds >= 0:
            return seconds
    raise ConfigurationError(f"timeout must be 0 seconds or more, a timedelta or None, got {timeout!r}")
