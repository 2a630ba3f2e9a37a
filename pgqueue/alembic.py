"""Living beside an application's own Alembic. Nothing here is needed on PostgreSQL with Alembic's usual settings:
pgqueue's tables stand in a schema of their own, and autogenerate looks at the default schema only.

**By default** pgqueue keeps its own history, in a version table beside its tables. Deploy with

    pgqueue db upgrade && alembic upgrade head

An env.py that sets `include_schemas=True`, or works on SQLite, tells autogenerate to leave pgqueue's tables alone:

    import pgqueue.alembic

    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        include_schemas=True,
        include_name=pgqueue.alembic.include_name,
    )

For another schema than `pgqueue`: `include_name=functools.partial(include_name, pgqueue_schema="jobs")`. Where a
filter of the application's own takes objects rather than names, there is `include_object`; a filter can also call
these functions and combine their answers with its own.

**Inside the application's history**, for one command and one version table, alembic.ini names both folders. The
separator must be `newline`; the colon belongs to the path:

    [alembic]
    script_location = %(here)s/migrations
    version_locations =
        %(here)s/migrations/versions
        pgqueue:migrations/versions
    path_separator = newline
    pgqueue_schema = pgqueue

There are two heads then, the application's and the branch `pgqueue`:

    alembic upgrade heads
    alembic upgrade pgqueue@head
    alembic revision --autogenerate -m "…" --head <the application's head>

`pgqueue_schema` is the schema given to `PgQueue(schema=…)`. env.py needs the filter in the same cases as above.
`pgqueue db upgrade` refuses to touch such tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from pgqueue.config import DEFAULT_SCHEMA
from pgqueue.dialect import SQLITE
from pgqueue.schema import tables_for


def include_name(
    name: str | None, type_: str, parent_names: Mapping[str, Any], *, pgqueue_schema: str = DEFAULT_SCHEMA
) -> bool:
    """For Alembic's `include_name`: False for pgqueue's schema, and for its prefixed tables on SQLite."""
    if type_ == "schema":
        return name != pgqueue_schema
    if type_ == "table" and parent_names.get("schema_name") is None:
        return name not in _prefixed_tables(pgqueue_schema)
    return True


def include_object(
    object_: sa.schema.SchemaItem,
    name: str | None,
    type_: str,
    reflected: bool,
    compare_to: sa.schema.SchemaItem | None,
    *,
    pgqueue_schema: str = DEFAULT_SCHEMA,
) -> bool:
    """For Alembic's `include_object`: False for pgqueue's tables and everything in them."""
    table = object_ if isinstance(object_, sa.Table) else getattr(object_, "table", None)
    if table is None:
        return True
    if table.schema is None:
        return table.name not in _prefixed_tables(pgqueue_schema)
    return bool(table.schema != pgqueue_schema)


def _prefixed_tables(schema: str) -> set[str]:
    """The names of pgqueue's tables on SQLite, the version table among them."""
    return {*tables_for(SQLITE, schema).metadata.tables, f"{schema}_alembic_version"}
