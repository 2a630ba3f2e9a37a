"""The revisions: one line, up and down, and at its end the tables that the code expects."""

from __future__ import annotations

import re
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory
from catalog import snapshot
from support import execute, rows

from pgqueue import ConfigurationError, migration
from pgqueue.schema import tables_for


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(migration.migrations_path()))
    config.set_main_option("path_separator", "newline")
    return ScriptDirectory.from_config(config)


def differences(engine: sa.Engine) -> list[object]:
    with engine.connect() as connection:
        return migration.differences(connection, "pgqueue")


def current(engine: sa.Engine) -> str | None:
    with engine.connect() as connection:
        return migration.current_revision(connection, "pgqueue")


def drop_claim_index(engine: sa.Engine) -> None:
    execute(engine, f"DROP INDEX {'pgqueue_' if engine.dialect.name == 'sqlite' else 'pgqueue.'}jobs_claim")


def jobs(engine: sa.Engine) -> str:
    return "pgqueue_jobs" if engine.dialect.name == "sqlite" else "pgqueue.jobs"


def test_the_history_has_one_head() -> None:
    assert scripts().get_heads() == [migration.head_revision()]


def test_revisions_are_numbered_without_a_gap_and_their_files_say_what_they_do() -> None:
    revisions = list(reversed(list(scripts().walk_revisions())))

    assert [script.revision for script in revisions] == [f"pgqueue_{n:04}" for n in range(1, len(revisions) + 1)]
    files = sorted(path.name for path in (migration.migrations_path() / "versions").glob("*.py"))
    assert len(files) == len(revisions)
    for script, file in zip(revisions, files, strict=True):
        assert re.fullmatch(rf"{script.revision}_[a-z0-9]+(_[a-z0-9]+)+\.py", file)
        assert len(script.revision) <= 32, "Alembic's column holds no more"


def test_the_first_revision_starts_the_branch_pgqueue() -> None:
    first = scripts().get_revision("pgqueue_0001")

    assert (first.down_revision, first.branch_labels) == (None, {"pgqueue"})


def test_revisions_do_not_depend_on_the_code() -> None:
    for path in (migration.migrations_path() / "versions").glob("*.py"):
        assert not re.search(r"^\s*(from|import) pgqueue", path.read_text(), re.MULTILINE), path.name


def test_an_upgrade_creates_what_the_code_expects(empty: sa.Engine) -> None:
    migration.upgrade(empty, "pgqueue")

    assert current(empty) == migration.head_revision()
    assert differences(empty) == []


def test_a_second_upgrade_changes_nothing(empty: sa.Engine) -> None:
    migration.upgrade(empty, "pgqueue")
    before = snapshot(empty, "pgqueue")

    migration.upgrade(empty, "pgqueue")

    assert snapshot(empty, "pgqueue") == before


def test_up_down_and_up_again_ends_with_the_same_tables(empty: sa.Engine) -> None:
    migration.upgrade(empty, "pgqueue")
    before = snapshot(empty, "pgqueue")

    migration.downgrade(empty, "pgqueue", "base")
    in_between = snapshot(empty, "pgqueue")
    migration.upgrade(empty, "pgqueue")

    assert not any(in_between.values()), "a downgrade to the base leaves nothing"
    assert any(before.values())
    assert snapshot(empty, "pgqueue") == before


def test_each_revision_can_be_taken_back_and_applied_again(empty: sa.Engine) -> None:
    for script in reversed(list(scripts().walk_revisions())):
        migration.upgrade(empty, "pgqueue", script.revision)
        migration.downgrade(empty, "pgqueue", script.down_revision or "base")
        assert current(empty) == script.down_revision
        migration.upgrade(empty, "pgqueue", script.revision)

    assert differences(empty) == []


def test_a_dropped_column_is_a_difference(empty: sa.Engine) -> None:
    migration.upgrade(empty, "pgqueue")

    execute(empty, f"ALTER TABLE {jobs(empty)} DROP COLUMN progress")

    assert [(found[0], found[3].name) for found in differences(empty)] == [("add_column", "progress")]


def test_a_dropped_index_is_a_difference(empty: sa.Engine) -> None:
    migration.upgrade(empty, "pgqueue")

    drop_claim_index(empty)

    assert [found[0] for found in differences(empty)] == ["add_index"]


def test_models_and_migrations_agree_in_everything_the_database_can_tell(empty: sa.Engine) -> None:
    """Alembic does not compare CHECKs, predicates and orders of indexes, defaults, identities."""
    migration.upgrade(empty, "pgqueue")
    if empty.dialect.name == "postgresql":
        execute(empty, "CREATE SCHEMA built")
    tables_for(empty.dialect.name, "built").metadata.create_all(empty)

    migrated, built = snapshot(empty, "pgqueue"), snapshot(empty, "built")

    migrated, built = without_views_and_functions(migrated), without_views_and_functions(built)
    assert all(migrated.values())
    assert migrated == built


def without_views_and_functions(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """What is left without what only a migration makes."""
    views = {row[0] for row in found.get("views", [])}
    return {
        kind: [row for row in rows if isinstance(row, str) or row[0] not in views]
        for kind, rows in found.items()
        if kind not in ("views", "functions") and not kind.startswith("view ")
    }


def test_the_comparison_sees_what_alembic_does_not(empty: sa.Engine) -> None:
    """Guards the test above: what it compares must be able to differ."""
    migration.upgrade(empty, "pgqueue")
    before = snapshot(empty, "pgqueue")

    drop_claim_index(empty)
    name = "pgqueue_jobs_claim" if empty.dialect.name == "sqlite" else "jobs_claim"
    execute(empty, f"CREATE INDEX {name} ON {jobs(empty)} (queue, priority DESC, run_at, id) WHERE status = 'dead'")

    assert differences(empty) == [], "Alembic now compares predicates: see what else it does"
    assert snapshot(empty, "pgqueue") != before


def test_every_table_column_and_function_has_a_comment_on_postgresql(empty_pg: sa.Engine) -> None:
    migration.upgrade(empty_pg, "pgqueue")

    found = snapshot(empty_pg, "pgqueue")

    assert len(found["columns"]) > 40
    assert [row[:3] for row in found["columns"] if not row[-1]] == []
    assert [row for row in found["tables"] if not row[-1]] == []
    assert [row[0] for row in found["functions"] if not row[-1]] == []


def test_the_version_table_stands_beside_the_tables(empty: sa.Engine) -> None:
    migration.upgrade(empty, "pgqueue")

    table = "pgqueue_alembic_version" if empty.dialect.name == "sqlite" else "pgqueue.alembic_version"
    assert rows(empty, f"SELECT version_num FROM {table}") == [(migration.head_revision(),)]
    default = sa.inspect(empty).get_table_names()
    assert "alembic_version" not in default, "that name belongs to the application"


@pytest.mark.parametrize("run", [migration.upgrade, migration.downgrade])
def test_an_unknown_revision_is_refused_by_name(empty: sa.Engine, run: object) -> None:
    migration.upgrade(empty, "pgqueue")
    before = snapshot(empty, "pgqueue")

    with pytest.raises(ConfigurationError, match="'pgqueue_7777'"):
        run(empty, "pgqueue", "pgqueue_7777")  # type: ignore[operator]

    assert snapshot(empty, "pgqueue") == before


def test_an_applications_autocommit_engine_is_no_danger(empty_pg: sa.Engine, longer_history: object) -> None:
    migration.upgrade(empty_pg, "pgqueue")
    longer_history("op.execute('CREATE TABLE pgqueue.half (n int)')\nop.execute('SELECT 1 / 0')")  # type: ignore[operator]
    engine = empty_pg.execution_options(isolation_level="AUTOCOMMIT")

    with pytest.raises(sa.exc.DBAPIError, match="division by zero"):
        migration.upgrade(engine, "pgqueue")

    assert not sa.inspect(empty_pg).has_table("half", schema="pgqueue"), "a revision is one transaction"
