"""Statements of a worker's own sessions that go past SQLAlchemy: as if they had not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import add, row
from support import execute, scalar

from pgqueue import PgQueue, dialect, store
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


def test_the_log_of_the_engine_has_them(pg: PgQueue, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sqlalchemy.engine")
    watched = sa.create_engine(pg.url)

    with watched.connect() as connection, straight(connection):
        look(connection, pg)
    watched.dispose()

    assert "pgqueue.jobs" in caplog.text
