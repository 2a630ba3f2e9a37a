"""Several deployers at once, a deployer that dies, a reader in the way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL

import pytest
import sqlalchemy as sa
from catalog import snapshot
from deployers import HEAD, NEXT, Deployers
from pgbouncer import Bouncer
from support import execute, rows, scalar, wait_for

from pgqueue import DatabaseUnreachable, PgQueue, SchemaOutdated, migration
from pgqueue.engine import make_engine

CONCURRENT_INDEX = """
with op.get_context().autocommit_block():
    op.execute("CREATE INDEX CONCURRENTLY jobs_task ON pgqueue.jobs (task)")
"""

BLOCKED = """
op.create_table("half_done", sa.Column("n", sa.Integer))
if "BLOCK" in os.environ:
    Path("migrating").touch()
    threading.Event().wait()
"""


def applied(deployers: Deployers, revision: str) -> int:
    return sum(process.output().count(f"-> {revision}") for process in deployers.processes)


def run_together(deployers: Deployers, url: str) -> None:
    for _ in range(6):
        deployers.start(url)
    deployers.go()
    for process in deployers.processes:
        assert process.wait() == 0, process.output()


def test_of_six_deployers_at_once_one_migrates_and_all_succeed(
    empty: sa.Engine, empty_url: str, deployers: Deployers
) -> None:
    run_together(deployers, empty_url)

    assert applied(deployers, "pgqueue_0001") == 1
    with empty.connect() as connection:
        assert migration.differences(connection, "pgqueue") == []


def test_deployers_that_wait_do_not_deadlock_with_a_concurrent_index(
    empty_pg: sa.Engine, empty_pg_url: str, deployers: Deployers, longer_history: Callable[[str], Path]
) -> None:
    longer_history(CONCURRENT_INDEX)

    run_together(deployers, empty_pg_url)

    assert (applied(deployers, HEAD), applied(deployers, NEXT)) == (1, 1)
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'pgqueue.jobs_task'::regclass"
    assert scalar(empty_pg, valid) is True


def test_of_deployers_behind_a_pooler_and_before_it_one_migrates_and_all_succeed(
    empty_pg: sa.Engine,
    empty_pg_url: str,
    bouncer: Bouncer,
    deployers: Deployers,
    longer_history: Callable[[str], Path],
) -> None:
    longer_history(CONCURRENT_INDEX)
    for url in (bouncer.url(empty_pg_url), empty_pg_url, bouncer.url(empty_pg_url)):
        deployers.start(url)

    deployers.go()

    for process in deployers.processes:
        assert process.wait() == 0, process.output()
    assert [applied(deployers, revision) for revision in ("pgqueue_0001", HEAD, NEXT)] == [1, 1, 1]


def test_when_the_migrating_deployer_is_killed_the_next_one_goes_on(
    empty_pg: sa.Engine, empty_pg_url: str, deployers: Deployers, longer_history: Callable[[str], Path]
) -> None:
    longer_history(BLOCKED)
    deployers.go()
    killed = deployers.start(empty_pg_url, BLOCK="1")
    wait_for(lambda: (deployers.folder / "migrating").exists(), "the first deployer to be within its migration")
    next_one = deployers.start(empty_pg_url)
    polling = "SELECT count(*) FROM pg_stat_activity WHERE query = 'ROLLBACK' AND application_name = 'pgqueue'"
    wait_for(lambda: scalar(empty_pg, polling) == 1, "the second deployer to wait for the first")
    assert next_one.process.poll() is None

    killed.signal(SIGKILL)

    assert next_one.wait() == 0, next_one.output()
    assert rows(empty_pg, "SELECT version_num FROM pgqueue.alembic_version") == [(NEXT,)]
    assert sa.inspect(empty_pg).has_table("half_done")


def test_when_the_migrating_deployer_is_killed_on_sqlite_nothing_of_it_stays(
    tmp_path: Path, deployers: Deployers, longer_history: Callable[[str], Path]
) -> None:
    url = f"sqlite:///{tmp_path}/killed.db"
    longer_history(BLOCKED)
    deployers.go()
    killed = deployers.start(url, BLOCK="1")
    wait_for(lambda: (deployers.folder / "migrating").exists(), "the first deployer to be within its migration")
    next_one = deployers.start(url)

    killed.signal(SIGKILL)

    assert next_one.wait() == 0, next_one.output()
    assert applied(deployers, "pgqueue_0001") == 2, "the second had to start from the beginning"


def test_threads_may_migrate_several_schemas_at_once(empty: sa.Engine) -> None:
    schemas = ["one", "two", "three"] * 2

    with ThreadPoolExecutor(len(schemas)) as pool:
        list(pool.map(lambda schema: migration.upgrade(empty, schema), schemas))

    with empty.connect() as connection:
        for schema in set(schemas):
            assert migration.differences(connection, schema) == []


def test_a_deployer_that_waited_too_long_for_another_says_so(empty_pg: sa.Engine) -> None:
    with (
        migration.exclusive(empty_pg, "pgqueue"),
        pytest.raises(SchemaOutdated, match=r"another process has been migrating schema 'pgqueue' for 0\.1 seconds"),
    ):
        migration.upgrade(empty_pg, "pgqueue", wait=0.1)

    assert not sa.inspect(empty_pg).has_schema("pgqueue")


def test_a_deployer_whose_lock_was_lost_begins_no_further_revision(empty_pg: sa.Engine) -> None:
    holders = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND database = "
    holders += "(SELECT oid FROM pg_database WHERE datname = current_database())"

    def migrate() -> None:
        with migration.exclusive(empty_pg, "pgqueue") as connection:
            assert rows(empty_pg, holders) == [(True,)]
            connection.execute(sa.text("CREATE TABLE half_done (n int)"))

    with pytest.raises(DatabaseUnreachable, match="terminating connection"):
        migrate()

    assert not sa.inspect(empty_pg).has_table("half_done")


def test_deployers_of_different_schemas_do_not_wait_for_each_other(empty_pg: sa.Engine) -> None:
    with migration.exclusive(empty_pg, "first"):
        migration.upgrade(empty_pg, "second", wait=0.1)

    assert sa.inspect(empty_pg).has_table("jobs", schema="second")


def test_a_migration_gives_up_rather_than_queue_everybody_behind_a_long_reader(
    pg: PgQueue, longer_history: Callable[[str], Path]
) -> None:
    longer_history(
        "op.create_table('half_done', sa.Column('n', sa.Integer))\n"
        "op.add_column('jobs', sa.Column('extra', sa.Text), schema='pgqueue')"
    )
    before = snapshot(pg.engine, "pgqueue")

    with pg.engine.begin() as reader:
        reader.execute(sa.text("SELECT count(*) FROM pgqueue.jobs"))
        with pytest.raises(SchemaOutdated, match=r"waited 0\.2 seconds for a lock .* pg_stat_activity"):
            migration.upgrade(pg.engine, "pgqueue", lock_timeout=0.2)

    assert snapshot(pg.engine, "pgqueue") == before
    assert not sa.inspect(pg.engine).has_table("half_done")
    assert rows(pg.engine, "SELECT version_num FROM pgqueue.alembic_version") == [(HEAD,)]
    migration.upgrade(pg.engine, "pgqueue", lock_timeout=0.2)
    assert rows(pg.engine, "SELECT version_num FROM pgqueue.alembic_version") == [(NEXT,)]


def test_by_default_a_migration_waits_five_seconds_for_a_lock(
    pg: PgQueue, longer_history: Callable[[str], Path]
) -> None:
    longer_history("op.execute(\"CREATE TABLE seen AS SELECT current_setting('lock_timeout') AS lock_timeout\")")

    migration.upgrade(pg.engine, "pgqueue")

    assert scalar(pg.engine, "SELECT lock_timeout FROM seen") == "5s"


def test_a_migration_leaves_no_lock_and_no_setting_behind(empty_pg: sa.Engine) -> None:
    migration.upgrade(empty_pg, "pgqueue")

    assert scalar(empty_pg, "SHOW lock_timeout") == "0"
    assert rows(empty_pg, ADVISORY_LOCKS) == []


def test_a_migration_through_a_pooler_leaves_nothing_in_the_sessions_of_others(
    empty_pg: sa.Engine, empty_pg_url: str, bouncer: Bouncer
) -> None:
    through = make_engine(bouncer.url(empty_pg_url))

    migration.upgrade(through, "pgqueue")

    through.dispose()
    assert rows(empty_pg, ADVISORY_LOCKS) == []
    assert bouncer.left_behind(empty_pg_url) == []
    migration.upgrade(empty_pg, "pgqueue", wait=0)


def test_a_pooler_with_too_few_server_connections_for_a_migration_is_told_of(
    empty_pg: sa.Engine, empty_pg_url: str, make_bouncer: Callable[..., Bouncer]
) -> None:
    bouncer = make_bouncer(default_pool_size=1, query_wait_timeout=1)
    through = make_engine(bouncer.url(empty_pg_url))

    with pytest.raises(DatabaseUnreachable, match=r"query_wait_timeout, .* all of them were taken\. Give it more"):
        migration.upgrade(through, "pgqueue")

    through.dispose()
    assert not sa.inspect(empty_pg).has_schema("pgqueue")


ADVISORY_LOCKS = """
    SELECT * FROM pg_locks WHERE locktype = 'advisory' AND database =
    (SELECT oid FROM pg_database WHERE datname = current_database())
"""


def test_a_failed_revision_leaves_the_tables_as_they_were(url: str, longer_history: Callable[[str], Path]) -> None:
    longer_history(
        "op.create_table('half_done', sa.Column('n', sa.Integer))\nop.execute('SELECT * FROM nothing_there')"
    )
    engine = PgQueue(url).engine
    before = snapshot(engine, "pgqueue")

    with pytest.raises(sa.exc.DBAPIError, match="nothing_there"):
        migration.upgrade(engine, "pgqueue")

    assert snapshot(engine, "pgqueue") == before
    assert not sa.inspect(engine).has_table("half_done")
    with engine.connect() as connection:
        assert migration.current_revision(connection, "pgqueue") == HEAD
    engine.dispose()


def test_a_failure_keeps_the_revisions_before_it_on_postgresql_and_none_on_sqlite(
    empty: sa.Engine, longer_history: Callable[[str], Path]
) -> None:
    longer_history("op.execute('SELECT * FROM nothing_there')")

    with pytest.raises(sa.exc.DBAPIError, match="nothing_there"):
        migration.upgrade(empty, "pgqueue")

    with empty.connect() as connection:
        reached = migration.current_revision(connection, "pgqueue")
    assert reached == (None if empty.dialect.name == "sqlite" else HEAD)


def test_an_applications_plain_sqlite_engine_is_safe_too(tmp_path: Path, longer_history: Callable[[str], Path]) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/plain.db", poolclass=sa.NullPool)
    migration.upgrade(engine, "pgqueue")
    longer_history(
        "op.create_table('half_done', sa.Column('n', sa.Integer))\nop.execute('SELECT * FROM nothing_there')"
    )

    with pytest.raises(sa.exc.DBAPIError, match="nothing_there"):
        migration.upgrade(engine, "pgqueue")

    assert not sa.inspect(engine).has_table("half_done")
    execute(engine, "INSERT INTO pgqueue_jobs (task) VALUES ('still_usable')")
