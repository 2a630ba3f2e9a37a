"""What requests over HTTP ask for, done by calls of PgQueue; nothing here knows of sockets or ASGI."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from pgqueue import migration
from pgqueue.client import PgQueue, Task
from pgqueue.engine import is_in_memory
from pgqueue.errors import ConfigurationError, IllegalTransition, JobNotFound, TaskNotFound
from pgqueue.handle import DROPPED_ID
from pgqueue.job import ClaimedJob, Job, JobStatus
from pgqueue.openapi import (
    IDEMPOTENCY_KEY_CHARACTERS_MAX,
    PRIORITIES,
    CompleteBody,
    DeadQuery,
    DequeueQuery,
    ExtendBody,
    FailBody,
    RetryBody,
    StatsQuery,
    TaskBody,
)
from pgqueue.operations import QueueSummary
from pgqueue.tokens import ANYONE, Principal
from pgqueue.unique import Unique

logger = logging.getLogger(__name__)

#: Every enqueue asks how many jobs there are, so that a count is used for ten times as long as it took. Who asks for
#: nothing but the count gets a new one, unless it takes longer than the second figure.
STATS_REST, STATS_QUICK_SECONDS = 10.0, 0.05

#: How long an answer of /readyz holds, so that anybody may ask as often as they like.
READY_SECONDS = 1.0

#: Seconds after which to try again when there is too much to do.
RETRY_AFTER_BUSY = 1

#: How long an Idempotency-Key is known, counted from its first request.
IDEMPOTENCY_SECONDS = 86_400.0

#: Types that were not declared, kept for the next request.
UNDECLARED_TYPES_MAX = 256

STATUS_NAMES = {
    JobStatus.PENDING: "pending",
    JobStatus.RUNNING: "processing",
    JobStatus.COMPLETED: "completed",
    JobStatus.DEAD: "failed",
    JobStatus.CANCELLED: "cancelled",
}

FINGERPRINT = "idempotency_fingerprint"

_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,%d}" % IDEMPOTENCY_KEY_CHARACTERS_MAX)  # noqa: UP031 — braces


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was understood."""

    principal: Principal
    id: int = 0
    query: Any = None
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    content: Any = None
    note: str = ""  #: for the log
    headers: Mapping[str, str] = field(default_factory=dict)
    claimed: Sequence[ClaimedJob] = ()


class Refused(Exception):
    """Ends a request with an error."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None, /, **more: Any) -> None:
        """more: what the answer tells beside the message."""
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.more = more


def full(message: str) -> Refused:
    return Refused(429, message, {"Retry-After": str(RETRY_AFTER_BUSY)})


class Service:
    """A method for each operation; all of them wait for the database."""

    def __init__(self, pgq: PgQueue, any_type: bool) -> None:
        self._pgq = pgq
        self._any_type = any_type
        self._undeclared = lru_cache(UNDECLARED_TYPES_MAX)(partial(pgq.external_task, register=False))
        self._remembering = lru_cache(UNDECLARED_TYPES_MAX)(_remembering)
        self._stats = _Counts(pgq)
        self._ready_until = 0.0

    @property
    def one_at_a_time(self) -> bool:
        """A SQLite database in memory is one connection."""
        return is_in_memory(self._pgq.url)

    def enqueue(self, call: Call) -> Answer:
        body: TaskBody = call.body
        key = call.headers.get("Idempotency-Key")
        if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
            raise Refused(
                400, f"Idempotency-Key must be 1 to {IDEMPOTENCY_KEY_CHARACTERS_MAX} visible ASCII characters"
            )
        if key is not None and body.unique_key is not None:
            raise Refused(400, "Give either the header Idempotency-Key or uniqueKey, not both")
        try:
            known = self._task(body.type)
            task = (known if key is None else self._remembering(known)).using(**_options(call, body, key))
        except TaskNotFound:
            raise Refused(
                400,
                f"The type {body.type!r} is not known here: declare it in the application "
                "(external_task), or start the server with --any-type",
            ) from None
        except ConfigurationError as error:
            raise Refused(400, str(error)) from None
        with self._pgq.begin() as connection:
            result = task.enqueue(connection, **body.payload)
        if result.id == DROPPED_ID:
            raise full(f"queue {task.options.queue or task.definition.queue!r} is full")
        if key is not None and not result.inserted:
            self._require_same_request(result.id, body)
        queue = task.options.queue or task.definition.queue
        content = {
            "taskId": str(result.id),
            "message": "Task enqueued" if result.inserted or key is not None else "Task already enqueued",
            "stats": self._stats.after_enqueue(result.inserted),
        }
        done = "enqueued" if result.inserted else "found"
        headers = {} if result.inserted or key is None else {"Idempotent-Replayed": "true"}
        return Answer(202, content, f"{done} job {result.id} ({body.type}) in {queue}", headers)

    def _task(self, name: str) -> Task[..., Any]:
        if self._any_type and name not in self._pgq.tasks:
            return self._undeclared(name)
        return self._pgq.get_task(name)

    def _require_same_request(self, job_id: int, body: TaskBody) -> None:
        try:
            first = self._pgq.get_job(job_id).metadata
        except JobNotFound:
            return  # pruned since
        if isinstance(first, dict) and first.get(FINGERPRINT) != _fingerprint(body):
            raise Refused(422, "This Idempotency-Key was used for another request")

    def stats(self, call: Call) -> Answer:
        query: StatsQuery = call.query
        return Answer(200, self._stats.get(query.queue))

    def dequeue(self, call: Call) -> Answer:
        query: DequeueQuery = call.query
        worker = query.worker or "http"
        jobs = self._pgq.claim(
            worker if call.principal is ANYONE else f"{call.principal.name}/{worker}",
            queue=query.queue,
            tasks=query.type or None,
            limit=query.limit or 1,
            lease=query.lease,
        )
        shown, claimed = [], []
        for job in jobs:
            try:
                shown.append(_claimed(job))
                claimed.append(job)
            except ValueError as error:
                # Plain SQL can store what no client could read: one such job must not hold up the others.
                self._pgq.nack(job, error=f"the payload cannot be decoded: {error}", dead=True)
        if not claimed:
            return Answer(204)
        note = "dequeued " + ", ".join(f"job {job.id} ({job.task}), attempt {job.attempt}" for job in claimed)
        return Answer(200, shown[0] if query.limit is None else shown, note, claimed=claimed)

    def give_back(self, jobs: Sequence[ClaimedJob]) -> None:
        """No retry is charged: nobody has seen them."""
        self._pgq.nack(jobs)

    def complete(self, call: Call) -> Answer:
        body: CompleteBody = call.body
        job = self._pgq.get_claim(call.id, body.token)
        self._pgq.ack(job, result=body.result)
        return Answer(200, {"id": str(job.id), "status": "completed"}, f"completed job {job.id} ({job.task})")

    def fail(self, call: Call) -> Answer:
        body: FailBody = call.body
        job = self._pgq.get_claim(call.id, body.token)
        self._pgq.nack(job, error=body.error or "", delay=None if body.dead else body.delay, dead=body.dead)
        # A job that somebody had asked to stop is cancelled instead.
        cancelled = self.status(job.id) == "cancelled"
        retried = job.retries < job.max_retries and not body.dead and not cancelled
        retries = job.retries + retried
        status = "cancelled" if cancelled else "pending" if retried else "failed"
        how = {
            "cancelled": "cancelled as asked",
            "pending": f"retry {retries}/{job.max_retries}",
            "failed": f"permanently after {job.attempt} attempts",
        }
        content = {"id": str(job.id), "status": status, "retries": retries, "maxRetries": job.max_retries}
        return Answer(200, content, f"job {job.id} ({job.task}) failed, {how[status]}")

    def extend(self, call: Call) -> Answer:
        body: ExtendBody = call.body
        job = self._pgq.get_claim(call.id, body.token)
        self._pgq.extend(job, lease=body.lease)
        content = {"id": str(job.id), "lease": body.lease, "cancelRequested": job.cancel_requested}
        return Answer(200, content, f"extended job {job.id}")

    def dead(self, call: Call) -> Answer:
        query: DeadQuery = call.query
        jobs = self._pgq.list_jobs(
            status=JobStatus.DEAD, queue=query.queue, task=query.type, before_id=query.before, limit=query.limit
        )
        following = str(jobs[-1].id) if len(jobs) == query.limit else None
        return Answer(200, {"jobs": [_view(job) for job in jobs], "next": following})

    def retry(self, call: Call) -> Answer:
        body: RetryBody = call.body
        job = self._pgq.get_job(call.id)
        if job.status != JobStatus.DEAD:
            raise IllegalTransition(
                f"job {job.id} is {STATUS_NAMES[JobStatus(job.status)]}; only a failed job can be retried"
            )
        self._pgq.replay(job.id, reason=body.reason, actor=f"http:{call.principal.name}")
        return Answer(200, {"id": str(job.id), "status": "pending"}, f"put job {job.id} ({job.task}) back to pending")

    def job(self, call: Call) -> Answer:
        return Answer(200, _view(self._pgq.get_job(call.id)))

    def status(self, job_id: int) -> str | None:
        """Where a job stands."""
        try:
            return STATUS_NAMES[JobStatus(self._pgq.get_job(job_id).status)]
        except JobNotFound:
            return None

    def healthz(self, call: Call) -> Answer:
        return Answer(200, {"status": "ok"})

    def readyz(self, call: Call) -> Answer:
        if time.monotonic() >= self._ready_until:
            with self._pgq.reading() as connection:
                migration.require_current(connection, self._pgq.schema)
            self._ready_until = time.monotonic() + READY_SECONDS
        return Answer(200, {"status": "ok"})


class _Counts:
    """How many jobs stand where. Small tables are counted when somebody asks, large ones a tenth of the time."""

    def __init__(self, pgq: PgQueue) -> None:
        self._pgq = pgq
        self._counting = threading.Lock()
        self._summaries: list[QueueSummary] | None = None
        self._took = 0.0
        self._good_until = 0.0
        self._enqueued = 0  # here, since the last count

    def get(self, queue: str | None = None) -> dict[str, int]:
        """In one queue or in all."""
        return self._of(self._count(STATS_QUICK_SECONDS), queue)

    def after_enqueue(self, inserted: bool) -> dict[str, int] | None:
        """In all queues, the new job among them; None when they cannot be counted: the job is stored all the same."""
        self._enqueued += inserted
        try:
            counts = self._of(self._count(0.0), None)
        except Exception as error:  # noqa: BLE001 — whatever it is, the answer says that the job is stored
            logger.warning("the jobs could not be counted: %s", type(error).__name__)
            return None
        counts["pending"] += self._enqueued
        return counts

    def _of(self, summaries: Sequence[QueueSummary], queue: str | None) -> dict[str, int]:
        chosen = [summary for summary in summaries if queue in (None, summary.queue)]
        return {
            "pending": sum(summary.ready + summary.scheduled for summary in chosen),
            "processing": sum(summary.running for summary in chosen),
            "completed": sum(summary.completed for summary in chosen),
            "failed": sum(summary.dead for summary in chosen),
        }

    def _count(self, quick_seconds: float) -> list[QueueSummary]:
        known = self._summaries
        if known is not None and self._took >= quick_seconds and time.monotonic() < self._good_until:
            return known
        if not self._counting.acquire(blocking=known is None):
            assert known is not None
            return known  # somebody counts at this moment
        try:
            self._enqueued = 0
            started = time.monotonic()
            self._summaries = counted = self._pgq.queues()
            ended = time.monotonic()
            self._took, self._good_until = ended - started, ended + STATS_REST * (ended - started)
            return counted
        finally:
            self._counting.release()


def _remembering(task: Task[..., Any]) -> Task[..., Any]:
    """The same task, with unique keys that outlast their jobs."""
    unique = Unique(period=IDEMPOTENCY_SECONDS)
    remembering: Task[..., Any] = Task(task.pgq, replace(task.definition, unique=unique))
    remembering.external = task.external
    return remembering


def _options(call: Call, body: TaskBody, key: str | None) -> dict[str, Any]:
    metadata = body.metadata
    if key is not None:
        metadata = {**(metadata or {}), FINGERPRINT: _fingerprint(body)}
    return {
        "queue": body.queue,
        "priority": PRIORITIES[body.priority] if isinstance(body.priority, str) else body.priority,
        "max_retries": body.max_retries,
        "delay": body.delay,
        "at": body.execute_at,
        "unique_key": body.unique_key if key is None else f"idempotency:{call.principal.name}:{key}",
        "on_conflict": body.on_conflict if key is None else None,
        "metadata": metadata,
    }


def _fingerprint(body: TaskBody) -> str:
    """What tells two requests with the same Idempotency-Key apart."""
    content = json.dumps(body.model_dump(warnings=False), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _claimed(job: ClaimedJob) -> dict[str, Any]:
    """ValueError when the payload cannot be decoded."""
    return {
        "id": str(job.id),
        "type": job.task,
        "payload": job.payload,
        "status": "processing",
        "queue": job.queue,
        "priority": job.priority,
        "attempt": job.attempt,
        "retries": job.retries,
        "maxRetries": job.max_retries,
        "createdAt": _milliseconds(job.created_at),
        "metadata": job.metadata,
        "token": str(job.claim_token),
    }


def _view(job: Job) -> dict[str, Any]:
    """Without the claim's token, which is its holder's alone, and without tracebacks."""
    error = job.error if isinstance(job.error, dict) else {}
    return {
        "id": str(job.id),
        "type": job.task,
        "payload": job.payload,
        "status": STATUS_NAMES[JobStatus(job.status)],
        "queue": job.queue,
        "priority": job.priority,
        "attempt": job.attempt,
        "retries": job.retries,
        "maxRetries": job.max_retries,
        "createdAt": _milliseconds(job.created_at),
        "runAt": _milliseconds(job.run_at),
        "claimedAt": job.claimed_at and _milliseconds(job.claimed_at),
        "claimedBy": job.claimed_by,
        "finishedAt": job.finished_at and _milliseconds(job.finished_at),
        "uniqueKey": job.unique_key,
        "metadata": job.metadata,
        "result": job.result,
        "error": _text_or_none(error.get("message")),
        "errorType": _text_or_none(error.get("type")),
    }


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
