"""Runs Python programs in forks of one process that has their libraries loaded.

A new interpreter takes most of a second of processor time before pgqueue, SQLAlchemy and Alembic are there. That is
too much where tests start hundreds of programs.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("alembic", "pgqueue", "python")

#: What is loaded before the forks.
LIBRARIES = (
    "aiosqlite",
    "alembic.autogenerate",
    "alembic.command",
    "alembic.config",
    "alembic.script",
    "pgqueue.cli",
    "pgqueue.migration",
    "pgqueue.serving",
    "psycopg",
    "pydantic.fields",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.aiosqlite",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "sqlalchemy.ext.asyncio",
    "uvicorn",
)

POLL_SECONDS = 0.005


class Forks:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._asking = threading.Lock()

    def run(
        self, arguments: Sequence[str], *, cwd: Path, environ: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run `alembic …`, `pgqueue …`, `python FILE …` or `python -m MODULE …` with nothing on its standard input."""
        outputs = [cwd.parent / f"{cwd.name}-{name}.log" for name in ("stdout", "stderr")]
        for path in outputs:
            path.unlink(missing_ok=True)
        code = self.start(arguments, cwd=cwd, environ=environ, outputs=outputs).wait()
        return subprocess.CompletedProcess(list(arguments), code, *(path.read_text() for path in outputs))

    def start(
        self, arguments: Sequence[str], *, cwd: Path, environ: Mapping[str, str], outputs: Sequence[Path]
    ) -> Fork:
        """The same, at work meanwhile, in a session of its own. What it prints goes to the end of these two files."""
        request = {
            "arguments": list(arguments),
            "cwd": str(cwd),
            "environ": dict(environ),
            "outputs": [str(path) for path in outputs],
        }
        return Fork(self, self.ask("start", request))

    def ask(self, do: str, what: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            self._process.stdin.write(json.dumps({"do": do, "what": what}) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """What still runs is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Fork:
    """One program, with what tests use of `subprocess.Popen`."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._forks = forks

    def poll(self) -> int | None:
        """The exit code, once it has ended; negative is the number of the signal that ended it."""
        if self.returncode is None:
            self.returncode = self._forks.ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                assert timeout is not None
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(POLL_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@cache
def shared() -> Forks:
    """Those of this process of the tests; `close_shared` ends them."""
    return Forks()


def close_shared() -> None:
    if shared.cache_info().currsize:
        shared().close()
        shared.cache_clear()


def can_run(arguments: Sequence[str]) -> bool:
    """Whether a fork can do what this command says."""
    program, *rest = arguments
    return program in PROGRAMS and (program != "python" or rest[0] in ("-m", "-W") or rest[0].endswith(".py"))


# In the process that forks -----------------------------------------------------------------------------------


def serve() -> None:
    """Answers each line of JSON on standard input with one on standard output."""
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        what = request["what"]
        if request["do"] == "start":
            pid = os.fork()
            if pid == 0:
                become(**what)
                return  # and end like any interpreter
            running.add(pid)
            answer: int | None = pid
        else:
            found, status = os.waitpid(what, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
            running.difference_update({found})
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def become(arguments: list[str], cwd: str, environ: dict[str, str], outputs: list[str]) -> None:
    """Do what a new interpreter with these arguments would."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 — what was read ahead is not for this process
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    if environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    program, *sys.argv = arguments
    search = [folder for folder in environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = [folder for folder in search if folder not in sys.path[1:]]
    if program == "python":
        run_python()
    elif program == "pgqueue":
        sys.argv.insert(0, program)
        from pgqueue.cli import main

        main()
    else:
        sys.argv.insert(0, program)
        from alembic.config import main

        main()


def run_python() -> None:
    if sys.argv[0] == "-W":
        warnings.simplefilter(sys.argv[1])  # type: ignore[arg-type]
        del sys.argv[:2]
    if sys.argv[0] == "-m":
        _, module, *rest = sys.argv
        sys.argv = [module, *rest]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # so that the forks do not copy all that when they collect garbage
    serve()
