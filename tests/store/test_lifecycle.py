"""Any sequence of operations leaves the tables as a simple model of a queue says: no job lost, none out of turn.

Hypothesis makes up the sequences. A few are tried in each run, always the same. For a search of its own, name in
PGQUEUE_LIFECYCLE_EXAMPLES how many: then a sequence that fails is made shorter as well, which takes minutes.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import audit
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from jobs import age, claim, expire, external, make_due, sweep

from pgqueue import ClaimedJob, ClaimLost, DuplicateJob, IllegalTransition, JobNotFound, OnConflict, PgQueue

#: Named: so many new sequences. Otherwise a few, the same in each run.
EXAMPLES = os.environ.get("PGQUEUE_LIFECYCLE_EXAMPLES")

LATER = 3600.0
DAY = 86_400.0

picks = st.integers(0, 99)


@dataclass
class Expected:
    """What a job is, as the model has it."""

    id: int
    task: str
    key: str | None
    n: int
    priority: int
    max_retries: int
    is_due: bool
    status: str = "pending"
    attempt: int = 0
    retries: int = 0
    token: uuid.UUID | None = None
    has_expired: bool = False
    is_old: bool = False  # became final long ago
    events: list[str] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return self.status in audit.OPEN

    def end(self, status: str, event: str | None, *, charge: bool = False, is_due: bool | None = None) -> None:
        """The attempt is over, or the job was changed by hand."""
        self.status = status
        self.token, self.has_expired, self.is_old = None, False, False
        self.retries += charge
        self.is_due = self.is_due if is_due is None else is_due
        if event:
            self.events.append(event)


class Lifecycle(RuleBasedStateMachine):
    def __init__(self, pgq: PgQueue) -> None:
        super().__init__()
        self.pgq = pgq
        self.jobs: dict[int, Expected] = {}
        self.deleted: dict[int, list[str]] = {}  # events of jobs that are gone
        self.claims: list[ClaimedJob] = []  # all that were ever made, lost ones among them
        self.is_paused = False
        self.serial = itertools.count()

    @initialize()
    def begin_empty(self) -> None:
        with self.pgq.begin() as connection:
            for table in (self.pgq.tables.jobs, self.pgq.tables.job_events, self.pgq.tables.queues):
                connection.execute(sa.delete(table))

    # Enqueue

    @rule(
        task=st.sampled_from(["one", "two"]),
        key=st.sampled_from([None, "k", "l"]),
        priority=st.integers(0, 2),
        max_retries=st.integers(0, 2),
        is_due=st.booleans(),
        on_conflict=st.sampled_from(OnConflict),
        commits=st.sampled_from([True, True, True, False]),
    )
    def enqueue(
        self,
        task: str,
        key: str | None,
        priority: int,
        max_retries: int,
        is_due: bool,
        on_conflict: OnConflict,
        commits: bool,
    ) -> None:
        n = next(self.serial)
        made = external(self.pgq, task).using(
            priority=priority,
            max_retries=max_retries,
            unique_key=key,
            on_conflict=on_conflict,
            delay=None if is_due else LATER,
        )
        holder = next(
            (job for job in self.jobs.values() if key and job.is_open and (job.task, job.key) == (task, key)), None
        )
        result = None
        with self.pgq.engine.connect() as connection:
            with suppress(DuplicateJob):
                result = made.enqueue(connection, n=n)
            connection.commit() if commits else connection.rollback()

        if holder is None:
            assert result is not None
            assert result.inserted
            if commits:
                self.jobs[result.id] = Expected(result.id, task, key, n, priority, max_retries, is_due)
        elif on_conflict is OnConflict.RAISE or (on_conflict is OnConflict.REPLACE and holder.status == "running"):
            assert result is None
        else:
            assert result is not None
            assert (result.id, result.inserted) == (holder.id, False)
            if on_conflict is OnConflict.REPLACE and commits:
                holder.n, holder.priority, holder.max_retries, holder.is_due = n, priority, max_retries, is_due
                holder.events.append("replace")

    @rule(count=st.integers(1, 4))
    def enqueue_many(self, count: int) -> None:
        numbers = [next(self.serial) for _ in range(count)]
        with self.pgq.begin() as connection:
            ids = external(self.pgq, "one").enqueue_many(connection, [{"n": n} for n in numbers])
        for job_id, n in zip(ids, numbers, strict=True):
            self.jobs[job_id] = Expected(job_id, "one", None, n, 0, 3, True)

    # Claims

    @rule(limit=st.integers(1, 4), task=st.sampled_from([None, "one"]), sweeps=st.booleans())
    def claim(self, limit: int, task: str | None, sweeps: bool) -> None:
        if sweeps and task is None:
            self._swept([job.id for job in self.jobs.values() if job.has_expired])
            claimed = self.pgq.claim("worker", limit=limit)
        else:
            claimed = claim(self.pgq, limit=limit, tasks=None if task is None else [task])

        claimable = [
            job for job in self.jobs.values() if job.status == "pending" and job.is_due and task in (None, job.task)
        ]
        due = [] if self.is_paused else sorted((job.priority for job in claimable), reverse=True)
        assert [job.priority for job in claimed] == due[:limit]
        assert {job.id for job in claimed} <= {job.id for job in claimable}
        for job in claimed:
            expected = self.jobs[job.id]
            expected.status, expected.token, expected.has_expired = "running", job.claim_token, False
            expected.attempt += 1
            assert (job.attempt, job.retries, job.payload) == (expected.attempt, expected.retries, {"n": expected.n})
        self.claims.extend(claimed)

    def _chosen(self, *numbers: int) -> list[ClaimedJob]:
        """Claims, current ones and lost ones."""
        return [self.claims[-1 - number % len(self.claims)] for number in numbers]

    def _end(self, jobs: list[ClaimedJob], call: Callable[[], None], write: Callable[[Expected], None]) -> None:
        """Make a call on claims: exactly what they still hold is written, and it says so when a job was lost."""
        written: set[int] = set()
        for job in jobs:
            expected = self.jobs.get(job.id)
            if expected and expected.token == job.claim_token:
                write(expected)
                written.add(job.id)
        if any(job.id not in written for job in jobs):
            with pytest.raises(ClaimLost):
                call()
        else:
            call()

    @precondition(lambda self: self.claims)
    @rule(numbers=st.lists(picks, min_size=1, max_size=3))
    def ack(self, numbers: list[int]) -> None:
        jobs = self._chosen(*numbers)
        self._end(jobs, lambda: self.pgq.ack(jobs, result=1), lambda job: job.end("completed", None))

    @precondition(lambda self: self.claims)
    @rule(numbers=st.lists(picks, min_size=1, max_size=3), is_due=st.booleans())
    def nack(self, numbers: list[int], is_due: bool) -> None:
        jobs = self._chosen(*numbers)
        self._end(
            jobs,
            lambda: self.pgq.nack(jobs, delay=0 if is_due else LATER),
            lambda job: job.end("pending", "release", is_due=is_due),
        )

    @precondition(lambda self: self.claims)
    @rule(numbers=st.lists(picks, min_size=1, max_size=3), is_due=st.booleans())
    def nack_with_an_error(self, numbers: list[int], is_due: bool) -> None:
        def write(job: Expected) -> None:
            if job.retries < job.max_retries:
                job.end("pending", "retry", charge=True, is_due=is_due)
            else:
                job.end("dead", "dead")

        jobs = self._chosen(*numbers)
        self._end(jobs, lambda: self.pgq.nack(jobs, error="no", delay=0 if is_due else LATER), write)

    @precondition(lambda self: self.claims)
    @rule(number=picks)
    def give_up(self, number: int) -> None:
        jobs = self._chosen(number)
        self._end(jobs, lambda: self.pgq.nack(jobs, dead=True), lambda job: job.end("dead", "dead"))

    @precondition(lambda self: self.claims)
    @rule(numbers=st.lists(picks, min_size=1, max_size=3, unique=True))
    def extend(self, numbers: list[int]) -> None:
        def write(job: Expected) -> None:
            job.has_expired = False

        jobs = self._chosen(*numbers)
        self._end(jobs, lambda: self.pgq.extend(jobs, lease=60), write)

    # Time, sweeps

    @precondition(lambda self: any(job.status == "running" for job in self.jobs.values()))
    @rule(number=picks)
    def let_a_lease_run_out(self, number: int) -> None:
        running = [job for job in self.jobs.values() if job.status == "running"]
        job = running[number % len(running)]
        expire(self.pgq, [job.id])
        job.has_expired = True

    @rule()
    def sweep(self) -> None:
        expired = [job.id for job in self.jobs.values() if job.has_expired]
        dead = self._swept(expired)
        swept = sweep(self.pgq)
        assert (set(swept.dead), set(swept.returned)) == (dead, set(expired) - dead)

    def _swept(self, expired: list[int]) -> set[int]:
        dead = {job_id for job_id in expired if self.jobs[job_id].retries >= self.jobs[job_id].max_retries}
        for job_id in expired:
            self.jobs[job_id].end("dead" if job_id in dead else "pending", "sweep", charge=job_id not in dead)
        return dead

    @rule()
    def let_delays_pass(self) -> None:
        make_due(self.pgq)
        for job in self.jobs.values():
            if job.status == "pending":
                job.is_due = True

    @rule()
    def let_days_pass(self) -> None:
        age(self.pgq, seconds_ago=8 * DAY)
        for job in self.jobs.values():
            job.is_old = not job.is_open

    # Operators

    def _operate(self, call: Callable[[int], None], number: int, allowed: tuple[str, ...]) -> Expected | None:
        """Make a call on some job, perhaps one that is gone; the job if it was to be changed."""
        known = [*self.jobs, *self.deleted]
        job_id = known[number % len(known)]
        job = self.jobs.get(job_id)
        if job is None:
            with pytest.raises(JobNotFound):
                call(job_id)
            return None
        if job.status not in allowed:
            with pytest.raises(IllegalTransition):
                call(job_id)
            return None
        return job

    @precondition(lambda self: self.jobs)
    @rule(number=picks)
    def cancel(self, number: int) -> None:
        job = self._operate(self.pgq.cancel, number, audit.OPEN)
        if job:
            self.pgq.cancel(job.id)
            job.end("cancelled", "cancel")

    @precondition(lambda self: self.jobs)
    @rule(number=picks)
    def replay(self, number: int) -> None:
        job = self._operate(self.pgq.replay, number, ("dead", "cancelled"))
        if not job:
            return
        if job.key and any(
            other.is_open and (other.task, other.key) == (job.task, job.key) for other in self.jobs.values()
        ):
            with pytest.raises(DuplicateJob):
                self.pgq.replay(job.id)
            return
        self.pgq.replay(job.id)
        job.end("pending", "replay", is_due=True)
        job.retries = 0

    @precondition(lambda self: self.jobs)
    @rule(number=picks)
    def delete(self, number: int) -> None:
        job = self._operate(self.pgq.delete, number, ("pending", "completed", "dead", "cancelled"))
        if job:
            self.pgq.delete(job.id)
            self.deleted[job.id] = [*self.jobs.pop(job.id).events, "delete"]

    @rule(statuses=st.lists(st.sampled_from(["completed", "dead", "cancelled"]), min_size=1, unique=True))
    def prune(self, statuses: list[str]) -> None:
        doomed = [job.id for job in self.jobs.values() if job.is_old and job.status in statuses]
        assert self.pgq.prune(older_than=DAY, statuses=statuses) == len(doomed)
        for job_id in doomed:
            self.deleted[job_id] = []
            del self.jobs[job_id]

    @rule(pauses=st.sampled_from([True, False, False]))
    def pause_or_resume(self, pauses: bool) -> None:
        if pauses:
            self.pgq.pause("default")
        else:
            assert self.pgq.resume("default") == self.is_paused
        self.is_paused = pauses

    # What always holds

    @invariant()
    def the_tables_are_sound_and_as_the_model_says(self) -> None:
        stored = audit.read(self.pgq)
        audit.assert_sound(stored)
        assert {
            row.id: (row.status, row.attempt, row.retries, row.claim_token, row.payload, row.priority, row.max_retries)
            for row in stored.jobs
        } == {
            job.id: (job.status, job.attempt, job.retries, job.token, {"n": job.n}, job.priority, job.max_retries)
            for job in self.jobs.values()
        }
        expected = {job.id: job.events for job in self.jobs.values()} | self.deleted
        assert {job_id: [event.event for event in told] for job_id, told in stored.events.items()} == {
            job_id: kinds for job_id, kinds in expected.items() if kinds
        }


def test_any_sequence_of_operations_leaves_what_a_model_of_the_queue_says(pgq: PgQueue) -> None:
    run_state_machine_as_test(
        lambda: Lifecycle(pgq),
        settings=settings(
            max_examples=int(EXAMPLES or 20),
            stateful_step_count=50,
            derandomize=EXAMPLES is None,
            phases=[Phase.generate, *([Phase.shrink] if EXAMPLES else [])],
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
