"""Every page of docs/ is known here: what can be run on it is run, and what it says of the code is so."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import typer.main
from documents import PROJECT, Reader, Story, blocks, table_below
from forks import Forks
from pgbouncer import Bouncer
from support import execute, rows, scalar, wait_for
from working import working

import pgqueue
from pgqueue import (
    PgQueue,
    WorkerConfig,
    cli,
    dialect,
    engine,
    migration,
    notifier,
    schedules,
    slots,
    sweeping,
    task,
    testing,
)
from pgqueue.config import parse_duration
from pgqueue.engine import make_engine
from pgqueue.schema import tables_for

DOCS = PROJECT / "docs"

#: Pages that are followed from top to bottom, and on which databases, empty at the start.
STORIES = {
    "migrations.md": ("postgresql", "sqlite"),
    "operating.md": ("postgresql",),
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
    "performance.md": "test_docs.py",
    "pgbouncer.md": "test_docs.py",
    "results.md": "test_docs_results.py",
    "schedules.md": "test_docs_schedules.py",
    "seeds.md": "test_docs_seeds.py",
    "settings.md": "test_docs_settings.py",
    "testing.md": "test_docs_testing.py",
    "uniqueness.md": "test_docs_uniqueness.py",
}

#: Pages on which there is nothing to run.
PROSE = {"design.md", "glossary.md", "index.md", "reference/python.md", "reference/testing.md"}

#: Commands that a test does not run, and why.
NOT_RUN = {
    "mkdir shop": "each test has a folder",
    "cd shop": "likewise",
    "python3 -m venv .venv": "the tests run on what is installed",
    ". .venv/bin/activate": "likewise",
    "pip install '../pgqueue[binary]' pytest": "likewise",
    "createdb shop": "each test has a database",
    "createdb shop_test": "likewise",
    "export PGQUEUE_DATABASE_URL=postgresql:///shop_test": "likewise",
    "sudo useradd --system shop": "changes the machine",
    "sudo cp shop-worker.service /etc/systemd/system/": "likewise",
    "sudo systemctl daemon-reload": "likewise",
    "sudo systemctl enable --now shop-worker": "likewise",
    "journalctl --unit shop-worker": "likewise",
    "export PGQUEUE_DATABASE_URL=postgresql:///shop": "likewise",
}


ROLE = re.compile(r"^CREATE ROLE (\w+)", re.MULTILINE)


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


@pytest.fixture
def reader_url(empty_pg_url: str) -> Iterator[str]:
    """An empty database; at the end the roles are dropped that a page has made, which belong to the whole server."""
    yield empty_pg_url
    engine = make_engine(empty_pg_url)
    for role in sorted({name for page in STORIES for name in ROLE.findall((DOCS / page).read_text())}):
        if scalar(engine, "SELECT count(*) FROM pg_roles WHERE rolname = :role", role=role):
            execute(engine, f"DROP OWNED BY {role} CASCADE")
            execute(engine, f"DROP ROLE {role}")
    engine.dispose()


@pytest.mark.parametrize("page", [page for page, databases in STORIES.items() if "postgresql" in databases])
def test_a_page_can_be_followed_on_postgresql(page: str, reader_url: str, tmp_path: Path, forks: Forks) -> None:
    Story(DOCS / page, Reader(folder_of(tmp_path), reader_url, forks), not_run=NOT_RUN).tell()


def test_the_page_about_pgbouncer_can_be_followed_through_one_with_its_settings(
    reader_url: str, make_bouncer: Callable[..., Bouncer], tmp_path: Path, forks: Forks
) -> None:
    page = DOCS / "pgbouncer.md"
    (block,) = (block for block in blocks(page) if block.language == "ini")
    file = configparser.ConfigParser(interpolation=None)
    file.read_string(block.text)
    of_the_place = ("listen_port", "auth_type", "auth_file")
    settings = {name: value for name, value in file["pgbouncer"].items() if name not in of_the_place}
    bouncer = make_bouncer(**settings)

    Story(page, Reader(folder_of(tmp_path), bouncer.url(reader_url), forks)).tell()

    assert bouncer.left_behind(reader_url) == []


@pytest.mark.parametrize("page", [page for page, databases in STORIES.items() if "sqlite" in databases])
def test_a_page_can_be_followed_on_sqlite(page: str, tmp_path: Path, forks: Forks) -> None:
    reader = Reader(folder_of(tmp_path), f"sqlite:///{tmp_path / 'reader.db'}", forks)

    Story(DOCS / page, reader, not_run=NOT_RUN).tell()


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    folder.mkdir()
    return folder


def test_every_link_leads_to_a_file_in_the_project_too() -> None:
    """Those who read the pages without the site; the site's own build checks the links there."""
    made_by_the_site = DOCS / "reference" / "commands.md"

    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            path = (page.parent / link).resolve()
            assert path.exists() or path == made_by_the_site, f"{page.name}: {link}"


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
    assert f" /wheels/pgqueue-{pgqueue.__version__}-py3-none-any.whl " in block.text


def test_the_commands_of_the_page_about_speed_are_understood() -> None:
    """They take minutes to hours; test_bench.py and test_benchmarks.py run them with a few jobs."""
    targets = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)

    for block in blocks(DOCS / "performance.md"):
        assert block.language == "sh"
        for command in block.commands:
            program, *arguments = shlex.split(command, comments=True)
            if program == "make":
                assert arguments[0] in targets
            else:
                assert program == "pgqueue"
                assert parsed(arguments)


def parsed(arguments: list[str]) -> dict[str, object]:
    """The options of a command of pgqueue as the command line understands them."""
    name, *rest = arguments
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    return dict(command.make_context(name, rest).params)


# The references --------------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_reference() -> None:
    python = set(re.findall(r"^::: pgqueue\.(\w+)$", (DOCS / "reference" / "python.md").read_text(), re.MULTILINE))
    tests = set(
        re.findall(r"^::: pgqueue\.testing\.(\w+)$", (DOCS / "reference" / "testing.md").read_text(), re.MULTILINE)
    )

    assert python == set(pgqueue.__all__) - {"__version__"}
    assert tests == set(testing.__all__)


def test_what_pages_import_from_single_modules_is_in_the_reference() -> None:
    reference = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    imports = re.compile(r"^from (pgqueue\.\w+) import (.+)$", re.MULTILINE)

    imported = {
        f"{module}.{name}"
        for page in (*DOCS.rglob("*.md"), PROJECT / "README.md")
        for module, names in imports.findall(page.read_text())
        for name in names.split(", ")
    }

    assert len(imported) >= 3
    assert {name for name in imported if f"::: {name}\n" not in reference} == set()


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


# What the pages say -----------------------------------------------------------------------------------------

#: Sentences with figures, and what the code says.
FIGURES = {
    "design.md": {
        r"deleted after (\d+) days": schedules.TICKS_KEPT_SECONDS / 86_400,
        r"holds for a lease, (\d+) seconds unless set otherwise": WorkerConfig().lease,
    },
    "migrations.md": {
        r"wait for it, (five) minutes at most": migration.DEPLOYER_WAIT_SECONDS / 60,
        r"wait for a lock\*\* for (\d+) seconds": migration.LOCK_TIMEOUT_SECONDS,
    },
    "operating.md": {
        r"ends: at most (\d+) seconds after its last sign of life": WorkerConfig().lease,
        r"found within (\d+) more": WorkerConfig().sweep_interval,
        r"`--shutdown-timeout` \((\d+) seconds\)": WorkerConfig().shutdown_timeout,
        r"claims ahead about (\d+) ms": slots.PREFETCH_SECONDS * 1000,
        r"given back after (\d+) seconds": notifier.IDLE_SECONDS,
        r"go away after an (hour)": sweeping.SILENT_WORKER_SECONDS / 3600,
    },
    "pgbouncer.md": {
        r"well below the lease \((\d+) seconds\)": WorkerConfig().lease,
        r"by polling, (once) a second": WorkerConfig().poll_interval,
    },
    "sqlite.md": {
        r"wait for each other, up to (\d+) seconds": engine.SQLITE_BUSY_SECONDS,
        r"within the poll interval \((\d+) second\)": WorkerConfig().poll_interval,
        r"SQLite 3\.(\d+)\*\*": dialect.SQLITE_VERSION_MIN[1],
    },
    "transactions.md": {r"at most (\d+) MiB": task.PAYLOAD_BYTES_MAX / 1024**2},
    "tutorial.md": {r"the shutdown timeout, (\d+) seconds": WorkerConfig().shutdown_timeout},
}

WORDS = {"five": 5.0, "once": 1.0, "hour": 1.0}


@pytest.mark.parametrize("page", FIGURES)
def test_the_figures_of_a_page_are_those_of_the_code(page: str) -> None:
    text = " ".join((DOCS / page).read_text().split())

    for sentence, figure in FIGURES[page].items():
        found = re.search(sentence, text)
        assert found, f"{page} no longer says: {sentence}"
        assert WORDS.get(found[1]) or float(found[1]) == figure


def test_the_tables_of_the_design_are_those_of_the_schema() -> None:
    described = [row[0].strip("`") for row in table_below(DOCS / "design.md", "The tables")]

    assert described == [table.name for table in vars(tables_for("postgresql", "pgqueue"))["metadata"].tables.values()]


def test_every_module_has_its_line_in_the_design() -> None:
    _, _, below = (DOCS / "design.md").read_text().partition("## The modules\n")
    described = re.findall(r"^\| `(\w+)` \|", below.partition("\n## ")[0], re.MULTILINE)

    package = PROJECT / "pgqueue"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}

    assert sorted(described) == sorted(modules)


def test_every_test_that_the_design_names_exists() -> None:
    named = re.findall(r"`(tests/\S+?\.py)::(\w+)`", (DOCS / "design.md").read_text())

    missing = [name for path, name in named if f"def {name}(" not in (PROJECT / path).read_text()]

    assert len(named) > 10
    assert missing == []


def test_the_newest_version_has_its_revision_in_the_table() -> None:
    version, revision, _ = table_below(DOCS / "upgrading.md", "Versions and revisions", rows_min=1)[-1]

    assert (version, revision.strip("`")) == (pgqueue.__version__, migration.head_revision())


def test_what_the_logs_say_is_in_the_code() -> None:
    code = "\n".join(path.read_text() for path in (PROJECT / "pgqueue").glob("*.py"))

    for saying, _ in table_below(DOCS / "operating.md", "Logs"):
        for part in saying.strip("`").split("…"):
            assert part.strip() in code, part


def test_the_page_knows_every_cause_that_the_view_of_stuck_jobs_names(pg: PgQueue) -> None:
    view = scalar(pg.engine, "SELECT pg_get_viewdef('pgqueue.stuck_jobs'::regclass)")
    causes = {cause.strip() for cause in re.findall(r"(?:THEN|ELSE) \(?'([^']+)'", view)}

    table = table_below(DOCS / "operating.md", "When a job does not run")
    described = {row[0].strip("`").removesuffix("…").strip() for row in table}

    assert described == causes


def test_an_idle_worker_has_as_many_connections_as_the_page_says(pg: PgQueue) -> None:
    pg.task(name="idle")(lambda: None)
    said = re.search(r"has (\d+) connections to the database when it is idle", (DOCS / "operating.md").read_text())
    assert said

    pg.dispose()
    with working(pg):
        wait_for(lambda: connections(pg) >= int(said[1]), "the worker's connections")

        assert connections(pg) == int(said[1])


def connections(pg: PgQueue) -> int:
    """Those of pgqueue's engine in this database, without the one that asks."""
    looking = sa.create_engine(pg.url, poolclass=sa.NullPool)
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    return len(rows(looking, query))


def test_claims_and_ends_of_jobs_gain_nothing_from_a_fillfactor(pg: PgQueue) -> None:
    """No update of theirs could be a heap-only one, which is what free room in a page is for."""
    columns = {
        name
        for index in sa.inspect(pg.engine).get_indexes("jobs", schema="pgqueue")
        for name in re.findall(r"\w+", str(index["dialect_options"].get("postgresql_where", "")))
    }

    assert "status" in columns
