"""Runs pgqueue's migrations: from `pgqueue db …`, which brings a connection, or from `alembic` in a checkout."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import context

from pgqueue.config import LOCAL_URL, url_from_environment
from pgqueue.engine import make_engine
from pgqueue.migration import configure_options
from pgqueue.schema import tables_for


def schema() -> str:
    return context.config.attributes.get("pgqueue_schema") or context.config.get_main_option(
        "pgqueue_schema", "pgqueue"
    )


def run(connection: sa.Connection | None, database: str, **options: Any) -> None:
    tables = tables_for(database, schema())
    context.configure(
        connection=connection,
        target_metadata=tables.metadata,
        **configure_options(database, schema()),
        **options,
    )
    with context.begin_transaction():
        if database == "postgresql":
            # Alembic's version table is in there, and it is made before the first migration.
            context.execute(sa.schema.CreateSchema(schema(), if_not_exists=True))
        context.run_migrations()


if context.is_offline_mode():
    name = context.config.attributes.get("dialect_name", "postgresql")
    run(None, name, dialect_name=name, literal_binds=True)
elif "connection" in context.config.attributes:
    connection = context.config.attributes["connection"]
    run(connection, connection.dialect.name)
else:
    with make_engine(url_from_environment() or LOCAL_URL).connect() as connection:
        run(connection, connection.dialect.name)
        connection.commit()
