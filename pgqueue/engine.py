"""How pgqueue connects: URLs, engines, and database errors in pgqueue's words. Passwords never leave here."""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from pgqueue.checkout import ask_only_when_in_doubt
from pgqueue.dialect import POSTGRESQL, SQLITE, SQLITE_VERSION_MIN, STRAIGHT, checked_dialect
from pgqueue.errors import ConfigurationError, DatabaseUnreachable, PgqueueError, SchemaMissing

#: How long SQLite waits for another process's write to end.
SQLITE_BUSY_SECONDS = 30.0

#: While SQLite waits it looks less and less often whether the lock is free; after this time it begins anew.
SQLITE_TURN_SECONDS = 0.05

#: Begins a transaction that may write, with the write lock in its hands.
_SQLITE_BEGIN = "BEGIN IMMEDIATE"

#: Keeps a write-ahead log from now on. Refused at once while somebody writes to a file that has none yet.
_SQLITE_KEEP_LOG = "PRAGMA journal_mode = WAL"

#: The SQLSTATE of a statement that waited for a lock as long as it may.
LOCK_NOT_AVAILABLE = "55P03"

#: What PgBouncer says when it had no server connection to give. Then the transaction did not begin.
QUERY_WAIT_TIMEOUT = "query_wait_timeout"

#: The SQLSTATEs of a prepared statement that is not there, and of one that is there already.
MIXED_UP = ("26000", "42P05")

#: The longest timeout that PostgreSQL knows.
IDLE_MILLISECONDS_MAX = 2**31 - 1

#: For libpq, where the URL does not say otherwise: a server that went away without a word is noticed in
#: seconds, and any text can be read.
CONNECT_DEFAULTS: dict[str, Any] = {
    "application_name": "pgqueue",
    "client_encoding": "utf8",
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # milliseconds
}


def parse_url(url: str | sa.URL) -> sa.URL:
    """The URL, with the driver pgqueue uses. ConfigurationError, never showing the URL, when it is malformed."""
    if isinstance(url, str):
        # `postgres://` is what hosting providers hand out.
        url = re.sub(r"^postgres(?=://|\+)", "postgresql", url)
    malformed = ConfigurationError(
        "the database URL is malformed; expected postgresql://user:password@host:5432/database "
        "or sqlite:///path/to/file.db (special characters in the password must be percent-encoded)"
    )
    try:
        parsed = sa.make_url(url)
    except (exc.ArgumentError, ValueError):
        raise malformed from None
    backend = checked_dialect(parsed.get_backend_name())
    if backend == POSTGRESQL and isinstance(url, str) and _has_second_at_sign(url):
        raise malformed
    driver = "postgresql+psycopg" if backend == POSTGRESQL else "sqlite"
    return parsed.set(drivername=driver)


def _has_second_at_sign(url: str) -> bool:
    """Whether an @ is left behind the credentials: the rest of a password with an @ in it, which would be taken for
    the host or the database, and shown."""
    behind = re.sub(r"^[^:/]*(:[^@]*)?@", "", url.partition("://")[2])
    return "@" in behind.partition("?")[0]


def make_engine(url: str | sa.URL) -> sa.Engine:
    """An engine for pgqueue's own connections: as many as its threads ask for, READ COMMITTED, parameters
    (payloads!) kept out of error messages."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == SQLITE:
        return _make_sqlite_engine(parsed)
    _require_libpq()
    engine = sa.create_engine(
        parsed,
        connect_args=_connect_arguments(parsed),
        hide_parameters=True,
        isolation_level="READ COMMITTED",
        pool_size=0,  # no limit: each thread holds one connection at most
    )
    _read_moments(engine)
    ask_only_when_in_doubt(engine)
    return engine


def make_async_engine(url: sa.URL, *, pool_size: int = 5) -> AsyncEngine:
    """The asynchronous twin of `make_engine`, for `async def` transactional tasks and the `_async` calls.

    pool_size: connections kept; 0: as many as are asked for.
    """
    if url.get_backend_name() == SQLITE:
        try:
            import aiosqlite  # noqa: F401 — only whether it is there
        except ImportError:
            raise ConfigurationError(
                "asynchronous calls on SQLite need the package aiosqlite: pip install aiosqlite"
            ) from None
        engine = create_async_engine(
            url.set(drivername="sqlite+aiosqlite"), hide_parameters=True, poolclass=sa.NullPool
        )
        prepare_sqlite(engine.sync_engine)
        return engine
    _require_libpq()
    engine = create_async_engine(
        url,
        connect_args=_connect_arguments(url),
        hide_parameters=True,
        isolation_level="READ COMMITTED",
        pool_size=pool_size,
    )
    _read_moments(engine.sync_engine)
    ask_only_when_in_doubt(engine.sync_engine)
    return engine


def _read_moments(engine: sa.Engine) -> None:
    """Have moments come in the one style that psycopg can read, where the database or user is set to another."""

    @event.listens_for(engine, "connect")
    def connect(dbapi_connection: Any, _: Any) -> None:
        driver_connection = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        if not driver_connection.info.parameter_status("DateStyle").startswith("ISO"):
            cursor = dbapi_connection.cursor()
            cursor.execute("SET datestyle TO ISO")
            cursor.close()
            dbapi_connection.commit()


def _connect_arguments(url: sa.URL) -> dict[str, Any]:
    """What psycopg is given besides the URL.

    No prepared statements: they break behind a pooler in transaction mode, and a session that is shared has to plan for
    whatever is sent next. A worker's own sessions keep their plans (`plans`).
    """
    arguments = {name: value for name, value in CONNECT_DEFAULTS.items() if name not in url.query}
    return {**arguments, "prepare_threshold": None}


def _require_libpq() -> None:
    try:
        import psycopg  # noqa: F401 — only whether it can be imported
    except ImportError as error:
        raise ConfigurationError(
            "psycopg finds no libpq, PostgreSQL's client library. Install it with pgqueue: "
            "pip install 'pgqueue[binary]', or with your system, e.g. apt-get install libpq5"
        ) from error


def _make_sqlite_engine(url: sa.URL) -> sa.Engine:
    if sqlite3.sqlite_version_info < SQLITE_VERSION_MIN:
        raise ConfigurationError(
            f"pgqueue needs SQLite {'.'.join(map(str, SQLITE_VERSION_MIN))} or newer; "
            f"this Python was built with {sqlite3.sqlite_version}"
        )
    in_memory = is_in_memory(url)
    engine = sa.create_engine(
        url,
        hide_parameters=True,
        # One connection is one in-memory database, so all threads must share it.
        **({"poolclass": sa.StaticPool, "connect_args": {"check_same_thread": False}} if in_memory else {}),
        **({} if in_memory else {"poolclass": sa.NullPool}),
    )
    prepare_sqlite(engine)
    return engine


def is_in_memory(url: sa.URL) -> bool:
    """Whether this is a SQLite database that lives in one connection and ends with it."""
    return url.get_backend_name() == SQLITE and url.database in (None, "", ":memory:")


def prepare_sqlite(engine: sa.Engine) -> None:
    """Make SQLite safe for several workers: every transaction but those of `reading` begins by taking the write lock.

    With the driver's own handling a transaction that reads first and writes later does not wait for the lock,
    and two workers may claim the same job without any error.
    """

    @event.listens_for(engine, "do_connect")
    def do_connect(_: sa.Dialect, __: Any, ___: Any, parameters: dict[str, Any]) -> None:
        parameters["factory"] = _SqliteConnection

    @event.listens_for(engine, "connect")
    def connect(dbapi_connection: Any, _: Any) -> None:
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(SQLITE_BUSY_SECONDS * 1000)}")
        try:
            cursor.execute(_SQLITE_KEEP_LOG)
            cursor.execute("PRAGMA synchronous = NORMAL")
        except Exception as error:
            # A read-only file can still be read; a write will say what is wrong.
            if "readonly" not in str(error):
                raise
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        only_reads = connection.get_execution_options().get("pgqueue_only_reads", False)
        connection.exec_driver_sql("BEGIN" if only_reads else _SQLITE_BEGIN)


class _SqliteConnection(sqlite3.Connection):
    def cursor(self, factory: Any = None) -> Any:
        return super().cursor(factory or _SqliteCursor)


class _SqliteCursor(sqlite3.Cursor):
    """Waits fairly for its turn to write.

    Left to itself, SQLite looks for the lock the less often the longer it has waited: those who come later get it
    first, and on a busy file some never do. Who waits in short turns looks as often as everybody else.
    """

    def execute(self, sql: str, parameters: Any = ()) -> Self:
        if sql not in (_SQLITE_BEGIN, _SQLITE_KEEP_LOG):
            return super().execute(sql, parameters)
        give_up_at = time.monotonic() + SQLITE_BUSY_SECONDS
        self._wait_at_most(SQLITE_TURN_SECONDS)
        try:
            while True:
                turn_ends_at = time.monotonic() + SQLITE_TURN_SECONDS
                try:
                    return super().execute(sql)
                except sqlite3.OperationalError as error:
                    if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > give_up_at:
                        raise
                    # Some things SQLite refuses at once, however long it is told to wait.
                    time.sleep(max(turn_ends_at - time.monotonic(), 0.0))
        finally:
            self._wait_at_most(SQLITE_BUSY_SECONDS)

    def _wait_at_most(self, seconds: float) -> None:
        self.connection.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}").close()


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that only reads: on SQLite it neither waits for a writer nor keeps one waiting."""
    with engine.connect().execution_options(pgqueue_only_reads=True) as connection, connection.begin():
        yield connection


@contextmanager
def committing_each(connection: sa.Connection) -> Iterator[None]:
    """For statements that are whole by themselves: each commits at once, and takes one round trip instead of three.

    A process that freezes in between holds no locks. On SQLite, an ordinary transaction.
    """
    if connection.dialect.name == SQLITE:
        with connection.begin():
            yield
        return
    connection.execution_options(isolation_level="AUTOCOMMIT")
    try:
        with connection.begin():
            yield
    finally:
        if not connection.invalidated:
            connection.execution_options(isolation_level="READ COMMITTED")


@contextmanager
def straight(connection: sa.Connection) -> Iterator[None]:
    """As `committing_each`, for `dialect.execute` alone, which then goes past SQLAlchemy to `libpq`: SQLAlchemy would
    take the client as long again as the driver, and in an idle worker, whose caches are cold, most of what a look for
    jobs costs.

    Not where somebody listens to what the engine or its driver executes, or has it logged: they are to hear of
    everything.
    """
    if connection.dialect.driver != "psycopg" or _is_watched(connection):
        with committing_each(connection):
            yield
        return
    driver: Any = connection.connection.driver_connection
    if not driver.closed:
        driver.autocommit = True  # refused in a transaction, where what follows would not be committed
    connection.info[STRAIGHT] = True
    try:
        yield
    finally:
        del connection.info[STRAIGHT]
        if not driver.closed:
            driver.autocommit = False


def _is_watched(connection: sa.Connection) -> bool:
    listeners = connection.dispatch
    driver: Any = connection.connection.driver_connection
    dbapi: Any = connection.dialect.loaded_dbapi
    return bool(
        listeners.before_cursor_execute
        or listeners.after_cursor_execute
        or connection.dialect.dispatch.handle_error
        or driver.cursor_factory is not dbapi.Cursor
        or connection.engine.logger.isEnabledFor(logging.INFO)
    )


@contextmanager
def looking(connection: sa.Connection) -> Iterator[None]:
    """Likewise for one query: on SQLite it neither waits for a writer nor keeps one waiting."""
    if connection.dialect.name != SQLITE:
        with straight(connection):
            yield
        return
    connection.execution_options(pgqueue_only_reads=True)
    try:
        with connection.begin():
            yield
    finally:
        connection.execution_options(pgqueue_only_reads=False)


def end_if_frozen(connection: sa.Connection, seconds: float) -> None:
    """Have the server end the present transaction when nothing is heard of it for so long.

    A process that freezes in between keeps its locks, and no lease lets go of a row that is locked.
    """
    autocommit = connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
    if connection.dialect.name == POSTGRESQL and not autocommit:
        connection.execute(
            sa.text("SELECT set_config('idle_in_transaction_session_timeout', :milliseconds, true)"),
            {"milliseconds": idle_milliseconds(seconds)},
        )


@contextmanager
def waiting_at_most(connection: sa.Connection, seconds: float) -> Iterator[None]:
    """A savepoint in which no statement waits longer for a lock: then LockNotWon, and what it did is undone.

    It should be less than `deadlock_timeout`, a second unless it was set: then two that wait for each other part before
    the server ends one of them.
    """
    with savepoint(connection):
        if connection.dialect.name != POSTGRESQL:
            yield
            return
        setting = sa.text("SELECT current_setting('lock_timeout'), set_config('lock_timeout', :value, true)")
        before, _ = connection.execute(setting, {"value": str(int(seconds * 1000))}).one()
        try:
            yield
        except sa.exc.OperationalError as error:
            if getattr(error.orig, "sqlstate", None) == LOCK_NOT_AVAILABLE:
                raise LockNotWon from error
            raise
        connection.execute(setting, {"value": before})


class LockNotWon(Exception):
    """Somebody else kept a lock for longer than we were ready to wait."""


@contextmanager
def bounding_itself(connection: sa.Connection) -> Iterator[None]:
    """For a transaction that says by itself when the server is to end it: see `is_bounding_itself`."""
    connection.execution_options(pgqueue_bounds_itself=True)
    try:
        yield
    finally:
        if not connection.invalidated:
            connection.execution_options(pgqueue_bounds_itself=False)


def is_bounding_itself(connection: sa.Connection) -> bool:
    return bool(connection.get_execution_options().get("pgqueue_bounds_itself", False))


def idle_milliseconds(seconds: float) -> str:
    """A timeout as the server takes it."""
    return str(min(int(seconds * 1000), IDLE_MILLISECONDS_MAX))


@contextmanager
def savepoint(connection: sa.Connection) -> Iterator[None]:
    """A savepoint within the transaction of the connection, also where SQLite's driver has not begun one yet. Nothing
    where each statement commits by itself."""
    if commits_by_itself(connection):
        yield
        return
    if begins_late(connection) and not getattr(connection.connection.driver_connection, "in_transaction", False):
        connection.exec_driver_sql("BEGIN")
    with connection.begin_nested():
        yield


def commits_by_itself(connection: sa.Connection) -> bool:
    """Whether each statement is a transaction of its own, so that no commit will be heard of."""
    # Not bool(…): that of sqlite3 is -1 for its old way, in which there are transactions.
    return getattr(connection.connection.driver_connection, "autocommit", False) is True


def begins_late(connection: sa.Connection) -> bool:
    """Whether SQLite's driver begins transactions, at the first write: a savepoint before that is one of its own, and
    its release commits."""
    driver = connection.connection.driver_connection
    legacy = getattr(driver, "autocommit", -1) == -1
    return connection.dialect.name == SQLITE and legacy and getattr(driver, "isolation_level", None) is not None


def is_aborted(connection: sa.Connection) -> bool:
    """Whether the server refuses everything but a rollback, because a statement of the transaction has failed."""
    info = getattr(connection.connection.driver_connection, "info", None)  # as psycopg has it
    return info is not None and info.transaction_status.name == "INERROR"


def describe_url(url: sa.URL) -> str:
    """The URL for people: without the password, and without query values, which may hold one too."""
    return url.set(query={}).render_as_string(hide_password=True)


class errors_explained:
    """Turn a failure to reach the database, or to find pgqueue's tables there, into an error that says so."""

    __slots__ = ("_url",)

    def __init__(self, url: sa.URL) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, exc.DBAPIError) and (explained := explain(error, self._url)) is not None:
            raise explained from None


def explain(error: exc.DBAPIError, url: sa.URL) -> PgqueueError | None:
    """The error that this database error amounts to, or None when it is none of the known ones."""
    where = describe_url(url)
    message = first_line(error)
    sqlstate = getattr(error.orig, "sqlstate", None) or ""
    if sqlstate in ("42P01", "3F000") or "no such table" in message:
        return SchemaMissing(f"pgqueue's tables are not in {where}; create them with: pgqueue db upgrade")
    if sqlstate == "42501":
        return ConfigurationError(
            f"database user {url.username!r} lacks a right in {where}: {message}. Working takes, from the owner: GRANT "
            "USAGE on the schema, and SELECT, INSERT, UPDATE, DELETE on its tables"
        )
    if sqlstate in MIXED_UP:
        return ConfigurationError(
            f"{where}: {message}. A pooler in transaction mode mixes up what its clients prepare; make the engine with "
            'connect_args={"prepare_threshold": None}'
        )
    if QUERY_WAIT_TIMEOUT in message:
        return DatabaseUnreachable(
            f"cannot use {where}: {message}, which is how long the pooler waits until one of its server connections is "
            "free; all of them were taken. Give it more of them (default_pool_size)"
        )
    if "invalid connection option" in message:
        return ConfigurationError(f"{where}: {message}")
    if "unable to open database file" in message:
        return DatabaseUnreachable(f"cannot open {where}: does the folder exist, and may this user write there?")
    if "readonly database" in message:
        return DatabaseUnreachable(f"{where} is read-only for this user; pgqueue has to write to it")
    if "database is locked" in message:
        return DatabaseUnreachable(
            f"{where} has been locked by another process for {SQLITE_BUSY_SECONDS:g} seconds; "
            "which program holds a transaction open on it?"
        )
    if "file is not a database" in message:
        return DatabaseUnreachable(f"{where} is not a SQLite database")
    if sqlstate == "57014":
        return None  # a statement was cancelled, or took longer than its timeout: the connection goes on
    if is_disconnect(error) or sqlstate[:2] in ("08", "28", "57") or sqlstate in ("3D000", "53300"):
        return DatabaseUnreachable(f"cannot use {where}: {message}")
    return None


def is_disconnect(error: BaseException) -> bool:
    """Whether the connection is gone, so that a new one may succeed where this failed."""
    if not isinstance(error, exc.DBAPIError):
        return isinstance(error, exc.TimeoutError)
    if error.connection_invalidated:
        return True
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate is not None:
        # 25006: the server became a standby; 57P0x: it is shutting down or starting.
        return sqlstate in ("25006", "57P01", "57P02", "57P03") or sqlstate.startswith("08")
    # psycopg has no SQLSTATE for a connection that could not be made or broke.
    return isinstance(error, exc.OperationalError) and not isinstance(error.orig, sqlite3.Error)


def is_transient(error: BaseException) -> bool:
    """Whether the same statement may succeed when it is simply tried again."""
    if is_disconnect(error):
        return True
    if not isinstance(error, exc.DBAPIError):
        return False
    if isinstance(error.orig, sqlite3.OperationalError):
        return "lock" in str(error.orig)  # also "locking protocol": too many opened the file at once
    # Deadlock, serialization failure, lock or statement timeout, cached plan, out of space or connections.
    sqlstate = getattr(error.orig, "sqlstate", None) or ""
    return sqlstate in ("40P01", "40001", "55P03", "57014", "0A000") or sqlstate[:2] in ("53", "58")


def is_locked(error: BaseException) -> bool:
    """Whether a statement waited for another transaction until the server ended that; a savepoint survives it."""
    return _has_sqlstate(error, (LOCK_NOT_AVAILABLE, "40P01"))


def is_mixed_up(error: BaseException) -> bool:
    """Whether the session has lost what was prepared in it, or has what somebody else prepared."""
    return _has_sqlstate(error, MIXED_UP)


def _has_sqlstate(error: BaseException, sqlstates: Collection[str]) -> bool:
    return isinstance(error, exc.DBAPIError) and getattr(error.orig, "sqlstate", None) in sqlstates


def is_refusal(error: BaseException) -> bool:
    """Whether the database, or the driver, does not take what a statement carries, and so never will."""
    if not isinstance(error, exc.DBAPIError):
        return not is_transient(error)
    sqlstate = getattr(error.orig, "sqlstate", None) or ""
    # Data exception, violated constraint, raised by a trigger, too large.
    return isinstance(error, exc.DataError | exc.IntegrityError) or sqlstate[:2] in ("22", "23", "P0", "54")


def first_line(error: exc.DBAPIError) -> str:
    """What the driver said, in one line; a connection string that it quotes is left out."""
    text = str(error.orig).strip()
    line = text.splitlines()[0] if text else type(error.orig).__name__
    return re.sub(r"(password|passfile|sslpassword)=\S+", r"\1=***", re.sub(r"://[^@\s]*@", "://***@", line))
