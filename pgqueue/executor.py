"""Run a task's function for one attempt and say how it ended. Never raises, never sees the database."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from pgqueue.errors import Cancel, Discard, InvalidPayload, RetryAfter, Snooze
from pgqueue.job import Cancelled, ClaimedJob, Completed, Discarded, ErrorInfo, Failed, Outcome, Snoozed
from pgqueue.retry import DELAY_SECONDS_MAX, Retry, as_seconds
from pgqueue.task import TaskDefinition, encode_json

logger = logging.getLogger(__name__)

#: What is kept of an exception: enough to understand it, little enough that any number of them can be stored.
MESSAGE_CHARACTERS_MAX = 2_000
TRACEBACK_CHARACTERS_MAX = 20_000

#: How long a coroutine may take to end after its timeout before the worker goes on without it.
CANCEL_GRACE_SECONDS = 5.0

#: The outcome of a task that returned nothing, as most do.
COMPLETED = Completed()

_current: contextvars.ContextVar[ClaimedJob] = contextvars.ContextVar("pgqueue_current_job")


def current_job() -> ClaimedJob:
    """The job that this thread or coroutine is running. RuntimeError outside of a task.

    A thread that a task starts knows it when it runs in the task's context: `contextvars.copy_context().run(function)`.
    """
    try:
        return _current.get()
    except LookupError:
        raise RuntimeError(
            "current_job() was called outside of a running task; in a thread that a task has started, run the function "
            "in the task's context, with contextvars.copy_context().run"
        ) from None


def execute(task: TaskDefinition, job: ClaimedJob, *leading: Any) -> Outcome:
    """Run a `def` task. `leading` goes before the payload's arguments (the session of a transactional task)."""
    try:
        arguments = task.decode(job.payload_json)
    except BaseException as error:  # noqa: BLE001 — validators of the application's own may raise anything
        return _unusable(task, error)
    token = _current.set(job)
    try:
        return completed(task, task.function(*leading, **arguments))
    except BaseException as error:  # noqa: BLE001 — whatever a task raises ends its attempt, not the worker
        return outcome_of(error, task.retry)
    finally:
        _current.reset(token)


async def execute_async(task: TaskDefinition, job: ClaimedJob, *leading: Any) -> Outcome:
    """Run an `async def` task, at most `task.timeout` seconds.

    Cancelling this coroutine cancels the task; a task with a timeout that refuses to end is left behind after a
    grace, so that it cannot hold up the worker.
    """
    try:
        arguments = task.decode(job.payload_json)
    except BaseException as error:  # noqa: BLE001 — as above
        return _unusable(task, error)
    token = _current.set(job)
    try:
        if task.timeout is None:
            return completed(task, await task.function(*leading, **arguments))
        return await _within(task.timeout, task, job, lambda: task.function(*leading, **arguments))
    except asyncio.CancelledError:
        running = asyncio.current_task()
        if running is not None and running.cancelling():
            raise  # somebody stops this attempt; a task that merely raises CancelledError has failed
        return cancelled_itself(task.retry)
    except BaseException as error:  # noqa: BLE001 — as above
        return outcome_of(error, task.retry)
    finally:
        _current.reset(token)


async def _within(
    seconds: float, task: TaskDefinition, job: ClaimedJob, start: Callable[[], Awaitable[Any]]
) -> Outcome:
    async def call() -> Outcome:
        try:
            return completed(task, await start())
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 — a SystemExit that leaves an asyncio task ends its event loop
            return outcome_of(error, task.retry)

    running = asyncio.ensure_future(call())
    try:
        done, _ = await asyncio.wait({running}, timeout=seconds)
        if not done:
            running.cancel(f"timeout of {seconds} s")
            done, _ = await asyncio.wait({running}, timeout=CANCEL_GRACE_SECONDS)
            if not done:
                logger.error(
                    "task %s (job %d) goes on although its timeout of %s s is over and it was cancelled; "
                    "the attempt is counted as failed and the coroutine is left behind",
                    task.name,
                    job.id,
                    seconds,
                )
            return timed_out(task.retry, seconds)
    except asyncio.CancelledError:
        running.cancel()
        done, _ = await asyncio.wait({running}, timeout=CANCEL_GRACE_SECONDS)
        if done and not running.cancelled() and isinstance(running.result(), Completed):
            return running.result()  # it came to its end all the same
        raise
    return cancelled_itself(task.retry) if running.cancelled() else running.result()


def timed_out(policy: Retry, seconds: float) -> Outcome:
    """The outcome of an attempt that took too long."""
    return policy.judge(
        TimeoutError, ErrorInfo("TimeoutError", f"the attempt took longer than its timeout of {seconds} s")
    )


def cancelled_itself(policy: Retry) -> Outcome:
    """The outcome of an `async def` task that ended as cancelled although nobody had cancelled it."""
    return policy.judge(asyncio.CancelledError, ErrorInfo("asyncio.CancelledError", "the task cancelled itself"))


def _unusable(task: TaskDefinition, error: BaseException) -> Outcome:
    """The outcome of a job whose payload cannot be decoded: the same payload will not fit next time either."""
    if isinstance(error, InvalidPayload):
        return Discarded("the payload cannot be used", describe(error))
    return outcome_of(error, task.retry)


def completed(task: TaskDefinition, result: object) -> Outcome:
    """The outcome of a task that returned `result`."""
    if result is None:
        return COMPLETED
    try:
        return Completed(encode_json(result, f"result of task {task.name!r}"))
    except InvalidPayload as error:
        reason = f"the task ran to its end, but its return value cannot be stored: {error}"
        return Discarded(reason, ErrorInfo("InvalidResult", clean(reason, MESSAGE_CHARACTERS_MAX)))


def outcome_of(error: BaseException, policy: Retry) -> Outcome:
    """The outcome of a task that raised `error`."""
    match error:
        case Snooze() | RetryAfter():
            delay = _delay_of(error)
            if delay is None:
                problem = (
                    f"{type(error).__name__} needs a delay between 0 and {DELAY_SECONDS_MAX:.0f} seconds, "
                    f"got {_text(error.delay)}"
                )
                return Failed(ErrorInfo("ValueError", problem))
            if isinstance(error, RetryAfter):
                return Failed(describe(error), delay)
            return Snoozed(delay, _text(error.reason))
        case Discard():
            return Discarded(_text(error.reason), describe(error))
        case Cancel():
            return Cancelled(_text(error.reason))
        case _:
            return policy.judge(type(error), describe(error))


def _delay_of(error: Snooze | RetryAfter) -> float | None:
    """Seconds; None when what the task gave is no such delay."""
    if isinstance(error.delay, bool | str):
        return None
    try:
        delay = as_seconds(error.delay)
    except (TypeError, ValueError, OverflowError):
        return None
    return delay if 0 <= delay <= DELAY_SECONDS_MAX else None


def describe(error: BaseException) -> ErrorInfo:
    """What is stored of an exception. Its own code (`__str__`, `__repr__`) may fail; this does not."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        trace = "".join(traceback.format_exception(error))
    except BaseException:  # noqa: BLE001 — likewise, through the chain of causes
        trace = "(its traceback could not be made)"
    return ErrorInfo(clean(name, 200), _text(error), clean(trace, TRACEBACK_CHARACTERS_MAX))


def _text(value: object) -> str:
    """What a task gave as a message or a reason, whatever it is."""
    try:
        text = str(value)
    except BaseException:  # noqa: BLE001 — its own __str__ may raise anything
        text = "(its message could not be made)"
    return clean(text, MESSAGE_CHARACTERS_MAX)


def clean(text: str, characters_max: int) -> str:
    """`text` as any database can store it: no NUL, no lone surrogate, the middle cut out when too long."""
    if len(text) > characters_max:
        half = characters_max // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"
    return text.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode("utf-8")
