"""A background duty: one step repeated on a thread and a database connection of its own, whatever happens."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

import sqlalchemy as sa

from pgqueue.engine import describe_url, explain, is_transient

logger = logging.getLogger(__name__)

#: After a failed step the next one waits at least and at most so long, doubling in between.
BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX = 0.1, 5.0


class LoopEnded(Exception):
    """Raised by a step that was the last."""


class DatabaseLoop(threading.Thread):
    """Calls `step` with a connection, then waits as many seconds as it returned, until stopped.

    A step that fails is called again, on a new connection, after a growing wait. An outage is logged once when it
    begins and once when it is over.
    """

    def __init__(self, name: str, engine: sa.Engine, step: Callable[[sa.Connection], float]) -> None:
        super().__init__(name=f"pgqueue-{name}", daemon=True)
        self._engine = engine
        self._step = step
        self._stop_requested = False
        self._wake = threading.Event()

    def wake(self) -> None:
        """Let the next step begin now."""
        self._wake.set()

    def stop(self) -> None:
        self._stop_requested = True
        self._wake.set()

    def run(self) -> None:
        connection: sa.Connection | None = None
        failures = 0
        while not self._stop_requested:
            try:
                if connection is None:
                    connection = self._engine.connect()
                wait = self._step(connection)
            except LoopEnded:
                break
            except Exception as error:  # noqa: BLE001 — a background duty outlives every failure
                self._discard(connection)
                connection = None
                failures += 1
                if failures == 1:
                    self._report(error)
                wait = _backoff(failures)
            else:
                if failures:
                    logger.info("%s: works again after %d failed tries", self.name, failures)
                    failures = 0
            if wait > 0:
                self._wake.wait(wait)
            self._wake.clear()
        self._discard(connection)

    def _report(self, error: Exception) -> None:
        if is_transient(error):
            explained = explain(error, self._engine.url) if isinstance(error, sa.exc.DBAPIError) else None
            what = explained or f"{describe_url(self._engine.url)}: {type(error).__name__}"
            logger.warning("%s: the database cannot be used, trying again until it can: %s", self.name, what)
        else:
            logger.error("%s: failed, trying again", self.name, exc_info=error)

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
