"""Runs Python programs in forks of one process that has their libraries loaded.

A new interpreter takes most of a second of processor time before pgqueue, SQLAlchemy and Alembic are there. That is
too much where a document names dozens of commands.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

PROGRAMS = ("alembic", "pgqueue", "python")

#: What is loaded before the forks.
LIBRARIES = (
    "aiosqlite",
    "alembic.config",
    "pgqueue.cli",
    "pgqueue.migration",
    "psycopg",
    "pydantic.fields",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.aiosqlite",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "sqlalchemy.ext.asyncio",
)


class Forks:
    """The process that forks. Programs run one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, arguments: Sequence[str], *, cwd: Path, environ: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run `alembic …`, `pgqueue …`, `python FILE …` or `python -m MODULE …` with nothing on its standard input."""
        outputs = [cwd.parent / f"{cwd.name}-{name}.log" for name in ("stdout", "stderr")]
        request = {
            "arguments": list(arguments),
            "cwd": str(cwd),
            "environ": dict(environ),
            "outputs": [str(path) for path in outputs],
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(list(arguments), code, *(path.read_text() for path in outputs))

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(**request)
            return  # and end like any interpreter
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(arguments: list[str], cwd: str, environ: dict[str, str], outputs: list[str]) -> None:
    """Do what a new interpreter with these arguments would."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    program, *sys.argv = arguments
    if program == "python":
        sys.path[0] = cwd
        if sys.argv[0] == "-m":
            _, module, *rest = sys.argv
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return
    sys.argv.insert(0, program)
    del sys.path[0]  # the folder of this file, which a console script does not see
    if program == "pgqueue":
        from pgqueue.cli import main
    else:
        from alembic.config import main
    main()


if __name__ == "__main__":
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # so that the forks do not copy all that when they collect garbage
    serve()
