"""Create and upgrade pgqueue's tables: Alembic, driven from code, safe for several deployers at once."""

from __future__ import annotations

import io
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import alembic.autogenerate
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from pgqueue.dialect import POSTGRESQL, SQLITE
from pgqueue.errors import ConfigurationError, SchemaMissing, SchemaOutdated
from pgqueue.schema import tables_for

#: A statement of a migration that cannot get its lock in time fails instead of queueing all traffic behind it.
LOCK_TIMEOUT = "5s"

#: How long a deployer waits for another one that is migrating at the same time.
DEPLOYER_WAIT_SECONDS = 300.0

_POLL_SECONDS = 0.2


def migrations_path() -> Path:
    """The folder with env.py and versions/: inside an installed package, or at the top of a checkout."""
    installed = Path(str(files("pgqueue"))) / "migrations"
    return installed if installed.is_dir() else Path(__file__).resolve().parent.parent / "migrations"


def configure_options(dialect_name: str, schema: str) -> dict[str, Any]:
    """What env.py passes to `context.configure` besides the connection."""
    flat = dialect_name == SQLITE

    def include_name(name: str | None, type_: str, parent_names: Any) -> bool:
        if flat:
            return type_ != "table" or bool(name and name.startswith(f"{schema}_"))
        return type_ != "schema" or name == schema

    return {
        "version_table": _version_table(dialect_name, schema),
        "version_table_schema": None if flat else schema,
        "include_schemas": not flat,
        "include_name": include_name,
        "compare_type": True,
        "compare_server_default": False,  # the database writes expressions in its own words
        "transaction_per_migration": True,
    }


def _version_table(dialect_name: str, schema: str) -> str:
    return f"{schema}_alembic_version" if dialect_name == SQLITE else "alembic_version"


def _config(schema: str, **attributes: Any) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.attributes.update(pgqueue_schema=schema, **attributes)
    return config


def head_revision() -> str:
    """The newest revision this code knows."""
    head = ScriptDirectory.from_config(_config("pgqueue")).get_current_head()
    assert head is not None
    return head


def current_revision(connection: sa.Connection, schema: str) -> str | None:
    """The revision the tables are at, or None when there are none."""
    name = connection.dialect.name
    version_table = _version_table(name, schema)
    inspector = sa.inspect(connection)
    if not inspector.has_table(version_table, schema=None if name == SQLITE else schema):
        return None
    table = sa.table(version_table, sa.column("version_num"), schema=None if name == SQLITE else schema)
    return connection.execute(sa.select(table.c.version_num)).scalar_one_or_none()


def require_current(connection: sa.Connection, schema: str) -> str | None:
    """Check that this code can work with the tables.

    Raises SchemaMissing or SchemaOutdated. Returns a warning when the tables are newer than this code, which is
    what a rolling deployment looks like: migrations are written so that the code before them goes on working.
    """
    current, head = current_revision(connection, schema), head_revision()
    if current is None:
        raise SchemaMissing(f"schema {schema!r} has no pgqueue tables; create them with: pgqueue db upgrade")
    if current == head:
        return None
    known = {script.revision for script in ScriptDirectory.from_config(_config(schema)).walk_revisions()}
    if current in known:
        raise SchemaOutdated(
            f"the tables of schema {schema!r} are at revision {current}, this code needs {head}; "
            "upgrade them first with: pgqueue db upgrade"
        )
    return f"the tables of schema {schema!r} are at revision {current}, which is newer than this code ({head})"


def upgrade(engine: sa.Engine, schema: str, revision: str = "head") -> None:
    """Bring the tables to a revision, creating what is missing. Safe for several deployers at once."""
    with _exclusive(engine, schema) as connection:
        _command(command.upgrade, connection, schema, revision)


def downgrade(engine: sa.Engine, schema: str, revision: str) -> None:
    """Take the tables back to an older revision; `base` drops them with everything in them."""
    with _exclusive(engine, schema) as connection:
        _command(command.downgrade, connection, schema, revision)


def differences(connection: sa.Connection, schema: str) -> list[Any]:
    """What Alembic would change to make the tables what this code expects; empty when they are."""
    name = connection.dialect.name
    context = MigrationContext.configure(connection, opts=configure_options(name, schema))
    return list(alembic.autogenerate.compare_metadata(context, tables_for(name, schema).metadata))


def offline_sql(dialect_name: str, schema: str, revision: str = "head") -> str:
    """The statements of an upgrade from nothing, for people who run SQL themselves."""
    output = io.StringIO()
    config = _config(schema, dialect_name=dialect_name)
    config.output_buffer = output
    command.upgrade(config, revision, sql=True)
    return output.getvalue()


def _command(run: Any, connection: sa.Connection, schema: str, revision: str) -> None:
    try:
        run(_config(schema, connection=connection), revision)
    except CommandError as error:
        raise ConfigurationError(f"revision {revision!r}: {error}") from None


@contextmanager
def _exclusive(engine: sa.Engine, schema: str) -> Iterator[sa.Connection]:
    """A connection on which no other deployer migrates this schema at the same time.

    On PostgreSQL a session-level advisory lock, polled for: a deployer that waited inside pg_advisory_lock would
    hold a snapshot, which a CREATE INDEX CONCURRENTLY of the other one waits for, and both would wait for ever.
    """
    with engine.connect() as connection:
        if connection.dialect.name != POSTGRESQL:
            yield connection
            connection.commit()
            return
        key = zlib.crc32(f"pgqueue migration of {schema}".encode())
        deadline = time.monotonic() + DEPLOYER_WAIT_SECONDS
        while not connection.scalar(sa.text("SELECT pg_try_advisory_lock(:key)"), {"key": key}):
            connection.rollback()
            if time.monotonic() > deadline:
                raise SchemaOutdated(
                    f"another process has been migrating schema {schema!r} for {DEPLOYER_WAIT_SECONDS:g} seconds; "
                    "nothing was changed"
                )
            time.sleep(_POLL_SECONDS)
        connection.execute(sa.text("SELECT set_config('lock_timeout', :timeout, false)"), {"timeout": LOCK_TIMEOUT})
        connection.execute(sa.schema.CreateSchema(schema, if_not_exists=True))
        connection.commit()
        try:
            yield connection
            connection.commit()
        finally:
            # The session ends with its lock and its settings, whatever state the migration left it in.
            connection.invalidate()
