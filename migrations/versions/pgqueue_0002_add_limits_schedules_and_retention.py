"""Add limits, schedules and retention.

Columns of jobs for concurrency limits, rate limits, strict order, cancellation while running and retention; tables for
limits, schedules and periods of uniqueness. The index that claims go by leaves out jobs that wait for a limit.

On PostgreSQL the rules for single values of jobs move from CHECKs of the table to domains. PostgreSQL reads the text
of every CHECK anew for each statement that writes to a table: with all of them that took three quarters of the time
of an INSERT of one job. Rules of domains it reads once per session, and tests only what a statement assigns.

Revision: pgqueue_0002
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "pgqueue_0002"
down_revision = "pgqueue_0001"
branch_labels = None
depends_on = None

NEW_COLUMNS = ("rate_key", "waits_for", "slot", "leads_order", "cancel_requested_at", "prune_at")

ENQUEUE_ARGUMENTS_BEFORE = "text, jsonb, text, integer, timestamptz, text, integer, jsonb"
ENQUEUE_ARGUMENTS = f"{ENQUEUE_ARGUMENTS_BEFORE}, text, interval, interval, timestamptz, text, text, text"

CLAIM_COLUMNS = ["queue", sa.text("priority DESC"), "run_at", "id"]


class Domain(NamedTuple):
    name: str
    base: str
    rule: str
    condition: str
    columns: tuple[str, ...]
    comment: str


#: On PostgreSQL: types of columns of jobs, and the rules for their values.
DOMAINS = [
    Domain(
        "moment",
        "timestamptz",
        "ck_jobs_moments",
        "VALUE BETWEEN '1970-01-01 00:00+00' AND '9000-01-01 00:00+00'",
        (
            "run_at",
            "claim_expires_at",
            "expires_at",
            "created_at",
            "claimed_at",
            "finished_at",
            "cancel_requested_at",
            "prune_at",
        ),
        "pgqueue: a moment that every client can read: finite, with a year of four digits",
    ),
    Domain(
        "json_object",
        "jsonb",
        "ck_jobs_documents",
        "jsonb_typeof(VALUE) = 'object'",
        ("payload", "metadata"),
        "pgqueue: a JSON document whose outermost value is an object",
    ),
    Domain(
        "key_text",
        "text",
        "ck_jobs_names",
        "length(VALUE) BETWEEN 1 AND 512",
        ("unique_key", "ordering_key", "concurrency_key", "rate_key"),
        "pgqueue: a key of jobs: it must fit into an entry of an index",
    ),
    Domain("counter", "integer", "ck_jobs_counters", "VALUE >= 0", ("attempt", "retries"), "pgqueue: a count"),
    Domain("small_counter", "smallint", "ck_jobs_counters", "VALUE >= 0", ("max_retries",), "pgqueue: a small count"),
    Domain(
        "slot_state",
        "text",
        "ck_jobs_slot",
        "VALUE IN ('held', 'awaited', 'offered')",
        ("slot",),
        "pgqueue: how far a job has a slot of a limit",
    ),
]

#: The CHECKs of revision 0001 that these replace.
REPLACED_CHECKS = [
    ("counters", "attempt >= 0 AND retries >= 0 AND max_retries >= 0"),
    ("documents", "jsonb_typeof(payload) = 'object' AND jsonb_typeof(metadata) = 'object'"),
    (
        "moments",
        " AND ".join(
            f"{column} BETWEEN '1970-01-01 00:00+00' AND '9000-01-01 00:00+00'"
            for column in ("run_at", "claim_expires_at", "expires_at", "created_at", "claimed_at", "finished_at")
        ),
    ),
    (
        "names",
        "length(queue) BETWEEN 1 AND 128 AND length(task) BETWEEN 1 AND 128 AND length(unique_key) BETWEEN 1 AND 512"
        " AND length(ordering_key) BETWEEN 1 AND 512 AND length(concurrency_key) BETWEEN 1 AND 512",
    ),
]

#: What is left of the last one.
NAMES = "length(queue) BETWEEN 1 AND 128 AND length(task) BETWEEN 1 AND 128"

#: Further indexes of jobs.
INDEXES: list[tuple[str, list[Any], str]] = [
    (
        "slots",
        ["status", "task", "concurrency_key"],
        "status = 'running' AND slot IS NOT NULL"
        " OR status IN ('completed', 'dead', 'cancelled') AND (slot IN ('awaited', 'offered') OR leads_order)"
        " OR status = 'pending' AND slot = 'awaited'",
    ),
    ("waiting", ["task", "waits_for", sa.text("priority DESC"), "run_at", "id"], "waits_for IS NOT NULL"),
    (
        "order",
        ["queue", "ordering_key", sa.text("status DESC"), "id"],
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
    if schema is not None:
        _create_domains(schema)
    _add_columns(schema, prefix)
    if schema is not None:
        _use_domains(schema)
    op.drop_index(f"{prefix}jobs_claim", f"{prefix}jobs", schema=schema)
    _index(schema, prefix, "jobs", "claim", CLAIM_COLUMNS, "status = 'pending' AND waits_for IS NULL")
    for name, columns, where in INDEXES:
        _index(schema, prefix, "jobs", name, columns, where)
    _create_tables(schema, prefix)
    _add_columns_of_events(schema, prefix)
    _create_view(schema, prefix)
    for view in _views(schema, prefix):
        _create_audit_view(schema, prefix, view)
    if schema is not None:
        _create_jobs_as_of(schema)
        op.execute(f"DROP FUNCTION {_name(schema, '', 'enqueue')}({ENQUEUE_ARGUMENTS_BEFORE})")
        _create_enqueue(schema)


def downgrade() -> None:
    schema, prefix = _where()
    if schema is not None:
        op.execute(f"DROP FUNCTION {_name(schema, prefix, 'jobs_as_of')}(timestamptz)")
        op.execute(f"DROP FUNCTION {_name(schema, '', 'enqueue')}({ENQUEUE_ARGUMENTS})")
        _create_enqueue_as_before(schema)
    for view in reversed(_views(schema, prefix)):
        op.execute(f"DROP VIEW {_name(schema, prefix, view.name)}")
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
    if schema is not None:
        _drop_domains(schema)


def _create_domains(schema: str) -> None:
    """Without their rules yet: with these, PostgreSQL would write the whole table anew for each column."""
    for domain in DOMAINS:
        name = _name(schema, "", domain.name)
        op.execute(f"CREATE DOMAIN {name} AS {domain.base}")
        op.execute(f"COMMENT ON DOMAIN {name} IS '{domain.comment}'")


def _use_domains(schema: str) -> None:
    jobs = _jobs(schema, "")
    dropped = ", ".join(f"DROP CONSTRAINT ck_jobs_{name}" for name, _ in REPLACED_CHECKS)
    changed = ", ".join(
        f"ALTER COLUMN {column} TYPE {_name(schema, '', domain.name)}"
        for domain in DOMAINS
        for column in domain.columns
        if column not in NEW_COLUMNS
    )
    op.execute(f"ALTER TABLE {jobs} {dropped}")
    op.execute(f"ALTER TABLE {jobs} {changed}")
    op.execute(f"ALTER TABLE {jobs} ADD CONSTRAINT ck_jobs_names CHECK ({NAMES})")
    for domain in DOMAINS:
        alter = f"ALTER DOMAIN {_name(schema, '', domain.name)}"
        op.execute(f"{alter} ADD CONSTRAINT {domain.rule} CHECK ({domain.condition}) NOT VALID")
        op.execute(f"{alter} VALIDATE CONSTRAINT {domain.rule}")


def _drop_domains(schema: str) -> None:
    jobs = _jobs(schema, "")
    changed = ", ".join(
        f"ALTER COLUMN {column} TYPE {domain.base}"
        for domain in DOMAINS
        for column in domain.columns
        if column not in NEW_COLUMNS
    )
    op.execute(f"ALTER TABLE {jobs} DROP CONSTRAINT ck_jobs_names, {changed}")
    for name, condition in REPLACED_CHECKS:
        op.execute(f"ALTER TABLE {jobs} ADD CONSTRAINT ck_jobs_{name} CHECK ({condition})")
    for domain in DOMAINS:
        op.execute(f"DROP DOMAIN {_name(schema, '', domain.name)}")


def _add_columns(schema: str | None, prefix: str) -> None:
    flat = schema is None
    moment = _moment(schema) if flat else postgresql.DOMAIN("moment", sa.DateTime(timezone=True), schema=schema)

    def check(column: str, condition: str) -> sa.CheckConstraint:
        return sa.CheckConstraint(condition, name=f"ck_{prefix}jobs_{column}")

    def check_on_sqlite(column: str, condition: str) -> list[sa.CheckConstraint]:
        return [check(column, condition)] if flat else []

    columns: list[sa.Column[Any]] = [
        sa.Column(
            "rate_key",
            sa.Text() if flat else postgresql.DOMAIN("key_text", sa.Text(), schema=schema),
            *check_on_sqlite("rate_key", "length(rate_key) BETWEEN 1 AND 512"),
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
            sa.Text() if flat else postgresql.DOMAIN("slot_state", sa.Text(), schema=schema),
            *check_on_sqlite("slot", "slot IN ('held', 'awaited', 'offered')"),
            comment="of a limit: held since its claim, awaited when others wait for its end, or offered",
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
            *check_on_sqlite("cancel_requested_at", _readable("cancel_requested_at")),
            comment="when its worker was asked to stop the attempt",
        ),
        sa.Column(
            "prune_at",
            moment,
            *check_on_sqlite("prune_at", _readable("prune_at")),
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
        sa.Column("keep_dead", sa.Double(), comment="seconds that dead jobs of the task are kept, as its code says"),
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
            " AND promote_after > 0 AND keep_dead >= 0 AND on_full IN ('error', 'block', 'drop')"
            " AND (rate IS NULL) = (burst IS NULL) AND rate >= burst / 3162240000.0",
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


class View(NamedTuple):
    name: str
    comment: str
    columns: list[tuple[str, str]]  # name and comment
    query: str


# No percent sign in what PostgreSQL gets, and no colon before a letter or digit: see sqlalchemy.text. A condition is
# spelt as its index spells it; that what waits_for something is pending helps a plan without statistics, too.


def _views(schema: str | None, prefix: str) -> list[View]:
    """What people ask of a queue, in SQL. The names of views and columns are an interface: they stay."""
    flat = schema is None
    jobs, events = _jobs(schema, prefix), _name(schema, prefix, "job_events")
    queues, workers = _name(schema, prefix, "queues"), _name(schema, prefix, "workers")
    moment = "text" if flat else "timestamptz"
    now = "strftime('%Y-%m-%d %H:%M:%f', 'now')" if flat else "now()"

    def ago(number: int, unit: str) -> str:
        if flat:
            return f"strftime('%Y-%m-%d %H:%M:%f', 'now', '-{number} {unit}')"
        return f"now() - interval '{number} {unit}'"

    def seconds(start: str, end: str = now) -> str:
        if flat:
            return f"(julianday({end}) - julianday({start})) * 86400.0"
        return f"CAST(extract(epoch FROM {end} - {start}) AS double precision)"

    def of_error(name: str, error: str = "error") -> str:
        value = f"{error} ->> '{name}'"
        return f"CASE WHEN json_valid({error}) THEN {value} END" if flat else value

    def start_of(unit: str, column: str) -> str:
        if flat:
            return f"substr({column}, 1, 14) || '00:00'" if unit == "hour" else f"substr({column}, 1, 17) || '00'"
        return f"date_trunc('{unit}', {column})"

    open_columns = "queue, status, run_at, retries, waits_for, claimed_at"
    queue_summary = View(
        "queue_summary",
        "pgqueue: queues that have open or dead jobs, or settings, at this moment",
        [
            ("queue", "name of the queue"),
            ("ready", "pending and due"),
            ("scheduled", "pending, due later"),
            ("retrying", "of ready and scheduled: an attempt has failed"),
            ("waiting", "of ready and scheduled: a limit or its turn must come free"),
            ("running", "claimed by workers"),
            ("dead", "will not run again by themselves"),
            ("oldest_ready_seconds", "how long the longest waiting due job has been due"),
            ("oldest_running_seconds", "since the earliest claim of those running"),
            ("paused", "whether nothing is claimed from it"),
            ("paused_until", "end of the pause; NULL: until somebody resumes it"),
        ],
        f"""
SELECT queue,
       count(CASE WHEN status = 'pending' AND run_at <= {now} THEN 1 END),
       count(CASE WHEN status = 'pending' AND run_at > {now} THEN 1 END),
       count(CASE WHEN status = 'pending' AND retries > 0 THEN 1 END),
       count(waits_for),
       count(CASE WHEN status = 'running' THEN 1 END),
       count(CASE WHEN status = 'dead' THEN 1 END),
       {seconds(f"min(CASE WHEN status = 'pending' AND run_at <= {now} THEN run_at END)")},
       {seconds("min(CASE WHEN status = 'running' THEN claimed_at END)")},
       max(paused) = 1,
       max(CASE WHEN paused = 1 THEN paused_until END)
  FROM (SELECT {open_columns}, 0 AS paused, CAST(NULL AS {moment}) AS paused_until
          FROM {jobs} WHERE status = 'pending' AND waits_for IS NULL
         UNION ALL
        SELECT {open_columns}, 0, NULL FROM {jobs} WHERE status = 'pending' AND waits_for IS NOT NULL
         UNION ALL
        SELECT {open_columns}, 0, NULL FROM {jobs} WHERE status = 'running'
         UNION ALL
        SELECT {open_columns}, 0, NULL FROM {jobs} WHERE status = 'dead'
         UNION ALL
        SELECT name, NULL, NULL, NULL, NULL, NULL,
               CASE WHEN paused_at IS NOT NULL AND (paused_until IS NULL OR paused_until > {now}) THEN 1 ELSE 0 END,
               paused_until
          FROM {queues}) AS parts
 GROUP BY queue
""",
    )
    worker_status = View(
        "worker_status",
        "pgqueue: workers and what they hold at this moment; consumers that only claim have no row",
        [
            ("id", "as in jobs.claimed_by"),
            ("host", "name of its machine"),
            ("pid", "of its process on that machine"),
            ("version", "of pgqueue"),
            ("queues", "concurrency by queue"),
            ("tasks", "names of the tasks it knows"),
            ("started_at", "when it began to work"),
            ("heartbeat_at", "last sign of life"),
            ("silent_seconds", "since then; more than its lease (30 unless set otherwise): it is gone, or cut off"),
            ("running", "jobs it holds"),
            ("lapsed", "of them: the lease ran out"),
            ("oldest_claimed_at", "the earliest claim of them"),
        ],
        f"""
SELECT w.id, w.host, w.pid, w.version, w.queues, w.tasks, w.started_at, w.heartbeat_at,
       {seconds("w.heartbeat_at")}, coalesce(r.running, 0), coalesce(r.lapsed, 0), r.oldest_claimed_at
  FROM {workers} AS w
  LEFT JOIN (SELECT claimed_by, count(*) AS running, count(CASE WHEN claim_expires_at < {now} THEN 1 END) AS lapsed,
                    min(claimed_at) AS oldest_claimed_at
               FROM {jobs} WHERE status = 'running' GROUP BY claimed_by) AS r ON r.claimed_by = w.id
""",
    )
    served = (
        f"""SELECT DISTINCT q.key AS queue, t.value AS task
                      FROM {workers} AS w, json_each(w.queues) AS q, json_each(w.tasks) AS t"""
        if flat
        else f"""SELECT DISTINCT q.name AS queue, t.name AS task
                      FROM {workers} AS w, jsonb_object_keys(w.queues) AS q(name),
                           jsonb_array_elements_text(w.tasks) AS t(name)"""
    )
    taken = (
        f"SELECT DISTINCT q.key AS queue FROM {workers} AS w, json_each(w.queues) AS q"
        if flat
        else f"SELECT DISTINCT q.name AS queue FROM {workers} AS w, jsonb_object_keys(w.queues) AS q(name)"
    )
    alive = f"w.heartbeat_at > {ago(5, 'minutes')}"
    late_columns = "id, queue, task, run_at, attempt, expires_at, waits_for"
    stuck_jobs = View(
        "stuck_jobs",
        "pgqueue: running jobs that should have ended, and pending ones that have been due for over a minute, with the "
        "likely cause; one row each, so it is as long as the backlog",
        [
            ("id", "of the job"),
            ("queue", "the named line it waits in"),
            ("task", "registered name of the function"),
            ("status", "pending or running"),
            ("why", "the likely cause, in words"),
            ("since", "running: when it was claimed; pending: when it became due"),
            ("seconds", "since then"),
            ("attempt", "how often it was claimed"),
            ("worker", "of a running job"),
        ],
        f"""
SELECT id, queue, task, 'running',
       CASE WHEN claim_expires_at < {now} THEN 'its lease ran out'
            WHEN cancel_requested_at < {ago(1, "minutes")} THEN 'it goes on although it was asked to stop'
            ELSE 'it runs for over an hour' END,
       claimed_at, {seconds("claimed_at")}, attempt, claimed_by
  FROM {jobs}
 WHERE status = 'running'
   AND (claim_expires_at < {now} OR cancel_requested_at < {ago(1, "minutes")} OR claimed_at < {ago(1, "hours")})
 UNION ALL
SELECT j.id, j.queue, j.task, 'pending',
       CASE WHEN j.expires_at <= {now} THEN 'it expired, and no worker has looked since'
            WHEN p.name IS NOT NULL THEN 'its queue is paused'
            WHEN q.queue IS NULL THEN 'no worker takes its queue'
            WHEN s.queue IS NULL THEN 'no worker of its queue knows its task'
            WHEN j.waits_for IS NOT NULL THEN 'it waits for ' || j.waits_for
            ELSE 'others are before it' END,
       j.run_at, {seconds("j.run_at")}, j.attempt, NULL
  FROM (SELECT {late_columns} FROM {jobs}
         WHERE status = 'pending' AND waits_for IS NULL AND run_at < {ago(1, "minutes")}
         UNION ALL
        SELECT {late_columns} FROM {jobs}
         WHERE status = 'pending' AND waits_for IS NOT NULL AND run_at < {ago(1, "minutes")}) AS j
  LEFT JOIN {queues} AS p
    ON p.name = j.queue AND p.paused_at IS NOT NULL AND (p.paused_until IS NULL OR p.paused_until > {now})
  LEFT JOIN ({taken} WHERE {alive}) AS q ON q.queue = j.queue
  LEFT JOIN ({served} WHERE {alive}) AS s ON s.queue = j.queue AND s.task = j.task
""",
    )
    nothing = "CAST(NULL AS text)"
    claim_position = "coalesce(attempt, 0) * 10 + 1"
    job_history = View(
        "job_history",
        "pgqueue: all that is known of jobs, one row a change; ORDER BY job_id, at, position. With a job_id it reads "
        "that job; without one, all jobs and events, which takes seconds in a long history",
        [
            ("job_id", "of the job"),
            ("at", "when it happened: the start of the transaction that wrote it; of a completion, of its statement"),
            ("position", "the order of what happened at the same moment to one job"),
            ("event", "enqueue, claim, complete, or as in job_events"),
            ("queue", "of the job"),
            ("task", "of the job"),
            ("attempt", "the attempt that this began or ended"),
            ("from_status", "of the job before"),
            ("to_status", "of the job after; NULL: deleted"),
            ("actor", "who did it: a worker, cli and a user, a caller of the API; NULL: an enqueue"),
            ("worker", "which made the attempt"),
            ("reason", "why, in words"),
            ("error_type", "class of a failed attempt's error"),
            ("error_message", "message of that error"),
            ("event_id", "id in job_events; NULL: read from the job's row"),
        ],
        f"""
SELECT id AS job_id, created_at AS at, CAST(0 AS bigint) AS position, 'enqueue' AS event, queue, task,
       CAST(NULL AS integer) AS attempt, {nothing} AS from_status, 'pending' AS to_status, {nothing} AS actor,
       {nothing} AS worker, {nothing} AS reason, {nothing} AS error_type, {nothing} AS error_message,
       CAST(NULL AS bigint) AS event_id
  FROM {jobs}
 UNION ALL
SELECT job_id, claimed_at, CAST({claim_position} AS bigint), 'claim', queue, task, attempt, 'pending', 'running',
       worker, worker, NULL, NULL, NULL, NULL
  FROM {events}
 WHERE job_id IS NOT NULL AND from_status = 'running' AND to_status <> 'running' AND claimed_at IS NOT NULL
 UNION ALL
SELECT id, claimed_at, CAST({claim_position} AS bigint), 'claim', queue, task, attempt, 'pending', 'running',
       claimed_by, claimed_by, NULL, NULL, NULL, NULL
  FROM {jobs}
 WHERE status IN ('running', 'completed') AND claimed_at IS NOT NULL
 UNION ALL
SELECT job_id, at, CAST(coalesce(attempt, 0) * 10 + CASE WHEN from_status <> 'running' THEN 4
                                                         WHEN to_status = 'running' THEN 2 ELSE 3 END AS bigint),
       event, queue, task, attempt, from_status, to_status, actor, worker, reason,
       {of_error("type")}, {of_error("message")}, id
  FROM {events}
 WHERE job_id IS NOT NULL
 UNION ALL
SELECT id, finished_at, CAST(attempt * 10 + 3 AS bigint), 'complete', queue, task, attempt, 'running', 'completed',
       claimed_by, claimed_by, NULL, NULL, NULL, NULL
  FROM {jobs}
 WHERE status = 'completed'
""",
    )
    throughput_minute = View(
        "throughput_minute",
        "pgqueue: jobs that ended and attempts that are to be made again, by the minute. Reads all jobs and events: "
        "seconds in a long history",
        [
            ("minute", "its first moment"),
            ("queue", "of the jobs"),
            ("task", "of the jobs"),
            ("outcome", "completed, dead, cancelled, or retried: an attempt that failed"),
            ("count", "how many"),
        ],
        f"""
SELECT minute, queue, task, outcome, count(*)
  FROM (SELECT {start_of("minute", "finished_at")} AS minute, queue, task, status AS outcome
          FROM {jobs} WHERE finished_at IS NOT NULL
         UNION ALL
        SELECT {start_of("minute", "at")}, queue, task, 'retried'
          FROM {events} WHERE event IN ('retry', 'sweep') AND to_status = 'pending') AS ended
 GROUP BY minute, queue, task, outcome
""",
    )
    percentiles = ("0.5", "0.95", "0.99")
    latency_hour = View(
        "latency_hour",
        "pgqueue: how long completed jobs waited and ran, by the hour of their end. Reads all jobs: seconds in a "
        "long history",
        [
            ("hour", "its first moment"),
            ("queue", "of the jobs"),
            ("task", "of the jobs"),
            ("jobs", "how many were completed"),
            ("wait_avg", "seconds from due (and enqueued) to the claim of the last attempt: the mean"),
            ("wait_max", "the longest of them"),
            ("run_avg", "seconds from that claim to the end: the mean"),
            ("run_max", "the longest of them"),
            *(
                []
                if flat
                else [
                    (f"{name}_p{share[2:].ljust(2, '0')}", f"the same, not exceeded by {share} of the jobs")
                    for name in ("wait", "run")
                    for share in percentiles
                ]
            ),
        ],
        f"""
SELECT hour, queue, task, count(*), avg(wait), max(wait), avg(run), max(run)
       {"" if flat else "".join(f", percentile_cont({p}) WITHIN GROUP (ORDER BY wait)" for p in percentiles)}
       {"" if flat else "".join(f", percentile_cont({p}) WITHIN GROUP (ORDER BY run)" for p in percentiles)}
  FROM (SELECT {start_of("hour", "finished_at")} AS hour, queue, task,
               {seconds("CASE WHEN run_at > created_at THEN run_at ELSE created_at END", "claimed_at")} AS wait,
               {seconds("claimed_at", "finished_at")} AS run
          FROM {jobs} WHERE status = 'completed') AS ended
 GROUP BY hour, queue, task
""",
    )
    message = f"substr({of_error('message')}, 1, 500)"
    error_groups = View(
        "error_groups",
        "pgqueue: failed attempts, alike ones together. Reads all events: seconds after very many failures",
        [
            ("task", "of the jobs"),
            ("error_type", "class of the errors"),
            ("error_pattern", "their message, its first 500 characters, with # for what are numbers"),
            ("attempts", "how many failed so"),
            ("jobs", "how many jobs they belong to"),
            ("first_at", "the first time"),
            ("last_at", "the last time"),
            ("last_job_id", "the newest of the jobs"),
        ],
        f"""
SELECT task, error_type, error_pattern, count(*), count(DISTINCT job_id), min(at), max(at), max(job_id)
  FROM (SELECT task, {of_error("type")} AS error_type, {_pattern(message, flat)} AS error_pattern, job_id, at
          FROM {events} WHERE error IS NOT NULL{"" if flat else " AND jsonb_typeof(error) = 'object'"}) AS failed
 WHERE error_type IS NOT NULL
 GROUP BY task, error_type, error_pattern
""",
    )
    return [
        queue_summary,
        worker_status,
        stuck_jobs,
        job_history,
        throughput_minute,
        latency_hour,
        error_groups,
    ]


def _pattern(message: str, flat: bool) -> str:
    """Numbers, and on PostgreSQL also UUIDs and hexadecimal numbers, as #."""
    if not flat:
        uuid = "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
        return f"regexp_replace({message}, '{uuid}|0x[0-9a-fA-F]+|[0-9]+', '#', 'g')"
    for digit in "0123456789":
        message = f"replace({message}, '{digit}', '#')"
    for run in ("########", "####", "##", "##", "##"):
        message = f"replace({message}, '{run}', '#')"
    return message


def _create_audit_view(schema: str | None, prefix: str, view: View) -> None:
    name = _name(schema, prefix, view.name)
    columns = ", ".join(f'"{column}"' for column, _ in view.columns)
    op.execute(f"CREATE VIEW {name} ({columns}) AS{view.query.rstrip()}")
    if schema is not None:
        op.execute(f"COMMENT ON VIEW {name} IS '{view.comment}'")
        for column, comment in view.columns:
            op.execute(f"COMMENT ON COLUMN {name}.{column} IS '" + comment.replace("'", "''") + "'")


def _create_jobs_as_of(schema: str) -> None:
    """The next recorded change after the moment says what a job was before; where there is none, its row does.

    Only claims and completions are not recorded: each event that ended an attempt says when that was claimed.
    """
    jobs, events = _jobs(schema, ""), _name(schema, "", "job_events")
    function = f"{_name(schema, '', 'jobs_as_of')}"
    op.execute(
        f"""
CREATE FUNCTION {function}(moment timestamptz)
RETURNS TABLE (id bigint, queue text, task text, status text, attempt integer, worker text, claimed_at timestamptz,
               created_at timestamptz)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
SELECT s.id, s.queue, s.task,
       CASE WHEN s.claimed_at > moment THEN 'pending' ELSE s.status END,
       CASE WHEN s.claimed_at > moment THEN s.attempt - 1 ELSE s.attempt END,
       CASE WHEN s.status = 'running' AND s.claimed_at <= moment THEN s.worker END,
       CASE WHEN s.status = 'running' AND s.claimed_at <= moment THEN s.claimed_at END,
       s.created_at
  FROM (SELECT j.id, j.queue, j.task, j.created_at,
               CASE WHEN n.id IS NOT NULL THEN n.from_status
                    WHEN j.finished_at <= moment THEN j.status
                    WHEN j.status = 'completed' THEN 'running'
                    WHEN j.status IN ('pending', 'running') THEN j.status END AS status,
               coalesce(n.attempt, j.attempt) AS attempt,
               CASE WHEN n.id IS NOT NULL THEN n.worker ELSE j.claimed_by END AS worker,
               CASE WHEN n.from_status = 'running' THEN n.claimed_at
                    WHEN n.id IS NULL AND j.status IN ('running', 'completed') THEN j.claimed_at END AS claimed_at
          FROM {jobs} AS j
          LEFT JOIN (SELECT e.job_id, min(e.id) AS id
                       FROM {events} AS e
                      WHERE e.at > moment AND e.from_status <> e.to_status
                      GROUP BY e.job_id) AS f ON f.job_id = j.id
          LEFT JOIN {events} AS n ON n.id = f.id
         WHERE j.created_at <= moment) AS s
$function$
"""
    )
    op.execute(
        f"COMMENT ON FUNCTION {function}(timestamptz) IS "
        "'The jobs that are still stored as they stood at a past moment; a status of NULL: changed by plain SQL since. "
        "Reads all jobs and events: seconds in a long history'"
    )


def _create_enqueue(schema: str) -> None:
    """For triggers and other languages: the same defaults, CHECKs and decisions as an enqueue from Python.

    No percent sign in here: in SQL for people to run (`--sql`) it would come out twice.
    """
    function = _name(schema, "", "enqueue")
    jobs, events, limits, periods = (
        _name(schema, "", table) for table in ("jobs", "job_events", "limits", "unique_periods")
    )
    insert = f"""INSERT INTO {jobs} AS j (task, payload, queue, priority, run_at, unique_key, max_retries, metadata,
                     expires_at, concurrency_key, ordering_key, rate_key)
            VALUES (enqueue.task, enqueue.payload, enqueue.queue, enqueue.priority, enqueue.run_at, enqueue.unique_key,
                    enqueue.max_retries, enqueue.metadata, expiry, enqueue.concurrency_key, enqueue.ordering_key,
                    enqueue.rate_key)
            ON CONFLICT DO NOTHING
            RETURNING j.id INTO new_id;"""
    op.execute(
        f"""
CREATE FUNCTION {function}(
    task text,
    payload jsonb DEFAULT '{{}}',
    queue text DEFAULT 'default',
    priority integer DEFAULT 0,
    run_at timestamptz DEFAULT now(),
    unique_key text DEFAULT NULL,
    max_retries integer DEFAULT 3,
    metadata jsonb DEFAULT '{{}}',
    on_conflict text DEFAULT 'skip',
    unique_for interval DEFAULT NULL,
    expires_in interval DEFAULT NULL,
    expires_at timestamptz DEFAULT NULL,
    concurrency_key text DEFAULT NULL,
    ordering_key text DEFAULT NULL,
    rate_key text DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql
SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
AS $function$
#variable_conflict use_column
DECLARE
    new_id bigint;
    holder_id bigint;
    holder_status text;
    expiry timestamptz := coalesce(enqueue.expires_at, enqueue.run_at + enqueue.expires_in);
    full_at integer;
    when_full text;
    depth bigint;
    wrong text := {_wrong_argument()};
BEGIN
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'pgqueue: ' || wrong;
    END IF;
    IF enqueue.on_conflict IS NULL OR enqueue.on_conflict NOT IN ('skip', 'raise', 'replace') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'pgqueue: on_conflict must be skip, raise or replace, got '
                || coalesce(quote_literal(enqueue.on_conflict), 'NULL');
    END IF;
    IF enqueue.unique_for IS NOT NULL AND (enqueue.unique_key IS NULL OR enqueue.unique_for <= interval '0') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'pgqueue: unique_for must be more than 0, and needs a unique_key';
    END IF;
    IF enqueue.expires_in IS NOT NULL AND enqueue.expires_at IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'pgqueue: give either expires_in or expires_at, not both';
    END IF;
    IF expiry > '9000-01-01 00:00+00' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'pgqueue: the job would expire after the year 9000';
    END IF;
    IF expiry <= enqueue.run_at THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'pgqueue: the job would expire before it is due';
    END IF;

    IF enqueue.ordering_key IS NOT NULL AND NOT EXISTS (
        SELECT FROM {limits} AS l WHERE l.scope = 'queue' AND l.name = enqueue.queue AND l.ordered
    ) THEN
        INSERT INTO {limits} AS l (scope, name, ordered) VALUES ('queue', enqueue.queue, true)
        ON CONFLICT (scope, name) DO UPDATE SET ordered = true;
    END IF;
    SELECT l.max_depth, l.on_full INTO full_at, when_full
      FROM {limits} AS l WHERE l.scope = 'queue' AND l.name = enqueue.queue;
    IF full_at IS NOT NULL THEN
        SELECT count(*) INTO depth FROM (
           (SELECT j.id FROM {jobs} AS j
             WHERE j.queue = enqueue.queue AND j.status = 'pending' AND j.waits_for IS NULL LIMIT full_at)
            UNION ALL
           (SELECT j.id FROM {jobs} AS j
             WHERE j.queue = enqueue.queue AND j.status = 'pending' AND j.waits_for IS NOT NULL LIMIT full_at)
        ) AS pending;
        IF depth >= full_at AND enqueue.unique_key IS NOT NULL AND (
            EXISTS (SELECT FROM {jobs} AS j
                     WHERE j.task = enqueue.task AND j.unique_key = enqueue.unique_key
                       AND j.status IN ('pending', 'running'))
            OR enqueue.unique_for IS NOT NULL
               AND EXISTS (SELECT FROM {periods} AS p
                             LEFT JOIN {jobs} AS h ON h.id = p.job_id
                            WHERE p.task = enqueue.task AND p.unique_key = enqueue.unique_key AND p.until > now()
                              AND coalesce(h.status, '') NOT IN ('dead', 'cancelled'))
        ) THEN
            depth := 0; -- nothing new is stored
        END IF;
        IF depth >= full_at AND when_full = 'drop' THEN
            RETURN NULL;
        ELSIF depth >= full_at THEN
            RAISE EXCEPTION USING ERRCODE = 'configuration_limit_exceeded',
                MESSAGE = 'pgqueue: queue ' || enqueue.queue || ' is full: its max_depth is ' || full_at;
        END IF;
    END IF;

    FOR round IN 1..5 LOOP
        holder_id := NULL;
        IF enqueue.unique_for IS NOT NULL THEN
            SELECT p.job_id, coalesce(h.status, 'gone') INTO holder_id, holder_status
              FROM {periods} AS p
              LEFT JOIN {jobs} AS h ON h.id = p.job_id
             WHERE p.task = enqueue.task AND p.unique_key = enqueue.unique_key AND p.until > now()
               AND coalesce(h.status, '') NOT IN ('dead', 'cancelled');
        END IF;
        IF holder_id IS NULL THEN
            IF enqueue.unique_for IS NULL THEN
                {insert}
            ELSE
                BEGIN
                    {insert}
                    INSERT INTO {periods} AS p (task, unique_key, until, job_id)
                    SELECT enqueue.task, enqueue.unique_key, now() + enqueue.unique_for, new_id
                     WHERE new_id IS NOT NULL
                    ON CONFLICT (task, unique_key) DO UPDATE SET until = EXCLUDED.until, job_id = EXCLUDED.job_id
                     WHERE p.until <= now()
                        OR coalesce((SELECT h.status FROM {jobs} AS h WHERE h.id = p.job_id), '')
                           IN ('dead', 'cancelled');
                    IF new_id IS NOT NULL AND NOT FOUND THEN
                        -- Somebody else began it at this very moment: take the job back.
                        RAISE EXCEPTION USING ERRCODE = 'PGQ01';
                    END IF;
                EXCEPTION WHEN SQLSTATE 'PGQ01' THEN
                    CONTINUE;
                END;
            END IF;
            IF new_id IS NOT NULL THEN
                RETURN new_id;
            END IF;
            SELECT j.id, j.status INTO holder_id, holder_status
              FROM {jobs} AS j
             WHERE j.task = enqueue.task AND j.unique_key = enqueue.unique_key
               AND j.status IN ('pending', 'running');
            CONTINUE WHEN holder_id IS NULL;
        END IF;

        IF enqueue.on_conflict = 'skip' THEN
            RETURN holder_id;
        END IF;
        IF enqueue.on_conflict = 'replace' AND holder_status = 'pending' THEN
            UPDATE {jobs} AS j
               SET payload = enqueue.payload, metadata = enqueue.metadata, priority = enqueue.priority,
                   max_retries = enqueue.max_retries, run_at = enqueue.run_at, expires_at = expiry, retries = 0,
                   error = NULL, progress = NULL, waits_for = NULL,
                   queue = CASE WHEN j.slot IS NULL AND NOT j.leads_order THEN enqueue.queue ELSE j.queue END,
                   concurrency_key = CASE WHEN j.slot IS NULL AND NOT j.leads_order THEN enqueue.concurrency_key
                                          ELSE j.concurrency_key END,
                   ordering_key = CASE WHEN j.slot IS NULL AND NOT j.leads_order THEN enqueue.ordering_key
                                       ELSE j.ordering_key END,
                   rate_key = CASE WHEN j.slot IS NULL AND NOT j.leads_order THEN enqueue.rate_key
                                   ELSE j.rate_key END
             WHERE j.task = enqueue.task AND j.unique_key = enqueue.unique_key AND j.status = 'pending'
            RETURNING j.id INTO new_id;
            CONTINUE WHEN new_id IS NULL;
            INSERT INTO {events} (job_id, queue, task, event, actor, from_status, to_status, reason)
            VALUES (new_id, enqueue.queue, enqueue.task, 'replace', 'sql:' || session_user, 'pending', 'pending',
                    'enqueued again with the same unique key');
            RETURN new_id;
        END IF;
        RAISE EXCEPTION USING ERRCODE = 'unique_violation',
            MESSAGE = 'pgqueue: task ' || enqueue.task || ' has the ' || holder_status || ' job ' || holder_id
                || ' with the unique key ' || quote_literal(enqueue.unique_key);
    END LOOP;
    RAISE EXCEPTION USING
        ERRCODE = 'serialization_failure',
        MESSAGE = 'pgqueue: the unique key of task ' || enqueue.task || ' changed hands while its job was enqueued';
END
$function$
"""
    )
    op.execute(
        f"COMMENT ON FUNCTION {function}({ENQUEUE_ARGUMENTS}) IS "
        "'Stores a job in the calling transaction and returns its id. With a unique_key that a pending or running job "
        "of the task has, or one enqueued less than unique_for ago, on_conflict decides: skip returns the id of that "
        "job, raise fails, replace gives it this payload. NULL: the queue is full and drops jobs'"
    )


def _wrong_argument() -> str:
    """An expression: what is wrong with the arguments, in the words of an enqueue from Python; NULL: nothing."""
    name_rule = "~ '^[A-Za-z0-9_][A-Za-z0-9_.:-]*$'"  # with a bound in it, it takes twenty times as long
    a_name = "name must be 1 to 128 letters, digits or any of _ . : - and not start with a sign"
    moment_rule = "BETWEEN '1970-01-01 00:00+00' AND '9000-01-01 00:00+00'"
    a_moment = "must lie between the years 1970 and 9000"
    an_object = "must be a JSON object"
    a_key = "must have 1 to 512 characters"
    rules = [  # argument, what is looked at, the rule, its words, and whether the argument may be NULL
        ("task", "task", f"{name_rule} AND length(task) <= 128", a_name, False),
        ("queue", "queue", f"{name_rule} AND length(queue) <= 128", a_name, False),
        ("payload", "jsonb_typeof(payload)", "= 'object'", an_object, False),
        ("metadata", "jsonb_typeof(metadata)", "= 'object'", an_object, False),
        ("priority", "priority", "BETWEEN -32768 AND 32767", "must be between -32768 and 32767", False),
        ("max_retries", "max_retries", "BETWEEN 0 AND 32767", "must be between 0 and 32767", False),
        ("run_at", "run_at", moment_rule, a_moment, False),
        ("expires_at", "expires_at", moment_rule, a_moment, True),
        ("unique_key", "length(unique_key)", "BETWEEN 1 AND 512", a_key, True),
        ("concurrency_key", "length(concurrency_key)", "BETWEEN 1 AND 512", a_key, True),
        ("ordering_key", "length(ordering_key)", "BETWEEN 1 AND 512", a_key, True),
        ("rate_key", "length(rate_key)", "BETWEEN 1 AND 512", a_key, True),
    ]
    cases = [
        f"WHEN ({seen} {rule}) IS {'FALSE' if may_be_null else 'NOT TRUE'} "
        f"THEN '{name} {words}, got ' || coalesce(CAST({seen} AS text), 'NULL')"
        for name, seen, rule, words, may_be_null in rules
    ]
    return "CASE " + "\n        ".join(cases) + " END"


def _create_enqueue_as_before(schema: str) -> None:
    """As the revision before has it."""
    jobs, function = _jobs(schema, ""), _name(schema, "", "enqueue")
    op.execute(
        f"""
CREATE FUNCTION {function}(
    task text,
    payload jsonb DEFAULT '{{}}',
    queue text DEFAULT 'default',
    priority integer DEFAULT 0,
    run_at timestamptz DEFAULT now(),
    unique_key text DEFAULT NULL,
    max_retries integer DEFAULT 3,
    metadata jsonb DEFAULT '{{}}'
) RETURNS bigint
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    job_id bigint;
BEGIN
    FOR round IN 1..5 LOOP
        INSERT INTO {jobs} AS j (task, payload, queue, priority, run_at, unique_key, max_retries, metadata)
        VALUES (enqueue.task, enqueue.payload, enqueue.queue, enqueue.priority, enqueue.run_at, enqueue.unique_key,
                enqueue.max_retries, enqueue.metadata)
        ON CONFLICT DO NOTHING
        RETURNING j.id INTO job_id;
        IF job_id IS NULL THEN
            SELECT j.id INTO job_id
              FROM {jobs} AS j
             WHERE j.task = enqueue.task
               AND j.unique_key = enqueue.unique_key
               AND j.status IN ('pending', 'running');
        END IF;
        IF job_id IS NOT NULL THEN
            RETURN job_id;
        END IF;
    END LOOP;
    RAISE EXCEPTION USING
        ERRCODE = 'serialization_failure',
        MESSAGE = 'pgqueue: the unique key of task ' || enqueue.task || ' changed hands while its job was enqueued';
END
$function$
"""
    )
    op.execute(
        f"COMMENT ON FUNCTION {function}({ENQUEUE_ARGUMENTS_BEFORE}) IS "
        "'Stores a job in the calling transaction and returns its id; with a unique_key that a pending or running "
        "job of the task has, the id of that job.'"
    )


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
