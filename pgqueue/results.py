"""How jobs ended, for those who wait for it.

As in `store`: a function takes the connection first, works in the transaction it finds there, and never commits.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from pgqueue.dialect import id_among
from pgqueue.errors import ErrorInfo
from pgqueue.job import JobStatus
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
