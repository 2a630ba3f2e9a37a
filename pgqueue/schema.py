"""The tables: what statements are built from and what migrations are compared with.

On PostgreSQL they live in a schema of their own, so that an application's Alembic leaves them alone. SQLite has
no schemas: there the schema's name becomes a prefix of the tables' names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

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
class Domain:
    """A type of columns on PostgreSQL, with a rule for their values; SQLite has CHECKs instead.

    Not CHECKs everywhere: PostgreSQL reads their text anew for each statement that writes to the table, which took
    three quarters of the time of an INSERT of one job. The rules of domains it reads once per session, and tests only
    the values that a statement assigns. Columns that people put into arrays (queue, task, status) have CHECKs: few
    clients know the type of an array of a domain.
    """

    name: str
    base: str
    rule: str
    condition: str
    columns: tuple[str, ...]  #: of jobs
    comment: str


DOMAINS = (
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
        f"length(VALUE) BETWEEN 1 AND {KEY_CHARACTERS_MAX}",
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
)


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
    limits: sa.Table
    rate_buckets: sa.Table
    schedules: sa.Table
    schedule_ticks: sa.Table
    unique_periods: sa.Table
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
    if not flat:
        sa.event.listen(metadata, "before_create", _create_domains)
        sa.event.listen(jobs, "after_create", _use_domains)
    return Tables(
        dialect_name,
        schema,
        metadata,
        jobs,
        _job_events(metadata, prefix),
        _queues(metadata, prefix),
        _workers(metadata, prefix),
        _limits(metadata, prefix),
        _rate_buckets(metadata, prefix),
        _schedules(metadata, prefix),
        _schedule_ticks(metadata, prefix),
        _unique_periods(metadata, prefix),
        job_class,
    )


def _create_domains(metadata: sa.MetaData, connection: sa.Connection, **_: Any) -> None:
    for domain in DOMAINS:
        name = _qualified(connection, metadata, domain.name)
        rule = f"CONSTRAINT {domain.rule} CHECK ({domain.condition})"
        connection.exec_driver_sql(f"CREATE DOMAIN {name} AS {domain.base} {rule}")
        connection.exec_driver_sql(f"COMMENT ON DOMAIN {name} IS '{domain.comment}'")


def _use_domains(jobs: sa.Table, connection: sa.Connection, **_: Any) -> None:
    changes = ", ".join(
        f"ALTER COLUMN {column} TYPE {_qualified(connection, jobs, domain.name)}"
        for domain in DOMAINS
        for column in domain.columns
    )
    connection.exec_driver_sql(f"ALTER TABLE {_qualified(connection, jobs, jobs.name)} {changes}")


def _qualified(connection: sa.Connection, where: sa.MetaData | sa.Table, name: str) -> str:
    assert where.schema is not None
    return f"{connection.dialect.identifier_preparer.quote_schema(where.schema)}.{name}"


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
        sa.Column("claim_expires_at", UTCDateTime, comment="end of the lease unless extended, NULL unless running"),
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
        sa.Column(
            "rate_key",
            sa.Text,
            *_check_on_sqlite(prefix, f"length(rate_key) BETWEEN 1 AND {KEY_CHARACTERS_MAX}", name="rate_key"),
            comment="jobs of one key share a rate limit",
        ),
        sa.Column(
            "waits_for",
            sa.Text,
            sa.CheckConstraint("waits_for IS NULL OR status = 'pending'", name="waits_for"),
            comment="what must come free before it can be claimed: order, task, key:… or rate:…",
        ),
        sa.Column(
            "slot",
            sa.Text,
            *_check_on_sqlite(prefix, "slot IN ('held', 'awaited', 'offered')", name="slot"),
            comment="of a limit: held since its claim, awaited when others wait for its end, or offered",
        ),
        sa.Column(
            "leads_order",
            sa.Boolean,
            nullable=False,
            server_default=sa.false(),
            comment="jobs of the same ordering_key wait for its end",
        ),
        sa.Column(
            "cancel_requested_at",
            UTCDateTime,
            *_check_on_sqlite(
                prefix, _are_readable("cancel_requested_at", flat=bool(prefix)), name="cancel_requested_at"
            ),
            comment="when its worker was asked to stop the attempt",
        ),
        sa.Column(
            "prune_at",
            UTCDateTime,
            *_check_on_sqlite(prefix, _are_readable("prune_at", flat=bool(prefix)), name="prune_at"),
            comment="deleted after this moment; NULL: kept until somebody prunes",
        ),
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
        *(_value_checks_on_sqlite() if prefix else [sa.CheckConstraint(_ARE_NAMES, name="names")]),
        # The claim walks this one from the front: see dialect.claimable.
        _partial(prefix, "claim", "queue", sa.desc("priority"), "run_at", "id", where=CLAIMABLE),
        # The sweep walks this one from the front: the earliest lease ends first.
        _partial(prefix, "lease", "claim_expires_at", where="status = 'running'"),
        # Over all open statuses, so that no retry, sweep or release can ever run into it.
        _partial(prefix, "unique_key", "task", "unique_key", unique=True, where=OPEN_WITH_KEY),
        # For people: dead and cancelled jobs are few among many finished ones.
        _partial(prefix, "dead", "id", where="status = 'dead'"),
        _partial(prefix, "cancelled", "id", where="status = 'cancelled'"),
        # Limits: how many jobs hold a slot, which slots came free, and who is next. Jobs without limits are in none.
        _partial(prefix, "slots", "status", "task", "concurrency_key", where=SLOTS),
        _partial(
            prefix,
            "waiting",
            "task",
            "waits_for",
            sa.desc("priority"),
            "run_at",
            "id",
            where="waits_for IS NOT NULL",
        ),
        _partial(
            prefix,
            "order",
            "queue",
            "ordering_key",
            sa.desc("status"),
            "id",
            where=IN_ORDER,
        ),
        _partial(prefix, "expiry", "expires_at", where="expires_at IS NOT NULL AND status = 'pending'"),
        _partial(prefix, "cancelling", "claimed_by", where="cancel_requested_at IS NOT NULL AND status = 'running'"),
        _partial(prefix, "prune", "prune_at", where="prune_at IS NOT NULL"),
        comment="pgqueue: one row per job",
        sqlite_autoincrement=True,  # an id is never given to a second job
    )


#: A queue and a task have one.
_ARE_NAMES = "length(queue) BETWEEN 1 AND 128 AND length(task) BETWEEN 1 AND 128"


def _value_checks_on_sqlite() -> list[sa.CheckConstraint]:
    """What domains see to on PostgreSQL, and that numbers are numbers: SQLite takes any value in any column."""
    keys = "".join(
        f" AND length({key}) BETWEEN 1 AND {KEY_CHARACTERS_MAX}"
        for key in ("unique_key", "ordering_key", "concurrency_key")
    )
    moments = ("run_at", "claim_expires_at", "expires_at", "created_at", "claimed_at", "finished_at")
    return [
        sa.CheckConstraint("attempt >= 0 AND retries >= 0 AND max_retries >= 0", name="counters"),
        sa.CheckConstraint(_ARE_NAMES + keys, name="names"),
        sa.CheckConstraint(_are_objects("payload", "metadata", flat=True), name="documents"),
        sa.CheckConstraint(_are_readable(*moments, flat=True), name="moments"),
        sa.CheckConstraint(
            "typeof(priority) = 'integer' AND priority BETWEEN -32768 AND 32767 AND typeof(attempt) = 'integer'"
            " AND typeof(retries) = 'integer' AND typeof(max_retries) = 'integer'",
            name="numbers",
        ),
    ]


def _check_on_sqlite(prefix: str, condition: str, *, name: str) -> list[sa.CheckConstraint]:
    return [sa.CheckConstraint(condition, name=name)] if prefix else []


def _partial(prefix: str, name: str, *columns: Any, where: str, unique: bool = False) -> sa.Index:
    condition = sa.text(where)
    return sa.Index(f"{prefix}jobs_{name}", *columns, unique=unique, postgresql_where=condition, sqlite_where=condition)


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


#: The predicate of the index that claims go by.
CLAIMABLE = "status = 'pending' AND waits_for IS NULL"

#: Jobs that count: they hold a slot.
HOLDS_SLOT = "status = 'running' AND slot IS NOT NULL"

#: Jobs that others wait for, and that hold or lead no more.
ENDED = (
    "status IN ('completed', 'dead', 'cancelled') AND (slot IN ('awaited', 'offered') OR leads_order)"
    " OR status = 'pending' AND slot = 'awaited'"
)

#: The predicate of the index of both.
SLOTS = f"{HOLDS_SLOT} OR {ENDED}"

#: The predicate of the index of ordering keys.
IN_ORDER = "ordering_key IS NOT NULL AND status IN ('pending', 'running')"

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
        sa.Column("worker", sa.Text, comment="which made the attempt that this ended"),
        sa.Column("claimed_at", UTCDateTime, comment="when that attempt began"),
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
        comment="pgqueue: workers for people to look at; no promise depends on this table",
    )


def _limits(metadata: sa.MetaData, prefix: str) -> sa.Table:
    return sa.Table(
        f"{prefix}limits",
        metadata,
        sa.Column("scope", sa.Text, primary_key=True, comment="queue or task"),
        sa.Column("name", sa.Text, primary_key=True, comment="of the queue or task"),
        sa.Column("concurrency", sa.Integer, comment="jobs running at once, of all workers together"),
        sa.Column("key_concurrency", sa.Integer, comment="the same, of each concurrency_key"),
        sa.Column("rate", sa.Double, comment="jobs started per second in the long run, for each rate_key"),
        sa.Column("burst", sa.Integer, comment="jobs that may start at once after a quiet time"),
        sa.Column("max_depth", sa.Integer, comment="pending jobs beyond which an enqueue is refused"),
        sa.Column("on_full", sa.Text, comment="what an enqueue does then: error, block or drop"),
        sa.Column("promote_after", sa.Double, comment="seconds after which a due job goes before all others"),
        sa.Column("keep_dead", sa.Double, comment="seconds that dead jobs of the task are kept, as its code says"),
        sa.Column(
            "ordered",
            sa.Boolean,
            server_default=sa.false(),
            nullable=False,
            comment="whether jobs with an ordering_key were enqueued to the queue",
        ),
        sa.Column(
            "releasing",
            sa.Boolean,
            server_default=sa.false(),
            nullable=False,
            comment="limits were lifted, and jobs that waited for them are being let go",
        ),
        sa.Column(
            "declared_by", sa.Text, nullable=False, server_default="code", comment="code, or who changed it since"
        ),
        sa.Column("updated_at", UTCDateTime, nullable=False, server_default=now(), comment="when it last changed"),
        sa.CheckConstraint("scope IN ('queue', 'task')", name="scope"),
        sa.CheckConstraint(
            "concurrency >= 1 AND key_concurrency >= 1 AND rate > 0 AND burst >= 1 AND max_depth >= 1"
            " AND promote_after > 0 AND keep_dead >= 0 AND on_full IN ('error', 'block', 'drop')"
            " AND (rate IS NULL) = (burst IS NULL) AND rate >= burst / 3162240000.0",
            name="values",
        ),
        comment="pgqueue: limits of queues and tasks; claims that need one take their row's lock",
    )


def _rate_buckets(metadata: sa.MetaData, prefix: str) -> sa.Table:
    ripe = sa.text("ripe_at IS NOT NULL")
    return sa.Table(
        f"{prefix}rate_buckets",
        metadata,
        sa.Column("scope", sa.Text, primary_key=True, comment="as in limits"),
        sa.Column("name", sa.Text, primary_key=True, comment="as in limits"),
        sa.Column("key", sa.Text, primary_key=True, server_default="", comment="rate_key of the jobs; empty: none"),
        sa.Column("tokens", sa.Double, nullable=False, comment="left at filled_at"),
        sa.Column("filled_at", UTCDateTime, nullable=False, comment="when tokens was right"),
        sa.Column("ripe_at", UTCDateTime, comment="when the next token comes; NULL: nothing waits for one"),
        sa.Index(f"{prefix}rate_buckets_ripe", "scope", "name", "ripe_at", postgresql_where=ripe, sqlite_where=ripe),
        comment="pgqueue: token buckets of rate limits",
    )


def _schedules(metadata: sa.MetaData, prefix: str) -> sa.Table:
    enabled = sa.text("enabled")
    return sa.Table(
        f"{prefix}schedules",
        metadata,
        sa.Column("name", sa.Text, primary_key=True, comment="of the schedule"),
        sa.Column("task", sa.Text, nullable=False, comment="of the jobs it makes"),
        sa.Column("payload", JSONDocument, nullable=False, server_default=sa.text("'{}'"), comment="likewise"),
        sa.Column("queue", sa.Text, nullable=False, server_default="default", comment="likewise"),
        sa.Column("priority", sa.SmallInteger, nullable=False, server_default=sa.text("0"), comment="likewise"),
        sa.Column("max_retries", sa.SmallInteger, nullable=False, server_default=sa.text("3"), comment="likewise"),
        sa.Column("cron", sa.Text, nullable=False, comment="when: minute, hour, day, month, weekday"),
        sa.Column("timezone", sa.Text, nullable=False, server_default="UTC", comment="where those hours are"),
        sa.Column(
            "catchup",
            sa.Text,
            nullable=False,
            server_default="latest",
            comment="which ticks that were missed are made up for: none, latest or all",
        ),
        sa.Column(
            "overlap",
            sa.Boolean,
            nullable=False,
            server_default=sa.true(),
            comment="false: no job while the one before is pending or running",
        ),
        sa.Column("enabled", sa.Boolean, nullable=False, server_default=sa.true(), comment="false: makes no jobs"),
        sa.Column(
            "declared_by", sa.Text, nullable=False, server_default="sql", comment="code, or who made or changed it"
        ),
        sa.Column(
            "declared_at", UTCDateTime, comment="when a worker last found it in its code; NULL: it comes from no code"
        ),
        sa.Column("next_tick_at", UTCDateTime, nullable=False, server_default=now(), comment="no tick before is open"),
        sa.Column("created_at", UTCDateTime, nullable=False, server_default=now(), comment="when it was made"),
        sa.Column("updated_at", UTCDateTime, nullable=False, server_default=now(), comment="when it last changed"),
        sa.CheckConstraint("catchup IN ('none', 'latest', 'all')", name="catchup"),
        sa.CheckConstraint(
            "length(name) BETWEEN 1 AND 128 AND length(task) BETWEEN 1 AND 128 AND length(queue) BETWEEN 1 AND 128"
            " AND max_retries >= 0",
            name="values",
        ),
        sa.CheckConstraint(_are_objects("payload", flat=bool(prefix)), name="payload"),
        sa.CheckConstraint(
            _are_readable("declared_at", "next_tick_at", "created_at", "updated_at", flat=bool(prefix)), name="moments"
        ),
        sa.Index(f"{prefix}schedules_next", "next_tick_at", postgresql_where=enabled, sqlite_where=enabled),
        comment="pgqueue: what is enqueued by the clock",
    )


def _schedule_ticks(metadata: sa.MetaData, prefix: str) -> sa.Table:
    return sa.Table(
        f"{prefix}schedule_ticks",
        metadata,
        sa.Column("schedule", sa.Text, primary_key=True, comment="name of the schedule"),
        sa.Column("tick_at", UTCDateTime, primary_key=True, comment="the moment its rule names"),
        sa.Column("job_id", sa.BigInteger, comment="the job that was enqueued for it; NULL: none was to be"),
        sa.Column("created_at", UTCDateTime, nullable=False, server_default=now(), comment="when that was done"),
        sa.Index(f"{prefix}schedule_ticks_created", "created_at"),
        comment="pgqueue: ticks of schedules that were settled, each at most once",
    )


def _unique_periods(metadata: sa.MetaData, prefix: str) -> sa.Table:
    return sa.Table(
        f"{prefix}unique_periods",
        metadata,
        sa.Column("task", sa.Text, primary_key=True, comment="of the job"),
        sa.Column("unique_key", sa.Text, primary_key=True, comment="of the job"),
        sa.Column("until", UTCDateTime, nullable=False, comment="no second job with this key before"),
        sa.Column("job_id", sa.BigInteger, comment="the job that was enqueued"),
        sa.CheckConstraint(_are_readable("until", flat=bool(prefix)), name="until"),
        sa.Index(f"{prefix}unique_periods_until", "until"),
        comment="pgqueue: unique keys that outlast their job",
    )
