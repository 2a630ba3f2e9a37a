"""Timeouts of `def` tasks in threads: one clock for all slots of a worker.

Python cannot end a thread. At the deadline the clock does two things: it has the attempt's end written, and it has
AttemptTimeout raised in the thread at its next bytecode. A thread that is inside of C code (a query, a sleep, a long
computation of a library) goes on until that returns; meanwhile its slot stays taken, and what it returns is refused.

That exception must never reach the worker's own code or the next job of the same slot. Therefore each attempt has one
token. Either the clock takes it, and only then raises, once; or the slot takes it when the function has returned, and
nothing will be raised. (What runs of pgqueue within the function takes it for a while: see `shield`.) A slot that finds
the token gone waits until the clock has raised, and withdraws an exception that was not delivered yet. No locks are
held there: an exception that arrives between two bytecodes could leave one locked for ever.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pgqueue.job import ClaimedJob
from pgqueue.shield import SPIN_SECONDS, Interruptible, running

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: A thread that goes on for so long after its timeout is complained of.
GRACE_SECONDS = 1.0

#: How soon the clock looks again at an attempt that was just beginning when its time was over.
SOON_SECONDS = 0.005


class AttemptTimeout(TimeoutError):
    """Raised in a `def` task whose time is over. Whatever the task does with it, its attempt has failed."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(arguments or ("the attempt took longer than its timeout",)))


class _Attempt(Interruptible):
    """One run of a function in a slot's thread. Its token is there while the function runs, its time is not over, and
    no code of pgqueue's own is shielded."""

    def __init__(self, job: ClaimedJob, deadline: float, expired: Callable[[], None]) -> None:
        super().__init__()
        self.job = job
        self.deadline = deadline  #: monotonic
        self.expired = expired
        self.thread_id = threading.get_ident()
        self.is_over = False
        self.is_reported = False


class Deadlines:
    """Runs functions with a timeout. The thread of its clock starts with the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attempts: dict[_Attempt, None] = {}
        self._next = float("inf")
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def run(self, job: ClaimedJob, seconds: float, function: Callable[[], T], expired: Callable[[], None]) -> T | None:
        """What `function` returns; None when it did not within `seconds`.

        `function` must not raise by itself. `expired` is called at the deadline, from the clock's thread.
        """
        attempt = _Attempt(job, time.monotonic() + seconds, expired)
        self._watch(attempt)
        result: T | None = None
        running.interruptible = attempt
        try:
            try:
                attempt.token.append(None)  # from here on the exception may come, once
                result = function()
            finally:
                self._end(attempt)
        except AttemptTimeout:
            self._end(attempt)  # it came on the way back from the function; it does not come again
        running.interruptible = None
        attempt.is_over = True
        self._attempts.pop(attempt, None)
        if attempt.has_raised:
            if attempt.is_reported:
                logger.warning("job %d ended %.1f s after its timeout; its slot is free again", job.id, _late(attempt))
            return None
        return result

    def stop(self) -> None:
        """End the clock: nobody is stopped at a deadline any more."""
        self._is_stopped = True
        self._changed.set()

    def _end(self, attempt: _Attempt) -> None:
        """Make sure that nothing is raised in this thread from here on."""
        try:
            attempt.token.pop()
            return
        except IndexError:
            pass
        while not attempt.has_raised:
            time.sleep(SPIN_SECONDS)
        _raise_in(attempt.thread_id, None)

    def _watch(self, attempt: _Attempt) -> None:
        with self._lock:
            self._attempts[attempt] = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pgqueue-deadlines", daemon=True)
                self._thread.start()
            is_next = attempt.deadline < self._next
            if is_next:
                self._next = attempt.deadline
        if is_next:
            self._changed.set()

    def _run(self) -> None:
        while not self._is_stopped:
            # Attempts that end are not struck off `_next`: the clock then wakes up once for nothing.
            self._changed.wait(max(0.0, min(self._next - time.monotonic(), threading.TIMEOUT_MAX)))
            self._changed.clear()
            now = time.monotonic()
            with self._lock:
                attempts = list(self._attempts)
                self._next = float("inf")
            again = min((self._look_at(attempt, now) for attempt in attempts), default=float("inf"))
            with self._lock:
                self._next = min(self._next, again)

    def _look_at(self, attempt: _Attempt, now: float) -> float:
        """Do what is due for an attempt; when to look at it again."""
        if attempt.is_over:
            return float("inf")
        if now < attempt.deadline:
            return attempt.deadline
        if attempt.has_raised:
            if now < attempt.deadline + GRACE_SECONDS:
                return attempt.deadline + GRACE_SECONDS
            if not attempt.is_reported:
                attempt.is_reported = True
                logger.warning(
                    "job %d (task %s) goes on in its thread although its timeout is over; its attempt has failed, and "
                    "its slot stays taken until the thread comes back from where it is",
                    attempt.job.id,
                    attempt.job.task,
                )
            return float("inf")
        try:
            attempt.token.pop()
        except IndexError:
            return now + SOON_SECONDS  # not begun, shielded, or just over
        try:
            attempt.expired()
        except Exception:
            logger.exception("the end of job %d could not be noted at its timeout", attempt.job.id)
        _raise_in(attempt.thread_id, AttemptTimeout)
        attempt.has_raised = True
        return attempt.deadline + GRACE_SECONDS


def _late(attempt: _Attempt) -> float:
    return time.monotonic() - attempt.deadline


def _raise_in(thread_id: int, error: type[BaseException] | None) -> None:
    """Have `error` raised in a thread at its next bytecode; None: withdraw one that was not raised yet."""
    pointer = None if error is None else id(error)
    _set_async_exc(ctypes.c_ulong(thread_id), ctypes.c_void_p(pointer))


_set_async_exc = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)(
    ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
)
