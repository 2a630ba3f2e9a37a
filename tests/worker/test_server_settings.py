"""Whatever an administrator has set for the database or the user, jobs go their way."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from support import execute, scalar, wait_for
from working import drain, enqueue, wait_for_status, working

from pgqueue import ClaimedJob, PgQueue, Retry
from pgqueue.engine import make_engine

AT = datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC)

SETTINGS = [
    ("bytea_output", "escape"),
    ("client_encoding", "LATIN1"),
    ("datestyle", "German"),
    ("datestyle", "SQL, DMY"),
    ("default_transaction_deferrable", "on"),
    ("default_transaction_isolation", "repeatable read"),
    ("default_transaction_isolation", "serializable"),
    ("extra_float_digits", "-15"),
    ("idle_session_timeout", "200ms"),
    ("intervalstyle", "sql_standard"),
    ("lock_timeout", "1s"),
    ("plan_cache_mode", "force_generic_plan"),
    ("search_path", "nowhere"),
    ("standard_conforming_strings", "off"),
    ("statement_timeout", "5s"),
    ("timezone", "Asia/Kolkata"),
    ("transform_null_equals", "on"),
]


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_job_lives_its_whole_life_under_any_setting_of_the_database(pg_url: str, name: str, value: str) -> None:
    change(pg_url, name, value)
    pgq = PgQueue(pg_url)

    @pgq.task(retry=Retry(max_retries=1, base=0.0))
    def fails_once(text: str) -> str:
        if scalar(pgq.engine, "SELECT retries FROM pgqueue.jobs WHERE task = 'fails_once'") == 0:
            raise ValueError(f"no {text}")
        return text

    @pgq.task(transactional=True)
    def echoes(session: Session, text: str, moment: datetime) -> str:
        fails_once.enqueue(session, text=text)
        return f"{text} {moment.isoformat()}"

    with pgq.begin() as connection:
        job_id = echoes.using(at=AT, unique_key="ключ").enqueue(connection, text="€ ключ", moment=AT).id
        echoes.using(delay=1000.5).enqueue(connection, text="later", moment=AT)
    report = drain(pgq, poll_interval=0.05)

    job = pgq.get_job(job_id)
    assert (report.completed, report.retried, report.dead) == (2, 1, 0)
    assert (job.result, job.run_at) == (f"€ ключ {AT.isoformat()}", AT)
    assert {summary.queue: summary.scheduled for summary in pgq.queues()} == {"default": 1}
    pgq.dispose()


def test_an_asynchronous_claim_reads_moments_in_any_style(pg_url: str) -> None:
    change(pg_url, "datestyle", "German")
    pgq = PgQueue(pg_url)
    external = pgq.external_task("external")
    with pgq.begin() as connection:
        external.using(at=AT).enqueue(connection)

    async def claim() -> list[ClaimedJob]:
        claimed = await pgq.claim_async("worker-1")
        await pgq.async_engine.dispose()
        return claimed

    (job,) = asyncio.run(claim())

    assert job.run_at == AT
    pgq.dispose()


def test_a_statement_that_took_too_long_is_not_called_an_unreachable_database(pg: PgQueue, pg_url: str) -> None:
    change(pg_url, "statement_timeout", "100ms")
    impatient = PgQueue(pg_url)
    with pg.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE pgqueue.jobs")
        with pytest.raises(sa.exc.OperationalError, match="statement timeout"):
            impatient.claim("worker-1")

    assert impatient.claim("worker-1") == []
    impatient.dispose()


def test_a_worker_on_a_read_only_server_says_so_and_works_when_that_is_over(
    pg: PgQueue, pg_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    @pg.task
    def work() -> None: ...

    job_id = enqueue(work)
    pg.dispose()
    change(pg_url, "default_transaction_read_only", "on")
    with working(pg):
        wait_for(lambda: "in a read-only transaction" in caplog.text, "the worker to complain")
        change(pg_url, "default_transaction_read_only", "off")
        job = wait_for_status(pg, job_id, "completed")

    assert (job.attempt, job.retries) == (1, 0)


def test_a_worker_whose_statements_take_too_long_says_so_and_works_when_that_is_over(
    pg: PgQueue, pg_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    @pg.task
    def work() -> None: ...

    job_id = enqueue(work)
    pg.dispose()
    bystander = make_engine(pg_url)
    with bystander.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE pgqueue.jobs")
        change(pg_url, "statement_timeout", "200ms")
        with working(pg):
            wait_for(lambda: "canceling statement due to statement timeout" in caplog.text, "the worker to complain")
            connection.rollback()
            job = wait_for_status(pg, job_id, "completed")
    bystander.dispose()

    assert (job.attempt, job.retries) == (1, 0)


def change(url: str, name: str, value: str) -> None:
    """Set it for all connections to come."""
    engine = sa.create_engine(url, connect_args={"options": "-c default_transaction_read_only=off"})
    execute(engine, f"ALTER DATABASE {engine.url.database} SET {name} = '{value}'")
    engine.dispose()
