"""Any sequence of operations leaves the tables as a simple model of a queue says: no job lost, none out of turn.

Hypothesis makes up the sequences. A few are tried in each run, always the same. For a search of its own, name in
PGQUEUE_LIFECYCLE_EXAMPLES how many: then a sequence that fails is made shorter as well, which takes minutes.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import audit
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from jobs import age, claim, expire, external, make_due, sweep

from pgqueue import ClaimedJob, ClaimLost, DuplicateJob, IllegalTransition, JobNotFound, OnConflict, PgQueue

#: Named: so many new sequences. Otherwise a few, the same in each run.
EXAMPLES = os.environ.get("PGQUEUE_LIFECYCLE_EXAMPLES")

LATER = 3600.0
DAY = 86_400.0

#: Such as may be deleted.
NOT_RUNNING = ("pending", "completed", "dead", "cancelled")

picks = st.integers(0, 99)
limits = st.integers(0, 2)

#: What may be done next, how often in comparison, and with what. Each is a method of Lifecycle.
#: One rule draws from these, because Hypothesis leaves most of many rules out of each example.
STEPS: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {
    "enqueue": (
        3,
        {
            "task": st.sampled_from(["one", "two"]),
            "key": st.sampled_from([None, "k", "l"]),
            "priority": st.integers(0, 2),
            "max_retries": st.integers(0, 2),
            "is_due": st.sampled_from([True, True, False]),
            "on_conflict": st.sampled_from(OnConflict),
            "commits": st.sampled_from([True, True, True, False]),
        },
    ),
    "enqueue_many": (1, {"count": st.integers(1, 3), "max_retries": st.integers(0, 2)}),
    "claim": (
        3,
        {"limit": st.integers(1, 3), "task": st.sampled_from([None, None, "one"]), "sweeps": st.booleans()},
    ),
    "end_or_extend": (
        8,
        {
            "call": st.sampled_from(["ack", "nack", "nack with an error", "nack as dead", "extend"]),
            "numbers": st.lists(picks, min_size=1, max_size=3),
            "is_due": st.sampled_from([True, True, False]),
            "limit": limits,
        },
    ),
    "let_a_lease_run_out": (4, {"number": picks, "sweeps": st.booleans(), "limit": limits}),
    "sweep": (1, {}),
    "let_delays_pass": (1, {}),
    "operate": (
        5,
        {"call": st.sampled_from(["cancel", "cancel", "force", "replay", "replay", "delete"]), "number": picks},
    ),
    "prune": (
        1,
        {
            "statuses": st.lists(st.sampled_from(["completed", "dead", "cancelled"]), min_size=1, unique=True),
            "ages": st.booleans(),
        },
    ),
    "pause_or_resume": (1, {"pauses": st.sampled_from([True, False, False])}),
}

steps = st.sampled_from([name for name, (weight, _) in STEPS.items() for _ in range(weight)]).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries(STEPS[name][1]))
)


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
    is_asked: bool = False  # to stop
    is_old: bool = False  # became final long ago
    events: list[str] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return self.status in audit.OPEN

    def end(self, status: str, event: str | None, *, charge: bool = False, is_due: bool | None = None) -> None:
        """The attempt is over, or the job was changed by hand."""
        if self.is_asked and status != "completed":
            status, charge, is_due = "cancelled", False, None
            event = "sweep" if event == "sweep" else "cancel"
        self.status, self.is_asked = status, False
        self.token, self.has_expired, self.is_old = None, False, False
        self.retries += charge
        self.is_due = self.is_due if is_due is None else is_due
        if event:
            self.events.append(event)

    def fail(self, is_due: bool) -> None:
        if self.retries < self.max_retries:
            self.end("pending", "retry", charge=True, is_due=is_due)
        else:
            self.end("dead", "dead")

    def extend(self) -> None:
        self.has_expired = False


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
    def begin_with_a_few_jobs(self) -> None:
        with self.pgq.begin() as connection:
            for table in (self.pgq.tables.jobs, self.pgq.tables.job_events, self.pgq.tables.queues):
                connection.execute(sa.delete(table))
        for max_retries in (0, 1, 1, 2):
            self.enqueue_many(1, max_retries)

    @rule(step=steps)
    def take(self, step: tuple[str, dict[str, Any]]) -> None:
        name, arguments = step
        getattr(self, name)(**arguments)

    # Enqueue

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
        holder = self._holder(task, key)
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

    def enqueue_many(self, count: int, max_retries: int) -> None:
        numbers = [next(self.serial) for _ in range(count)]
        with self.pgq.begin() as connection:
            made = external(self.pgq, "one").using(max_retries=max_retries)
            ids = made.enqueue_many(connection, [{"n": n} for n in numbers])
        for job_id, n in zip(ids, numbers, strict=True):
            self.jobs[job_id] = Expected(job_id, "one", None, n, 0, max_retries, True)

    # Claims

    def claim(self, limit: int, task: str | None = None, sweeps: bool = False) -> None:
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

    def end_or_extend(self, call: str, numbers: list[int], is_due: bool, limit: int) -> None:
        """Some of the latest claims, current and lost ones."""
        if limit:
            self.claim(limit)
        if not self.claims:
            return
        latest = self.claims[-8:]
        jobs = [latest[-1 - number % len(latest)] for number in numbers]
        delay = 0.0 if is_due else LATER
        if call == "ack":
            self._end(jobs, lambda: self.pgq.ack(jobs, result=1), lambda job: job.end("completed", None))
        elif call == "nack":
            self._end(
                jobs,
                lambda: self.pgq.nack(jobs, delay=delay),
                lambda job: job.end("pending", "release", is_due=is_due),
            )
        elif call == "nack with an error":
            self._end(jobs, lambda: self.pgq.nack(jobs, error="no", delay=delay), lambda job: job.fail(is_due))
        elif call == "nack as dead":
            self._end(jobs, lambda: self.pgq.nack(jobs, dead=True), lambda job: job.end("dead", "dead"))
        else:
            self._end(jobs, lambda: self.pgq.extend(jobs, lease=60), lambda job: job.extend())

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

    # Time, sweeps

    def let_a_lease_run_out(self, number: int, sweeps: bool, limit: int) -> None:
        if limit:
            self.claim(limit)
        running = [job for job in self.jobs.values() if job.status == "running"]
        if not running:
            return
        job = running[number % len(running)]
        expire(self.pgq, [job.id])
        job.has_expired = True
        if sweeps:
            self.sweep()

    def sweep(self) -> None:
        expired = [job.id for job in self.jobs.values() if job.has_expired]
        self._swept(expired)
        swept = sweep(self.pgq)
        became = {"dead": swept.dead, "pending": swept.returned, "cancelled": swept.cancelled}
        assert {job_id: status for status, ids in became.items() for job_id in ids} == {
            job_id: self.jobs[job_id].status for job_id in expired
        }

    def _swept(self, expired: list[int]) -> None:
        for job_id in expired:
            job = self.jobs[job_id]
            is_exhausted = job.retries >= job.max_retries
            job.end("dead" if is_exhausted else "pending", "sweep", charge=not is_exhausted)

    def let_delays_pass(self) -> None:
        make_due(self.pgq)
        for job in self.jobs.values():
            if job.status == "pending":
                job.is_due = True

    # Operators

    def operate(self, call: str, number: int) -> None:
        """On some job: mostly one of the latest that stand as they must, else any, perhaps one that is gone."""
        allowed = {"cancel": audit.OPEN, "force": audit.OPEN, "replay": ("dead", "cancelled"), "delete": NOT_RUNNING}[
            call
        ]
        fit = [job.id for job in self.jobs.values() if job.status in allowed]
        known = fit[-5:] if fit and number % 4 else [*self.jobs, *self.deleted]
        job_id = known[number // 4 % len(known)]
        job = self.jobs.get(job_id)
        error = None
        if job is None:
            error = JobNotFound
        elif job.status not in allowed:
            error = IllegalTransition
        elif call == "replay" and self._holder(job.task, job.key):
            error = DuplicateJob
        with pytest.raises(error) if error else nullcontext():
            status = (
                self.pgq.cancel(job_id, force=call == "force")
                if call in ("cancel", "force")
                else getattr(self.pgq, call)(job_id)
            )
        if job is None or error:
            return
        if call == "cancel" and job.status == "running":
            assert status == "running"
            job.events += [] if job.is_asked else ["cancel_requested"]
            job.is_asked = True
        elif call in ("cancel", "force"):
            assert status == "cancelled"
            job.end("cancelled", "cancel")
        elif call == "replay":
            job.end("pending", "replay", is_due=True)
            job.retries = 0
        else:
            self.deleted[job.id] = [*self.jobs.pop(job.id).events, "delete"]

    def _holder(self, task: str, key: str | None) -> Expected | None:
        """The open job of the task with this unique key."""
        found = (job for job in self.jobs.values() if key and job.is_open and (job.task, job.key) == (task, key))
        return next(found, None)

    def prune(self, statuses: list[str], ages: bool) -> None:
        if ages:
            age(self.pgq, seconds_ago=8 * DAY)
            for job in self.jobs.values():
                job.is_old = not job.is_open
        doomed = [job.id for job in self.jobs.values() if job.is_old and job.status in statuses]
        assert self.pgq.prune(older_than=DAY, statuses=statuses) == len(doomed)
        for job_id in doomed:
            self.deleted[job_id] = []
            del self.jobs[job_id]

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
            max_examples=int(EXAMPLES or 8),
            stateful_step_count=50,
            derandomize=EXAMPLES is None,
            phases=[Phase.generate, *([Phase.shrink] if EXAMPLES else [])],
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
