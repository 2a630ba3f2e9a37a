"""The SQL of an upgrade, for people who run SQL themselves."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from catalog import snapshot

from pgqueue import ConfigurationError, migration


def run_script(engine: sa.Engine, sql: str) -> None:
    """As psql and sqlite3 would: all statements, as they stand."""
    if engine.dialect.name == "sqlite":
        connection = sqlite3.connect(engine.url.database or "")
        connection.executescript(sql)
        connection.close()
        return
    address = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True) as plain:
        plain.execute(sql.encode())


@pytest.mark.parametrize("schema", ["pgqueue", "order"])
def test_the_sql_makes_the_same_tables_as_an_upgrade(empty: sa.Engine, schema: str) -> None:
    run_script(empty, migration.offline_sql(empty.dialect.name, schema))

    by_hand = snapshot(empty, schema)
    with empty.connect() as connection:
        assert migration.require_current(connection, schema) is None
        assert migration.differences(connection, schema) == []
    migration.upgrade(empty, "upgraded")
    assert all(by_hand.values())
    assert by_hand == snapshot(empty, "upgraded")


def test_an_upgrade_goes_on_from_tables_made_by_the_sql(empty: sa.Engine) -> None:
    run_script(empty, migration.offline_sql(empty.dialect.name, "pgqueue"))
    before = snapshot(empty, "pgqueue")

    migration.upgrade(empty, "pgqueue")

    assert snapshot(empty, "pgqueue") == before


def test_the_sql_has_a_lock_timeout_and_one_transaction_per_revision() -> None:
    sql = migration.offline_sql("postgresql", "pgqueue")

    assert sql.startswith("SET lock_timeout = '5s';")
    revisions = len(list((migration.migrations_path() / "versions").glob("*.py")))
    assert (sql.count("BEGIN;"), sql.count("COMMIT;")) == (revisions, revisions)


def test_nothing_is_connected_to_and_no_file_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PGQUEUE_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")

    for dialect in ("postgresql", "sqlite"):
        assert "CREATE TABLE" in migration.offline_sql(dialect, "pgqueue")

    assert list(tmp_path.iterdir()) == []


def test_a_range_of_revisions_starts_where_the_database_is() -> None:
    head = migration.head_revision()

    assert "CREATE TABLE" not in migration.offline_sql("postgresql", "pgqueue", f"{head}:{head}")


def test_other_databases_and_revisions_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'mysql'"):
        migration.offline_sql("mysql", "pgqueue")
    with pytest.raises(ConfigurationError, match="'pgqueue_7777'"):
        migration.offline_sql("postgresql", "pgqueue", "pgqueue_7777")
