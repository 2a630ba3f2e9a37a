"""Help, version, completion, and what a mistake on the command line looks like."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from command import Command, finished

from pgqueue import cli, errors
from pgqueue.cli import program

pgqueue = Command()


def walk(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, *path, name)


COMMANDS = dict(walk(typer.main.get_command(cli.app)))


def words(text: str) -> str:
    """Text without the frames, line breaks and colours of a help page."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


def test_the_commands_are_those_of_the_specification() -> None:
    assert {" ".join(path) for path in COMMANDS if path} == {
        "worker",
        "serve",
        "enqueue",
        *("jobs", "jobs list", "jobs show", "jobs wait", "jobs replay", "jobs edit", "jobs cancel", "jobs delete"),
        *("jobs export", "jobs purge"),
        *("queues", "queues list", "queues pause", "queues resume"),
        *("schedules", "schedules list", "schedules show", "schedules add"),
        *("schedules enable", "schedules disable", "schedules run", "schedules delete"),
        *("limits", "limits list", "limits set", "limits reset"),
        "stats",
        "prune",
        "config",
        *("db", "db upgrade", "db downgrade", "db current", "db check", "db sql", "db path"),
        "bench",
        "demo",
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_explains_every_option(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]

    page = words(pgqueue(*path, "--help").stdout)

    assert command.help
    assert command.help.split("\n")[0] in page
    for parameter in command.params:
        explanation = getattr(parameter, "help", None)
        assert explanation, f"{parameter.name} has no help"
        assert " ".join(explanation.split()) in page
    if not hasattr(command, "commands"):
        for option in ("--database-url", "--schema", "--app", "--output", "--log-level", "--quiet", "--no-color"):
            assert option in page


def test_help_of_the_program_states_where_the_database_comes_from_and_every_exit_code() -> None:
    page = words(pgqueue("--help").stdout)

    places = ["--database-url", "the app (--app)", "PGQUEUE_DATABASE_URL", "DATABASE_URL", "pgqueue.toml", "pgqueue.db"]
    positions = [page.index(f"{number}. ") for number in range(1, 7)]
    assert positions == sorted(positions)
    for number, place in enumerate(places, start=1):
        assert place in page[positions[number - 1] :].split(f"{number + 1}. ")[0]
    for code in (0, 1, 2, 3, 4, 5, 6, 8, 130, 143):
        assert re.search(rf"\b{code}\b", page[page.index("Exit codes") :])


def test_help_of_the_worker_documents_its_signals() -> None:
    page = words(pgqueue("worker", "--help").stdout)

    assert "SIGTERM, SIGINT the first: claim nothing more, let running jobs end" in page
    assert "the second: give all back and exit at once, 143 or 130" in page


@pytest.mark.parametrize("path", [path for path in COMMANDS if hasattr(COMMANDS[path], "commands")], ids=" ".join)
def test_a_group_without_a_command_shows_its_help_and_exits_2(path: tuple[str, ...]) -> None:
    result = pgqueue(*path, code=2)

    assert "Commands" in result.stdout + result.stderr


def test_version_is_that_of_the_package() -> None:
    assert pgqueue("--version").stdout == f"pgqueue {program.VERSION}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["jobs", "list", "--frob"], "No such option: --frob"),
        (["jobs", "show", "x"], "Invalid value for 'ID'"),
        (["jobs", "show", "0"], "Invalid value for 'ID'"),
        (["jobs", "show", str(2**63)], "Invalid value for 'ID'"),
        (["jobs", "list", "--status", "odd"], "Invalid value for '--status'"),
        (["-o", "xml", "stats"], "Invalid value for '--output'"),
        (["enqueue", "t", "--in", "soon"], "such as 30s, 5m, 1h30m or 7d, got 'soon'"),
        (["enqueue", "t", "--in", "-5m"], "such as 30s, 5m, 1h30m or 7d, got '-5m'"),
        (["enqueue", "t", "--at", "noon"], "expected ISO 8601 with a time zone"),
        (["prune"], "Missing option '--older-than'"),
        (["prune", "--older-than", "7"], "with a unit"),
    ],
)
def test_a_mistake_in_the_arguments_is_explained_on_stderr_and_exits_2(arguments: list[str], message: str) -> None:
    result = pgqueue(*arguments, code=2)

    assert result.stdout == ""
    assert message in result.stderr
    assert "--help" in result.stderr


def test_every_error_of_pgqueue_has_an_exit_code_that_the_help_names() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PgqueueError)]

    codes = {kind.__name__: program.exit_code(kind("")) for kind in kinds}

    assert codes == {
        "PgqueueError": 1,
        "NotAwaited": 1,
        "ResultTimeout": 1,
        "JobFailed": 1,
        "JobCancelled": 1,
        "ProcessDied": 1,
        "ConfigurationError": 2,
        "InvalidTask": 2,
        "InvalidPayload": 2,
        "WrongSession": 2,
        "TaskNotFound": 3,
        "JobNotFound": 3,
        "ScheduleNotFound": 3,
        "DuplicateJob": 4,
        "IllegalTransition": 4,
        "ClaimLost": 4,
        "QueueFull": 4,
        "DatabaseUnreachable": 5,
        "SchemaMissing": 6,
        "SchemaOutdated": 6,
    }


def test_an_unexpected_error_exits_1_and_names_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("postgresql://ada:secret@db/shop")

    monkeypatch.setattr("pgqueue.migration.migrations_path", broken)

    result = pgqueue("db", "path", code=1)

    assert "error: unexpected ZeroDivisionError" in result.stderr
    assert "in broken" in result.stderr
    assert "secret" not in result.stderr


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pgqueue.migration.migrations_path", interrupted)

    pgqueue("db", "path", code=130)


def test_completion_installs_and_completes(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}

    installed = finished("--install-completion", "bash", cwd=tmp_path, **home)
    completed = finished(
        cwd=tmp_path,
        _PGQUEUE_COMPLETE="complete_bash",
        COMP_WORDS="pgqueue jo",
        COMP_CWORD="1",
        **home,
    )

    assert installed.returncode == 0, installed.stderr
    script = next(tmp_path.rglob("pgqueue.sh")).read_text()
    assert "_PGQUEUE_COMPLETE=complete_bash" in script
    assert completed.stdout.split() == ["jobs"]


def test_the_console_script_and_the_module_are_the_same_program(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "pgqueue"

    by_script = subprocess.run([script, "--version"], capture_output=True, text=True, env=os.environ, check=True)
    by_module = finished("--version", cwd=tmp_path)

    assert by_script.stdout == by_module.stdout == f"pgqueue {program.VERSION}\n"
