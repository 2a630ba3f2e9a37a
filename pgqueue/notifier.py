"""Wake-ups: tell workers that a queue has new jobs, so that they need not wait for their next poll.

Only ever a hint. Delivery rests on polling; a lost or spurious wake-up changes nothing but time.
"""

from __future__ import annotations

import atexit
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import sqlalchemy as sa

logger = logging.getLogger(__name__)

#: SQLAlchemy reports the commit of a bare Connection just before it happens; a wake-up then waits this long.
COMMIT_GRACE_SECONDS = 0.005

#: Wake-ups of one process within this time become one NOTIFY per queue. The first goes out at once; while more keep
#: coming the time doubles, up to the second figure, because each NOTIFY takes the server as long as a small commit.
COALESCE_SECONDS, COALESCE_SECONDS_MAX = 0.005, 0.05

#: A sender with nothing to send gives its connection back after this time.
IDLE_SECONDS = 30.0

#: How long a process that ends waits for its last wake-ups to go out.
EXIT_WAIT_SECONDS = 0.5

#: Between two checks that the connection that listens is still alive.
LISTEN_CHECK_SECONDS = 15.0

#: For reading a notification that has arrived.
READ_SECONDS = 0.01


#: As libpq tells that a command was carried out: `psycopg.pq.ExecStatus.COMMAND_OK`, which cannot be imported where
#: there is no libpq.
COMMAND_OK = 1

#: What a notification begins with that tells of a job to be stopped; then comes its id. No queue's name does, so that
#: a listener that knows only these takes no notice.
STOP = "!stop "


def channel(schema: str) -> str:
    return f"pgqueue_{schema}"


class WakeSender:
    """Sends NOTIFYs from a thread and a connection of its own, so that no caller waits for one."""

    def __init__(self, engine: Callable[[], sa.Engine], schema: str) -> None:
        self._engine = engine
        self._schema = schema
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self._not_before = 0.0
        self._thread: threading.Thread | None = None
        self._changed = threading.Event()
        self._closing = False
        self._flushes_at_exit = False

    def __call__(self, queues: set[str], committed: bool) -> None:
        with self._lock:
            self._wanted |= queues
            if not committed:
                self._not_before = time.monotonic() + COMMIT_GRACE_SECONDS
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="pgqueue-wake", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter is ending; workers poll
                    return
                self._thread = thread
                if not self._flushes_at_exit:
                    self._flushes_at_exit = True
                    atexit.register(self._flush)
        self._changed.set()

    def close(self) -> None:
        """Send what is due and give the connection back. A later wake-up opens a new one."""
        thread = self._thread
        if thread is None:
            return
        self._closing = True
        self._changed.set()
        thread.join(EXIT_WAIT_SECONDS)

    def _run(self) -> None:
        connection: sa.Connection | None = None
        pause, next_at = COALESCE_SECONDS, 0.0
        try:
            while True:
                if not self._closing and not self._changed.wait(IDLE_SECONDS):
                    with self._lock:
                        if not self._wanted:
                            self._thread = None
                            return
                self._changed.clear()
                present = time.monotonic()
                pause = min(pause * 2, COALESCE_SECONDS_MAX) if present < next_at else COALESCE_SECONDS
                wait = max(self._not_before, 0.0 if self._closing else next_at) - present
                if wait > 0:
                    time.sleep(wait)
                with self._lock:
                    queues, self._wanted = self._wanted, set()
                    if self._closing and not queues:
                        self._closing, self._thread = False, None
                        return
                if not queues:
                    continue
                try:
                    connection = connection or self._connect()
                    self._notify(connection, queues)
                except Exception as error:  # noqa: BLE001 — only a hint is lost
                    logger.debug("a wake-up was lost: %s", type(error).__name__)
                    if connection is not None:
                        connection.invalidate()
                        connection.close()
                        connection = None
                next_at = time.monotonic() + pause
        finally:
            if connection is not None:
                connection.close()

    def _connect(self) -> sa.Connection:
        connection = self._engine().connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()  # not the pool's any more: its owner may dispose of the engine at any time
        return connection

    def _notify(self, connection: sa.Connection, queues: set[str]) -> None:
        # One round trip and one commit for all queues, which writes nothing but the notifications, so that the server
        # does not wait for the disk.
        if connection.dialect.driver != "psycopg":
            values = [value for queue in sorted(queues) for value in (channel(self._schema), queue)]
            calls = ", ".join(["pg_notify(%s, %s)"] * len(queues))
            connection.exec_driver_sql(f"SELECT {calls}", tuple(values))
            return
        # Straight to libpq, and NOTIFY, of which there is nothing to plan: one for each commit costs the processors as
        # much as the enqueue otherwise.
        name = connection.dialect.identifier_preparer.quote_identifier(channel(self._schema))
        statements = ["NOTIFY {}, '{}'".format(name, queue.replace("'", "''")) for queue in sorted(queues)]
        session: Any = connection.connection.dbapi_connection
        result = session.pgconn.exec_("; ".join(statements).encode(session.info.encoding))
        if result.status != COMMAND_OK:
            raise ConnectionError

    def _flush(self) -> None:
        deadline = time.monotonic() + EXIT_WAIT_SECONDS
        while self._wanted and self._thread is not None and time.monotonic() < deadline:
            time.sleep(0.005)


class WakeListener(threading.Thread):
    """Calls `woken` with the name of each queue that is said to have new jobs, until stopped. Or with STOP and the id
    of a running job that somebody wants stopped.

    After each new connection it calls `woken` for every queue (None), because what was sent meanwhile is lost.
    """

    def __init__(self, engine: sa.Engine, schema: str, woken: Callable[[str | None], None]) -> None:
        super().__init__(name="pgqueue-listen", daemon=True)
        self._engine = engine
        self._schema = schema
        self._woken = woken
        self.listening = False  #: what is sent arrives
        self._stop_requested = threading.Event()
        # Ends the wait for the next notification, so that a worker that stops need not wait for its listener.
        self._bell, self._ringer = socket.socketpair()

    def stop(self) -> None:
        self._stop_requested.set()
        with suppress(OSError):  # it has ended already
            self._ringer.send(b"\0")

    def run(self) -> None:
        with self._bell, self._ringer:
            self._run()

    def _run(self) -> None:
        wait = 0.5
        while not self._stop_requested.is_set():
            try:
                with self._engine.connect() as connection:
                    listening = connection.execution_options(isolation_level="AUTOCOMMIT")
                    listening.exec_driver_sql(f'LISTEN "{channel(self._schema)}"')
                    self.listening = True
                    self._woken(None)
                    wait = 0.5
                    try:
                        self._listen(listening)
                    finally:
                        self.listening = False
                        listening.invalidate()  # never back into the pool while it listens
            except Exception as error:  # noqa: BLE001 — polling goes on
                if not self._stop_requested.is_set():
                    logger.debug("not listening for wake-ups (%s); polling goes on", type(error).__name__)
                self._stop_requested.wait(wait)
                wait = min(wait * 2, 15.0)

    def _listen(self, connection: sa.Connection) -> None:
        driver: Any = connection.connection.driver_connection
        with selectors.DefaultSelector() as selector:
            selector.register(driver.fileno(), selectors.EVENT_READ)
            selector.register(self._bell, selectors.EVENT_READ)
            while not self._stop_requested.is_set():
                if not selector.select(LISTEN_CHECK_SECONDS):
                    driver.execute("SELECT 1")
                for notice in driver.notifies(timeout=READ_SECONDS, stop_after=1):
                    self._woken(notice.payload)
