"""Worker processes: one under signals, or several under a supervisor.

The first SIGINT or SIGTERM lets running jobs end, the second ends everything at once. A supervisor passes both on.
It starts its processes anew when they die. Should it die itself, however suddenly, they stop as after a first
signal: each reads from a pipe that only the supervisor holds open.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from pgqueue.worker import SIGNAL_SECONDS, Worker

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: Set in the processes of a supervisor: their standard input is the pipe that ends with it.
SUPERVISED_VARIABLE = "PGQUEUE_SUPERVISED"

#: Exit code of a drain that left dead jobs behind.
DRAINED_WITH_DEAD = 8

#: How long a worker may take to give its jobs back, and processes to end, after a second signal.
ABORT_SECONDS = 5.0

#: A process that died is replaced after at least and at most so long, doubling in between.
RESTART_SECONDS_MIN, RESTART_SECONDS_MAX = 0.5, 30.0

#: A process that ran this long was well: the next death begins with the shortest wait again.
WELL_SECONDS = 60.0


def run_worker(worker: Worker, *, supervised: bool = False) -> bool:
    """Run a worker in this process until it ends or is signalled; whether a signal ended it.

    The second signal ends the process, with exit code 130 (SIGINT) or 143 (SIGTERM). `supervised`: standard input
    is the pipe of a supervisor.
    """
    # A signal handler may interrupt any lock's holder; putting into this queue is all it does.
    events: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            worker.run()
        except BaseException as error:  # noqa: BLE001 — raised again in the main thread
            failure.append(error)
        finally:
            events.put(None)

    stopped = False
    with _signals_to(events.put):
        if supervised:
            _watch_supervisor(lambda: events.put(0))
        gc.collect()
        gc.freeze()  # what is loaded by now stays: no collection while jobs run has to look through it
        thread = threading.Thread(target=run, name="pgqueue-worker", daemon=True)
        thread.start()
        while (number := events.get()) is not None:
            if not stopped:
                stopped = True
                logger.info(
                    "%s: stopping; running jobs have %g s to end, a second signal stops at once",
                    signal.Signals(number).name if number else "the supervisor is gone",
                    worker.config.shutdown_timeout,
                )
                worker.stop()
            elif number:
                _abort(worker, thread, number)
        thread.join()
        gc.unfreeze()
    if failure:
        raise failure[0]
    return stopped


def _abort(worker: Worker, thread: threading.Thread, number: int) -> NoReturn:
    logger.warning("%s again: stopping at once", signal.Signals(number).name)
    worker.abort()
    thread.join(ABORT_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(128 + number)  # whatever tasks are still running in threads


@contextmanager
def _signals_to(receive: Callable[[int], None]) -> Iterator[None]:
    before = {number: signal.signal(number, lambda received, _: receive(received)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _watch_supervisor(gone: Callable[[], None]) -> None:
    """Call `gone` when the pipe on standard input ends. Standard input itself becomes empty, for the tasks."""
    pipe = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)

    def watch() -> None:
        while os.read(pipe, 1024):
            pass
        gone()

    threading.Thread(target=watch, name="pgqueue-supervisor-watch", daemon=True).start()


@dataclass(eq=False)
class _Child:
    """The place of one process; the processes in it come and go."""

    number: int  #: from 1
    process: subprocess.Popen[bytes] | None = None  #: None: none at present
    started_at: float = 0.0
    restart_at: float | None = None
    failures: int = 0  #: deaths in a row


class Supervisor:
    """Keeps `processes` processes of one command running, until signalled or, when draining, until they are done.

    `run()` returns the exit code: 0; 1 when a process failed; 8 when a drain left dead jobs; 130 or 143 after a
    second signal.
    """

    def __init__(
        self, command: Sequence[str], processes: int, *, environ: Mapping[str, str], drain: bool = False
    ) -> None:
        self._command = list(command)
        self._environ = {**environ, SUPERVISED_VARIABLE: "1"}
        self._drain = drain
        self._children = [_Child(number) for number in range(1, processes + 1)]
        self._events: queue.SimpleQueue[int | _Child] = queue.SimpleQueue()
        self._signals: list[int] = []
        self._exit_codes: set[int] = set()  #: of processes that were not to be replaced
        self._kill_at: float | None = None

    def run(self) -> int:
        with _signals_to(self._events.put):
            for child in self._children:
                self._start(child)
            while self._unfinished():
                self._wait()
                self._restart()
                self._kill_late()
        return self._exit_code()

    def _unfinished(self) -> bool:
        return any(child.process is not None or child.restart_at is not None for child in self._children)

    def _start(self, child: _Child) -> None:
        child.restart_at = None
        child.started_at = time.monotonic()
        try:
            # Groups of their own, so that Ctrl-C in a terminal reaches them once: through the supervisor.
            process = subprocess.Popen(  # noqa: S603 — this Python and this program
                self._command, env=self._environ, stdin=subprocess.PIPE, bufsize=0, process_group=0
            )
        except OSError as error:
            logger.error("worker process %d cannot be started: %s", child.number, error)
            self._ended(child, 1)
            return
        child.process = process
        logger.info("worker process %d of %d started: pid %d", child.number, len(self._children), process.pid)

        def wait() -> None:
            process.wait()
            self._events.put(child)

        threading.Thread(target=wait, name=f"pgqueue-child-{child.number}", daemon=True).start()

    def _wait(self) -> None:
        """Wait for the next signal, death or due restart, and deal with the first two."""
        moments = [child.restart_at for child in self._children if child.restart_at is not None]
        if self._kill_at is not None:
            moments.append(self._kill_at)
        now = time.monotonic()
        try:
            event = self._events.get(timeout=max(0.0, min([now + SIGNAL_SECONDS, *moments]) - now))
        except queue.Empty:
            return
        if isinstance(event, _Child):
            assert event.process is not None
            code = event.process.returncode
            if event.process.stdin is not None:
                event.process.stdin.close()
            event.process = None
            self._ended(event, code)
        else:
            self._signalled(event)

    def _signalled(self, number: int) -> None:
        self._signals.append(number)
        name = signal.Signals(number).name
        if len(self._signals) == 1:
            logger.info("%s: stopping %d worker processes", name, len(self._children))
            for child in self._children:
                child.restart_at = None
        elif self._kill_at is None:
            logger.warning("%s again: stopping the worker processes at once", name)
            self._kill_at = time.monotonic() + ABORT_SECONDS
        self._send(number)

    def _send(self, number: int) -> None:
        for child in self._children:
            if child.process is not None:
                child.process.send_signal(number)

    def _ended(self, child: _Child, code: int) -> None:
        """Note how a process ended and decide whether there is to be another."""
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        if self._signals or self._drain:
            logger.info("worker process %d %s", child.number, how)
            self._exit_codes.add(code)
            return
        if code == 0:  # it has run the jobs it was to run: a fresh one takes its place
            logger.info("worker process %d is done; starting another", child.number)
            child.failures, child.restart_at = 0, time.monotonic()
            return
        if time.monotonic() - child.started_at >= WELL_SECONDS:
            child.failures = 0
        child.failures += 1
        wait = min(RESTART_SECONDS_MAX, RESTART_SECONDS_MIN * 2 ** min(child.failures - 1, 10))
        child.restart_at = time.monotonic() + wait
        logger.error("worker process %d %s unexpectedly; starting another in %g s", child.number, how, wait)

    def _restart(self) -> None:
        for child in self._children:
            if child.restart_at is not None and child.restart_at <= time.monotonic():
                self._start(child)

    def _kill_late(self) -> None:
        if self._kill_at is not None and self._kill_at <= time.monotonic():
            self._kill_at = time.monotonic() + ABORT_SECONDS
            self._send(signal.SIGKILL)

    def _exit_code(self) -> int:
        if len(self._signals) > 1:
            return 128 + self._signals[-1]
        # One that was signalled before it was listening for signals had not begun to work.
        harmless = {0} | {code for number in self._signals for code in (-number, 128 + number)}
        codes = self._exit_codes - harmless
        if codes - {DRAINED_WITH_DEAD}:
            return 1
        return DRAINED_WITH_DEAD if codes else 0


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
