"""The sweep: takes back what dead workers held, and deletes what is not to be kept any longer.

Jobs that were taken back or deleted, and all that have ended, leave entries behind in the indexes that the sweep goes
by, which PostgreSQL cannot remove as long as anybody holds a snapshot from before. So where a look from the beginning
takes long, most looks begin where the one before was done (`Seen`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta

import sqlalchemy as sa

from pgqueue import expiry, retention, store, uniqueness
from pgqueue.assignment import Assignment
from pgqueue.budget import Budget
from pgqueue.engine import committing_each, straight
from pgqueue.events import EventName, events_of_expired, events_of_swept
from pgqueue.heartbeat import Heartbeat
from pgqueue.holds import Holds
from pgqueue.job import SweepResult
from pgqueue.loop import DatabaseLoop

logger = logging.getLogger(__name__)

#: The most expired claims taken back in one statement.
SWEEP_JOBS_MAX = 500

#: The row of a worker that gave no sign of life for so long is dropped.
SILENT_WORKER_SECONDS = 3600.0

#: That is looked for so often.
FORGET_SECONDS = 300.0

#: Periods of uniqueness that are over, deleted by one step of the sweep at most.
PERIODS_MAX = 5_000

#: Looks from the beginning take this share of the time at most, judged by the quickest of so many,
LOOK_SHARE = 0.05
LOOKS_JUDGED = 3

#: and come after so many seconds at the latest.
LOOK_SECONDS_MAX = 60.0

#: The others begin so long before the end of the last one: for what was being committed then.
MARGIN = timedelta(seconds=5)


class Seen:
    """Up to which moments all is seen to, as far as a worker's looks can know.

    What comes to be overdue at an earlier moment afterwards is found by the next look from the beginning: a job that
    expired while an attempt ran which then failed, what a transaction of more than MARGIN commits, a change by plain
    SQL.
    """

    def __init__(self) -> None:
        self._looks = Budget(LOOK_SHARE, LOOKS_JUDGED, LOOK_SECONDS_MAX)  # from the beginning
        self._moments = store.SINCE_EVER

    def since(self) -> store.Overdue:
        """Where to begin the next look."""
        return store.SINCE_EVER if self._looks.allows() else self._moments

    def looked(self, since: store.Overdue, began: float, found: store.Overdue, until: datetime) -> None:
        """A look that began at those moments, and itself then (monotonic), found this, up to that moment."""
        if since is store.SINCE_EVER:
            self._looks.spent(began, time.monotonic())
        seen = until - MARGIN
        self._moments = store.Overdue(*(seen if moment is None else min(moment, seen) for moment in found))


class Sweeper(DatabaseLoop):
    """The thread that sweeps."""

    def __init__(
        self, assignment: Assignment, holds: Holds, heartbeat: Heartbeat, took_back: Callable[[], None]
    ) -> None:
        """took_back: told when jobs are pending again."""
        super().__init__("sweep", assignment.engine, self._sweep, assignment.outage, assignment.config.lease)
        self._config = assignment.config
        self._tables = assignment.tables
        self._worker_id = assignment.worker_id
        self._listeners = assignment.listeners
        self._stored = assignment.pgq._stored
        self._holds = holds
        self._heartbeat = heartbeat
        self._took_back = took_back
        self._forget_at = time.monotonic()
        self._seen = Seen()

    def _sweep(self, connection: sa.Connection) -> float:
        """Take back the jobs of dead workers, and delete jobs that are not to be kept any longer."""
        sure_until = self._heartbeat.last_beat + self._config.lease
        if time.monotonic() > sure_until:
            # This process was frozen or cut off. Let the heartbeat come first, or it takes back its own jobs.
            return self._config.heartbeat_seconds
        if time.monotonic() >= self._forget_at:
            with committing_each(connection):
                store.forget_silent_workers(connection, self._tables, seconds=SILENT_WORKER_SECONDS)
                if uniqueness.forget_periods(connection, self._tables, limit=PERIODS_MAX) < PERIODS_MAX:
                    self._forget_at = time.monotonic() + FORGET_SECONDS
        overdue = self._look(connection)
        swept = gone = pruned = 0
        if overdue.lapsed:
            with connection.begin() as transaction:
                found = store.sweep(
                    connection, self._tables, limit=SWEEP_JOBS_MAX, actor=self._worker_id, since=overdue.lapsed
                )
                if time.monotonic() > sure_until:  # it was frozen on the way to the database
                    transaction.rollback()
                    return self._config.heartbeat_seconds
                jobs = self._stored(
                    connection,
                    [*found.returned, *found.dead, *found.cancelled],
                    EventName.FAILED,
                    EventName.RETRIED,
                    EventName.DEAD,
                    EventName.CANCELLED,
                )
            self._listeners.tell(told for job in jobs for told in events_of_swept(job))
            swept = found.count
            self._report_swept(found)
        if overdue.expired:
            gone = self.expire(connection, overdue.expired)
        if overdue.prunable:
            with connection.begin():
                pruned = retention.prune_due(connection, self._tables, since=overdue.prunable)
        found_all = swept == SWEEP_JOBS_MAX or gone == expiry.EXPIRE_JOBS_MAX or pruned == retention.PRUNE_JOBS_MAX
        return 0.0 if found_all else self._config.sweep_interval

    def _look(self, connection: sa.Connection) -> store.Overdue:
        """Nearly always there is nothing to do, and to see that takes one statement instead of eight."""
        since = self._seen.since()
        began = time.monotonic()
        with straight(connection):
            overdue, until = store.upkeep(connection, self._tables, since)
        self._seen.looked(since, began, overdue, until)
        return overdue

    def expire(self, connection: sa.Connection, since: datetime = store.EARLIEST) -> int:
        """Let jobs that expired before anybody started them, and not before that moment, be dead; how many."""
        with connection.begin():
            expired = expiry.expire(connection, self._tables, actor=self._worker_id, since=since)
            jobs = self._stored(connection, expired, EventName.EXPIRED, EventName.DEAD)
        self._listeners.tell(told for job in jobs for told in events_of_expired(job))
        if expired:
            with self._holds.lock:
                self._holds.report.dead += len(expired)
            logger.warning("%d jobs expired before they were started; they are dead", len(expired))
        return len(expired)

    def _report_swept(self, swept: SweepResult) -> None:
        if not swept.count:
            return
        with self._holds.lock:
            self._holds.report.swept += swept.count
            self._holds.report.dead += len(swept.dead)
            self._holds.report.cancelled += len(swept.cancelled)
        logger.warning(
            "took back %d jobs whose lease had run out: %d pending again, %d dead, %d cancelled",
            swept.count,
            len(swept.returned),
            len(swept.dead),
            len(swept.cancelled),
        )
        self._took_back()
