"""Middleware: code of the application around every attempt, and before every enqueue."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

from pgqueue.errors import ConfigurationError
from pgqueue.executor import current_job
from pgqueue.job import ClaimedJob

#: Makes what is entered before a task's function and left after it.
RunMiddleware = Callable[[ClaimedJob], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]


def run_middleware(function: Callable[..., Any]) -> RunMiddleware:
    """A run middleware from what the application registered: a generator function that yields once, `def` or
    `async def`, or any function of the job that returns a context manager. Raises ConfigurationError."""
    _require_one_parameter(function, "run", "the job")
    if inspect.iscoroutinefunction(function):
        raise ConfigurationError(
            f"the run middleware {_name_of(function)} must yield once, where the task is to run; it never does"
        )
    if inspect.isgeneratorfunction(function):
        return contextlib.contextmanager(function)
    if inspect.isasyncgenfunction(function):
        return contextlib.asynccontextmanager(function)
    return function


def wrapped(function: Callable[..., Any], middleware: Sequence[RunMiddleware], *, is_async: bool) -> Callable[..., Any]:
    """A task's function with all of `middleware` around it, the first outermost."""

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        job = current_job()
        with contextlib.ExitStack() as stack:
            for around in middleware:
                manager: Any = around(job)
                if _is_sync(manager, around):
                    stack.enter_context(manager)
            return function(*arguments, **keywords)
        return None  # an error was swallowed by a middleware

    @functools.wraps(function)
    async def run_async(*arguments: Any, **keywords: Any) -> Any:
        job = current_job()
        async with contextlib.AsyncExitStack() as stack:
            for around in middleware:
                manager: Any = around(job)
                if _is_sync(manager, around):
                    stack.enter_context(manager)
                else:
                    await stack.enter_async_context(manager)
            return await function(*arguments, **keywords)
        return None  # likewise

    return run_async if is_async else run


def _is_sync(manager: object, middleware: RunMiddleware) -> bool:
    """Whether it goes around tasks of both kinds. One that must be awaited goes around `async def` tasks only."""
    if hasattr(manager, "__enter__"):
        return True
    if hasattr(manager, "__aenter__"):
        return False
    raise TypeError(
        f"the run middleware {_name_of(middleware)} must yield once or return a context manager, "
        f"got {type(manager).__name__}"
    )


class EnqueueRequest:
    """What is about to be enqueued by one call, as an enqueue middleware sees it and may change it.

    `payloads` are as the caller gave them, by name: one, or those of `enqueue_many`. They are checked against the
    task's signature afterwards. `options` are those of `task.using(…)`.
    """

    __slots__ = ("options", "payloads", "task")

    def __init__(self, task: str, payloads: list[dict[str, Any]], options: Mapping[str, Any]) -> None:
        self.task = task  #: the name of the task
        self.payloads = payloads
        self.options: dict[str, Any] = dict(options)

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of the jobs, to be read and changed."""
        given = self.options.get("metadata")
        if given is not None and not isinstance(given, Mapping):
            return {}  # refused below, as without any middleware
        metadata = dict(given or {})
        self.options["metadata"] = metadata
        return metadata

    def __repr__(self) -> str:
        return f"<enqueue request for {len(self.payloads)} jobs of task {self.task!r}>"


EnqueueMiddleware = Callable[[EnqueueRequest], object]


def enqueue_middleware(function: Callable[..., Any]) -> EnqueueMiddleware:
    """An enqueue middleware from what the application registered. Raises ConfigurationError."""
    _require_one_parameter(function, "enqueue", "the request")
    is_generator = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    if is_generator or inspect.iscoroutinefunction(function):
        raise ConfigurationError(
            f"the enqueue middleware {_name_of(function)} must be a plain function: it is called before the jobs are "
            "stored, and changes the request or raises; what is to happen afterwards belongs in a listener to "
            "job:enqueued"
        )
    return function


def _require_one_parameter(function: object, kind: str, what: str) -> None:
    if not callable(function):
        raise ConfigurationError(f"a middleware is a function, got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return  # written in C
    try:
        signature.bind(None)
    except TypeError:
        raise ConfigurationError(
            f"the {kind} middleware {_name_of(function)} must take one argument, {what}; it takes {signature}"
        ) from None


def _name_of(function: object) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__
