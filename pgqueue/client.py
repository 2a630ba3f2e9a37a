"""PgQueue: what an application holds. It registers tasks, enqueues jobs in the application's own transaction, and
gives low-level access to claims."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import threading
import time
import uuid
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, object_session

from pgqueue import dead_letter, expiry, limits, operations, retention, store, uniqueness
from pgqueue.actor import default_actor
from pgqueue.actor import who as _who
from pgqueue.actor import why as _why
from pgqueue.admission import Limits, OnFull, PerKey, Rate
from pgqueue.config import DEFAULT_QUEUE, checked_lease, checked_schema
from pgqueue.cron import NewSchedule
from pgqueue.dialect import POSTGRESQL, checked_dialect, now, seconds_from_now
from pgqueue.engine import end_if_frozen, errors_explained, make_async_engine, make_engine, parse_url, reading
from pgqueue.errors import ClaimLost, ConfigurationError, InvalidPayload, QueueFull, TaskNotFound, WrongSession
from pgqueue.events import EventName, JobEvent, Listener, Listeners, Subscription, event_of_stored, events_of
from pgqueue.executor import MESSAGE_CHARACTERS_MAX, clean, describe
from pgqueue.handle import DROPPED_ID, JobHandle, Waiting, wait, wait_async
from pgqueue.job import (
    FINAL_STATUSES,
    ClaimedJob,
    Completed,
    Discarded,
    ErrorInfo,
    EventType,
    Failed,
    Job,
    JobStatus,
    NewJob,
    OnConflict,
    Outcome,
    Released,
    ReplayResult,
)
from pgqueue.limits import LimitsRow, Scope
from pgqueue.middleware import (
    EnqueueMiddleware,
    EnqueueRequest,
    RunMiddleware,
    enqueue_middleware,
    run_middleware,
)
from pgqueue.notifier import STOP, WakeSender
from pgqueue.operations import JobFilter
from pgqueue.retry import DELAY_SECONDS_MAX, Retry, as_seconds, checked_max_retries, decide
from pgqueue.scheduling import Schedules, new_schedule
from pgqueue.schema import KEY_CHARACTERS_MAX, Tables, tables_for
from pgqueue.settings import Sources
from pgqueue.task import LimitKeys, TaskDefinition, checked_name, checked_priority, encode_json
from pgqueue.transaction import (
    AsyncTransaction,
    MustAwait,
    SyncTransaction,
    checked_async,
    open_root,
    open_transaction,
    pause,
    run_in_transaction,
    tell_after_commit,
    wake_after_commit,
)
from pgqueue.unique import COMPUTED, Unique

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
L = TypeVar("L", bound=Listener)
M = TypeVar("M", bound=Callable[..., Any])
E = TypeVar("E", sa.Engine, AsyncEngine)

#: The class, inside of PgQueue, where `Job` is the mapped one.
_Job = Job

#: How many expired claims a low-level `claim` takes from dead workers before it looks for due jobs.
SWEEP_BEFORE_CLAIM = 100

#: How long a low-level `claim` leaves it at that no expired job is claimed, before it lets expired ones be dead.
EXPIRE_SECONDS = 1.0

#: The largest LIMIT that both databases take as an integer.
LIMIT_MAX = 2**31 - 1

#: Moments outside of these are a mistake, and some could be stored but not be read again.
RUN_AT_MIN, RUN_AT_MAX = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)

#: An enqueue that waits for room looks again after so many seconds, at first and at most.
BLOCKED_SECONDS_MIN, BLOCKED_SECONDS_MAX = 0.05, 0.5

#: After so long the server ends the transaction of a claim, or of its end, in which a process froze.
FROZEN_SECONDS = 30.0

#: Jobs that one transaction replays or purges, and that one page has.
BATCH_JOBS = PAGE_JOBS = 500

#: The policy behind a `nack` with an error: what a task without settings of its own has.
_DEFAULT_RETRY = Retry()


class PgQueue:
    """A job queue in a database.

    Made from a URL, an Engine or an AsyncEngine; without one, the URL is taken from PGQUEUE_DATABASE_URL,
    DATABASE_URL or pgqueue.toml when it is first needed. `schema` names the PostgreSQL schema with the tables (on
    SQLite: the prefix of their names); without it, PGQUEUE_SCHEMA, pgqueue.toml or "pgqueue" does. Making one
    connects to nothing.
    """

    def __init__(
        self, database: str | sa.URL | sa.Engine | AsyncEngine | None = None, *, schema: str | None = None
    ) -> None:
        self.schema = checked_schema(Sources().find("schema", schema).value)
        self.tasks: dict[str, Task[..., Any]] = {}
        self._queue_limits: dict[str, Limits] = {}
        self._block_seconds: dict[str, float] = {}
        self._limits_declared = False
        self._ordered_queues: set[tuple[str, str]] = set()  # URL and name of those known to keep an order
        self.declared_schedules: dict[str, NewSchedule] = {}  #: by `cron`; workers publish them when they start
        self._lock = threading.RLock()
        self._engine: sa.Engine | None = None
        self._engine_is_own = False  # and was not given
        self._async_engine: AsyncEngine | None = None
        self._async_engine_is_own = False
        self._url: sa.URL | None = None
        self._look_for_expired_at = 0.0  # monotonic; the low-level claim does it now and then
        self._wake_sender = self._new_wake_sender()
        self._listeners = Listeners()
        #: Told of the transaction after each enqueue there; `testing.inline` puts it here.
        self._after_enqueue: Callable[[Session | sa.Connection, sa.Connection], None] | None = None
        self._enqueue_middleware: list[EnqueueMiddleware] = []
        self._run_middleware: list[RunMiddleware] = []
        _queues.add(self)
        if database is not None:
            self.connect_to(database)

    def __repr__(self) -> str:
        return f"PgQueue(schema={self.schema!r}, tasks={sorted(self.tasks)!r})"

    # Connections

    @property
    def has_database(self) -> bool:
        """Whether a database was named, so that the environment is not asked for one."""
        return self._url is not None

    def use_schema(self, schema: str) -> None:
        """Use the tables of this schema from now on; the command line's `--schema` ends up here."""
        self.schema = checked_schema(schema)
        self._wake_sender = self._new_wake_sender()

    def connect_to(self, database: str | sa.URL | sa.Engine | AsyncEngine) -> None:
        """Use this database from now on; the command line's `--database-url` ends up here."""
        engine: sa.Engine | None = None
        async_engine: AsyncEngine | None = None
        if isinstance(database, sa.Engine):
            engine, url = _at_read_committed(database), database.url
        elif isinstance(database, AsyncEngine):
            async_engine, url = _at_read_committed(database), parse_url(database.url)
        elif isinstance(database, str | sa.URL):
            url = parse_url(database)
        else:
            raise ConfigurationError(f"a database is a URL, an Engine or an AsyncEngine, got {type(database).__name__}")
        with self._lock:
            self._engine, self._async_engine, self._url = engine, async_engine, url
            self._engine_is_own = self._async_engine_is_own = False
            self._wake_sender = self._new_wake_sender()

    @property
    def url(self) -> sa.URL:
        """The database's URL. ConfigurationError when there is none."""
        with self._lock:
            if self._url is None:
                found = Sources().find("database_url").value
                if found is None:
                    raise ConfigurationError(
                        "no database: pass a URL to PgQueue(…), set PGQUEUE_DATABASE_URL or DATABASE_URL, or give "
                        "database_url in pgqueue.toml"
                    )
                self._url = parse_url(found)
            return self._url

    @property
    def engine(self) -> sa.Engine:
        """The engine of pgqueue's own connections; made when first used, unless one was given."""
        with self._lock:
            if self._engine is None:
                self._engine, self._engine_is_own = make_engine(self.url), True
            return self._engine

    @property
    def async_engine(self) -> AsyncEngine:
        with self._lock:
            if self._async_engine is None:
                self._async_engine, self._async_engine_is_own = make_async_engine(parse_url(self.url)), True
            return self._async_engine

    def _new_wake_sender(self) -> WakeSender:
        return WakeSender(lambda: self.engine, self.schema)

    def _start_anew_after_fork(self) -> None:
        """A forked child has none of its parent's threads, one of which may have held the lock, and must not talk on
        its parent's connections: it forgets them without closing them."""
        self._lock = threading.RLock()
        self._wake_sender = self._new_wake_sender()
        self._listeners.start_anew_after_fork()
        if self._engine is not None and self._engine_is_own:
            self._engine.dispose(close=False)
        if self._async_engine is not None and self._async_engine_is_own:
            self._async_engine.sync_engine.dispose(close=False)

    @property
    def tables(self) -> Tables:
        """The tables as this database has them, for queries of your own."""
        return tables_for(self.url.get_backend_name(), self.schema)

    @property
    def Job(self) -> type[Job]:
        """`Job`, mapped to this database's table: for `select(pgq.Job)` in your own sessions."""
        job_class = self.tables.job_class
        _watch_inserts(job_class)  # type: ignore[arg-type]  # a class is hashable
        return job_class

    @property
    def _job_class(self) -> type[_Job] | None:
        """The mapped class, unless no database was named yet."""
        return self.tables.job_class if self.has_database else None

    def dispose(self) -> None:
        """Deliver what listeners have not been told yet, for at most two seconds, and close pgqueue's own connections;
        an engine that was given keeps its own. It connects again when used again."""
        self._listeners.close()
        self._wake_sender.close()
        with self._lock:
            if self._engine is not None and self._engine_is_own:
                self._engine.dispose()

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction of pgqueue's own, with database errors explained."""
        with errors_explained(self.url), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Likewise a transaction that only reads: on SQLite it waits for no writer, and no writer waits for it."""
        with errors_explained(self.url), reading(self.engine) as connection:
            yield connection

    async def read_async(self, work: Callable[[sa.Connection], T]) -> T:
        """Likewise, for `work` in a transaction of the asynchronous engine."""
        with errors_explained(self.url):
            async with self.async_engine.connect() as connection:
                await connection.execution_options(pgqueue_only_reads=True)
                async with connection.begin():
                    return await connection.run_sync(work)

    def _run(self, work: Callable[[sa.Connection], T]) -> T:
        with self.begin() as connection:
            end_if_frozen(connection, FROZEN_SECONDS)
            return work(connection)

    async def _run_async(self, work: Callable[[sa.Connection], T]) -> T:
        with errors_explained(self.url):
            async with self.async_engine.begin() as connection:
                await connection.run_sync(end_if_frozen, FROZEN_SECONDS)
                return await connection.run_sync(work)

    # Tasks

    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...

    @overload
    def task(
        self,
        *,
        transactional: Literal[True],
        name: str | None = None,
        queue: str = DEFAULT_QUEUE,
        priority: int = 0,
        retry: Retry | None = None,
        timeout: float | timedelta | None = None,
        concurrency: int | PerKey | None = None,
        rate: Rate | None = None,
        ordered_by: str | None = None,
        unique: Unique | None = None,
        expires_in: float | timedelta | None = None,
        keep_completed: float | timedelta | None = None,
        keep_dead: float | timedelta | None = None,
    ) -> Callable[[Callable[Concatenate[Any, P], R]], Task[P, R]]: ...

    @overload
    def task(
        self,
        *,
        name: str | None = None,
        queue: str = DEFAULT_QUEUE,
        priority: int = 0,
        retry: Retry | None = None,
        timeout: float | timedelta | None = None,
        concurrency: int | PerKey | None = None,
        rate: Rate | None = None,
        ordered_by: str | None = None,
        unique: Unique | None = None,
        expires_in: float | timedelta | None = None,
        keep_completed: float | timedelta | None = None,
        keep_dead: float | timedelta | None = None,
        transactional: Literal[False] = False,
        isolation: Literal["process"] | None = None,
        memory_limit: int | None = None,
    ) -> Callable[[Callable[P, R]], Task[P, R]]: ...

    def task(self, *function: Any, **options: Any) -> Any:
        """Register a function, `def` or `async def`, as a task.

        name: what rows and logs call it; the function's own name unless given. Renaming a task leaves its
        pending jobs waiting for the old name.
        queue, priority: where its jobs go, unless `using(…)` says otherwise.
        retry: what happens after a failed attempt; a `Retry`.
        timeout: seconds an attempt may take. Then an `async def` task is cancelled, and in the thread of a `def` task
        a TimeoutError is raised at its next bytecode: one that is stuck in C code keeps its slot until that returns.
        isolation: "process" runs each attempt in a child process: its crash fails only its own job, and at its timeout
        it is killed. The task must be found at the top of a module that can be imported.
        memory_limit: bytes of address space that this process may have, the interpreter and all imports included.
        unique: which of its jobs count as the same, so that there is one of them at a time; a `Unique`.
        expires_in: how long (seconds or a timedelta) a job is worth starting, counted from when it is due. One that was
        not started by then is dead, reason "expired".
        keep_completed, keep_dead: how long (seconds or a timedelta) its ended jobs are kept; None: until somebody
        prunes. With keep_completed=0 a completed job is deleted instead of being marked as completed.
        transactional: the function's first parameter is a Session (an AsyncSession for `async def`). What it
        writes, the jobs it enqueues there and its own completion commit together, once, or not at all.
        concurrency: how many of its jobs may run at once, of all workers together; or `PerKey("tenant", 2)`.
        rate: how many of its jobs may start in a time: `Rate(100, per="minute")`.
        ordered_by: a parameter; jobs of a queue with the same value of it run one after another, as enqueued.
        """
        if function:
            return self._register(*function, **options)
        return functools.partial(self._register, **options)

    def _register(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: float | timedelta | None = None,
        expires_in: float | timedelta | None = None,
        keep_completed: float | timedelta | None = None,
        keep_dead: float | timedelta | None = None,
        **options: Any,
    ) -> Task[..., Any]:
        if isinstance(function, Task):
            raise ConfigurationError(
                f"{function.name!r} is a task already; put @pgq.task directly above the function, @pgq.cron above that"
            )
        definition = TaskDefinition(
            name=name if name is not None else getattr(function, "__name__", ""),
            function=function,
            retry=retry if retry is not None else Retry(),
            timeout=None if timeout is None else as_seconds(timeout),
            expires_in=None if expires_in is None else _checked_expiry(expires_in),
            keep_completed=None if keep_completed is None else _checked_time("keep_completed", keep_completed),
            keep_dead=None if keep_dead is None else _checked_time("keep_dead", keep_dead),
            **options,
        )
        known = self.tasks.get(definition.name)
        if known is not None and not _same_function(known.definition.function, function):
            raise ConfigurationError(
                f"there is already a task named {definition.name!r} "
                f"({known.definition.function.__module__}.{known.definition.function.__qualname__}); give one of "
                "them another name with @pgq.task(name=…)"
            )
        task: Task[..., Any] = Task(self, definition)
        self.tasks[definition.name] = task
        return task

    def cron(
        self,
        expression: str,
        *,
        tz: str = "UTC",
        catchup: str = "latest",
        payload: Mapping[str, Any] | None = None,
        name: str | None = None,
        overlap: bool = True,
    ) -> CronDecorator:
        """Declare a schedule of a task: ``@pgq.cron("0 3 * * *", tz="Europe/Zurich")`` above ``@pgq.task``.

        Above a plain function it registers that as a task, too. Workers publish what is declared when they start.

        expression: minute, hour, day of month, month and day of week; six fields begin with the second.
        tz: where those hours are, such as "Europe/Zurich".
        catchup: of the ticks that came while no worker ran, enqueue "none", the "latest", or "all".
        payload: of each job; checked against the task here and now.
        name: of the schedule; the task's unless given. A task with several schedules needs it.
        overlap: False enqueues no job while the one before is pending or running.
        """

        def declare(function: Any) -> Any:
            task = function if isinstance(function, Task) else self._register(function)
            schedule = new_schedule(task, name, expression, payload, tz, catchup, overlap)
            if self.declared_schedules.get(schedule.name, schedule) != schedule:
                raise ConfigurationError(
                    f"there is already a schedule named {schedule.name!r}; give one of them another name with "
                    "@pgq.cron(…, name=…)"
                )
            self.declared_schedules[schedule.name] = schedule
            return task

        return declare

    @property
    def schedules(self) -> Schedules:
        """The schedules in the database: make, list, enable, disable, run and delete them."""
        return Schedules(self)

    def external_task(
        self,
        name: str,
        *,
        queue: str = DEFAULT_QUEUE,
        priority: int = 0,
        max_retries: int = 3,
        concurrency: int | None = None,
        rate: Rate | None = None,
        expires_in: float | timedelta | None = None,
        keep_completed: float | timedelta | None = None,
        keep_dead: float | timedelta | None = None,
        register: bool = True,
    ) -> Task[..., Any]:
        """Register a task that is worked on elsewhere: by consumers that use `claim`, `ack` and `nack`.

        Its payload may hold anything JSON can carry. Workers do not claim it.
        register=False: it is not added to `tasks`, only returned, for names that come from outside of the program.
        """

        def external(**payload: Any) -> None:
            raise RuntimeError(f"task {name!r} is external: it has no function to run here")

        task: Task[..., Any]
        if register:
            task = self._register(
                external,
                name=name,
                queue=queue,
                priority=priority,
                retry=Retry(max_retries=max_retries),
                concurrency=concurrency,
                rate=rate,
                expires_in=expires_in,
                keep_completed=keep_completed,
                keep_dead=keep_dead,
            )
        else:
            retry = Retry(max_retries=max_retries)
            task = Task(self, TaskDefinition(name, external, queue=queue, priority=priority, retry=retry))
        task.external = True
        return task

    def queue(
        self,
        name: str,
        *,
        concurrency: int | None = None,
        rate: Rate | None = None,
        max_depth: int | None = None,
        on_full: OnFull | None = None,
        block_timeout: float | timedelta = 30.0,
        promote_after: float | timedelta | None = None,
    ) -> None:
        """Declare what a queue is limited to. Workers make it known when they start; `set_limits` changes it later.

        concurrency: how many of its jobs may run at once, of all workers together.
        rate: how many of its jobs may start in a time.
        max_depth: how many jobs may be pending, about: enqueues that do not see each other yet may pass together.
        on_full: what an enqueue does then: "error" (the default) raises QueueFull, "block" waits up to `block_timeout`
        seconds and then raises it, "drop" stores nothing.
        promote_after: seconds; a job that has been due for so long goes before all others, whatever its priority.
        """
        checked_name("queue", name)
        if rate is not None and not isinstance(rate, Rate):
            raise ConfigurationError(f"rate of queue {name!r} must be a Rate(…), got {rate!r}")
        if rate is not None and rate.key is not None:
            raise ConfigurationError(f"rate of queue {name!r} cannot have a key; give the rate to the task")
        self._queue_limits[name] = Limits(
            concurrency=concurrency,
            rate=rate.per_second if rate else None,
            burst=rate.burst if rate else None,
            max_depth=max_depth,
            on_full=on_full if on_full is not None or max_depth is None else "error",
            promote_after=None if promote_after is None else _checked_duration("promote_after", promote_after),
        )
        self._block_seconds[name] = _checked_duration("block_timeout", block_timeout)

    def get_task(self, name: str) -> Task[..., Any]:
        """The task of that name. Raises TaskNotFound, naming those there are."""
        try:
            return self.tasks[name]
        except KeyError:
            known = ", ".join(sorted(self.tasks)) or "none"
            raise TaskNotFound(f"no task named {name!r} is registered; registered tasks: {known}") from None

    def enqueue(self, session: SyncTransaction, task: str, payload: Mapping[str, Any], /, **options: Any) -> JobHandle:
        """Enqueue by name: `task.using(**options).enqueue(session, **payload)`. Raises TaskNotFound."""
        found = self.get_task(task)
        _require_mapping(payload, task)
        return found.using(**options).enqueue(session, **payload)

    # Results

    def result(self, job_id: int, *, timeout: float | timedelta | None = None) -> Any:
        """Wait until a job has ended, and return what its task returned: as `JobHandle.result`, for an id from
        elsewhere."""
        return wait(self, Waiting([job_id], timeout))[0]

    async def result_async(self, job_id: int, *, timeout: float | timedelta | None = None) -> Any:
        return (await wait_async(self, Waiting([job_id], timeout)))[0]

    def results(
        self,
        job_ids: Iterable[int | JobHandle],
        *,
        timeout: float | timedelta | None = None,
        return_errors: bool = False,
    ) -> list[Any]:
        """Wait until all these jobs have ended; their results, in the order of the ids.

        All are looked at with one statement. The first that is found dead, cancelled or missing raises its error, as
        `result` does; with `return_errors` the error takes the place of the result.
        """
        return wait(self, Waiting(job_ids, timeout, return_errors=return_errors))

    async def results_async(
        self,
        job_ids: Iterable[int | JobHandle],
        *,
        timeout: float | timedelta | None = None,
        return_errors: bool = False,
    ) -> list[Any]:
        return await wait_async(self, Waiting(job_ids, timeout, return_errors=return_errors))

    # Listeners and middleware

    @overload
    def on(
        self, event: str, listener: Listener, /, *, task: str | Task[..., Any] | None = None, queue: str | None = None
    ) -> Subscription: ...

    @overload
    def on(
        self, event: str, /, *, task: str | Task[..., Any] | None = None, queue: str | None = None
    ) -> Callable[[L], L]: ...

    def on(self, event: str, /, *listener: Any, task: Any = None, queue: str | None = None) -> Any:
        """Call `listener`, `def` or `async def`, with a JobEvent whenever `event` happens in this process.

        event: such as "job:failed"; the names are those of EventName, and "job:*" stands for all of them.
        task, queue: hear only of jobs of this task, or in this queue.

        Listeners run beside the jobs, on a thread of their own each. One that raises or is slow harms nothing but
        itself: its errors are logged, and what it cannot keep up with is dropped and counted. Returns a Subscription;
        calling it ends it. Without a listener, `@pgq.on("job:failed")` decorates one.
        """
        if not listener:
            return functools.partial(self._decorate_listener, event, task=task, queue=queue)
        (function,) = listener
        if not callable(function):
            raise ConfigurationError(f"a listener to {event} must be a function, got {type(function).__name__}")
        name = task.name if isinstance(task, Task) else task
        return self._listeners.add(
            event,
            function,
            task=None if name is None else checked_name("task", name),
            queue=None if queue is None else checked_name("queue", queue),
        )

    def _decorate_listener(self, event: str, function: Listener, /, **filters: Any) -> Listener:
        self.on(event, function, **filters)
        return function

    def middleware(self, around: Literal["run", "enqueue"], /) -> Callable[[M], M]:
        """Register code around every attempt ("run"), or before every enqueue ("enqueue"); the first is outermost.

        run: a function of the ClaimedJob that yields once, where the task's function runs, or that returns a context
        manager. It goes around tasks of both kinds; if it is `async def`, around `async def` tasks only. What it
        raises, the attempt has raised. Register it before the worker starts.
        enqueue: a plain function of an EnqueueRequest, whose payloads and options it may change; what it raises is
        raised by the enqueue.
        """
        if around not in ("run", "enqueue"):
            raise ConfigurationError(f"middleware goes around 'run' or 'enqueue', got {around!r}")

        def register(function: M) -> M:
            if around == "run":
                self._run_middleware.append(run_middleware(function))
            else:
                self._enqueue_middleware.append(enqueue_middleware(function))
            return function

        return register

    # Claims, for consumers that are not tasks

    def claim(
        self,
        worker: str,
        *,
        queue: str = DEFAULT_QUEUE,
        tasks: Sequence[str] | None = None,
        limit: int = 1,
        lease: float | timedelta = 30.0,
    ) -> list[ClaimedJob]:
        """Claim up to `limit` due jobs of a queue for `lease` seconds; an empty list when there are none.

        `tasks`: only jobs of the tasks of these names.
        First takes back claims that have expired, so that what a dead consumer held is among the result.
        """
        if not self._limits_declared and self.declared_limits:
            self.declare_limits()
        return self._run(lambda connection: self._claim(connection, worker, queue, tasks, limit, lease))

    async def claim_async(
        self,
        worker: str,
        *,
        queue: str = DEFAULT_QUEUE,
        tasks: Sequence[str] | None = None,
        limit: int = 1,
        lease: float | timedelta = 30.0,
    ) -> list[ClaimedJob]:
        if not self._limits_declared and self.declared_limits:
            await asyncio.to_thread(self.declare_limits)
        return await self._run_async(lambda connection: self._claim(connection, worker, queue, tasks, limit, lease))

    def _claim(
        self,
        connection: sa.Connection,
        worker: str,
        queue: str,
        tasks: Sequence[str] | None,
        limit: int,
        lease: float | timedelta,
    ) -> list[ClaimedJob]:
        checked_name("queue", queue)
        if not isinstance(worker, str) or not worker or "\0" in worker or not _is_unicode(worker):
            raise ConfigurationError(
                f"worker must be a name that is not empty, without NUL characters and lone surrogates, got {worker!r}"
            )
        names = None if tasks is None else _checked_tasks(tasks)
        _checked_limit(limit)
        seconds = _checked_lease(lease)
        store.sweep(connection, self.tables, limit=SWEEP_BEFORE_CLAIM, actor=worker)
        if time.monotonic() >= self._look_for_expired_at:
            expired = expiry.expire(connection, self.tables, limit=SWEEP_BEFORE_CLAIM, actor=worker)
            if len(expired) < SWEEP_BEFORE_CLAIM:
                self._look_for_expired_at = time.monotonic() + EXPIRE_SECONDS
        asked: dict[str, Any] = {
            "queue": queue,
            "worker": worker,
            "token": uuid.uuid4(),
            "limit": limit,
            "lease": seconds,
            "tasks": names,
        }
        claimed = store.claim(connection, self.tables, **asked)
        return claimed or limits.claim(connection, self.tables, **asked).jobs

    def declare_limits(self, tasks: Iterable[str] | None = None) -> None:
        """Make the limits known that the code declares, unless somebody changed them since. Workers do so when they
        start, and consumers at their first `claim`.

        tasks: the names of those whose limits, if the code declares none, were lifted in it; all tasks unless given.
        """
        declared, names = self.declared_limits, list(self.tasks if tasks is None else tasks)
        with self.reading() as connection:
            outdated = limits.outdated(connection, self.tables, declared, names)
        if outdated:
            self._run(lambda connection: limits.declare(connection, self.tables, outdated))
        self._limits_declared = True

    @property
    def declared_limits(self) -> dict[tuple[Scope, str], Limits]:
        """The limits of queues and tasks as the code declares them."""
        declared: dict[tuple[Scope, str], Limits] = {
            ("queue", name): of_queue for name, of_queue in self._queue_limits.items()
        }
        for name, task in self.tasks.items():
            if task.definition.limits != Limits():
                declared["task", name] = task.definition.limits
        return declared

    def get_claim(self, job_id: int, token: uuid.UUID) -> ClaimedJob:
        """The job as the holder of this claim token has it: for a consumer that kept only the two, such as one behind
        a web service. Raises ClaimLost when the token is not, or no longer, that of the job; JobNotFound."""
        with self.reading() as connection:
            return operations.get_claim(connection, self.tables, job_id, token)

    def ack(
        self,
        jobs: ClaimedJob | Iterable[ClaimedJob],
        *,
        result: Any = None,
        session: SyncTransaction | None = None,
    ) -> None:
        """The jobs are done: completed, with `result` (anything JSON can carry) stored in each.

        Commits by itself, or with `session` in your transaction: then your rows and the completion commit
        together. Raises ClaimLost when a claim was lost, naming the jobs; the others are completed all the same,
        unless you roll your session back.
        """
        result_json = None if result is None else encode_json(result, "result")
        self._finish("ack", jobs, lambda job: Completed(result_json), session)

    async def ack_async(
        self,
        jobs: ClaimedJob | Iterable[ClaimedJob],
        *,
        result: Any = None,
        session: AsyncTransaction | None = None,
    ) -> None:
        result_json = None if result is None else encode_json(result, "result")
        await self._finish_async("ack_async", jobs, lambda job: Completed(result_json), session)

    def nack(
        self,
        jobs: ClaimedJob | Iterable[ClaimedJob],
        *,
        delay: float | timedelta | None = None,
        error: str | BaseException | None = None,
        dead: bool = False,
        session: SyncTransaction | None = None,
    ) -> None:
        """Give the jobs back.

        Without `error`: pending again at once, or after `delay`, and no retry is charged.
        With `error`: the attempt failed. A retry is charged and waits `delay`, or the default backoff; without a
        retry left the job is dead. With `dead=True` it is dead now.
        Raises ClaimLost as `ack` does.
        """
        self._finish("nack", jobs, _nack_outcome(delay, error, dead), session, delay=delay)

    async def nack_async(
        self,
        jobs: ClaimedJob | Iterable[ClaimedJob],
        *,
        delay: float | timedelta | None = None,
        error: str | BaseException | None = None,
        dead: bool = False,
        session: AsyncTransaction | None = None,
    ) -> None:
        await self._finish_async("nack_async", jobs, _nack_outcome(delay, error, dead), session, delay=delay)

    def extend(self, jobs: ClaimedJob | Iterable[ClaimedJob], *, lease: float | timedelta = 30.0) -> None:
        """Hold the jobs for `lease` more seconds from now. Raises ClaimLost, naming those that are held no more.

        Then `job.cancel_requested` says whether somebody asked the job to stop: an `ack` still completes it, a `nack`
        of any kind makes it cancelled.
        """
        chosen = _as_list(jobs)
        _require_written(chosen, self._run(lambda connection: self._extend(connection, chosen, lease)))

    async def extend_async(self, jobs: ClaimedJob | Iterable[ClaimedJob], *, lease: float | timedelta = 30.0) -> None:
        chosen = _as_list(jobs)
        _require_written(chosen, await self._run_async(lambda connection: self._extend(connection, chosen, lease)))

    def _extend(self, connection: sa.Connection, jobs: Sequence[ClaimedJob], lease: float | timedelta) -> set[int]:
        claims = [(job.id, job.claim_token) for job in jobs]
        held = store.extend(connection, self.tables, claims, lease=_checked_lease(lease))
        for job in jobs:
            job.cancel_requested = held.get(job.id, job.cancel_requested)
        return set(held)

    def _finish(
        self,
        call: str,
        jobs: ClaimedJob | Iterable[ClaimedJob],
        outcome: Callable[[ClaimedJob], Outcome],
        session: SyncTransaction | None,
        delay: float | timedelta | None = None,
    ) -> None:
        chosen = _as_list(jobs)
        if session is not None:
            _, connection = open_transaction(session, call, self._job_class)
            written = self._write(connection, chosen, outcome, delay)
        else:
            written = self._run(lambda connection: self._write(connection, chosen, outcome, delay))
        _require_written(chosen, written)

    async def _finish_async(
        self,
        call: str,
        jobs: ClaimedJob | Iterable[ClaimedJob],
        outcome: Callable[[ClaimedJob], Outcome],
        session: AsyncTransaction | None,
        delay: float | timedelta | None = None,
    ) -> None:
        chosen = _as_list(jobs)
        if session is not None:
            written = await run_in_transaction(
                session, call, self._job_class, lambda _, connection: self._write(connection, chosen, outcome, delay)
            )
        else:
            written = await self._run_async(lambda connection: self._write(connection, chosen, outcome, delay))
        _require_written(chosen, written)

    def _write(
        self,
        connection: sa.Connection,
        jobs: Sequence[ClaimedJob],
        outcome: Callable[[ClaimedJob], Outcome],
        delay: float | timedelta | None,
    ) -> set[int]:
        transitions = []
        for job in jobs:
            transition = decide(job, outcome(job), _DEFAULT_RETRY, random=1.0)
            if delay is not None and transition.event is EventType.RETRY:
                transition = replace(transition, delay_seconds=_checked_delay(delay))
            known = self.tasks.get(job.task)
            if known is not None:
                transition.keep_seconds = known.definition.keep_seconds(transition.status)
            transitions.append(transition)
        actor = jobs[0].claimed_by if jobs else ""
        written = retention.finish(connection, self._tables_of(connection), transitions, actor=actor)
        if self._listeners.wanted:
            ends = [event for job, end in zip(jobs, transitions, strict=True) for event in events_of(end, job, None)]
            tell_after_commit(connection, lambda: self._listeners.tell(end for end in ends if end.job_id in written))
        return written

    def _tables_of(self, connection: sa.Connection) -> Tables:
        return tables_for(checked_dialect(connection.dialect.name), self.schema)

    # Jobs and queues, for operators

    def get_job(self, job_id: int) -> _Job:
        """The job as it stands. Raises JobNotFound."""
        with self.reading() as connection:
            return operations.get_job(connection, self.tables, job_id)

    def list_jobs(
        self,
        *,
        status: str | None = None,
        queue: str | None = None,
        task: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        before_id: int | None = None,
        limit: int = 50,
    ) -> list[_Job]:
        """Jobs that fit the filters, newest first. `before_id` continues after a page.

        error_type: of the last failed attempt, such as "ValueError"; with its module, or without.
        since, until: when the job became final, or was enqueued if it is still open: an aware datetime, or how long
        ago (seconds or a timedelta).
        tags: keys of the metadata, and the strings they must hold.

        Completed ones of a queue or task that has few among millions take long to find: see `page_of_jobs`.
        """
        page = self.page_of_jobs(
            status=status,
            queue=queue,
            task=task,
            error_type=error_type,
            since=since,
            until=until,
            tags=tags,
            before_id=before_id,
            limit=limit,
            within=None,
        )
        return page.jobs

    def page_of_jobs(
        self,
        *,
        status: str | None = None,
        queue: str | None = None,
        task: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        before_id: int | None = None,
        limit: int = 50,
        within: int | None = 100_000,
    ) -> operations.JobPage:
        """The same, with the `before_id` of the next page; None when there is none.

        within: look through so many jobs at most, None: through all. When that ends the page early, `complete` is
        false. Pending, running, dead and cancelled jobs are found by an index, and are always complete.
        """
        wanted = _job_filter(status, queue, task, error_type, since, until, tags)
        _checked_limit(limit)
        if within is not None and (not isinstance(within, int) or isinstance(within, bool) or within < 1):
            raise ConfigurationError(f"within must be at least 1, or None, got {within!r}")
        with self.reading() as connection:
            return operations.list_jobs(
                connection, self.tables, wanted, before_id=before_id, limit=limit, within=within
            )

    def iter_jobs(
        self,
        *,
        status: str | None = None,
        queue: str | None = None,
        task: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Iterator[_Job]:
        """All jobs that fit the filters (see `list_jobs`), oldest first, read in pages of 500: no transaction stays
        open between two of them, and no more than one is held in memory."""
        wanted = _job_filter(status, queue, task, error_type, since, until, tags)
        return self._iter_jobs(wanted)

    def _iter_jobs(self, wanted: JobFilter) -> Iterator[_Job]:
        after_id = 0
        while True:
            with self.reading() as connection:
                page = operations.jobs_after(connection, self.tables, wanted, after_id=after_id, limit=PAGE_JOBS)
            yield from page
            if len(page) < PAGE_JOBS:
                return
            after_id = page[-1].id

    def job_events(self, job_id: int) -> list[dict[str, Any]]:
        """What was recorded of a job beside its own row, oldest first."""
        with self.reading() as connection:
            return operations.list_events(connection, self.tables, job_id)

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
                connection, self.tables, job_id, actor=_who(actor), reason=_why(reason), force=force
            )
            ended = [job_id] if status is JobStatus.CANCELLED else []
            cancelled = self._stored(connection, ended, EventName.CANCELLED)
        self._listeners.tell(event_of_stored(EventName.CANCELLED, job, _why(reason)) for job in cancelled)
        if self.tables.dialect_name == POSTGRESQL and (force or status is JobStatus.RUNNING):
            self._wake_sender({f"{STOP}{job_id}"}, True)
        return status

    def _stored(self, connection: sa.Connection, job_ids: Sequence[int], *told: EventName) -> list[_Job]:
        """The jobs as they stand, if anybody listens to what is to be told of them."""
        if not job_ids or self._listeners.wanted.isdisjoint(told):
            return []
        return operations.get_jobs(connection, self.tables, job_ids)

    @overload
    def replay(
        self,
        ids: int,
        *,
        payload: Mapping[str, Any] | None = None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None: ...

    @overload
    def replay(
        self,
        ids: Iterable[int],
        *,
        payload: None = None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> ReplayResult: ...

    def replay(
        self,
        ids: int | Iterable[int],
        *,
        payload: Mapping[str, Any] | None = None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> ReplayResult | None:
        """Put dead or cancelled jobs back to pending, due now, with all their retries. Their history stays.

        One id: raises JobNotFound, IllegalTransition, or DuplicateJob when an open job has its unique key meanwhile.
        `payload` replaces its payload in the same transaction, as `edit` does.
        Several ids: a result that names those that were replayed and those that were not, with the reason.
        session: do it in your transaction instead of one of its own.
        """
        who, why = _who(actor), _why(reason)
        if not isinstance(ids, Iterable):
            job_id = _checked_id(ids)

            def replay_one(connection: sa.Connection) -> dead_letter.Batch:
                tables = self._tables_of(connection)
                with connection.begin_nested() if payload is not None else nullcontext():
                    if payload is not None:
                        self._edit(connection, job_id, {"payload": payload}, who, why)
                    queue = dead_letter.replay_job(connection, tables, job_id, actor=who, reason=why)
                return dead_letter.Batch([job_id], queues=frozenset({queue}))

            self._change("replay", session, replay_one)
            return None
        if payload is not None:
            raise ConfigurationError("a payload belongs to one job: give replay() one id, not several")
        if isinstance(ids, str | bytes):
            raise ConfigurationError(f"replay() takes an id or several, got {type(ids).__name__}")
        chosen = sorted({_checked_id(job_id) for job_id in ids})

        def replay_some(some: Sequence[int], connection: sa.Connection) -> dead_letter.Batch:
            return dead_letter.replay_ids(connection, self._tables_of(connection), some, actor=who, reason=why)

        done: list[int] = []
        skipped: dict[int, str] = {}
        for start in range(0, len(chosen), BATCH_JOBS):
            some = chosen[start : start + BATCH_JOBS]
            batch = self._change("replay", session, functools.partial(replay_some, some))
            done += batch.done
            skipped |= batch.skipped
        return ReplayResult(done, skipped)

    def replay_where(
        self,
        *,
        task: str | None = None,
        queue: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        limit: int | None = None,
        dry_run: bool = False,
        replayed: Callable[[int], None] = lambda count: None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> ReplayResult:
        """Replay all dead jobs that fit the filters (see `list_jobs`; since and until: when they died), oldest first.

        limit: at most so many. dry_run: change nothing, and say which they would be.
        Works in short transactions, one for each batch of 500: what was replayed stays so when it is interrupted, and
        the same call goes on with the rest. `replayed` is told the size of each batch. With `session` all of it
        happens in your transaction instead.
        A job that cannot be replayed, because an open job has its unique key, is left out and named in the result.
        Jobs that another transaction is changing at this moment are left alone.
        """
        wanted = _job_filter(JobStatus.DEAD, queue, task, error_type, since, until, tags)
        who, why = _who(actor), _why(reason)

        def step(after_id: int, size: int, connection: sa.Connection) -> dead_letter.Batch:
            tables = self._tables_of(connection)
            if dry_run:
                return dead_letter.would_replay(connection, tables, wanted, after_id=after_id, limit=size)
            return dead_letter.replay_dead(
                connection, tables, wanted, after_id=after_id, limit=size, actor=who, reason=why
            )

        done: list[int] = []
        skipped: dict[int, str] = {}
        for batch in self._batches("replay_where", session, step, limit):
            done += batch.done
            skipped |= batch.skipped
            replayed(len(batch.done))
        return ReplayResult(done, skipped)

    def purge(
        self,
        *,
        task: str | None = None,
        queue: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        limit: int | None = None,
        dry_run: bool = False,
        purged: Callable[[int], None] = lambda count: None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> int:
        """Delete all dead jobs that fit the filters, as `replay_where` goes about it; how many.

        Their events go with them, but for one each that says who deleted it, when and why.
        """
        wanted = _job_filter(JobStatus.DEAD, queue, task, error_type, since, until, tags)
        who, why = _who(actor), _why(reason)
        if dry_run:
            if limit is not None:
                _checked_limit(limit)
            count = self._change(
                "purge",
                session,
                lambda connection: dead_letter.Batch(
                    range(dead_letter.count_dead(connection, self._tables_of(connection), wanted, limit=limit))
                ),
            )
            return len(count.done)

        def step(after_id: int, size: int, connection: sa.Connection) -> dead_letter.Batch:
            return dead_letter.purge_dead(
                connection, self._tables_of(connection), wanted, after_id=after_id, limit=size, actor=who, reason=why
            )

        total = 0
        for batch in self._batches("purge", session, step, limit):
            total += len(batch.done)
            purged(len(batch.done))
        return total

    def _batches(
        self,
        call: str,
        session: SyncTransaction | None,
        step: Callable[[int, int, sa.Connection], dead_letter.Batch],
        limit: int | None,
    ) -> Iterator[dead_letter.Batch]:
        """Take steps until nothing is left to do or `limit` jobs are done."""
        if limit is not None:
            _checked_limit(limit)
        left, after_id = limit, 0
        while left is None or left > 0:
            size = BATCH_JOBS if left is None else min(BATCH_JOBS, left)
            batch = self._change(call, session, functools.partial(step, after_id, size))
            yield batch
            if batch.after_id is None:
                return
            after_id = batch.after_id
            left = None if left is None else left - len(batch.done)

    def _change(
        self,
        call: str,
        session: SyncTransaction | None,
        work: Callable[[sa.Connection], dead_letter.Batch],
    ) -> dead_letter.Batch:
        """Do this in the transaction of `session`, or in one of its own; then wake the workers of its queues."""
        if session is None:
            batch = self._run(work)
            if batch.queues and self.tables.dialect_name == POSTGRESQL:
                self._wake_sender(set(batch.queues), True)
            return batch
        if isinstance(session, AsyncSession | AsyncConnection | async_scoped_session):
            raise WrongSession(
                f"{call}() takes a synchronous Session or Connection, got {type(session).__name__}; "
                f"use: await session.run_sync(lambda session: pgq.{call}(…, session=session))"
            )
        target, connection = open_transaction(session, call, self._job_class)
        with errors_explained(connection.engine.url):
            batch = work(connection)
        if connection.dialect.name == POSTGRESQL:
            for queue in batch.queues:
                wake_after_commit(target, connection, queue, self._wake_sender)
        return batch

    def edit(
        self,
        job_id: int,
        *,
        payload: Mapping[str, Any] | None = None,
        priority: int | None = None,
        max_retries: int | None = None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None:
        """Change a job that is pending, dead or cancelled. `payload` replaces the whole payload.

        The payload is checked against the task's signature where the task is registered here; otherwise it may be
        anything JSON can carry. What changed is recorded by name, without the values.
        Raises JobNotFound; IllegalTransition for a running or completed job; InvalidPayload; DuplicateJob when the new
        payload gives the job a unique key that an open job has.
        """
        if payload is None and priority is None and max_retries is None:
            raise ConfigurationError("edit() needs something to change: payload, priority or max_retries")
        if priority is not None:
            checked_priority(priority)
        if max_retries is not None:
            checked_max_retries(max_retries)
        changes: dict[str, Any] = {"payload": payload, "priority": priority, "max_retries": max_retries}
        who, why = _who(actor), _why(reason)

        def edit_one(connection: sa.Connection) -> dead_letter.Batch:
            self._edit(connection, _checked_id(job_id), changes, who, why)
            return dead_letter.Batch([job_id])

        self._change("edit", session, edit_one)

    def _edit(
        self, connection: sa.Connection, job_id: int, changes: Mapping[str, Any], actor: str, reason: str | None
    ) -> None:
        tables = self._tables_of(connection)
        values = {name: value for name, value in changes.items() if value is not None}
        changed = sorted(values.keys() - {"payload"})
        if "payload" not in values:
            job = dead_letter.lock_for_edit(connection, tables, job_id)
            dead_letter.edit_job(connection, tables, job, values, actor=actor, reason=_edit_reason(changed, reason))
            return
        with limits.passing_on(connection, tables, operations.bounded(job_id)):
            job = dead_letter.lock_for_edit(connection, tables, job_id)
            values |= self._edited_payload(job, values["payload"])
            changed += _changed_keys(job.payload_json, values["payload"])
            dead_letter.edit_job(connection, tables, job, values, actor=actor, reason=_edit_reason(changed, reason))

    def _edited_payload(self, job: dead_letter.Editable, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that belong to a payload: itself, and the keys that the task takes from it."""
        _require_mapping(payload, job.task)
        task = self.tasks.get(job.task)
        if task is None:
            return {"payload": encode_json(dict(payload), f"payload of task {job.task!r}")}
        definition = task.definition
        values: dict[str, Any] = {"payload": definition.encode(payload)}
        if definition.unique is not None and job.unique_key is not None and job.unique_key.startswith(COMPUTED):
            values["unique_key"] = definition.unique_key(payload, values["payload"])
        if definition.has_keys:
            taken = _keys_of(definition, job.payload_json)._asdict()
            new = definition.keys_of(values["payload"])._asdict()
            # A key that was given by hand stays.
            moved = {name: key for name, key in new.items() if job.limit_keys[name] == taken[name] != key}
            if moved:
                values |= {**moved, "waits_for": None, "slot": None, "leads_order": False}
        return values

    def delete(self, job_id: int, *, reason: str | None = None, actor: str | None = None) -> None:
        """Delete a job that is not running; its events stay."""
        self._run(
            lambda connection: operations.delete_job(
                connection, self.tables, job_id, actor=_who(actor), reason=_why(reason)
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
        seconds = None if duration is None else _checked_duration("duration", duration)
        if seconds is not None and not 0 < seconds <= DELAY_SECONDS_MAX:
            raise ConfigurationError(
                f"the duration of a pause must be more than 0 and at most {DELAY_SECONDS_MAX:.0f} seconds, "
                f"got {duration!r}"
            )
        with self.begin() as connection:
            operations.pause_queue(
                connection, self.tables, queue, seconds=seconds, actor=_who(actor), reason=_why(reason)
            )

    def resume(self, queue: str, *, reason: str | None = None, actor: str | None = None) -> bool:
        """End the pause of a queue; whether there was one."""
        checked_name("queue", queue)
        with self.begin() as connection:
            ended = operations.resume_queue(connection, self.tables, queue, actor=_who(actor), reason=_why(reason))
        if ended and self.tables.dialect_name == POSTGRESQL:
            self._wake_sender({queue}, True)
        return ended

    def list_limits(self) -> list[LimitsRow]:
        """The limits of queues and tasks that are kept now."""
        with self.reading() as connection:
            return limits.list_limits(connection, self.tables)

    def set_limits(
        self,
        *,
        queue: str | None = None,
        task: str | None = None,
        reason: str | None = None,
        actor: str | None = None,
        **changes: Any,
    ) -> Limits:
        """Change limits of a queue or a task while workers run; what they are then.

        changes: fields of `Limits`; None lifts one. What is changed here outlasts what the code declares, until
        `reset_limits`.
        """
        scope, name = _limits_of_what(queue, task)
        known = {field.name for field in fields(Limits)}
        for field_name in changes:
            if field_name not in known:
                raise ConfigurationError(f"limits are {', '.join(sorted(known))}; got {field_name!r}")

        def change(connection: sa.Connection) -> Limits:
            before = limits.get_limits(connection, self.tables, scope, name, lock=True) or Limits()
            wanted = replace(before, **changes)
            _check_scope(scope, name, wanted)
            limits.put_limits(
                connection, self.tables, scope, name, wanted, declared_by=_who(actor), reason=_why(reason)
            )
            return wanted

        wanted = self._run(change)
        self._wake_all(scope, name)
        return wanted

    def reset_limits(self, *, queue: str | None = None, task: str | None = None, actor: str | None = None) -> Limits:
        """Give a queue or a task the limits back that this code declares for it; what they are then."""
        scope, name = _limits_of_what(queue, task)
        wanted = self.declared_limits.get((scope, name), Limits())
        self._run(
            lambda connection: limits.put_limits(
                connection, self.tables, scope, name, wanted, declared_by=limits.CODE, reason=_who(actor)
            )
        )
        self._wake_all(scope, name)
        return wanted

    def _wake_all(self, scope: Scope, name: str) -> None:
        if self.tables.dialect_name == POSTGRESQL:
            task = self.tasks.get(name)
            self._wake_sender({name if scope == "queue" else task.definition.queue if task else DEFAULT_QUEUE}, True)

    def queues(self, *, exact: bool = False) -> list[operations.QueueSummary]:
        """How many jobs of each queue stand where.

        In a table of more than some 30,000 jobs the completed and the cancelled ones are estimated, unless `exact`,
        which reads the whole table.
        """
        with self.reading() as connection:
            return operations.summarize_queues(connection, self.tables, exact=exact)

    def workers(self) -> list[dict[str, Any]]:
        """The workers that are, or lately were, alive."""
        with self.reading() as connection:
            return operations.list_workers(connection, self.tables)

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
        seconds = _checked_duration("older_than", older_than)
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


#: The queues of this process.
_queues: weakref.WeakSet[PgQueue] = weakref.WeakSet()


def _start_anew_after_fork() -> None:
    for queue in list(_queues):
        queue._start_anew_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_start_anew_after_fork)


def _at_read_committed(engine: E) -> E:
    """The application's engine, with its connections, at the isolation level that pgqueue's statements are made for.

    At another one a heartbeat would break the transaction of a task, and with autocommit there is no transaction.
    """
    if checked_dialect(engine.dialect.name) == POSTGRESQL:
        return engine.execution_options(isolation_level="READ COMMITTED")
    return engine


@dataclass(frozen=True, slots=True)
class EnqueueOptions:
    """How one enqueue differs from its task's settings."""

    queue: str | None = None
    priority: int | None = None
    max_retries: int | None = None
    delay: float | timedelta | None = None
    at: datetime | None = None
    unique_key: str | None = None
    on_conflict: OnConflict | None = None  #: None: as the task's `Unique` says, or else "skip"
    metadata: Mapping[str, Any] | None = None
    expires_in: float | timedelta | None = None
    expires_at: datetime | None = None
    concurrency_key: str | None = None
    ordering_key: str | None = None
    rate_key: str | None = None

    def __post_init__(self) -> None:
        if self.queue is not None:
            checked_name("queue", self.queue)
        if self.priority is not None:
            checked_priority(self.priority)
        if self.max_retries is not None:
            checked_max_retries(self.max_retries)
        if self.delay is not None and self.at is not None:
            raise ConfigurationError("give either delay or at, not both")
        if self.delay is not None:
            _checked_delay(self.delay)
        if self.at is not None:
            _check_moment("at", self.at)
        if self.expires_in is not None and self.expires_at is not None:
            raise ConfigurationError("give either expires_in or expires_at, not both")
        if self.expires_in is not None:
            _checked_expiry(self.expires_in)
        if self.expires_at is not None:
            _check_moment("expires_at", self.expires_at)
            if self.at is not None and self.expires_at <= self.at:
                raise ConfigurationError(
                    f"the job would expire before it is due: expires_at is {self.expires_at}, at is {self.at}; make "
                    "expires_at later, or give expires_in, which counts from when the job is due"
                )
        for name in ("unique_key", "concurrency_key", "ordering_key", "rate_key"):
            _check_key(name, getattr(self, name))
        if self.on_conflict is not None and self.on_conflict not in tuple(OnConflict):
            raise ConfigurationError(f"on_conflict must be one of {', '.join(OnConflict)}, got {self.on_conflict!r}")


def _check_moment(name: str, moment: object) -> None:
    if not isinstance(moment, datetime):
        raise ConfigurationError(f"{name} must be a datetime, got {type(moment).__name__}")
    if moment.tzinfo is None or moment.utcoffset() is None:
        raise ConfigurationError(
            f"{name} must say its time zone, got the naive {moment!r}; for example datetime.now(UTC) + …"
        )
    if not RUN_AT_MIN <= moment < RUN_AT_MAX:
        raise ConfigurationError(
            f"{name} must lie between the years {RUN_AT_MIN.year} and {RUN_AT_MAX.year}, got {moment!r}"
        )


def _check_key(name: str, key: object) -> None:
    if key is None:
        return
    if not isinstance(key, str) or not 1 <= len(key) <= KEY_CHARACTERS_MAX:
        raise ConfigurationError(f"{name} must be a string of 1 to {KEY_CHARACTERS_MAX} characters")
    if "\0" in key or not _is_unicode(key):
        raise ConfigurationError(f"{name} must not contain NUL characters or lone surrogates")


class Task(Generic[P, R]):
    """A registered function. Calling it runs it here and now; `enqueue` stores a job for a worker.

    The session always comes first: the job exists if and only if the transaction of that session commits.
    """

    def __init__(self, queue: PgQueue, definition: TaskDefinition, options: EnqueueOptions | None = None) -> None:
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
            task, changed = self._changed_by_middleware(_checked_payloads(payloads))
            return task.enqueue_many(session, changed)
        template, encoded, unique_keys = self._new_jobs(payloads)
        return self._insert_many(target, connection, template, encoded, unique_keys)

    def enqueue_many_async(
        self, session: AsyncTransaction, payloads: Iterable[Mapping[str, Any]], /
    ) -> Awaitable[list[int]]:
        """As `enqueue_many`, for an AsyncSession or AsyncConnection."""
        opened = checked_async(session, "enqueue_many_async")
        if self._has_middleware:
            task, changed = self._changed_by_middleware(_checked_payloads(payloads))
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
        IntegrityError: `enqueue` has the gentler ways. A task that is unique for a period has no such objects.
        """
        if self.definition.unique is not None and self.definition.unique.period is not None:
            raise ConfigurationError(
                f"task {self.name!r} is unique for a period, which session.add() cannot keep: use enqueue()"
            )
        if self._has_middleware:
            task, (changed,) = self._changed_by_middleware([self.definition.bind(args, payload)])
            return task.new(**changed)
        new_job = self._new_job(args, payload)
        values: dict[str, Any] = {
            "task": new_job.task,
            "payload": _decoded(new_job.payload_json),
            "queue": new_job.queue,
            "priority": new_job.priority,
            "max_retries": new_job.max_retries,
            "metadata": _decoded(new_job.metadata_json),
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
        if self._is_due_at_once:
            job.__dict__[_WAKE_ATTRIBUTE] = self.pgq._wake_sender
        job.__dict__[_LISTENERS_ATTRIBUTE] = self.pgq._listeners
        return job

    @property
    def _has_middleware(self) -> bool:
        """Whether a middleware has yet to see what is enqueued."""
        return bool(self.pgq._enqueue_middleware) and not self._is_changed

    def _changed_by_middleware(self, payloads: list[Any]) -> tuple[Task[..., Any], list[dict[str, Any]]]:
        """This task and the payloads, as the middleware wants them."""
        for payload in payloads:
            _require_mapping(payload, self.name)
        given = {name: getattr(self.options, name) for name in _OPTIONS}
        request = EnqueueRequest(self.name, [dict(payload) for payload in payloads], given)
        for middleware in self.pgq._enqueue_middleware:
            middleware(request)
        for name in request.options.keys() - set(_OPTIONS):
            raise ConfigurationError(
                f"a middleware gave the enqueue of task {self.name!r} an option {name!r}; options are: "
                + ", ".join(_OPTIONS)
            )
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
        job = replace(self._template(), payload_json=payload_json)
        if self.definition.unique is not None and job.unique_key is None:
            job = replace(job, unique_key=self.definition.unique_key(bound, payload_json))
        return replace(job, **self._keys(payload_json)._asdict()) if self._has_keys else job

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

    def _new_jobs(self, payloads: Iterable[Mapping[str, Any]]) -> tuple[NewJob, list[str], list[str] | None]:
        """What they have in common, the payloads as JSON, and their unique keys if they have any."""
        if self.options.unique_key is not None:
            raise ConfigurationError("enqueue_many() stores many jobs, and a unique_key allows one; leave it away")
        given = _checked_payloads(payloads)
        encoded = [self.definition.encode(payload) for payload in given]
        unique_keys = None
        if self.definition.unique is not None:
            made = (self.definition.unique_key(payload, text) for payload, text in zip(given, encoded, strict=True))
            unique_keys = [key for key in made if key is not None]
        return self._template(), encoded, unique_keys

    @property
    def _on_conflict(self) -> OnConflict:
        if self.options.on_conflict is not None:
            return self.options.on_conflict
        return OnConflict(self.definition.unique.on_conflict) if self.definition.unique else OnConflict.SKIP

    def _template(self) -> NewJob:
        options, definition = self.options, self.definition
        expires_seconds, expires_at = self._expiry()
        return NewJob(
            task=definition.name,
            payload_json="{}",
            queue=options.queue if options.queue is not None else definition.queue,
            priority=options.priority if options.priority is not None else definition.priority,
            max_retries=options.max_retries if options.max_retries is not None else definition.retry.max_retries,
            delay_seconds=None if options.delay is None else _checked_delay(options.delay),
            run_at=options.at,
            unique_key=options.unique_key,
            period_seconds=definition.unique.period_seconds if definition.unique is not None else None,
            metadata_json=_metadata_json(options.metadata),
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
            return None, min(options.at + timedelta(seconds=seconds), RUN_AT_MAX - timedelta(days=1))
        return seconds + (0.0 if options.delay is None else as_seconds(options.delay)), None

    def _insert(
        self, target: Session | sa.Connection, connection: sa.Connection, job: NewJob, *, may_block: bool = True
    ) -> JobHandle:
        tables = self.pgq._tables_of(connection)
        ordered = job.ordering_key is not None
        if not self._prepare(connection, tables, job.queue, 1, ordered=ordered, may_block=may_block):
            return JobHandle(DROPPED_ID, inserted=False, queue=self.pgq)
        with errors_explained(connection.engine.url):
            if job.unique_key is None or job.period_seconds is None:
                result = store.insert_job(connection, tables, job, on_conflict=self._on_conflict, actor=default_actor())
            else:
                keys = [[getattr(job, name) for name in store.LIMIT_KEYS]]
                (result,) = uniqueness.insert_unique_jobs(
                    connection,
                    tables,
                    job,
                    [job.payload_json],
                    [job.unique_key],
                    keys,
                    on_conflict=self._on_conflict,
                    actor=default_actor(),
                )
        if result.inserted or self._on_conflict is OnConflict.REPLACE:
            self._wake(target, connection, job.queue)
        if result.inserted and EventName.ENQUEUED in self.pgq._listeners.wanted:
            _tell_enqueued(self.pgq._listeners, connection, [result.id], job, [job.payload_json])
        # The caller's transaction, to say so when somebody asks for the job before it is committed.
        transaction = open_root(connection) if result.inserted else None
        if self.pgq._after_enqueue is not None:
            self.pgq._after_enqueue(target, connection)
        return JobHandle(result.id, result.inserted, queue=self.pgq, transaction=transaction)

    def _insert_many(
        self,
        target: Session | sa.Connection,
        connection: sa.Connection,
        template: NewJob,
        encoded: Sequence[str],
        unique_keys: Sequence[str] | None,
    ) -> list[int]:
        tables = self.pgq._tables_of(connection)
        keys = [self._keys(payload_json) for payload_json in encoded] if self._has_keys else None
        ordered = keys is not None and any(of_job.ordering_key is not None for of_job in keys)
        if not self._prepare(connection, tables, template.queue, len(encoded), ordered=ordered):
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
                    on_conflict=self._on_conflict,
                    actor=default_actor(),
                )
                returned = [result.id for result in results]
                ids = [result.id for result in results if result.inserted]
                encoded = [text for text, result in zip(encoded, results, strict=True) if result.inserted]
        if ids or (returned and self._on_conflict is OnConflict.REPLACE):
            self._wake(target, connection, template.queue)
        if ids and EventName.ENQUEUED in self.pgq._listeners.wanted:
            _tell_enqueued(self.pgq._listeners, connection, ids, template, encoded)
        if self.pgq._after_enqueue is not None:
            self.pgq._after_enqueue(target, connection)
        return returned

    def _prepare(
        self,
        connection: sa.Connection,
        tables: Tables,
        queue: str,
        count: int,
        *,
        ordered: bool,
        may_block: bool = True,
    ) -> bool:
        """Before jobs are stored: whether there is room for them, and that their order will be kept."""
        pgq = self.pgq
        if ordered:
            known = (str(connection.engine.url), queue)
            if known not in pgq._ordered_queues and limits.note_ordered(connection, tables, queue):
                pgq._ordered_queues.add(known)
        declared = pgq._queue_limits.get(queue)
        if declared is None or declared.max_depth is None:
            return True
        deadline = time.monotonic() + (pgq._block_seconds[queue] if may_block else 0.0)
        wait = BLOCKED_SECONDS_MIN
        while True:
            kept = limits.get_limits(connection, tables, "queue", queue) or declared
            if kept.max_depth is None:
                return True
            depth = limits.depth(connection, tables, queue, at_most=kept.max_depth + 1)
            if depth + count <= kept.max_depth:
                return True
            if kept.on_full == "drop":
                return False
            left = deadline - time.monotonic()
            if kept.on_full != "block" or left <= 0 or count > kept.max_depth:
                raise QueueFull(
                    f"queue {queue!r} is full: {depth} jobs are pending, {count} more would be over its max_depth of "
                    f"{kept.max_depth}" + (" (waited as long as block_timeout allows)" if left <= 0 else "")
                )
            pause(connection, min(wait, left))
            wait = min(wait * 2, BLOCKED_SECONDS_MAX)

    @property
    def _is_due_at_once(self) -> bool:
        return self.options.delay is None and self.options.at is None

    def _wake(self, target: Session | sa.Connection, connection: sa.Connection, queue: str) -> None:
        if connection.dialect.name == POSTGRESQL and self._is_due_at_once:
            wake_after_commit(target, connection, queue, self.pgq._wake_sender)


class CronDecorator(Protocol):
    """What `PgQueue.cron` returns."""

    @overload
    def __call__(self, function: Task[P, R], /) -> Task[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


#: Where a job made by `Task.new` remembers whom to tell once it is committed.
_WAKE_ATTRIBUTE = "_pgqueue_wake"
_LISTENERS_ATTRIBUTE = "_pgqueue_listeners"

#: The names of the options of an enqueue.
_OPTIONS = tuple(option.name for option in fields(EnqueueOptions))


@functools.cache
def _watch_inserts(job_class: type[Job]) -> None:
    """Wake workers and tell listeners of jobs that are stored by `session.add`, as of those that are enqueued."""

    @event.listens_for(job_class, "after_insert")
    def inserted(mapper: Any, connection: sa.Connection, job: Job) -> None:
        wake = job.__dict__.get(_WAKE_ATTRIBUTE)
        session = object_session(job)
        if wake is not None and session is not None and connection.dialect.name == POSTGRESQL:
            wake_after_commit(session, connection, job.queue, wake)
        listeners = job.__dict__.get(_LISTENERS_ATTRIBUTE)
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


def _nack_outcome(
    delay: float | timedelta | None, error: str | BaseException | None, dead: bool
) -> Callable[[ClaimedJob], Outcome]:
    seconds = None if delay is None else _checked_delay(delay)
    if isinstance(error, BaseException):
        info = describe(error)
    else:
        info = ErrorInfo("Nack", clean(error or "", MESSAGE_CHARACTERS_MAX))
    if dead:
        if seconds is not None:
            raise ConfigurationError("give either delay or dead=True, not both: a dead job does not run again")
        return lambda job: Discarded(info.message or "given up by its consumer", info)
    if error is None:
        return lambda job: Released("given back by its consumer", seconds)
    return lambda job: Failed(info)


def _as_list(jobs: ClaimedJob | Iterable[ClaimedJob]) -> list[ClaimedJob]:
    chosen = [jobs] if isinstance(jobs, ClaimedJob) else list(jobs)
    for job in chosen:
        if not isinstance(job, ClaimedJob):
            raise WrongSession(f"expected jobs as claim() returned them, got {type(job).__name__}")
    return chosen


def _require_written(jobs: Sequence[ClaimedJob], written: set[int]) -> None:
    lost = [job.id for job in jobs if job.id not in written]
    if lost:
        raise ClaimLost(
            f"the claim on job{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))} was lost: its lease ran out "
            "and it was claimed again, or it was finished or cancelled; nothing was written for it"
        )


def _checked_tasks(tasks: Sequence[str]) -> list[str]:
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not all(isinstance(name, str) for name in tasks):
        raise ConfigurationError(f"tasks must be a list of tasks' names, got {tasks!r}")
    return [checked_name("task", name) for name in tasks]


def _checked_limit(limit: object) -> None:
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= LIMIT_MAX:
        raise ConfigurationError(f"limit must be at least 1 and at most {LIMIT_MAX}, got {limit!r}")


def _checked_lease(lease: float | timedelta) -> float:
    _checked_duration("lease", lease)
    return checked_lease(lease.total_seconds() if isinstance(lease, timedelta) else lease)


def _checked_delay(delay: float | timedelta) -> float:
    return _checked_time("delay", delay)


def _checked_expiry(expires_in: float | timedelta) -> float:
    seconds = _checked_duration("expires_in", expires_in)
    if not 0 < seconds <= DELAY_SECONDS_MAX:
        raise ConfigurationError(
            f"expires_in must be more than 0 and at most {DELAY_SECONDS_MAX:.0f} seconds, counted from when the job is "
            f"due, got {expires_in!r}"
        )
    return seconds


def _checked_time(name: str, duration: float | timedelta) -> float:
    seconds = _checked_duration(name, duration)
    if not 0 <= seconds <= DELAY_SECONDS_MAX:
        raise ConfigurationError(f"{name} must be between 0 and {DELAY_SECONDS_MAX:.0f} seconds, got {duration!r}")
    return seconds


def _checked_duration(name: str, duration: object) -> float:
    """Seconds, infinitely many when no float can hold them."""
    if isinstance(duration, bool) or not isinstance(duration, int | float | timedelta):
        raise ConfigurationError(f"{name} must be seconds or a timedelta, got {type(duration).__name__}")
    try:
        return as_seconds(duration)
    except OverflowError:
        return float("inf")


def _limits_of_what(queue: str | None, task: str | None) -> tuple[Scope, str]:
    if (queue is None) == (task is None):
        raise ConfigurationError("name either a queue or a task whose limits are meant")
    return ("queue", checked_name("queue", queue)) if queue is not None else ("task", checked_name("task", task))


def _check_scope(scope: Scope, name: str, wanted: Limits) -> None:
    of_queues = ("max_depth", "on_full", "promote_after")
    foreign = ("key_concurrency",) if scope == "queue" else of_queues
    for field_name in foreign:
        if getattr(wanted, field_name) is not None:
            raise ConfigurationError(
                f"{field_name} is a limit of {'tasks' if scope == 'queue' else 'queues'}, and {name!r} is a {scope}"
            )


def _metadata_json(metadata: Mapping[str, Any] | None) -> str:
    if metadata is None:
        return "{}"
    if not isinstance(metadata, Mapping):
        raise InvalidPayload(f"metadata must be a mapping, got {type(metadata).__name__}")
    return encode_json(dict(metadata), "metadata")


def _checked_payloads(payloads: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if isinstance(payloads, str | bytes | Mapping) or not isinstance(payloads, Iterable):
        raise InvalidPayload(f"enqueue_many() takes an iterable of payloads, got {type(payloads).__name__}")
    return list(payloads)


def _job_filter(
    status: str | None,
    queue: str | None,
    task: str | None,
    error_type: str | None,
    since: datetime | timedelta | float | None,
    until: datetime | timedelta | float | None,
    tags: Mapping[str, str] | None,
) -> JobFilter:
    if status is not None and status not in tuple(JobStatus):
        raise ConfigurationError(f"status must be one of {', '.join(JobStatus)}, got {status!r}")
    for name, value in (("queue", queue), ("task", task), ("error_type", error_type)):
        _checked_text(name, value)
    if tags is not None:
        if not isinstance(tags, Mapping):
            raise ConfigurationError(f"tags must be a mapping of metadata keys to strings, got {type(tags).__name__}")
        for key, value in tags.items():
            _checked_text("a key of tags", key, is_optional=False)
            _checked_text(f"the tag {key!r}", value, is_optional=False)
    return JobFilter(
        status, queue, task, error_type, _checked_moment("since", since), _checked_moment("until", until), tags
    )


def _checked_text(name: str, value: object, *, is_optional: bool = True) -> None:
    if value is None and is_optional:
        return
    if not isinstance(value, str):
        raise ConfigurationError(f"{name} must be a string, got {type(value).__name__}")
    if "\0" in value or not _is_unicode(value):
        raise ConfigurationError(f"{name} must not contain NUL characters or lone surrogates")


def _checked_moment(name: str, value: datetime | timedelta | float | None) -> datetime | float | None:
    """A moment, or how many seconds ago it was by the database's clock."""
    if value is None:
        return None
    if isinstance(value, datetime):
        if value.tzinfo is None or value.utcoffset() is None:
            raise ConfigurationError(f"{name} must say its time zone, got the naive {value!r}")
        if not RUN_AT_MIN <= value < RUN_AT_MAX:
            raise ConfigurationError(
                f"{name} must lie between the years {RUN_AT_MIN.year} and {RUN_AT_MAX.year}, got {value!r}"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | timedelta):
        raise ConfigurationError(
            f"{name} must be an aware datetime, or how long ago: seconds or a timedelta; got {type(value).__name__}"
        )
    seconds = _checked_duration(name, value)
    if not 0 <= seconds <= DELAY_SECONDS_MAX:
        raise ConfigurationError(f"{name} must be between 0 and {DELAY_SECONDS_MAX:.0f} seconds ago, got {value!r}")
    return seconds


def _checked_id(job_id: object) -> int:
    if not isinstance(job_id, int) or isinstance(job_id, bool):
        raise ConfigurationError(f"a job's id is a whole number, got {type(job_id).__name__}")
    return job_id


def _edit_reason(changed: Sequence[str], reason: str | None) -> str:
    what = "changed " + (", ".join(changed) or "nothing")
    return clean(what if reason is None else f"{reason} ({what})", MESSAGE_CHARACTERS_MAX)


def _keys_of(definition: TaskDefinition, payload_json: str) -> LimitKeys:
    """The keys that the task takes from a payload, which may be one that it cannot read."""
    try:
        return definition.keys_of(payload_json)
    except (ValueError, TypeError, RecursionError):
        return LimitKeys()


def _changed_keys(before_json: str, after_json: str) -> list[str]:
    """Which keys of a payload were added, removed or changed; never their values."""
    after = _decoded(after_json)
    try:
        before = _decoded(before_json)
    except (ValueError, RecursionError):
        return ["payload"]
    absent = object()
    keys = sorted(before.keys() | after.keys())
    return [f"payload.{key}" for key in keys if before.get(key, absent) != after.get(key, absent)]


def _require_mapping(payload: object, task: str) -> None:
    if not isinstance(payload, Mapping) or not all(isinstance(key, str) for key in payload):
        raise InvalidPayload(
            f"payload of task {task!r} must be a mapping of its parameters, got {type(payload).__name__}"
        )


def _decoded(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(text)
    return value


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _same_function(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether a module was only loaded twice, as happens to one that is run and imported as well."""
    return (
        getattr(one, "__qualname__", None) == getattr(other, "__qualname__", None)
        and one.__code__.co_filename == other.__code__.co_filename
        if hasattr(one, "__code__") and hasattr(other, "__code__")
        else one is other
    )
