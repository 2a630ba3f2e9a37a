"""The command line, for tests: run inside of the test, or as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import Process
from typer.testing import CliRunner

from pgqueue import cli

#: Variables that the command line reads: a test says what is in them.
VARIABLES = ("PGQUEUE_DATABASE_URL", "DATABASE_URL", "PGQUEUE_APP", "PGQUEUE_SCHEMA")


class Command:
    """`pgqueue` with a database named by PGQUEUE_DATABASE_URL, or with none."""

    def __init__(self, url: str | None = None, **environ: str) -> None:
        self.environ: dict[str, str | None] = {**dict.fromkeys(VARIABLES), "PGQUEUE_DATABASE_URL": url, **environ}

    def __call__(self, *arguments: object, code: int = 0, input: str | bytes | None = None) -> Any:
        """Run it in this process and check the exit code. The result has `stdout` and `stderr`."""
        result = CliRunner().invoke(cli.app, [str(part) for part in arguments], env=self.environ, input=input)
        assert result.exit_code == code, f"exit code {result.exit_code}\n{result.stdout}\n{result.stderr}"
        return result

    def json(self, *arguments: object, code: int = 0) -> Any:
        """Run it with `-o json`; what it printed, decoded."""
        return json.loads(self(*arguments, "-o", "json", code=code).stdout)


def write_application(folder: Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the working directory of the test, imported afresh and forgotten when the test is over."""
    (folder / f"{name}.py").write_text(code)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, name, sys)  # so that it will be taken out again
    del sys.modules[name]


def environment(url: str | None, more: dict[str, str]) -> dict[str, str]:
    """What a process of the command line finds in its environment, beside that of the tests."""
    return {**dict.fromkeys(VARIABLES, ""), "PGQUEUE_DATABASE_URL": url or "", "COLUMNS": "200", **more}


def finished(*arguments: object, cwd: Path, url: str | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """`pgqueue` as a process of a new interpreter, when it has ended."""
    return subprocess.run(
        program(*arguments),
        cwd=cwd,
        env={**os.environ, **environment(url, environ)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@contextmanager
def running(*arguments: object, cwd: Path, url: str | None = None, **environ: str) -> Iterator[Process]:
    """`pgqueue` as a process that runs meanwhile."""
    process = Process(program(*arguments), cwd=cwd, **environment(url, environ))
    try:
        yield process
    finally:
        process.close()


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pgqueue", *(str(part) for part in arguments)]
