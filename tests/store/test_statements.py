"""The SQL of the statements that run all the time: what it is, to be read in a review, and which indexes it uses.

`statements/*.sql` hold what is sent. After a change on purpose write them anew, with PGQUEUE_REWRITE_STATEMENTS=1,
and read the difference.
"""

from __future__ import annotations

import os
import re
import textwrap
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from support import execute

from pgqueue import JobStatus, OnConflict, PgQueue, expiry, results, retention, sharing, store
from pgqueue.job import ErrorInfo, EventType, NewJob, Transition

STATEMENTS = Path(__file__).parent / "statements"

REWRITES = "PGQUEUE_REWRITE_STATEMENTS"

Claims = list[tuple[int, uuid.UUID]]

#: Each runs on a connection, and gets claims to be extended or finished.
HOT: dict[str, Callable[[sa.Connection, PgQueue, Claims], Any]] = {
    "enqueue": lambda connection, pgq, claims: store.insert_job(connection, pgq.tables, NewJob("work", "{}")),
    "enqueue_unique": lambda connection, pgq, claims: store.insert_job(
        connection, pgq.tables, NewJob("work", "{}", unique_key="taken"), on_conflict=OnConflict.SKIP
    ),
    "enqueue_many": lambda connection, pgq, claims: store.insert_jobs(
        connection, pgq.tables, NewJob("work", "{}"), ["{}", "{}"]
    ),
    "claim": lambda connection, pgq, claims: store.claim(
        connection, pgq.tables, queue="default", worker="w", token=uuid.uuid4(), limit=100, lease=30, tasks=["work"]
    ),
    "claim_unflushed": lambda connection, pgq, claims: store.claim(
        connection, pgq.tables, queue="default", worker="w", token=uuid.uuid4(), limit=100, lease=30, flush=False
    ),
    "is_any_pending": lambda connection, pgq, claims: store.is_any_pending(connection, pgq.tables, queue="default"),
    "extend": lambda connection, pgq, claims: store.extend(connection, pgq.tables, claims, lease=30),
    "complete": lambda connection, pgq, claims: store.finish(
        connection,
        pgq.tables,
        [Transition(job_id, token, 1, JobStatus.COMPLETED, result_json="1") for job_id, token in claims],
        actor="w",
    ),
    "complete_alike": lambda connection, pgq, claims: store.finish(
        connection,
        pgq.tables,
        [Transition(job_id, claims[0][1], 1, JobStatus.COMPLETED) for job_id in range(1, 11)],
        actor="w",
    ),
    "complete_in_transaction": lambda connection, pgq, claims: store.complete_in_transaction(
        connection, pgq.tables, Transition(*claims[0], 1, JobStatus.COMPLETED, result_json="1"), frozen_after=30
    ),
    "retry": lambda connection, pgq, claims: store.finish(
        connection,
        pgq.tables,
        [
            Transition(
                job_id,
                token,
                1,
                JobStatus.PENDING,
                EventType.RETRY,
                delay_seconds=5.0,
                charge_retry=True,
                error=ErrorInfo("E", "m"),
            )
            for job_id, token in claims
        ],
        actor="w",
    ),
    "complete_keeping": lambda connection, pgq, claims: retention.finish(
        connection,
        pgq.tables,
        [Transition(job_id, token, 1, JobStatus.COMPLETED, keep_seconds=60.0) for job_id, token in claims],
        actor="w",
    ),
    "complete_deleting": lambda connection, pgq, claims: retention._delete(
        connection,
        pgq.tables,
        [Transition(job_id, claims[0][1], 1, JobStatus.COMPLETED, keep_seconds=0.0) for job_id in range(1, 11)],
    ),
    "expire": lambda connection, pgq, claims: expiry.expire(connection, pgq.tables, limit=100, actor="w"),
    "prune_due": lambda connection, pgq, claims: retention.prune_due(connection, pgq.tables, limit=100),
    "results": lambda connection, pgq, claims: results.look(connection, pgq.tables, [1, 2]),
    "sweep": lambda connection, pgq, claims: store.sweep(connection, pgq.tables, limit=100, actor="w"),
    "upkeep": lambda connection, pgq, claims: store.upkeep(connection, pgq.tables),
    "release_claim": lambda connection, pgq, claims: store.release_claim(
        connection, pgq.tables, uuid.uuid4(), actor="w"
    ),
    "others_may_be_free": lambda connection, pgq, claims: sharing.others_may_be_free(
        connection, pgq.tables, queue="default", worker="w", tasks=["work"], seconds=60
    ),
}


@contextmanager
def recorded(engine: sa.Engine) -> Iterator[list[tuple[str, Any]]]:
    """What is sent meanwhile to the tables of jobs: statements with their parameters. Events are left out."""
    sent: list[tuple[str, Any]] = []

    def record(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if "jobs" in statement and not re.match(r"EXPLAIN|(INSERT INTO|DELETE FROM) \S*job_events", statement):
            sent.append((statement, parameters))

    sa.event.listen(engine, "before_cursor_execute", record)
    try:
        yield sent
    finally:
        sa.event.remove(engine, "before_cursor_execute", record)


def statements_of(pgq: PgQueue, name: str, claims: Claims) -> list[tuple[str, Any]]:
    """Run one of HOT, take it back, and tell what was sent."""
    with pgq.engine.connect() as connection, recorded(pgq.engine) as sent:
        HOT[name](connection, pgq, claims)
        connection.rollback()
    return sent


# What is sent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOT)
def test_a_hot_statement_is_what_was_reviewed(pgq: PgQueue, name: str) -> None:
    with pgq.begin() as connection:
        store.insert_job(connection, pgq.tables, NewJob("work", "{}", unique_key="taken"))
    file = STATEMENTS / f"{name}.{pgq.engine.dialect.name}.sql"

    sent = statements_of(pgq, name, [(1, uuid.uuid4())])

    text = "\n\n".join(readable(statement) + ";" for statement, _ in sent) + "\n"
    if os.environ.get(REWRITES):
        file.write_text(text, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == text, f"changed on purpose? Run the test again with {REWRITES}=1"


def test_there_is_no_file_of_a_statement_that_is_gone() -> None:
    assert {file.name for file in STATEMENTS.iterdir()} == {
        f"{name}.{dialect}.sql" for name in HOT for dialect in ("postgresql", "sqlite")
    }


#: Where a new line begins.
CLAUSE = (
    r"(?<!\w)(?:WITH RECURSIVE|UNION ALL|(?<!FOR )UPDATE|INSERT INTO|SELECT|SET|FROM|JOIN|WHERE|AND|ORDER BY|LIMIT"
    r"|FOR UPDATE|ON CONFLICT|VALUES|RETURNING)(?!\w)"
)


def readable(statement: str) -> str:
    """A clause a line, indented by its parentheses."""
    lines: list[str] = []
    depth = 0
    for piece in re.split(f"(?={CLAUSE})", " ".join(statement.split())):
        indent = "    " * depth
        lines += textwrap.wrap(
            piece.strip(), 118, initial_indent=indent, subsequent_indent=f"{indent}    ", break_on_hyphens=False
        )
        depth += piece.count("(") - piece.count(")")
    return "\n".join(lines)


# Plans on PostgreSQL ---------------------------------------------------------------------------------------

ROWS = 100_000

#: Jobs that are held, for statements that need some: they stand in the middle of the table.
HELD = range(50_001, 50_201)

FINISH = """
    UPDATE pgqueue.jobs
       SET status = CASE WHEN id % 50 = 0 THEN 'dead' ELSE 'completed' END, attempt = 1, claimed_by = 'w',
           claimed_at = now(), finished_at = now() - interval '1 hour' * (id % 100)
     WHERE status = 'pending' AND id % 100 <> 1
"""

HOLD = """
    UPDATE pgqueue.jobs
       SET status = 'running', attempt = 1, claimed_by = 'w', claimed_at = now(), claim_token = gen_random_uuid(),
           claim_expires_at = now() + interval '30 s' * (id % 7), finished_at = NULL
     WHERE id BETWEEN :first AND :last
"""


def enqueue(
    pg: PgQueue, count: int = ROWS, *, run_at: str = "now() - interval '1 s' * (n % 1000)", keys: str = "key"
) -> None:
    execute(
        pg.engine,
        "INSERT INTO pgqueue.jobs (task, payload, queue, priority, run_at, unique_key) "
        "SELECT 'work', jsonb_build_object('n', n), CASE WHEN n % 10 = 0 THEN 'mail' ELSE 'default' END, n % 3, "
        f"{run_at}, CASE WHEN n % 5 = 0 THEN :keys || n END FROM generate_series(1, :count) AS n",
        count=count,
        keys=keys,
    )


def analyze(pg: PgQueue) -> None:
    execute(pg.engine, "ANALYZE pgqueue.jobs")


def a_backlog(pg: PgQueue) -> None:
    enqueue(pg)
    analyze(pg)


def a_backlog_never_analyzed(pg: PgQueue) -> None:
    enqueue(pg)


def a_backlog_analyzed_when_empty(pg: PgQueue) -> None:
    analyze(pg)
    enqueue(pg)


def a_backlog_analyzed_when_all_had_finished(pg: PgQueue) -> None:
    enqueue(pg, ROWS // 2)
    execute(pg.engine, FINISH)
    analyze(pg)
    enqueue(pg, ROWS // 2)


def a_past(pg: PgQueue) -> None:
    """99 of 100 jobs are finished."""
    enqueue(pg)
    execute(pg.engine, FINISH)
    analyze(pg)


def a_past_analyzed_when_all_were_pending(pg: PgQueue) -> None:
    enqueue(pg)
    analyze(pg)
    execute(pg.engine, FINISH)


def a_future(pg: PgQueue) -> None:
    """Nearly all jobs are scheduled for next week."""
    enqueue(pg, ROWS - 500, run_at="now() + interval '1 week' + interval '1 s' * n")
    enqueue(pg, 500, keys="other")
    analyze(pg)


TABLES = [
    a_backlog,
    a_backlog_never_analyzed,
    a_backlog_analyzed_when_empty,
    a_backlog_analyzed_when_all_had_finished,
    a_past,
    a_past_analyzed_when_all_were_pending,
    a_future,
]

#: The indexes of jobs that each hot statement goes by, and no other. An arbiter decides ON CONFLICT.
INDEXES: dict[str, list[set[str]]] = {
    "enqueue": [set()],
    "enqueue_unique": [{"arbiter jobs_unique_key"}, {"jobs_unique_key"}],
    "enqueue_many": [set()],
    "claim": [{"jobs_claim"}, {"jobs_claim", "pk_jobs"}],
    "claim_unflushed": [{"jobs_claim"}, {"jobs_claim", "pk_jobs"}],
    "is_any_pending": [{"jobs_claim"}],
    "extend": [{"pk_jobs"}, {"pk_jobs"}],
    "complete": [{"pk_jobs"}],
    "complete_alike": [{"pk_jobs"}],
    "complete_in_transaction": [{"pk_jobs"}],
    "retry": [{"pk_jobs"}],
    "complete_keeping": [{"pk_jobs"}],
    "complete_deleting": [{"pk_jobs", "job_events_job"}],
    "expire": [{"jobs_expiry", "pk_jobs"}],
    "prune_due": [{"jobs_prune"}],
    "results": [{"pk_jobs"}],
    "sweep": [{"jobs_lease", "pk_jobs"}],
    "upkeep": [{"jobs_lease", "jobs_expiry", "jobs_prune"}],
    "release_claim": [{"jobs_lease"}],
    "others_may_be_free": [{"jobs_claim"}],
}


@pytest.mark.parametrize("fill", TABLES, ids=lambda fill: fill.__name__)
def test_every_hot_statement_goes_by_its_index_whatever_the_statistics_say(
    pg: PgQueue, fill: Callable[[PgQueue], None]
) -> None:
    execute(pg.engine, "ALTER TABLE pgqueue.jobs SET (autovacuum_enabled = off)")
    fill(pg)
    execute(pg.engine, HOLD, first=HELD[0], last=HELD[-1])
    with pg.begin() as connection:
        store.insert_job(connection, pg.tables, NewJob("work", "{}", unique_key="taken"))

    plans = {name: plans_of(pg, name) for name in HOT}

    assert {name: [indexes_in(plan) for plan in found] for name, found in plans.items()} == INDEXES
    kinds = {name: {(node["Node Type"], node.get("Relation Name")) for node in nodes(plans[name])} for name in plans}
    assert [name for name in kinds if ("Seq Scan", "jobs") in kinds[name]] == []
    # A claim takes the first that are due as the index has them, and collects and sorts no backlog.
    assert ("Sort", None) not in kinds["claim"]
    assert [
        node["Index Name"]
        for node in nodes(plans["claim"])
        if node["Node Type"] == "Bitmap Index Scan" and node["Index Name"].startswith("jobs_")
    ] == []
    # Blocks of 8 kB: a claim of 100 among 100,000 reads for each job a few index pages and the job.
    assert max(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in plans["claim"]) < 3_000


def plans_of(pg: PgQueue, name: str) -> list[dict[str, Any]]:
    """The plans of what one of HOT sends, as they were executed and taken back."""
    jobs = pg.tables.jobs
    with pg.begin() as connection:
        held = connection.execute(sa.select(jobs.c.id, jobs.c.claim_token).where(jobs.c.id.in_(HELD)))
        claims = [(row.id, row.claim_token) for row in held]
    assert len(claims) == len(HELD)

    plans = []
    for statement, parameters in statements_of(pg, name, claims):
        with pg.engine.connect() as connection:
            (found,) = connection.exec_driver_sql(
                f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters
            ).one()
            connection.rollback()
        plans.append(found[0]["Plan"])
    return plans


def nodes(plans: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for plan in plans:
        yield plan
        yield from nodes(plan.get("Plans", []))


def indexes_in(plan: dict[str, Any]) -> set[str]:
    found = {node["Index Name"] for node in nodes([plan]) if "Index Name" in node}
    found |= {f"arbiter {name}" for node in nodes([plan]) for name in node.get("Conflict Arbiter Indexes", [])}
    return found - {"pk_queues", "pk_limits"}


def test_a_sequential_scan_would_be_seen(pg: PgQueue) -> None:
    """Guards the test above: it fails when an index is missing."""
    enqueue(pg, 10_000)
    execute(pg.engine, HOLD, first=1, last=200)
    execute(pg.engine, "DROP INDEX pgqueue.jobs_lease")

    with pg.engine.connect() as connection, recorded(pg.engine) as sent:
        HOT["sweep"](connection, pg, [])
        connection.rollback()
        ((found,),) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {sent[0][0]}", sent[0][1]).all()

    kinds = {(node["Node Type"], node.get("Relation Name")) for node in nodes([found[0]["Plan"]])}
    assert ("Seq Scan", "jobs") in kinds
    assert {"Sort"} & {kind for kind, _ in kinds}


# Plans on SQLite -------------------------------------------------------------------------------------------

#: How each table of jobs is read, in the order of the plan. An INSERT reads none.
SQLITE_PLANS: dict[str, list[str]] = {
    "enqueue": [],
    "enqueue_unique": ["INDEX pgqueue_jobs_unique_key"],
    "enqueue_many": [],
    "claim": ["INTEGER PRIMARY KEY", "INDEX pgqueue_jobs_claim"],
    "claim_unflushed": ["INTEGER PRIMARY KEY", "INDEX pgqueue_jobs_claim"],
    "is_any_pending": ["INDEX pgqueue_jobs_claim"],
    "extend": ["INTEGER PRIMARY KEY", "INTEGER PRIMARY KEY", "INTEGER PRIMARY KEY"],
    "complete": ["INTEGER PRIMARY KEY"],
    "complete_alike": ["INTEGER PRIMARY KEY"],
    "complete_in_transaction": ["INTEGER PRIMARY KEY"],
    "retry": ["INTEGER PRIMARY KEY"],
    "complete_keeping": ["INTEGER PRIMARY KEY"],
    "complete_deleting": ["INTEGER PRIMARY KEY"],
    "expire": ["INTEGER PRIMARY KEY", "INDEX pgqueue_jobs_expiry"],
    "prune_due": ["INDEX pgqueue_jobs_prune"],
    "results": ["INTEGER PRIMARY KEY"],
    "sweep": ["INTEGER PRIMARY KEY", "INDEX pgqueue_jobs_lease"],
    "upkeep": [f"INDEX pgqueue_jobs_{index}" for index in ("lease", "expiry", "prune")],
    "release_claim": ["INDEX pgqueue_jobs_lease"],
    "others_may_be_free": ["INDEX pgqueue_jobs_claim"],
}


def test_every_hot_statement_goes_by_its_index_on_sqlite(sqlite_url: str) -> None:
    pgq = PgQueue(sqlite_url)
    with pgq.begin() as connection:
        store.insert_job(connection, pgq.tables, NewJob("work", "{}", unique_key="taken"))

    read = {}
    for name in HOT:
        steps = []
        for statement, parameters in statements_of(pgq, name, [(1, uuid.uuid4())]):
            with pgq.engine.connect() as connection:
                steps += [
                    row.detail for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                ]
        read[name] = [
            re.sub(r"^\w+ pgqueue_jobs( USING( COVERING)? (?P<how>[^(]*\w))?.*", r"\g<how>", step)
            for step in steps
            if re.match(r"\w+ pgqueue_jobs\b", step)
        ]

    assert read == SQLITE_PLANS
    pgq.dispose()
