"""Plans that a worker's sessions keep: made when the tables are empty, they are the ones for a million jobs."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from pgbouncer import Bouncer
from store.test_statements import HOT, INDEXES, indexes_in, nodes
from support import execute, scalar

from pgqueue import PgQueue, limits, plans, store, within_limits
from pgqueue.engine import make_engine
from pgqueue.job import JobStatus, Transition

#: What a worker's own sessions send again and again.
OF_WORKERS = sorted(HOT.keys() - {"enqueue", "enqueue_unique", "enqueue_many"})

#: How many jobs a rate lets start.
BURST = 3

PREPARED = """
    SELECT name, coalesce(cardinality(parameter_types), 0), generic_plans, custom_plans
      FROM pg_prepared_statements WHERE statement ~ 'pgqueue.jobs|limits' ORDER BY prepare_time
"""


@pytest.fixture
def keeping(pg: PgQueue) -> Iterator[sa.Connection]:
    """A session that keeps its plans, on tables that are empty and were never analyzed."""
    execute(pg.engine, "ALTER TABLE pgqueue.jobs SET (autovacuum_enabled = off)")
    with pg.engine.connect() as connection:
        assert plans.keep(connection)
        yield connection
        connection.invalidate()


def kept(connection: sa.Connection) -> list[dict[str, Any]]:
    """The plans that the session keeps for what it has sent to the tables of jobs and limits."""
    driver: Any = connection.connection.driver_connection
    found = []
    for name, parameters, generic, custom in driver.execute(PREPARED, prepare=False).fetchall():
        assert (generic > 0, custom) == (True, 0)
        values = f"({', '.join(['NULL'] * parameters)})" if parameters else ""
        explained = driver.execute(f'EXPLAIN (FORMAT JSON) EXECUTE "{name}"{values}', prepare=False)
        found.append(explained.fetchone()[0][0]["Plan"])
    driver.commit()
    return found


def unbounded(found: list[dict[str, Any]]) -> set[str | None]:
    """The indexes of jobs that plans read from end to end, however many entries there are; None: the table itself."""
    return {
        node.get("Index Name")
        for node in nodes(found)
        if node.get("Relation Name") == "jobs" and node["Node Type"].endswith("Scan") and "Index Cond" not in node
    }


@pytest.mark.parametrize("name", OF_WORKERS)
def test_a_plan_that_was_made_for_empty_tables_goes_by_the_index_for_millions(
    pg: PgQueue, keeping: sa.Connection, name: str
) -> None:
    HOT[name](keeping, pg, [(1, uuid.uuid4())])

    found = kept(keeping)

    assert [indexes_in(plan) for plan in found if indexes_in(plan)] == INDEXES[name]
    assert unbounded(found) <= ({"jobs_lease"} if name == "release_claim" else set()), "what is running"
    if name.startswith("claim"):
        assert "Sort" not in {node["Node Type"] for node in nodes(found)}


def test_the_plans_of_claims_within_limits_that_were_made_for_empty_tables_go_by_indexes(
    pg: PgQueue, keeping: sa.Connection
) -> None:
    claim = {"queue": "default", "worker": "w", "lease": 30, "tasks": ["work"], "limit": 10}
    pg.set_limits(task="work", concurrency=1, key_concurrency=1, rate=1e-6, burst=BURST)
    with pg.begin() as connection:
        limits.note_ordered(connection, pg.tables, "default")
    keeping.exec_driver_sql(
        "INSERT INTO pgqueue.jobs (task, concurrency_key, ordering_key) VALUES"
        " ('work', 'a', 'x'), ('work', 'b', 'y'), ('work', 'a', 'x'), ('work', NULL, 'y'), ('work', 'b', NULL)",
    )
    ran = []
    for number in range(within_limits.LOOK_AROUND_EVERY):  # one of these looks around
        for job in within_limits.claim(keeping, pg.tables, token=uuid.UUID(int=number), **claim).jobs:
            ran.append(job.id)
            done = Transition(job.id, job.claim_token, job.attempt, JobStatus.COMPLETED)
            store.finish(keeping, pg.tables, [done], actor="w")
    keeping.commit()
    pg.set_limits(task="work", concurrency=None, key_concurrency=None, rate=None)
    within_limits.claim(keeping, pg.tables, token=uuid.UUID(int=1), **claim)  # lets go of who waited
    keeping.commit()

    assert len(ran) == BURST
    found = kept(keeping)
    assert len(found) > 12
    assert unbounded(found) <= {"jobs_slots", "jobs_lease"}, "what is running"

    execute(pg.engine, "INSERT INTO pgqueue.jobs (task) SELECT 'work' FROM generate_series(1, 20000)")
    plans.renew(keeping)
    within_limits.claim(keeping, pg.tables, token=uuid.UUID(int=1), **claim)

    assert unbounded(kept(keeping)) <= {"jobs_slots"}


def test_a_claim_whose_plan_was_made_for_empty_tables_reads_no_backlog(pg: PgQueue, keeping: sa.Connection) -> None:
    def claim() -> int:
        claimed = store.claim(
            keeping, pg.tables, queue="default", worker="w", token=uuid.uuid4(), limit=10, lease=30, tasks=["work"]
        )
        keeping.commit()
        return len(claimed)

    assert claim() == 0
    execute(pg.engine, "INSERT INTO pgqueue.jobs (task) SELECT 'work' FROM generate_series(1, 100000)")

    assert claim() == 10

    keeping.exec_driver_sql("SELECT pg_stat_force_next_flush()")
    keeping.commit()
    assert keeping.scalar(sa.text("SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'jobs'")) == 0


def test_no_plans_are_kept_on_sqlite(sqlite_url: str) -> None:
    engine = make_engine(sqlite_url)
    with engine.connect() as connection:
        assert not plans.keep(connection)
    engine.dispose()


def test_no_plans_are_kept_behind_a_pooler(pg_url: str, bouncer: Bouncer) -> None:
    engine = make_engine(bouncer.url(pg_url))
    with engine.connect() as connection:
        assert not plans.keep(connection)
    engine.dispose()

    assert bouncer.left_behind(pg_url) == []


def test_the_settings_of_a_session_that_keeps_plans_end_with_it(pg: PgQueue) -> None:
    with pg.engine.connect() as connection:
        plans.keep(connection)
        connection.invalidate()

    assert scalar(pg.engine, "SELECT current_setting('enable_seqscan')") == "on"
