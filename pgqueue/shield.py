"""Sections of pgqueue's own code, in a task's thread, that the task's timeout must not tear.

A task that reports progress or commits an enqueue runs code that others share: locks, queues, threads that are about
to start. An exception between two bytecodes there would harm them all. Within `shielded()` the timeout waits.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

#: Between two looks whether an exception that is on its way has come: that takes microseconds.
SPIN_SECONDS = 0.0002


class Interruptible:
    """Something in this thread that another thread may interrupt with an exception, once.

    Whoever takes `token` out decides: the interrupter, who then raises; or this thread, in which nothing will be
    raised as long as it keeps it. No lock is held, because an exception could leave one locked.
    """

    def __init__(self) -> None:
        self.token: list[None] = []  #: holds one while an interruption is allowed
        self.has_raised = False  #: the interrupter took the token, and has raised
        self.shields = 0  #: sections that are being executed, one within the other


class Running(threading.local):
    """What may be interrupted in the present thread."""

    interruptible: Interruptible | None = None


running = Running()


class shielded:
    """Within this block the task's timeout does not strike. Keep it short; it may be nested."""

    __slots__ = ("_interruptible",)

    def __enter__(self) -> None:
        interruptible = self._interruptible = running.interruptible
        if interruptible is None:
            return
        if interruptible.shields == 0:
            try:
                interruptible.token.pop()
            except IndexError:
                # The exception is on its way, and comes here, before the block; or it has come already, and the task
                # went on all the same.
                while not interruptible.has_raised:
                    time.sleep(SPIN_SECONDS)
                time.sleep(0)
        interruptible.shields += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interruptible = self._interruptible
        if interruptible is None:
            return
        interruptible.shields -= 1
        if interruptible.shields == 0 and not interruptible.has_raised:
            interruptible.token.append(None)
