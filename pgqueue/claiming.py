"""Claiming jobs: as many as the slots of each queue want, in batches."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from pgqueue import gating, sharing, store, within_limits
from pgqueue.assignment import Assignment
from pgqueue.engine import LockNotWon, bounding_itself, looking, straight
from pgqueue.holds import Holds
from pgqueue.job import ClaimedJob, Outcome, Released
from pgqueue.lanes import Lane, Lanes
from pgqueue.loop import DatabaseLoop
from pgqueue.slots import OVERDUE_SECONDS, Slots

logger = logging.getLogger(__name__)

#: Another worker that gave no sign of life for so many of this one's leases is not there.
SILENT_LEASES = 2

#: Between the claim of a job that a worker was told of and a look for others, so that the job starts first.
LOOK_DELAY_SECONDS = 0.005

#: The first wait of a draining worker for due jobs that it could not claim; it doubles up to the poll interval.
DRAIN_SECONDS_MIN = 0.01

#: While so many ends wait to be written, no more jobs are claimed: the database is slower than the tasks. The next look
#: is after so many seconds.
UNWRITTEN_JOBS_MAX = 4_000
BEHIND_SECONDS = 0.005

OVERDUE = Released("it waited behind long jobs while another worker may have been free")
PAUSED = Released("its queue was paused before it was started")

#: How often a worker that holds jobs ahead looks whether their queue was paused.
PAUSE_LOOK_SECONDS = 0.5


class Claimer(DatabaseLoop):
    """The thread that fills the buffers of the slots."""

    def __init__(
        self,
        assignment: Assignment,
        holds: Holds,
        slots: Mapping[str, Slots],
        limited: set[str],
        *,
        finish: Callable[[ClaimedJob, Outcome], None],
        lost: Callable[[ClaimedJob], None],
        expire: Callable[[sa.Connection], object],
        stopping: Callable[[], bool],
        stop_working: Callable[[], None],
    ) -> None:
        """limited: queues whose claims have to keep limits; this thread finds out which.
        finish: hands over how a job ended.
        lost: told of a job that was claimed anew while it was held.
        expire: lets jobs that expired be dead.
        stopping, stop_working: of the whole worker.
        """
        super().__init__(
            "claim", assignment.engine, self._fill_all, assignment.outage, assignment.config.lease, keeps_plans=True
        )
        self._config = assignment.config
        self._tables = assignment.tables
        self._task_names = assignment.task_names
        self._worker_id = assignment.worker_id
        self._holds = holds
        self._slots = slots
        self._limited = limited
        self._finish = finish
        self._lost = lost
        self._expire = expire
        self._stopping = stopping
        self._stop_working = stop_working
        self._lanes = {name: Lanes() for name in slots if assignment.on_postgresql}
        self._unsure_claims: list[uuid.UUID] = []
        self._drain_wait = DRAIN_SECONDS_MIN
        self._look_for_pause_at = dict.fromkeys(slots, 0.0)  # monotonic

    def look_again(self, queue: str | None) -> None:
        """There may be jobs in this queue, or in any (None). From any thread."""
        for slots in self._slots.values():
            if queue is None or slots.name == queue:
                slots.looks_empty_until = 0.0
                self.wake()

    def _fill_all(self, connection: sa.Connection) -> float:
        """Fill the buffers. Returns how long there is nothing to do."""
        self.release_unsure(connection)
        if self._unwritten() > UNWRITTEN_JOBS_MAX:
            return BEHIND_SECONDS
        wait = self._config.poll_interval
        for slots in self._slots.values():
            if self._stopping():
                return wait
            self._give_back_paused(connection, slots)
            self._give_back_overdue(connection, slots)
            if self._wanted(slots) > 0:
                if time.monotonic() >= slots.looks_empty_until:
                    self._fill(connection, slots)
                wait = min(wait, slots.looks_empty_until - time.monotonic())
            if slots.holds_ahead:
                wait = min(wait, OVERDUE_SECONDS)
            elif slots.waiting:
                wait = min(wait, PAUSE_LOOK_SECONDS)
        if self._config.drain and wait > 0 and not self._holds.by_id:
            return self._drain_step(connection)
        return max(wait, 0.0)

    def _unwritten(self) -> int:
        """How many jobs have ended and are still held, because their ends are not written."""
        return len(self._holds.by_id) - sum(slots.waiting + slots.running for slots in self._slots.values())

    def _give_back_paused(self, connection: sa.Connection, slots: Slots) -> None:
        """Give back what waits in the buffer of a queue that was paused since it was claimed."""
        if not slots.waiting or time.monotonic() < self._look_for_pause_at[slots.name]:
            return
        self._look_for_pause_at[slots.name] = time.monotonic() + PAUSE_LOOK_SECONDS
        with looking(connection):
            paused = sharing.was_paused(connection, self._tables, queue=slots.name)
        if paused:
            self._give_back(
                slots, slots.take_back_all(), PAUSED, "queue %s is paused: gave back %d jobs that were not started"
            )

    def _give_back_overdue(self, connection: sa.Connection, slots: Slots) -> None:
        """Give back what waits in the buffer behind long jobs, should another worker be free to run it."""
        overdue = slots.overdue()
        if not overdue or not slots.may_ask_others():
            return
        began = time.monotonic()
        with looking(connection):
            free = sharing.others_may_be_free(
                connection,
                self._tables,
                queue=slots.name,
                worker=self._worker_id,
                tasks=self._task_names,
                seconds=self._config.lease * SILENT_LEASES,
            )
        slots.asked_others(free=free, began=began)
        if free:
            self._give_back(
                slots, slots.take_back(overdue), OVERDUE, "queue %s: gave back %d jobs that waited behind long ones"
            )

    def _give_back(self, slots: Slots, jobs: Sequence[ClaimedJob], outcome: Outcome, told: str) -> None:
        for job in jobs:
            self._finish(job, outcome)
        if jobs:
            logger.info(told, slots.name, len(jobs))

    def _wanted(self, slots: Slots) -> int:
        wanted = slots.wanted()
        if self._config.max_jobs is not None:
            started = sum(other.started for other in self._slots.values())
            left = self._config.max_jobs - started
            if left <= 0 and not self._holds.by_id:
                self._stop_working()
            wanted = max(0, min(wanted, left))
        return wanted

    def _fill(self, connection: sa.Connection, slots: Slots) -> None:
        """Claim what the slots of a queue want, and say when to try again."""
        told = slots.looks_empty_until == 0.0
        # Said before asking: a wake-up that comes while the claim is under way must not be overwritten after it.
        slots.looks_empty_until = time.monotonic() + self._config.poll_interval
        if slots.name not in self._limited:
            self._fill_plainly(connection, slots, told)
        if slots.name in self._limited:
            self._fill_within_limits(connection, slots)

    def _fill_plainly(self, connection: sa.Connection, slots: Slots, told: bool) -> None:
        lanes = self._lanes.get(slots.name)
        before = slots.started
        if lanes is None:
            found_all = self._claim(connection, slots)
            if slots.started == before and self._are_limited(connection, slots):
                self._limited.add(slots.name)
        else:
            # What a worker is told of lies behind the marks, as a rule.
            goes_on = lanes.known and (told or not lanes.may_look())
            found_all = goes_on and self._claim(connection, slots, lanes)
            if told and not found_all and slots.started > before and not lanes.should_look():
                # What it was told of is found. Let that start, before this thread looks for what else there may be.
                slots.looks_empty_until = min(slots.looks_empty_until, time.monotonic() + LOOK_DELAY_SECONDS)
            elif lanes.may_look() and (not found_all or lanes.should_look()):
                pending = self._look(connection, slots, lanes)
                found_all = found_all or (pending and self._claim(connection, slots, lanes))
            elif not found_all:
                slots.looks_empty_until = min(slots.looks_empty_until, lanes.look_allowed_at)
        if found_all:
            slots.looks_empty_until = 0.0

    def _fill_within_limits(self, connection: sa.Connection, slots: Slots) -> None:
        found = within_limits.LimitedClaim()

        def claim(**asked: Any) -> list[ClaimedJob]:
            nonlocal found
            try:
                with bounding_itself(connection), connection.begin():
                    found = within_limits.claim(connection, self._tables, **asked)
            except LockNotWon:
                found = within_limits.LimitedClaim(again=True)
            return found.jobs

        found_all = self._claim_with(connection, slots, claim)
        if not found.kept:
            self._limited.discard(slots.name)
        if found_all or found.again or not found.kept:
            slots.looks_empty_until = 0.0
        elif found.next_token_seconds is not None:
            slots.looks_empty_until = min(slots.looks_empty_until, time.monotonic() + found.next_token_seconds)

    def _are_limited(self, connection: sa.Connection, slots: Slots) -> bool:
        with connection.begin():
            return gating.are_kept(connection, self._tables, queue=slots.name, tasks=self._task_names)

    def _look(self, connection: sa.Connection, slots: Slots, lanes: Lanes) -> bool:
        """Let the next claim begin at the front of each lane; False when nothing is pending."""
        began = time.monotonic()
        fronts: list[Lane] = []
        limited = False
        with straight(connection):
            if not lanes.last_look_found_none or store.is_any_pending(connection, self._tables, queue=slots.name):
                fronts, limited = store.lanes(connection, self._tables, queue=slots.name, tasks=self._task_names)
        if limited:
            self._limited.add(slots.name)
        lanes.looked(fronts, began, time.monotonic())
        return bool(fronts)

    def _claim(self, connection: sa.Connection, slots: Slots, lanes: Lanes | None = None) -> bool:
        """Claim as many jobs of a queue as its slots want, and put them there; whether there were so many."""

        def claim(**asked: Any) -> list[ClaimedJob]:
            marks = lanes.marks() if lanes is not None else None
            with straight(connection):
                claimed = store.claim(connection, self._tables, marks=marks, **asked)
            if lanes is not None:
                lanes.claimed(claimed)
            return claimed

        return self._claim_with(connection, slots, claim)

    def _claim_with(self, connection: sa.Connection, slots: Slots, claim: Callable[..., list[ClaimedJob]]) -> bool:
        limit = self._wanted(slots)
        if limit == 0:
            return True
        token = uuid.uuid4()
        asked_at = time.monotonic()
        try:
            claimed = claim(
                queue=slots.name,
                worker=self._worker_id,
                token=token,
                limit=limit,
                lease=self._config.lease,
                tasks=self._task_names,
                flush=False,
            )
        except BaseException:
            # The claim may have been committed although its answer did not arrive.
            self._unsure_claims.append(token)
            slots.looks_empty_until = 0.0
            raise
        if claimed:
            self._drain_wait = DRAIN_SECONDS_MIN
        for lost in self._holds.add(claimed, asked_at):
            self._lost(lost)
        if not slots.add(claimed):  # the claim took so long that the worker stopped meanwhile
            self._unsure_claims.append(token)
            self.release_unsure(connection)
        if len(claimed) == limit:
            slots.found_all_at = time.monotonic()
            return True
        return False

    def release_unsure(self, connection: sa.Connection) -> None:
        while self._unsure_claims:
            with connection.begin():
                released = store.release_claim(connection, self._tables, self._unsure_claims[0], actor=self._worker_id)
            self._unsure_claims.pop(0)
            if released:
                logger.info("gave back jobs %s, claimed just when the connection broke", released)

    def _drain_step(self, connection: sa.Connection) -> float:
        """When draining: stop if nothing is left to wait for; otherwise how long to wait."""
        self._expire(connection)
        with connection.begin():
            left = store.open_jobs(connection, self._tables, list(self._config.queues), self._task_names)
        if left.due == 0 and left.running == 0 and not self._holds.by_id:
            self._stop_working()
            return self._config.poll_interval
        for slots in self._slots.values():
            slots.looks_empty_until = time.monotonic()
        wait = self._config.poll_interval
        if left.next_run_seconds is not None:
            # Jobs may be due and yet out of reach (a paused queue, a locked row): look for them less and less often.
            wait = min(wait, max(left.next_run_seconds, self._drain_wait))
            self._drain_wait = min(self._drain_wait * 2, self._config.poll_interval)
        return wait
