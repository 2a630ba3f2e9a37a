"""A worker that finds a pooler where it expects the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import sqlalchemy as sa
from pgbouncer import Bouncer
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support import scalar, wait_for
from working import Gate, drain, enqueue, events, wait_for_status, working

from pgqueue import ConfigurationError, PgQueue, Retry, checkout, pooler
from pgqueue.engine import explain, make_engine

NEVER = 1_000.0

LISTENERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"


@pytest.fixture
def pooled(pg_url: str, bouncer: Bouncer) -> Iterator[PgQueue]:
    """A queue whose connections go through PgBouncer in transaction mode."""
    pgq = PgQueue(bouncer.url(pg_url))
    yield pgq
    pgq.dispose()


@pytest.fixture
def whole_sessions(pg_url: str, make_bouncer: Callable[..., Bouncer]) -> Iterator[PgQueue]:
    """A queue whose connections go through PgBouncer in session mode."""
    bouncer = make_bouncer(pool_mode="session", default_pool_size=20)
    pgq = PgQueue(bouncer.url(pg_url))
    yield pgq
    pgq.dispose()


def test_no_pooler_is_found_where_there_is_none(pgq: PgQueue) -> None:
    assert not pooler.mixes_sessions(pgq.engine)


def test_a_pooler_that_mixes_sessions_is_found(pooled: PgQueue) -> None:
    assert pooler.mixes_sessions(pooled.engine)


def test_a_pooler_whose_server_connections_take_turns_is_found_too(
    pg_url: str, make_bouncer: Callable[..., Bouncer]
) -> None:
    bouncer = make_bouncer(server_round_robin=1)
    engine = make_engine(bouncer.url(pg_url))
    with ExitStack() as stack:
        for _ in range(4):  # so that there are as many server connections
            stack.enter_context(engine.begin()).exec_driver_sql("SELECT 1")

    assert pooler.mixes_sessions(engine)

    engine.dispose()


def test_a_pooler_that_leaves_sessions_whole_is_none_to_worry_about(
    whole_sessions: PgQueue, caplog: pytest.LogCaptureFixture
) -> None:
    greet = whole_sessions.task(name="greet")(lambda: None)

    with working(whole_sessions, poll_interval=NEVER):
        wait_for(lambda: scalar(whole_sessions.engine, LISTENERS) == 1, "the worker to listen")
        job_id = enqueue(greet)
        wait_for_status(whole_sessions, job_id, "completed")

    assert caplog.records == []


def test_a_worker_that_is_to_listen_behind_a_pooler_polls_and_says_so_once(
    pooled: PgQueue, pg_url: str, bouncer: Bouncer, caplog: pytest.LogCaptureFixture
) -> None:
    greet = pooled.task(name="greet")(lambda: None)

    with working(pooled):
        for _ in range(3):
            wait_for_status(pooled, enqueue(greet), "completed")

    (record,) = caplog.records
    assert record.getMessage().startswith("not listening for wake-ups: postgresql+psycopg://")
    assert "by polling, every 0.05 s. Say --no-listen (listen=False), or" in record.getMessage()
    assert bouncer.left_behind(pg_url) == []


def test_a_worker_that_is_not_to_listen_has_nothing_to_say_of_a_pooler(
    pooled: PgQueue, caplog: pytest.LogCaptureFixture
) -> None:
    pooled.task(name="greet")(lambda: None)

    drain(pooled, listen=False)

    assert caplog.records == []


def test_a_worker_warns_of_an_engine_that_prepares_statements_behind_a_pooler(
    pg_url: str, bouncer: Bouncer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = sa.create_engine(bouncer.url(pg_url))
    pgq = PgQueue(engine)
    pgq.task(name="greet")(lambda: None)

    drain(pgq, listen=False)

    engine.dispose()
    (record,) = caplog.records
    assert record.getMessage().startswith("the engine prepares statements, and postgresql+psycopg://")
    assert 'connect_args={"prepare_threshold": None}' in record.getMessage()


def test_an_engine_that_prepares_statements_is_none_to_worry_about_without_a_pooler(
    pg_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = sa.create_engine(pg_url)
    pgq = PgQueue(engine)
    pgq.task(name="greet")(lambda: None)

    drain(pgq)

    engine.dispose()
    assert caplog.records == []


def test_a_transactional_task_that_gets_no_server_connection_is_given_back_with_no_retry_charged(
    pg_url: str, make_bouncer: Callable[..., Bouncer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkout, "FRESH_SECONDS", 1_000.0)  # or a connection may be found wanting before the task
    gate = Gate()
    bouncer = make_bouncer(default_pool_size=1, query_wait_timeout=1)
    pgq = PgQueue(bouncer.url(pg_url))
    refused: list[str] = []

    @pgq.task(transactional=True)
    def hold(session: Session) -> None:
        session.execute(sa.text("SELECT 1"))  # takes the only one
        gate.pass_through()

    @pgq.task(transactional=True, retry=Retry(max_retries=0))
    def wait(session: Session) -> None:
        wait_for(lambda: gate.came, "the connection to be taken")
        with refusals("def"):
            session.execute(sa.text("SELECT 1"))

    @pgq.task(transactional=True, retry=Retry(max_retries=0))
    async def wait_async(session: AsyncSession, patient: bool = True) -> None:
        while patient and not gate.came:
            await asyncio.sleep(0.01)
        with refusals("async def"):
            await session.execute(sa.text("SELECT 1"))

    @contextmanager
    def refusals(kind: str) -> Iterator[None]:
        try:
            yield
        except sa.exc.OperationalError:
            refused.append(kind)
            raise

    with working(pgq, listen=False):
        wait_for_status(pgq, enqueue(wait_async, patient=False), "completed")  # there is an asynchronous connection now
        ids = [enqueue(task) for task in (wait, wait_async, hold)]
        wait_for(lambda: len(refused) == 2, "both to be refused a connection")
        gate.open()
        for job_id in ids:
            wait_for_status(pgq, job_id, "completed")

    assert sorted(refused) == ["async def", "def"]
    assert [pgq.get_job(job_id).retries for job_id in ids] == [0, 0, 0]
    assert events(pgq, ids[0]) == events(pgq, ids[1]) == ["release"]
    pgq.dispose()


def test_the_error_about_a_lost_prepared_statement_says_what_to_do(pg_url: str, bouncer: Bouncer) -> None:
    engine = sa.create_engine(bouncer.url(pg_url))
    with engine.connect() as one, engine.connect() as other:
        for _ in range(7):  # psycopg prepares what it has sent five times
            one.execute(sa.text("SELECT 1"))
            one.commit()
        other.execute(sa.text("SELECT 2"))  # takes the server connection on which it was prepared
        with pytest.raises(sa.exc.DBAPIError) as raised:
            one.execute(sa.text("SELECT 1"))

    engine.dispose()
    explained = explain(raised.value, engine.url)
    assert isinstance(explained, ConfigurationError)
    assert 'prepared statement "_pg3_0" does not exist. A pooler in transaction mode' in str(explained)
    assert 'connect_args={"prepare_threshold": None}' in str(explained)
