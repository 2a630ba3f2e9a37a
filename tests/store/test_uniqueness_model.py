"""Whatever happens to jobs that count as the same: there is never a second open one, and no operation is held up by it.

Hypothesis makes up sequences of enqueues, ends, sweeps, replays, edits and purges with three keys among them, so that
nearly every step meets a conflict. A few are tried in each run, always the same; PGQUEUE_LIFECYCLE_EXAMPLES asks for
a search of its own, as in test_lifecycle.py.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import audit
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from jobs import claim, expire, is_postgresql, sweep
from support import execute

from pgqueue import ClaimedJob, DuplicateJob, OnConflict, PgQueue, Task, Unique

EXAMPLES = os.environ.get("PGQUEUE_LIFECYCLE_EXAMPLES")

TASKS = ("plain", "periodic")
FILES = ("a", "b", "c")
DEAD_OR_CANCELLED = ("dead", "cancelled")

tasks, files, picks = st.sampled_from(TASKS), st.sampled_from(FILES), st.integers(0, 99)

#: What may be done next, how often in comparison, and with what: each is a method of Sameness.
STEPS: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {
    "enqueue": (4, {"task": tasks, "file": files, "on_conflict": st.sampled_from(OnConflict)}),
    "enqueue_many": (
        2,
        {"task": tasks, "some": st.lists(files, min_size=1, max_size=4), "on_conflict": st.sampled_from(OnConflict)},
    ),
    "end": (
        6,
        {
            "limit": st.integers(1, 3),
            "call": st.sampled_from(["complete", "fail", "die", "die", "release", "snooze", "sweep", "cancel"]),
        },
    ),
    "live_and_die": (3, {"task": tasks, "some": st.lists(files, min_size=1, max_size=3, unique=True)}),
    "cancel_pending": (1, {"number": picks}),
    "replay_one": (2, {"number": picks}),
    "replay_ids": (2, {"count": st.integers(1, 5), "number": picks}),
    "replay_where": (2, {"task": st.sampled_from([None, *TASKS]), "limit": st.sampled_from([None, None, 1, 2])}),
    "edit": (3, {"number": picks, "file": files, "replays": st.booleans()}),
    "delete": (1, {"number": picks}),
    "purge": (1, {"limit": st.sampled_from([None, 1])}),
    "let_periods_end": (1, {}),
}

steps = st.sampled_from([name for name, (weight, _) in STEPS.items() for _ in range(weight)]).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries(STEPS[name][1]))
)


@dataclass
class Expected:
    id: int
    task: str
    file: str
    n: int
    status: str = "pending"
    retries: int = 0

    @property
    def is_open(self) -> bool:
        return self.status in audit.OPEN


class Sameness(RuleBasedStateMachine):
    def __init__(self, pgq: PgQueue) -> None:
        super().__init__()
        self.pgq = pgq
        self.jobs: dict[int, Expected] = {}
        self.periods: dict[str, int] = {}  # by file the job that began one which lasts
        self.serial = itertools.count()

        def work(file: str, n: int) -> None: ...

        self.tasks: dict[str, Task[..., Any]] = {
            "plain": pgq.task(name="plain", unique=Unique(by=("file",)))(work),
            "periodic": pgq.task(name="periodic", unique=Unique(by=("file",), period=3600))(work),
        }

    @initialize()
    def begin_with_nothing(self) -> None:
        with self.pgq.begin() as connection:
            for table in (self.pgq.tables.jobs, self.pgq.tables.job_events, self.pgq.tables.unique_periods):
                connection.execute(sa.delete(table))

    @rule(step=steps)
    def take(self, step: tuple[str, dict[str, Any]]) -> None:
        name, arguments = step
        getattr(self, name)(**arguments)

    # Enqueue

    def enqueue(self, task: str, file: str, on_conflict: OnConflict) -> None:
        n = next(self.serial)
        holder = self.holder(task, file)
        made = self.tasks[task].using(on_conflict=on_conflict, max_retries=1)
        with self.pgq.begin() as connection:
            if holder and self.refuses(holder, on_conflict):
                with pytest.raises(DuplicateJob):
                    made.enqueue(connection, file=file, n=n)
                return
            handle = made.enqueue(connection, file=file, n=n)

        assert handle.inserted == (holder is None)
        assert handle.id == (holder or handle.id)
        self.stored(task, file, n, handle.id, on_conflict)

    def enqueue_many(self, task: str, some: list[str], on_conflict: OnConflict) -> None:
        payloads = [{"file": file, "n": next(self.serial)} for file in some]
        holders = {file: self.holder(task, file) for file in some}
        refused = any(holder and self.refuses(holder, on_conflict) for holder in holders.values())
        made = self.tasks[task].using(on_conflict=on_conflict, max_retries=1)
        with self.pgq.begin() as connection:
            if refused or (on_conflict is OnConflict.RAISE and len(set(some)) < len(some)):
                with pytest.raises(DuplicateJob):
                    made.enqueue_many(connection, payloads)
                return
            ids = made.enqueue_many(connection, payloads)

        for payload, job_id in zip(payloads, ids, strict=True):
            holder = holders[payload["file"]]
            assert holder in (None, job_id)
            assert self.holder(task, payload["file"]) in (None, job_id), "the same payload twice has one job"
            self.stored(task, payload["file"], payload["n"], job_id, on_conflict)

    def stored(self, task: str, file: str, n: int, job_id: int, on_conflict: OnConflict) -> None:
        if self.holder(task, file) is None:
            self.jobs[job_id] = Expected(job_id, task, file, n)
            if task == "periodic":
                self.periods[file] = job_id
        elif on_conflict is OnConflict.REPLACE:
            self.jobs[job_id].n, self.jobs[job_id].retries = n, 0

    def holder(self, task: str, file: str) -> int | None:
        """The job on whose account there can be no other one now."""
        for job in self.jobs.values():
            if (job.task, job.file, job.is_open) == (task, file, True):
                return job.id
        if task == "periodic" and file in self.periods:
            by = self.jobs.get(self.periods[file])
            if by is None or by.status not in DEAD_OR_CANCELLED:
                return self.periods[file]
        return None

    def refuses(self, holder: int, on_conflict: OnConflict) -> bool:
        job = self.jobs.get(holder)
        can_be_replaced = job is not None and job.status == "pending"
        return on_conflict is OnConflict.RAISE or (on_conflict is OnConflict.REPLACE and not can_be_replaced)

    # Attempts

    def end(self, limit: int, call: str) -> None:
        claimed: list[ClaimedJob] = claim(self.pgq, limit=limit)
        assert len(claimed) == min(limit, sum(job.status == "pending" for job in self.jobs.values()))
        if not claimed:
            return
        calls = {
            "complete": lambda: self.pgq.ack(claimed),
            "fail": lambda: self.pgq.nack(claimed, error="no", delay=0),
            "die": lambda: self.pgq.nack(claimed, dead=True),
            "release": lambda: self.pgq.nack(claimed),
            "snooze": lambda: self.pgq.nack(claimed, delay=0),
            "sweep": lambda: (expire(self.pgq), sweep(self.pgq)),
            "cancel": lambda: [self.pgq.cancel(job.id, force=True) for job in claimed],
        }
        calls[call]()
        for ended in claimed:
            job = self.jobs[ended.id]
            if call in ("fail", "sweep"):
                job.status, job.retries = ("pending", job.retries + 1) if job.retries < 1 else ("dead", job.retries)
            else:
                after = {"complete": "completed", "die": "dead", "cancel": "cancelled"}
                job.status = after.get(call, "pending")

    def live_and_die(self, task: str, some: list[str]) -> None:
        """So that there are several dead jobs with the same key."""
        self.enqueue_many(task, some, OnConflict.SKIP)
        self.end(10, "die")

    # Operators

    def cancel_pending(self, number: int) -> None:
        job = self.pick(number, "pending")
        if job:
            self.pgq.cancel(job.id)
            job.status = "cancelled"

    def replay_one(self, number: int) -> None:
        job = self.pick(number, *DEAD_OR_CANCELLED)
        if job is None:
            return
        if self.open_one(job.task, job.file):
            with pytest.raises(DuplicateJob):
                self.pgq.replay(job.id)
        else:
            self.pgq.replay(job.id)
            job.status, job.retries = "pending", 0

    def replay_ids(self, count: int, number: int) -> None:
        ids = sorted(self.jobs)[number % 5 :][:count]
        able = self.expected_replays([self.jobs[job_id] for job_id in ids])
        result = self.pgq.replay(ids)
        assert list(result.replayed) == able
        assert sorted(result.skipped) == [job_id for job_id in ids if job_id not in able]

    def replay_where(self, task: str | None, limit: int | None) -> None:
        dead = [job for _, job in sorted(self.jobs.items()) if job.status == "dead" and task in (None, job.task)]
        planned = self.pgq.replay_where(task=task, dry_run=True)
        result = self.pgq.replay_where(task=task, limit=limit)
        able = self.expected_replays(dead, limit)
        assert list(result.replayed) == able
        if limit is None:
            assert planned == result

    def expected_replays(self, jobs: list[Expected], limit: int | None = None) -> list[int]:
        done: list[int] = []
        for job in jobs:
            can_be = job.status in DEAD_OR_CANCELLED and not self.open_one(job.task, job.file)
            if can_be and (limit is None or len(done) < limit):
                job.status, job.retries = "pending", 0
                done.append(job.id)
        return done

    def edit(self, number: int, file: str, replays: bool) -> None:
        job = self.pick(number, "pending", *DEAD_OR_CANCELLED)
        if job is None:
            return
        n = next(self.serial)
        replays = replays and job.status != "pending"
        other = self.open_one(job.task, file)
        fails = other not in (None, job.id) and (replays or job.status == "pending")
        payload = {"file": file, "n": n}
        if fails:
            with pytest.raises(DuplicateJob):
                self.pgq.replay(job.id, payload=payload) if replays else self.pgq.edit(job.id, payload=payload)
            return
        self.pgq.replay(job.id, payload=payload) if replays else self.pgq.edit(job.id, payload=payload)
        self.move_period(job, file)
        job.file, job.n = file, n
        if replays:
            job.status, job.retries = "pending", 0

    def move_period(self, job: Expected, file: str) -> None:
        if job.task == "periodic" and job.file != file and self.periods.get(job.file) == job.id:
            del self.periods[job.file]
            by = self.jobs.get(self.periods.get(file, 0))
            if file not in self.periods or (by and by.status in DEAD_OR_CANCELLED):
                self.periods[file] = job.id

    def delete(self, number: int) -> None:
        job = self.pick(number, "pending", "completed", *DEAD_OR_CANCELLED)
        if job:
            self.pgq.delete(job.id)
            self.gone(job)

    def purge(self, limit: int | None) -> None:
        dead = [job for _, job in sorted(self.jobs.items()) if job.status == "dead"][:limit]
        assert self.pgq.purge(limit=limit) == len(dead)
        for job in dead:
            self.gone(job)

    def gone(self, job: Expected) -> None:
        del self.jobs[job.id]
        if job.task == "periodic" and self.periods.get(job.file) == job.id:
            del self.periods[job.file]

    def let_periods_end(self) -> None:
        past = "now()" if is_postgresql(self.pgq) else "'2020-01-01 00:00:00.000'"
        execute(self.pgq.engine, f"UPDATE {self.pgq.tables.unique_periods.fullname} SET until = {past}")
        self.periods.clear()

    def open_one(self, task: str, file: str) -> int | None:
        found = (job.id for job in self.jobs.values() if (job.task, job.file, job.is_open) == (task, file, True))
        return next(found, None)

    def pick(self, number: int, *statuses: str) -> Expected | None:
        fit = [job for job in self.jobs.values() if job.status in statuses]
        return fit[number % len(fit)] if fit else None

    # What always holds

    @invariant()
    def the_tables_are_sound_and_as_the_model_says(self) -> None:
        stored = audit.read(self.pgq)
        audit.assert_sound(stored)
        assert {row.id: (row.task, row.status, row.retries, row.payload) for row in stored.jobs} == {
            job.id: (job.task, job.status, job.retries, {"file": job.file, "n": job.n}) for job in self.jobs.values()
        }


def test_no_sequence_of_operations_makes_two_open_jobs_of_one_or_is_held_up_by_a_conflict(pgq: PgQueue) -> None:
    run_state_machine_as_test(
        lambda: Sameness(pgq),
        settings=settings(
            max_examples=int(EXAMPLES or 7),
            stateful_step_count=40,
            derandomize=EXAMPLES is None,
            phases=[Phase.generate, *([Phase.shrink] if EXAMPLES else [])],
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
