"""Beside a million jobs, nearly all of them finished: which index every statement goes by, and how much it reads.

With statistics that were made when the table was empty, and with fresh ones. A new table is in the first of these
states for its first minutes, whatever was put into it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pgserver
import pytest
from store.test_statements import HELD, HOLD, HOT, INDEXES, analyze, indexes_in, nodes, plans_of, recorded
from support import execute, scalar

from pgqueue import PgQueue, limits, operations, store, within_limits
from pgqueue.admission import Limits
from pgqueue.job import NewJob

JOBS = 1_000_000

#: Of the last 1 in 200 jobs most are open: 2,500 due, 1,500 scheduled, 1,000 dead or cancelled.
FINISHED = JOBS - JOBS // 200

COLUMNS = "task, payload, queue, priority, status, run_at, created_at, attempt, claimed_by, claimed_at, finished_at"

HISTORY = f"""
    INSERT INTO pgqueue.jobs ({COLUMNS})
    SELECT 'work', '{{}}', CASE WHEN n % 10 = 0 THEN 'mail' ELSE 'default' END, n % 3, 'completed',
           at, at, 1, 'w', at, at
      FROM generate_series(1, :count) AS n,
           LATERAL (SELECT now() - interval '1 day' - interval '1 s' * (:count - n)) AS t(at)
"""

PRESENT = f"""
    INSERT INTO pgqueue.jobs ({COLUMNS})
    SELECT 'work', '{{}}', CASE WHEN n % 10 = 0 THEN 'mail' ELSE 'default' END, n % 3, status,
           now() + CASE WHEN n % 10 IN (5, 6, 7) THEN interval '1 week' ELSE interval '-1 minute' END, now(), 0,
           NULL, NULL, CASE WHEN status IN ('dead', 'cancelled') THEN now() END
      FROM generate_series(1, :count) AS n,
           LATERAL (SELECT CASE n % 10 WHEN 8 THEN 'dead' WHEN 9 THEN 'cancelled' ELSE 'pending' END) AS s(status)
"""


EVENTS = """
    INSERT INTO pgqueue.job_events (job_id, queue, task, event, actor)
    SELECT n * 10, 'default', 'work', 'retry', 'w' FROM generate_series(1, :count / 500) AS n
"""


@pytest.fixture(scope="module")
def million(pg_server: pgserver.Server) -> Iterator[PgQueue]:
    """A queue with the million, analyzed when it was empty."""
    pgq = PgQueue(pg_server.create_database("million", "migrated"))
    execute(pgq.engine, "ALTER TABLE pgqueue.jobs SET (autovacuum_enabled = off)")
    analyze(pgq)
    execute(pgq.engine, HISTORY, count=FINISHED)
    execute(pgq.engine, PRESENT, count=JOBS - FINISHED)
    execute(pgq.engine, EVENTS, count=JOBS)
    execute(pgq.engine, HOLD, first=HELD[0], last=HELD[-1])
    with pgq.begin() as connection:
        store.insert_job(connection, pgq.tables, NewJob("work", "{}", unique_key="taken"))
    yield pgq
    pgq.dispose()
    pg_server.drop_database("million")


@pytest.fixture(scope="module", params=["made when it was empty", "fresh"])
def pgq(request: pytest.FixtureRequest, million: PgQueue) -> PgQueue:
    """The same with both kinds of statistics."""
    if request.param == "fresh":
        analyze(million)
    return million


#: Blocks of 8 kB that a statement may read and write for 100 claims, 200 extensions and so on. The table has 20,000.
BLOCKS = 6_000


def test_every_hot_statement_goes_by_its_index_and_reads_what_it_needs(pgq: PgQueue) -> None:
    plans = {name: plans_of(pgq, name) for name in HOT}

    assert {name: [indexes_in(plan) for plan in found] for name, found in plans.items()} == INDEXES
    assert {name for name, found in plans.items() if reads_jobs_in_sequence(found)} == set()
    assert {name: blocks(found) for name, found in plans.items() if blocks(found) > BLOCKS} == {}


@pytest.mark.parametrize("name", HOT)
def test_a_plan_for_any_parameters_goes_by_the_same_index(pgq: PgQueue, name: str) -> None:
    """Also without the settings of a worker's sessions: a driver of the application's may prepare as well."""
    if scalar(pgq.engine, "SELECT current_setting('server_version_num')::int") < 160_000:
        pytest.skip("EXPLAIN (GENERIC_PLAN) came with PostgreSQL 16")
    with pgq.engine.connect() as connection, recorded(pgq.engine) as sent:
        HOT[name](connection, pgq, [(job_id, uuid.uuid4()) for job_id in HELD])
        connection.rollback()

    plans = [generic_plan(pgq, statement) for statement, _ in sent]

    assert [indexes_in(plan) for plan in plans] == INDEXES[name]
    assert not reads_jobs_in_sequence(plans)


def generic_plan(pgq: PgQueue, statement: str) -> dict[str, Any]:
    names: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        return names.setdefault(match[1], f"${len(names) + 1}")

    numbered = re.sub(r"%\((\w+)\)s", number, statement).replace("%%", "%")
    with pgq.engine.connect() as connection:
        # Without parameters of its own psycopg sends the text as it is.
        found = connection.connection.driver_connection.execute(f"EXPLAIN (GENERIC_PLAN, FORMAT JSON) {numbered}")  # type: ignore[union-attr]
        plan: dict[str, Any] = found.fetchone()[0][0]["Plan"]
        return plan


def test_a_claim_within_limits_goes_by_its_indexes_and_reads_what_it_needs(pgq: PgQueue) -> None:
    every = Limits(concurrency=1_000, key_concurrency=5, rate=1e6, burst=1_000)
    with pgq.engine.connect() as connection:
        limits.put_limits(connection, pgq.tables, "task", "work", every, declared_by="test")
        limits.note_ordered(connection, pgq.tables, "default")
        claim = {"queue": "default", "worker": "w", "token": uuid.UUID(int=1), "lease": 30, "tasks": ["work"]}
        assert len(within_limits.claim(connection, pgq.tables, limit=10, **claim).jobs) == 10  # lets go what waited
        with recorded(pgq.engine) as sent:
            claimed = within_limits.claim(connection, pgq.tables, limit=100, **claim).jobs
        plans = [
            connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters).scalar_one()
            for statement, parameters in sent
        ]
        connection.rollback()

    assert len(claimed) == 100
    assert len(plans) == 3
    found = [plan[0]["Plan"] for plan in plans]
    assert not reads_jobs_in_sequence(found)
    assert blocks(found) <= BLOCKS


#: What people look at, and how many blocks it may read.
VIEWS: dict[str, tuple[Callable[[PgQueue], Any], int]] = {
    "queues": (lambda pgq: pgq.queues(), 2_000),  # 4,000 open jobs, and a sample of the others
    "the newest jobs": (lambda pgq: pgq.list_jobs(), 30),
    "the next page": (lambda pgq: pgq.list_jobs(before_id=JOBS // 2), 30),
    "pending jobs": (lambda pgq: pgq.list_jobs(status="pending"), 30),
    "pending jobs of a queue without any": (lambda pgq: pgq.list_jobs(status="pending", queue="none"), 200),
    "pending jobs before all that are": (lambda pgq: pgq.list_jobs(status="pending", before_id=JOBS // 2), 200),
    "running jobs": (lambda pgq: pgq.list_jobs(status="running"), 200),
    "dead jobs": (lambda pgq: pgq.list_jobs(status="dead"), 30),
    "dead jobs of a task without any": (lambda pgq: pgq.list_jobs(status="dead", task="none"), 250),
    "cancelled jobs": (lambda pgq: pgq.list_jobs(status="cancelled"), 30),
    "cancelled jobs before all that are": (lambda pgq: pgq.list_jobs(status="cancelled", before_id=JOBS // 2), 30),
    "completed jobs": (lambda pgq: pgq.list_jobs(status="completed", before_id=JOBS // 2), 30),
    "completed jobs of a task without any": (
        lambda pgq: pgq.page_of_jobs(status="completed", task="none", within=10_000),
        1_000,
    ),
    "one job": (lambda pgq: pgq.get_job(JOBS // 2), 10),
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_people_look_at_reads_no_history(pgq: PgQueue, name: str) -> None:
    look, blocks_max = VIEWS[name]

    with recorded(pgq.engine) as sent:
        look(pgq)

    assert sent
    plans = [explained(pgq, statement, parameters) for statement, parameters in sent]
    assert not reads_jobs_in_sequence(plans)
    assert blocks(plans) <= blocks_max


#: The views of docs/auditing.md, and how many blocks they may read: less than a tenth of the table for those that
#: people look at all the time, and no jobs in sequence. A block in memory takes some microseconds.
AUDIT: dict[str, int] = {
    "SELECT * FROM pgqueue.queue_summary": 2_000,
    "SELECT * FROM pgqueue.worker_status": 1_000,
    "SELECT * FROM pgqueue.stuck_jobs": 2_000,
    "SELECT * FROM pgqueue.dead_jobs": 1_000,
    f"SELECT * FROM pgqueue.job_history WHERE job_id = {JOBS // 2} ORDER BY job_id, at, position": 50,
}


@pytest.mark.parametrize("query", AUDIT)
def test_the_views_for_operators_read_no_history(pgq: PgQueue, query: str) -> None:
    plan = explained(pgq, query, None)

    assert not reads_jobs_in_sequence([plan])
    assert blocks([plan]) <= AUDIT[query]


#: How many times the whole table they may read. Their comments say that they take seconds.
HEAVY = {
    "SELECT * FROM pgqueue.throughput_minute": 1,
    "SELECT * FROM pgqueue.latency_hour": 1,
    "SELECT * FROM pgqueue.error_groups": 0,
    "SELECT count(*) FROM pgqueue.jobs_as_of(now() - interval '2 days')": 1,
}


@pytest.mark.parametrize("query", HEAVY)
def test_the_views_of_everything_read_it_once_and_say_so(pgq: PgQueue, query: str) -> None:
    size = scalar(pgq.engine, "SELECT pg_relation_size('pgqueue.jobs') / 8192")

    plan = explained(pgq, query, None)

    assert blocks([plan]) <= HEAVY[query] * size * 1.1 + 200
    name = query.partition("FROM ")[2].partition("(")[0]
    kind, catalog = ("regproc", "pg_proc") if "jobs_as_of" in query else ("regclass", "pg_class")
    comment = scalar(pgq.engine, f"SELECT obj_description(CAST('{name}' AS {kind}), '{catalog}')")
    assert "Reads all" in comment


def test_the_look_of_an_idle_worker_for_what_is_to_be_done_reads_no_table(pgq: PgQueue) -> None:
    with pgq.reading() as connection, recorded(pgq.engine) as sent:
        store.upkeep(connection, pgq.tables)

    plans = [explained(pgq, statement, parameters) for statement, parameters in sent]
    assert [indexes_in(plan) for plan in plans] == [{"jobs_lease", "jobs_prune", "jobs_expiry"}]
    assert blocks(plans) <= 20


@pytest.mark.parametrize("after_id", [0, JOBS // 2])
def test_a_step_of_a_prune_reads_what_it_passes_and_deletes(pgq: PgQueue, after_id: int) -> None:
    with pgq.engine.connect() as connection, recorded(pgq.engine) as sent:
        count, _ = operations.prune(connection, pgq.tables, older_than=0, after_id=after_id, limit=500)
        connection.rollback()

    assert count == 500
    plans = [explained(pgq, statement, parameters) for statement, parameters in sent]
    assert not reads_jobs_in_sequence(plans)
    assert blocks(plans) <= 5_000


def test_a_prune_of_nothing_reads_one_step(pgq: PgQueue) -> None:
    with recorded(pgq.engine) as sent:
        assert pgq.prune(older_than=10 * 365 * 86_400) == 0

    assert blocks([explained(pgq, statement, parameters) for statement, parameters in sent]) <= 200


def test_an_estimate_is_near(pgq: PgQueue) -> None:
    counted = {
        queue: scalar(
            pgq.engine, "SELECT count(*) FROM pgqueue.jobs WHERE status = 'completed' AND queue = :queue", queue=queue
        )
        for queue in ("default", "mail")
    }

    estimated = {summary.queue: summary.completed for summary in pgq.queues()}

    assert {queue: round(estimated[queue] / count, 1) for queue, count in counted.items()} == {
        queue: pytest.approx(1, abs=0.35) for queue in counted
    }


def explained(pgq: PgQueue, statement: str, parameters: Any) -> dict[str, Any]:
    with pgq.engine.connect() as connection:
        (found,) = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters).one()
        connection.rollback()
    plan: dict[str, Any] = found[0]["Plan"]
    return plan


def blocks(plans: list[dict[str, Any]]) -> int:
    return sum(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in plans)


def reads_jobs_in_sequence(plans: list[dict[str, Any]]) -> bool:
    return ("Seq Scan", "jobs") in {(node["Node Type"], node.get("Relation Name")) for node in nodes(plans)}
