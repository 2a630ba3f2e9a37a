"""Runs pgqueue's migrations: from `pgqueue db …`, which brings a connection, or from `alembic` in a checkout.

On PostgreSQL a revision is one transaction, with a lock_timeout. CREATE INDEX CONCURRENTLY belongs into an
`autocommit_block()`, which has none: it has to wait for old transactions.
On SQLite all revisions of an upgrade are one transaction, and there is no such block.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import context

from pgqueue.config import LOCAL_URL
from pgqueue.engine import make_engine, parse_url
from pgqueue.migration import LOCK_TIMEOUT_SECONDS, configure_options, exclusive, list_schema, quiet_about_expressions
from pgqueue.schema import tables_for
from pgqueue.settings import Sources


def schema() -> str:
    named = context.config.attributes.get("pgqueue_schema")
    return named or context.config.get_main_option("pgqueue_schema", "pgqueue")


def run(database: str, **options: Any) -> None:
    context.configure(
        target_metadata=tables_for(database, schema()).metadata,
        **configure_options(database, schema()),
        **options,
    )
    with quiet_about_expressions(), context.begin_transaction():
        if database == "postgresql":
            _create_schema()
            if not context.is_offline_mode():
                list_schema(context.get_bind(), schema())
        context.run_migrations()


def _create_schema() -> None:
    """Alembic's version table is in there, and it is made before the first migration."""
    create = sa.schema.CreateSchema(schema(), if_not_exists=True)
    if context.is_offline_mode():
        context.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_SECONDS:g}s'")
        context.execute(create)
        return
    # Asked first, because IF NOT EXISTS still wants the right to create, which the schema's owner may lack.
    reads_only = context.get_context().opts.get("dont_mutate")
    if not reads_only and not sa.inspect(context.get_bind()).has_schema(schema()):
        context.execute(create)


def url() -> sa.URL:
    return parse_url(Sources().find("database_url").value or LOCAL_URL)


if context.is_offline_mode():
    name = context.config.attributes.get("dialect_name") or url().get_backend_name()
    run(name, dialect_name=name, literal_binds=True)
elif "connection" in context.config.attributes:
    connection = context.config.attributes["connection"]
    run(connection.dialect.name, connection=connection)
else:
    engine = make_engine(url())
    with exclusive(engine, schema()) as connection:
        run(connection.dialect.name, connection=connection)
    engine.dispose()
