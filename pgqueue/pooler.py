"""Poolers between this process and the server, such as PgBouncer: whether sessions can be relied on."""

from __future__ import annotations

import sqlalchemy as sa

from pgqueue.dialect import POSTGRESQL
from pgqueue.engine import committing_each

#: How often two connections are compared, at most.
ROUNDS = 3


def mixes_sessions(engine: sa.Engine) -> bool:
    """Whether a pooler gives each transaction any of its server connections, so that what belongs to a session, such as
    LISTEN, is lost to its owner, or found by somebody else.

    A server tells its clients the number of their process. A pooler answers for many, and makes numbers up.
    """
    if engine.dialect.name != POSTGRESQL:
        return False
    with engine.connect() as one:
        if _pid_told(one) is None or is_own_session(one):
            return False
        with engine.connect() as other:
            return _mixed(one, other)


def is_own_session(connection: sa.Connection) -> bool:
    """Whether the session of the server that this connection speaks to is surely its own."""
    return _pid_told(connection) == _pid(connection)


def _mixed(one: sa.Connection, other: sa.Connection) -> bool:
    """Whether one of them has several processes of the server, or both have the same.

    Asked twice in a row, a pooler that takes turns among its server connections shows itself. Asked alternately, one
    that prefers the connection that was used last.
    """
    pids_of_one: set[int] = set()
    pids_of_other: set[int] = set()
    for _ in range(ROUNDS):
        pids_of_one |= {_pid(one), _pid(one)}
        pids_of_other.add(_pid(other))
        if len(pids_of_one) > 1 or len(pids_of_other) > 1 or pids_of_one & pids_of_other:
            return True
    return False


def _pid_told(connection: sa.Connection) -> int | None:
    """What the other side said when the connection was made, if the driver knows."""
    info = getattr(connection.connection.driver_connection, "info", None)
    return getattr(info, "backend_pid", None)


def _pid(connection: sa.Connection) -> int:
    """The process of the server that does this transaction."""
    with committing_each(connection):
        pid: int = connection.scalar(sa.text("SELECT pg_backend_pid()"))
    return pid


def prepares(engine: sa.Engine) -> bool:
    """Whether the driver has the server prepare what it sends often, as psycopg does unless told otherwise."""
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        return getattr(driver, "prepare_threshold", None) is not None
