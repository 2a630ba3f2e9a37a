"""Threads that outlive every failure: a step repeated on a database connection, and an event loop for tasks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from pgqueue import plans
from pgqueue.engine import (
    describe_url,
    end_if_frozen,
    explain,
    first_line,
    is_bounding_itself,
    is_disconnect,
    is_mixed_up,
    is_transient,
)

logger = logging.getLogger(__name__)

#: After a failed step the next one waits at least and at most so long, doubling in between.
BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX = 0.1, 5.0

#: How long coroutines may take to end once the event loop is stopped.
CANCEL_SECONDS = 1.0


class LoopEnded(Exception):
    """Raised by a step that was the last."""


class Outage:
    """What the loops of one worker know of their database together, so that an outage is logged once when the
    first of them meets it, and once when the last has overcome it."""

    def __init__(self, url: sa.URL) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._stuck: set[str] = set()
        self._began = 0.0

    def met(self, loop: str, error: Exception) -> None:
        with self._lock:
            first = not self._stuck
            self._stuck.add(loop)
            if first:
                self._began = time.monotonic()
        if first:
            logger.warning("the database cannot be used, trying again until it can: %s", self.explain(error))

    def overcome(self, loop: str) -> None:
        with self._lock:
            over = self._stuck == {loop}
            self._stuck.discard(loop)
        if over:
            logger.warning("the database can be used again, after %.1f s", time.monotonic() - self._began)

    def explain(self, error: Exception) -> object:
        if not isinstance(error, sa.exc.DBAPIError):
            return f"{describe_url(self._url)}: {type(error).__name__}"
        return explain(error, self._url) or f"{describe_url(self._url)}: {first_line(error)}"


class DatabaseLoop(threading.Thread):
    """Calls `step` with a connection, then waits as many seconds as it returned, until stopped.

    A step that fails is called again, on a new connection, after a growing wait. Should this process freeze in a
    transaction of a step, the server ends that after `frozen_after` seconds.
    """

    def __init__(
        self,
        name: str,
        engine: sa.Engine,
        step: Callable[[sa.Connection], float],
        outage: Outage,
        frozen_after: float,
        *,
        keeps_plans: bool = False,
    ) -> None:
        """keeps_plans: for steps that send the same statements over and over."""
        super().__init__(name=f"pgqueue-{name}", daemon=True)
        self._engine = engine
        self._step = step
        self._outage = outage
        self._frozen_after = frozen_after
        self._keeps_plans = keeps_plans
        self._stop_requested = False
        self._reported = False  # the present failure, when it is none of the database's
        self._wake = threading.Event()

    def wake(self) -> None:
        """Let the next step begin now."""
        self._wake.set()

    def stop(self) -> None:
        self._stop_requested = True
        self._wake.set()

    def run(self) -> None:
        connection: sa.Connection | None = None
        renew_at = math.inf  # monotonic; never when no plans are kept
        failures = 0
        while not self._stop_requested:
            try:
                if connection is None:
                    connection = self._engine.connect()
                    event.listen(connection, "begin", self._transaction_begins)
                    kept = self._keeps_plans and plans.keep(connection)
                    renew_at = time.monotonic() + plans.RENEW_SECONDS if kept else math.inf
                elif time.monotonic() >= renew_at:
                    plans.renew(connection)
                    renew_at = time.monotonic() + plans.RENEW_SECONDS
                wait = self._step(connection)
            except LoopEnded:
                break
            except Exception as error:  # noqa: BLE001 — a background duty outlives every failure
                failures += 1
                if self._keeps_plans and is_mixed_up(error):
                    logger.warning("%s: keeps no plans any more, which another session has lost or taken", self.name)
                    self._keeps_plans = False
                    wait = 0.0
                elif failures == 1 and connection is not None and is_disconnect(error):
                    # It may have broken long ago, while nothing was to do. Only a new one tells of an outage.
                    logger.info("%s: the connection broke, making a new one", self.name)
                    wait = 0.0
                else:
                    self._report(error)
                    wait = _backoff(failures)
                self._discard(connection)
                connection = None
            else:
                if failures:
                    self._outage.overcome(self.name)
                    failures, self._reported = 0, False
            if wait > 0:
                self._wake.wait(wait)
            self._wake.clear()
        self._discard(connection)

    def _transaction_begins(self, connection: sa.Connection) -> None:
        if not is_bounding_itself(connection):
            end_if_frozen(connection, self._frozen_after)

    def _report(self, error: Exception) -> None:
        if is_transient(error):
            self._outage.met(self.name, error)
        elif not self._reported:
            self._reported = True
            if isinstance(error, sa.exc.DBAPIError):  # the rest of which may show a whole row, with its payload
                logger.error("%s: failed, trying again until it works: %s", self.name, self._outage.explain(error))
            else:
                logger.error("%s: failed, trying again until it works", self.name, exc_info=error)

    def _discard(self, connection: sa.Connection | None) -> None:
        if connection is not None:
            try:
                connection.invalidate()
                connection.close()
            except Exception as error:  # noqa: BLE001 — it was broken before
                logger.debug("%s: closing a broken connection failed: %s", self.name, type(error).__name__)


def _backoff(failures: int) -> float:
    longest: float = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN * 2 ** min(failures - 1, 10))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 — jitter, so that workers do not return all at once


class TaskLoop(threading.Thread):
    """An event loop on a thread of its own, until stopped; `at_end` is awaited as the last thing it does."""

    def __init__(self, at_end: Callable[[], Awaitable[None]]) -> None:
        super().__init__(name="pgqueue-async", daemon=True)
        self._at_end = at_end
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps only weak references
        self._stop_requested = False

    def spawn(self, function: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        """Run `function(*arguments)` as a task. From any thread."""
        if threading.current_thread() is self:
            self._create_task(function, arguments)
        else:
            self.call(self._create_task, function, arguments)

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a plain function in the loop's thread, soon. From any thread; nothing happens after the end."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def stop(self) -> None:
        self._stop_requested = True
        self.call(self._loop.stop)

    def run(self) -> None:
        self._outlive(self._loop.run_forever, until=lambda: self._stop_requested)
        ending = self._loop.create_task(self._end())
        self._outlive(lambda: self._loop.run_until_complete(ending), until=ending.done)
        self._loop.close()

    def _create_task(self, function: Callable[..., Coroutine[Any, Any, None]], arguments: tuple[Any, ...]) -> None:
        task = self._loop.create_task(function(*arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _outlive(self, run: Callable[[], object], until: Callable[[], bool]) -> None:
        while not until():
            try:
                run()
            except BaseException as error:  # noqa: BLE001 — SystemExit of a coroutine that a task started, or a bug
                logger.error("%s: %s came out of the event loop, which goes on", self.name, type(error).__name__)

    async def _end(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=CANCEL_SECONDS)
        await self._loop.shutdown_asyncgens()
        await self._at_end()
