"""Tasks with isolation="process": a child process for each running attempt, reused for the next.

Each child has a socket of its own, runs one job at a time, and shares nothing with the others: no queue and no lock
that a child could take along when it is killed. It is a new interpreter, not a fork, so it has none of the worker's
connections. It leads a session and process group of its own: no signal of a terminal reaches it, and it is killed as a
whole. Should the worker die, its children are ended by the kernel (Linux), or end when they next look.

Nothing that a child says is trusted further than its own job. Each message names the claim it is about, so that what an
earlier job has left behind in the same process, a thread or a fork, cannot speak for a later one.
"""

from __future__ import annotations

import json
import logging
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
from dataclasses import dataclass, field
from typing import Any

import pydantic

from pgqueue import reporting
from pgqueue.errors import ConfigurationError, ProcessDied
from pgqueue.executor import describe, timed_out
from pgqueue.job import Cancelled, ClaimedJob, Completed, Discarded, ErrorInfo, Failed, Outcome, Released, Snoozed
from pgqueue.retry import Retry
from pgqueue.task import TaskDefinition

logger = logging.getLogger(__name__)

#: Where children can be started, and where the system keeps them within a memory limit.
IS_POSIX, IS_LINUX = os.name == "posix", sys.platform == "linux"

#: How long a child may take to start and to import the application.
START_SECONDS = 60.0

#: Between two looks whether a child is alive whose socket somebody else, such as a child of its own, may keep open.
LOOK_SECONDS = 0.2

#: How long a child that has hung up may take to end.
EXIT_SECONDS = 1.0

LENGTH_BYTES = 8

#: No message is longer: PostgreSQL stores no larger document. The worker's memory is not the child's to fill.
MESSAGE_BYTES_MAX = 256 * 1024 * 1024

#: Read from a socket at once, at most.
READ_BYTES = 1024 * 1024

#: What a child says before the outcome of a job: that its function is about to run, and how far it is.
STARTED, PROGRESS = "Started", "Progress"

#: A service manager may signal all processes of a service at once. How a task ends then is for its worker to decide.
#: (Handlers, because what is ignored would be ignored by the task's own processes, too.)
_CODE = """
import signal
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from pgqueue.isolated import main
main()
"""

_jobs = pydantic.TypeAdapter(ClaimedJob)
_outcomes: dict[str, pydantic.TypeAdapter[Any]] = {
    kind.__name__: pydantic.TypeAdapter(kind) for kind in (Completed, Failed, Snoozed, Discarded, Cancelled)
}


@dataclass(frozen=True, slots=True)
class Reference:
    """Where a child finds a task."""

    module: str
    qualname: str
    pgq: Any = field(repr=False)  #: the queue as this worker has it, whatever the child's modules say

    def to_json(self) -> dict[str, Any]:
        """With the database's password: it goes over the child's socket, and nowhere else."""
        return {
            "module": self.module,
            "qualname": self.qualname,
            "database": self.pgq._plain_url,
            "schema": self.pgq.schema,
            "middleware": [name_of(middleware) for middleware in self.pgq._run_middleware],
        }


def name_of(function: Any) -> list[str]:
    """Its module and its name in there."""
    return [getattr(function, "__module__", None) or "", getattr(function, "__qualname__", type(function).__qualname__)]


def reference_of(task: Any, definition: TaskDefinition) -> Reference:
    """Raises ConfigurationError when a child could not import the task."""
    function = definition.function
    module, qualname = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")

    def refuse(why: str) -> ConfigurationError:
        return ConfigurationError(
            f'task {definition.name!r} has isolation="process", so that its process must be able to import it as '
            f"{module}.{qualname}: {why}"
        )

    if not IS_POSIX:
        raise ConfigurationError(
            f'task {definition.name!r} has isolation="process", which needs Linux or another POSIX system; '
            f"this is {sys.platform}"
        )
    if definition.memory_limit is not None and not IS_LINUX:
        logger.warning("the memory_limit of task %s may not be kept: %s is not Linux", definition.name, sys.platform)
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
    return Reference(module, qualname, found.pgq)


@dataclass(slots=True, eq=False)
class _Run:
    """An attempt that this worker runs in a child."""

    child: _Child | None = None  #: None: it is being started
    stopped_as: Outcome | None = None  #: how it ends, whatever its process says from then on


class Processes:
    """The children of one worker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._runs: dict[ClaimedJob, _Run] = {}
        self._starter: ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def busy(self) -> list[ClaimedJob]:
        return list(self._runs)

    def run(self, job: ClaimedJob, definition: TaskDefinition, reference: Reference) -> Outcome:
        """Run one attempt, and wait for its end. Never raises."""
        run = _Run()
        with self._lock:
            self._runs[job] = run
        if job.cancel_requested:  # just before it could be stopped
            self.stop(job, Cancelled("it was asked to stop before it was started"))
        try:
            outcome: Outcome | None = None
            while outcome is None:
                outcome = self._run(run, job, definition, reference)
            return outcome
        except Exception as error:  # noqa: BLE001 — it could not be started; whatever it is, the slot goes on
            return run.stopped_as or Failed(describe(error))
        finally:
            with self._lock:
                del self._runs[job]

    def stop(self, job: ClaimedJob, outcome: Outcome) -> None:
        """Kill the process that runs this job, if one does; unless it has returned already, it ends in `outcome`."""
        with self._lock:
            run = self._runs.get(job)
            if run is not None:
                run.stopped_as = outcome
                if run.child is not None:
                    run.child.kill()

    def close(self) -> None:
        """End the children that have nothing to do, and start no more. None should be busy."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()
        if self._starter is not None:
            self._starter.shutdown()

    def _run(self, run: _Run, job: ClaimedJob, definition: TaskDefinition, reference: Reference) -> Outcome | None:
        """None when the child that was to run it had died of what ran in it before: then another one shall."""
        child, is_fresh = self._take()
        with self._lock:
            stopped_as = Released("the worker stopped before it started the job") if self._closed else run.stopped_as
            if stopped_as is None:
                run.child = child
        if stopped_as is not None:
            child.end()
            return stopped_as
        try:
            outcome = child.run(run, job, definition, reference)
        except BaseException:
            child.end()
            raise
        info: ErrorInfo | None = getattr(outcome, "error", None)
        with self._lock:
            run.child = None  # what stops this job from now on must not end the child of another
            is_good = not (child.is_over or run.stopped_as or self._closed)
            is_good = is_good and not (info is not None and info.type == "MemoryError")
            if is_good:
                self._idle.append(child)
        if not is_good:
            child.end()
        is_its_own = child.has_begun or is_fresh or not child.is_over
        return outcome if is_its_own else run.stopped_as

    def _take(self) -> tuple[_Child, bool]:
        """A child that is alive, and whether it is a new one; that which was used last, so that no more are kept than
        are needed."""
        while True:
            with self._lock:
                child = self._idle.pop() if self._idle else None
                if self._starter is None:
                    # The kernel ends a child with the thread that started it, so that must not be a slot's.
                    self._starter = ThreadPoolExecutor(1, thread_name_prefix="pgqueue-starter")
                starter = self._starter
            if child is None:
                return starter.submit(_Child).result(), True
            if not child.has_died():
                return child, False
            child.end()


class _Gone(Exception):
    """The child died, was killed, or has hung up."""


class _Late(Exception):
    """The child did not answer in time."""


class _Rubbish(Exception):
    """The child said what cannot be."""


class _Child:
    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self.is_over = False
        self.has_begun = False  #: to run the present job
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

    def run(self, run: _Run, job: ClaimedJob, definition: TaskDefinition, reference: Reference) -> Outcome:
        self.has_begun = False
        message = {
            **reference.to_json(),
            "memory_limit": definition.memory_limit,
            "job": _jobs.dump_python(job, mode="json"),
        }
        try:
            self._send(json.dumps(message).encode())
            return self._outcome(job, definition, reference)
        except _Gone:
            self.is_over = True
            return run.stopped_as or self._died(definition.retry)
        except _Rubbish as error:
            self.is_over = True
            logger.error("the process of task %s, job %d, was killed: %s", job.task, job.id, error)
            return run.stopped_as or _as_died(definition.retry, f"was killed by its worker: {error}")

    def _outcome(self, job: ClaimedJob, definition: TaskDefinition, reference: Reference) -> Outcome:
        deadline: float | None = time.monotonic() + START_SECONDS
        while True:
            try:
                kind, content = self._hear(job, deadline)
            except _Late:
                self.is_over = True
                if self.has_begun:
                    assert definition.timeout is not None
                    return timed_out(definition.retry, definition.timeout)
                problem = f"its process did not start, or not import {reference.module}, within {START_SECONDS:g} s"
                return definition.retry.judge(TimeoutError, ErrorInfo("TimeoutError", problem))
            if kind == STARTED and not self.has_begun:
                self.has_begun = True
                deadline = None if definition.timeout is None else time.monotonic() + definition.timeout
            elif kind == PROGRESS:
                _report(job, content)
            else:
                return decoded(kind, content)

    def _hear(self, job: ClaimedJob, deadline: float | None) -> tuple[str, Any]:
        """What the child says next of this job."""
        while True:
            claim, kind, content = opened(receive(lambda count: self._read(count, deadline)))
            if claim == str(job.claim_token):
                return kind, content

    def _died(self, policy: Retry) -> Outcome:
        give_up_at = time.monotonic() + EXIT_SECONDS
        while not (has_died := self.has_died()) and time.monotonic() < give_up_at:
            time.sleep(0.005)
        code = self.end()
        if not has_died:
            return _as_died(policy, "hung up on its worker, which killed it,")
        if code >= 0:
            return _as_died(policy, f"exited with code {code}")
        how = f"was ended by {_name_of(-code)}"
        if -code == signal.SIGKILL:
            how += " (the system does that when memory runs out)"
        return _as_died(policy, how)

    def has_died(self) -> bool:
        """Whether it is no more. It stays a zombie, so that its number cannot become another process's."""
        if self._is_reaped:
            return True
        if hasattr(os, "waitid"):
            try:
                return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            except ChildProcessError:  # the application has the system reap its children (SIGCHLD ignored)
                self._is_reaped = True
                return True
        with self._lock:  # on some systems one cannot look without reaping
            if self._process.poll() is not None:
                self._is_reaped = True
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        return self._is_reaped

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
        if hasattr(os, "waitid") and not self._is_reaped:
            # Without the lock, which `kill` needs, and without reaping it: what is stuck in the kernel dies later.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            code = self._process.wait()
            self._is_reaped = True
        self._socket.close()
        return code

    def _send(self, message: bytes) -> None:
        try:
            self._socket.settimeout(START_SECONDS)
            self._socket.sendall(len(message).to_bytes(LENGTH_BYTES) + message)
        except OSError as error:
            raise _Gone from error

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


def _name_of(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"  # a real-time one


def _as_died(policy: Retry, how: str) -> Outcome:
    info = ErrorInfo("pgqueue.errors.ProcessDied", f"the process of the task {how} before the task returned")
    return policy.judge(ProcessDied, info)


def _report(job: ClaimedJob, content: Any) -> None:
    try:
        reporting.report(job, content["done"], content["total"], content["note"])
    except (ConfigurationError, LookupError, TypeError) as error:
        raise _Rubbish("it reported progress that cannot be read") from error


# What both sides say ---------------------------------------------------------------------------------------


def receive(read: Callable[[int], bytes]) -> bytes:
    """One message; `read` gives some bytes, at most as many as asked for."""

    def exactly(count: int) -> bytes:
        parts: list[bytes] = []
        while count:
            parts.append(read(min(count, READ_BYTES)))
            count -= len(parts[-1])
        return b"".join(parts)

    length = int.from_bytes(exactly(LENGTH_BYTES))
    if length > MESSAGE_BYTES_MAX:
        raise _Rubbish(f"it announced a message of {length:,} bytes, and {MESSAGE_BYTES_MAX:,} are the most")
    return exactly(length)


def decoded_job(document: Any) -> ClaimedJob:
    job: ClaimedJob = _jobs.validate_python(document)
    return job


def message_of(job: ClaimedJob, kind: str, content: Any = None) -> bytes:
    """What a child says of a job."""
    return json.dumps([str(job.claim_token), kind, content]).encode()


def outcome_message(job: ClaimedJob, outcome: Outcome) -> bytes:
    kind = type(outcome).__name__
    return message_of(job, kind, _outcomes[kind].dump_python(outcome, mode="json"))


def opened(message: bytes) -> tuple[str, str, Any]:
    """The claim, the kind and the content of what a child says."""
    try:
        claim, kind, content = json.loads(message)
    except (ValueError, TypeError, RecursionError) as error:
        raise _Rubbish("it sent what is no message") from error
    return claim, kind, content


def decoded(kind: object, content: Any) -> Outcome:
    adapter = _outcomes.get(kind) if isinstance(kind, str) else None
    if adapter is None:
        raise _Rubbish("it sent an outcome that there is not")
    try:
        outcome: Outcome = adapter.validate_python(content)
    except ValueError as error:
        raise _Rubbish("it sent an outcome that cannot be read") from error
    return outcome
