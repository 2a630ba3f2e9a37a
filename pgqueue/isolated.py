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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pgqueue.executor import describe, execute, execute_async, outcome_of
from pgqueue.isolation import LENGTH_BYTES, decoded_job, encoded, receive
from pgqueue.job import ClaimedJob, ErrorInfo, Failed, Outcome
from pgqueue.middleware import wrapped
from pgqueue.task import TaskDefinition

PR_SET_PDEATHSIG = 1


def main() -> None:
    """`sys.argv`: the module path, the number of the socket, and the worker's process id."""
    end_with(int(sys.argv[3]))
    with socket.socket(fileno=int(sys.argv[2])) as worker:
        worker.set_inheritable(False)
        sys.argv[1:] = []
        while (message := _next(worker)) is not None:
            asked = json.loads(message)
            job = decoded_job(asked["job"])
            try:
                definition = find(asked["module"], asked["qualname"])
            except BaseException as error:  # noqa: BLE001 — the application's modules may raise anything
                _send(worker, b"")
                _send(worker, encoded(Failed(describe(error))))
                continue
            _send(worker, b"")  # started
            _send(worker, encoded(run(definition, job, asked["memory_limit"])))


def end_with(worker: int) -> None:
    """See to it that this process does not outlive its worker, however that one ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(worker,), daemon=True).start()
    if os.getppid() != worker:  # it has ended before
        os._exit(1)


def _watch(worker: int) -> None:
    pause = threading.Event()
    while os.getppid() == worker:
        pause.wait(1.0)
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


def _send(worker: socket.socket, message: bytes) -> None:
    worker.sendall(len(message).to_bytes(LENGTH_BYTES) + message)


def find(module: str, qualname: str) -> TaskDefinition:
    """The task that a module has under this name, as it is to be run here."""
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    definition: TaskDefinition = found.definition
    middleware = found.pgq._run_middleware
    function = definition.function
    if middleware:
        function = wrapped(function, middleware, is_async=definition.is_async)
    definition = definition.around(function)
    object.__setattr__(definition, "timeout", None)  # the worker sees to it
    return definition


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
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
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
