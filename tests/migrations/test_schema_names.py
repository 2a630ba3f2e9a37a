"""The schema's name is a parameter: a schema of its own on PostgreSQL, a prefix on SQLite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from catalog import snapshot
from sqlalchemy.orm import Session
from support import execute, rows, scalar

from pgqueue import ConfigurationError, PgQueue, SchemaMissing, Worker, WorkerConfig, migration


def run_a_job(engine: sa.Engine, schema: str) -> str:
    pgq = PgQueue(engine, schema=schema)

    @pgq.task
    def double(n: int) -> int:
        return 2 * n

    with Session(engine) as session, session.begin():
        job_id = double.enqueue(session, n=4).id
    Worker(pgq, WorkerConfig(drain=True)).run()
    return pgq.get_job(job_id).status


@pytest.mark.parametrize("schema", ["jobs_of_ours", "order", "a" * 48])
def test_jobs_run_in_a_schema_of_any_legal_name(empty: sa.Engine, schema: str) -> None:
    migration.upgrade(empty, schema)

    with empty.connect() as connection:
        assert migration.differences(connection, schema) == []
        assert migration.current_revision(connection, schema) == migration.head_revision()
    assert run_a_job(empty, schema) == "completed"


def test_the_sql_function_enqueues_into_its_own_schema(empty_pg: sa.Engine) -> None:
    for schema in ("first", "order"):
        migration.upgrade(empty_pg, schema)

    with empty_pg.begin() as connection:
        connection.execute(sa.text("""SELECT "order".enqueue('count', '{"n": 1}', priority => 5, max_retries => 1)"""))

    assert rows(empty_pg, 'SELECT task, priority, max_retries FROM "order".jobs') == [("count", 5, 1)]
    assert rows(empty_pg, "SELECT * FROM first.jobs") == []


def test_two_schemas_stand_side_by_side_in_one_database(empty: sa.Engine) -> None:
    """The second name begins with the first, so that a prefix alone does not tell them apart."""
    for schema in ("pgqueue", "pgqueue_two"):
        migration.upgrade(empty, schema)

    assert run_a_job(empty, "pgqueue_two") == "completed"

    flat = empty.dialect.name == "sqlite"
    assert scalar(empty, f"SELECT count(*) FROM pgqueue{'_' if flat else '.'}jobs") == 0
    with empty.connect() as connection:
        for schema in ("pgqueue", "pgqueue_two"):
            assert migration.differences(connection, schema) == []


def test_taking_one_schema_down_leaves_the_other(empty: sa.Engine) -> None:
    for schema in ("first", "second"):
        migration.upgrade(empty, schema)
    before = snapshot(empty, "second")

    migration.downgrade(empty, "first", "base")

    assert snapshot(empty, "second") == before
    with empty.connect() as connection, pytest.raises(SchemaMissing, match="'first'"):
        migration.require_current(connection, "first")


@pytest.mark.parametrize(
    "schema", ['a"b', "a;b", "A", "pg_queue", "1st", "a b", "a'b", "a.b", "", "a" * 49, "größe", "a\n", None, 7]
)
def test_other_names_are_refused_before_anything_happens(empty: sa.Engine, schema: Any) -> None:
    with empty.connect() as connection:
        calls: list[Callable[[], object]] = [
            lambda: migration.upgrade(empty, schema),
            lambda: migration.downgrade(empty, schema, "base"),
            lambda: migration.offline_sql(empty.dialect.name, schema),
            lambda: migration.current_revision(connection, schema),
            lambda: migration.differences(connection, schema),
        ]
        if schema is not None:  # which leaves it to the settings
            calls.append(lambda: PgQueue(empty, schema=schema))
        for call in calls:
            with pytest.raises(ConfigurationError, match="lower-case letters"):
                call()

    assert sa.inspect(empty).get_table_names() == []
    if empty.dialect.name == "postgresql":
        assert sa.inspect(empty).get_schema_names() == ["information_schema", "public"]


def test_an_application_may_have_tables_and_a_version_table_of_its_own(empty: sa.Engine) -> None:
    execute(empty, "CREATE TABLE jobs (id integer)")
    execute(empty, "CREATE TABLE alembic_version (version_num varchar(32))")
    execute(empty, "INSERT INTO alembic_version VALUES ('abc')")

    migration.upgrade(empty, "pgqueue")
    migration.downgrade(empty, "pgqueue", "base")

    assert rows(empty, "SELECT version_num FROM alembic_version") == [("abc",)]
    assert sa.inspect(empty).has_table("jobs")
