"""Working on pgqueue's own migrations: `alembic -c alembic.ini …` in a checkout."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import forks
import sqlalchemy as sa
from catalog import snapshot
from support import execute

from pgqueue import migration

CHECKOUT = Path(__file__).resolve().parents[2]


def alembic(folder: Path, *arguments: str, url: str | None) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    if url is not None:
        environ["PGQUEUE_DATABASE_URL"] = url
    command = ["python", "-W", "error", "-m", "alembic", "-c", str(CHECKOUT / "alembic.ini"), *arguments]
    return forks.shared().run(command, cwd=folder, environ=environ)


def test_upgrade_check_current_and_downgrade_work(empty: sa.Engine, empty_url: str, tmp_path: Path) -> None:
    upgraded = alembic(tmp_path, "upgrade", "head", url=empty_url)

    assert upgraded.returncode == 0, upgraded.stderr
    with empty.connect() as connection:
        assert migration.require_current(connection, "pgqueue") is None
    checked = alembic(tmp_path, "check", url=empty_url)
    assert (checked.returncode, checked.stdout.strip()) == (0, "No new upgrade operations detected."), checked.stderr
    current = alembic(tmp_path, "current", url=empty_url)
    assert (current.returncode, current.stdout.strip()) == (0, f"{migration.head_revision()} (head)"), current.stderr
    downgraded = alembic(tmp_path, "downgrade", "base", url=empty_url)
    assert downgraded.returncode == 0, downgraded.stderr
    assert not any(snapshot(empty, "pgqueue").values())


def test_check_fails_when_the_tables_are_not_what_the_code_expects(
    empty: sa.Engine, empty_url: str, tmp_path: Path
) -> None:
    migration.upgrade(empty, "pgqueue")
    flat = empty.dialect.name == "sqlite"
    execute(empty, f"ALTER TABLE pgqueue{'_' if flat else '.'}jobs DROP COLUMN progress")

    checked = alembic(tmp_path, "check", url=empty_url)

    assert checked.returncode != 0
    assert "progress" in checked.stdout + checked.stderr


def test_current_on_an_empty_database_creates_nothing(empty: sa.Engine, empty_url: str, tmp_path: Path) -> None:
    current = alembic(tmp_path, "current", url=empty_url)

    assert (current.returncode, current.stdout) == (0, ""), current.stderr
    assert sa.inspect(empty).get_table_names() == []
    assert "pgqueue" not in sa.inspect(empty).get_schema_names()


def test_without_a_url_the_local_file_is_used(tmp_path: Path) -> None:
    upgraded = alembic(tmp_path, "upgrade", "head", url=None)

    assert upgraded.returncode == 0, upgraded.stderr
    assert (tmp_path / "pgqueue.db").exists()


def test_sql_for_people_comes_for_the_database_of_the_url(tmp_path: Path) -> None:
    on_postgresql = alembic(tmp_path, "upgrade", "head", "--sql", url="postgresql://nobody@127.0.0.1:1/nothing")
    on_sqlite = alembic(tmp_path, "upgrade", "head", "--sql", url="sqlite:///nothing.db")

    assert on_postgresql.stdout == migration.offline_sql("postgresql", "pgqueue"), on_postgresql.stderr
    assert on_sqlite.stdout == migration.offline_sql("sqlite", "pgqueue"), on_sqlite.stderr
