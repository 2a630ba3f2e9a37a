"""The heartbeat: extends the leases of all jobs held, and finds out which of them are to be stopped."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from pgqueue import store
from pgqueue.assignment import Assignment
from pgqueue.engine import looking, straight
from pgqueue.holds import Hold, Holds
from pgqueue.job import ASKED_TO_STOP, Cancelled, ClaimedJob
from pgqueue.loop import DatabaseLoop
from pgqueue.running import Runner
from pgqueue.version import VERSION

logger = logging.getLogger(__name__)

#: How often a worker that holds jobs, and that no notification would tell, looks whether one of them is to be stopped.
LOOK_SECONDS = 1.0

#: The most jobs whose leases are extended in one transaction, which keeps their ends from being written meanwhile.
EXTEND_JOBS_MAX = 1_000

STOPPED_ON_REQUEST = Cancelled(ASKED_TO_STOP)


class Heartbeat(DatabaseLoop):
    """A thread and a connection of its own, so that neither a blocked task nor a blocked event loop stops it."""

    def __init__(
        self,
        assignment: Assignment,
        holds: Holds,
        runner: Runner,
        *,
        listening: Callable[[], bool],
        lost: Callable[[ClaimedJob], None],
    ) -> None:
        """listening: whether `told_to_stop` would be told.
        lost: told of a job that is no longer this worker's.
        """
        super().__init__(
            "heartbeat",
            assignment.engine,
            self._beat_or_look,
            assignment.outage,
            assignment.config.lease,
            keeps_plans=True,
        )
        self.last_beat = time.monotonic()
        self._next_beat = 0.0
        self._config = assignment.config
        self._tables = assignment.tables
        self._task_names = assignment.task_names
        self._worker_id = assignment.worker_id
        self._holds = holds
        self._runner = runner
        self._listening = listening
        self._lost = lost

    def start(self) -> None:
        self.last_beat = time.monotonic()
        super().start()

    def told_to_stop(self, job_id: str) -> None:
        """Only a hint: the heartbeat finds out whether the job is to be stopped, or is this worker's no more.

        Where the hint is lost, the next beat finds out.
        """
        if job_id.isdecimal() and int(job_id) in self._holds.by_id:
            self._next_beat = 0.0
            self.wake()

    def _beat_or_look(self, connection: sa.Connection) -> float:
        """Beat when it is time; in between, look for jobs that are to be stopped, unless notifications tell of them."""
        looks = not self._listening()
        if time.monotonic() >= self._next_beat:
            self._beat(connection)
        elif looks and self._holds.by_id:
            with looking(connection):
                asked = store.asked_to_stop(connection, self._tables, worker=self._worker_id)
            for job_id, token in asked:
                hold = self._holds.by_id.get(job_id)
                if hold is not None and hold.job.claim_token == token:
                    self._ask_to_stop(hold)
        wait = max(self._next_beat - time.monotonic(), 0.0)
        return min(wait, LOOK_SECONDS) if looks else wait

    def _beat(self, connection: sa.Connection) -> None:
        """Extend the leases of all jobs held, and let go of those that were lost."""
        began = time.monotonic()
        # Set before it is done: the next one may be wanted at once meanwhile.
        self._next_beat = began + self._config.heartbeat_seconds
        try:
            holds = list(self._holds.by_id.values())
            for first in range(0, len(holds), EXTEND_JOBS_MAX):
                self._extend(connection, holds[first : first + EXTEND_JOBS_MAX])
            with straight(connection):
                store.beat(connection, self._tables, self._row())
        except BaseException:
            self._next_beat = 0.0
            raise
        self.last_beat = began

    def _extend(self, connection: sa.Connection, holds: Sequence[Hold]) -> None:
        asked_at = time.monotonic()
        claims = [(hold.job.id, hold.job.claim_token) for hold in holds]
        with connection.begin():
            kept = store.extend(connection, self._tables, claims, lease=self._config.lease)
        for hold in holds:
            if hold.job.id in kept:
                hold.sure_until = asked_at + self._config.lease
                if kept[hold.job.id]:
                    self._ask_to_stop(hold)
            elif self._holds.drop(hold):
                self._lost(hold.job)

    def _ask_to_stop(self, hold: Hold) -> None:
        """Stop an attempt as far as its kind allows: from now on only a completion keeps its job from being cancelled.

        A job that is not started yet is not started any more; a `def` task in a thread can only look.
        """
        job = hold.job
        if job.cancel_requested:
            return
        job.cancel_requested = True
        if hold.ending:
            return
        logger.info("job %d (task %s) is asked to stop in its attempt %d", job.id, job.task, job.attempt)
        self._runner.stop(job, STOPPED_ON_REQUEST)

    def _row(self) -> dict[str, Any]:
        return {
            "id": self._worker_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": VERSION,
            "queues": dict(self._config.queues),
            "tasks": self._task_names,
        }
