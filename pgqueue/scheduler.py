"""A worker's duty to enqueue what schedules say, when their time has come.

Every worker does this, with no leader: whoever gets a schedule's row lock first settles its ticks. Only the database's
clock says what is due.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from pgqueue import schedules
from pgqueue.cron import MISSED_SECONDS, TICKS_PER_PASS, Catchup, NewSchedule, Schedule, settle
from pgqueue.engine import first_line, is_locked, is_refusal, straight
from pgqueue.errors import PgqueueError
from pgqueue.scheduled import enqueue
from pgqueue.schema import Tables

logger = logging.getLogger(__name__)

#: Between two looks at the table, so that a schedule that was made or changed is seen.
LOOK_SECONDS = 5.0

#: Schedules whose ticks are settled in one transaction.
SCHEDULES_PER_PASS = 20

#: When all that is due is locked by others, they are about to settle it. Should it take them longer, the wait doubles.
LOCKED_SECONDS_MIN, LOCKED_SECONDS_MAX = 0.1, 2.0

#: A schedule that cannot be settled is left alone for so long.
ASIDE_SECONDS = 30.0

#: Between two deletions of old rows of ticks.
PRUNE_SECONDS = 60.0


@dataclass(slots=True)
class _Settled:
    """What became of the ticks of a schedule that were due."""

    ticks: int = 0
    queues: set[str] = field(default_factory=set)  #: those that got jobs
    problem: Exception | None = None  #: why the next tick is still open


class Scheduler:
    """The step of a DatabaseLoop: settles ticks that are due, and says how long there is nothing to do."""

    def __init__(
        self,
        tables: Tables,
        tasks: Mapping[str, Any],
        declared: Sequence[NewSchedule],
        *,
        actor: str,
        enqueued: Callable[[set[str]], None],
    ) -> None:
        """tasks: those that this worker knows. enqueued: called with the queues that got jobs, after the commit."""
        self._tables = tables
        self._tasks = tasks
        self._task_names = sorted(tasks)
        self._declared = declared
        self._actor = actor
        self._enqueued = enqueued
        self._starting = True
        self._renew_at = 0.0
        self._prune_at = time.monotonic() + PRUNE_SECONDS
        self._aside: dict[str, float] = {}  # schedules that cannot be settled, and until when they are left alone
        self._locked_wait = LOCKED_SECONDS_MIN
        self._are_more_due = False  # so that there is no need to ask
        self._told: dict[str, str] = {}  # and what was last said of them

    def step(self, connection: sa.Connection) -> float:
        if time.monotonic() >= self._renew_at:
            self._declare(connection)
        if time.monotonic() >= self._prune_at:
            self._prune(connection)
        self._aside = {name: until for name, until in self._aside.items() if until > time.monotonic()}
        if self._are_more_due and self._settle(connection):
            return 0.0
        with straight(connection):
            wait = schedules.seconds_until_due(
                connection, self._tables, tasks=self._task_names, aside=list(self._aside)
            )
        if wait is not None and wait <= 0:
            if self._settle(connection):
                return 0.0
            locked_wait, self._locked_wait = self._locked_wait, min(self._locked_wait * 2, LOCKED_SECONDS_MAX)
            return locked_wait
        self._locked_wait = LOCKED_SECONDS_MIN
        return LOOK_SECONDS if wait is None else min(wait, LOOK_SECONDS)

    def declare_in(self, connection: sa.Connection) -> None:
        """Say what the code declares, in the present transaction."""
        schedules.declare(connection, self._tables, self._declared, starting=True, actor=self._actor)

    def settle_in(self, connection: sa.Connection) -> None:
        """Settle what is due, in the present transaction; whatever is wrong is raised."""
        while due := schedules.lock_due(
            connection, self._tables, tasks=self._task_names, aside=[], limit=SCHEDULES_PER_PASS
        ):
            for schedule, moment in due:
                settled = self._settle_one(connection, schedule, moment)
                if settled.problem is not None:
                    raise settled.problem

    def _declare(self, connection: sa.Connection) -> None:
        """Say what this worker's code declares, and then, now and then, that it still does."""
        if self._declared:
            with connection.begin():
                schedules.wait_briefly(connection)
                result = schedules.declare(
                    connection, self._tables, self._declared, starting=self._starting, actor=self._actor
                )
            if result.locked:
                self._renew_at = time.monotonic() + LOOK_SECONDS
                return
            if self._starting and result.overridden:
                logger.warning(
                    "schedules %s are not as the code declares them: somebody changed them since, and that counts; "
                    "delete them, and restart a worker, to have what the code says",
                    ", ".join(result.overridden),
                )
        self._starting = False
        self._renew_at = time.monotonic() + schedules.RENEW_SECONDS

    def _settle(self, connection: sa.Connection) -> bool:
        """Settle what is due of some schedules, in one transaction; False when others are at all of them."""
        queues: set[str] = set()
        problems: list[tuple[Schedule, Exception]] = []
        with connection.begin():
            schedules.wait_briefly(connection)
            due = schedules.lock_due(
                connection, self._tables, tasks=self._task_names, aside=list(self._aside), limit=SCHEDULES_PER_PASS
            )
            left = TICKS_PER_PASS
            for schedule, now in due:
                settled = self._settle_one(connection, schedule, now)
                queues |= settled.queues
                if settled.problem is not None:
                    problems.append((schedule, settled.problem))
                left -= settled.ticks
                if left <= 0:  # the transaction has been long enough; the next one takes the others
                    break
        self._are_more_due = left <= 0 or len(due) == SCHEDULES_PER_PASS
        for schedule, problem in problems:
            self._put_aside(schedule, problem)
        if queues:
            self._enqueued(queues)
        return bool(due)

    def _settle_one(self, connection: sa.Connection, schedule: Schedule, now: datetime) -> _Settled:
        """Settle what is due of a locked schedule. At a tick whose job cannot be enqueued it stops, and leaves open
        that one and those after it."""
        settled = _Settled()
        try:
            due = settle(schedule.rule, Catchup(schedule.catchup), schedule.next_tick_at, now)
        except Exception as error:  # noqa: BLE001 — a row that somebody made by SQL
            settled.problem = error
            return settled
        next_tick_at = due.next_tick_at
        for tick in due.ticks:
            try:
                self._enqueue(connection, schedule, tick, settled)
            except Exception as error:
                if not (isinstance(error, PgqueueError) or is_refusal(error) or is_locked(error)):
                    raise
                settled.problem, next_tick_at = error, tick
                break
            settled.ticks += 1
        if settled.problem is not None and settled.ticks == 0:
            return settled
        missed = due.skipped
        if missed is not None and (now - missed[0]).total_seconds() <= MISSED_SECONDS:
            missed = None  # a later tick came before anybody got round to these
        schedules.settled(
            connection, self._tables, schedule, next_tick_at=next_tick_at, missed=missed, actor=self._actor
        )
        if missed is not None:
            logger.warning(
                "schedule %s: ticks from %s to %s were missed and get no job (catchup=%s)",
                schedule.name,
                missed[0].isoformat(),
                missed[1].isoformat(),
                schedule.catchup,
            )
        return settled

    def _enqueue(self, connection: sa.Connection, schedule: Schedule, tick: datetime, settled: _Settled) -> None:
        with connection.begin_nested() as savepoint:
            result = enqueue(connection, connection, self._tables, schedule, self._tasks, tick)
            job_id = result.id if result.inserted else None
            if not schedules.add_tick(connection, self._tables, schedule.name, tick, job_id):
                savepoint.rollback()  # and with it the job: somebody moved the schedule back
            elif result.inserted:
                settled.queues.add(schedule.queue)

    def _put_aside(self, schedule: Schedule, error: Exception) -> None:
        if is_locked(error):
            self._aside[schedule.name] = time.monotonic() + LOCKED_SECONDS_MAX
            logger.info("schedule %s: another transaction is about to enqueue its unique key", schedule.name)
            return
        self._aside[schedule.name] = time.monotonic() + ASIDE_SECONDS
        if isinstance(error, sa.exc.DBAPIError):  # the rest of which may show a whole row, with its payload
            what = first_line(error)
        else:
            what = str(error) if isinstance(error, PgqueueError) else type(error).__name__
        if self._told.get(schedule.name) != what:
            self._told[schedule.name] = what
            logger.error(
                "schedule %s: its job cannot be enqueued, trying again every %g s: %s",
                schedule.name,
                ASIDE_SECONDS,
                what,
            )

    def _prune(self, connection: sa.Connection) -> None:
        with connection.begin():
            deleted = schedules.prune_ticks(connection, self._tables)
        if deleted < schedules.PRUNE_TICKS_MAX:
            self._prune_at = time.monotonic() + PRUNE_SECONDS
