"""A running job that somebody wants stopped: its worker is told, and stops it as far as its kind allows."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import audit
import pytest
import sqlalchemy as sa
from jobs import add, add_one, claim_one, expire, row, sweep
from support import wait_for
from working import Gate, enqueue, enqueue_many, events, statuses, wait_for_status, working

from pgqueue import Cancel, Discard, IllegalTransition, JobStatus, PgQueue, Retry, Snooze, current_job, heartbeat, store

#: Without a notification, a worker looks so often.
LOOK_SECONDS = 0.05


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", LOOK_SECONDS)


def wait_for_request() -> None:
    """Inside a `def` task."""
    job = current_job()
    wait_for(lambda: job.cancel_requested, "the request", every=0.002)


# Asking ----------------------------------------------------------------------------------------------------


def test_a_request_is_recorded_once_and_the_job_runs_on(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    job = claim_one(pgq)

    said = [pgq.cancel(job_id, actor="cli:ann", reason="ordered twice"), pgq.cancel(job_id)]

    stored = row(pgq, job_id)
    assert said == [JobStatus.RUNNING, JobStatus.RUNNING]
    assert (stored.status, stored.claim_token) == ("running", job.claim_token)
    assert stored.cancel_requested_at is not None
    (event,) = pgq.job_events(job_id)
    assert (event["event"], event["actor"], event["reason"]) == ("cancel_requested", "cli:ann", "ordered twice")
    assert (event["from_status"], event["to_status"], event["attempt"]) == ("running", "running", 1)


def test_a_pending_job_is_cancelled_at_once(pgq: PgQueue) -> None:
    job_id = add_one(pgq)

    assert pgq.cancel(job_id) is JobStatus.CANCELLED
    assert events(pgq, job_id) == ["cancel"]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (lambda pgq, job: pgq.ack(job, result=1), ("completed", ["cancel_requested"])),
        (lambda pgq, job: pgq.nack(job), ("cancelled", ["cancel_requested", "cancel"])),
        (lambda pgq, job: pgq.nack(job, delay=5), ("cancelled", ["cancel_requested", "cancel"])),
        (lambda pgq, job: pgq.nack(job, error="no"), ("cancelled", ["cancel_requested", "cancel"])),
        (lambda pgq, job: pgq.nack(job, dead=True), ("cancelled", ["cancel_requested", "cancel"])),
        (lambda pgq, job: (expire(pgq), sweep(pgq)), ("cancelled", ["cancel_requested", "sweep"])),
        (lambda pgq, job: pgq.cancel(job.id, force=True), ("cancelled", ["cancel_requested", "cancel"])),
    ],
    ids=["ack", "nack", "nack with a delay", "nack with an error", "nack as dead", "sweep", "force"],
)
def test_after_a_request_only_a_completion_keeps_a_job_from_being_cancelled(
    pgq: PgQueue, end: Callable[[PgQueue, Any], object], expected: tuple[str, list[str]]
) -> None:
    job_id = add_one(pgq)
    job = claim_one(pgq)
    pgq.cancel(job_id)

    end(pgq, job)

    stored = row(pgq, job_id)
    assert (stored.status, events(pgq, job_id)) == expected
    assert (stored.retries, stored.run_at == job.run_at, stored.claim_token) == (0, True, None)
    audit.assert_sound(audit.read(pgq))


def test_a_cancelled_job_that_is_replayed_is_not_asked_to_stop_again(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    pgq.cancel(claim_one(pgq).id)
    expire(pgq)
    sweep(pgq)

    pgq.replay(job_id)
    pgq.nack(claim_one(pgq))

    assert row(pgq, job_id).status == "pending"


def test_a_consumer_learns_of_a_request_when_it_extends_its_lease(pgq: PgQueue) -> None:
    add(pgq, 2)
    jobs = pgq.claim("consumer", limit=2)
    before = [job.cancel_requested for job in jobs]
    pgq.cancel(jobs[0].id)

    pgq.extend(jobs)

    assert before == [False, False]
    assert [job.cancel_requested for job in jobs] == [True, False]


def test_a_claim_whose_answer_was_lost_is_given_back_as_cancelled_when_it_was_to_be_stopped(pgq: PgQueue) -> None:
    asked, other = add(pgq, 2)
    jobs = pgq.claim("consumer", limit=2)
    pgq.cancel(asked)

    with pgq.begin() as connection:
        store.release_claim(connection, pgq.tables, jobs[0].claim_token, actor="w")

    assert (row(pgq, asked).status, row(pgq, other).status) == ("cancelled", "pending")
    assert (events(pgq, asked), events(pgq, other)) == (["cancel_requested", "cancel"], ["release"])
    audit.assert_sound(audit.read(pgq))


# The worker stops it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("listen", [True, False])
def test_an_async_task_is_cancelled_at_its_next_await(
    pgq: PgQueue, gate: Gate, listen: bool, timeout: float | None
) -> None:
    seen = []

    @pgq.task(timeout=timeout)
    async def endless() -> None:
        try:
            await gate.pass_through_async()
        finally:
            seen.append(current_job().cancel_requested)

    job_id = enqueue(endless)

    with working(pgq, listen=listen) as running:
        wait_for(lambda: gate.inside, "the job to run")
        assert pgq.cancel(job_id, reason="not wanted") is JobStatus.RUNNING
        job = wait_for_status(pgq, job_id, "cancelled")

    assert seen == [True]
    assert (job.attempt, job.retries, job.cancel_requested_at) == (1, 0, None)
    assert [(event["event"], event["reason"]) for event in pgq.job_events(job_id)] == [
        ("cancel_requested", "not wanted"),
        ("cancel", "it was asked to stop"),
    ]
    assert (running.report.cancelled, running.report.lost) == (1, 0)


def test_an_async_task_in_a_transaction_is_rolled_back(pgq: PgQueue, gate: Gate) -> None:
    @pgq.task(transactional=True)
    async def writes(session: Any) -> None:
        await session.execute(sa.delete(pgq.tables.queues))
        await gate.pass_through_async()

    pgq.pause("other")
    job_id = enqueue(writes)

    with working(pgq):
        wait_for(lambda: gate.inside, "the job to run")
        if pgq.engine.dialect.name == "sqlite":
            gate.open()  # its transaction keeps everybody else from writing, the request among them
            wait_for_status(pgq, job_id, "completed")
            return
        pgq.cancel(job_id)
        wait_for_status(pgq, job_id, "cancelled")

    assert [summary.queue for summary in pgq.queues() if summary.paused] == ["other"]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_an_async_task_that_comes_to_its_end_all_the_same_is_completed(
    pgq: PgQueue, gate: Gate, timeout: float | None
) -> None:
    @pgq.task(timeout=timeout)
    async def stubborn() -> str:
        try:
            await gate.pass_through_async()
        except asyncio.CancelledError:
            return "done all the same"
        return "never"

    job_id = enqueue(stubborn)

    with working(pgq) as running:
        wait_for(lambda: gate.inside, "the job to run")
        pgq.cancel(job_id)
        job = wait_for_status(pgq, job_id, "completed")

    assert job.result == "done all the same"
    assert job.cancel_requested_at is not None
    assert events(pgq, job_id) == ["cancel_requested"]
    assert (running.report.completed, running.report.cancelled) == (1, 0)


ENDINGS: dict[str, Any] = {
    "error": ValueError("half done"),
    "snooze": Snooze(60),
    "discard": Discard("no"),
    "cancel": Cancel("stopping"),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_a_task_in_a_thread_sees_the_request_and_whatever_it_raises_then_cancels_its_job(
    pgq: PgQueue, gate: Gate, how: str
) -> None:
    @pgq.task(retry=Retry(max_retries=5, base=0))
    def looks() -> None:
        gate.came += 1
        wait_for_request()
        raise ENDINGS[how]

    job_id = enqueue(looks)

    with working(pgq) as running:
        wait_for(lambda: gate.came, "the job to run")
        pgq.cancel(job_id)
        job = wait_for_status(pgq, job_id, "cancelled")

    assert (job.attempt, job.retries) == (1, 0)
    assert events(pgq, job_id) == ["cancel_requested", "cancel"]
    assert (running.report.cancelled, running.report.retried, running.report.dead) == (1, 0, 0)
    if how == "error":
        assert job.error["message"] == "half done"  # type: ignore[index]
        assert pgq.job_events(job_id)[1]["reason"] == "it was asked to stop; its attempt ended with ValueError"


def test_a_task_in_a_thread_that_returns_is_completed(pgq: PgQueue, gate: Gate) -> None:
    @pgq.task
    def looks() -> str:
        gate.came += 1
        wait_for_request()
        return "tidied up"

    job_id = enqueue(looks)

    with working(pgq):
        wait_for(lambda: gate.came, "the job to run")
        pgq.cancel(job_id)
        job = wait_for_status(pgq, job_id, "completed")

    assert job.result == "tidied up"


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_job_that_waits_in_its_workers_buffer_is_not_started(pgq: PgQueue, gate: Gate, kind: str) -> None:
    ran = []

    @pgq.task
    def thread(n: int) -> None:
        ran.append(n)
        gate.pass_through()

    @pgq.task
    async def coroutine(n: int) -> None:
        ran.append(n)
        await gate.pass_through_async()

    task = thread if kind == "def" else coroutine
    ids = [enqueue(task, n=n) for n in range(3)]

    with working(pgq, queues={"default": 1}, prefetch=10) as running:
        wait_for(lambda: ran and statuses(pgq) == {"running": 3}, "all jobs to be claimed")
        pgq.cancel(ids[1])
        wait_for(lambda: running._holds.by_id[ids[1]].job.cancel_requested, "the worker to know")
        gate.open()
        wait_for_status(pgq, ids[1], "cancelled")
        wait_for_status(pgq, ids[2], "completed")

    assert ran == [0, 2]
    assert pgq.job_events(ids[1])[1]["reason"] == "it was asked to stop before it was started"


def test_a_job_that_a_stopping_worker_gives_back_is_cancelled_when_it_was_to_be_stopped(
    pgq: PgQueue, gate: Gate
) -> None:
    @pgq.task
    def deaf() -> None:
        gate.pass_through()

    job_id = enqueue(deaf)

    with working(pgq, shutdown_timeout=0.05) as running:
        wait_for(lambda: gate.inside, "the job to run")
        pgq.cancel(job_id)
    gate.open()

    assert pgq.get_job(job_id).status == "cancelled"
    assert events(pgq, job_id) == ["cancel_requested", "cancel"]
    assert running.report.cancelled == 1


def test_a_worker_that_holds_nothing_does_not_look(pgq: PgQueue, gate: Gate) -> None:
    looks = []

    @sa.event.listens_for(pgq.engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, *_: object) -> None:
        if statement.startswith("SELECT") and "cancel_requested_at IS NOT NULL" in statement:
            looks.append(statement)

    @pgq.task
    def waits() -> None:
        gate.pass_through()

    with working(pgq, listen=False) as running:
        wait_for(lambda: running._heartbeat._next_beat, "a heartbeat")
        time.sleep(4 * LOOK_SECONDS)
        idle = len(looks)
        enqueue(waits)
        wait_for(lambda: looks, "a look")
        gate.open()

    assert idle == 0


def test_a_worker_that_listens_does_not_look_and_finds_out_at_its_next_beat_what_it_was_not_told(
    pg: PgQueue, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    asked_to_stop = store.asked_to_stop

    def note(*arguments: Any, **options: Any) -> Any:
        looks.append(arguments)
        return asked_to_stop(*arguments, **options)

    monkeypatch.setattr(store, "asked_to_stop", note)
    monkeypatch.setattr(heartbeat.Heartbeat, "told_to_stop", lambda *_: None)

    @pg.task
    async def endless() -> None:
        await gate.pass_through_async()

    with working(pg, lease=6.0, heartbeat_interval=0.5) as running:
        wait_for(lambda: running._listens(), "the worker to listen")
        wait_for(lambda: running._heartbeat._next_beat, "a heartbeat")
        looks.clear()  # those from before it listened
        job_id = enqueue(endless)
        wait_for(lambda: gate.inside, "the job to run")
        pg.cancel(job_id)
        wait_for_status(pg, job_id, "cancelled")

    assert looks == []


# Everything at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", [True, False])
def test_requests_that_race_with_every_way_to_end_leave_each_job_with_one_end(pgq: PgQueue, listen: bool) -> None:
    """Jobs of both kinds complete, fail, snooze and look, while others ask them to stop and sweep what they hold."""
    dice = random.Random(7)

    def end(how: str) -> str:
        if how == "fail":
            raise ValueError("no")
        if how == "snooze" and current_job().attempt < 3:
            raise Snooze(0)
        return how

    @pgq.task(retry=Retry(max_retries=2, base=0))
    def thread(how: str, seconds: float) -> str:
        time.sleep(seconds)
        return end(how)

    @pgq.task(retry=Retry(max_retries=2, base=0))
    async def coroutine(how: str, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return end(how)

    ids = []
    for task in (thread, coroutine):
        for how in ("complete", "fail", "snooze"):
            for _ in range(20):
                ids += enqueue_many(task, 1, how=how, seconds=dice.random() / 50)
    over = threading.Event()

    def ask() -> None:
        chosen = ids[:]
        dice.shuffle(chosen)
        for job_id in chosen:
            try:
                pgq.cancel(job_id, force=dice.random() < 0.1)
            except IllegalTransition:
                continue
            time.sleep(dice.random() / 100)

    def lose_leases() -> None:
        while not over.is_set():
            for job_id in dice.sample(ids, 3):  # each in a transaction of its own: no order, no deadlock
                expire(pgq, [job_id])
            sweep(pgq)
            time.sleep(0.02)

    others = [threading.Thread(target=ask), threading.Thread(target=lose_leases)]
    with working(pgq, listen=listen), working(pgq, listen=listen):
        for other in others:
            other.start()
        others[0].join()
        over.set()
        others[1].join()
        wait_for(lambda: not {"pending", "running"} & statuses(pgq).keys(), "all jobs to end")

    stored = audit.read(pgq)
    audit.assert_sound(stored)
    for job in stored.jobs:
        kinds = [event.event for event in stored.events.get(job.id, [])]
        if "cancel_requested" in kinds:
            # Nothing but one end may follow a request.
            assert len(kinds[kinds.index("cancel_requested") + 1 :]) == (job.status == "cancelled"), kinds
            assert job.status in ("completed", "cancelled")
    assert {job.status for job in stored.jobs} >= {"completed", "cancelled"}
