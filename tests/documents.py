"""Documentation as tests see it: its fenced blocks, its tables, and its commands run as a reader would run them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from forks import PROGRAMS, Forks
from support import PATIENCE_SECONDS, Process, wait_for

from pgqueue import PgQueue, migration

PROJECT = Path(__file__).resolve().parent.parent

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    text: str
    line: int  #: of the document, from 1

    @property
    def file_name(self) -> str | None:
        """The file that a block says it is, in its first line."""
        named = re.match(r"# (\S+\.\w+|Dockerfile)\n", self.text)
        return named[1] if named else None

    @property
    def commands(self) -> list[str]:
        """The lines of a block of shell."""
        return [line for line in self.text.splitlines() if line]


def blocks(document: Path) -> list[Block]:
    text = document.read_text()
    return [Block(found[1], found[2], text.count("\n", 0, found.start()) + 1) for found in _BLOCK.finditer(text)]


def table_below(document: Path, heading: str, *, rows_min: int = 2) -> list[list[str]]:
    """The cells of the first table below a heading of that text, row by row, without its head."""
    _, _, below = document.read_text().partition(f"# {heading}\n")
    lines = iter(below.splitlines())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in _first_table(lines)]
    assert len(rows) >= 2 + rows_min, f"no table below {heading!r}"
    return rows[2:]


def _first_table(lines: Iterator[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        if line.startswith("|"):
            inside = True
            yield line
        elif inside:
            return


def is_simple(command: str) -> bool:
    """Whether the command is one Python program that needs no shell."""
    _, words = without_assignments(command)
    return words[0] in PROGRAMS and words[1] != "-c" and not {"|", "||", "&&", ">"} & set(words)


def without_assignments(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables that are set in front of a command, and its words. `pytest` is a module of Python."""
    words = shlex.split(command, comments=True)
    variables = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return variables, ["python", "-m", *words] if words[0] == "pytest" else words


class Reader:
    """Somebody who types the commands of a document into a shell, in one folder, on one database."""

    def __init__(self, folder: Path, url: str, forks: Forks) -> None:
        self.folder = folder
        self.url = url
        self._forks = forks
        scripts = os.path.dirname(sys.executable)
        self.environ = {
            **{name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "PGQUEUE_APP")},
            "PGQUEUE_DATABASE_URL": url,
            "PATH": os.pathsep.join((scripts, os.environ.get("PATH", os.defpath))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_ADDOPTS": "-p no:schemathesis -p no:cacheprovider -W error",
        }

    def run(self, command: str) -> str:
        """What the command prints. Fails unless it succeeds; a worker without --drain is stopped when all is done."""
        if command.startswith("pgqueue worker") and "--drain" not in command:
            return self._run_until_idle(command)
        done = self._run_simple(command) if is_simple(command) else self._run_in_shell(command)
        assert done.returncode == 0, f"{command}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _run_simple(self, command: str) -> subprocess.CompletedProcess[str]:
        variables, words = without_assignments(command)
        return self._forks.run(words, cwd=self.folder, environ={**self.environ, **variables})

    def _run_in_shell(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euc", command],
            cwd=self.folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    def _run_until_idle(self, command: str) -> str:
        worker = Process(shlex.split(command), cwd=self.folder, **self.environ)
        try:
            wait_for(lambda: self._is_idle(worker), f"the jobs of: {command}")
            worker.signal(signal.SIGTERM)
            code = worker.wait()
            assert code == 0, f"{command}\nexit code {code}\n{worker.output()}"
            return worker.output()
        finally:
            worker.close()

    def _is_idle(self, worker: Process) -> bool:
        assert worker.process.poll() is None, f"the worker ended by itself:\n{worker.output()}"
        pgq = PgQueue(self.url)
        try:
            return all(queue.ready == 0 and queue.running == 0 for queue in pgq.queues())
        finally:
            pgq.dispose()


#: Files of other programs, which a story only writes.
FILES = ("dockerfile", "ini", "toml")

#: Files of Python that are not programs.
NOT_PROGRAMS = ("env.py", "conftest.py")


class Story:
    """A page that is read from top to bottom: its files are written, its programs and commands are run, and its SQL, in
    one folder on one database."""

    def __init__(self, page: Path, reader: Reader, *, not_run: Container[str] = ()) -> None:
        self.page = page
        self._reader = reader
        self._not_run = not_run
        self._blocks = blocks(page)
        self._printed = ""
        self._dialect = sa.make_url(reader.url).get_backend_name()

    def tell(self) -> None:
        for block in self._blocks:
            match block.language:
                case "python":
                    self._write(block)
                    if self._is_program(block):
                        self._printed = self._reader.run(f"python {block.file_name}")
                case "sh":
                    self._printed = "".join(
                        self._reader.run(self._here(command))
                        for command in block.commands
                        if command not in self._not_run
                    )
                case "text":
                    missing = [line for line in block.text.splitlines() if line not in self._printed]
                    assert not missing, f"{self._where(block)}: {missing} is not in what is printed:\n{self._printed}"
                case "sql":
                    self._run_sql(block)
                case language:
                    assert language in FILES, f"{self._where(block)}: nothing is known of {language}"
                    self._write(block)

    def _here(self, command: str) -> str:
        """The command with the URLs of the page's roles, who are on this database."""
        here = sa.make_url(self._reader.url)
        return re.sub(
            r"postgresql://(\w+)@localhost/shop",
            lambda url: here.set(username=url[1]).render_as_string(hide_password=False),
            command,
        )

    def _write(self, block: Block) -> None:
        assert block.file_name is not None, f"{self._where(block)}: the first line must name the file"
        # As an installed wheel has it; a checkout has the migrations at its top.
        text = block.text.replace("pgqueue:migrations/", f"{migration.migrations_path()}/")
        (self._reader.folder / block.file_name).write_text(text)

    def _is_program(self, block: Block) -> bool:
        """Whether nobody else runs it: no command, no other file that imports it, and not pytest."""
        assert block.file_name is not None
        name = block.file_name.rpartition("/")[2]
        if name in NOT_PROGRAMS or name.startswith("test_"):
            return False
        commands = [command for other in self._blocks if other.language == "sh" for command in other.commands]
        imports = re.compile(rf"^(from|import) {name.removesuffix('.py')}\b", re.MULTILINE)
        return not any(f"python {block.file_name}" in command for command in commands) and not any(
            imports.search(other.text) for other in self._blocks if other.language == "python"
        )

    def _run_sql(self, block: Block) -> None:
        text = block.text
        other = {"postgresql": "-- SQLite", "sqlite": "-- PostgreSQL"}[self._dialect]
        if text.startswith(other):
            return
        if self._dialect == "sqlite":
            text = text.replace("pgqueue.", "pgqueue_")
        pgq = PgQueue(self._reader.url)
        try:
            with pgq.engine.begin() as connection:
                for statement in text.split(";\n"):
                    if statement.strip():
                        connection.exec_driver_sql(statement.replace("%", "%%"))
        except sa.exc.DBAPIError as error:
            raise AssertionError(f"{self._where(block)}: {error.orig}") from None
        finally:
            pgq.dispose()

    def _where(self, block: Block) -> str:
        return f"{self.page.name}:{block.line}"
