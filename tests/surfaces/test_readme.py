"""Everything in README.md that can be run is run, and everything it names exists."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import typer.main
from documents import PROJECT, Block, Reader, blocks, table_below
from forks import Forks
from packaging.requirements import Requirement
from sqlalchemy import event
from sqlalchemy.orm import Session
from support import execute, rows

from pgqueue import JobStatus, PgQueue, Worker, WorkerConfig, cli, pooler
from pgqueue.cli.program import EXIT_CODES, FAILURE
from pgqueue.dialect import SQLITE_VERSION_MIN
from pgqueue.supervisor import DRAINED_WITH_DEAD

README = PROJECT / "README.md"

#: Commands that a test cannot run, and why.
NOT_RUN = {
    "make demo": "it installs; tests/surfaces runs `pgqueue demo` itself",
    "make test": "it would run this test",
    "make help": "make is not needed to run the tests",
    "make check": "it would run this test",
    "make test ARGS='--pg all'": "it would run this test",
    "make bench": "it takes minutes; test_benchmarks.py runs them on a few jobs",
    "pip install '.[binary]'": "the tests run on what is installed",
    "export PGQUEUE_DATABASE_URL=postgresql://ada:secret@localhost/shop": "each test has a database of its own",
}

#: Languages of blocks that are no commands, and what tests them instead.
NOT_COMMANDS = {
    "text": "compared with what the commands above print",
    "mermaid": "test_the_state_diagram_names_every_status",
    "ini": "tests/migrations/test_application_history.py works with such a file",
}

#: What the SQL in the README speaks of, beside what the commands above it have left in the database.
ROLE = "shop_worker"


@pytest.fixture(params=["postgresql", "sqlite"])
def empty_url(request: pytest.FixtureRequest, pg_version: str | None, tmp_path: Path) -> str:
    """A database with nothing in it: the README starts from there."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'reader.db'}"
    chosen: str = request.getfixturevalue("empty_pg_url")
    return chosen


def test_the_readme_works_from_top_to_bottom(empty_url: str, tmp_path: Path, forks: Forks) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    reader = Reader(folder, empty_url, forks)
    reader.run("alembic init migrations")
    document = blocks(README)

    for number, block in enumerate(document):
        if block.language == "python":
            write_and_run(reader, block, document[number + 1 :])
        elif block.language == "sh":
            printed = "".join(reader.run(command) for command in block.commands if command not in NOT_RUN)
            for shown in document[number + 1 : number + 2]:
                expected = shown.text if shown.language == "text" else ""
                assert expected in printed, f"README.md:{block.line} prints:\n{printed}"

    pgq = PgQueue(empty_url)
    try:
        assert_left_behind(pgq)
        run_queries(pgq, [block for block in document if block.language == "sql"])
    finally:
        pgq.dispose()


def write_and_run(reader: Reader, block: Block, following: list[Block]) -> None:
    """Write a block of Python to the file it names, and run that unless a command below does."""
    assert block.file_name is not None, f"README.md:{block.line}: the first line must name the file"
    path = reader.folder / block.file_name
    path.write_text(block.text)
    commands = [command for below in following if below.language == "sh" for command in below.commands]
    run_below = path.name == "env.py" or f"python {block.file_name}" in commands
    if not run_below:
        reader.run(f"python {block.file_name}")


def assert_left_behind(pgq: PgQueue) -> None:
    """What the README says about the jobs it made is so."""
    assert {job.status for job in pgq.list_jobs(task="give_discount")} == {JobStatus.COMPLETED}
    assert [job.result for job in pgq.list_jobs(task="give_discount")] == [38]
    assert [job.result for job in pgq.list_jobs(task="greet")] == ["hello, Grace"]
    measured = sorted(pgq.list_jobs(task="measure"), key=lambda job: job.id)
    assert [job.result for job in measured] == [{"double": 2}, {"double": 4}, None]
    assert measured[2].status == JobStatus.DEAD
    assert rows(pgq.engine, "SELECT customer, total FROM orders ORDER BY id") == [("Ada", 38), ("Grace", 7)]


def run_queries(pgq: PgQueue, queries: list[Block]) -> None:
    """Run blocks of SQL, on a database that has something for each of them to find."""
    on_postgresql = pgq.engine.dialect.name == "postgresql"
    abandon_a_job(pgq)
    pgq.pause("mail", reason="the provider is down")
    if on_postgresql:
        execute(pgq.engine, f"DROP ROLE IF EXISTS {ROLE}")
        execute(pgq.engine, f"CREATE ROLE {ROLE}")
    try:
        for block in queries:
            if on_postgresql:
                run_query(pgq, block, block.text)
            elif not block.text.startswith("-- PostgreSQL\n"):
                run_query(pgq, block, block.text.replace("pgqueue.", "pgqueue_"))
    finally:
        if on_postgresql:
            execute(pgq.engine, f"DROP OWNED BY {ROLE}")
            execute(pgq.engine, f"DROP ROLE {ROLE}")


def run_query(pgq: PgQueue, block: Block, text: str) -> None:
    with pgq.engine.begin() as connection:
        for statement in text.split(";\n"):
            if statement:
                result = connection.exec_driver_sql(statement)
                found = not result.returns_rows or result.first() is not None
                assert found, f"README.md:{block.line}: finds nothing"


def abandon_a_job(pgq: PgQueue) -> None:
    """Leave a job running whose lease is over."""
    abandoned = pgq.external_task("abandoned", queue="abandoned")
    with pgq.begin() as connection:
        abandoned.enqueue(connection)
    (job,) = pgq.claim("consumer-2", queue="abandoned")
    jobs = pgq.tables.jobs
    long_ago = job.created_at - timedelta(minutes=1)
    with pgq.begin() as connection:
        connection.execute(jobs.update().where(jobs.c.id == job.id).values(claim_expires_at=long_ago))


def test_a_worker_behind_a_pooler_that_does_not_listen_keeps_nothing_in_its_sessions(
    pg: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooler, "is_own_session", lambda connection: False)

    @pg.task(transactional=True)
    def count(session: Session, n: int) -> int:
        return n

    @pg.task
    def fail(n: int) -> None:
        raise ValueError(n)

    with pg.begin() as connection:
        count.enqueue_many(connection, [{"n": n} for n in range(20)])
        fail.using(max_retries=0).enqueue(connection, n=1)
    statements: list[str] = []
    thresholds: set[int | None] = set()

    @event.listens_for(pg.engine, "before_cursor_execute")
    def note(connection: sa.Connection, cursor: Any, statement: str, *_: object) -> None:
        statements.append(statement)
        thresholds.add(cursor.connection.prepare_threshold)

    report = Worker(pg, WorkerConfig(drain=True, listen=False)).run()

    assert (report.completed, report.dead) == (20, 1)
    assert any("UPDATE pgqueue.jobs" in statement for statement in statements)
    kept = re.compile(r"^\s*(SET|LISTEN|PREPARE|DECLARE|CREATE)\b|advisory|set_config\((?!.*true\))", re.IGNORECASE)
    assert [statement for statement in statements if kept.search(statement)] == []
    assert thresholds == {None}


# What the README names exists ------------------------------------------------------------------------------


def test_every_block_is_run_or_has_a_reason_not_to_be() -> None:
    document = blocks(README)
    commands = {command for block in document if block.language == "sh" for command in block.commands}

    languages = {block.language for block in document}

    assert languages == {"python", "sh", "sql", *NOT_COMMANDS}
    assert set(NOT_RUN) <= commands, "an excuse for a command that is not in the README"


def test_every_test_that_the_promise_names_exists() -> None:
    named = re.findall(r"`(tests/\S+?\.py)::(\w+)`", README.read_text())

    missing = [f"{path}::{name}" for path, name in named if name not in functions_of(PROJECT / path)]

    assert len(named) >= 10
    assert missing == []


def functions_of(path: Path) -> set[str]:
    if not path.exists():
        return set()
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_line_of_the_promise_names_a_test() -> None:
    _, _, promise = README.read_text().partition("## The promise\n")
    lines = re.findall(r"^\d+\. (?:.+\n)(?: +.+\n)*", promise.partition("Not promised")[0], re.MULTILINE)

    assert len(lines) >= 8
    assert [line for line in lines if "`tests/" not in line] == []


def test_what_is_needed_is_what_the_package_asks_for() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    (sqlalchemy,) = (Requirement(line) for line in project["dependencies"] if line.startswith("SQLAlchemy"))

    found = re.search(
        r"Python ([\d.]+) or newer, SQLAlchemy ([\d.]+) to ([\d.]+), and PostgreSQL (\d+) or newer, or SQLite ([\d.]+)",
        README.read_text(),
    )

    assert found
    python, lowest, highest, postgresql, sqlite = found.groups()
    assert project["requires-python"] == f">={python}"
    assert f"{highest}.99" in sqlalchemy.specifier
    assert {str(one) for one in sqlalchemy.specifier if one.operator == ">="} == {f">={lowest}"}
    assert sqlite == ".".join(map(str, SQLITE_VERSION_MIN[:2]))
    assert f"PostgreSQL server ({postgresql} or newer)" in (PROJECT / "docs" / "tutorial.md").read_text()


def test_the_settings_of_a_worker_are_described_with_their_defaults() -> None:
    described = {row[0].strip("`"): row[2].strip("`") for row in table_below(README, "Worker settings")}

    defaults = {field.name: repr(default_of(field)) for field in dataclasses.fields(WorkerConfig)}

    assert described == defaults


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]


def test_every_command_and_its_options_are_described() -> None:
    table = table_below(README, "Command line")
    described = {row[0].strip("`").removeprefix("pgqueue ") for row in table}

    commands = dict(commands_of(typer.main.get_command(cli.app)))

    assert described == set(commands)
    for row in table:
        name = row[0].strip("`").removeprefix("pgqueue ")
        options = {
            option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(re.findall(r"(?<![\w-])--[a-z-]+", " ".join(row[1:]))) <= options, name


def commands_of(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def test_every_exit_code_is_described() -> None:
    described = {int(row[0]) for row in table_below(README, "Exit codes")}

    assert described == {0, FAILURE, DRAINED_WITH_DEAD, *(code for _, code in EXIT_CODES)}


def test_the_state_diagram_names_every_status() -> None:
    (diagram,) = (block.text for block in blocks(README) if block.language == "mermaid")

    named = set(re.findall(r"^ +(\w+) -->|--> (\w+):", diagram, re.MULTILINE))

    assert {name for pair in named for name in pair if name} == set(JobStatus)


def test_every_link_leads_to_a_file() -> None:
    for document in (README, PROJECT / "examples" / "README.md", PROJECT / "CHANGELOG.md"):
        links = re.findall(r"\]\(([^)#]+)\)", document.read_text())

        missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]

        assert missing == [], document.name
