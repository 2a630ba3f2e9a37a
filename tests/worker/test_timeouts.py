"""A `def` task in a thread whose time is over: its attempt ends at once, its thread as soon as it can."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import audit
import pytest
import sqlalchemy as sa
from jobs import claim_one
from sqlalchemy.orm import Session
from support import execute, scalar, wait_for
from working import Gate, drain, enqueue, enqueue_many, events, statuses, table, wait_for_status, working

from pgqueue import PgQueue, Retry, current_job, deadlines, progress, reporting
from pgqueue.deadlines import AttemptTimeout, Deadlines
from pgqueue.events import Subscription
from pgqueue.shield import shielded

AT_ONCE = Retry(max_retries=1, backoff="constant", base=0, jitter=False)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


def spin(seconds: float) -> None:
    """Take time in bytecode."""
    over = time.perf_counter() + seconds
    while time.perf_counter() < over:
        pass


def test_a_task_that_computes_is_stopped_and_retried(pgq: PgQueue) -> None:
    caught: list[str] = []

    @pgq.task(timeout=0.05, retry=AT_ONCE)
    def slow() -> int:
        if current_job().attempt == 1:
            try:
                spin(60)
            except TimeoutError as error:
                caught.append(str(error))
                raise
        return current_job().attempt

    job_id = enqueue(slow)

    report = drain(pgq, queues={"default": 1})

    job = pgq.get_job(job_id)
    assert (job.status, job.result, job.retries) == ("completed", 2, 1)
    assert pgq.job_events(job_id)[0]["error"]["message"] == "the attempt took longer than its timeout of 0.05 s"
    assert caught == ["the attempt took longer than its timeout"]
    assert (report.completed, report.retried, report.lost) == (1, 1, 0)


@pytest.mark.parametrize("how", ["returns", "raises another error"])
def test_what_a_task_does_with_the_exception_changes_nothing(pgq: PgQueue, how: str) -> None:
    @pgq.task(timeout=0.02, retry=Retry(max_retries=0))
    def stubborn() -> str:
        try:
            spin(60)
        except TimeoutError:
            if how != "returns":
                raise ValueError("another") from None
        return "done"

    job_id = enqueue(stubborn)

    drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.result, job.error["type"]) == ("dead", None, "TimeoutError")  # type: ignore[index]


def test_the_exception_comes_once_so_that_nested_blocks_of_finally_run_to_their_end(pgq: PgQueue) -> None:
    cleaned: list[str] = []

    @pgq.task(timeout=0.02, retry=Retry(max_retries=0))
    def tidy() -> None:
        try:
            try:
                spin(60)
            finally:
                spin(0.1)
                cleaned.append("inner")
        finally:
            spin(0.1)
            cleaned.append("outer")

    enqueue(tidy)

    drain(pgq)

    assert cleaned == ["inner", "outer"]
    assert statuses(pgq) == {"dead": 1}


def test_a_thread_that_is_stuck_keeps_its_slot_but_not_its_job(
    pgq: PgQueue, gate: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "GRACE_SECONDS", 0.05)
    lock = threading.Lock()
    lock.acquire()

    @pgq.task(timeout=0.05, retry=Retry(max_retries=0))
    def stuck() -> str:
        with lock:  # in C code: no bytecode until the lock is free
            return "too late"

    @pgq.task
    def other() -> None: ...

    first = enqueue(stuck)

    with working(pgq, queues={"default": 1}) as worker:
        job = wait_for_status(pgq, first, "dead")
        second = enqueue(other)
        wait_for(lambda: "its slot stays taken" in caplog.text, "the complaint")
        still_taken = (worker._slots["default"].running, pgq.get_job(second).status)
        lock.release()
        wait_for_status(pgq, second, "completed")

    assert still_taken == (1, "pending")
    assert job.error["type"] == "TimeoutError"  # type: ignore[index]
    assert pgq.get_job(first).status == "dead"
    assert events(pgq, first) == ["dead"]
    assert "its slot is free again" in caplog.text
    assert (worker.report.dead, worker.report.completed, worker.report.lost) == (1, 1, 0)


def test_a_transactional_task_is_rolled_back_at_its_timeout(pg: PgQueue) -> None:
    execute(pg.engine, "CREATE TABLE effects (n integer)")

    @pg.task(timeout=0.2, retry=AT_ONCE, transactional=True)
    def writes(session: Session) -> int:
        attempt = current_job().attempt
        session.execute(sa.text("INSERT INTO effects VALUES (:n)"), {"n": attempt})
        if attempt == 1:
            session.execute(sa.text("SELECT pg_sleep(0.6)"))
            spin(60)
        return attempt

    job_id = enqueue(writes)

    drain(pg)

    assert pg.get_job(job_id).result == 2
    assert scalar(pg.engine, f"SELECT status FROM {table(pg, 'jobs')}") == "completed"
    assert scalar(pg.engine, "SELECT string_agg(n::text, ',') FROM effects") == "2"


def test_a_timeout_can_be_named_by_the_policy(pgq: PgQueue) -> None:
    @pgq.task(timeout=0.02, retry=Retry(discard_on=TimeoutError))
    def slow() -> None:
        spin(60)

    job_id = enqueue(slow)

    drain(pgq)

    assert pgq.get_job(job_id).status == "dead"
    assert pgq.job_events(job_id)[0]["reason"] == "TimeoutError is not to be retried (discard_on)"


def test_a_task_without_a_timeout_starts_no_clock(pgq: PgQueue, gate: Gate) -> None:
    @pgq.task
    def waits() -> None:
        gate.pass_through()

    enqueue(waits)

    with working(pgq) as worker:
        wait_for(lambda: gate.inside, "the job to run")
        clock = worker._runner._deadlines._thread
        gate.open()

    assert clock is None


def test_the_clock_ends_with_its_worker(pgq: PgQueue) -> None:
    @pgq.task(timeout=60)
    def quick() -> None: ...

    enqueue(quick)

    with working(pgq) as worker:
        wait_for(lambda: worker.report.completed, "the job to complete")

    clock = worker._runner._deadlines._thread
    assert clock is not None
    wait_for(lambda: not clock.is_alive(), "the clock to end")


# Never anybody else ----------------------------------------------------------------------------------------


def test_the_exception_strikes_within_the_function_or_not_at_all(pgq: PgQueue) -> None:
    """Functions that end just when their time does, in one thread: whatever runs there afterwards is not disturbed."""
    with pgq.begin() as connection:
        pgq.external_task("work").enqueue(connection)
    job = claim_one(pgq)
    clock = Deadlines()
    dice = random.Random(3)
    expired: list[int] = []
    ended = {"in time": 0, "late": 0}

    def function() -> str:
        try:
            spin(0.001 * dice.uniform(0.5, 2.0))
        except AttemptTimeout:
            return "stopped"
        return "done"

    for number in range(1500):
        before = len(expired)
        result = clock.run(
            job,
            0.001,
            function,
            expired=lambda number=number: expired.append(number),  # type: ignore[misc]
        )
        for _ in range(50):  # bytecode of the worker: a stray exception would surface here
            pass
        late = len(expired) > before
        ended["late" if late else "in time"] += 1
        assert result == (None if late else "done")
    spin(0.05)
    clock.stop()

    assert min(ended.values()) > 0, ended
    assert len(set(expired)) == len(expired)


@pytest.mark.parametrize("work", ["progress", "commit"])
def test_what_pgqueue_does_in_the_tasks_thread_is_not_torn_by_the_timeout(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    whole: list[str] = []

    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            spin(0.2)  # until long after the timeout
            result = function(*arguments)
            whole.append("done")
            return result

        return run

    monkeypatch.setattr(reporting.Reports, "put", slowly(reporting.Reports.put))
    monkeypatch.setattr(Subscription, "_offer", slowly(Subscription._offer))
    later = pgq.external_task("later")

    @pgq.task(timeout=0.1, retry=Retry(max_retries=0))
    def slow() -> None:
        if work == "progress":
            progress(1, 2)
        else:
            with pgq.begin() as connection:
                later.enqueue(connection)
        spin(60)

    heard: list[str] = []
    job_id = enqueue(slow)
    pgq.on("job:enqueued", lambda event: heard.append(event.task))

    drain(pgq)

    assert whole == ["done"]
    assert pgq.get_job(job_id).error["type"] == "TimeoutError"  # type: ignore[index]
    assert ((pgq.get_job(job_id).progress or {}).get("done"), heard) == (
        (1, []) if work == "progress" else (None, ["later"])
    )


def test_a_task_that_has_caught_its_timeout_can_still_report_and_enqueue(pgq: PgQueue) -> None:
    later = pgq.external_task("later")
    went_on: list[bool] = []

    @pgq.task(timeout=0.05, retry=Retry(max_retries=0))
    def stubborn() -> None:
        try:
            spin(60)
        except TimeoutError:
            progress(1, 2)
            with pgq.begin() as connection:
                later.enqueue(connection)
            went_on.append(True)

    enqueue(stubborn)

    drain(pgq)

    assert went_on == [True]
    assert statuses(pgq) == {"dead": 1, "pending": 1}


def test_sections_that_are_shielded_hold_back_the_exception_until_the_outermost_ends(pgq: PgQueue) -> None:
    with pgq.begin() as connection:
        pgq.external_task("work").enqueue(connection)
    job = claim_one(pgq)
    clock = Deadlines()
    reached: list[str] = []

    def function() -> str:
        with shielded():
            with shielded():
                spin(0.05)
            reached.append("the inner end")
            spin(0.05)
            reached.append("the outer end")
        spin(60)
        return "done"

    def stopped() -> str:
        try:
            return function()
        except AttemptTimeout:
            return "stopped"

    results = [clock.run(job, 0.01, stopped, expired=lambda: reached.append("expired")) for _ in range(3)]
    with shielded():  # outside of an attempt it does nothing
        spin(0.02)
    clock.stop()

    assert results == [None] * 3
    assert reached == ["the inner end", "the outer end", "expired"] * 3


def test_no_other_job_of_the_same_slots_is_touched(pgq: PgQueue) -> None:
    @pgq.task(timeout=0.01, retry=Retry(max_retries=0))
    def close_to_it(seconds: float) -> None:
        spin(seconds)

    @pgq.task(retry=Retry(max_retries=0))
    def innocent() -> int:
        return sum(range(2000))

    dice = random.Random(5)
    for _ in range(60):
        enqueue(close_to_it, seconds=0.01 * dice.uniform(0.8, 1.2))
        enqueue_many(innocent, 2)

    report = drain(pgq, queues={"default": 2})

    assert report.lost == report.retried == 0
    assert statuses(pgq).keys() <= {"completed", "dead"}
    jobs: list[Any] = audit.read(pgq).jobs
    assert {job.status for job in jobs if job.task == "innocent"} == {"completed"}
    assert {job.error["type"] for job in jobs if job.status == "dead"} <= {"TimeoutError"}
