"""Which database a queue works in: its engines, its tables, and transactions of pgqueue's own."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from pgqueue.config import checked_schema
from pgqueue.dialect import POSTGRESQL, checked_dialect
from pgqueue.engine import end_if_frozen, errors_explained, make_async_engine, make_engine, parse_url, reading
from pgqueue.errors import ConfigurationError
from pgqueue.job import Job
from pgqueue.notifier import WakeSender
from pgqueue.schema import Tables, tables_for
from pgqueue.settings import Sources
from pgqueue.steps import Step, Steps, take, take_async
from pgqueue.transaction import (
    AsyncTransaction,
    SyncTransaction,
    open_transaction,
    run_in_transaction,
    wake_after_commit,
)

T = TypeVar("T")
E = TypeVar("E", sa.Engine, AsyncEngine)

READ_COMMITTED = "READ COMMITTED"

#: After so long the server ends the transaction of a claim, or of its end, in which a process froze.
FROZEN_SECONDS = 30.0


class Database:
    """A database and the schema in it that has pgqueue's tables. Connects when it is first used."""

    def __init__(self, database: str | sa.URL | sa.Engine | AsyncEngine | None, schema: str | None) -> None:
        self.schema = checked_schema(Sources().find("schema", schema).value)
        self._lock = threading.RLock()
        self._engine: sa.Engine | None = None
        self._engine_is_own = False  # and was not given
        self._async_engine: AsyncEngine | None = None
        self._async_engine_is_own = False
        self._url: sa.URL | None = None
        self._wake_sender = self._new_wake_sender()
        _databases.add(self)
        if database is not None:
            self.connect_to(database)

    @property
    def has_database(self) -> bool:
        """Whether a database was named, so that the environment is not asked for one."""
        return self._url is not None

    def use_schema(self, schema: str) -> None:
        """Use the tables of this schema from now on; the command line's `--schema` ends up here."""
        self.schema = checked_schema(schema)
        self._wake_sender = self._new_wake_sender()

    def connect_to(self, database: str | sa.URL | sa.Engine | AsyncEngine) -> None:
        """Use this database from now on; the command line's `--database-url` ends up here."""
        engine: sa.Engine | None = None
        async_engine: AsyncEngine | None = None
        if isinstance(database, sa.Engine):
            engine, url = _at_read_committed(database), database.url
        elif isinstance(database, AsyncEngine):
            async_engine, url = _at_read_committed(database), parse_url(database.url)
        elif isinstance(database, str | sa.URL):
            url = parse_url(database)
        else:
            raise ConfigurationError(f"a database is a URL, an Engine or an AsyncEngine, got {type(database).__name__}")
        with self._lock:
            self._engine, self._async_engine, self._url = engine, async_engine, url
            self._engine_is_own = self._async_engine_is_own = False
            self._wake_sender = self._new_wake_sender()

    @property
    def url(self) -> sa.URL:
        """The database's URL. ConfigurationError when there is none."""
        with self._lock:
            if self._url is None:
                found = Sources().find("database_url").value
                if found is None:
                    raise ConfigurationError(
                        "no database: pass a URL to PgQueue(…), set PGQUEUE_DATABASE_URL or DATABASE_URL, or give "
                        "database_url in pgqueue.toml"
                    )
                self._url = parse_url(found)
            return self._url

    @property
    def engine(self) -> sa.Engine:
        """The engine of pgqueue's own connections; made when first used, unless one was given."""
        with self._lock:
            if self._engine is None:
                self._engine, self._engine_is_own = make_engine(self.url), True
            return self._engine

    @property
    def async_engine(self) -> AsyncEngine:
        """Likewise for asynchronous calls."""
        with self._lock:
            if self._async_engine is None:
                self._async_engine, self._async_engine_is_own = make_async_engine(parse_url(self.url)), True
            return self._async_engine

    @property
    def _plain_url(self) -> str | None:
        """The URL, with its password, for a process of this worker's; None when an engine was given, or nothing yet."""
        with self._lock:
            given = self._engine is not None and not self._engine_is_own
            given_async = self._async_engine is not None and not self._async_engine_is_own
            if self._url is None or given or given_async:
                return None
            return self._url.render_as_string(hide_password=False)

    def _new_wake_sender(self) -> WakeSender:
        return WakeSender(lambda: self.engine, self.schema)

    def _start_anew_after_fork(self) -> None:
        """A forked child has none of its parent's threads, one of which may have held the lock, and must not talk on
        its parent's connections: it forgets them without closing them."""
        self._lock = threading.RLock()
        self._wake_sender = self._new_wake_sender()
        if self._engine is not None and self._engine_is_own:
            self._engine.dispose(close=False)
        if self._async_engine is not None and self._async_engine_is_own:
            self._async_engine.sync_engine.dispose(close=False)

    @property
    def tables(self) -> Tables:
        """The tables as this database has them, for queries of your own."""
        return tables_for(self.url.get_backend_name(), self.schema)

    @property
    def _job_class(self) -> type[Job] | None:
        """The mapped class, unless no database was named yet."""
        return self.tables.job_class if self.has_database else None

    def _tables_of(self, connection: sa.Connection) -> Tables:
        return tables_for(checked_dialect(connection.dialect.name), self.schema)

    def dispose(self) -> None:
        """Close pgqueue's own connections; an engine that was given keeps its own. It connects again when used
        again."""
        self._wake_sender.close()
        with self._lock:
            if self._engine is not None and self._engine_is_own:
                self._engine.dispose()

    async def dispose_async(self) -> None:
        """As `dispose`, and close the connections of the asynchronous engine, too."""
        await asyncio.to_thread(self.dispose)
        with self._lock:
            engine = self._async_engine if self._async_engine_is_own else None
        if engine is not None:
            await engine.dispose()

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction of pgqueue's own, with database errors explained."""
        with errors_explained(self.url), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Likewise a transaction that only reads: on SQLite it waits for no writer, and no writer waits for it."""
        with errors_explained(self.url), reading(self.engine) as connection:
            yield connection

    async def read_async(self, work: Callable[[sa.Connection], T]) -> T:
        """Likewise, for `work` in a transaction of the asynchronous engine."""
        with errors_explained(self.url):
            async with self.async_engine.connect() as connection:
                await connection.execution_options(pgqueue_only_reads=True)
                async with connection.begin():
                    return await connection.run_sync(work)

    def _take(self, steps: Steps[T]) -> T:
        """Take the steps of a call, each in a transaction of its own."""
        return take(steps, self._take_one)

    async def _take_async(self, steps: Steps[T]) -> T:
        return await take_async(steps, self._take_one_async)

    def _take_in(self, session: SyncTransaction | None, call: str, steps: Steps[T]) -> T:
        """Likewise, but all of them in the transaction of `session` if there is one."""
        if session is None:
            return self._take(steps)

        def take_one(step: Step[Any]) -> Any:
            return self._take_within(step, *open_transaction(session, call, self._job_class))

        return take(steps, take_one)

    async def _take_in_async(self, session: AsyncTransaction | None, call: str, steps: Steps[T]) -> T:
        if session is None:
            return await self._take_async(steps)

        async def take_one(step: Step[Any]) -> Any:
            work = functools.partial(self._take_within, step)
            return await run_in_transaction(session, call, self._job_class, work)

        return await take_async(steps, take_one)

    def _take_one(self, step: Step[Any]) -> Any:
        if step.only_reads:
            with self.reading() as connection:
                return step.work(connection, connection)
        with self.begin() as connection:
            end_if_frozen(connection, FROZEN_SECONDS)
            result = step.work(connection, connection)
        self._wake_workers(step, result)
        return result

    async def _take_one_async(self, step: Step[Any]) -> Any:
        if step.only_reads:
            return await self.read_async(lambda connection: step.work(connection, connection))
        with errors_explained(self.url):
            async with self.async_engine.begin() as connection:
                await connection.run_sync(end_if_frozen, FROZEN_SECONDS)
                result = await connection.run_sync(lambda sync: step.work(sync, sync))
        self._wake_workers(step, result)
        return result

    def _take_within(self, step: Step[Any], target: Session | sa.Connection, connection: sa.Connection) -> Any:
        """Take a step in a caller's transaction."""
        with errors_explained(connection.engine.url):
            result = step.work(target, connection)
        if connection.dialect.name == POSTGRESQL:
            for queue in step.wakes(result):
                wake_after_commit(target, connection, queue, self._wake_sender)
        return result

    def _wake_workers(self, step: Step[Any], result: Any) -> None:
        queues = set(step.wakes(result))
        if queues and self.tables.dialect_name == POSTGRESQL:
            self._wake_sender(queues, True)


#: Those of this process.
_databases: weakref.WeakSet[Database] = weakref.WeakSet()


def _start_anew_after_fork() -> None:
    for database in list(_databases):
        database._start_anew_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_start_anew_after_fork)


def _at_read_committed(engine: E) -> E:
    """The application's engine, with its connections, at the isolation level that pgqueue's statements are made for.

    At another one a heartbeat would break the transaction of a task, and with autocommit there is no transaction.
    """
    if checked_dialect(engine.dialect.name) != POSTGRESQL:
        return engine
    own = engine.get_execution_options().get("isolation_level", READ_COMMITTED)
    if own != READ_COMMITTED:  # SQLAlchemy lets the options of an engine win over those of one derived from it
        raise ConfigurationError(
            f"the engine has the isolation level {own!r} in its execution_options, where it cannot be replaced by "
            f"{READ_COMMITTED!r}, which pgqueue needs. Give PgQueue the engine that this one was derived from, or set "
            f"the level by create_engine(…, isolation_level={own!r})"
        )
    return engine.execution_options(isolation_level=READ_COMMITTED)
