"""What the code of an application declares: tasks, queues, schedules, listeners and middleware."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields
from datetime import timedelta
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from pgqueue.admission import Limits, OnFull, PerKey, Rate
from pgqueue.arguments import duration_seconds, expiry_seconds, no_such, require_mapping, time_seconds
from pgqueue.config import DEFAULT_QUEUE
from pgqueue.cron import NewSchedule
from pgqueue.enqueueing import Task
from pgqueue.errors import ConfigurationError, TaskNotFound
from pgqueue.events import Listener, Subscription
from pgqueue.handle import JobHandle
from pgqueue.inserting import Inserter
from pgqueue.limits import Scope
from pgqueue.middleware import RunMiddleware, enqueue_middleware, run_middleware
from pgqueue.retry import Retry
from pgqueue.scheduled import new_schedule
from pgqueue.task import TaskDefinition, checked_name
from pgqueue.transaction import AsyncTransaction, SyncTransaction
from pgqueue.unique import Unique

P = ParamSpec("P")
R = TypeVar("R")
L = TypeVar("L", bound=Listener)
M = TypeVar("M", bound=Callable[..., Any])


#: What `task` takes.
_TASK_OPTIONS = frozenset(option.name for option in fields(TaskDefinition) if option.init) - {"function"}


class Registry(Inserter):
    """What is declared in this process. Workers make it known in the database when they start."""

    def __init__(self, database: str | sa.URL | sa.Engine | AsyncEngine | None, schema: str | None) -> None:
        super().__init__(database, schema)
        self.tasks: dict[str, Task[..., Any]] = {}
        self.declared_schedules: dict[str, NewSchedule] = {}  #: by `cron`; workers publish them when they start
        self._run_middleware: list[RunMiddleware] = []

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
        if not callable(function):
            raise ConfigurationError(
                f"a task is a function, got {type(function).__name__}; its name is given with @pgq.task(name=…)"
            )
        for option in options.keys() - _TASK_OPTIONS:
            raise ConfigurationError(no_such("option of a task", option, _TASK_OPTIONS))
        definition = TaskDefinition(
            name=name if name is not None else getattr(function, "__name__", ""),
            function=function,
            retry=retry if retry is not None else Retry(),
            timeout=None if timeout is None else time_seconds("timeout", timeout),
            expires_in=None if expires_in is None else expiry_seconds(expires_in),
            keep_completed=None if keep_completed is None else time_seconds("keep_completed", keep_completed),
            keep_dead=None if keep_dead is None else time_seconds("keep_dead", keep_dead),
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
            promote_after=None if promote_after is None else duration_seconds("promote_after", promote_after),
        )
        self._block_seconds[name] = time_seconds("block_timeout", block_timeout)

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
        require_mapping(payload, task)
        return found.using(**options).enqueue(session, **payload)

    def enqueue_async(
        self, session: AsyncTransaction, task: str, payload: Mapping[str, Any], /, **options: Any
    ) -> Awaitable[JobHandle]:
        """As `enqueue`, for an AsyncSession or AsyncConnection. Must be awaited."""
        found = self.get_task(task)
        require_mapping(payload, task)
        return found.using(**options).enqueue_async(session, **payload)

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


class CronDecorator(Protocol):
    """What `PgQueue.cron` returns."""

    @overload
    def __call__(self, function: Task[P, R], /) -> Task[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


def _same_function(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether a module was only loaded twice, as happens to one that is run and imported as well."""
    return (
        getattr(one, "__qualname__", None) == getattr(other, "__qualname__", None)
        and one.__code__.co_filename == other.__code__.co_filename
        if hasattr(one, "__code__") and hasattr(other, "__code__")
        else one is other
    )
