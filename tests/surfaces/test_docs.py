"""Every page of docs/ is known here: what can be run on it is run, and what it says of the code is so."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main
from documents import PROJECT, Reader, Story, blocks, table_below
from forks import Forks

import pgqueue
from pgqueue import cli, testing
from pgqueue.config import parse_duration

DOCS = PROJECT / "docs"

#: Pages that are followed from top to bottom, and on which databases, empty at the start.
STORIES = {
    "migrations.md": ("postgresql", "sqlite"),
    "pgbouncer.md": ("postgresql",),
    "sqlite.md": ("sqlite",),
    "transactions.md": ("postgresql", "sqlite"),
    "upgrading.md": ("postgresql",),
    "tutorial.md": ("postgresql",),
}

#: Pages with tests of their own.
OWN_TESTS = {
    "attempts.md": "test_docs_attempts.py",
    "auditing.md": "test_docs_auditing.py",
    "dead-letter.md": "test_docs_dead_letter.py",
    "events.md": "test_docs_events.py",
    "http.md": "test_http_example.py",
    "limits.md": "test_docs_limits.py",
    "performance.md": "test_benchmarks.py",
    "results.md": "test_docs_results.py",
    "schedules.md": "test_docs_schedules.py",
    "seeds.md": "test_docs_seeds.py",
    "settings.md": "test_docs_settings.py",
    "testing.md": "test_docs_testing.py",
    "uniqueness.md": "test_docs_uniqueness.py",
}

#: Pages on which there is nothing to run.
PROSE = {"glossary.md", "index.md", "reference/python.md", "reference/testing.md"}

#: Commands that a test does not run, and why.
NOT_RUN = {
    "mkdir shop": "each test has a folder",
    "cd shop": "likewise",
    "python3 -m venv .venv": "the tests run on what is installed",
    ". .venv/bin/activate": "likewise",
    "pip install '../pgqueue[binary]' pytest": "likewise",
    "createdb shop": "each test has a database",
    "export PGQUEUE_DATABASE_URL=postgresql:///shop": "likewise",
}


def test_every_page_is_run_or_has_nothing_to_run() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}

    assert sorted(pages) == sorted([*STORIES, *OWN_TESTS, *PROSE])
    for page, test in OWN_TESTS.items():
        assert page in (PROJECT / "tests" / "surfaces" / test).read_text(), f"{test} does not know {page}"
    for page in PROSE:
        assert {block.language for block in blocks(DOCS / page)} <= {"text"}, page


def test_every_excuse_is_for_a_command_on_a_page() -> None:
    commands = {command for page in STORIES for block in blocks(DOCS / page) for command in block.commands}

    assert set(NOT_RUN) <= commands


@pytest.mark.parametrize("page", [page for page, databases in STORIES.items() if "postgresql" in databases])
def test_a_page_can_be_followed_on_postgresql(page: str, empty_pg_url: str, tmp_path: Path, forks: Forks) -> None:
    Story(DOCS / page, Reader(folder_of(tmp_path), empty_pg_url, forks), not_run=NOT_RUN).tell()


@pytest.mark.parametrize("page", [page for page, databases in STORIES.items() if "sqlite" in databases])
def test_a_page_can_be_followed_on_sqlite(page: str, tmp_path: Path, forks: Forks) -> None:
    reader = Reader(folder_of(tmp_path), f"sqlite:///{tmp_path / 'reader.db'}", forks)

    Story(DOCS / page, reader, not_run=NOT_RUN).tell()


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    folder.mkdir()
    return folder


# Files of other programs -----------------------------------------------------------------------------------


def test_the_systemd_unit_of_the_tutorial_starts_a_worker_and_leaves_it_time_to_stop() -> None:
    (block,) = (block for block in blocks(DOCS / "tutorial.md") if block.language == "ini")
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(block.text)
    service = unit["Service"]

    program, *arguments = shlex.split(service["ExecStart"])

    assert program.endswith("/bin/pgqueue")
    options = parsed(arguments)
    assert options["processes"] == 2
    assert parse_duration(str(options["shutdown_timeout"])) < float(service["TimeoutStopSec"])
    assert service["KillMode"] == "mixed"


def test_the_container_of_the_tutorial_starts_a_worker_of_this_version() -> None:
    (block,) = (block for block in blocks(DOCS / "tutorial.md") if block.language == "dockerfile")

    program, *arguments = json.loads(re.findall(r"^CMD (.*)$", block.text, re.MULTILINE)[0])

    assert program == "pgqueue"
    assert parsed(arguments)["queue"] == ["default=4", "mail=20"]
    assert f"pgqueue[binary]=={pgqueue.__version__}'" in block.text


def parsed(arguments: list[str]) -> dict[str, object]:
    """The options of `pgqueue worker …` as the command line understands them."""
    command, *rest = arguments
    assert command == "worker"
    context = typer.main.get_command(cli.app).commands["worker"].make_context("worker", rest)  # type: ignore[attr-defined]
    return dict(context.params)


# The references --------------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_reference() -> None:
    python = set(re.findall(r"^::: pgqueue\.(\w+)$", (DOCS / "reference" / "python.md").read_text(), re.MULTILINE))
    tests = set(
        re.findall(r"^::: pgqueue\.testing\.(\w+)$", (DOCS / "reference" / "testing.md").read_text(), re.MULTILINE)
    )

    assert python == set(pgqueue.__all__) - {"__version__"}
    assert tests == set(testing.__all__)


def test_the_glossary_has_every_word_of_the_readme_in_order() -> None:
    words = [row[0] for row in table_below(DOCS / "glossary.md", "Glossary")]
    of_readme = {
        word
        for row in table_below(PROJECT / "README.md", "States")
        for word in row[0].split(", ")
        if word not in ("snooze, release",)
    }

    assert of_readme <= set(words)
    assert len(set(words)) == len(words)
