"""Many at once on PostgreSQL: each job to one claimer, no deadlock, nothing lost, whatever else goes on."""

from __future__ import annotations

import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import audit
import sqlalchemy as sa
from jobs import add, age, claim, expire, external, make_due, statuses, sweep
from support import scalar, wait_for

from pgqueue import (
    ClaimedJob,
    ClaimLost,
    DuplicateJob,
    IllegalTransition,
    JobNotFound,
    OnConflict,
    PgQueue,
)

CLAIMERS = 16
JOBS = 2_000


def run_together(works: Sequence[Callable[[], None]]) -> None:
    """All at once, each in a thread of its own and so with a connection of its own; raises what any of them raised."""
    ready = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        ready.wait()
        work()

    with ThreadPoolExecutor(len(works)) as threads:
        for future in [threads.submit(run, work) for work in works]:
            future.result()


def assert_no_deadlock(pg: PgQueue) -> None:
    """Each victim got an error as well; this also counts those that something has caught and tried again."""
    pg.dispose()
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    wait_for(lambda: scalar(pg.engine, others) == 0, "the connections to end, which report what they counted")
    assert scalar(pg.engine, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0


def test_deadlocks_are_counted(pg: PgQueue) -> None:
    """Guards the others: what they ask for can be seen."""
    first, second = add(pg, 2)
    jobs = pg.tables.jobs
    has_first = threading.Barrier(2)

    def lock(one: int, other: int) -> None:
        with pg.begin() as connection:
            connection.execute(sa.select(jobs).where(jobs.c.id == one).with_for_update())
            has_first.wait()
            connection.execute(sa.select(jobs).where(jobs.c.id == other).with_for_update())

    try:
        run_together([lambda: lock(first, second), lambda: lock(second, first)])
    except sa.exc.OperationalError as error:
        assert getattr(error.orig, "sqlstate", None) == "40P01"  # noqa: PT017

    pg.dispose()
    counted = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    wait_for(lambda: scalar(pg.engine, counted) == 1, "the deadlock to be counted")


def test_many_claimers_take_every_job_once_and_never_more_than_their_limit(pg: PgQueue) -> None:
    ids = [*add(pg, JOBS // 2), *add(pg, JOBS // 2, priority=1)]
    claims: list[tuple[int, list[ClaimedJob]]] = []

    def claim_all(number: int) -> Callable[[], None]:
        def work() -> None:
            limits = random.Random(number)
            while True:
                limit = limits.randint(1, 40)
                jobs = claim(pg, limit=limit, worker=f"worker-{number}")
                claims.append((limit, jobs))
                if not jobs:
                    return

        return work

    run_together([claim_all(number) for number in range(CLAIMERS)])

    assert [(limit, len(jobs)) for limit, jobs in claims if len(jobs) > limit] == []
    assert sorted(job.id for _, jobs in claims for job in jobs) == ids
    assert_rows_are_held_by(pg, [job for _, jobs in claims for job in jobs])
    assert_no_deadlock(pg)


def assert_rows_are_held_by(pg: PgQueue, claims: Sequence[ClaimedJob]) -> None:
    held = {(row.id, row.claim_token, row.claimed_by) for row in audit.read(pg).jobs if row.status == "running"}
    assert held == {(job.id, job.claim_token, job.claimed_by) for job in claims}


def test_sweeps_and_extensions_beside_many_claimers_take_no_live_claim(pg: PgQueue) -> None:
    ids = add(pg, JOBS)
    claims: list[ClaimedJob] = []
    is_over = threading.Event()
    all_have_ended = threading.Barrier(CLAIMERS, action=is_over.set)

    def claim_all(number: int) -> Callable[[], None]:
        def work() -> None:
            try:
                while jobs := pg.claim(f"worker-{number}", limit=1 + number, lease=60):
                    claims.extend(jobs)
                    pg.extend(jobs, lease=120)
            finally:
                all_have_ended.wait()

        return work

    def sweep_all() -> None:
        while not is_over.wait(0.001):
            assert sweep(pg).count == 0

    def extend_all() -> None:
        while not is_over.wait(0.001):
            pg.extend(list(claims), lease=120)

    run_together([*[claim_all(number) for number in range(CLAIMERS)], sweep_all, sweep_all, extend_all])

    assert sorted(job.id for job in claims) == ids
    assert_rows_are_held_by(pg, claims)
    assert audit.read(pg).events == {}
    assert_no_deadlock(pg)


def test_jobs_whose_leases_run_out_under_many_claimers_are_claimed_as_often_as_counted(pg: PgQueue) -> None:
    """Every claim is the present one of its job, or was taken by exactly one recorded sweep."""
    ids = add(pg, 300, max_retries=1_000)
    claims: list[ClaimedJob] = []

    def claim_some(number: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(25):
                jobs = pg.claim(f"worker-{number}", limit=10)
                claims.extend(jobs)
                if number % 2:
                    expire_quietly(pg, jobs)

        return work

    run_together([claim_some(number) for number in range(CLAIMERS)])

    stored = audit.read(pg)
    audit.assert_sound(stored)
    assert len({(job.id, job.claim_token) for job in claims}) == len(claims)
    assert Counter(job.id for job in claims) == Counter({row.id: row.attempt for row in stored.jobs if row.attempt})
    assert {row.id for row in stored.jobs} == set(ids)
    tokens = {(job.id, job.claim_token) for job in claims}
    assert all((row.id, row.claim_token) in tokens for row in stored.jobs if row.status == "running")
    assert len(claims) > len(ids), "no job was claimed twice: this has tested nothing"
    assert_no_deadlock(pg)


def expire_quietly(pg: PgQueue, claims: Sequence[ClaimedJob]) -> None:
    """Let leases run out without waiting for anybody, as time does."""
    jobs = pg.tables.jobs
    with pg.begin() as connection:
        free = connection.scalars(
            sa.select(jobs.c.id)
            .where(jobs.c.id.in_([job.id for job in claims]), jobs.c.status == "running")
            .with_for_update(skip_locked=True)
        ).all()
        connection.execute(
            sa.update(jobs).where(jobs.c.id.in_(free)).values(claim_expires_at=sa.text("now() - interval '1 minute'"))
        )


class Mixture:
    """A consumer and operator that does all there is to do with jobs, in a random order.

    The claims it ends are its own: current ones, lost ones, and such as others are just sweeping or cancelling.
    """

    def __init__(self, pg: PgQueue, number: int, ids: list[int]) -> None:
        self.pg = pg
        self.ids = ids  # of all jobs, shared by everybody
        self.claims: list[ClaimedJob] = []
        self.random = random.Random(number)
        self.name = f"somebody-{number}"
        self.calls = [
            *[self.claim] * 4,
            *[self.ack, self.nack, self.extend] * 3,
            *[self.expire, self.sweep, self.cancel, self.replay, self.enqueue, self.replace] * 2,
            *[self.delete, self.prune, self.make_due, self.pause],
        ]
        self.made: Counter[str] = Counter()

    def work(self) -> None:
        for _ in range(100):
            call = self.random.choice(self.calls)
            try:
                call()
            except (ClaimLost, DuplicateJob, IllegalTransition, JobNotFound):
                self.made["refused"] += 1
            else:
                self.made[call.__name__] += 1

    def some_claims(self) -> list[ClaimedJob]:
        latest = self.claims[-40:]
        return self.random.sample(latest, min(len(latest), 20))

    def some_job(self) -> int:
        return self.random.choice(self.ids[-100:])

    def claim(self) -> None:
        limit = self.random.randint(1, 30)
        jobs = self.pg.claim(self.name, limit=limit)
        assert len(jobs) <= limit
        self.claims.extend(jobs)

    def ack(self) -> None:
        self.pg.ack(self.some_claims(), result=1)

    def nack(self) -> None:
        self.pg.nack(self.some_claims(), delay=0, error=self.random.choice([None, "no"]))

    def extend(self) -> None:
        self.pg.extend(self.some_claims())

    def expire(self) -> None:
        expire_quietly(self.pg, self.some_claims())

    def sweep(self) -> None:
        sweep(self.pg, limit=self.random.randint(1, 50))

    def cancel(self) -> None:
        self.pg.cancel(self.some_job())

    def replay(self) -> None:
        # Of any jobs hardly one would be cancelled and not yet pruned.
        cancelled = [job.id for job in self.pg.list_jobs(status="cancelled", limit=20)]
        self.pg.replay(self.random.choice(cancelled or self.ids))

    def delete(self) -> None:
        self.pg.delete(self.some_job())

    def prune(self) -> None:
        self.pg.prune(older_than=0, statuses=["completed", "dead", "cancelled"])

    def enqueue(self) -> None:
        self.ids.extend(add(self.pg, 10, max_retries=2))

    def replace(self) -> None:
        key = f"key-{self.random.randrange(5)}"
        with self.pg.begin() as connection:
            made = external(self.pg).using(unique_key=key, on_conflict=self.random.choice(list(OnConflict)))
            self.ids.append(made.enqueue(connection, n=1).id)

    def make_due(self) -> None:
        with self.pg.begin() as connection:
            connection.execute(
                sa.text(
                    "UPDATE pgqueue.jobs SET run_at = now() WHERE id IN"
                    " (SELECT id FROM pgqueue.jobs WHERE status = 'pending' FOR UPDATE SKIP LOCKED)"
                )
            )

    def pause(self) -> None:
        self.pg.pause("default")
        self.pg.resume("default")


def test_everything_at_once_neither_deadlocks_nor_loses_anything(pg: PgQueue) -> None:
    ids = add(pg, 200)
    everybody = [Mixture(pg, number, ids) for number in range(12)]

    run_together([somebody.work for somebody in everybody])

    audit.assert_sound(audit.read(pg))
    made = sum((somebody.made for somebody in everybody), Counter())
    assert set(made) == {call.__name__ for call in everybody[0].calls} | {"refused"}
    assert_no_deadlock(pg)


def test_after_everything_at_once_what_is_left_can_be_worked_off(pg: PgQueue) -> None:
    """No job is stuck in a state that nothing leads out of."""
    ids = add(pg, 100)
    run_together([Mixture(pg, 100 + number, ids).work for number in range(6)])

    expire(pg)
    sweep(pg, limit=100_000)
    make_due(pg)
    while jobs := pg.claim("last", limit=1_000):
        pg.ack(jobs)
    assert not {"pending", "running"} & set(statuses(pg).values())

    age(pg, seconds_ago=60)
    pg.prune(older_than=0, statuses=["completed", "dead", "cancelled"])
    assert statuses(pg) == {}


def test_a_unique_key_is_held_by_one_job_however_many_enqueue_claim_and_finish(pg: PgQueue) -> None:
    inserted: list[int] = []
    enqueuers = 8
    left = threading.Semaphore(0)

    def enqueue_often() -> None:
        try:
            for _ in range(40):
                with pg.begin() as connection:
                    made = external(pg).using(unique_key="k").enqueue(connection, n=1)
                if made.inserted:
                    inserted.append(made.id)
        finally:
            left.release()

    def work_off() -> None:
        finished = 0
        while finished < enqueuers:
            jobs = pg.claim(f"worker-{uuid.uuid4()}", limit=5)
            assert len(jobs) <= 1, "two open jobs had the same key"
            pg.ack(jobs)
            if not jobs and left.acquire(blocking=False):
                finished += 1

    run_together([*[enqueue_often] * enqueuers, work_off])

    assert len(inserted) == len(set(inserted)) > 1
    assert set(statuses(pg)) == set(inserted)
    assert_no_deadlock(pg)
