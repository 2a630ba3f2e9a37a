"""The child process of an isolated task: takes one job after the other from its socket and runs it."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pgqueue import reporting
from pgqueue.errors import ConfigurationError
from pgqueue.executor import describe, execute, execute_async, outcome_of
from pgqueue.isolation import (
    IS_LINUX,
    LENGTH_BYTES,
    MESSAGE_BYTES_MAX,
    PROGRESS,
    STARTED,
    decoded_job,
    message_of,
    name_of,
    outcome_message,
    receive,
)
from pgqueue.job import ClaimedJob, Discarded, ErrorInfo, Failed, Outcome
from pgqueue.middleware import RunMiddleware, wrapped
from pgqueue.task import TaskDefinition

PR_SET_PDEATHSIG = 1

#: Between two reports of progress to the worker, which writes one a second.
REPORT_SECONDS = 0.2

#: Between two looks whether the worker is alive, where the system does not tell.
WATCH_SECONDS = 0.5


def main() -> None:
    """`sys.argv`: the module path, the number of the socket, and the worker's process id."""
    end_with(int(sys.argv[3]))
    with socket.socket(fileno=int(sys.argv[2])) as worker:
        worker.set_inheritable(False)
        sys.argv[1:] = []
        line = Line(worker)
        while (message := _next(worker)) is not None:
            asked = json.loads(message)
            job = decoded_job(asked["job"])
            reporting.reporters[job.claimed_by] = line.report
            line.say(outcome_of_job(line, job, asked))


def outcome_of_job(line: Line, job: ClaimedJob, asked: dict[str, Any]) -> bytes:
    """Run a job; the message that says how it ended."""
    try:
        definition = find(asked)
    except BaseException as error:  # noqa: BLE001 — the application's modules may raise anything
        return outcome_message(job, Failed(describe(error)))
    line.say(message_of(job, STARTED))
    outcome = run(definition, job, asked["memory_limit"])
    try:
        message = outcome_message(job, outcome)
    except Exception as error:  # noqa: BLE001 — what a task gave cannot be said; its worker has to hear of that
        return outcome_message(job, Failed(describe(error)))
    if len(message) > MESSAGE_BYTES_MAX:
        reason = f"the task ran to its end, but its return value is larger than {MESSAGE_BYTES_MAX:,} bytes"
        return outcome_message(job, Discarded(reason, ErrorInfo("InvalidResult", reason)))
    return message


class Line:
    """What this process says to its worker. Whatever a task may have forked stays silent: it would speak for its
    parent."""

    def __init__(self, worker: socket.socket) -> None:
        self._worker = worker
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._report: bytes | None = None  #: the latest one, not sent yet
        self._report_at = 0.0  #: monotonic; the next one is not sent before
        self._reporter: threading.Thread | None = None
        self._has_report = threading.Event()

    def say(self, message: bytes) -> None:
        """Send a message, after what was reported last."""
        if os.getpid() != self._pid:
            os._exit(1)  # a fork that came back from the task
        with self._lock:
            self._send_report()
            self._send(message)

    def report(self, job: ClaimedJob, document: dict[str, Any]) -> None:
        """Send how far a job is: at once, unless that was done just before."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._report = message_of(job, PROGRESS, document)
            if time.monotonic() >= self._report_at:
                self._send_report()
                return
        if self._reporter is None:
            reporter = threading.Thread(target=self._send_reports, name="pgqueue-reports", daemon=True)
            with suppress(RuntimeError, MemoryError):  # no room for it: then with the next report, or the outcome
                reporter.start()
                self._reporter = reporter
        self._has_report.set()

    def _send_reports(self) -> None:
        while True:
            self._has_report.wait()
            self._has_report.clear()
            time.sleep(REPORT_SECONDS)
            with self._lock, suppress(OSError):
                self._send_report()

    def _send_report(self) -> None:
        if self._report is not None:
            message, self._report = self._report, None
            self._report_at = time.monotonic() + REPORT_SECONDS
            self._send(message)

    def _send(self, message: bytes) -> None:
        self._worker.sendall(len(message).to_bytes(LENGTH_BYTES) + message)


def end_with(worker: int) -> None:
    """See to it that this process does not outlive its worker, however that one ends."""
    if IS_LINUX:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(worker,), daemon=True).start()
    if os.getppid() != worker:  # it has ended before
        os._exit(1)


def _watch(worker: int) -> None:
    pause = threading.Event()
    while os.getppid() == worker:
        pause.wait(WATCH_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _next(worker: socket.socket) -> bytes | None:
    """The next message; None when the worker is gone, or wants no more."""

    def read(count: int) -> bytes:
        data = worker.recv(count)
        if not data:
            raise EOFError
        return data

    with suppress(EOFError, ConnectionError):
        return receive(read)
    return None


def find(asked: dict[str, Any]) -> TaskDefinition:
    """The task that was asked for, as it is to be run here: with its worker's database and middleware."""
    found: Any = importlib.import_module(asked["module"])
    for name in asked["qualname"].split("."):
        found = getattr(found, name)
    pgq = found.pgq
    if pgq.schema != asked["schema"]:
        pgq.use_schema(asked["schema"])
    if asked["database"] is not None and asked["database"] != pgq._plain_url:
        pgq.connect_to(asked["database"])
    definition: TaskDefinition = found.definition
    function = definition.function
    if asked["middleware"]:
        function = wrapped(function, middleware_of(pgq, asked), is_async=definition.is_async)
    definition = definition.around(function)
    object.__setattr__(definition, "timeout", None)  # the worker sees to it
    return definition


def middleware_of(pgq: Any, asked: dict[str, Any]) -> list[RunMiddleware]:
    """The run middleware that the worker has, in its order. Raises ConfigurationError when one is not to be had here:
    the task must not run without what, say, keeps tenants apart."""
    chosen: list[RunMiddleware] = []
    for module, name in asked["middleware"]:
        registered = _not_in(chosen, pgq, module, name)
        if registered is None and module not in ("", "__main__"):
            importlib.import_module(module)  # which registers it, as a rule
            registered = _not_in(chosen, pgq, module, name)
        if registered is None:
            raise ConfigurationError(
                f"the process of {asked['qualname']} lacks the run middleware {module}.{name} of its worker; "
                f"register it in a module that {asked['module']} imports"
            )
        chosen.append(registered)
    return chosen


def _not_in(chosen: list[RunMiddleware], pgq: Any, module: str, name: str) -> RunMiddleware | None:
    named = (one for one in pgq._run_middleware if name_of(one) == [module, name])
    return next((one for one in named if all(one is not other for other in chosen)), None)


def run(definition: TaskDefinition, job: ClaimedJob, memory_limit: int | None) -> Outcome:
    try:
        with limited(memory_limit):
            if definition.is_async:
                return asyncio.run(execute_async(definition, job))
            return execute(definition, job)
    except _TooLittle as error:
        return Failed(ErrorInfo("MemoryError", str(error)))
    except BaseException as error:  # noqa: BLE001 — memory may have run out anywhere
        return outcome_of(error, definition.retry)


class _TooLittle(Exception):
    pass


@contextmanager
def limited(memory_limit: int | None) -> Iterator[None]:
    """Within this, the process may have no more address space than so many bytes."""
    if memory_limit is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = address_space()
    if taken is not None and memory_limit <= taken:
        raise _TooLittle(
            f"memory_limit is {memory_limit:,} bytes, but the process has taken {taken:,} before the task begins"
        )
    wanted = memory_limit if hard == resource.RLIM_INFINITY else min(memory_limit, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    except (ValueError, OSError):
        if IS_LINUX:
            raise
        yield  # the worker has warned of it
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def address_space() -> int | None:
    """Bytes of address space that this process has; None where the system does not tell."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
