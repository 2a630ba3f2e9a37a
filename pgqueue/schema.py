"""The tables: what statements are built from and what migrations are compared with.

On PostgreSQL they live in a schema of their own, so that an application's Alembic leaves them alone. SQLite has
no schemas: there the schema's name becomes a prefix of the tables' names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import sqlalchemy as sa
from sqlalchemy.orm import registry

from pgqueue.config import checked_schema
from pgqueue.dialect import SQLITE, BigId, JSONDocument, UTCDateTime, checked_dialect, now
from pgqueue.job import Job

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

#: The longest key: an index entry must fit into a page of PostgreSQL.
KEY_CHARACTERS_MAX = 512


@dataclass(frozen=True)
class Tables:
    """The tables of one pgqueue as one kind of database knows them."""

    dialect_name: str
    schema: str  #: the name as configured; also on SQLite, where it is a prefix
    metadata: sa.MetaData
    jobs: sa.Table
    job_events: sa.Table
    queues: sa.Table
    workers: sa.Table
    job_class: type[Job]  #: `Job`, mapped to `jobs`

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@cache
def tables_for(dialect_name: str, schema: str) -> Tables:
    """The tables of the pgqueue called `schema`; always the same object for the same arguments."""
    flat = checked_dialect(dialect_name) == SQLITE
    checked_schema(schema)
    prefix = f"{schema}_" if flat else ""
    metadata = sa.MetaData(schema=None if flat else schema, naming_convention=NAMING_CONVENTION)
    jobs = _jobs(metadata, prefix)
    job_class: type[Job] = type("Job", (Job,), {"__module__": __name__, "__doc__": Job.__doc__})
    registry(metadata=metadata).map_imperatively(job_class, jobs)
    return Tables(
        dialect_name,
        schema,
        metadata,
        jobs,
        _job_events(metadata, prefix),
        _queues(metadata, prefix),
        _workers(metadata, prefix),
        job_class,
    )


def _jobs(metadata: sa.MetaData, prefix: str) -> sa.Table:
    return sa.Table(
        f"{prefix}jobs",
        metadata,
        sa.Column("id", BigId, sa.Identity(always=False), primary_key=True, comment="assigned on insert"),
        sa.Column("queue", sa.Text, nullable=False, server_default="default", comment="the named line it waits in"),
        sa.Column("task", sa.Text, nullable=False, comment="registered name of the function to run"),
        sa.Column(
            "payload",
            JSONDocument,
            nullable=False,
            server_default=sa.text("'{}'"),
            comment="keyword arguments of the task: a JSON object",
        ),
        sa.Column(
            "priority",
            sa.SmallInteger,
            nullable=False,
            server_default=sa.text("0"),
            comment="higher is claimed first",
        ),
        sa.Column(
            "status",
            sa.Text,
            nullable=False,
            server_default="pending",
            comment="pending, running, completed, dead or cancelled",
        ),
        sa.Column(
            "run_at",
            UTCDateTime,
            nullable=False,
            server_default=now(),
            comment="not claimed before this moment; moved forward by retry and snooze",
        ),
        sa.Column("claimed_by", sa.Text, comment="worker of the present or last attempt"),
        sa.Column(
            "claim_token",
            sa.Uuid,
            comment="fresh for each claim, NULL unless running: a worker writes only where it matches",
        ),
        sa.Column(
            "claim_expires_at",
            UTCDateTime,
            comment="end of the lease unless extended, NULL unless running",
        ),
        sa.Column(
            "attempt",
            sa.Integer,
            nullable=False,
            server_default=sa.text("0"),
            comment="how often it was claimed; counted when claimed",
        ),
        sa.Column(
            "retries",
            sa.Integer,
            nullable=False,
            server_default=sa.text("0"),
            comment="failed attempts that were charged; a replay starts again from 0",
        ),
        sa.Column(
            "max_retries",
            sa.SmallInteger,
            nullable=False,
            server_default=sa.text("3"),
            comment="retries allowed before the job is dead",
        ),
        sa.Column("expires_at", UTCDateTime, comment="not worth running after this moment"),
        sa.Column("unique_key", sa.Text, comment="at most one pending or running job of a task has it"),
        sa.Column("ordering_key", sa.Text, comment="jobs of one key run one after another"),
        sa.Column("concurrency_key", sa.Text, comment="jobs of one key share a limit"),
        sa.Column(
            "metadata",
            JSONDocument,
            nullable=False,
            server_default=sa.text("'{}'"),
            comment="headers, trace context, tags: carried, never interpreted by the queue",
        ),
        sa.Column("result", JSONDocument, comment="what the task returned"),
        sa.Column("error", JSONDocument, comment="type, message and traceback of the last failed attempt"),
        sa.Column("progress", JSONDocument, comment="what the running task last reported"),
        sa.Column("created_at", UTCDateTime, nullable=False, server_default=now(), comment="when it was enqueued"),
        sa.Column("claimed_at", UTCDateTime, comment="when the present or last attempt was claimed"),
        sa.Column("finished_at", UTCDateTime, comment="when it became completed, dead or cancelled"),
        sa.CheckConstraint("status IN ('pending', 'running', 'completed', 'dead', 'cancelled')", name="status"),
        sa.CheckConstraint(
            "(status = 'running') = (claim_token IS NOT NULL)"
            " AND (status = 'running') = (claim_expires_at IS NOT NULL)"
            " AND (status <> 'running' OR (claimed_by IS NOT NULL AND claimed_at IS NOT NULL))",
            name="claim",
        ),
        sa.CheckConstraint(
            "(status IN ('completed', 'dead', 'cancelled')) = (finished_at IS NOT NULL)", name="finished"
        ),
        sa.CheckConstraint("attempt >= 0 AND retries >= 0 AND max_retries >= 0", name="counters"),
        sa.CheckConstraint(
            "length(queue) BETWEEN 1 AND 128 AND length(task) BETWEEN 1 AND 128"
            f" AND length(unique_key) BETWEEN 1 AND {KEY_CHARACTERS_MAX}"
            f" AND length(ordering_key) BETWEEN 1 AND {KEY_CHARACTERS_MAX}"
            f" AND length(concurrency_key) BETWEEN 1 AND {KEY_CHARACTERS_MAX}",
            name="names",
        ),
        sa.CheckConstraint(_are_objects("payload", "metadata", flat=bool(prefix)), name="documents"),
        sa.CheckConstraint(
            _are_readable(
                "run_at",
                "claim_expires_at",
                "expires_at",
                "created_at",
                "claimed_at",
                "finished_at",
                flat=bool(prefix),
            ),
            name="moments",
        ),
        *([sa.CheckConstraint(_ARE_NUMBERS, name="numbers")] if prefix else []),
        # The claim walks this one from the front: see dialect.claimable.
        sa.Index(
            f"{prefix}jobs_claim",
            "queue",
            sa.desc("priority"),
            "run_at",
            "id",
            postgresql_where=sa.text("status = 'pending'"),
            sqlite_where=sa.text("status = 'pending'"),
        ),
        # The sweep walks this one from the front: the earliest lease ends first.
        sa.Index(
            f"{prefix}jobs_lease",
            "claim_expires_at",
            postgresql_where=sa.text("status = 'running'"),
            sqlite_where=sa.text("status = 'running'"),
        ),
        # Over all open statuses, so that no retry, sweep or release can ever run into it.
        sa.Index(
            f"{prefix}jobs_unique_key",
            "task",
            "unique_key",
            unique=True,
            postgresql_where=sa.text(OPEN_WITH_KEY),
            sqlite_where=sa.text(OPEN_WITH_KEY),
        ),
        # For people: dead jobs are few among many finished ones.
        sa.Index(
            f"{prefix}jobs_dead",
            "id",
            postgresql_where=sa.text("status = 'dead'"),
            sqlite_where=sa.text("status = 'dead'"),
        ),
        comment="pgqueue: one row per job",
        sqlite_autoincrement=True,  # an id is never given to a second job
    )


def _are_objects(*columns: str, flat: bool) -> str:
    """The columns hold JSON objects. SQLite would take anything, and calls JSON5 JSON."""
    test = "json_valid({0}) AND json_type({0}) = 'object'" if flat else "jsonb_typeof({0}) = 'object'"
    return " AND ".join(test.format(column) for column in columns)


def _are_readable(*columns: str, flat: bool) -> str:
    """The columns hold moments that every client can read.

    One row with an infinite moment, one before the year 1 or after 9999, would fail every claim that meets it.
    So would on SQLite a 13th month, of which strftime makes NULL, or a 31st of February, which strftime only sees
    through when it has something to add.
    """
    test = (
        "({0} IS NULL OR (coalesce({0} IN (strftime('%Y-%m-%d %H:%M:%f', {0}, '+0 days'),"
        " strftime('%Y-%m-%d %H:%M:%S', {0}, '+0 days')), 0) AND {0} BETWEEN '1970' AND '9000'))"
        if flat
        else "{0} BETWEEN '1970-01-01 00:00+00' AND '9000-01-01 00:00+00'"
    )
    return " AND ".join(test.format(column) for column in columns)


#: SQLite takes any value in any column.
_ARE_NUMBERS = (
    "typeof(priority) = 'integer' AND priority BETWEEN -32768 AND 32767 AND typeof(attempt) = 'integer'"
    " AND typeof(retries) = 'integer' AND typeof(max_retries) = 'integer'"
)

#: The predicate of the unique index; an ON CONFLICT has to repeat it.
OPEN_WITH_KEY = "unique_key IS NOT NULL AND status IN ('pending', 'running')"


def _job_events(metadata: sa.MetaData, prefix: str) -> sa.Table:
    return sa.Table(
        f"{prefix}job_events",
        metadata,
        sa.Column(
            "id", BigId, sa.Identity(always=True), primary_key=True, comment="in the order of happening, within a job"
        ),
        sa.Column("at", UTCDateTime, nullable=False, server_default=now(), comment="when it happened"),
        sa.Column("job_id", sa.BigInteger, comment="the job; NULL for what happens to a queue"),
        sa.Column("queue", sa.Text, nullable=False, comment="of the job, or the queue it happened to"),
        sa.Column("task", sa.Text, comment="of the job"),
        sa.Column("event", sa.Text, nullable=False, comment="retry, dead, snooze, release, sweep, cancel, …"),
        sa.Column("actor", sa.Text, nullable=False, comment="worker id, or cli:USER, or the API's caller"),
        sa.Column("attempt", sa.Integer, comment="the attempt that this ended"),
        sa.Column("from_status", sa.Text, comment="of the job before"),
        sa.Column("to_status", sa.Text, comment="of the job after"),
        sa.Column("reason", sa.Text, comment="why, in words"),
        sa.Column("error", JSONDocument, comment="type, message and traceback of a failed attempt"),
        sa.Index(f"{prefix}job_events_job", "job_id", "id"),
        comment="pgqueue: append-only; every change of a job that is not the happy path, which its own row records",
        sqlite_autoincrement=True,
    )


def _queues(metadata: sa.MetaData, prefix: str) -> sa.Table:
    return sa.Table(
        f"{prefix}queues",
        metadata,
        sa.Column("name", sa.Text, primary_key=True, comment="as in jobs.queue"),
        sa.Column("paused_at", UTCDateTime, comment="nothing is claimed from the queue while this is set"),
        sa.Column("paused_until", UTCDateTime, comment="end of the pause; NULL: until somebody resumes it"),
        sa.CheckConstraint("paused_until IS NULL OR paused_at IS NOT NULL", name="pause"),
        sa.CheckConstraint(_are_readable("paused_at", "paused_until", flat=bool(prefix)), name="moments"),
        comment="pgqueue: settings of queues; a queue needs no row here",
    )


def _workers(metadata: sa.MetaData, prefix: str) -> sa.Table:
    return sa.Table(
        f"{prefix}workers",
        metadata,
        sa.Column("id", sa.Text, primary_key=True, comment="as in jobs.claimed_by; new at each start"),
        sa.Column("host", sa.Text, nullable=False, comment="name of its machine"),
        sa.Column("pid", sa.Integer, nullable=False, comment="of its process on that machine"),
        sa.Column("version", sa.Text, nullable=False, comment="of pgqueue"),
        sa.Column("queues", JSONDocument, nullable=False, comment="concurrency by queue"),
        sa.Column("tasks", JSONDocument, nullable=False, comment="names of the tasks it knows"),
        sa.Column("started_at", UTCDateTime, nullable=False, server_default=now(), comment="when it began to work"),
        sa.Column("heartbeat_at", UTCDateTime, nullable=False, server_default=now(), comment="last sign of life"),
        comment="pgqueue: workers for people to look at; no decision depends on this table",
    )
