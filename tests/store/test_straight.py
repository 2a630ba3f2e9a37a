"""Statements of a worker's own sessions that go past SQLAlchemy: as if they had not."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import uuid
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from jobs import add, row
from sqlalchemy.dialects import postgresql
from support import execute, scalar

from pgqueue import PgQueue, dialect, plans, store
from pgqueue.engine import is_disconnect, is_transient, straight


def look(connection: sa.Connection, pgq: PgQueue) -> bool:
    return store.is_any_pending(connection, pgq.tables, queue="default")


def test_each_statement_commits_at_once_and_the_next_transaction_is_one_again(pg: PgQueue) -> None:
    job_id, other_id = add(pg, 2)
    delete = sa.delete(pg.tables.jobs).where(pg.tables.jobs.c.id == sa.bindparam("id", type_=sa.BigInteger()))

    with pg.engine.connect() as connection:
        with straight(connection):
            gone = dialect.execute(connection, delete.returning(pg.tables.jobs.c.task), {"id": job_id})
            left = scalar(pg.engine, "SELECT count(*) FROM pgqueue.jobs")
        with connection.begin() as transaction:
            nothing = dialect.execute(connection, delete, {"id": other_id})
            transaction.rollback()

    assert (list(gone), left) == ([("work",)], 1)
    assert list(nothing) == []
    assert row(pg, other_id).status == "pending"


def test_an_error_is_the_one_of_sqlalchemy_and_shows_no_parameters(pg: PgQueue) -> None:
    division = sa.select(sa.literal_column("1") / sa.bindparam("secret", type_=sa.Integer()))

    with pg.engine.connect() as connection:
        with pytest.raises(sa.exc.DataError, match="division by zero") as caught, straight(connection):
            dialect.execute(connection, division, {"secret": 0})
        with straight(connection):
            assert not look(connection, pg)

    assert getattr(caught.value.orig, "sqlstate", None) == "22012"
    assert "secret" not in str(caught.value).replace("%(secret)s", "")
    assert not is_transient(caught.value)


def test_a_connection_that_broke_is_known_to_be_gone(pg: PgQueue) -> None:
    with pg.engine.connect() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        connection.rollback()
        execute(pg.engine, f"SELECT pg_terminate_backend({pid}, 10000)")

        with pytest.raises(sa.exc.OperationalError) as caught, straight(connection):
            look(connection, pg)
        connection.invalidate()

    assert is_disconnect(caught.value)
    assert caught.value.connection_invalidated
    assert "terminating connection due to administrator command" in str(caught.value)  # not only that it is gone


def test_a_connection_whose_network_is_gone_is_known_to_be_gone(pg: PgQueue) -> None:
    with pg.engine.connect() as connection:
        with straight(connection):
            look(connection, pg)
        driver: Any = connection.connection.driver_connection
        with socket.socket(fileno=os.dup(driver.fileno())) as network:
            network.shutdown(socket.SHUT_RDWR)

        with pytest.raises(sa.exc.OperationalError) as caught, straight(connection):
            look(connection, pg)
        with pytest.raises(sa.exc.OperationalError) as again, straight(connection):
            look(connection, pg)
        connection.invalidate()

    assert is_disconnect(caught.value)
    assert is_disconnect(again.value)


def test_values_of_all_kinds_arrive_as_they_are(pg: PgQueue) -> None:
    values = {
        "text": "it's 100 % \\ \U0001f600 {1,2} $1",
        "nothing": None,
        "token": uuid.uuid4(),
        "number": -(2**40),
        "share": 0.1,
        "yes": True,
        "texts": ["a,b", 'c"d', "", "{e}", "NULL"],
        "none": [],
    }
    types = {
        "text": sa.Text(),
        "nothing": sa.Text(),
        "token": sa.Uuid(),
        "number": sa.BigInteger(),
        "share": sa.Double(),
        "yes": sa.Boolean(),
        "texts": postgresql.ARRAY(sa.Text()),
        "none": postgresql.ARRAY(sa.Text()),
    }
    statement = sa.select(*(sa.cast(sa.bindparam(name), type_) for name, type_ in types.items()))

    for kept in (None, {}):
        with pg.engine.connect() as connection:
            connection.info[dialect.PREPARED] = kept
            with straight(connection):
                (first,) = dialect.execute(connection, statement, values)
                (second,) = dialect.execute(connection, statement, values)
            connection.invalidate()
        assert first == second == tuple(values.values())


def test_a_value_that_no_text_can_hold_is_refused_before_it_is_sent(pg: PgQueue) -> None:
    statement = sa.select(sa.bindparam("text", type_=sa.Text()))

    with pg.engine.connect() as connection:
        with pytest.raises(sa.exc.DataError, match="NUL"), straight(connection):
            dialect.execute(connection, statement, {"text": "a\0b"})
        with straight(connection):
            assert not look(connection, pg)


def test_the_server_keeps_a_statement_once_however_often_it_is_sent(pg: PgQueue) -> None:
    with pg.engine.connect() as connection:
        assert plans.keep(connection)
        with straight(connection):
            for _ in range(3):
                look(connection, pg)
        kept = connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'pgqueue%%'")
        assert kept.scalar_one() == 1
        connection.invalidate()


def test_a_large_answer_waits_for_a_thread_that_computes_a_few_times_at_most(pg: PgQueue) -> None:
    # Each time that the interpreter is asked for, a thread that computes keeps it for the switch interval, which is
    # made so long here that the number of intervals is how often it was asked for. psycopg asks some thirty times.
    numbers = sa.func.generate_series(1, sa.bindparam("count", type_=sa.Integer())).column_valued("n")
    statement = sa.select(numbers, sa.func.repeat("x", 300))
    interval, before = 0.1, sys.getswitchinterval()
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            pass

    with pg.engine.connect() as connection:
        with straight(connection):
            dialect.execute(connection, statement, {"count": 1})
        computing = threading.Thread(target=compute)
        sys.setswitchinterval(interval)
        try:
            computing.start()
            began = time.monotonic()
            with straight(connection):
                rows = dialect.execute(connection, statement, {"count": 2_000})
            intervals = (time.monotonic() - began) / interval
        finally:
            over.set()
            sys.setswitchinterval(before)
            computing.join()

    assert len(rows) == 2_000
    assert intervals < 8


def test_whoever_listens_to_the_engine_hears_of_them(pg: PgQueue) -> None:
    heard: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        heard.append(statement)

    with pg.engine.connect() as connection:
        sa.event.listen(pg.engine, "after_cursor_execute", note)
        with straight(connection):
            look(connection, pg)
        sa.event.remove(pg.engine, "after_cursor_execute", note)
        with straight(connection):
            look(connection, pg)

    assert len(heard) == 1
    assert "pgqueue.jobs" in heard[0]


def test_whoever_watches_the_cursors_of_the_driver_sees_them(pg: PgQueue) -> None:
    seen: list[Any] = []

    class Watched(psycopg.Cursor[Any]):
        def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
            seen.append(query)
            return super().execute(query, *arguments, **options)

    with pg.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.cursor_factory = Watched
        with straight(connection):
            look(connection, pg)
        connection.invalidate()

    assert [True for query in seen if "pgqueue.jobs" in str(query)] == [True]


def test_the_log_of_the_engine_has_them(pg: PgQueue, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sqlalchemy.engine")
    watched = sa.create_engine(pg.url)

    with watched.connect() as connection, straight(connection):
        look(connection, pg)
    watched.dispose()

    assert "pgqueue.jobs" in caplog.text
