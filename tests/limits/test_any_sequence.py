"""Under any sequence of operations no limit is ever exceeded, and no job waits for something that will never come.

Once as it is, and once without the looks around that find what was lost: here nothing is locked, so nothing is lost.

Hypothesis makes up the sequences: a few in each run, always the same. PGQUEUE_LIMITS_EXAMPLES names how many new ones
to search through.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from jobs import expire, make_due, sweep

from pgqueue import ClaimedJob, ClaimLost, DuplicateJob, IllegalTransition, JobNotFound, OnConflict, PgQueue, overlooked

EXAMPLES = os.environ.get("PGQUEUE_LIMITS_EXAMPLES")

TASKS = ("free", "few", "keyed", "rated")
QUEUES = ("default", "limited")
KEYS = st.sampled_from([None, "a", "b"])

picks = st.integers(0, 99)

#: What may be done next, how often in comparison, and with what. Each is a method of WithinLimits.
STEPS: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {
    "enqueue": (
        4,
        {
            "task": st.sampled_from(TASKS),
            "queue": st.sampled_from(QUEUES),
            "concurrency_key": KEYS,
            "ordering_key": st.sampled_from([None, None, None, None, "x", "y"]),
            "rate_key": KEYS,
            "priority": st.integers(0, 1),
            "unique_key": st.sampled_from([None, None, "u"]),
            "count": st.integers(1, 4),
        },
    ),
    "claim": (6, {"queue": st.sampled_from(QUEUES), "limit": st.integers(1, 5)}),
    "end": (8, {"how": st.sampled_from(["ack", "release", "retry", "later", "dead"]), "number": picks}),
    "let_a_lease_run_out": (2, {"number": picks}),
    "let_delays_pass": (1, {}),
    "offer_what_was_freed": (2, {}),
    "operate": (3, {"call": st.sampled_from(["cancel", "delete", "replay"]), "number": picks}),
    "withdraw": (3, {"call": st.sampled_from(["cancel", "delete"]), "number": picks}),
    "change_limits": (2, {"number": picks, "size": st.integers(1, 3)}),
    "prune": (1, {}),
}

steps = st.sampled_from([name for name, (weight, _) in STEPS.items() for _ in range(weight)]).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries(STEPS[name][1]))
)

#: Limits as they are at first, by the argument of set_limits that names whose they are.
LIMITS: dict[tuple[str, str], dict[str, Any]] = {
    ("queue", "limited"): {"concurrency": 3},
    ("task", "few"): {"concurrency": 2},
    ("task", "keyed"): {"key_concurrency": 1, "concurrency": 3},
    ("task", "rated"): {"rate": 1e6, "burst": 1},
}


class WithinLimits(RuleBasedStateMachine):
    def __init__(self, pgq: PgQueue) -> None:
        super().__init__()
        self.pgq = pgq
        self.claims: list[ClaimedJob] = []
        self.serial = itertools.count()
        self.limits = {whose: dict(limits) for whose, limits in LIMITS.items()}

    @initialize()
    def begin(self) -> None:
        tables = self.pgq.tables
        with self.pgq.begin() as connection:
            for table in (tables.jobs, tables.job_events, tables.limits, tables.rate_buckets):
                connection.execute(sa.delete(table))
        self.pgq._ordered_queues.clear()  # it knows what was in the table
        for (scope, name), kept in self.limits.items():
            self.pgq.set_limits(**{scope: name}, **kept)
        # From the first step on some wait for each thing that there is to wait for.
        self.enqueue("few", "default", "a", None, None, 0, None, 4)
        self.enqueue("keyed", "default", "a", None, None, 0, None, 3)
        self.enqueue("keyed", "limited", "a", None, None, 1, None, 1)
        self.enqueue("keyed", "limited", "b", "x", None, 0, None, 3)
        self.enqueue("rated", "limited", None, None, None, 0, None, 2)
        for queue in QUEUES:
            self.claim(queue, 5)

    @rule(step=steps)
    def take(self, step: tuple[str, dict[str, Any]]) -> None:
        name, arguments = step
        getattr(self, name)(**arguments)

    def enqueue(
        self,
        task: str,
        queue: str,
        concurrency_key: str | None,
        ordering_key: str | None,
        rate_key: str | None,
        priority: int,
        unique_key: str | None,
        count: int,
    ) -> None:
        made = self.pgq.external_task(task).using(
            queue=queue,
            concurrency_key=concurrency_key,
            ordering_key=ordering_key,
            rate_key=rate_key,
            priority=priority,
            max_retries=2,
            unique_key=unique_key,
            on_conflict=OnConflict.REPLACE,
        )
        with self.pgq.engine.connect() as connection:
            try:
                if unique_key is None:
                    made.enqueue_many(connection, [{"n": next(self.serial)} for _ in range(count)])
                else:
                    made.enqueue(connection, n=next(self.serial))
            except DuplicateJob:
                connection.rollback()
            else:
                connection.commit()

    def claim(self, queue: str, limit: int) -> list[ClaimedJob]:
        claimed = self.pgq.claim("worker", queue=queue, limit=limit)
        self.claims.extend(claimed)
        self.check_the_limits_of({job.id for job in claimed})
        return claimed

    def end(self, how: str, number: int) -> None:
        latest = self.claims[-6:]
        if not latest:
            return
        self._end(latest[number % len(latest)], how)

    def _end(self, job: ClaimedJob, how: str) -> None:
        try:
            if how == "ack":
                self.pgq.ack(job)
            elif how == "release":
                self.pgq.nack(job)
            else:
                delay = {"retry": 0.0, "later": 3600.0, "dead": None}[how]
                self.pgq.nack(job, error="no", delay=delay, dead=how == "dead")
        except ClaimLost:
            pass

    def let_a_lease_run_out(self, number: int) -> None:
        if self.claims:
            expire(self.pgq, [self.claims[number % len(self.claims)].id])
            sweep(self.pgq)

    def let_delays_pass(self) -> None:
        make_due(self.pgq)

    def operate(self, call: str, number: int) -> None:
        jobs = self.pgq.list_jobs(limit=100)
        if not jobs:
            return
        with suppress(DuplicateJob, IllegalTransition, JobNotFound):
            getattr(self.pgq, call)(jobs[number % len(jobs)].id)

    def offer_what_was_freed(self) -> None:
        """What the beginning of a claim does, which then finds nothing."""
        assert self.pgq.claim("worker", queue="empty") == []

    def withdraw(self, call: str, number: int) -> None:
        """Of jobs that were offered a slot, if there are some."""
        pending = [job for job in self.jobs() if job.status == "pending"]
        offered = [job for job in pending if job.slot == "offered"] or pending
        if offered:
            getattr(self.pgq, call)(offered[number % len(offered)].id)

    def change_limits(self, number: int, size: int) -> None:
        (scope, name), kept = list(self.limits.items())[number % len(self.limits)]
        if "rate" in kept:
            return
        field = sorted(kept)[number % len(kept)]
        kept[field] = size if number % 3 else None
        self.pgq.set_limits(**{scope: name}, **{field: kept[field]})

    def prune(self) -> None:
        self.pgq.prune(older_than=0, statuses=("completed", "dead", "cancelled"))

    def jobs(self) -> list[Any]:
        """Those that are open, or concern others."""
        jobs = self.pgq.tables.jobs
        names = ("id", "queue", "task", "status", "concurrency_key", "ordering_key", "slot", "waits_for")
        some = sa.or_(jobs.c.status.in_(["pending", "running"]), jobs.c.slot.is_not(None))
        with self.pgq.reading() as connection:
            return list(connection.execute(sa.select(*(jobs.c[name] for name in names)).where(some)))

    # What always holds

    @invariant()
    def no_two_jobs_of_an_ordering_key_run_at_once(self) -> None:
        running = [job for job in self.jobs() if job.status == "running"]
        turns = Counter((job.queue, job.ordering_key) for job in running if job.ordering_key)
        assert max(turns.values(), default=0) <= 1

    def check_the_limits_of(self, claimed: set[int]) -> None:
        """That of jobs which were just claimed; those of others may have been lowered while they run."""
        running = [job for job in self.jobs() if job.status == "running"]
        for (scope, name), kept in self.limits.items():
            mine = [job for job in running if (job.queue if scope == "queue" else job.task) == name]
            keys = Counter(job.concurrency_key for job in mine if job.concurrency_key)
            if not any(job.id in claimed for job in mine):
                continue
            if kept.get("concurrency"):
                assert len(mine) <= kept["concurrency"]
            if kept.get("key_concurrency"):
                for key in {job.concurrency_key for job in mine if job.id in claimed} - {None}:
                    assert keys[key] <= kept["key_concurrency"]

    @invariant()
    def for_each_slot_that_a_job_waits_for_there_is_a_job_that_will_pass_it_on(self) -> None:
        jobs = self.jobs()
        for waits in jobs:
            what = waits.waits_for
            if what != "task" and not (what or "").startswith("key:"):
                continue
            limit = self.limits.get(("task", waits.task), {}).get(
                "concurrency" if what == "task" else "key_concurrency"
            )
            passes_on = [
                job
                for job in jobs
                if job.task == waits.task
                and job.slot in ("awaited", "offered")
                and (what == "task" or what == f"key:{job.concurrency_key}")
                and (
                    job.slot == "awaited"
                    or job.waits_for is None
                    or (job.waits_for == "task" and what != "task")  # it keeps the slot of its key
                )
            ]
            assert len(passes_on) >= (limit or 0), f"{waits.id} waits for {what}"

    def teardown(self) -> None:
        """Whatever happened: from now on everything ends, in a bounded number of claims."""
        if not hasattr(self, "pgq"):
            return
        make_due(self.pgq)
        for job in self.claims:
            self._end(job, "ack")
        for _ in range(400):
            open_jobs = self.pgq.list_jobs(status="pending", limit=1) + self.pgq.list_jobs(status="running", limit=1)
            if not open_jobs:
                return
            for queue in QUEUES:
                for job in self.claim(queue, 5):
                    self._end(job, "ack")
        with self.pgq.begin() as connection:
            left = connection.execute(
                sa.select(self.pgq.tables.jobs).where(self.pgq.tables.jobs.c.status.in_(["pending", "running"]))
            ).all()
        raise AssertionError(f"these wait for ever: {left}")


@pytest.mark.parametrize("looks_around", [True, False], ids=["looking around", "without looking around"])
def test_any_sequence_of_operations_keeps_the_limits_and_lets_every_job_run(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, looks_around: bool
) -> None:
    if not looks_around:
        monkeypatch.setattr(overlooked, "look_around", lambda *arguments: False)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: WithinLimits(pgq),
        settings=settings(
            max_examples=int(EXAMPLES or (1 if looks_around else 4)),
            stateful_step_count=40,
            derandomize=EXAMPLES is None,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )
