"""What several tests need: waiting for a condition, processes that are workers, users' sessions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import forks
import sqlalchemy as sa
from forks import Fork

from pgqueue.engine import reading

T = TypeVar("T")

#: Long enough for a busy machine; a test that waits this long has failed.
PATIENCE_SECONDS = 60.0


def wait_for(condition: Callable[[], T], what: str, *, timeout: float = PATIENCE_SECONDS, every: float = 0.01) -> T:
    """Call `condition` until it is true, and return what it returned. Fails naming `what` it waited for."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:g} s in vain for {what}")
        time.sleep(every)


def scalar(engine: sa.Engine, sql: str, **parameters: Any) -> Any:
    """The first value of a query."""
    with reading(engine) as connection:
        return connection.execute(sa.text(sql), parameters).scalar()


def rows(engine: sa.Engine, sql: str, **parameters: Any) -> list[Any]:
    """All rows of a query."""
    with reading(engine) as connection:
        return list(connection.execute(sa.text(sql), parameters).all())


def execute(engine: sa.Engine, sql: str, **parameters: Any) -> int:
    """Run a statement and commit; how many rows it touched."""
    with engine.begin() as connection:
        return connection.execute(sa.text(sql), parameters).rowcount


class Process:
    """A process whose output can be read while it runs: a fork where it can be one, otherwise a new interpreter."""

    def __init__(self, arguments: Sequence[str], *, cwd: Path, **environ: str) -> None:
        self.log = cwd / f"process-{time.monotonic_ns()}.log"
        self.log.touch()
        command = ["python" if word == sys.executable else word for word in arguments]
        environ = {**os.environ, "PYTHONUNBUFFERED": "1", **environ}
        self.process: Fork | subprocess.Popen[bytes]
        if forks.can_run(command):
            self.process = forks.shared().start(command, cwd=cwd, environ=environ, outputs=[self.log, self.log])
            return
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                list(arguments),
                cwd=cwd,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:g} s:\n{self.output()}") from None

    def close(self) -> None:
        """End the process and its children, however they are."""
        for number in (signal.SIGCONT, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        self.process.wait()


@contextmanager
def python(code_file: Path, *arguments: str, **environ: str) -> Iterator[Process]:
    """A Python script as a process of its own."""
    process = Process([sys.executable, str(code_file), *arguments], cwd=code_file.parent, **environ)
    try:
        yield process
    finally:
        process.close()
