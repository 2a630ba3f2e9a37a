"""Every exception of pgqueue.

PgqueueError
├── ConfigurationError          a setting, option or URL that cannot work (also a ValueError)
├── InvalidTask                 a function that cannot be a task (also a TypeError)
├── TaskNotFound                no task of that name is registered (also a LookupError)
├── JobNotFound                 no job has that id (also a LookupError)
├── JobFailed                   the job whose result was waited for is dead
├── JobCancelled                the job whose result was waited for was cancelled
├── ResultTimeout               the job did not end in the time given (also a TimeoutError)
├── ScheduleNotFound            no schedule of that name is there (also a LookupError)
├── InvalidPayload              a payload that does not fit the task or cannot be stored (also a ValueError)
├── WrongSession                not a session or connection that can take the call (also a TypeError)
├── NotAwaited                  an asynchronous enqueue was never awaited
├── QueueFull                   the queue has as many pending jobs as it may have
├── DuplicateJob                the unique key belongs to a job that is not finished
├── IllegalTransition           the job's status does not allow what was asked
├── ProcessDied                 the process of an isolated task ended before the task did
├── ClaimLost                   the job was claimed again or finished; this claim may no longer write
├── DatabaseUnreachable         no connection, or it broke
├── SchemaMissing               pgqueue's tables are not there
└── SchemaOutdated              pgqueue's tables are older or newer than this code

What a task raises to say how its attempt ends is not an error and stands apart: RetryAfter, Snooze, Discard and
Cancel derive from TaskSignal.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


class PgqueueError(Exception):
    """Base class of everything that pgqueue raises on purpose."""


class ConfigurationError(PgqueueError, ValueError):
    """A setting, option or URL cannot work."""


class InvalidTask(PgqueueError, TypeError):
    """The function cannot be registered as a task."""


class TaskNotFound(PgqueueError, LookupError):
    """No task of that name is registered."""


class JobNotFound(PgqueueError, LookupError):
    """No job has that id."""


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """What is stored of an exception: already cleaned and capped, so that storing it cannot fail."""

    type: str
    message: str
    traceback: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"type": self.type, "message": self.message, "traceback": self.traceback}


class JobFailed(PgqueueError):
    """The job whose result was waited for is dead.

    job_id: its id.
    error: type, message and traceback of its last failed attempt; None when it died without one.
    """

    def __init__(self, message: str, job_id: int = 0, error: ErrorInfo | None = None) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.error = error


class JobCancelled(PgqueueError):
    """The job whose result was waited for was cancelled. job_id: its id."""

    def __init__(self, message: str, job_id: int = 0) -> None:
        super().__init__(message)
        self.job_id = job_id


class ResultTimeout(PgqueueError, TimeoutError):
    """The job did not end in the time given. It goes on."""


class ScheduleNotFound(PgqueueError, LookupError):
    """There is no schedule of that name."""


class InvalidPayload(PgqueueError, ValueError):
    """The payload does not fit the task's signature, or cannot be stored as JSON."""


class WrongSession(PgqueueError, TypeError):
    """The session is not a session or connection that this call can use."""


class NotAwaited(PgqueueError):
    """A coroutine of pgqueue was created but never awaited, so nothing was enqueued."""


class QueueFull(PgqueueError):
    """The queue has as many pending jobs as it may have."""


class DuplicateJob(PgqueueError):
    """The unique key belongs to a job that is not finished."""


class IllegalTransition(PgqueueError):
    """The job's status does not allow what was asked."""


class ProcessDied(PgqueueError):
    """The process of an isolated task crashed, exited or was killed before the task returned.

    Not raised: an attempt fails with it, so that a Retry can name it.
    """


class ClaimLost(PgqueueError):
    """The job was claimed again or finished by somebody else; this claim may no longer write."""


class DatabaseUnreachable(PgqueueError):
    """The database cannot be reached, or refused the connection."""


class SchemaMissing(PgqueueError):
    """pgqueue's tables are not in the database."""


class SchemaOutdated(PgqueueError):
    """pgqueue's tables belong to another version than this code."""


class TaskSignal(Exception):  # noqa: N818, RUF100 — not an error: the way a task says how its attempt ends
    """Base class of what a task raises to end its attempt other than by success or failure."""


class RetryAfter(TaskSignal):
    """This attempt failed: try again after exactly `delay` (seconds or timedelta) instead of the backoff.

    A retry is charged; without one left the job is dead.
    """

    def __init__(self, delay: float | timedelta, reason: str = "") -> None:
        super().__init__(reason)
        self.delay = delay
        self.reason = reason


class Snooze(TaskSignal):
    """Run this job again after `delay` (seconds or timedelta). No retry is charged."""

    def __init__(self, delay: float | timedelta, reason: str = "snoozed by the task") -> None:
        super().__init__(reason)
        self.delay = delay
        self.reason = reason


class Discard(TaskSignal):
    """This job can never succeed: make it dead now, whatever retries are left."""

    def __init__(self, reason: str = "discarded by the task") -> None:
        super().__init__(reason)
        self.reason = reason


class Cancel(TaskSignal):
    """This job is no longer wanted: make it cancelled now."""

    def __init__(self, reason: str = "cancelled by the task") -> None:
        super().__init__(reason)
        self.reason = reason
