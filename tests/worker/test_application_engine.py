"""A queue made from an engine of the application, with settings of the application's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from support import execute, scalar, wait_for
from working import enqueue, wait_for_status, working

from pgqueue import ConfigurationError, PgQueue, Retry


@pytest.fixture(params=["AUTOCOMMIT", "REPEATABLE READ", "SERIALIZABLE"])
def theirs(request: pytest.FixtureRequest, pg_url: str) -> Iterator[sa.Engine]:
    """An engine that works at another isolation level than pgqueue needs."""
    engine = sa.create_engine(pg_url, isolation_level=request.param)
    execute(engine, "CREATE TABLE effects (n integer)")
    yield engine
    engine.dispose()


@pytest.fixture
def pgq(theirs: sa.Engine) -> Iterator[PgQueue]:
    queue = PgQueue(theirs)
    yield queue
    queue.dispose()


def test_a_failed_transactional_task_leaves_no_rows_whatever_the_engines_isolation_level(
    pgq: PgQueue, theirs: sa.Engine
) -> None:
    @pgq.task(transactional=True, retry=Retry(max_retries=0))
    def write_and_fail(session: Session) -> None:
        session.execute(sa.text("INSERT INTO effects VALUES (1)"))
        raise ValueError("no")

    job_id = enqueue(write_and_fail)
    with working(pgq):
        wait_for_status(pgq, job_id, "dead")

    assert scalar(theirs, "SELECT count(*) FROM effects") == 0


def test_a_transactional_task_outlives_heartbeats_whatever_the_engines_isolation_level(
    pgq: PgQueue, theirs: sa.Engine
) -> None:
    @pgq.task(transactional=True, retry=Retry(max_retries=0))
    def write_slowly(session: Session) -> None:
        session.execute(sa.text("INSERT INTO effects VALUES (1)"))
        before = lease_of_the_job()
        wait_for(lambda: lease_of_the_job() > before, "a heartbeat")

    def lease_of_the_job() -> object:
        return scalar(theirs, "SELECT claim_expires_at FROM pgqueue.jobs")

    job_id = enqueue(write_slowly)
    with working(pgq, lease=0.6):
        wait_for(lambda: pgq.get_job(job_id).finished_at, "the job to end")

    assert pgq.get_job(job_id).status == "completed"
    assert scalar(theirs, "SELECT count(*) FROM effects") == 1


def test_the_engine_of_the_application_keeps_its_isolation_level(pgq: PgQueue, theirs: sa.Engine) -> None:
    def level() -> str:
        with theirs.connect() as connection:
            return connection.get_isolation_level()

    before = level()
    pgq.claim("worker-1")

    assert level() == before


def test_an_asynchronous_engine_of_the_application_works_at_the_level_that_claims_need(pg_url: str) -> None:
    async def level() -> str:
        engine = create_async_engine(pg_url, isolation_level="SERIALIZABLE")
        async with PgQueue(engine).async_engine.connect() as connection:
            found: str = await connection.scalar(sa.text("SHOW transaction_isolation"))
        await engine.dispose()
        return found

    assert asyncio.run(level()) == "read committed"


@pytest.mark.parametrize("make", [sa.create_engine, create_async_engine])
def test_a_level_that_would_win_over_the_one_that_is_needed_is_refused(
    pg_url: str, make: Callable[..., sa.Engine | AsyncEngine]
) -> None:
    """What it would do: transactional tasks without a transaction."""
    engine = make(pg_url)

    for derived in (
        engine.execution_options(isolation_level="AUTOCOMMIT"),
        engine.execution_options(isolation_level="SERIALIZABLE").execution_options(logging_token="shop"),
        make(pg_url, execution_options={"isolation_level": "AUTOCOMMIT"}),
    ):
        with pytest.raises(ConfigurationError, match=r"isolation level '\w+' .* execution_options, .* create_engine"):
            PgQueue(derived)
    PgQueue(engine.execution_options(isolation_level="READ COMMITTED"))


def test_a_disposed_queue_leaves_the_connections_of_the_applications_engine_alone(
    pgq: PgQueue, theirs: sa.Engine
) -> None:
    with theirs.connect() as connection:
        before = connection.scalar(sa.text("SELECT pg_backend_pid()"))

    pgq.dispose()

    with theirs.connect() as connection:
        assert connection.scalar(sa.text("SELECT pg_backend_pid()")) == before
