"""The tables refuse, by the name of a constraint, what no client could handle, whoever writes it.

Rows are written by plain SQL here, as by a trigger, another language, or a person with a console.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import (
    add_one,
    claim,
    claim_one,
    completed,
    died,
    everything,
    expire,
    finish,
    is_postgresql,
    make_due,
    retried,
    sweep,
)
from support import execute

from pgqueue import JobStatus, PgQueue
from pgqueue.job import EventType, Transition

Row = Mapping[str, str]  # a column's name and its value as an SQL expression

MOMENT = "'2020-01-02 03:04:05'"
TOKEN = "'0123456789abcdef0123456789abcdef'"

JOB = {"task": "'work'"}
CLAIM = {
    "status": "'running'",
    "claimed_by": "'worker-1'",
    "claimed_at": MOMENT,
    "claim_token": TOKEN,
    "claim_expires_at": MOMENT,
}
RUNNING = JOB | CLAIM
COMPLETED = {**JOB, "status": "'completed'", "finished_at": MOMENT}
QUEUE = {"name": "'mail'"}
EVENT = {"queue": "'mail'", "event": "'pause'", "actor": "'ann'"}
WORKER = {"id": "'w'", "host": "'h'", "pid": "1", "version": "'1'", "queues": "'{}'", "tasks": "'[]'"}

VALID = {"jobs": JOB, "queues": QUEUE, "job_events": EVENT, "workers": WORKER}


def name_of(pgq: PgQueue, table: str) -> str:
    return f"pgqueue.{table}" if is_postgresql(pgq) else f"pgqueue_{table}"


def insert(pgq: PgQueue, table: str, row: Row) -> None:
    columns, values = ", ".join(row), ", ".join(row.values())
    execute(pgq.engine, f"INSERT INTO {name_of(pgq, table)} ({columns}) VALUES ({values})".replace(":", r"\:"))


def refusal(pgq: PgQueue, table: str, row: Row) -> str:
    """The name of the constraint that refuses this row, without the schema's prefix; "" when it is taken."""
    try:
        insert(pgq, table, row)
    except sa.exc.IntegrityError as error:
        return constraint_in(error)
    return ""


def constraint_in(error: sa.exc.IntegrityError) -> str:
    diag = getattr(error.orig, "diag", None)
    if diag is not None:
        return str(diag.constraint_name or f"{diag.table_name}.{diag.column_name}")
    found = re.search(r"constraint failed: (.*)", str(error.orig))
    assert found, error.orig
    return found[1].replace("pgqueue_", "")


# Rows that are wrong on both databases ---------------------------------------------------------------------

KEYS = ("unique_key", "ordering_key", "concurrency_key")
JOB_MOMENTS = ("run_at", "expires_at", "created_at", "claimed_at", "finished_at", "claim_expires_at")
OUTSIDE = ("'1969-12-31 23:59:59'", "'9000-01-02 00:00:00'", "'9999-12-31 23:59:59'")

WRONG_JOBS: list[tuple[str, Row]] = [
    *[("ck_jobs_status", {"status": value}) for value in ("'scheduled'", "'Pending'", "''", "'pending '")],
    ("ck_jobs_claim", CLAIM | {"status": "'pending'"}),
    *[("ck_jobs_claim", CLAIM | {column: "NULL"}) for column in CLAIM if column != "status"],
    ("ck_jobs_claim", {"status": "'running'"}),
    ("ck_jobs_claim", {"claim_token": TOKEN}),
    ("ck_jobs_claim", {"claim_expires_at": MOMENT}),
    *[
        ("ck_jobs_claim", {"status": f"'{status}'", "finished_at": MOMENT, "claim_token": TOKEN})
        for status in ("completed", "dead", "cancelled")
    ],
    *[("ck_jobs_finished", {"status": f"'{status}'"}) for status in ("completed", "dead", "cancelled")],
    ("ck_jobs_finished", {"finished_at": MOMENT}),
    ("ck_jobs_finished", CLAIM | {"finished_at": MOMENT}),
    *[("ck_jobs_counters", {column: "-1"}) for column in ("attempt", "retries", "max_retries")],
    *[("ck_jobs_names", {column: "''"}) for column in ("queue", "task", *KEYS)],
    *[("ck_jobs_names", {column: f"'{'x' * 129}'"}) for column in ("queue", "task")],
    *[("ck_jobs_names", {column: f"'{'x' * 513}'"}) for column in KEYS],
    *[
        ("ck_jobs_documents", {column: value})
        for column in ("payload", "metadata")
        for value in ("'[]'", "'null'", "'1'", "'\"{}\"'", "'true'")
    ],
    *[
        ("ck_jobs_moments", (CLAIM if column == "claim_expires_at" else COMPLETED) | {column: value})
        for column in JOB_MOMENTS
        for value in OUTSIDE
    ],
    *[("ck_jobs_rate_key", {"rate_key": value}) for value in ("''", f"'{'x' * 513}'")],
    ("ck_jobs_slot", {"slot": "'taken'"}),
    ("ck_jobs_waits_for", RUNNING | {"waits_for": "'order'"}),
    ("ck_jobs_waits_for", COMPLETED | {"waits_for": "'task'"}),
    *[(f"ck_jobs_{column}", {column: value}) for column in ("cancel_requested_at", "prune_at") for value in OUTSIDE],
]

#: What is a CHECK of its own on SQLite, because it came with a later revision, is one of the rules of a domain here.
RULES_OF_DOMAINS = {
    "ck_jobs_rate_key": "ck_jobs_names",
    "ck_jobs_cancel_requested_at": "ck_jobs_moments",
    "ck_jobs_prune_at": "ck_jobs_moments",
}

WRONG_QUEUES: list[tuple[str, Row]] = [
    ("ck_queues_pause", {"paused_until": MOMENT}),
    *[("ck_queues_moments", {"paused_at": value}) for value in OUTSIDE],
    *[("ck_queues_moments", {"paused_at": MOMENT, "paused_until": value}) for value in OUTSIDE],
]

#: PostgreSQL alone has infinite moments; a type of its own refuses what is no moment, document or number there.
WRONG_ON_POSTGRESQL: list[tuple[str, str, Row]] = [
    *[
        ("jobs", "ck_jobs_moments", (CLAIM if column == "claim_expires_at" else COMPLETED) | {column: value})
        for column in JOB_MOMENTS
        for value in ("'infinity'", "'-infinity'", "'0044-03-15 12:00 BC'", "'20000-01-01'")
    ],
    *[
        ("queues", "ck_queues_moments", {"paused_at": value, "paused_until": other})
        for value, other in (("'infinity'", "NULL"), (MOMENT, "'infinity'"), ("'-infinity'", "NULL"))
    ],
]

#: SQLite takes any value in any column.
WRONG_ON_SQLITE: list[tuple[str, str, Row]] = [
    *[
        ("jobs", "ck_jobs_numbers", {column: value})
        for column in ("priority", "attempt", "retries", "max_retries")
        for value in ("'many'", "1.5", "x'00'")
    ],
    *[("jobs", "ck_jobs_numbers", {"priority": value}) for value in ("32768", "-32769")],
    *[
        ("jobs", "ck_jobs_moments", {"run_at": value})
        for value in (
            "'soon'",
            "''",
            "5",
            "2459581.5",
            "'2020-01-02T03:04:05'",
            "'2020-01-02 03:04:05Z'",
            "'2020-01-02 03:04'",
            "'2020-01-02'",
            "'2020-13-02 03:04:05'",
            "'2020-02-31 03:04:05'",
        )
    ],
    *[("jobs", "ck_jobs_documents", {"payload": value}) for value in ("'{a: 1}'", "'{'", "''", "'{} {}'")],
    *[("queues", "ck_queues_moments", {"paused_at": value}) for value in ("'soon'", "5", "'2020-01-02'")],
]


def shown(row: object) -> str:
    return ",".join(f"{key}={value}" for key, value in row.items())[:80] if isinstance(row, dict) else str(row)


@pytest.mark.parametrize(("constraint", "wrong"), WRONG_JOBS, ids=shown)
def test_a_wrong_job_is_refused_by_name(pgq: PgQueue, constraint: str, wrong: Row) -> None:
    if pgq.engine.dialect.name == "postgresql":
        constraint = RULES_OF_DOMAINS.get(constraint, constraint)

    assert refusal(pgq, "jobs", JOB | wrong) == constraint
    assert everything(pgq)[pgq.tables.jobs.name] == []


@pytest.mark.parametrize(("constraint", "wrong"), WRONG_QUEUES, ids=shown)
def test_a_wrong_queue_is_refused_by_name(pgq: PgQueue, constraint: str, wrong: Row) -> None:
    assert refusal(pgq, "queues", QUEUE | wrong) == constraint


def test_moments_that_only_postgresql_has_are_refused(pg: PgQueue) -> None:
    taken = [
        (table, wrong)
        for table, constraint, wrong in WRONG_ON_POSTGRESQL
        if refusal(pg, table, VALID[table] | wrong) != constraint
    ]

    assert taken == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"priority": "32768"},
        {"priority": "'many'"},
        {"max_retries": "32768"},
        {"attempt": "2147483648"},
        {"run_at": "'soon'"},
        {"payload": "'{'"},
        {"payload": '\'{"a": "\\u0000"}\''},
        {"claim_token": "'7'"},
    ],
    ids=shown,
)
def test_the_types_of_postgresql_refuse_what_is_no_number_moment_or_document(pg: PgQueue, wrong: Row) -> None:
    with pytest.raises(sa.exc.DataError):
        insert(pg, "jobs", JOB | wrong)


def test_constraints_stand_in_for_the_types_that_sqlite_lacks(sqlite_url: str) -> None:
    pgq = PgQueue(sqlite_url)

    taken = [
        (table, wrong, found)
        for table, constraint, wrong in WRONG_ON_SQLITE
        if (found := refusal(pgq, table, VALID[table] | wrong)) != constraint
    ]

    assert taken == []
    with pytest.raises(sa.exc.DBAPIError):
        insert(pgq, "jobs", JOB | {"run_at": "'now'"})  # a moment to every function of SQLite, but no fixed one
    pgq.dispose()


def test_every_check_of_the_schema_is_among_these(pgq: PgQueue) -> None:
    """A new constraint wants a row here that it refuses."""
    inspector = sa.inspect(pgq.engine)
    schema = "pgqueue" if is_postgresql(pgq) else None
    there = {
        str(check["name"]).replace("pgqueue_", "")
        for table in VALID
        for check in inspector.get_check_constraints(name_of(pgq, table).removeprefix("pgqueue."), schema=schema)
    }

    tested = {constraint for constraint, _ in [*WRONG_JOBS, *WRONG_QUEUES]}
    if is_postgresql(pgq):
        there |= {rule["name"] for domain in inspector.get_domains(schema) for rule in domain["constraints"]}  # type: ignore[attr-defined]
        tested -= set(RULES_OF_DOMAINS)
    else:
        tested |= {constraint for _, constraint, _ in WRONG_ON_SQLITE}
    assert there == tested


# NULL, unique ----------------------------------------------------------------------------------------------


COLUMNS_WITHOUT_NULL = [
    (table, column)
    for table, columns in {
        "jobs": "queue task payload priority status run_at attempt retries max_retries metadata created_at leads_order",
        "job_events": "at queue event actor",
        "workers": "host pid version queues tasks started_at heartbeat_at",
    }.items()
    for column in columns.split()
]


@pytest.mark.parametrize(("table", "column"), COLUMNS_WITHOUT_NULL)
def test_a_value_that_must_be_there_is_missed_by_name(pgq: PgQueue, table: str, column: str) -> None:
    assert refusal(pgq, table, VALID[table] | {column: "NULL"}) == f"{table}.{column}"


def test_these_are_all_columns_without_null(pgq: PgQueue) -> None:
    tables = pgq.tables
    listed = {
        (table.name.removeprefix("pgqueue_"), column.name)
        for table in (tables.jobs, tables.job_events, tables.workers, tables.queues)
        for column in table.columns
        if not column.nullable and not column.primary_key
    }

    assert listed == set(COLUMNS_WITHOUT_NULL)


@pytest.mark.parametrize("first", ["pending", "running"])
@pytest.mark.parametrize("second", ["pending", "running"])
def test_two_open_jobs_of_a_task_cannot_have_the_same_unique_key(pgq: PgQueue, first: str, second: str) -> None:
    rows = {"pending": JOB, "running": RUNNING}
    insert(pgq, "jobs", rows[first] | {"unique_key": "'k'"})

    refused = refusal(pgq, "jobs", rows[second] | {"unique_key": "'k'", "queue": "'another'"})

    assert refused == ("jobs_unique_key" if is_postgresql(pgq) else "jobs.task, jobs.unique_key")


def test_any_number_of_final_jobs_and_one_open_job_may_have_a_unique_key(pgq: PgQueue) -> None:
    for status in ("completed", "dead", "cancelled", "dead"):
        insert(pgq, "jobs", COMPLETED | {"status": f"'{status}'", "unique_key": "'k'"})
    insert(pgq, "jobs", JOB | {"unique_key": "'k'"})
    insert(pgq, "jobs", JOB | {"unique_key": "'K'"})
    insert(pgq, "jobs", JOB | {"unique_key": "'k'", "task": "'other'"})

    assert len(pgq.list_jobs()) == 7


@pytest.mark.parametrize(("table", "key"), [("jobs", "id"), ("queues", "name"), ("workers", "id")])
def test_a_primary_key_cannot_be_there_twice(pgq: PgQueue, table: str, key: str) -> None:
    row = VALID[table] | {key: "7"} if table == "jobs" else VALID[table]
    insert(pgq, table, row)

    assert refusal(pgq, table, row) == (f"pk_{table}" if is_postgresql(pgq) else f"{table}.{key}")


def test_every_unique_index_of_the_schema_is_tested_above(pgq: PgQueue) -> None:
    inspector = sa.inspect(pgq.engine)
    schema = "pgqueue" if is_postgresql(pgq) else None
    unique = {
        str(index["name"]).replace("pgqueue_", "")
        for table in VALID
        for index in inspector.get_indexes(name_of(pgq, table).removeprefix("pgqueue."), schema=schema)
        if index["unique"]
    }

    assert unique == {"jobs_unique_key"}


def test_only_the_database_numbers_events(pg: PgQueue) -> None:
    with pytest.raises(sa.exc.ProgrammingError, match="GENERATED ALWAYS"):
        insert(pg, "job_events", EVENT | {"id": "7"})


# Rows that are right ---------------------------------------------------------------------------------------

#: Whether each of these is set, with the status, is the shape of a job.
FIELDS = ("claimed_by", "claim_token", "claim_expires_at", "claimed_at", "finished_at")
SET = {
    "claimed_by": "'worker-1'",
    "claim_token": TOKEN,
    "claim_expires_at": MOMENT,
    "claimed_at": MOMENT,
    "finished_at": MOMENT,
}


def test_the_shapes_that_are_taken_are_exactly_these(pgq: PgQueue) -> None:
    taken = set()
    for status, *fields in itertools.product(JobStatus, *[(True, False)] * len(FIELDS)):
        row = {name: SET[name] for name, there in zip(FIELDS, fields, strict=True) if there}
        if not refusal(pgq, "jobs", JOB | row | {"status": f"'{status}'"}):
            taken.add((status, *row))

    past = [(), ("claimed_by",), ("claimed_at",), ("claimed_by", "claimed_at")]
    assert taken == {
        *[("pending", *fields) for fields in past],
        ("running", "claimed_by", "claim_token", "claim_expires_at", "claimed_at"),
        *[(status, *fields, "finished_at") for status in ("completed", "dead", "cancelled") for fields in past],
    }


def test_every_shape_that_the_code_makes_is_among_them_and_no_other(pgq: PgQueue) -> None:
    seen: set[tuple[str, ...]] = set()

    def look() -> None:
        jobs = pgq.tables.jobs
        with pgq.begin() as connection:
            for row in connection.execute(sa.select(jobs)):
                seen.add((row.status, *[name for name in FIELDS if getattr(row, name) is not None]))

    def snoozed(job: Any) -> Transition:
        return Transition(job.id, job.claim_token, job.attempt, JobStatus.PENDING, EventType.SNOOZE, delay_seconds=1.0)

    for end in (completed, died, retried, snoozed):
        add_one(pgq)
        look()
        job = claim_one(pgq)
        look()
        finish(pgq, end(job))
        look()
        make_due(pgq)
        claim(pgq)
    expire(pgq)
    sweep(pgq)
    look()
    pgq.cancel(add_one(pgq))
    add_one(pgq, max_retries=0)
    claim(pgq, limit=10)
    expire(pgq)
    sweep(pgq)
    look()
    pgq.cancel(claim(pgq, limit=10)[0].id, force=True)
    look()
    for job in pgq.list_jobs():
        if job.status in ("dead", "cancelled"):
            pgq.replay(job.id)
    look()

    assert seen == {
        ("pending",),
        ("pending", "claimed_by", "claimed_at"),
        ("running", "claimed_by", "claim_token", "claim_expires_at", "claimed_at"),
        ("completed", "claimed_by", "claimed_at", "finished_at"),
        ("dead", "claimed_by", "claimed_at", "finished_at"),
        ("cancelled", "finished_at"),
        ("cancelled", "claimed_by", "claimed_at", "finished_at"),
    }


def test_the_largest_and_smallest_values_are_taken_and_can_be_claimed_and_read(pgq: PgQueue) -> None:
    first, last = "'1970-01-01 00:00:00'", "'8999-12-31 23:59:59.999'"
    if is_postgresql(pgq):
        first, last = "'1970-01-01 00:00:00+00'", "'9000-01-01 00:00:00+00'"
    rows: list[Row] = [
        {"priority": "32767", "max_retries": "32767"},
        {"priority": "-32768", "max_retries": "0"},
        {"attempt": "2147483646", "retries": "2147483647"},
        {"task": f"'{'é' * 128}'", **dict.fromkeys(KEYS, f"'{'x' * 512}'")},
        {"run_at": first, "created_at": last, "expires_at": last},
        {"run_at": first, "created_at": first, "expires_at": last, "claimed_at": last},
        {"run_at": last, "expires_at": first},
        {"payload": '\'{"a": [1, {"b": null}]}\'', "metadata": "'{}'", "result": "'1'", "error": "'[]'"},
    ]
    for row in rows:
        insert(pgq, "jobs", JOB | row)
    insert(pgq, "queues", QUEUE | {"paused_at": first, "paused_until": last})

    claimed = pgq.claim("w", limit=len(rows))
    listed = pgq.list_jobs()

    assert len(claimed) == len(rows) - 1  # without the one that has expired
    assert len(listed) == len(rows)
    assert [summary.queue for summary in pgq.queues()] == ["default", "mail"]
    pgq.ack(claimed)


def test_a_queue_name_may_be_as_long_as_a_task_name(pgq: PgQueue) -> None:
    insert(pgq, "jobs", JOB | {"queue": f"'{'q' * 128}'"})

    assert len(pgq.claim("w", queue="q" * 128)) == 1


def test_a_row_by_plain_sql_has_the_defaults_of_an_enqueue(pgq: PgQueue) -> None:
    by_enqueue = add_one(pgq)

    insert(pgq, "jobs", {"task": "'work'", "payload": "'{\"n\": 0}'"})

    plain, enqueued = (pgq.get_job(job_id) for job_id in (pgq.list_jobs(limit=1)[0].id, by_enqueue))
    different = {
        column.name
        for column in pgq.tables.jobs.columns
        if getattr(plain, column.name) != getattr(enqueued, column.name)
    }
    assert different == {"id", "run_at", "created_at"}
    assert plain.run_at == plain.created_at


def test_a_status_cannot_be_changed_without_what_belongs_to_it(pgq: PgQueue) -> None:
    """As by a hasty UPDATE at a console."""
    add_one(pgq)
    claim(pgq)
    add_one(pgq)
    before = everything(pgq)

    for status, other in itertools.product((JobStatus.PENDING, JobStatus.RUNNING), JobStatus):
        if other is not status:
            with pytest.raises(sa.exc.IntegrityError, match=r"ck_.*jobs_(claim|finished)"):
                execute(pgq.engine, f"UPDATE {name_of(pgq, 'jobs')} SET status = '{other}' WHERE status = '{status}'")

    assert everything(pgq) == before
