"""Every query of docs/auditing.md is run on the databases it is for, and its tables are those of the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from documents import PROJECT, blocks, table_below
from jobs import add, claim, claim_one, completed, died, finish, make_due, put, retried
from sqlalchemy.orm import Session
from support import execute, rows, scalar

from pgqueue import ConfigurationError, PgQueue, Unique, Worker, WorkerConfig, migration, store
from pgqueue.engine import make_engine

PAGE = PROJECT / "docs" / "auditing.md"

QUERIES = [block for block in blocks(PAGE) if "GRANT" not in block.text and "REVOKE" not in block.text]

ROLES = ("observer", "auditor", "producer", "sender", "worker")


def live(pgq: PgQueue) -> None:
    """Of everything that the queries ask for at least one."""
    add(pgq, 4)
    one, two, three, four = claim(pgq, limit=4, worker="web-1:4711")
    finish(pgq, completed(one), died(two))
    for _ in range(3):
        finish(pgq, retried(three))
        (three,) = claim(pgq, worker="web-1:4711")
    pgq.delete(two.id, actor="cli:ada")
    finish(pgq, died(three))
    pgq.cancel(four.id, actor="cli:ada", reason="obsolete")
    pgq.cancel(one.id + len(add(pgq, 9)) + 3, actor="cli:ada")
    pgq.pause("default", actor="cli:ada")
    pgq.resume("default", actor="cli:ada")
    pgq.set_limits(queue="default", concurrency=3, actor="cli:ada")
    late = add(pgq, 2, queue="mail")
    put(pgq, late[:1], waits_for="task")
    make_due(pgq, late)
    with pgq.begin() as connection:
        worker = {"id": "web-1:4711", "host": "web-1", "pid": 4711, "version": "1", "queues": {}, "tasks": []}
        store.beat(connection, pgq.tables, worker)
        connection.execute(sa.update(pgq.tables.workers).values(heartbeat_at=datetime(2020, 1, 1, tzinfo=UTC)))


def queries(dialect_name: str) -> list[str]:
    """The queries for this kind of database, as its reader would type them."""
    other = {"postgresql": "-- SQLite", "sqlite": "-- PostgreSQL"}[dialect_name]
    texts = [block.text.rstrip().rstrip(";") for block in QUERIES if not block.text.startswith(other)]
    if dialect_name == "sqlite":
        texts = [text.replace("now() -- SQLite: ", "") for text in texts]
        texts = [text.replace("pgqueue.", "pgqueue_") for text in texts]
    past = {"'2030-01-31 00:00'": "'2000-01-31 00:00'", "'2030-01-30'": "'2000-01-30'"}
    for written, meant in past.items():
        texts = [text.replace(written, meant) for text in texts]
    return texts


def test_every_query_of_the_page_runs(pgq: PgQueue) -> None:
    live(pgq)
    found = {}

    for query in queries(pgq.engine.dialect.name):
        with pgq.reading() as connection:
            result = connection.execute(sa.text(query), {"moment": "2999-01-31 14:05:00.000"})
            found[query] = result.all()

    assert len(found) > 15
    of_yesterday = {query for query in found if "current_date" in query or "'-1 day'" in query}
    assert {query for query, result in found.items() if not result} == of_yesterday


def test_every_block_of_the_page_is_run() -> None:
    assert {block.language for block in blocks(PAGE)} == {"sql"}


def test_the_page_and_the_database_have_the_same_views(pgq: PgQueue) -> None:
    prefix = "pgqueue_" if pgq.engine.dialect.name == "sqlite" else ""
    schema = None if prefix else "pgqueue"

    named = [row[0].strip("`") for row in table_below(PAGE, "Auditing in SQL")]

    assert sorted(prefix + name for name in named) == sorted(sa.inspect(pgq.engine).get_view_names(schema))


def test_the_page_describes_every_column_as_the_database_does(pg: PgQueue) -> None:
    described = {
        (view, column): comment
        for view in sa.inspect(pg.engine).get_view_names("pgqueue")
        if view != "dead_jobs"  # has a page of its own
        for column, comment in columns_of(pg, view)
    }

    told = {
        (view, row[0].strip("`")): row[1]
        for view in sorted({view for view, _ in described})
        for row in table_below(PAGE, f"`{view}`")
    }

    assert told == described


def columns_of(pg: PgQueue, view: str) -> list[tuple[str, str]]:
    query = """
        SELECT attname, col_description(attrelid, attnum) FROM pg_attribute
         WHERE attrelid = CAST(:view AS regclass) AND attnum > 0 ORDER BY attnum
    """
    return [(row[0], row[1]) for row in rows(pg.engine, query, view=f"pgqueue.{view}")]


def test_both_databases_have_the_same_columns_but_for_percentiles(pg: PgQueue, sqlite_url: str) -> None:
    sqlite = PgQueue(sqlite_url)
    inspector = sa.inspect(sqlite.engine)

    for view in sa.inspect(pg.engine).get_view_names("pgqueue"):
        there = [name for name, _ in columns_of(pg, view) if "_p5" not in name and "_p9" not in name]
        assert [column["name"] for column in inspector.get_columns(f"pgqueue_{view}")] == there
    sqlite.dispose()


# Roles -----------------------------------------------------------------------------------------------------


@pytest.fixture
def roles(pg: PgQueue) -> Iterator[Callable[[str], sa.Engine]]:
    """The page's roles, with the page's rights; call it for an engine of one. Roles belong to the whole server."""
    prefix = f"{pg.url.database}_{pg.url.port}_"
    for role in ROLES:
        execute(pg.engine, f"CREATE ROLE {prefix}{role} LOGIN NOSUPERUSER")
    for block in blocks(PAGE):
        if "GRANT" in block.text or "REVOKE" in block.text:
            for statement in block.text.partition("\n")[2].strip().rstrip(";").split(";\n"):
                words, to, role = statement.rpartition(" ")
                assert role in ROLES
                execute(pg.engine, f"{words}{to}{prefix}{role}")
    engines: list[sa.Engine] = []

    def as_role(role: str) -> sa.Engine:
        engines.append(make_engine(pg.url.set(username=prefix + role)))
        return engines[-1]

    yield as_role
    for engine in engines:
        engine.dispose()
    for role in ROLES:
        execute(pg.engine, f"DROP OWNED BY {prefix}{role} CASCADE")
        execute(pg.engine, f"DROP ROLE {prefix}{role}")


def refuses(engine: sa.Engine, sql: str) -> bool:
    try:
        execute(engine, sql)
    except sa.exc.ProgrammingError as error:
        return "permission denied" in str(error)
    return False


def test_an_observer_sees_how_the_queue_does_but_no_job(pg: PgQueue, roles: Callable[[str], sa.Engine]) -> None:
    live(pg)
    observer = roles("observer")

    for view in ("queue_summary", "worker_status", "stuck_jobs", "throughput_minute", "latency_hour"):
        assert scalar(observer, f"SELECT count(*) FROM pgqueue.{view}") >= 0
    for relation in ("jobs", "job_events", "job_history", "dead_jobs", "error_groups", "jobs_as_of(now())"):
        assert refuses(observer, f"SELECT * FROM pgqueue.{relation}")
    assert refuses(observer, "DELETE FROM pgqueue.jobs")


def test_an_auditor_reads_everything_and_changes_nothing(pg: PgQueue, roles: Callable[[str], sa.Engine]) -> None:
    live(pg)
    auditor = roles("auditor")

    for query in queries("postgresql"):
        assert rows(auditor, query) is not None
    assert refuses(auditor, "UPDATE pgqueue.jobs SET priority = 1")
    assert refuses(auditor, "DELETE FROM pgqueue.job_events")
    assert refuses(auditor, "SELECT pgqueue.enqueue('work')")


def test_a_producer_enqueues_and_changes_no_history(pg: PgQueue, roles: Callable[[str], sa.Engine]) -> None:
    pgq = PgQueue(roles("producer"))
    task = pgq.external_task("work")

    with Session(pgq.engine) as session, session.begin():
        task.enqueue(session, n=1)
        task.using(unique_key="k", on_conflict="replace").enqueue(session, n=2)
        task.using(unique_key="k", on_conflict="replace").enqueue(session, n=3)
        task.using(ordering_key="o").enqueue(session, n=4)
        task.enqueue_many(session, [{"n": 5}, {"n": 6}])
        session.execute(sa.text("SELECT pgqueue.enqueue('work')"))

    assert scalar(pg.engine, "SELECT count(*) FROM pgqueue.jobs") == 6
    assert scalar(pg.engine, "SELECT event FROM pgqueue.job_events") == "replace"
    assert refuses(pgq.engine, "DELETE FROM pgqueue.jobs")
    assert refuses(pgq.engine, "DELETE FROM pgqueue.job_events")
    assert refuses(pgq.engine, "UPDATE pgqueue.job_events SET actor = 'nobody'")


@pytest.mark.parametrize("role", ["producer", "sender"])
def test_the_sql_function_needs_no_more_rights_than_the_page_gives(
    pg: PgQueue, roles: Callable[[str], sa.Engine], role: str
) -> None:
    by_sql = roles(role)
    pg.set_limits(queue="default", max_depth=20, on_full="error")
    options = (
        "'work'",
        "'work', unique_key => 'k'",
        "'work', unique_key => 'k'",
        "'work', unique_key => 'p', unique_for => '1 hour'",
        "'work', unique_key => 'p', unique_for => '1 hour'",
        "'work', ordering_key => 'o'",
        "'work', ordering_key => 'o', concurrency_key => 'c', rate_key => 'r', expires_in => '1 hour'",
    )

    ids = [scalar(by_sql, f"SELECT pgqueue.enqueue({arguments})") for arguments in options]

    assert (len(set(ids)), scalar(pg.engine, "SELECT count(*) FROM pgqueue.jobs")) == (5, 5)
    replaces = "SELECT pgqueue.enqueue('work', unique_key => 'k', on_conflict => 'replace')"
    assert refuses(by_sql, replaces) == (role == "sender")
    assert refuses(by_sql, "SELECT payload FROM pgqueue.jobs") == (role == "sender")
    assert refuses(by_sql, "DELETE FROM pgqueue.jobs")


def test_a_producer_loses_a_period_to_somebody_else_without_a_right_to_delete(
    pg: PgQueue, roles: Callable[[str], sa.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    pgq = PgQueue(roles("producer"))
    tasks = [of.task(name="work", unique=Unique(by=("n",), period=3600))(lambda n: None) for of in (pg, pgq)]
    insert = store.insert_keyed_jobs

    def insert_after_another(connection: sa.Connection, *arguments: Any) -> dict[str, int]:
        monkeypatch.setattr(store, "insert_keyed_jobs", insert)
        with pg.begin() as other:
            tasks[0].enqueue(other, n=1)
        pg.ack(pg.claim("other"))
        return insert_without_looking(connection, *arguments)

    def insert_without_looking(connection: sa.Connection, *arguments: Any) -> dict[str, int]:
        jobs = [replace(job, period_seconds=None) for job in arguments[1]]
        return insert(connection, arguments[0], jobs)

    monkeypatch.setattr(store, "insert_keyed_jobs", insert_after_another)
    with Session(pgq.engine) as session, session.begin():
        handle = tasks[1].enqueue(session, n=1)

    assert (handle.id, handle.inserted) == (1, False)
    assert scalar(pg.engine, "SELECT count(*) FROM pgqueue.jobs") == 1


def test_a_worker_works_and_cannot_change_what_was_recorded(pg: PgQueue, roles: Callable[[str], sa.Engine]) -> None:
    pgq = PgQueue(roles("worker"))

    @pgq.task(transactional=True)
    def follow(session: Session, n: int) -> int:
        if n:
            follow.enqueue(session, n=n - 1)
        return n

    @pgq.task
    def fail() -> None:
        raise ValueError("no")

    with Session(pgq.engine) as session, session.begin():
        follow.enqueue(session, n=1)
        fail.using(max_retries=0).enqueue(session)
    Worker(pgq, WorkerConfig(drain=True)).run()
    finished = "SELECT task, status, count(*) FROM pgqueue.jobs GROUP BY 1, 2 ORDER BY 1"
    assert rows(pg.engine, finished) == [("fail", "dead", 1), ("follow", "completed", 2)]
    assert pgq.prune(older_than=0) == 2

    assert refuses(pgq.engine, "UPDATE pgqueue.job_events SET actor = 'nobody'")
    with pytest.raises(ConfigurationError, match="may not migrate"):
        migration.downgrade(pgq.engine, "pgqueue", "base")


def test_what_ran_on_a_worker_at_a_moment_is_found(pgq: PgQueue) -> None:
    ids = add(pgq, 2)
    finish(pgq, completed(claim_one(pgq, worker="web-1:4711")))
    claim_one(pgq, worker="web-1:4711")
    (query,) = (query for query in queries(pgq.engine.dialect.name) if "became" in query)

    found = rows(pgq.engine, query.replace("2030-01-31 14:05", "2999-01-01 00:00"))

    assert [(row.job_id, row.became) for row in found] == [(ids[1], "running")]
