"""Writing what running tasks report of their progress, at most once a second, and before their jobs end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from pgqueue import reporting, results
from pgqueue.assignment import Assignment
from pgqueue.engine import committing_each
from pgqueue.job import ClaimedJob, Transition
from pgqueue.loop import DatabaseLoop

logger = logging.getLogger(__name__)

#: Between two writes of progress.
PROGRESS_SECONDS = 1.0

#: How long the end of a job waits for a write of progress that is under way.
PROGRESS_WAIT_SECONDS = 1.0

#: For ever.
IDLE_SECONDS = 3_600.0


class Progress:
    """What the jobs of one worker report. Its thread starts with the first report."""

    def __init__(self, assignment: Assignment) -> None:
        self.reports = reporting.Reports(self._wake_writer)
        self._worker_id = assignment.worker_id
        self._engine = assignment.engine
        self._tables = assignment.tables
        self._outage = assignment.outage
        self._frozen_after = assignment.config.lease
        self._listeners = assignment.listeners
        self._lock = threading.Lock()
        self._writer: DatabaseLoop | None = None
        self._writing = threading.Lock()
        self._is_closed = False

    def open(self) -> None:
        """Take reports from now on."""
        reporting.reporters[self._worker_id] = self.put

    def close(self) -> DatabaseLoop | None:
        """Take no more of them; the thread that is to be stopped, if there is one."""
        reporting.reporters.pop(self._worker_id, None)
        with self._lock:
            self._is_closed = True
            return self._writer

    def put(self, job: ClaimedJob, document: dict[str, Any]) -> None:
        self.reports.put(job, document)
        if self._listeners.wanted:
            self._listeners.tell_progress(job, document)

    def _wake_writer(self) -> None:
        with self._lock:
            if self._writer is None and not self._is_closed:
                self._writer = DatabaseLoop(
                    "progress", self._engine, self._write_waiting, self._outage, self._frozen_after
                )
                self._writer.start()
            loop = self._writer
        if loop is not None:
            loop.wake()

    def _write_waiting(self, connection: sa.Connection) -> float:
        """Write what was reported since the last time, in one statement. A report that cannot be written is lost."""
        reports = self.reports.waiting()
        if not reports:
            return IDLE_SECONDS
        written: set[int] = set()
        try:
            with self._writing, committing_each(connection):
                written = results.write_progress(connection, self._tables, reports, skip_locked=True)
        finally:
            self.reports.tried(reports, written)
        return PROGRESS_SECONDS

    def write_last(self, connection: sa.Connection, transitions: Sequence[Transition]) -> None:
        """Write what jobs reported last, before their end is written. Whatever happens here does not concern that."""
        reports = self.reports.of((transition.job_id, transition.claim_token) for transition in transitions)
        if not reports:
            return
        # An older report that is on its way must not come after this one; but nothing waits for it for long.
        turn = self._writing.acquire(timeout=PROGRESS_WAIT_SECONDS)
        try:
            with connection.begin_nested() if connection.in_transaction() else connection.begin():
                self.reports.tried(reports, results.write_progress(connection, self._tables, reports))
        except Exception as error:  # noqa: BLE001 — the end of the job is what counts
            logger.info("the last progress of %d jobs could not be written: %s", len(reports), type(error).__name__)
        finally:
            if turn:
                self._writing.release()
