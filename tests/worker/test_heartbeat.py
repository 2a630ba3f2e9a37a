"""The heartbeat: it keeps the leases of a live worker's jobs whatever they do, and notices when one was lost."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from support import execute, scalar, wait_for
from working import Gate, enqueue, enqueue_many, events, seize, statuses, table, wait_for_status, working

from pgqueue import PgQueue, Retry, Task, Worker, WorkerConfig, current_job, heartbeat, store
from pgqueue.dialect import now
from pgqueue.finishing import Finisher
from pgqueue.heartbeat import Heartbeat

#: Many heartbeats and a lease that no busy machine lets lapse.
ALIVE: dict[str, Any] = {"lease": 20.0, "heartbeat_interval": 0.05}

#: Of workers whose heartbeats are to come too late.
SHORT_LEASE = 1.0

AT_ONCE = Retry(max_retries=3, backoff="constant", base=0.0, jitter=False)


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Open at the end of the test, so that no thread waits behind it."""
    gate = Gate()
    yield gate
    gate.open()


def held_up(pgq: PgQueue, gate: Gate, kind: str) -> Task[..., Any]:
    """A task that waits for the gate: each kind keeps something else from running meanwhile."""

    def blocks_its_thread() -> int:
        gate.pass_through()
        return current_job().attempt

    async def waits_in_the_loop() -> int:
        await gate.pass_through_async()
        return current_job().attempt

    async def blocks_the_loop() -> int:
        gate.pass_through()
        return current_job().attempt

    def computes() -> int:
        gate.came += 1
        while not gate.is_open:
            sum(range(10_000))
        return current_job().attempt

    functions: dict[str, Callable[..., Any]] = {
        "def": blocks_its_thread,
        "async def": waits_in_the_loop,
        "blocked loop": blocks_the_loop,
        "computing": computes,
    }
    return pgq.task(name="held_up", retry=AT_ONCE)(functions[kind])


def lease_end(pgq: PgQueue, job_id: int) -> str | None:
    """When the lease of a job ends, as the database writes it."""
    end: str | None = scalar(pgq.engine, f"SELECT claim_expires_at FROM {table(pgq, 'jobs')} WHERE id = :id", id=job_id)
    return end


@contextmanager
def silent_worker(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, heartbeats: int = 0, **settings: Any
) -> Iterator[Worker]:
    """A worker with one slot, of whose heartbeats only the first so many reach the database."""
    silent = Worker(
        pgq,
        WorkerConfig(
            **{
                "queues": {"default": 1},
                "lease": SHORT_LEASE,
                "sweep_interval": 0.05,
                "poll_interval": 0.05,
                **settings,
            }
        ),
    )
    beat, tried = Heartbeat._beat, itertools.count(1)

    def fail_for_this_worker(heartbeat: Heartbeat, connection: sa.Connection) -> None:
        # The whole of it: what fails after the leases are extended is tried again, and extends them again.
        if heartbeat is silent._heartbeat and next(tried) > heartbeats:
            raise sa.exc.OperationalError("UPDATE", {}, ConnectionError("no answer"))
        beat(heartbeat, connection)

    monkeypatch.setattr(Heartbeat, "_beat", fail_for_this_worker)
    with silent:
        yield silent


def lease_is_over(pgq: PgQueue, job_id: int) -> bool:
    jobs = pgq.tables.jobs.c
    with pgq.begin() as connection:
        return bool(connection.scalar(sa.select(jobs.claim_expires_at < now()).where(jobs.id == job_id)))


# Kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["def", "async def", "blocked loop", "computing"])
def test_the_lease_of_a_job_is_extended_whatever_its_task_blocks(pgq: PgQueue, gate: Gate, kind: str) -> None:
    job_id = enqueue(held_up(pgq, gate, kind))

    with working(pgq, **ALIVE) as worker:
        wait_for(lambda: gate.came, "the job to run")
        ends = set()
        wait_for(lambda: ends.add(lease_end(pgq, job_id)) or len(ends) >= 5, "the lease to be extended four times")
        gate.open()
        job = wait_for_status(pgq, job_id, "completed")

    assert (job.attempt, job.result, job.retries) == (1, 1, 0)
    assert (worker.report.swept, worker.report.lost) == (0, 0)


def test_the_leases_of_jobs_in_the_buffer_are_extended_as_well(pgq: PgQueue, gate: Gate) -> None:
    first, *others = enqueue_many(held_up(pgq, gate, "def"), 4)

    with working(pgq, queues={"default": 1}, prefetch=5, **ALIVE) as worker:
        wait_for(lambda: statuses(pgq) == {"running": 4}, "all jobs to be claimed")
        ends = set()
        wait_for(lambda: ends.add(lease_end(pgq, others[-1])) or len(ends) >= 5, "the lease to be extended four times")
        gate.open()
        wait_for(lambda: statuses(pgq) == {"completed": 4}, "all jobs to complete")

    assert [pgq.get_job(job_id).attempt for job_id in (first, *others)] == [1, 1, 1, 1]
    assert (worker.report.swept, worker.report.lost) == (0, 0)


def test_the_leases_of_many_jobs_are_extended_some_at_a_time(
    pgq: PgQueue, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being extended cannot be finished meanwhile."""
    extend, at_once = store.extend, []

    def note(connection: sa.Connection, tables: Any, claims: Any, **settings: Any) -> dict[int, bool]:
        at_once.append((len(list(claims)), connection.get_transaction()))
        return extend(connection, tables, claims, **settings)

    monkeypatch.setattr(heartbeat, "EXTEND_JOBS_MAX", 2)
    monkeypatch.setattr(store, "extend", note)
    jobs = enqueue_many(held_up(pgq, gate, "def"), 5)

    with working(pgq, queues={"default": 1}, prefetch=5, **ALIVE) as worker:
        wait_for(lambda: statuses(pgq) == {"running": 5}, "all jobs to be claimed")
        before = [lease_end(pgq, job_id) for job_id in jobs]
        wait_for(
            lambda: all(lease_end(pgq, job_id) > end for job_id, end in zip(jobs, before, strict=True)),
            "all leases to be extended",
        )
        gate.open()
        wait_for(lambda: statuses(pgq) == {"completed": 5}, "all jobs to complete")

    assert max(count for count, _ in at_once) == 2
    assert len({id(transaction) for _, transaction in at_once}) == len(at_once)
    assert (worker.report.swept, worker.report.lost) == (0, 0)


def test_a_process_that_stood_still_longer_than_the_lease_does_not_sweep_its_own_jobs(pgq: PgQueue) -> None:
    """No thread runs while C code holds the GIL: neither the heartbeat nor the sweep."""

    @pgq.task
    def holds_the_gil() -> int:
        ctypes.PyDLL(None).usleep(int(1.5 * SHORT_LEASE * 1_000_000))
        return current_job().attempt

    job_id = enqueue(holds_the_gil)

    with working(pgq, lease=SHORT_LEASE, sweep_interval=0.01) as worker:
        job = wait_for_status(pgq, job_id, "completed")

    assert (job.attempt, job.retries, job.result) == (1, 0, 1)
    assert (worker.report.completed, worker.report.swept, worker.report.lost) == (1, 0, 0)


def test_a_sweep_that_was_under_way_when_its_process_froze_is_taken_back(
    pgq: PgQueue, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen between its decision to sweep and the look for jobs: only once the lease is over does that begin."""
    sweep, upkeep = store.sweep, store.upkeep
    job_id = enqueue(held_up(pgq, gate, "def"))
    frozen: list[bool] = []
    swept: list[store.SweepResult] = []

    def look_late(*arguments: Any) -> Any:
        if gate.inside and not frozen:
            over = time.monotonic() + SHORT_LEASE + 0.05
            wait_for(lambda: time.monotonic() > over, "the lease to end")
            frozen.append(True)
        return upkeep(*arguments)

    def no_answer(*_: Any, **settings: Any) -> None:
        raise sa.exc.OperationalError("UPDATE", {}, ConnectionError("no answer"))

    def note(*arguments: Any, **settings: Any) -> store.SweepResult:
        result = sweep(*arguments, **settings)
        if frozen:
            swept.append(result)
        return result

    monkeypatch.setattr(store, "upkeep", look_late)
    monkeypatch.setattr(store, "sweep", note)
    monkeypatch.setattr(store, "extend", no_answer)  # nor does a heartbeat lock the job, which the sweep would skip
    with silent_worker(pgq, monkeypatch) as worker:
        wait_for(lambda: swept, "the sweep")
        gate.open()
        job = wait_for_status(pgq, job_id, "completed")

    assert swept[0].count == 1
    assert (job.attempt, job.retries) == (1, 0)
    assert worker.report.swept == 0


def test_a_worker_is_listed_with_what_it_does_and_when_it_was_last_heard_of(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    with working(pgq, queues={"a": 1, "b": 2}, **ALIVE) as worker:
        (row,) = wait_for(pgq.workers, "the worker to be listed")
        later = wait_for(
            lambda: [again for again in pgq.workers() if again["heartbeat_at"] > row["heartbeat_at"]], "a heartbeat"
        )

    assert (row["id"], row["host"], row["pid"]) == (worker.id, socket.gethostname(), os.getpid())
    assert (row["queues"], row["tasks"]) == ({"a": 1, "b": 2}, ["works"])
    assert later[0]["started_at"] == row["started_at"]


# Lost ------------------------------------------------------------------------------------------------------


def test_an_async_task_whose_claim_was_lost_is_stopped(pgq: PgQueue, caplog: pytest.LogCaptureFixture) -> None:
    began, cancelled = threading.Event(), threading.Event()

    @pgq.task
    async def endless() -> None:
        began.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    job_id = enqueue(endless)

    with working(pgq, **ALIVE) as worker:
        wait_for(began.is_set, "the job to run")
        seize(pgq, job_id)
        wait_for(cancelled.is_set, "the task to be cancelled")
        wait_for(lambda: worker._slots["default"].running == 0, "its slot to be free")

    job = pgq.get_job(job_id)
    assert (job.status, job.retries) == ("pending", 0)
    assert events(pgq, job_id) == []
    assert (worker.report.lost, worker.report.released) == (1, 0)
    assert f"claim lost: job {job_id} (task endless) was taken from this worker" in caplog.text


def test_the_outcome_of_a_task_whose_claim_was_lost_is_refused(
    pgq: PgQueue, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = enqueue(held_up(pgq, gate, "def"))

    with working(pgq, **ALIVE) as worker:
        wait_for(lambda: gate.inside, "the job to run")
        seize(pgq, job_id)
        wait_for(lambda: worker.report.lost, "the loss to be noticed")
        gate.open()
        wait_for(lambda: "changes nothing" in caplog.text, "the outcome to be refused")

    job = pgq.get_job(job_id)
    assert (job.status, job.result, job.finished_at) == ("pending", None, None)
    assert (worker.report.lost, worker.report.completed) == (1, 0)


def test_a_job_that_was_lost_while_it_waited_in_the_buffer_is_not_started(pgq: PgQueue, gate: Gate) -> None:
    ran = []

    @pgq.task
    def work(n: int) -> None:
        ran.append(n)
        gate.pass_through()

    enqueue(work, n=1)
    taken, left = enqueue(work, n=2), enqueue(work, n=3)

    with working(pgq, queues={"default": 1}, prefetch=5, **ALIVE) as worker:
        wait_for(lambda: statuses(pgq) == {"running": 3} and ran, "all jobs to be claimed")
        seize(pgq, taken)
        wait_for(lambda: worker.report.lost, "the loss to be noticed")
        gate.open()
        wait_for_status(pgq, left, "completed")

    assert ran == [1, 3]
    assert (worker.report.lost, worker.report.completed) == (1, 2)


def test_a_job_that_the_operator_cancels_by_force_is_lost_to_its_worker(pgq: PgQueue, gate: Gate) -> None:
    job_id = enqueue(held_up(pgq, gate, "async def"))

    with working(pgq, **ALIVE) as worker:
        wait_for(lambda: gate.inside, "the job to run")
        pgq.cancel(job_id, force=True)
        wait_for(lambda: worker._slots["default"].running == 0, "the task to be stopped")

    assert pgq.get_job(job_id).status == "cancelled"
    assert events(pgq, job_id) == ["cancel"]


@pytest.mark.parametrize("drain", [False, True])
def test_a_job_that_its_worker_lost_and_claimed_again_counts_for_the_second_attempt_only(
    pgq: PgQueue, gate: Gate, drain: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Taken away and free again before a heartbeat noticed."""

    @pgq.task
    def work() -> int:
        if current_job().attempt == 1:
            gate.pass_through()
        return current_job().attempt

    job_id = enqueue(work)

    with working(pgq, lease=60.0, heartbeat_interval=30.0, drain=drain) as worker:
        wait_for(lambda: gate.inside, "the job to run")
        wait_for(pgq.workers, "the only heartbeat")
        seize(pgq, job_id)
        execute(pgq.engine, f"UPDATE {table(pgq, 'jobs')} SET run_at = created_at WHERE id = :id", id=job_id)
        wait_for(lambda: worker.report.completed, "the second attempt")
        gate.open()
        wait_for(lambda: "changes nothing" in caplog.text, "the first outcome to be refused")

    job = pgq.get_job(job_id)
    assert (job.status, job.attempt, job.result) == ("completed", 2, 2)
    assert (worker.report.completed, worker.report.lost) == (1, 1)


# No heartbeat gets through ---------------------------------------------------------------------------------


def test_a_job_whose_worker_gives_no_sign_of_life_is_swept_and_its_late_outcome_refused(
    pgq: PgQueue, url: str, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> int:
        if current_job().attempt == 1:
            gate.pass_through()
        return current_job().attempt

    job_id = enqueue(pgq.task(retry=AT_ONCE)(work))
    other = PgQueue(url)
    other.task(retry=AT_ONCE)(work)

    with silent_worker(pgq, monkeypatch) as silent:
        wait_for(lambda: gate.inside, "the job to run")
        with working(other, sweep_interval=0.05) as sweeper:
            finished_at = wait_for_status(pgq, job_id, "completed").finished_at
            gate.open()
            wait_for(lambda: "changes nothing" in caplog.text, "the late outcome to be refused")
    other.dispose()

    job = pgq.get_job(job_id)
    assert (job.status, job.attempt, job.result, job.finished_at) == ("completed", 2, 2, finished_at)
    assert [event["reason"] for event in pgq.job_events(job_id)] == [f"the lease of {silent.id} ran out"]
    assert (sweeper.report.swept, sweeper.report.completed) == (1, 1)
    assert (silent.report.swept, silent.report.completed, silent.report.lost) == (0, 0, 1)


@pytest.mark.parametrize("heartbeats", [0, 2])
def test_a_job_is_given_back_unstarted_when_its_lease_may_be_over(
    pgq: PgQueue, gate: Gate, monkeypatch: pytest.MonkeyPatch, heartbeats: int
) -> None:
    first, second = enqueue_many(held_up(pgq, gate, "def"), 2)

    with silent_worker(pgq, monkeypatch, heartbeats, prefetch=5) as silent:
        wait_for(lambda: gate.inside and statuses(pgq) == {"running": 2}, "both jobs to be claimed")
        wait_for(lambda: lease_is_over(pgq, second), "the lease to end")
        gate.open()
        wait_for(lambda: statuses(pgq) == {"completed": 2}, "both jobs to complete")

    assert (pgq.get_job(first).attempt, pgq.get_job(first).result) == (1, 1)  # nobody had taken it
    assert (pgq.get_job(second).attempt, pgq.get_job(second).result, pgq.get_job(second).retries) == (2, 2, 0)
    assert [event["reason"] for event in pgq.job_events(second)] == ["its lease may have run out before it was started"]
    assert (silent.report.completed, silent.report.released, silent.report.lost) == (2, 1, 0)


def test_a_heartbeat_takes_nothing_for_lost_whose_end_is_just_being_written(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The end is committed, so that the claim is over, but the worker has not let go of the job yet."""
    beats = 0
    beat, settle = store.beat, Finisher.settle

    def count_beats(*arguments: Any) -> None:
        nonlocal beats
        beat(*arguments)
        beats += 1

    def settle_after_two_heartbeats(*arguments: Any) -> None:
        before = beats
        wait_for(lambda: beats >= before + 2, "two heartbeats")
        settle(*arguments)

    monkeypatch.setattr(store, "beat", count_beats)
    monkeypatch.setattr(Finisher, "settle", settle_after_two_heartbeats)

    @pgq.task
    def work() -> None: ...

    enqueue(work)

    with working(pgq, **ALIVE) as worker:
        wait_for(lambda: worker.report.completed, "the job to be settled")

    assert worker.report.lost == 0
    assert "claim lost" not in caplog.text
