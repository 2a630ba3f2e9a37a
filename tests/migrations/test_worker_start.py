"""What a worker does when it meets tables that are not those of its code."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from catalog import snapshot
from deployers import HEAD, NEXT
from support import execute, scalar

from pgqueue import PgQueue, SchemaMissing, SchemaOutdated, Worker, WorkerConfig, migration


def drain(engine: sa.Engine) -> None:
    pgq = PgQueue(engine)
    pgq.task(name="double")(lambda: None)
    Worker(pgq, WorkerConfig(drain=True)).run()


def place(engine: sa.Engine, table: str) -> str:
    return f"pgqueue_{table}" if engine.dialect.name == "sqlite" else f"pgqueue.{table}"


def add_job(engine: sa.Engine) -> None:
    execute(engine, f"INSERT INTO {place(engine, 'jobs')} (task) VALUES ('double')")


def status(engine: sa.Engine) -> str:
    return str(scalar(engine, f"SELECT status FROM {place(engine, 'jobs')}"))


def test_a_worker_without_tables_says_how_to_create_them(empty: sa.Engine) -> None:
    with pytest.raises(SchemaMissing, match=r"schema 'pgqueue' has no pgqueue tables; .*: pgqueue db upgrade"):
        drain(empty)


def test_a_worker_says_so_after_a_downgrade_to_the_base_too(empty: sa.Engine) -> None:
    migration.upgrade(empty, "pgqueue")
    migration.downgrade(empty, "pgqueue", "base")

    with pytest.raises(SchemaMissing, match="pgqueue db upgrade"):
        drain(empty)


def test_a_worker_with_newer_code_refuses_to_start_and_says_what_to_run(
    empty: sa.Engine, longer_history: Callable[[str], Path]
) -> None:
    migration.upgrade(empty, "pgqueue")
    add_job(empty)
    longer_history("pass")

    with pytest.raises(SchemaOutdated, match=rf"at revision {HEAD}, .* needs {NEXT}; .*: pgqueue db upgrade"):
        drain(empty)

    assert status(empty) == "pending"
    migration.upgrade(empty, "pgqueue")
    drain(empty)
    assert status(empty) == "completed"


def test_a_worker_with_older_code_works_and_warns(empty: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    migration.upgrade(empty, "pgqueue")
    add_job(empty)
    execute(empty, f"UPDATE {place(empty, 'alembic_version')} SET version_num = 'pgqueue_9999'")

    with caplog.at_level(logging.WARNING, "pgqueue"):
        drain(empty)

    assert status(empty) == "completed"
    assert "at revision pgqueue_9999, which is newer than this code" in caplog.text


def test_an_upgrade_by_older_code_leaves_newer_tables_alone(empty: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    """A deployment that is rolled back starts the old code's `db upgrade` again; it must not fail."""
    migration.upgrade(empty, "pgqueue")
    execute(empty, f"UPDATE {place(empty, 'alembic_version')} SET version_num = 'pgqueue_9999'")
    before = snapshot(empty, "pgqueue")

    with caplog.at_level(logging.WARNING, "pgqueue"):
        migration.upgrade(empty, "pgqueue")

    assert snapshot(empty, "pgqueue") == before
    assert "newer than this code" in caplog.text
    assert scalar(empty, f"SELECT version_num FROM {place(empty, 'alembic_version')}") == "pgqueue_9999"


def test_code_does_not_start_on_tables_of_an_empty_database_with_only_a_schema(empty_pg: sa.Engine) -> None:
    execute(empty_pg, "CREATE SCHEMA pgqueue")

    with pytest.raises(SchemaMissing, match="pgqueue db upgrade"):
        drain(empty_pg)
