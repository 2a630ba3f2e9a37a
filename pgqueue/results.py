"""How far jobs have come and how they ended, for those who wait for it.

As in `store`: a function takes the connection first, works in the transaction it finds there, and never commits.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from pgqueue import dialect
from pgqueue.dialect import id_among, id_in, stamped
from pgqueue.errors import ErrorInfo
from pgqueue.job import JobStatus
from pgqueue.reporting import Report
from pgqueue.schema import Tables
from pgqueue.store import COMPLETED, DEAD, IDS


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands and, once it is final, how it ended."""

    status: JobStatus
    result_json: str | None = None  #: of a completed job; None: its task returned None
    error: ErrorInfo | None = None  #: of a dead job

    @property
    def result(self) -> Any:
        """The decoded result; ValueError when somebody stored what Python's JSON cannot read."""
        return None if self.result_json is None else json.loads(self.result_json)


def look(connection: sa.Connection, tables: Tables, ids: Collection[int]) -> dict[int, Standing]:
    """Where these jobs stand, by id; those that do not exist are missing."""
    found = connection.execute(_look(tables), {"ids": list(ids)})
    return {job_id: Standing(JobStatus(status), result, _error(error)) for job_id, status, result, error in found}


@cache
def _look(tables: Tables) -> sa.Select[Any]:
    jobs = tables.jobs
    return sa.select(
        jobs.c.id,
        jobs.c.status,
        sa.case((jobs.c.status == COMPLETED, sa.cast(jobs.c.result, sa.Text))).label("result"),
        sa.case((jobs.c.status == DEAD, sa.cast(jobs.c.error, sa.Text))).label("error"),
    ).where(id_among(jobs.c.id, IDS))


def _error(document: str | None) -> ErrorInfo | None:
    if document is None:
        return None
    try:
        error = json.loads(document)
        return ErrorInfo(str(error["type"]), str(error["message"]), str(error.get("traceback") or ""))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return ErrorInfo("", document)  # stored by somebody else


def write_progress(
    connection: sa.Connection, tables: Tables, reports: Sequence[Report], *, skip_locked: bool = False
) -> set[int]:
    """Store how far jobs have come, as long as their claims hold; the ids of those that were written.

    skip_locked: leave out jobs that somebody else has locked, instead of waiting for them.
    """
    rows = [{"id": report.job_id, "token": report.claim_token.hex, "progress": report.document} for report in reports]
    statement = _write_progress(tables, skip_locked)
    return set(connection.execute(statement, {"reports": json.dumps(rows)}).scalars())


@cache
def _write_progress(tables: Tables, skip_locked: bool) -> Any:
    jobs = tables.jobs

    def rows() -> sa.FromClause:
        columns = (sa.column("id", sa.BigInteger), sa.column("token", sa.Uuid), sa.column("progress", sa.Text))
        return dialect.rows(tables.dialect_name, "reports", *columns)

    reports = rows()
    fence = [jobs.c.id == reports.c.id, jobs.c.claim_token == reports.c.token]
    if skip_locked:
        other = rows()
        free = (
            sa.select(jobs.c.id)
            .join(other, sa.and_(jobs.c.id == other.c.id, jobs.c.claim_token == other.c.token))
            .with_for_update(of=jobs, skip_locked=True)
        )
        fence.append(id_in(jobs.c.id, free.correlate(None).scalar_subquery()))
    return sa.update(jobs).where(*fence).values(progress=stamped(reports.c.progress)).returning(jobs.c.id)
