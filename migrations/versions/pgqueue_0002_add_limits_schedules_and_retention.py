"""Add limits, schedules and retention.

Columns of jobs for concurrency limits, rate limits, strict order, cancellation while running and retention; tables for
limits, schedules and periods of uniqueness. The index that claims go by leaves out jobs that wait for a limit.

Revision: pgqueue_0002
"""

from __future__ import annotations

import re
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "pgqueue_0002"
down_revision = "pgqueue_0001"
branch_labels = None
depends_on = None

NEW_COLUMNS = ("rate_key", "waits_for", "slot", "leads_order", "cancel_requested_at", "prune_at")

CLAIM_COLUMNS = ["queue", sa.text("priority DESC"), "run_at", "id"]

#: Further indexes of jobs.
INDEXES: list[tuple[str, list[Any], str]] = [
    ("slots", ["status", "slot", "task", "concurrency_key"], "slot IS NOT NULL OR leads_order"),
    ("waiting", ["task", "waits_for", sa.text("priority DESC"), "run_at", "id"], "waits_for IS NOT NULL"),
    (
        "order",
        ["queue", "ordering_key", "status", "id"],
        "ordering_key IS NOT NULL AND status IN ('pending', 'running')",
    ),
    ("expiry", ["expires_at"], "expires_at IS NOT NULL AND status = 'pending'"),
    ("cancelling", ["claimed_by"], "cancel_requested_at IS NOT NULL AND status = 'running'"),
    ("prune", ["prune_at"], "prune_at IS NOT NULL"),
    ("cancelled", ["id"], "status = 'cancelled'"),
]


def _schema() -> str:
    """From pgqueue's own env.py, or from `pgqueue_schema` in an application's alembic.ini."""
    config = op.get_context().config
    if config is None:
        return "pgqueue"
    name: str = config.attributes.get("pgqueue_schema") or config.get_main_option("pgqueue_schema", "pgqueue")
    if not re.fullmatch(r"(?!pg_)[a-z_][a-z0-9_]{0,47}", name):
        raise ValueError(
            "pgqueue_schema must be at most 48 lower-case letters, digits and underscores, not start with a digit "
            f"or with 'pg_', got {name!r}"
        )
    return name


def _flat() -> bool:
    return op.get_context().dialect.name == "sqlite"


def _where() -> tuple[str | None, str]:
    """The schema of the tables and the prefix of their names."""
    return (None, f"{_schema()}_") if _flat() else (_schema(), "")


def upgrade() -> None:
    schema, prefix = _where()
    _add_columns(schema, prefix)
    op.drop_index(f"{prefix}jobs_claim", f"{prefix}jobs", schema=schema)
    _index(schema, prefix, "jobs", "claim", CLAIM_COLUMNS, "status = 'pending' AND waits_for IS NULL")
    for name, columns, where in INDEXES:
        _index(schema, prefix, "jobs", name, columns, where)
    _create_tables(schema, prefix)
    _add_columns_of_events(schema, prefix)
    _create_view(schema, prefix)


def downgrade() -> None:
    schema, prefix = _where()
    op.execute(f"DROP VIEW {_name(schema, prefix, 'dead_jobs')}")
    for column, _, _ in reversed(_event_columns(schema)):
        op.execute(f"ALTER TABLE {_name(schema, prefix, 'job_events')} DROP COLUMN {column}")
    for table in ("unique_periods", "schedule_ticks", "schedules", "rate_buckets", "limits"):
        op.drop_table(f"{prefix}{table}", schema=schema)
    for name, _, _ in reversed(INDEXES):
        op.drop_index(f"{prefix}jobs_{name}", f"{prefix}jobs", schema=schema)
    op.drop_index(f"{prefix}jobs_claim", f"{prefix}jobs", schema=schema)
    _index(schema, prefix, "jobs", "claim", CLAIM_COLUMNS, "status = 'pending'")
    for name in reversed(NEW_COLUMNS):
        op.execute(f"ALTER TABLE {_jobs(schema, prefix)} DROP COLUMN {name}")


def _add_columns(schema: str | None, prefix: str) -> None:
    moment = _moment(schema)

    def check(column: str, condition: str) -> sa.CheckConstraint:
        return sa.CheckConstraint(condition, name=f"ck_{prefix}jobs_{column}")

    columns: list[sa.Column[Any]] = [
        sa.Column(
            "rate_key",
            sa.Text(),
            check("rate_key", "length(rate_key) BETWEEN 1 AND 512"),
            comment="jobs of one key share a rate limit",
        ),
        sa.Column(
            "waits_for",
            sa.Text(),
            check("waits_for", "waits_for IS NULL OR status = 'pending'"),
            comment="what must come free before it can be claimed: order, task, key:… or rate:…",
        ),
        sa.Column(
            "slot",
            sa.Text(),
            check("slot", "slot IN ('held', 'offered')"),
            comment="of a limit: held since its claim, or offered; cleared by a claim that finds it ended",
        ),
        sa.Column(
            "leads_order",
            sa.Boolean(),
            server_default=sa.false(),
            nullable=False,
            comment="jobs of the same ordering_key wait for its end",
        ),
        sa.Column(
            "cancel_requested_at",
            moment,
            check("cancel_requested_at", _readable("cancel_requested_at")),
            comment="when its worker was asked to stop the attempt",
        ),
        sa.Column(
            "prune_at",
            moment,
            check("prune_at", _readable("prune_at")),
            comment="deleted after this moment; NULL: kept until somebody prunes",
        ),
    ]
    assert [column.name for column in columns] == list(NEW_COLUMNS)
    # Not op.add_column: on SQLite it takes no CHECK, which cannot be added later.
    for column in columns:
        definition = sa.schema.CreateColumn(column).compile(dialect=op.get_context().dialect)
        op.execute(f"ALTER TABLE {_jobs(schema, prefix)} ADD COLUMN {definition}")
        if schema is not None:
            op.execute(f"COMMENT ON COLUMN {_jobs(schema, prefix)}.{column.name} IS '{column.comment}'")


def _create_tables(schema: str | None, prefix: str) -> None:
    flat = schema is None
    now = sa.text("(strftime('%Y-%m-%d %H:%M:%f', 'now'))") if flat else sa.text("now()")
    moment = _moment(schema)
    document: sa.types.TypeEngine[Any] = sa.JSON() if flat else postgresql.JSONB()

    op.create_table(
        f"{prefix}limits",
        sa.Column("scope", sa.Text(), nullable=False, comment="queue or task"),
        sa.Column("name", sa.Text(), nullable=False, comment="of the queue or task"),
        sa.Column("concurrency", sa.Integer(), comment="jobs running at once, of all workers together"),
        sa.Column("key_concurrency", sa.Integer(), comment="the same, of each concurrency_key"),
        sa.Column("rate", sa.Double(), comment="jobs started per second in the long run, for each rate_key"),
        sa.Column("burst", sa.Integer(), comment="jobs that may start at once after a quiet time"),
        sa.Column("max_depth", sa.Integer(), comment="pending jobs beyond which an enqueue is refused"),
        sa.Column("on_full", sa.Text(), comment="what an enqueue does then: error, block or drop"),
        sa.Column("promote_after", sa.Double(), comment="seconds after which a due job goes before all others"),
        sa.Column(
            "ordered",
            sa.Boolean(),
            server_default=sa.false(),
            nullable=False,
            comment="whether jobs with an ordering_key were enqueued to the queue",
        ),
        sa.Column(
            "releasing",
            sa.Boolean(),
            server_default=sa.false(),
            nullable=False,
            comment="limits were lifted, and jobs that waited for them are being let go",
        ),
        sa.Column(
            "declared_by", sa.Text(), server_default="code", nullable=False, comment="code, or who changed it since"
        ),
        sa.Column("updated_at", moment, server_default=now, nullable=False, comment="when it last changed"),
        sa.CheckConstraint("scope IN ('queue', 'task')", name=op.f(f"ck_{prefix}limits_scope")),
        sa.CheckConstraint(
            "concurrency >= 1 AND key_concurrency >= 1 AND rate > 0 AND burst >= 1 AND max_depth >= 1"
            " AND promote_after > 0 AND on_full IN ('error', 'block', 'drop') AND (rate IS NULL) = (burst IS NULL)",
            name=op.f(f"ck_{prefix}limits_values"),
        ),
        sa.PrimaryKeyConstraint("scope", "name", name=op.f(f"pk_{prefix}limits")),
        schema=schema,
        comment="pgqueue: limits of queues and tasks; claims that need one take their row's lock",
    )
    op.create_table(
        f"{prefix}rate_buckets",
        sa.Column("scope", sa.Text(), nullable=False, comment="as in limits"),
        sa.Column("name", sa.Text(), nullable=False, comment="as in limits"),
        sa.Column("key", sa.Text(), server_default="", nullable=False, comment="rate_key of the jobs; empty: none"),
        sa.Column("tokens", sa.Double(), nullable=False, comment="left at filled_at"),
        sa.Column("filled_at", moment, nullable=False, comment="when tokens was right"),
        sa.Column("ripe_at", moment, comment="when the next token comes; NULL: nothing waits for one"),
        sa.PrimaryKeyConstraint("scope", "name", "key", name=op.f(f"pk_{prefix}rate_buckets")),
        schema=schema,
        comment="pgqueue: token buckets of rate limits",
    )
    _index(schema, prefix, "rate_buckets", "ripe", ["scope", "name", "ripe_at"], "ripe_at IS NOT NULL")
    op.create_table(
        f"{prefix}schedules",
        sa.Column("name", sa.Text(), nullable=False, comment="of the schedule"),
        sa.Column("task", sa.Text(), nullable=False, comment="of the jobs it makes"),
        sa.Column("payload", document, server_default=sa.text("'{}'"), nullable=False, comment="likewise"),
        sa.Column("queue", sa.Text(), server_default="default", nullable=False, comment="likewise"),
        sa.Column("priority", sa.SmallInteger(), server_default=sa.text("0"), nullable=False, comment="likewise"),
        sa.Column("max_retries", sa.SmallInteger(), server_default=sa.text("3"), nullable=False, comment="likewise"),
        sa.Column("cron", sa.Text(), nullable=False, comment="when: minute, hour, day, month, weekday"),
        sa.Column("timezone", sa.Text(), server_default="UTC", nullable=False, comment="where those hours are"),
        sa.Column(
            "catchup",
            sa.Text(),
            server_default="latest",
            nullable=False,
            comment="which ticks that were missed are made up for: none, latest or all",
        ),
        sa.Column(
            "overlap",
            sa.Boolean(),
            server_default=sa.true(),
            nullable=False,
            comment="false: no job while the one before is pending or running",
        ),
        sa.Column("enabled", sa.Boolean(), server_default=sa.true(), nullable=False, comment="false: makes no jobs"),
        sa.Column(
            "declared_by", sa.Text(), server_default="sql", nullable=False, comment="code, or who made or changed it"
        ),
        sa.Column(
            "declared_at", moment, comment="when a worker last found it in its code; NULL: it comes from no code"
        ),
        sa.Column("next_tick_at", moment, server_default=now, nullable=False, comment="no tick before is open"),
        sa.Column("created_at", moment, server_default=now, nullable=False, comment="when it was made"),
        sa.Column("updated_at", moment, server_default=now, nullable=False, comment="when it last changed"),
        sa.CheckConstraint("catchup IN ('none', 'latest', 'all')", name=op.f(f"ck_{prefix}schedules_catchup")),
        sa.CheckConstraint(
            "length(name) BETWEEN 1 AND 128 AND length(task) BETWEEN 1 AND 128 AND length(queue) BETWEEN 1 AND 128"
            " AND max_retries >= 0",
            name=op.f(f"ck_{prefix}schedules_values"),
        ),
        sa.CheckConstraint(
            "json_valid(payload) AND json_type(payload) = 'object'" if flat else "jsonb_typeof(payload) = 'object'",
            name=op.f(f"ck_{prefix}schedules_payload"),
        ),
        sa.CheckConstraint(
            " AND ".join(map(_readable, ("declared_at", "next_tick_at", "created_at", "updated_at"))),
            name=op.f(f"ck_{prefix}schedules_moments"),
        ),
        sa.PrimaryKeyConstraint("name", name=op.f(f"pk_{prefix}schedules")),
        schema=schema,
        comment="pgqueue: what is enqueued by the clock",
    )
    _index(schema, prefix, "schedules", "next", ["next_tick_at"], "enabled")
    op.create_table(
        f"{prefix}schedule_ticks",
        sa.Column("schedule", sa.Text(), nullable=False, comment="name of the schedule"),
        sa.Column("tick_at", moment, nullable=False, comment="the moment its rule names"),
        sa.Column("job_id", sa.BigInteger(), comment="the job that was enqueued for it; NULL: none was to be"),
        sa.Column("created_at", moment, server_default=now, nullable=False, comment="when that was done"),
        sa.PrimaryKeyConstraint("schedule", "tick_at", name=op.f(f"pk_{prefix}schedule_ticks")),
        schema=schema,
        comment="pgqueue: ticks of schedules that were settled, each at most once",
    )
    op.create_index(f"{prefix}schedule_ticks_created", f"{prefix}schedule_ticks", ["created_at"], schema=schema)
    op.create_table(
        f"{prefix}unique_periods",
        sa.Column("task", sa.Text(), nullable=False, comment="of the job"),
        sa.Column("unique_key", sa.Text(), nullable=False, comment="of the job"),
        sa.Column("until", moment, nullable=False, comment="no second job with this key before"),
        sa.Column("job_id", sa.BigInteger(), comment="the job that was enqueued"),
        sa.CheckConstraint(_readable("until"), name=op.f(f"ck_{prefix}unique_periods_until")),
        sa.PrimaryKeyConstraint("task", "unique_key", name=op.f(f"pk_{prefix}unique_periods")),
        schema=schema,
        comment="pgqueue: unique keys that outlast their job",
    )
    op.create_index(f"{prefix}unique_periods_until", f"{prefix}unique_periods", ["until"], schema=schema)


def _event_columns(schema: str | None) -> list[tuple[str, sa.types.TypeEngine[Any], str]]:
    return [
        ("worker", sa.Text(), "which made the attempt that this ended"),
        ("claimed_at", _moment(schema), "when that attempt began"),
    ]


def _add_columns_of_events(schema: str | None, prefix: str) -> None:
    for name, type_, comment in _event_columns(schema):
        op.add_column(f"{prefix}job_events", sa.Column(name, type_, comment=comment), schema=schema)


#: The columns of the view dead_jobs: name, expression on PostgreSQL, the same on SQLite, comment.
DEAD_JOBS = [
    ("id", "id", "id", "of the job"),
    ("queue", "queue", "queue", "the named line it waited in"),
    ("task", "task", "task", "registered name of the function"),
    (
        "error_type",
        "error ->> 'type'",
        "CASE WHEN json_valid(error) THEN error ->> 'type' END",
        "class of the last failed attempt's error",
    ),
    (
        "error_message",
        "error ->> 'message'",
        "CASE WHEN json_valid(error) THEN error ->> 'message' END",
        "message of that error",
    ),
    (
        "error_traceback",
        "error ->> 'traceback'",
        "CASE WHEN json_valid(error) THEN error ->> 'traceback' END",
        "traceback of that error",
    ),
    ("attempts", "attempt", "attempt", "how often it was claimed"),
    ("retries", "retries", "retries", "failed attempts that were charged"),
    ("max_retries", "max_retries", "max_retries", "retries that were allowed"),
    ("worker", "claimed_by", "claimed_by", "of the last attempt"),
    ("created_at", "created_at", "created_at", "when it was enqueued"),
    ("claimed_at", "claimed_at", "claimed_at", "when the last attempt began"),
    ("died_at", "finished_at", "finished_at", "when it became dead"),
    (
        "age_seconds",
        "CAST(extract(epoch FROM now() - finished_at) AS double precision)",
        "(julianday('now') - julianday(finished_at)) * 86400.0",
        "since it died",
    ),
    ("unique_key", "unique_key", "unique_key", "as in jobs"),
    ("payload", "payload", "payload", "keyword arguments of the task"),
    ("metadata", "metadata", "metadata", "headers, trace context, tags"),
]


def _create_view(schema: str | None, prefix: str) -> None:
    view = _name(schema, prefix, "dead_jobs")
    columns = ", ".join(f"{flat if schema is None else full} AS {name}" for name, full, flat, _ in DEAD_JOBS)
    op.execute(f"CREATE VIEW {view} AS SELECT {columns} FROM {_jobs(schema, prefix)} WHERE status = 'dead'")
    if schema is not None:
        op.execute(f"COMMENT ON VIEW {view} IS 'pgqueue: jobs that will not run again by themselves'")
        for name, _, _, comment in DEAD_JOBS:
            quoted = comment.replace("'", "''")
            op.execute(f"COMMENT ON COLUMN {view}.{name} IS '{quoted}'")


def _moment(schema: str | None) -> sa.types.TypeEngine[Any]:
    return sa.Text() if schema is None else sa.DateTime(timezone=True)


def _readable(column: str) -> str:
    """The column holds a moment that every client can read: finite, with a year of four digits."""
    if _flat():
        return (
            f"({column} IS NULL OR (coalesce({column} IN (strftime('%Y-%m-%d %H:%M:%f', {column}, '+0 days'),"
            f" strftime('%Y-%m-%d %H:%M:%S', {column}, '+0 days')), 0) AND {column} BETWEEN '1970' AND '9000'))"
        )
    return f"{column} BETWEEN '1970-01-01 00:00+00' AND '9000-01-01 00:00+00'"


def _jobs(schema: str | None, prefix: str) -> str:
    return _name(schema, prefix, "jobs")


def _name(schema: str | None, prefix: str, name: str) -> str:
    quote = op.get_context().dialect.identifier_preparer.quote
    return quote(f"{prefix}{name}") if schema is None else f"{quote(schema)}.{name}"


def _index(schema: str | None, prefix: str, table: str, name: str, columns: list[Any], where: str) -> None:
    condition = sa.text(where)
    op.create_index(
        f"{prefix}{table}_{name}",
        f"{prefix}{table}",
        columns,
        schema=schema,
        postgresql_where=condition,
        sqlite_where=condition,
    )
