"""What a database says it has, in a form that can be compared: more than Alembic compares."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

POSTGRESQL = {
    "columns": """
        SELECT c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
               pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum)
          FROM pg_attribute AS a
          JOIN pg_class AS c ON c.oid = a.attrelid AND c.relkind IN ('r', 'v')
          LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
         WHERE c.relnamespace = CAST(:schema AS regnamespace) AND a.attnum > 0 AND NOT a.attisdropped
         ORDER BY 1, 2
    """,
    "constraints": """
        SELECT CASE WHEN conrelid <> 0 THEN conrelid::regclass::text ELSE contypid::regtype::text END, conname,
               pg_get_constraintdef(oid), convalidated
          FROM pg_constraint
         WHERE connamespace = CAST(:schema AS regnamespace) AND contype <> 'n'
         ORDER BY 1, 2
    """,
    "domains": """
        SELECT typname, format_type(typbasetype, typtypmod), obj_description(oid, 'pg_type')
          FROM pg_type
         WHERE typnamespace = CAST(:schema AS regnamespace) AND typtype = 'd'
         ORDER BY 1
    """,
    "indexes": """
        SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = :schema ORDER BY 1, 2
    """,
    "tables": """
        SELECT relname, obj_description(oid, 'pg_class')
          FROM pg_class
         WHERE relnamespace = CAST(:schema AS regnamespace) AND relkind IN ('r', 'v')
         ORDER BY 1
    """,
    "views": """
        SELECT viewname, definition FROM pg_views WHERE schemaname = :schema ORDER BY 1
    """,
    "functions": """
        SELECT proname, pg_get_functiondef(oid), obj_description(oid, 'pg_proc')
          FROM pg_proc
         WHERE pronamespace = CAST(:schema AS regnamespace)
         ORDER BY 1
    """,
}


def snapshot(engine: sa.Engine, schema: str) -> dict[str, list[Any]]:
    """Everything in a schema, or everything with its prefix, but the version table."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            return _sqlite(connection, schema)
        return {
            kind: [
                tuple(_neutral(value, schema) for value in row)
                for row in connection.execute(sa.text(query), {"schema": schema})
                if "alembic_version" not in str(row[0])
            ]
            for kind, query in POSTGRESQL.items()
        }


def _sqlite(connection: sa.Connection, schema: str) -> dict[str, list[Any]]:
    query = "SELECT type, name, sql FROM sqlite_master WHERE name GLOB :pattern AND name NOT GLOB '*alembic_version*'"
    return {
        f"{row.type} {_neutral(row.name, schema)}": sorted(
            _neutral(" ".join(part.split()), schema) for part in _parts(row.sql)
        )
        for row in connection.execute(sa.text(query), {"pattern": f"{schema}_*"})
    }


def _parts(sql: str) -> list[str]:
    """What stands before, between the commas of, and after the outermost brackets of a CREATE."""
    before, _, rest = sql.partition("(")
    inside, _, after = rest.rpartition(")")
    parts, depth = [""], 0
    for character in inside:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [before, *parts, after]


def _neutral(value: Any, schema: str) -> Any:
    """Without the schema's name, so that two schemas can be compared."""
    if not isinstance(value, str):
        return value
    return value.replace(f'"{schema}".', "SCHEMA.").replace(f"{schema}.", "SCHEMA.").replace(f"{schema}_", "SCHEMA_")
