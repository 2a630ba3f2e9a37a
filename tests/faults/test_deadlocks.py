"""Everybody at once at the same few jobs: enqueuers, consumers, a worker and operators. No two of them deadlock.

What may meet is made to meet: few keys, few jobs, and transactions that are as long as the calls make them. A few
seconds in each run; PGQUEUE_STRESS_SECONDS asks for more.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import audit
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from support import scalar, wait_for
from working import working

from pgqueue import (
    ClaimLost,
    DatabaseUnreachable,
    DuplicateJob,
    IllegalTransition,
    JobNotFound,
    PgQueue,
    PgqueueError,
    Retry,
    Unique,
)

SECONDS = float(os.environ.get("PGQUEUE_STRESS_SECONDS", "3"))

FILES = [f"{n}" for n in range(60)]
EXPECTED = (ClaimLost, DuplicateJob, IllegalTransition, JobNotFound)

DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


class Everybody:
    """Threads that do what they can to the same jobs."""

    def __init__(self, pgq: PgQueue) -> None:
        self.pgq = pgq
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self._over = threading.Event()

        def resize(file: str, n: int) -> None:
            if n % 3 == 0:
                raise ValueError(n)

        self.tasks = [
            pgq.task(name=name, **options)(resize)
            for name, options in {
                "plain": {"retry": Retry(max_retries=0), "keep_dead": 0.5},
                "unique": {"unique": Unique(by=("file",)), "retry": Retry(max_retries=0)},
                "periodic": {"unique": Unique(by=("file",), period=0.3), "retry": Retry(max_retries=1, base=0.01)},
                "ordered": {"ordered_by": "file", "retry": Retry(max_retries=0), "keep_completed": 0},
                "expiring": {"unique": Unique(by=("file",)), "expires_in": 0.05, "keep_completed": 0.2},
            }.items()
        ]

    def run(self, seconds: float, *acts: Callable[[random.Random], Any], of_each: int = 2) -> None:
        threads = [
            threading.Thread(target=self._repeat, args=(act, random.Random(f"{act.__name__} {number}")))
            for act in acts
            for number in range(of_each)
        ]
        for thread in threads:
            thread.start()
        self._over.wait(seconds)
        self._over.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    def _repeat(self, act: Callable[[random.Random], Any], chance: random.Random) -> None:
        while not self._over.is_set():
            try:
                act(chance)
                self.done[act.__name__] += 1
            except EXPECTED:
                self.done[f"{act.__name__} in vain"] += 1
            except (OperationalError, PgqueueError) as error:
                self.failures.append(f"{act.__name__}: {error}")

    # Enqueuers

    def enqueue(self, chance: random.Random) -> None:
        task = chance.choice(self.tasks)
        made = task.using(on_conflict=chance.choice(["skip", "raise", "replace"]), priority=chance.randrange(2))
        with self.pgq.begin() as connection:
            made.enqueue(connection, file=chance.choice(FILES), n=chance.randrange(10))

    def enqueue_many(self, chance: random.Random) -> None:
        task = chance.choice(self.tasks).using(on_conflict=chance.choice(["skip", "skip", "replace"]))
        some = chance.choices(FILES, k=50)
        with self.pgq.begin() as connection:
            task.enqueue_many(connection, [{"file": file, "n": chance.randrange(10)} for file in some])

    # Consumers

    def consume(self, chance: random.Random) -> None:
        try:
            jobs = self.pgq.claim("consumer", limit=chance.randrange(1, 5), lease=0.5)
        except DatabaseUnreachable:
            return  # this process did not come to its turn within the lease, and the server ended the claim
        chance.shuffle(jobs)
        if not jobs:
            time.sleep(0.001)
            return
        if chance.random() < 0.3:
            self.pgq.extend(jobs, lease=0.5)
        end = chance.randrange(5)
        if end == 0:
            return  # and dies
        if end == 1:
            self.pgq.nack(jobs, dead=True, error="no")
        elif end == 2:
            self.pgq.nack(jobs, error="no", delay=0)
        elif end == 3:
            self.pgq.nack(jobs)
        else:
            self.pgq.ack(jobs)

    # Operators

    def some(self, chance: random.Random, status: str | None) -> list[int]:
        ids = [job.id for job in self.pgq.list_jobs(status=status, limit=20)]
        return chance.sample(ids, min(len(ids), 5))

    def cancel(self, chance: random.Random) -> None:
        for job_id in self.some(chance, chance.choice(["pending", "running"])):
            with suppress(*EXPECTED):
                self.pgq.cancel(job_id, force=chance.random() < 0.5)
        time.sleep(0.02)

    def replay(self, chance: random.Random) -> None:
        for job_id in self.some(chance, chance.choice(["dead", "cancelled"])):
            payload = {"file": chance.choice(FILES), "n": 1} if chance.random() < 0.3 else None
            with suppress(*EXPECTED):
                self.pgq.replay(job_id, payload=payload)

    def replay_many(self, chance: random.Random) -> None:
        self.pgq.replay(self.some(chance, "dead"))
        self.pgq.replay_where(task=chance.choice([None, "unique", "periodic"]))

    def edit(self, chance: random.Random) -> None:
        for job_id in self.some(chance, chance.choice(["pending", "dead"])):
            with suppress(*EXPECTED):
                self.pgq.edit(job_id, payload={"file": chance.choice(FILES), "n": 1}, priority=chance.randrange(2))

    def delete(self, chance: random.Random) -> None:
        for job_id in self.some(chance, chance.choice(["pending", "dead", "completed"])):
            with suppress(*EXPECTED):
                self.pgq.delete(job_id)
        if chance.random() < 0.2:
            self.pgq.purge(task=chance.choice([None, "unique", "periodic"]))
        if chance.random() < 0.2:
            self.pgq.prune(older_than=0, statuses=["completed", "dead", "cancelled"])

    def limit(self, chance: random.Random) -> None:
        self.pgq.set_limits(task=chance.choice(["plain", "unique"]), concurrency=chance.choice([None, 2, 5]))
        rate = chance.choice([{"rate": None, "burst": None}, {"rate": 1e4, "burst": 100}])
        self.pgq.set_limits(queue="default", **rate)
        self.pgq.pause("default", duration=0.001)
        self.pgq.resume("default")
        time.sleep(0.05)

    def wait_for_results(self, chance: random.Random) -> None:
        self.pgq.results(self.some(chance, None), timeout=60, return_errors=True)


def test_nobody_deadlocks_with_anybody(pg: PgQueue) -> None:
    pgq = PgQueue(sa.create_engine(pg.url, pool_size=30))
    everybody = Everybody(pgq)
    acts = [
        everybody.enqueue,
        everybody.enqueue_many,
        everybody.consume,
        everybody.cancel,
        everybody.replay,
        everybody.replay_many,
        everybody.edit,
        everybody.delete,
        everybody.limit,
    ]

    with working(pgq, queues={"default": 4}, sweep_interval=0.05):
        everybody.run(SECONDS, *acts)
    pgq.dispose()
    pgq.engine.dispose()

    assert everybody.failures == []
    assert all(everybody.done[act.__name__] for act in acts), everybody.done
    wait_for(lambda: scalar(pg.engine, DEADLOCKS) is not None, "the statistics")
    assert scalar(pg.engine, DEADLOCKS) == 0
    audit.assert_sound(audit.read(pg))
