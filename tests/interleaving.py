"""Operations on connections of their own, taken step by step through every order of their steps.

Each has two steps: its statements, then its commit. One that meets a lock is seen waiting in pg_stat_activity; the
others go on.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from support import PATIENCE_SECONDS

from pgqueue import ClaimLost, IllegalTransition, PgQueue

Work = Callable[[sa.Connection], Any]

STEPS = ("run", "commit")

LOOK_AGAIN_SECONDS = 0.002


class Operation:
    """One transaction in a thread of its own, started and committed on command."""

    def __init__(
        self, engine: sa.Engine, watcher: sa.Connection, name: str, work: Work, *, rolls_back: bool = False
    ) -> None:
        self._rolls_back = rolls_back
        self._watcher = watcher
        self._connection = engine.connect()
        self._connection.execute(
            sa.text(
                "SELECT set_config('application_name', :name, false), set_config('statement_timeout', '30s', false)"
            ),
            {"name": name},
        )
        self._connection.commit()
        driver_connection: Any = self._connection.connection.driver_connection
        self._pid = driver_connection.info.backend_pid
        self._work = work
        self._commit_wanted = threading.Event()
        self._ran = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.result: Any = None

    def _run(self) -> None:
        try:
            self.result = self._work(self._connection)
        except Exception as error:
            self.result = error
        self._ran.set()
        self._commit_wanted.wait()
        if self._rolls_back or isinstance(self.result, Exception):
            self._connection.rollback()
        else:
            self._connection.commit()

    def step(self, step: str) -> None:
        """Start the statement, or have it committed: at once, or as soon as it no longer waits."""
        if step == "run":
            self._thread.start()
            self._wait(lambda: self._ran.wait(LOOK_AGAIN_SECONDS))
        else:
            self._commit_wanted.set()
            self._wait(self._is_over)

    def _is_over(self) -> bool:
        self._thread.join(LOOK_AGAIN_SECONDS)
        return not self._thread.is_alive()

    def _wait(self, done: Callable[[], bool]) -> None:
        """Until `done`, or until PostgreSQL says that the statement waits for a lock."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not done():
            if not self._ran.is_set() and self._is_blocked():
                return
            assert time.monotonic() < deadline, "neither done nor waiting for a lock"

    def _is_blocked(self) -> bool:
        found = self._watcher.scalar(
            sa.text("SELECT wait_event_type = 'Lock' FROM pg_stat_get_activity(:pid)"), {"pid": self._pid}
        )
        return bool(found)

    def end(self) -> None:
        self._commit_wanted.set()
        if self._thread.ident is not None:
            self._thread.join(60)
            assert not self._thread.is_alive()
        self._connection.close()


def orders(operations: int) -> Iterator[tuple[tuple[int, str], ...]]:
    """Every order of the steps of so many operations in which each runs before it commits."""
    steps = [(number, step) for number in range(operations) for step in STEPS]
    for order in itertools.permutations(steps):
        if all(order.index((number, "run")) < order.index((number, "commit")) for number in range(operations)):
            yield order


def play(
    pg: PgQueue, works: list[Work], order: tuple[tuple[int, str], ...], *, rolled_back: Sequence[int] = ()
) -> list[Any]:
    """Take the operations through their steps in this order; their results. A deadlock would be one of them.

    rolled_back: the numbers of those that are rolled back instead of being committed.
    """
    # A look is one statement and no transaction: there are many of them.
    with pg.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watcher:
        operations = [
            Operation(pg.engine, watcher, f"operation {n}", work, rolls_back=n in rolled_back)
            for n, work in enumerate(works)
        ]
        try:
            for number, step in order:
                operations[number].step(step)
        finally:
            for operation in operations:
                operation.end()
    return [operation.result for operation in operations]


def unexpected(results: list[Any]) -> list[Exception]:
    return [
        result
        for result in results
        if isinstance(result, Exception) and not isinstance(result, IllegalTransition | ClaimLost)
    ]
