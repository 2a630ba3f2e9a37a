"""How new jobs get into the table: is there room, will their order be kept, and who is told after the commit."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, object_session

from pgqueue import dialect, limits, store, uniqueness
from pgqueue.actor import default_actor
from pgqueue.admission import Limits
from pgqueue.config import DEFAULT_QUEUE
from pgqueue.database import Database
from pgqueue.dialect import POSTGRESQL
from pgqueue.engine import errors_explained
from pgqueue.errors import QueueFull
from pgqueue.events import EventName, JobEvent, Listeners
from pgqueue.handle import DROPPED_ID, JobHandle
from pgqueue.job import Job as _Job
from pgqueue.job import NewJob, OnConflict
from pgqueue.middleware import EnqueueMiddleware
from pgqueue.schema import Tables
from pgqueue.task import LimitKeys
from pgqueue.transaction import open_root, pause, tell_after_commit, wake_after_commit

#: An enqueue that waits for room looks again after so many seconds, at first and at most.
BLOCKED_SECONDS_MIN, BLOCKED_SECONDS_MAX = 0.05, 0.5

#: Where a job made by `Task.new` remembers whom to tell once it is committed.
WAKE_ATTRIBUTE, LISTENERS_ATTRIBUTE = "_pgqueue_wake", "_pgqueue_listeners"


class Inserter(Database):
    """A database that new jobs are stored in, and what they meet there: limits, middleware and listeners."""

    def __init__(self, database: str | sa.URL | sa.Engine | AsyncEngine | None, schema: str | None) -> None:
        super().__init__(database, schema)
        self._listeners = Listeners()
        self._enqueue_middleware: list[EnqueueMiddleware] = []
        self._queue_limits: dict[str, Limits] = {}
        self._block_seconds: dict[str, float] = {}
        self._ordered_queues: set[tuple[str, str, str]] = set()  # URL, schema and name of those known to keep an order
        #: Told of the transaction after each enqueue there; `testing.inline` puts it here.
        self._after_enqueue: Callable[[Session | sa.Connection, sa.Connection], None] | None = None

    def dispose(self) -> None:
        """Deliver what listeners have not been told yet, for at most two seconds, and close pgqueue's own connections;
        an engine that was given keeps its own. It connects again when used again."""
        self._listeners.close()
        super().dispose()

    def _start_anew_after_fork(self) -> None:
        super()._start_anew_after_fork()
        self._listeners.start_anew_after_fork()

    @property
    def Job(self) -> type[_Job]:
        """`Job`, mapped to this database's table: for `select(pgq.Job)` in your own sessions."""
        tables = self.tables
        _watch_inserts(tables)
        return tables.job_class

    def _insert(
        self,
        target: Session | sa.Connection,
        connection: sa.Connection,
        job: NewJob,
        *,
        on_conflict: OnConflict,
        may_block: bool = True,
    ) -> JobHandle:
        """Store a job in this transaction."""
        tables = self._tables_of(connection)
        keys = None if job.unique_key is None else [job.unique_key]
        ordered = job.ordering_key is not None
        if not self._prepare(connection, tables, job, 1, keys, ordered=ordered, may_block=may_block):
            return JobHandle(DROPPED_ID, inserted=False, queue=self)
        with errors_explained(connection.engine.url):
            if job.unique_key is None or job.period_seconds is None:
                result = store.insert_job(connection, tables, job, on_conflict=on_conflict, actor=default_actor())
            else:
                limit_keys = [[getattr(job, name) for name in store.LIMIT_KEYS]]
                (result,) = uniqueness.insert_unique_jobs(
                    connection,
                    tables,
                    job,
                    [job.payload_json],
                    [job.unique_key],
                    limit_keys,
                    on_conflict=on_conflict,
                    actor=default_actor(),
                )
        if result.inserted or on_conflict is OnConflict.REPLACE:
            self._wake(target, connection, job)
        if result.inserted and EventName.ENQUEUED in self._listeners.wanted:
            _tell_enqueued(self._listeners, connection, [result.id], job, [job.payload_json])
        # The caller's transaction, to say so when somebody asks for the job before it is committed.
        transaction = open_root(connection) if result.inserted else None
        if self._after_enqueue is not None:
            self._after_enqueue(target, connection)
        return JobHandle(result.id, result.inserted, queue=self, transaction=transaction)

    def _insert_many(
        self,
        target: Session | sa.Connection,
        connection: sa.Connection,
        template: NewJob,
        encoded: Sequence[str],
        unique_keys: Sequence[str] | None,
        keys: Sequence[LimitKeys] | None,
        *,
        on_conflict: OnConflict,
    ) -> list[int]:
        """Store a job for each payload in this transaction; their ids, or those of the jobs that have their keys."""
        tables = self._tables_of(connection)
        ordered = keys is not None and any(of_job.ordering_key is not None for of_job in keys)
        if not self._prepare(connection, tables, template, len(encoded), unique_keys, ordered=ordered):
            return []
        with errors_explained(connection.engine.url):
            if unique_keys is None:
                ids = returned = store.insert_jobs(connection, tables, template, encoded, keys)
            else:
                results = uniqueness.insert_unique_jobs(
                    connection,
                    tables,
                    template,
                    encoded,
                    unique_keys,
                    keys,
                    on_conflict=on_conflict,
                    actor=default_actor(),
                )
                returned = [result.id for result in results]
                ids = [result.id for result in results if result.inserted]
                encoded = [text for text, result in zip(encoded, results, strict=True) if result.inserted]
        if ids or (returned and on_conflict is OnConflict.REPLACE):
            self._wake(target, connection, template)
        if ids and EventName.ENQUEUED in self._listeners.wanted:
            _tell_enqueued(self._listeners, connection, ids, template, encoded)
        if self._after_enqueue is not None:
            self._after_enqueue(target, connection)
        return returned

    def _prepare(
        self,
        connection: sa.Connection,
        tables: Tables,
        job: NewJob,
        count: int,
        unique_keys: Sequence[str] | None,
        *,
        ordered: bool,
        may_block: bool = True,
    ) -> bool:
        """Before jobs like `job` are stored: whether there is room for so many, and that their order will be kept."""
        queue = job.queue
        if ordered:
            known = (str(connection.engine.url), tables.schema, queue)
            if known not in self._ordered_queues and limits.note_ordered(connection, tables, queue):
                # Perhaps by this very transaction, which may be rolled back.
                tell_after_commit(connection, lambda: self._ordered_queues.add(known))
        declared = self._queue_limits.get(queue)
        if declared is None or declared.max_depth is None:
            return True
        deadline = time.monotonic() + self._block_seconds[queue]
        wait = BLOCKED_SECONDS_MIN
        while True:
            kept = limits.get_limits(connection, tables, "queue", queue) or declared
            if kept.max_depth is None:
                return True
            depth = limits.depth(connection, tables, queue, at_most=kept.max_depth + 1)
            if depth + count <= kept.max_depth:
                return True
            new = count if unique_keys is None else uniqueness.count_free(connection, tables, job, unique_keys)
            if new == 0 or depth + new <= kept.max_depth:
                return True
            if kept.on_full == "drop" and may_block:
                return False
            left = deadline - time.monotonic()
            blocks = kept.on_full == "block" and may_block
            can_wait = dialect.writes_at_once(tables.dialect_name)
            if not blocks or not can_wait or left <= 0 or new > kept.max_depth:
                why = ""
                if blocks and not can_wait:
                    why = "; an enqueue cannot wait on SQLite: its transaction keeps out whoever could make room"
                elif blocks and left <= 0:
                    why = " (waited as long as block_timeout allows)"
                raise QueueFull(
                    f"queue {queue!r} is full: {depth} jobs are pending, {new} more would be over its max_depth of "
                    f"{kept.max_depth}{why}"
                )
            pause(connection, min(wait, left))
            wait = min(wait * 2, BLOCKED_SECONDS_MAX)

    def _wake(self, target: Session | sa.Connection, connection: sa.Connection, job: NewJob) -> None:
        if connection.dialect.name == POSTGRESQL and job.is_due_at_once:
            wake_after_commit(target, connection, job.queue, self._wake_sender)


@functools.cache
def _watch_inserts(tables: Tables) -> None:
    """Of jobs that are stored by `session.add`, keep the order, wake workers and tell listeners, as of those that are
    enqueued."""

    @event.listens_for(tables.job_class, "before_insert")
    def inserting(mapper: Any, connection: sa.Connection, job: _Job) -> None:
        if job.ordering_key is not None:
            limits.note_ordered(connection, tables, job.queue or DEFAULT_QUEUE)

    @event.listens_for(tables.job_class, "after_insert")
    def inserted(mapper: Any, connection: sa.Connection, job: _Job) -> None:
        wake = job.__dict__.get(WAKE_ATTRIBUTE)
        session = object_session(job)
        if wake is not None and session is not None and connection.dialect.name == POSTGRESQL:
            wake_after_commit(session, connection, job.queue, wake)
        listeners = job.__dict__.get(LISTENERS_ATTRIBUTE)
        if listeners is not None and EventName.ENQUEUED in listeners.wanted:
            new_job = NewJob(job.task, "{}", job.queue, metadata_json=json.dumps(job.metadata))
            _tell_enqueued(listeners, connection, [job.id], new_job, [json.dumps(job.payload)])


def _tell_enqueued(
    listeners: Listeners, connection: sa.Connection, ids: Sequence[int], job: NewJob, payloads: Sequence[str]
) -> None:
    """Have listeners told of new jobs once the connection's transaction is committed."""

    def tell() -> None:
        at = datetime.now(UTC)
        listeners.tell(
            JobEvent(
                name=EventName.ENQUEUED,
                job_id=job_id,
                task=job.task,
                queue=job.queue,
                attempt=0,
                worker=None,
                at=at,
                payload_json=payload_json,
                metadata_json=job.metadata_json,
            )
            for job_id, payload_json in zip(ids, payloads, strict=True)
        )

    tell_after_commit(connection, tell)
