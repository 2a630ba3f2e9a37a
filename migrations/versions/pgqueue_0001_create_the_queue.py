"""Create the queue.

On PostgreSQL the tables stand in a schema of their own; on SQLite, which has none, the schema's name is a prefix.
Nothing here imports pgqueue: history must not change when the code does.

Revision: pgqueue_0001
"""

from __future__ import annotations

import re
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "pgqueue_0001"
down_revision = None
branch_labels = ("pgqueue",)
depends_on = None

ENQUEUE_ARGUMENTS = "text, jsonb, text, integer, timestamptz, text, integer, jsonb"


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


def upgrade() -> None:
    if _flat():
        _create(None, f"{_schema()}_")
        return
    # Asked first, because IF NOT EXISTS still wants the right to create, which the schema's owner may lack.
    if op.get_context().as_sql or not sa.inspect(op.get_bind()).has_schema(_schema()):
        op.execute(sa.schema.CreateSchema(_schema(), if_not_exists=True))
    _create(_schema(), "")
    _create_enqueue_function(_quoted(_schema()))


def downgrade() -> None:
    """The schema itself stays: the version table may be in it."""
    schema, prefix = (None, f"{_schema()}_") if _flat() else (_schema(), "")
    if schema is not None:
        op.execute(f"DROP FUNCTION {_quoted(schema)}.enqueue({ENQUEUE_ARGUMENTS})")
    for table in ("workers", "queues", "job_events", "jobs"):
        op.drop_table(f"{prefix}{table}", schema=schema)


def _quoted(name: str) -> str:
    """Quoted where it has to be: a name like `order` is a word of SQL."""
    return op.get_context().dialect.identifier_preparer.quote(name)


def _create(schema: str | None, prefix: str) -> None:
    flat = schema is None
    now = sa.text("(strftime('%Y-%m-%d %H:%M:%f', 'now'))") if flat else sa.text("now()")
    moment: sa.types.TypeEngine[Any] = sa.Text() if flat else sa.DateTime(timezone=True)
    document: sa.types.TypeEngine[Any] = sa.JSON() if flat else postgresql.JSONB()
    big_id: sa.types.TypeEngine[Any] = sa.Integer() if flat else sa.BigInteger()

    op.create_table(
        f"{prefix}jobs",
        sa.Column("id", big_id, sa.Identity(always=False), nullable=False, comment="assigned on insert"),
        sa.Column("queue", sa.Text(), server_default="default", nullable=False, comment="the named line it waits in"),
        sa.Column("task", sa.Text(), nullable=False, comment="registered name of the function to run"),
        sa.Column(
            "payload",
            document,
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="keyword arguments of the task: a JSON object",
        ),
        sa.Column(
            "priority",
            sa.SmallInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="higher is claimed first",
        ),
        sa.Column(
            "status",
            sa.Text(),
            server_default="pending",
            nullable=False,
            comment="pending, running, completed, dead or cancelled",
        ),
        sa.Column(
            "run_at",
            moment,
            server_default=now,
            nullable=False,
            comment="not claimed before this moment; moved forward by retry and snooze",
        ),
        sa.Column("claimed_by", sa.Text(), comment="worker of the present or last attempt"),
        sa.Column(
            "claim_token",
            sa.Uuid(),
            comment="fresh for each claim, NULL unless running: a worker writes only where it matches",
        ),
        sa.Column("claim_expires_at", moment, comment="end of the lease unless extended, NULL unless running"),
        sa.Column(
            "attempt",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="how often it was claimed; counted when claimed",
        ),
        sa.Column(
            "retries",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="failed attempts that were charged; a replay starts again from 0",
        ),
        sa.Column(
            "max_retries",
            sa.SmallInteger(),
            server_default=sa.text("3"),
            nullable=False,
            comment="retries allowed before the job is dead",
        ),
        sa.Column("expires_at", moment, comment="not worth running after this moment"),
        sa.Column("unique_key", sa.Text(), comment="at most one pending or running job of a task has it"),
        sa.Column("ordering_key", sa.Text(), comment="jobs of one key run one after another"),
        sa.Column("concurrency_key", sa.Text(), comment="jobs of one key share a limit"),
        sa.Column(
            "metadata",
            document,
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="headers, trace context, tags: carried, never interpreted by the queue",
        ),
        sa.Column("result", document, comment="what the task returned"),
        sa.Column("error", document, comment="type, message and traceback of the last failed attempt"),
        sa.Column("progress", document, comment="what the running task last reported"),
        sa.Column("created_at", moment, server_default=now, nullable=False, comment="when it was enqueued"),
        sa.Column("claimed_at", moment, comment="when the present or last attempt was claimed"),
        sa.Column("finished_at", moment, comment="when it became completed, dead or cancelled"),
        sa.CheckConstraint(
            "status IN ('pending', 'running', 'completed', 'dead', 'cancelled')",
            name=op.f(f"ck_{prefix}jobs_status"),
        ),
        sa.CheckConstraint(
            "(status = 'running') = (claim_token IS NOT NULL)"
            " AND (status = 'running') = (claim_expires_at IS NOT NULL)"
            " AND (status <> 'running' OR (claimed_by IS NOT NULL AND claimed_at IS NOT NULL))",
            name=op.f(f"ck_{prefix}jobs_claim"),
        ),
        sa.CheckConstraint(
            "(status IN ('completed', 'dead', 'cancelled')) = (finished_at IS NOT NULL)",
            name=op.f(f"ck_{prefix}jobs_finished"),
        ),
        sa.CheckConstraint(
            "attempt >= 0 AND retries >= 0 AND max_retries >= 0", name=op.f(f"ck_{prefix}jobs_counters")
        ),
        sa.CheckConstraint(
            "length(queue) BETWEEN 1 AND 128 AND length(task) BETWEEN 1 AND 128"
            " AND length(unique_key) BETWEEN 1 AND 512"
            " AND length(ordering_key) BETWEEN 1 AND 512"
            " AND length(concurrency_key) BETWEEN 1 AND 512",
            name=op.f(f"ck_{prefix}jobs_names"),
        ),
        sa.CheckConstraint(_are_objects("payload", "metadata", flat=flat), name=op.f(f"ck_{prefix}jobs_documents")),
        sa.CheckConstraint(
            _are_readable(
                "run_at",
                "claim_expires_at",
                "expires_at",
                "created_at",
                "claimed_at",
                "finished_at",
                flat=flat,
            ),
            name=op.f(f"ck_{prefix}jobs_moments"),
        ),
        *(
            [
                sa.CheckConstraint(
                    "typeof(priority) = 'integer' AND priority BETWEEN -32768 AND 32767"
                    " AND typeof(attempt) = 'integer' AND typeof(retries) = 'integer'"
                    " AND typeof(max_retries) = 'integer'",
                    name=op.f(f"ck_{prefix}jobs_numbers"),
                )
            ]
            if flat
            else []
        ),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{prefix}jobs")),
        schema=schema,
        comment="pgqueue: one row per job",
        sqlite_autoincrement=True,
    )
    _index(
        schema,
        prefix,
        "jobs",
        "claim",
        ["queue", sa.text("priority DESC"), "run_at", "id"],
        "status = 'pending'",
    )
    _index(schema, prefix, "jobs", "lease", ["claim_expires_at"], "status = 'running'")
    _index(
        schema,
        prefix,
        "jobs",
        "unique_key",
        ["task", "unique_key"],
        "unique_key IS NOT NULL AND status IN ('pending', 'running')",
        unique=True,
    )
    _index(schema, prefix, "jobs", "dead", ["id"], "status = 'dead'")

    op.create_table(
        f"{prefix}job_events",
        sa.Column(
            "id", big_id, sa.Identity(always=True), nullable=False, comment="in the order of happening, within a job"
        ),
        sa.Column("at", moment, server_default=now, nullable=False, comment="when it happened"),
        sa.Column("job_id", sa.BigInteger(), comment="the job; NULL for what happens to a queue"),
        sa.Column("queue", sa.Text(), nullable=False, comment="of the job, or the queue it happened to"),
        sa.Column("task", sa.Text(), comment="of the job"),
        sa.Column("event", sa.Text(), nullable=False, comment="retry, dead, snooze, release, sweep, cancel, …"),
        sa.Column("actor", sa.Text(), nullable=False, comment="worker id, or cli:USER, or the API's caller"),
        sa.Column("attempt", sa.Integer(), comment="the attempt that this ended"),
        sa.Column("from_status", sa.Text(), comment="of the job before"),
        sa.Column("to_status", sa.Text(), comment="of the job after"),
        sa.Column("reason", sa.Text(), comment="why, in words"),
        sa.Column("error", document, comment="type, message and traceback of a failed attempt"),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{prefix}job_events")),
        schema=schema,
        comment="pgqueue: append-only; every change of a job that is not the happy path, which its own row records",
        sqlite_autoincrement=True,
    )
    _index(schema, prefix, "job_events", "job", ["job_id", "id"], None)

    op.create_table(
        f"{prefix}queues",
        sa.Column("name", sa.Text(), nullable=False, comment="as in jobs.queue"),
        sa.Column("paused_at", moment, comment="nothing is claimed from the queue while this is set"),
        sa.Column("paused_until", moment, comment="end of the pause; NULL: until somebody resumes it"),
        sa.CheckConstraint("paused_until IS NULL OR paused_at IS NOT NULL", name=op.f(f"ck_{prefix}queues_pause")),
        sa.CheckConstraint(
            _are_readable("paused_at", "paused_until", flat=flat), name=op.f(f"ck_{prefix}queues_moments")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f(f"pk_{prefix}queues")),
        schema=schema,
        comment="pgqueue: settings of queues; a queue needs no row here",
    )
    op.create_table(
        f"{prefix}workers",
        sa.Column("id", sa.Text(), nullable=False, comment="as in jobs.claimed_by; new at each start"),
        sa.Column("host", sa.Text(), nullable=False, comment="name of its machine"),
        sa.Column("pid", sa.Integer(), nullable=False, comment="of its process on that machine"),
        sa.Column("version", sa.Text(), nullable=False, comment="of pgqueue"),
        sa.Column("queues", document, nullable=False, comment="concurrency by queue"),
        sa.Column("tasks", document, nullable=False, comment="names of the tasks it knows"),
        sa.Column("started_at", moment, server_default=now, nullable=False, comment="when it began to work"),
        sa.Column("heartbeat_at", moment, server_default=now, nullable=False, comment="last sign of life"),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{prefix}workers")),
        schema=schema,
        comment="pgqueue: workers for people to look at; no promise depends on this table",
    )


def _are_objects(*columns: str, flat: bool) -> str:
    """The columns hold JSON objects."""
    test = "json_valid({0}) AND json_type({0}) = 'object'" if flat else "jsonb_typeof({0}) = 'object'"
    return " AND ".join(test.format(column) for column in columns)


def _are_readable(*columns: str, flat: bool) -> str:
    """The columns hold moments that every client can read: finite, with a year of four digits."""
    test = (
        "({0} IS NULL OR (coalesce({0} IN (strftime('%Y-%m-%d %H:%M:%f', {0}, '+0 days'),"
        " strftime('%Y-%m-%d %H:%M:%S', {0}, '+0 days')), 0) AND {0} BETWEEN '1970' AND '9000'))"
        if flat
        else "{0} BETWEEN '1970-01-01 00:00+00' AND '9000-01-01 00:00+00'"
    )
    return " AND ".join(test.format(column) for column in columns)


def _index(
    schema: str | None,
    prefix: str,
    table: str,
    name: str,
    columns: list[Any],
    where: str | None,
    *,
    unique: bool = False,
) -> None:
    condition = sa.text(where) if where else None
    op.create_index(
        f"{prefix}{table}_{name}",
        f"{prefix}{table}",
        columns,
        schema=schema,
        unique=unique,
        postgresql_where=condition,
        sqlite_where=condition,
    )


def _create_enqueue_function(schema: str) -> None:
    """For triggers and other languages: the same defaults and the same CHECKs as an enqueue from Python.

    No percent sign in here: in SQL for people to run (`--sql`) it would come out twice.
    """
    op.execute(
        f"""
CREATE FUNCTION {schema}.enqueue(
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
        INSERT INTO {schema}.jobs AS j (task, payload, queue, priority, run_at, unique_key, max_retries, metadata)
        VALUES (enqueue.task, enqueue.payload, enqueue.queue, enqueue.priority, enqueue.run_at, enqueue.unique_key,
                enqueue.max_retries, enqueue.metadata)
        ON CONFLICT DO NOTHING
        RETURNING j.id INTO job_id;
        IF job_id IS NULL THEN
            SELECT j.id INTO job_id
              FROM {schema}.jobs AS j
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
        f"COMMENT ON FUNCTION {schema}.enqueue({ENQUEUE_ARGUMENTS}) IS "
        "'Stores a job in the calling transaction and returns its id; with a unique_key that a pending or running "
        "job of the task has, the id of that job.'"
    )
