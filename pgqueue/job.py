"""What a job is: its row, a claim on it, how an attempt ended, and what is to be written then.

Plain data. `schema` maps `Job` to its table; nothing here knows a database, a clock or a task.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, overload

import pydantic_core

from pgqueue.errors import ErrorInfo as ErrorInfo


class JobStatus(StrEnum):
    """Where a job stands. Two are open, three are final."""

    PENDING = "pending"  #: waits to be claimed, now or when `run_at` comes
    RUNNING = "running"  #: claimed; `claim_token` and `claim_expires_at` are set exactly in this status
    COMPLETED = "completed"  #: an attempt succeeded
    DEAD = "dead"  #: will not run again by itself: retries used up, or discarded; `replay` revives it
    CANCELLED = "cancelled"  #: withdrawn before it succeeded


FINAL_STATUSES = (JobStatus.COMPLETED, JobStatus.DEAD, JobStatus.CANCELLED)


class OnConflict(StrEnum):
    """What an enqueue does when its unique key belongs to a job that is pending or running."""

    SKIP = "skip"  #: enqueue nothing; the result names the job that is there
    RAISE = "raise"  #: raise DuplicateJob; the caller's transaction stays usable
    REPLACE = "replace"  #: a pending job takes the new payload and options; a running one raises DuplicateJob


class Job:
    """One request to run a task: one row of the `jobs` table, as an ORM object.

    Made by `task.new(...)` and queried through `pgq.Job`, the subclass that is mapped to the tables of one
    pgqueue. Fields that only pgqueue writes (status, claim, counters, times) are best left alone: change a job
    through the API, which fences and records what it does.
    """

    id: int  #: assigned by the database when the row is inserted
    queue: str  #: the named line it waits in
    task: str  #: the registered name of the function to run
    payload: dict[str, Any]  #: the function's keyword arguments
    priority: int  #: higher runs first; 0 unless given
    status: str  #: one of JobStatus
    run_at: datetime  #: not claimed before; moved forward by retry and snooze
    claimed_by: str | None  #: the worker of the present or last attempt
    claim_token: uuid.UUID | None  #: fresh for each claim and set only while running: the fence of every write
    claim_expires_at: datetime | None  #: when the lease ends unless extended; set only while running
    attempt: int  #: how often it was claimed
    retries: int  #: how many of those attempts failed and were charged
    max_retries: int  #: retries allowed before it is dead
    expires_at: datetime | None  #: not worth running after this
    unique_key: str | None  #: at most one open job of a task has the same key
    ordering_key: str | None  #: jobs of one key run one after another
    concurrency_key: str | None  #: jobs of one key share a limit
    metadata: dict[str, Any]  #: headers, trace context, tags; never read by the queue
    result: Any  #: what the task returned
    error: dict[str, Any] | None  #: type, message and traceback of the last failed attempt
    progress: dict[str, Any] | None  #: what the task last reported
    created_at: datetime
    claimed_at: datetime | None  #: when the present or last attempt was claimed
    finished_at: datetime | None  #: when it became final; NULL exactly while it is open
    rate_key: str | None  #: jobs of one key share a rate limit
    waits_for: str | None  #: what must come free before it can be claimed: order, task, key:… or rate:…
    slot: str | None  #: of a limit: held since its claim, awaited when others wait for its end, or offered
    leads_order: bool  #: jobs of the same ordering_key wait for its end
    cancel_requested_at: datetime | None  #: when its worker was asked to stop the attempt
    prune_at: datetime | None  #: deleted after this moment; NULL: kept until somebody prunes

    def __init__(self, **fields: Any) -> None:
        for name, value in fields.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        shown = {name: self.__dict__.get(name) for name in ("id", "task", "queue", "status")}
        return "Job(" + ", ".join(f"{name}={value!r}" for name, value in shown.items()) + ")"


@dataclass(slots=True, eq=False)  # frozen, it would take three times as long to make
class ClaimedJob:
    """A job as its claimer holds it: what is needed to run one attempt and to write how it ended. Read only."""

    id: int
    queue: str
    task: str
    #: Still text: one undecodable row must fail that job, not the claim of the batch. Never shown: it may be secret.
    payload_json: str = field(repr=False)
    priority: int
    run_at: datetime
    attempt: int  #: 1 for the first
    retries: int  #: charged so far
    max_retries: int
    claimed_by: str
    claim_token: uuid.UUID
    created_at: datetime
    metadata_json: str = field(repr=False)
    expires_in: float | None = None  #: seconds from the claim until it is not worth starting any more; None: for ever
    cancel_requested: bool = False  #: somebody asked this attempt to stop; becomes true while it runs

    @property
    def payload(self) -> dict[str, Any]:
        """The payload, decoded; ValueError when somebody stored what Python's JSON cannot read."""
        return _decode(self.payload_json)

    @property
    def metadata(self) -> dict[str, Any]:
        return _decode(self.metadata_json)

    @property
    def fence(self) -> str:
        """A token for systems outside the database: a later attempt has a different one."""
        return f"{self.id}:{self.claim_token}"


def _decode(text: str) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(text)
    return decoded


@dataclass(slots=True)  # not frozen, which would make one in three times the time
class NewJob:
    """A job to be stored; every value checked, the payload already JSON text. The defaults are those of the columns."""

    task: str
    payload_json: str
    queue: str = "default"
    priority: int = 0
    max_retries: int = 3
    delay_seconds: float | None = None  #: counted by the database from the start of the transaction
    run_at: datetime | None = None  #: aware; at most one of delay_seconds and run_at
    unique_key: str | None = None
    period_seconds: float | None = None  #: with a unique key: no second job for so long, even if this one completes
    metadata_json: str = "{}"
    expires_seconds: float | None = None  #: counted as delay_seconds is
    expires_at: datetime | None = None  #: aware; at most one of expires_seconds and expires_at
    concurrency_key: str | None = None
    ordering_key: str | None = None
    rate_key: str | None = None

    @property
    def is_due_at_once(self) -> bool:
        """Whether a worker may run it as soon as it is committed."""
        return self.delay_seconds is None and self.run_at is None


class JoinedPayloads(Sequence[str]):
    """Payloads as JSON texts, of which only JSON arrays of many are at hand: few need to see them one by one."""

    def __init__(self, arrays: Sequence[str], count: int) -> None:
        self.arrays = arrays
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._texts[index]

    @functools.cached_property
    def _texts(self) -> list[str]:
        payloads = (payload for array in self.arrays for payload in pydantic_core.from_json(array))
        return [pydantic_core.to_json(payload).decode() for payload in payloads]


# How an attempt ended --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Completed:
    result_json: str | None = None  #: None: the task returned None


@dataclass(frozen=True, slots=True)
class Failed:
    error: ErrorInfo
    delay_seconds: float | None = None  #: before the retry, should there be one; None: the policy's backoff


@dataclass(frozen=True, slots=True)
class Snoozed:
    delay_seconds: float
    reason: str
    error: ErrorInfo | None = None  #: what the policy took for a wish to run later


@dataclass(frozen=True, slots=True)
class Discarded:
    reason: str
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Cancelled:
    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """The worker gives the job back, unstarted or interrupted."""

    reason: str
    delay_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Expired:
    """The job expired before its claimer started it."""


Outcome = Completed | Failed | Snoozed | Discarded | Cancelled | Released | Expired

#: The error of a job that expired.
EXPIRED = ErrorInfo("Expired", "the job expired before it was started")


class EventType(StrEnum):
    """What a row of `job_events` records. The happy path (created, claimed, completed) is in the job's row."""

    RETRY = "retry"  #: an attempt failed; pending again after the backoff
    DEAD = "dead"  #: an attempt failed or was discarded; no more by itself
    SNOOZE = "snooze"  #: the task asked to run later
    RELEASE = "release"  #: given back uncharged
    SWEEP = "sweep"  #: the lease ran out; pending again, or dead
    EXPIRE = "expire"  #: not started before its `expires_at`; dead
    CANCEL = "cancel"
    CANCEL_REQUESTED = "cancel_requested"  #: the worker of a running job was asked to stop it
    REPLAY = "replay"  #: a final job put back to pending
    REPLACE = "replace"  #: an enqueue with the same unique key changed the pending job
    EDIT = "edit"  #: somebody changed its payload or settings
    DELETE = "delete"
    PAUSE = "pause"  #: of a queue
    RESUME = "resume"  #: of a queue
    LIMIT = "limit"  #: limits of a queue or a task were changed
    SCHEDULE = "schedule"  #: of a schedule: the reason says which, and what was done to it


@dataclass(slots=True)  # likewise
class Transition:
    """One fenced write: what becomes of a claimed job. It happens whole, with its event, or not at all."""

    job_id: int
    claim_token: uuid.UUID
    attempt: int
    status: JobStatus
    event: EventType | None = None  #: None: the happy path, which the job's own row records
    delay_seconds: float | None = None  #: for pending: due that long from now; None keeps `run_at`
    charge_retry: bool = False
    result_json: str | None = None
    error: ErrorInfo | None = None
    reason: str | None = None
    keep_seconds: float | None = None  #: the job is deleted so long after its end; None: kept until somebody prunes

    def become_cancelled(self) -> None:
        """The job had been asked to stop: whatever else was to become of it, it is cancelled."""
        self.status, self.event = JobStatus.CANCELLED, EventType.CANCEL
        self.charge_retry, self.delay_seconds = False, None
        self.reason = f"it was asked to stop; its attempt ended with {self.error.type}" if self.error else ASKED_TO_STOP


#: Why an attempt ended.
ASKED_TO_STOP = "it was asked to stop"


@dataclass(frozen=True, slots=True)
class EnqueueResult:
    """What `store.insert_job` did: the job's id, and whether this call inserted it."""

    id: int
    inserted: bool = True  #: False: the unique key was taken, and `id` is the job that has it


@dataclass(frozen=True, slots=True)
class SweepResult:
    """Jobs whose lease had run out, by what became of them."""

    returned: Sequence[int] = field(default=())  #: pending again, one retry charged
    dead: Sequence[int] = field(default=())  #: no retry was left
    cancelled: Sequence[int] = field(default=())  #: had been asked to stop

    @property
    def count(self) -> int:
        return len(self.returned) + len(self.dead) + len(self.cancelled)


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What became of the jobs that were to be replayed."""

    replayed: Sequence[int] = field(default=())  #: pending again; after a dry run: those that would be
    skipped: Mapping[int, str] = field(default_factory=dict)  #: left as they are, and why
