"""Connections that pgqueue takes from its pool: good ones without a round trip, broken ones never."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from support import execute, wait_for

from pgqueue import PgQueue, checkout
from pgqueue.engine import make_async_engine, make_engine, parse_url

PID = sa.text("SELECT pg_backend_pid()")


@pytest.fixture
def engine(pg_url: str) -> Iterator[sa.Engine]:
    engine = make_engine(pg_url)
    yield engine
    engine.dispose()


@pytest.fixture
def pings(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that the server was asked."""
    answers: list[bool] = []
    ask = engine.dialect.do_ping

    def ping(dbapi_connection: Any) -> bool:
        answers.append(False)
        answers[-1] = ask(dbapi_connection)
        return answers[-1]

    monkeypatch.setattr(engine.dialect, "do_ping", ping)
    return answers


def backend_of(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(PID).scalar_one())


def cut(pg: PgQueue, pid: int) -> None:
    """End this backend, and wait until it is gone."""
    execute(pg.engine, "SELECT pg_terminate_backend(:pid)", pid=pid)

    def is_gone() -> bool:
        with pg.reading() as connection:
            gone = sa.text("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = :pid")
            return bool(connection.execute(gone, {"pid": pid}).scalar_one())

    wait_for(is_gone, "the backend to be gone")


def test_a_connection_used_just_now_is_taken_without_asking_the_server(engine: sa.Engine, pings: list[bool]) -> None:
    used = {backend_of(engine) for _ in range(5)}

    assert len(used) == 1
    assert pings == []


def test_a_connection_that_lay_idle_is_asked(
    engine: sa.Engine, pings: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkout, "FRESH_SECONDS", 0.0)

    used = {backend_of(engine) for _ in range(3)}

    assert len(used) == 1
    assert pings == [True, True]


@pytest.mark.parametrize("fresh_seconds", [0.0, 60.0])
def test_a_connection_that_the_server_has_cut_is_replaced(
    pg: PgQueue, engine: sa.Engine, pings: list[bool], monkeypatch: pytest.MonkeyPatch, fresh_seconds: float
) -> None:
    monkeypatch.setattr(checkout, "FRESH_SECONDS", fresh_seconds)
    before = backend_of(engine)
    cut(pg, before)

    after = backend_of(engine)

    assert after != before
    assert pings == [False]


def test_an_asynchronous_connection_that_the_server_has_cut_is_replaced(
    pg: PgQueue, pg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkout, "FRESH_SECONDS", 60.0)

    async def use() -> tuple[int, int]:
        engine = make_async_engine(parse_url(pg_url))
        pids = []
        for _ in range(2):
            async with engine.connect() as connection:
                pids.append(int((await connection.execute(PID)).scalar_one()))
            if len(pids) == 1:
                await asyncio.to_thread(cut, pg, pids[0])
        await engine.dispose()
        return pids[0], pids[1]

    before, after = asyncio.run(use())

    assert after != before
