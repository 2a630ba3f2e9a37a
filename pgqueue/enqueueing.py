"""A task as applications have it: calling it, and enqueueing jobs of it in a caller's transaction."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqueue import store
from pgqueue.arguments import RUN_AT_MAX, checked_payloads, decoded, delay_seconds, metadata_json_of, require_mapping
from pgqueue.dialect import now, seconds_from_now
from pgqueue.errors import ConfigurationError
from pgqueue.handle import JobHandle
from pgqueue.inserting import LISTENERS_ATTRIBUTE, WAKE_ATTRIBUTE, Inserter
from pgqueue.job import Job, JoinedPayloads, NewJob, OnConflict
from pgqueue.middleware import EnqueueRequest
from pgqueue.options import EnqueueOptions
from pgqueue.retry import as_seconds
from pgqueue.task import LimitKeys, TaskDefinition
from pgqueue.transaction import (
    AsyncTransaction,
    MustAwait,
    SyncTransaction,
    checked_async,
    open_transaction,
    run_in_transaction,
)

P = ParamSpec("P")
R = TypeVar("R")

#: Fewer payloads are not divided to be encoded together.
JOINED_MIN = 16

#: The names of the options of an enqueue.
_OPTIONS = tuple(option.name for option in fields(EnqueueOptions))


class Task(Generic[P, R]):
    """A registered function. Calling it runs it here and now; `enqueue` stores a job for a worker.

    The session always comes first: the job exists if and only if the transaction of that session commits.
    """

    def __init__(self, queue: Inserter, definition: TaskDefinition, options: EnqueueOptions | None = None) -> None:
        self.pgq = queue
        self.definition = definition
        self.options = options if options is not None else EnqueueOptions()
        self.external = False
        self._is_changed = False  # by the enqueue middleware, which sees each request once
        functools.update_wrapper(self, definition.function)

    @property
    def name(self) -> str:
        return self.definition.name

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        """Run the function here and now, without a job; a transactional one takes its session first."""
        result: R = self.definition.function(*args, **kwargs)
        return result

    def __repr__(self) -> str:
        return f"<task {self.name!r} of queue {self.definition.queue!r}>"

    def using(
        self,
        *,
        queue: str | None = None,
        priority: int | None = None,
        max_retries: int | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
        unique_key: str | None = None,
        on_conflict: OnConflict | str | None = None,
        metadata: Mapping[str, Any] | None = None,
        expires_in: float | timedelta | None = None,
        expires_at: datetime | None = None,
        concurrency_key: str | None = None,
        ordering_key: str | None = None,
        rate_key: str | None = None,
    ) -> Task[P, R]:
        """The same task with other settings for the jobs enqueued through it.

        delay: seconds, counted by the database's clock from the start of the transaction.
        at: an aware datetime.
        unique_key: at most one pending or running job of this task has it; instead of the one that the task's
        `Unique` takes from the payload. `on_conflict` says what an enqueue does that finds one: "skip" (the default),
        "raise" DuplicateJob, or "replace" the pending job's payload and settings.
        metadata: carried with the job, for headers, trace context and tags.
        expires_in: the job is not started later than so long after it is due: then it is dead, reason "expired".
        expires_at: likewise, not at or after this aware datetime.
        concurrency_key, rate_key: share the task's limit per key with the other jobs that have it; instead of what
        the task takes from the payload.
        ordering_key: jobs of a queue with the same one run one after another, in the order of their ids.
        """
        if on_conflict is not None and on_conflict not in tuple(OnConflict):
            raise ConfigurationError(f"on_conflict must be one of {', '.join(OnConflict)}, got {on_conflict!r}")
        given: dict[str, Any] = {
            "queue": queue,
            "priority": priority,
            "max_retries": max_retries,
            "delay": delay,
            "at": at,
            "unique_key": unique_key,
            "on_conflict": None if on_conflict is None else OnConflict(on_conflict),
            "metadata": metadata,
            "expires_in": expires_in,
            "expires_at": expires_at,
            "concurrency_key": concurrency_key,
            "ordering_key": ordering_key,
            "rate_key": rate_key,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        task: Task[P, R] = Task(self.pgq, self.definition, replace(self.options, **changes))
        task.external = self.external
        return task

    def enqueue(self, session: SyncTransaction, /, *args: P.args, **payload: P.kwargs) -> JobHandle:
        """Store a job in the transaction of `session` (Session, scoped_session or Connection).

        Raises InvalidPayload when the payload does not fit the function's parameters, WrongSession for anything
        that is not a synchronous session or connection, DuplicateJob as `on_conflict` says.
        """
        target, connection = open_transaction(session, "enqueue", self.pgq._job_class)
        if self._has_middleware:
            task, (changed,) = self._changed_by_middleware([self.definition.bind(args, payload)])
            return task.enqueue(session, **changed)
        return self._insert(target, connection, self._new_job(args, payload))

    def enqueue_async(self, session: AsyncTransaction, /, *args: P.args, **payload: P.kwargs) -> Awaitable[JobHandle]:
        """As `enqueue`, for an AsyncSession or AsyncConnection. Must be awaited: the session's commit fails if
        it was not."""
        opened = checked_async(session, "enqueue_async")
        if self._has_middleware:
            task, (changed,) = self._changed_by_middleware([self.definition.bind(args, payload)])
            return task.enqueue_async(session, **changed)
        new_job = self._new_job(args, payload)
        return MustAwait(
            lambda: run_in_transaction(
                opened,
                "enqueue_async",
                self.pgq._job_class,
                lambda target, connection: self._insert(target, connection, new_job),
            ),
            f"enqueue_async() of task {self.name!r}",
            opened,
        )

    def enqueue_many(self, session: SyncTransaction, payloads: Iterable[Mapping[str, Any]], /) -> list[int]:
        """Store a job for each payload, in bulk; their ids in the payloads' order. All or none is stored.

        Of a task with `unique`, the id of a payload whose key is taken is that of the job that has it.
        """
        target, connection = open_transaction(session, "enqueue_many", self.pgq._job_class)
        if self._has_middleware:
            task, changed = self._changed_by_middleware(checked_payloads(payloads))
            return task.enqueue_many(session, changed)
        template, encoded, unique_keys = self._new_jobs(payloads)
        return self._insert_many(target, connection, template, encoded, unique_keys)

    def enqueue_many_async(
        self, session: AsyncTransaction, payloads: Iterable[Mapping[str, Any]], /
    ) -> Awaitable[list[int]]:
        """As `enqueue_many`, for an AsyncSession or AsyncConnection."""
        opened = checked_async(session, "enqueue_many_async")
        if self._has_middleware:
            task, changed = self._changed_by_middleware(checked_payloads(payloads))
            return task.enqueue_many_async(session, changed)
        template, encoded, unique_keys = self._new_jobs(payloads)
        return MustAwait(
            lambda: run_in_transaction(
                opened,
                "enqueue_many_async",
                self.pgq._job_class,
                lambda target, connection: self._insert_many(target, connection, template, encoded, unique_keys),
            ),
            f"enqueue_many_async() of task {self.name!r}",
            opened,
        )

    def new(self, /, *args: P.args, **payload: P.kwargs) -> Job:
        """A job as an ORM object, to be stored with `session.add(…)`.

        It is inserted when the session flushes. A unique key that is taken fails that flush with an
        IntegrityError: `enqueue` has the gentler ways. A task that is unique for a period has no such objects, nor
        has a queue with a `max_depth`.
        """
        if self.definition.unique is not None and self.definition.unique.period is not None:
            raise ConfigurationError(
                f"task {self.name!r} is unique for a period, which session.add() cannot keep: use enqueue()"
            )
        if self._has_middleware:
            task, (changed,) = self._changed_by_middleware([self.definition.bind(args, payload)])
            return task.new(**changed)
        new_job = self._new_job(args, payload)
        declared = self.pgq._queue_limits.get(new_job.queue)
        if declared is not None and declared.max_depth is not None:
            raise ConfigurationError(
                f"queue {new_job.queue!r} has a max_depth, which session.add() cannot keep: use enqueue()"
            )
        values: dict[str, Any] = {
            "task": new_job.task,
            "payload": decoded(new_job.payload_json),
            "queue": new_job.queue,
            "priority": new_job.priority,
            "max_retries": new_job.max_retries,
            "metadata": decoded(new_job.metadata_json),
            "unique_key": new_job.unique_key,
            "concurrency_key": new_job.concurrency_key,
            "ordering_key": new_job.ordering_key,
            "rate_key": new_job.rate_key,
        }
        if new_job.delay_seconds is not None:
            values["run_at"] = seconds_from_now(sa.literal(new_job.delay_seconds, sa.Float()))
        elif new_job.run_at is not None:
            values["run_at"] = new_job.run_at
        else:
            values["run_at"] = now()
        if new_job.expires_seconds is not None:
            values["expires_at"] = seconds_from_now(sa.literal(new_job.expires_seconds, sa.Float()))
        elif new_job.expires_at is not None:
            values["expires_at"] = new_job.expires_at
        job = self.pgq.Job(**values)
        if new_job.is_due_at_once:
            job.__dict__[WAKE_ATTRIBUTE] = self.pgq._wake_sender
        job.__dict__[LISTENERS_ATTRIBUTE] = self.pgq._listeners
        return job

    @property
    def _has_middleware(self) -> bool:
        """Whether a middleware has yet to see what is enqueued."""
        return bool(self.pgq._enqueue_middleware) and not self._is_changed

    def _changed_by_middleware(self, payloads: list[Any]) -> tuple[Task[..., Any], list[dict[str, Any]]]:
        """This task and the payloads, as the middleware wants them."""
        for payload in payloads:
            require_mapping(payload, self.name)
        given = {name: getattr(self.options, name) for name in _OPTIONS}
        request = EnqueueRequest(self.name, [dict(payload) for payload in payloads], given)
        for middleware in self.pgq._enqueue_middleware:
            middleware(request)
        for name in request.options.keys() - set(_OPTIONS):
            raise ConfigurationError(
                f"a middleware gave the enqueue of task {self.name!r} an option {name!r}; options are: "
                + ", ".join(_OPTIONS)
            )
        if not isinstance(request.payloads, list):
            raise ConfigurationError(
                f"a middleware must leave the payloads of task {self.name!r} a list, "
                f"got {type(request.payloads).__name__}"
            )
        for payload in request.payloads:
            require_mapping(payload, self.name)
        if len(request.payloads) != len(payloads):
            raise ConfigurationError(
                f"a middleware made {len(request.payloads)} payloads of {len(payloads)} for task {self.name!r}; it may "
                "change them, and refuse them all by raising"
            )
        options = EnqueueOptions(**request.options)
        if options.on_conflict is not None:
            options = replace(options, on_conflict=OnConflict(options.on_conflict))
        task: Task[..., Any] = Task(self.pgq, self.definition, options)
        task.external, task._is_changed = self.external, True
        return task, request.payloads

    def _seen_by_middleware(self, payload: dict[str, Any]) -> tuple[Task[..., Any], dict[str, Any]]:
        """This task and a payload, as the middleware, if there is any, wants them."""
        if not self._has_middleware:
            return self, payload
        task, (changed,) = self._changed_by_middleware([payload])
        return task, changed

    def _new_job(self, args: tuple[Any, ...], payload: dict[str, Any]) -> NewJob:
        bound = self.definition.bind(args, payload)
        payload_json = self.definition.encode(bound)
        job = copy(self._template)
        job.payload_json = payload_json
        if self.definition.unique is not None and job.unique_key is None:
            job.unique_key = self.definition.unique_key(bound, payload_json)
        if self._has_keys:
            job.concurrency_key, job.ordering_key, job.rate_key = self._keys(payload_json)
        return job

    @property
    def _has_keys(self) -> bool:
        options = self.options
        given = options.concurrency_key or options.ordering_key or options.rate_key
        return given is not None or self.definition.has_keys

    def _keys(self, payload_json: str) -> LimitKeys:
        """The keys of a job with this payload: those given, otherwise what the task takes from the payload."""
        taken = self.definition.keys_of(payload_json) if self.definition.has_keys else LimitKeys()
        given = (self.options.concurrency_key, self.options.ordering_key, self.options.rate_key)
        return LimitKeys(*(mine if mine is not None else its for mine, its in zip(given, taken, strict=True)))

    def _new_jobs(self, payloads: Iterable[Mapping[str, Any]]) -> tuple[NewJob, Sequence[str], list[str] | None]:
        """What they have in common, the payloads as JSON, and their unique keys if they have any."""
        if self.options.unique_key is not None:
            raise ConfigurationError("enqueue_many() stores many jobs, and a unique_key allows one; leave it away")
        given = checked_payloads(payloads)
        if self.definition.unique is None and not self._has_keys and (joined := self._joined(given)) is not None:
            return self._template, joined, None
        encoded = [self.definition.encode(payload) for payload in given]
        unique_keys = None
        if self.definition.unique is not None:
            made = (self.definition.unique_key(payload, text) for payload, text in zip(given, encoded, strict=True))
            unique_keys = [key for key in made if key is not None]
        return self._template, encoded, unique_keys

    def _joined(self, payloads: list[Mapping[str, Any]]) -> JoinedPayloads | None:
        """The payloads in JSON arrays; None when they have to be encoded one by one."""
        arrays: list[str] = []
        for start in range(0, len(payloads), store.INSERT_JOBS_MAX):
            encoded = self._arrays_of(payloads[start : start + store.INSERT_JOBS_MAX])
            if encoded is None:
                return None
            arrays.extend(encoded)
        return JoinedPayloads(arrays, len(payloads))

    def _arrays_of(self, payloads: list[Mapping[str, Any]]) -> list[str] | None:
        """The payloads in one JSON array, or in several where they are too large for one."""
        array = self.definition.encode_together(payloads)
        if array is not None and len(array) <= store.INSERT_BYTES_MAX:
            return [array]
        if len(payloads) < JOINED_MIN:
            return None
        half = len(payloads) // 2
        first = self._arrays_of(payloads[:half])
        second = self._arrays_of(payloads[half:]) if first is not None else None
        return None if first is None or second is None else first + second

    @property
    def _on_conflict(self) -> OnConflict:
        if self.options.on_conflict is not None:
            return self.options.on_conflict
        return OnConflict(self.definition.unique.on_conflict) if self.definition.unique else OnConflict.SKIP

    @functools.cached_property
    def _template(self) -> NewJob:
        """What all its new jobs have in common."""
        options, definition = self.options, self.definition
        expires_seconds, expires_at = self._expiry()
        return NewJob(
            task=definition.name,
            payload_json="{}",
            queue=options.queue if options.queue is not None else definition.queue,
            priority=options.priority if options.priority is not None else definition.priority,
            max_retries=options.max_retries if options.max_retries is not None else definition.retry.max_retries,
            delay_seconds=None if options.delay is None else delay_seconds(options.delay),
            run_at=options.at,
            unique_key=options.unique_key,
            period_seconds=definition.unique.period_seconds if definition.unique is not None else None,
            metadata_json=metadata_json_of(options.metadata),
            expires_seconds=expires_seconds,
            expires_at=expires_at,
        )

    def _expiry(self) -> tuple[float | None, datetime | None]:
        """When a job expires: in so many seconds by the database's clock, or then."""
        options = self.options
        if options.expires_at is not None:
            return None, options.expires_at
        expires_in = options.expires_in if options.expires_in is not None else self.definition.expires_in
        if expires_in is None:
            return None, None
        seconds = as_seconds(expires_in)
        if options.at is not None:
            return None, min(options.at.astimezone(UTC) + timedelta(seconds=seconds), RUN_AT_MAX - timedelta(days=1))
        return seconds + (0.0 if options.delay is None else as_seconds(options.delay)), None

    def _insert(
        self, target: Session | sa.Connection, connection: sa.Connection, job: NewJob, *, may_block: bool = True
    ) -> JobHandle:
        return self.pgq._insert(target, connection, job, on_conflict=self._on_conflict, may_block=may_block)

    def _insert_many(
        self,
        target: Session | sa.Connection,
        connection: sa.Connection,
        template: NewJob,
        encoded: Sequence[str],
        unique_keys: Sequence[str] | None,
    ) -> list[int]:
        keys = [self._keys(payload_json) for payload_json in encoded] if self._has_keys else None
        return self.pgq._insert_many(
            target, connection, template, encoded, unique_keys, keys, on_conflict=self._on_conflict
        )
