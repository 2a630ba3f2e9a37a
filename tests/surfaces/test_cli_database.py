"""Which database and schema a command works on, and what becomes of a database that cannot be used."""

from __future__ import annotations

import os
import pty
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Command, environment, program, write_application
from support import execute, scalar

from pgqueue import PgQueue, migration
from pgqueue.engine import make_engine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the commands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def application(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module from its code, in the working directory; gives how to name its `pgq`."""

    def make(code: str) -> str:
        write_application(folder, "shop_database", "from pgqueue import PgQueue\n" + code, monkeypatch)
        return "shop_database:pgq"

    return make


def sqlite_file(folder: Path, name: str, schema: str = "pgqueue") -> str:
    """A SQLite file with pgqueue's tables."""
    url = f"sqlite:///{folder / name}"
    engine = make_engine(url)
    migration.upgrade(engine, schema)
    engine.dispose()
    return url


def jobs_in(path: Path, schema: str = "pgqueue") -> int:
    connection = sqlite3.connect(path)
    try:
        (count,) = connection.execute(f"SELECT count(*) FROM {schema}_jobs").fetchone()
    finally:
        connection.close()
    return int(count)


TASK = "@pgq.task\ndef work(n: int = 0) -> None: ...\n"


def test_the_option_wins_over_the_app_and_the_app_over_the_environment(
    folder: Path, application: Callable[[str], str]
) -> None:
    option, own, variable = (sqlite_file(folder, f"{name}.db") for name in ("option", "own", "variable"))
    pgqueue = Command(variable)
    app = application(f"pgq = PgQueue({own!r})\n{TASK}")

    pgqueue("enqueue", "work")
    assert [jobs_in(folder / f"{name}.db") for name in ("option", "own", "variable")] == [0, 0, 1]
    pgqueue("enqueue", "work", "--app", app)
    assert [jobs_in(folder / f"{name}.db") for name in ("option", "own", "variable")] == [0, 1, 1]
    pgqueue("enqueue", "work", "--app", app, "--database-url", option)
    assert [jobs_in(folder / f"{name}.db") for name in ("option", "own", "variable")] == [1, 1, 1]


def test_an_app_without_a_database_takes_that_of_the_environment(
    folder: Path, application: Callable[[str], str]
) -> None:
    variable = sqlite_file(folder, "variable.db")
    app = application(f"pgq = PgQueue()\n{TASK}")

    result = Command(variable, PGQUEUE_APP=app)("enqueue", "work")

    assert jobs_in(folder / "variable.db") == 1
    assert result.stderr == ""


def test_an_engine_of_the_app_is_used_as_it_is(folder: Path, application: Callable[[str], str]) -> None:
    own = sqlite_file(folder, "own.db")
    app = application(f"from pgqueue.engine import make_engine\npgq = PgQueue(make_engine({own!r}))\n{TASK}")

    Command("sqlite:///elsewhere.db")("enqueue", "work", "--app", app)

    assert jobs_in(folder / "own.db") == 1


def test_pgqueue_database_url_wins_over_database_url(folder: Path) -> None:
    first, second = sqlite_file(folder, "first.db"), sqlite_file(folder, "second.db")

    Command(first, DATABASE_URL=second)("enqueue", "work")
    Command(None, DATABASE_URL=second)("enqueue", "work")

    assert (jobs_in(folder / "first.db"), jobs_in(folder / "second.db")) == (1, 1)


def test_without_any_database_a_local_file_is_announced_created_and_used(folder: Path) -> None:
    pgqueue = Command()

    result = pgqueue("enqueue", "work")
    again = pgqueue("stats", "-o", "json")

    assert result.stdout == "1\n"
    assert f"using the file {folder / 'pgqueue.db'}" in result.stderr
    assert "creating" in result.stderr
    assert f"using the file {folder / 'pgqueue.db'}" in again.stderr
    assert "creating" not in again.stderr
    assert jobs_in(folder / "pgqueue.db") == 1


def test_an_outdated_local_file_is_upgraded_unasked(folder: Path) -> None:
    sqlite_file(folder, "pgqueue.db")
    engine = make_engine("sqlite:///pgqueue.db")
    migration.downgrade(engine, "pgqueue", "base")
    engine.dispose()

    Command()("enqueue", "work")

    assert jobs_in(folder / "pgqueue.db") == 1


@pytest.mark.parametrize(
    "arguments", [["stats"], ["jobs", "list"], ["db", "current"], ["db", "check"], ["queues", "list"]]
)
def test_a_command_that_only_looks_does_not_create_the_file(folder: Path, arguments: list[str]) -> None:
    local = Command()(*arguments, code=6)
    named = Command(f"sqlite:///{folder / 'named.db'}")(*arguments, code=6)

    assert "there is no file" in local.stderr
    assert "pgqueue db upgrade" in named.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("arguments", [["enqueue", "work"], ["stats"], ["prune", "--older-than", "1d"]])
def test_a_named_database_is_never_created_or_upgraded_unasked(
    folder: Path, empty_pg_url: str, arguments: list[str]
) -> None:
    result = Command(empty_pg_url)(*arguments, code=6)

    assert "create them with: pgqueue db upgrade" in result.stderr
    engine = make_engine(empty_pg_url)
    try:
        assert scalar(engine, "SELECT count(*) FROM pg_namespace WHERE nspname = 'pgqueue'") == 0
    finally:
        engine.dispose()


def test_the_schema_of_the_option_wins_over_that_of_the_app(folder: Path, application: Callable[[str], str]) -> None:
    url = sqlite_file(folder, "queue.db", "own")
    sqlite_file(folder, "queue.db", "option")
    sqlite_file(folder, "queue.db", "variable")
    app = application(f"pgq = PgQueue({url!r}, schema='own')\n{TASK}")
    pgqueue = Command(url, PGQUEUE_SCHEMA="variable")

    pgqueue("enqueue", "work")
    pgqueue("enqueue", "work", "--app", app)
    pgqueue("enqueue", "work", "--app", app, "--schema", "option")

    path = folder / "queue.db"
    assert [jobs_in(path, schema) for schema in ("variable", "own", "option")] == [1, 1, 1]


@pytest.mark.parametrize("name", ["", "a;b", 'a"b', "A", "pg_own"])
def test_a_schema_that_cannot_be_is_refused(sqlite_url: str, name: str) -> None:
    assert "schema must be" in Command(sqlite_url)("stats", "--schema", name, code=2).stderr


def test_an_empty_url_is_a_mistake_and_not_the_local_file(folder: Path) -> None:
    result = Command()("enqueue", "work", "--database-url", "", code=2)

    assert "the database URL is malformed" in result.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("jobs", "must look like package.module:name"),
        (":pgq", "must look like package.module:name"),
        ("no_such_module_here:pgq", "there is no module 'no_such_module_here'"),
        ("pgqueue.no_such:pgq", "there is no module 'pgqueue.no_such'"),
        ("json:pgq", "json has no 'pgq'"),
        ("json:dumps", "must be a PgQueue, got function"),
    ],
)
def test_an_app_that_cannot_be_found_is_explained(sqlite_url: str, reference: str, message: str) -> None:
    assert message in Command(sqlite_url)("enqueue", "work", "--app", reference, code=2).stderr


def test_an_app_that_fails_while_it_is_imported_is_shown_with_its_traceback(
    sqlite_url: str, application: Callable[[str], str]
) -> None:
    app = application("import no_such_dependency")

    result = Command(sqlite_url)("enqueue", "work", "--app", app, code=2)

    assert "import no_such_dependency" in result.stderr
    assert "failed with ModuleNotFoundError: No module named 'no_such_dependency'" in result.stderr


def test_a_database_that_cannot_be_reached_exits_5(tmp_path: Path) -> None:
    nowhere = Command("postgresql://ada@127.0.0.1:1/shop")("stats", code=5)
    no_folder = Command(f"sqlite:///{tmp_path / 'no' / 'queue.db'}")("stats", code=5)
    (tmp_path / "text.db").write_text("This is not a database, but it is long enough to look like one." * 20)
    no_database = Command(f"sqlite:///{tmp_path / 'text.db'}")("stats", code=5)

    assert "cannot use postgresql+psycopg://ada@127.0.0.1:1/shop" in nowhere.stderr
    assert "does the folder exist" in no_folder.stderr
    assert "is not a SQLite database" in no_database.stderr


def test_a_missing_database_exits_5(pg_url: str) -> None:
    result = Command(pg_url.rpartition("/")[0] + "/no_such_database")("stats", code=5)

    assert 'database "no_such_database" does not exist' in result.stderr


def test_a_database_of_another_kind_exits_2() -> None:
    assert "works on PostgreSQL and SQLite" in Command("mysql://ada@db/shop")("stats", code=2).stderr


def test_db_upgrade_makes_the_tables_and_check_approves_of_them(empty_pg_url: str) -> None:
    pgqueue = Command(empty_pg_url)

    before = pgqueue.json("db", "current")
    upgraded = pgqueue.json("db", "upgrade")

    head = migration.head_revision()
    assert before == {"schema": "pgqueue", "current": None, "head": head, "up_to_date": False}
    assert upgraded == {"schema": "pgqueue", "current": head, "head": head, "up_to_date": True}
    assert pgqueue.json("db", "check") == upgraded
    assert pgqueue.json("db", "current") == upgraded


def test_db_upgrade_creates_a_sqlite_file(folder: Path) -> None:
    Command(f"sqlite:///{folder / 'new.db'}")("db", "upgrade")

    assert jobs_in(folder / "new.db") == 0


def test_db_check_approves_of_tables_in_the_history_of_an_application(url: str, pgq: PgQueue) -> None:
    with pgq.begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE {pgq.tables.jobs.fullname.removesuffix('jobs')}alembic_version")

    found = Command(url).json("db", "check")

    assert (found["current"], found["up_to_date"]) == (None, True)


def test_db_check_names_what_differs(url: str, pgq: PgQueue) -> None:
    with pgq.begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE {pgq.tables.unique_periods.fullname}")

    result = Command(url)("db", "check", code=6)

    assert "differ" in result.stderr
    assert "unique_periods" in result.stderr


def test_db_downgrade_wants_to_be_confirmed(url: str, pgq: PgQueue) -> None:
    pgqueue = Command(url)
    pgqueue("enqueue", "work")

    refused = pgqueue("db", "downgrade", "base", code=2)
    kept = pgqueue.json("stats")["queues"][0]["ready"]
    pgqueue("db", "downgrade", "base", "--yes")

    assert "confirm it with --yes" in refused.stderr
    assert kept == 1
    assert "create them with: pgqueue db upgrade" in pgqueue("stats", code=6).stderr


@pytest.mark.parametrize(("answer", "code", "left"), [("n", 1, True), ("y", 0, False)])
def test_db_downgrade_asks_on_a_terminal(sqlite_url: str, folder: Path, answer: str, code: int, left: bool) -> None:
    Command(sqlite_url)("enqueue", "work")
    ours, theirs = pty.openpty()

    process = subprocess.Popen(
        program("db", "downgrade", "base"),
        env={**os.environ, **environment(sqlite_url, {})},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(ours, f"{answer}\n".encode())
    stdout, stderr = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)

    assert process.returncode == code
    assert "queue.db, schema pgqueue, to base? Data may be lost." in stderr
    gone = f"schema      pgqueue\ncurrent     -\nhead        {migration.head_revision()}\nup_to_date  no\n"
    assert stdout == ("" if left else gone)
    Command(sqlite_url)("stats", code=0 if left else 6)


def test_tables_that_are_newer_than_the_program_are_pointed_out_and_used(url: str, pgq: PgQueue) -> None:
    version = "pgqueue.alembic_version" if pgq.engine.dialect.name == "postgresql" else "pgqueue_alembic_version"
    execute(pgq.engine, f"UPDATE {version} SET version_num = 'pgqueue_9999'")

    result = Command(url)("enqueue", "work")

    assert result.stdout == "1\n"
    assert result.stderr.startswith("note: ")
    assert "pgqueue_9999" in result.stderr


def test_db_refuses_a_revision_that_does_not_exist(url: str) -> None:
    assert "'nope'" in Command(url)("db", "upgrade", "nope", code=2).stderr


def test_db_sql_prints_statements_without_any_database(folder: Path) -> None:
    postgresql = Command()("db", "sql", "--schema", "mine")
    sqlite = Command()("db", "sql", "--dialect", "sqlite")

    assert "CREATE TABLE mine.jobs" in postgresql.stdout
    assert "CREATE TABLE pgqueue_jobs" in sqlite.stdout
    assert list(folder.iterdir()) == []


def test_db_path_names_the_folder_with_the_migrations() -> None:
    folder = Path(Command()("db", "path").stdout.rstrip("\n"))

    assert (folder / "env.py").exists()
