"""Create and upgrade pgqueue's tables: Alembic, driven from code, safe for several deployers at once.

Who upgrades needs CREATE on the database, or owns the schema. Who enqueues and works needs less:

    GRANT USAGE ON SCHEMA pgqueue TO worker;
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA pgqueue TO worker;

An upgrade takes two connections, one of which only keeps other deployers out. Nothing of it belongs to a session, so a
pooler in transaction mode does as well as a direct connection.
"""

from __future__ import annotations

import io
import logging
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.dialects import postgresql

from pgqueue.config import checked_schema
from pgqueue.dialect import POSTGRESQL, SQLITE, checked_dialect
from pgqueue.engine import explain
from pgqueue.errors import ConfigurationError, DatabaseUnreachable, SchemaMissing, SchemaOutdated
from pgqueue.schema import DOMAINS, tables_for

if TYPE_CHECKING:  # and where it is used: who enqueues or works need not wait until Alembic is loaded
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext

logger = logging.getLogger(__name__)

#: The newest revision in migrations/versions.
HEAD = "pgqueue_0002"

#: A statement of a migration that cannot get its lock in time fails instead of queueing all traffic behind it.
LOCK_TIMEOUT_SECONDS = 5.0

#: How long a deployer waits for another one that is migrating at the same time.
DEPLOYER_WAIT_SECONDS = 300.0

_POLL_SECONDS = 0.2

#: Alembic's `op` and `context` are global to the process: one migration at a time in it.
_alembic = threading.Lock()


def migrations_path() -> Path:
    """The folder with env.py and versions/: inside an installed package, or at the top of a checkout."""
    installed = Path(str(files("pgqueue"))) / "migrations"
    return installed if installed.is_dir() else Path(__file__).resolve().parent.parent / "migrations"


def head_revision() -> str:
    """The newest revision this code knows."""
    return HEAD


def current_revision(connection: sa.Connection, schema: str) -> str | None:
    """The revision the tables are at; None when there are none, or another Alembic history manages them."""
    schema_name, version_table = _place(connection.dialect.name, schema)
    if not sa.inspect(connection).has_table(version_table, schema=schema_name):
        return None
    table = sa.table(version_table, sa.column("version_num"), schema=schema_name)
    return connection.execute(sa.select(table.c.version_num)).scalar_one_or_none()


def require_current(connection: sa.Connection, schema: str) -> str | None:
    """Check that this code can work with the tables.

    Raises SchemaMissing or SchemaOutdated. Returns a warning when the tables are newer than this code, which is
    what a rolling deployment looks like: migrations are written so that the code before them goes on working.
    """
    current, head = current_revision(connection, schema), head_revision()
    if current is None:
        _require_parts(connection, schema)
        return None
    if current == head:
        return None
    if _knows(current):
        raise SchemaOutdated(
            f"the tables of schema {schema!r} are at revision {current}, this code needs {head}; "
            "upgrade them first with: pgqueue db upgrade"
        )
    return _newer(schema, current)


def upgrade(
    engine: sa.Engine,
    schema: str,
    revision: str = "head",
    *,
    lock_timeout: float = LOCK_TIMEOUT_SECONDS,
    wait: float = DEPLOYER_WAIT_SECONDS,
) -> None:
    """Bring the tables to a revision, creating what is missing. Safe for several deployers at once.

    lock_timeout: seconds that a statement waits for other transactions to let go of a table.
    wait: seconds to wait for another deployer.

    Each revision is one transaction, on SQLite all of them together. Tables that are newer than this code are
    left as they are, with a warning in the log: that is a deployment being rolled back. Raises SchemaOutdated
    when a lock or the other deployer kept it waiting too long, ConfigurationError when there is no such revision
    or this database user lacks the right.
    """
    with exclusive(engine, schema, lock_timeout=lock_timeout, wait=wait) as connection:
        current = current_revision(connection, schema)
        if current is None and _has_jobs(connection, schema):
            raise ConfigurationError(
                f"schema {schema!r} has pgqueue's tables, but not pgqueue's own version table: they belong to the "
                "Alembic history of an application; upgrade them there with: alembic upgrade heads"
            )
        if current is not None and not _knows(current) and revision == "head":
            logger.warning("%s; nothing to upgrade", _newer(schema, current))
            return
        _run("upgrade", connection, schema, revision)


def downgrade(
    engine: sa.Engine,
    schema: str,
    revision: str,
    *,
    lock_timeout: float = LOCK_TIMEOUT_SECONDS,
    wait: float = DEPLOYER_WAIT_SECONDS,
) -> None:
    """Take the tables back to an older revision; `base` drops them with everything in them. As `upgrade`."""
    with exclusive(engine, schema, lock_timeout=lock_timeout, wait=wait) as connection:
        _run("downgrade", connection, schema, revision)


def differences(connection: sa.Connection, schema: str) -> list[Any]:
    """What Alembic would change to make the tables what this code expects; empty when they are."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    name = connection.dialect.name
    context = MigrationContext.configure(connection, opts=configure_options(name, schema))
    list_schema(connection, schema)
    with quiet_about_expressions():
        found = list(compare_metadata(context, tables_for(name, schema).metadata))
    if name == SQLITE:
        present = _index_names(connection, schema)
        for table in tables_for(name, schema).metadata.sorted_tables:
            found += [("add_index", index) for index in _over_expressions(table) if index.name not in present]
    return found


def offline_sql(dialect_name: str, schema: str, revision: str = "head") -> str:
    """The statements of an upgrade from nothing, or `from:to`, for people who run SQL themselves."""
    from alembic import command

    output = io.StringIO()
    config = _config(checked_schema(schema), dialect_name=checked_dialect(dialect_name))
    config.output_buffer = output
    with _alembic, _command_errors(revision):
        command.upgrade(config, revision, sql=True)
    return output.getvalue()


# What env.py uses too -----------------------------------------------------------------------------------------


@contextmanager
def exclusive(
    engine: sa.Engine,
    schema: str,
    *,
    lock_timeout: float = LOCK_TIMEOUT_SECONDS,
    wait: float = DEPLOYER_WAIT_SECONDS,
) -> Iterator[sa.Connection]:
    """A connection on which no other deployer migrates this schema at the same time; commits at the end.

    On PostgreSQL an advisory lock, held by a transaction on a connection of its own that does nothing else: revisions
    are transactions themselves, and a lock of a session would be left behind in a pooler's. It is polled for: a
    deployer that waited inside pg_advisory_xact_lock would hold a snapshot, which a CREATE INDEX CONCURRENTLY of the
    other one waits for, and both would wait for ever. On SQLite one transaction that holds the write lock from the
    start.
    """
    checked_schema(schema)
    postgresql = checked_dialect(engine.dialect.name) == POSTGRESQL
    begin = _locked_on_postgresql if postgresql else _locked_on_sqlite
    with _errors_explained(engine.url, schema, lock_timeout), begin(engine, schema, lock_timeout, wait) as connection:
        yield connection


def configure_options(dialect_name: str, schema: str) -> dict[str, Any]:
    """What env.py passes to `context.configure` besides the connection."""
    flat = dialect_name == SQLITE
    tables = tables_for(dialect_name, schema).metadata.sorted_tables
    names = {table.name for table in tables}
    incomparable = {index.name for table in tables for index in _over_expressions(table)}

    def include_name(name: str | None, type_: str, parent_names: Any) -> bool:
        if not flat:
            return type_ != "schema" or name == schema
        return (type_ != "table" or name in names) and (type_ != "index" or name not in incomparable)

    schema_name, version_table = _place(dialect_name, schema)
    return {
        "version_table": version_table,
        "version_table_schema": schema_name,
        "include_schemas": not flat,
        "include_name": include_name,
        "compare_type": _compare_type,
        "compare_server_default": False,  # the database writes expressions in its own words
        "transaction_per_migration": True,
    }


def list_schema(connection: sa.Connection, schema: str) -> None:
    """Let Alembic's comparison see the schema, for as long as the engine lives.

    SQLAlchemy before 2.1 lists no schema whose name is like `pg_%`, where `_` is any letter: not `pgqueue` either.
    """
    inspector = sa.inspect(connection)
    if inspector.has_schema(schema) and schema not in inspector.get_schema_names():
        listed = connection.dialect.get_schema_names

        def get_schema_names(*arguments: Any, **options: Any) -> list[str]:
            return [*listed(*arguments, **options), schema]

        connection.dialect.get_schema_names = get_schema_names  # type: ignore[method-assign]


@contextmanager
def quiet_about_expressions() -> Iterator[None]:
    """Without the warning that Alembic cannot compare indexes over expressions (`priority DESC`) on SQLite."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "autogenerate skipping metadata-specified expression-based index")
        yield


def _compare_type(
    _: MigrationContext,
    inspected: sa.Column[Any],
    __: sa.Column[Any],
    inspected_type: sa.types.TypeEngine[Any],
    ___: sa.types.TypeEngine[Any],
) -> bool | None:
    """Whether the types of two columns differ: False for the domain that belongs there, None to let Alembic see."""
    if not isinstance(inspected_type, postgresql.DOMAIN):
        return None
    expected = [domain.name for domain in DOMAINS if inspected.name in domain.columns]
    return inspected_type.name not in expected


# Helpers ------------------------------------------------------------------------------------------------------


def _place(dialect_name: str, schema: str) -> tuple[str | None, str]:
    """The schema, if the database has any, and the name of the version table."""
    flat = checked_dialect(dialect_name) == SQLITE
    return (None, f"{checked_schema(schema)}_alembic_version") if flat else (checked_schema(schema), "alembic_version")


def _config(schema: str, **attributes: Any) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.attributes.update(pgqueue_schema=schema, **attributes)
    return config


def _knows(revision: str) -> bool:
    from alembic.script import ScriptDirectory

    return revision in {script.revision for script in ScriptDirectory.from_config(_config("pgqueue")).walk_revisions()}


def _newer(schema: str, current: str) -> str:
    return (
        f"the tables of schema {schema!r} are at revision {current}, which is newer than this code ({head_revision()})"
    )


def _has_jobs(connection: sa.Connection, schema: str) -> bool:
    jobs = tables_for(connection.dialect.name, schema).jobs
    return sa.inspect(connection).has_table(jobs.name, schema=jobs.schema)


def _require_parts(connection: sa.Connection, schema: str) -> None:
    """Check tables without a version table of pgqueue's own, as in an application's own Alembic history: that
    everything is there which this code uses."""
    if not _has_jobs(connection, schema):
        raise SchemaMissing(f"schema {schema!r} has no pgqueue tables; create them with: pgqueue db upgrade")
    tables = tables_for(connection.dialect.name, schema).metadata.sorted_tables
    columns = sa.inspect(connection).get_multi_columns(schema=tables[0].schema)
    indexes = _index_names(connection, schema)
    missing = []
    for table in tables:
        present = {column["name"] for column in columns.get((table.schema, table.name), [])}
        missing += [f"{table.name}.{column.name}" for column in table.columns if column.name not in present]
        missing += [str(index.name) for index in table.indexes if index.name not in indexes]
    if missing:
        raise SchemaOutdated(
            f"the tables of schema {schema!r} are older than this code, or damaged: {', '.join(sorted(missing))} "
            "missing. No version table of pgqueue's own is there, so they belong to the Alembic history of an "
            "application; upgrade them there with: alembic upgrade heads"
        )


def _index_names(connection: sa.Connection, schema: str) -> set[str]:
    """Of PostgreSQL those in the schema, of SQLite all."""
    if connection.dialect.name == SQLITE:
        return set(connection.scalars(sa.text("SELECT name FROM sqlite_master WHERE type = 'index'")))
    query = sa.text("SELECT indexname FROM pg_indexes WHERE schemaname = :schema")
    return set(connection.scalars(query, {"schema": schema}))


def _over_expressions(table: sa.Table) -> list[sa.Index]:
    return [index for index in table.indexes if any(not isinstance(part, sa.Column) for part in index.expressions)]


def _run(name: str, connection: sa.Connection, schema: str, revision: str) -> None:
    from alembic import command

    run: Callable[..., None] = getattr(command, name)
    if connection.dialect.name == POSTGRESQL:
        connection.commit()  # Alembic makes each revision a transaction only if it finds none
    with _alembic, _command_errors(revision):
        run(_config(schema, connection=connection), revision)


@contextmanager
def _command_errors(revision: str) -> Iterator[None]:
    from alembic.util import CommandError

    try:
        yield
    except CommandError as error:
        raise ConfigurationError(f"revision {revision!r}: {error}") from None


@contextmanager
def _errors_explained(url: sa.URL, schema: str, lock_timeout: float) -> Iterator[None]:
    try:
        yield
    except exc.DBAPIError as error:
        sqlstate = getattr(error.orig, "sqlstate", None)
        if sqlstate == "55P03":
            raise SchemaOutdated(
                f"the migration of schema {schema!r} waited {lock_timeout:g} seconds for a lock that another "
                "transaction holds on one of its tables, and gave up so as not to hold up everybody else; the "
                "revision was rolled back. Find the transaction in pg_stat_activity (oldest xact_start), then run "
                "the same command again"
            ) from None
        if sqlstate == "42501":
            raise ConfigurationError(
                f"database user {url.username!r} may not migrate schema {schema!r}: {_primary(error)}. Migrate as "
                "the owner of the schema, or as a user with CREATE on the database"
            ) from None
        explained = explain(error, url)
        if isinstance(explained, DatabaseUnreachable | ConfigurationError):
            raise explained from None
        raise


def _primary(error: exc.DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0]


@contextmanager
def _locked_on_postgresql(engine: sa.Engine, schema: str, lock_timeout: float, wait: float) -> Iterator[sa.Connection]:
    with _only_deployer(engine, schema, wait) as lock, _connected(engine) as connection:

        @event.listens_for(connection, "begin")
        def begin(connection: sa.Connection) -> None:
            lock.execute(sa.text("SELECT 1"))  # or another deployer may be at work
            milliseconds = f"{int(lock_timeout * 1000)}ms"
            connection.execute(sa.text("SELECT set_config('lock_timeout', :timeout, true)"), {"timeout": milliseconds})

        yield connection
        connection.commit()


@contextmanager
def _only_deployer(engine: sa.Engine, schema: str, wait: float) -> Iterator[sa.Connection]:
    key = zlib.crc32(f"pgqueue migration of {schema}".encode())
    deadline = time.monotonic() + wait
    with _connected(engine) as connection:
        while not connection.scalar(sa.text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": key}):
            connection.rollback()
            if time.monotonic() > deadline:
                raise SchemaOutdated(
                    f"another process has been migrating schema {schema!r} for {wait:g} seconds; nothing was changed"
                )
            time.sleep(_POLL_SECONDS)
        connection.execute(_NO_TIMEOUTS)
        try:
            yield connection
        finally:
            with suppress(exc.DBAPIError):  # that the lock was lost matters no more
                connection.rollback()


#: A transaction that only holds a lock is idle, for as long as the migration takes. Not all versions know all of them.
_NO_TIMEOUTS = sa.text(
    "SELECT set_config(name, '0', true) FROM pg_settings "
    "WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')"
)


def _connected(engine: sa.Engine) -> sa.Connection:
    """An application's engine may have another level; migrations count on their transactions."""
    return engine.connect().execution_options(isolation_level="READ COMMITTED")


@contextmanager
def _locked_on_sqlite(engine: sa.Engine, schema: str, lock_timeout: float, wait: float) -> Iterator[sa.Connection]:
    with engine.connect() as connection, connection.begin():
        driver = connection.connection.dbapi_connection
        # pgqueue's own engines have begun it like this already; an application's may not.
        if driver is not None and not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection
