"""Tasks with isolation="process": a child process for each running attempt, reused for the next.

Each child has a socket of its own, runs one job at a time, and shares nothing with the others: no queue and no lock
that a child could take along when it is killed. It is a new interpreter, not a fork, so it has none of the worker's
connections. It leads a process group of its own, which is killed as a whole. Should the worker die, its children are
ended by the kernel (Linux), or end when they next look at their socket.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pydantic

from pgqueue.errors import ConfigurationError, ProcessDied
from pgqueue.executor import describe, timed_out
from pgqueue.job import Cancelled, ClaimedJob, Completed, Discarded, ErrorInfo, Failed, Outcome, Snoozed
from pgqueue.retry import Retry
from pgqueue.task import TaskDefinition

#: How long a child may take to start and to import the application.
START_SECONDS = 60.0

#: Between two looks whether a child is alive whose socket somebody else, such as a child of its own, may keep open.
LOOK_SECONDS = 0.2

LENGTH_BYTES = 8

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pgqueue.isolated import main; main()"

_jobs = pydantic.TypeAdapter(ClaimedJob)
_outcomes: dict[str, pydantic.TypeAdapter[Any]] = {
    kind.__name__: pydantic.TypeAdapter(kind) for kind in (Completed, Failed, Snoozed, Discarded, Cancelled)
}


@dataclass(frozen=True, slots=True)
class Reference:
    """Where a child finds a task."""

    module: str
    qualname: str


def reference_of(task: object, definition: TaskDefinition) -> Reference:
    """Raises ConfigurationError when a child could not import the task."""
    function = definition.function
    module, qualname = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")

    def refuse(why: str) -> ConfigurationError:
        return ConfigurationError(
            f'task {definition.name!r} has isolation="process", so that its process must be able to import it as '
            f"{module}.{qualname}: {why}"
        )

    if module == "__main__":
        raise refuse("__main__ is another module there; move the task into a module and import that")
    if "<" in qualname:
        raise refuse("it is defined inside of a function; define it at the top of its module")
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    if found is not task:
        raise refuse(
            f"that is not the task; use @pgq.task as a decorator, or assign {qualname} = pgq.task(…)({qualname})"
        )
    return Reference(module, qualname)


class Processes:
    """The children of one worker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._busy: dict[ClaimedJob, _Child] = {}
        self._starter: ThreadPoolExecutor | None = None

    @property
    def busy(self) -> list[ClaimedJob]:
        return list(self._busy)

    def run(self, job: ClaimedJob, definition: TaskDefinition, reference: Reference) -> Outcome:
        """Run one attempt, and wait for its end."""
        try:
            child = self._take()
        except OSError as error:
            return Failed(describe(error))
        with self._lock:
            self._busy[job] = child
        if job.cancel_requested:  # just before it could be stopped
            self.stop(job, Cancelled("it was asked to stop before it was started"))
        try:
            outcome = child.run(job, definition, reference)
        finally:
            with self._lock:
                del self._busy[job]
        info: ErrorInfo | None = getattr(outcome, "error", None)
        if child.is_over or (info is not None and info.type == "MemoryError"):
            child.end()
        else:
            with self._lock:
                self._idle.append(child)
        return outcome

    def stop(self, job: ClaimedJob, outcome: Outcome) -> None:
        """Kill the process that runs this job, if one does; unless it has returned already, it ends in `outcome`."""
        with self._lock:
            child = self._busy.get(job)
            if child is not None:
                child.stopped_as = outcome
                child.kill()

    def close(self) -> None:
        """End the children that have nothing to do. None may be busy."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()
        if self._starter is not None:
            self._starter.shutdown()

    def _take(self) -> _Child:
        """A child that is alive; the one that was used last, so that no more are kept than are needed."""
        while True:
            with self._lock:
                child = self._idle.pop() if self._idle else None
                if self._starter is None:
                    # The kernel ends a child with the thread that started it, so that must not be a slot's.
                    self._starter = ThreadPoolExecutor(1, thread_name_prefix="pgqueue-starter")
                starter = self._starter
            if child is None:
                return starter.submit(_Child).result()
            if not child.has_died():
                return child
            child.end()


class _Gone(Exception):
    """The child died, or was killed."""


class _Late(Exception):
    """The child did not answer in time."""


class _Child:
    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self.is_over = False
        self.stopped_as: Outcome | None = None
        self._lock = threading.Lock()
        self._is_reaped = False
        with theirs:
            try:
                self._process = subprocess.Popen(  # noqa: S603 — this interpreter, and nothing of a job
                    [sys.executable, "-c", _CODE, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except BaseException:
                self._socket.close()
                raise

    def run(self, job: ClaimedJob, definition: TaskDefinition, reference: Reference) -> Outcome:
        message = {
            "module": reference.module,
            "qualname": reference.qualname,
            "memory_limit": definition.memory_limit,
            "job": _jobs.dump_python(job, mode="json"),
        }
        try:
            self._send(json.dumps(message).encode())
            try:
                self._receive(START_SECONDS)
            except _Late:
                self.is_over = True
                problem = f"its process did not start, or not import {reference.module}, within {START_SECONDS:g} s"
                return definition.retry.judge(TimeoutError, ErrorInfo("TimeoutError", problem))
            try:
                return decoded(self._receive(definition.timeout))
            except _Late:
                self.is_over = True
                assert definition.timeout is not None
                return timed_out(definition.retry, definition.timeout)
        except _Gone:
            self.is_over = True
            return self.stopped_as or self._died(definition.retry)
        finally:
            if self.is_over or self.stopped_as is not None:
                self.is_over = True
                self.end()

    def _died(self, policy: Retry) -> Outcome:
        code = self.end()
        if code >= 0:
            how = f"exited with code {code}"
        else:
            how = f"was ended by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (the system does that when memory runs out)"
        info = ErrorInfo("pgqueue.errors.ProcessDied", f"the process of the task {how} before the task returned")
        return policy.judge(ProcessDied, info)

    def has_died(self) -> bool:
        """Whether it is no more; it stays a zombie, so that its number cannot become another process's."""
        if not hasattr(os, "waitid"):
            return False
        return (
            self._is_reaped or os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        )

    def kill(self) -> None:
        """Kill it, and what it has started; may be called from any thread, at any time."""
        with self._lock:
            if not self._is_reaped:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> int:
        """Kill it, and clean up; its exit code."""
        self.is_over = True
        self.kill()
        with self._lock:
            code = self._process.wait()
            self._is_reaped = True
        self._socket.close()
        return code

    def _send(self, message: bytes) -> None:
        self._socket.settimeout(START_SECONDS)
        try:
            self._socket.sendall(len(message).to_bytes(LENGTH_BYTES) + message)
        except OSError as error:
            raise _Gone from error

    def _receive(self, seconds: float | None) -> bytes:
        deadline = None if seconds is None else time.monotonic() + seconds
        return receive(lambda count: self._read(count, deadline))

    def _read(self, count: int, deadline: float | None) -> bytes:
        """Some bytes, at most so many."""
        while True:
            left = LOOK_SECONDS if deadline is None else min(LOOK_SECONDS, deadline - time.monotonic())
            if left <= 0:
                raise _Late
            had_died = self.has_died()
            self._socket.settimeout(0.01 if had_died else left)
            try:
                data = self._socket.recv(count)
            except TimeoutError:
                if had_died:  # and everything that it had sent was read
                    raise _Gone from None
                continue
            except OSError as error:
                raise _Gone from error
            if not data:
                raise _Gone
            return data


# What both sides say ---------------------------------------------------------------------------------------


def receive(read: Callable[[int], bytes]) -> bytes:
    """One message; `read` gives some bytes, at most as many as asked for."""

    def exactly(count: int) -> bytes:
        parts: list[bytes] = []
        while count:
            parts.append(read(count))
            count -= len(parts[-1])
        return b"".join(parts)

    return exactly(int.from_bytes(exactly(LENGTH_BYTES)))


def decoded_job(document: Any) -> ClaimedJob:
    job: ClaimedJob = _jobs.validate_python(document)
    return job


def encoded(outcome: Outcome) -> bytes:
    kind = type(outcome).__name__
    return json.dumps({"kind": kind, "outcome": _outcomes[kind].dump_python(outcome, mode="json")}).encode()


def decoded(message: bytes) -> Outcome:
    document = json.loads(message)
    outcome: Outcome = _outcomes[document["kind"]].validate_python(document["outcome"])
    return outcome
