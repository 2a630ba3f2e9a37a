"""How a worker ends: stopped, aborted, drained, unable to begin."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import threading
import time
from typing import Any

import pytest
from support import PATIENCE_SECONDS, execute, rows, scalar, wait_for
from working import (
    Gate,
    drain,
    enqueue,
    enqueue_many,
    events,
    statuses,
    table,
    wait_for_status,
    working,
)

from pgqueue import (
    ClaimedJob,
    ConfigurationError,
    PgQueue,
    Retry,
    SchemaMissing,
    Snooze,
    Worker,
    WorkerConfig,
    current_job,
    store,
)


@pytest.fixture
def gate() -> Any:
    """Open at the end of the test, so that no thread waits behind it."""
    gate = Gate()
    yield gate
    gate.open()


def own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("pgqueue-")}


# Stop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_running_jobs_end_before_a_stopped_worker_does(pgq: PgQueue, gate: Gate, kind: str) -> None:
    def held_up() -> int:
        gate.pass_through()
        return 1

    async def held_up_async() -> int:
        await gate.pass_through_async()
        return 1

    task = pgq.task(name="held_up")(held_up if kind == "def" else held_up_async)
    ids = enqueue_many(task, 2)

    with working(pgq) as worker:
        wait_for(lambda: gate.inside == 2, "both jobs to run")
        worker.stop()
        wait_for(lambda: worker.stopping, "the worker to stop")
        gate.open()
        report = worker.join(PATIENCE_SECONDS)

    assert [pgq.get_job(job_id).status for job_id in ids] == ["completed", "completed"]
    assert (report.completed, report.released) == (2, 0)


def test_jobs_that_were_not_started_are_given_back_uncharged(pgq: PgQueue, gate: Gate) -> None:
    @pgq.task
    def held_up() -> None:
        gate.pass_through()

    enqueue_many(held_up, 10)

    with working(pgq, queues={"default": 2}, prefetch=10) as worker:
        wait_for(lambda: gate.inside == 2 and statuses(pgq) == {"running": 10}, "all jobs to be claimed")
        worker.stop()
        wait_for(lambda: statuses(pgq) == {"pending": 8, "running": 2}, "what was not started to be given back")
        gate.open()

    assert statuses(pgq) == {"completed": 2, "pending": 8}
    pending = rows(pgq.engine, f"SELECT id, retries, attempt FROM {table(pgq, 'jobs')} WHERE status = 'pending'")
    assert {(row[1], row[2]) for row in pending} == {(0, 1)}
    assert events(pgq, pending[0][0]) == ["release"]
    assert worker.report.released == 8


def test_a_stopped_worker_claims_nothing_more(pgq: PgQueue, gate: Gate) -> None:
    @pgq.task
    def held_up() -> None:
        gate.pass_through()

    enqueue(held_up)

    with working(pgq, queues={"default": 2}) as worker:
        wait_for(lambda: gate.inside == 1, "the job to run")
        worker.stop()
        wait_for(lambda: worker._slots["default"].wanted() == 0, "the slots to be closed")
        late = enqueue(held_up)
        gate.open()

    assert pgq.get_job(late).status == "pending"


def test_an_idle_worker_ends_at_once_when_it_is_stopped_however_seldom_it_looks(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    job_id = enqueue(works)

    with working(pgq, poll_interval=300, sweep_interval=300, heartbeat_interval=9) as worker:
        wait_for_status(pgq, job_id, "completed")
        began = time.monotonic()
        worker.stop()
        worker.join(PATIENCE_SECONDS)

    assert time.monotonic() - began < 5


def test_a_job_that_does_not_end_in_time_is_given_back_and_its_late_outcome_refused(
    pgq: PgQueue, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()

    @pgq.task
    def held_up() -> str:
        gate.pass_through()
        ended.set()
        return "too late"

    job_id = enqueue(held_up)

    with working(pgq, shutdown_timeout=0.1) as worker:
        wait_for(lambda: gate.inside == 1, "the job to run")
        worker.stop()
        report = worker.join(PATIENCE_SECONDS)
    gate.open()
    wait_for(lambda: "changes nothing" in caplog.text, "the late outcome to be refused")

    job = pgq.get_job(job_id)
    assert ended.is_set()
    assert (job.status, job.retries, job.result) == ("pending", 0, None)
    assert pgq.job_events(job_id)[0]["reason"] == "the worker stopped while the job was running"
    assert (report.released, report.completed) == (1, 0)
    assert "gave back 1 jobs that did not end in time" in caplog.text


def test_an_async_task_that_does_not_end_in_time_is_cancelled_and_its_job_given_back(pgq: PgQueue) -> None:
    cancelled = threading.Event()
    began = threading.Event()

    @pgq.task
    async def endless() -> None:
        began.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    job_id = enqueue(endless)

    with working(pgq, shutdown_timeout=0.1):
        wait_for(began.is_set, "the job to run")

    assert cancelled.is_set()
    job = pgq.get_job(job_id)
    assert (job.status, job.retries) == ("pending", 0)
    assert events(pgq, job_id) == ["release"]


def test_an_async_task_that_swallows_its_cancellation_cannot_hold_up_the_worker(pgq: PgQueue) -> None:
    began, let_go = threading.Event(), threading.Event()

    @pgq.task
    async def stubborn() -> None:
        began.set()
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    job_id = enqueue(stubborn)

    with working(pgq, shutdown_timeout=0.1) as worker:
        wait_for(began.is_set, "the job to run")
        worker.stop()
        wait_for_status(pgq, job_id, "pending")
        let_go.set()

    assert events(pgq, job_id) == ["release"]


def test_everything_that_waits_to_be_written_is_written_before_a_worker_ends(
    pgq: PgQueue, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finisher is in the middle of a batch when the last ends and the word to stop reach it."""

    @pgq.task
    def quick() -> None: ...

    @pgq.task
    def held_up() -> None:
        gate.pass_through()

    writing, go_on = threading.Event(), threading.Event()
    finish = store.finish

    def slow_finish(*arguments: Any, **settings: Any) -> set[int]:
        writing.set()
        assert go_on.wait(PATIENCE_SECONDS)
        return finish(*arguments, **settings)

    monkeypatch.setattr(store, "finish", slow_finish)
    enqueue(quick)
    enqueue_many(held_up, 3)

    with working(pgq, shutdown_timeout=0) as worker:
        wait_for(lambda: writing.is_set() and gate.inside == 3, "one job to be written while three run")
        worker.stop()
        wait_for(lambda: worker._finisher._ended.qsize() >= 4, "the ends of all jobs to wait")
        go_on.set()

    assert statuses(pgq) == {"completed": 1, "pending": 3}


def test_no_thread_and_no_row_of_a_worker_is_left(pgq: PgQueue) -> None:
    @pgq.task
    def in_a_thread() -> None: ...

    @pgq.task
    async def in_the_loop() -> None: ...

    enqueue(in_a_thread)
    enqueue(in_the_loop)
    before = own_threads()

    with working(pgq) as worker:
        wait_for(lambda: statuses(pgq) == {"completed": 2}, "both to complete")
        wait_for(lambda: len(pgq.workers()) == 1, "the worker to be listed")
        assert pgq.workers()[0]["id"] == worker.id

    assert pgq.workers() == []
    wait_for(lambda: {thread.name for thread in own_threads() - before} <= {"pgqueue-wake"}, "its threads to end")


def test_abort_gives_back_everything_at_once(pgq: PgQueue, gate: Gate) -> None:
    @pgq.task
    def held_up() -> None:
        gate.pass_through()

    enqueue_many(held_up, 4)

    with working(pgq, queues={"default": 2}, prefetch=5, shutdown_timeout=3600) as worker:
        wait_for(lambda: gate.inside == 2 and statuses(pgq) == {"running": 4}, "all jobs to be claimed")
        worker.abort()
        worker.join(PATIENCE_SECONDS)

    assert statuses(pgq) == {"pending": 4}
    assert scalar(pgq.engine, f"SELECT sum(retries) FROM {table(pgq, 'jobs')}") == 0


def test_abort_ends_the_wait_of_a_worker_that_is_stopping(pgq: PgQueue, gate: Gate) -> None:
    @pgq.task
    def held_up() -> None:
        gate.pass_through()

    job_id = enqueue(held_up)

    with working(pgq, shutdown_timeout=3600) as worker:
        wait_for(lambda: gate.inside == 1, "the job to run")
        worker.stop()
        wait_for(lambda: not worker._claimer.is_alive(), "the worker to stop")
        worker.abort()
        worker.join(PATIENCE_SECONDS)

    assert pgq.get_job(job_id).status == "pending"


def test_a_claim_whose_answer_comes_after_the_worker_stopped_is_given_back(
    pg: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    @pg.task
    def works() -> None: ...

    monkeypatch.setattr("pgqueue.worker.ABORT_SECONDS", 0.05)
    claim = store.claim
    claimed, answer = threading.Event(), threading.Event()

    def slow_claim(*arguments: Any, **settings: Any) -> list[ClaimedJob]:
        found = claim(*arguments, **settings)
        if found:
            claimed.set()
            assert answer.wait(PATIENCE_SECONDS)
        return found

    monkeypatch.setattr(store, "claim", slow_claim)
    job_id = enqueue(works)

    with working(pg) as worker:
        wait_for(claimed.is_set, "the claim")
        worker.stop()
        worker.join(PATIENCE_SECONDS)
    answer.set()

    wait_for(lambda: events(pg, job_id) == ["release"], "the job to be given back")
    assert pg.get_job(job_id).status == "pending"
    assert pg.get_job(job_id).retries == 0


# Beginning -------------------------------------------------------------------------------------------------


def test_a_worker_in_a_block_runs_while_the_block_does(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    job_id = enqueue(works)

    with Worker(pgq, WorkerConfig(poll_interval=0.05)) as worker:
        wait_for_status(pgq, job_id, "completed")

    assert worker.join(0).completed == 1


def test_joining_a_worker_that_goes_on_raises_timeout_error(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    with working(pgq) as worker, pytest.raises(TimeoutError, match=r"is still running after 0\.01 s"):
        worker.join(0.01)


def test_what_keeps_a_worker_from_beginning_is_raised_by_join(empty_pg_url: str) -> None:
    pgq = PgQueue(empty_pg_url)

    @pgq.task
    def works() -> None: ...

    worker = Worker(pgq).start()

    with pytest.raises(SchemaMissing, match="create them with: pgqueue db upgrade"):
        worker.join(PATIENCE_SECONDS)
    pgq.dispose()


def test_a_worker_runs_once(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    worker = Worker(pgq, WorkerConfig(drain=True))
    worker.run()

    with pytest.raises(RuntimeError, match="a worker runs once, make a new one"):
        worker.run()


def test_a_worker_without_tasks_is_refused(pgq: PgQueue) -> None:
    pgq.external_task("elsewhere")

    with pytest.raises(ConfigurationError, match="this worker knows no tasks"):
        Worker(pgq)


def test_a_worker_stopped_before_it_began_ends_at_once_and_claims_nothing(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    job_id = enqueue(works)
    worker = Worker(pgq)
    worker.stop()

    worker.run()

    assert pgq.get_job(job_id).status == "pending"


def test_a_signal_during_the_schema_check_stops_the_worker_after_it(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    @pgq.task
    def works() -> None: ...

    job_id = enqueue(works)
    worker = Worker(pgq)
    check = worker._require_database

    def interrupted_check() -> None:
        signal.raise_signal(signal.SIGTERM)
        check()

    monkeypatch.setattr(worker, "_require_database", interrupted_check)
    before = signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    try:
        worker.run()
    finally:
        signal.signal(signal.SIGTERM, before)

    assert pgq.get_job(job_id).status == "pending"


def test_a_signal_handler_may_stop_a_worker_that_runs_in_the_same_thread(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None:
        signal.raise_signal(signal.SIGTERM)

    enqueue(works)
    worker = Worker(pgq)
    before = signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    try:
        report = worker.run()
    finally:
        signal.signal(signal.SIGTERM, before)

    assert report.completed == 1


# Drain -----------------------------------------------------------------------------------------------------


def test_a_drain_of_empty_queues_ends_at_once(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    drain(pgq)
    began = time.monotonic()

    report = drain(pgq, poll_interval=300)

    assert time.monotonic() - began < 5
    assert report.completed == 0


def test_a_drain_ends_with_the_last_job_and_not_with_the_next_poll(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    enqueue_many(works, 25)
    began = time.monotonic()

    report = drain(pgq, poll_interval=300, queues={"default": 2})

    assert time.monotonic() - began < 5
    assert report.completed == 25


def test_a_drain_waits_for_retries_and_snoozed_jobs_that_are_due(pgq: PgQueue) -> None:
    @pgq.task(retry=Retry(max_retries=1, backoff="constant", base=0.2, jitter=False))
    def flaky() -> None:
        if current_job().retries == 0:
            raise ValueError("not yet")

    @pgq.task
    def patient() -> None:
        if current_job().attempt == 1:
            raise Snooze(0)

    enqueue(flaky)
    enqueue(patient)

    report = drain(pgq)

    assert statuses(pgq) == {"completed": 2}
    assert (report.retried, report.snoozed) == (1, 1)


def test_a_drain_runs_what_its_own_jobs_enqueue(pgq: PgQueue) -> None:
    @pgq.task
    def count_down(n: int) -> None:
        if n:
            enqueue(count_down, n=n - 1)

    enqueue(count_down, n=5)

    report = drain(pgq, poll_interval=300, listen=False)

    assert report.completed == 6


def test_a_drain_leaves_jobs_alone_that_are_scheduled_for_later(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    with pgq.engine.begin() as connection:
        later = works.using(delay=3600).enqueue(connection).id

    drain(pgq)

    assert pgq.get_job(later).status == "pending"


def test_a_drain_waits_for_jobs_that_run_elsewhere(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    enqueue(works)
    held = pgq.claim("somebody else")

    with working(pgq, drain=True) as worker:
        wait_for(lambda: pgq.workers(), "the worker to begin")
        with pytest.raises(TimeoutError):
            worker.join(0.3)
        pgq.nack(held)
        report = worker.join(PATIENCE_SECONDS)

    assert report.completed == 1


def test_a_drain_takes_over_the_jobs_of_a_dead_worker(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    enqueue(works)
    pgq.claim("dead worker", lease=0.5)

    report = drain(pgq, sweep_interval=0.1)

    assert (report.swept, report.completed) == (1, 1)


def test_a_drain_looks_less_and_less_often_for_jobs_that_are_out_of_reach(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    @pgq.task
    def works() -> None: ...

    looks = []
    claim = store.claim

    def counted_claim(*arguments: Any, **settings: Any) -> list[ClaimedJob]:
        looks.append(time.monotonic())
        return claim(*arguments, **settings)

    monkeypatch.setattr(store, "claim", counted_claim)
    job_id = enqueue(works)
    pgq.pause("default")

    with working(pgq, drain=True, poll_interval=0.3) as worker:
        # A wake-up may come in between: the worker has only just begun to listen.
        wait_for(lambda: min(gaps(looks)[-3:]) > 0.25 if len(looks) > 3 else False, "looks to become rare")
        pgq.resume("default")
        worker.join(PATIENCE_SECONDS)

    assert pgq.get_job(job_id).status == "completed"


def gaps(moments: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(moments)]


def test_a_drain_does_not_wait_for_jobs_of_unknown_tasks(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    job_id = enqueue(works)
    execute(pgq.engine, f"UPDATE {table(pgq, 'jobs')} SET task = 'unknown'")

    drain(pgq)

    assert pgq.get_job(job_id).status == "pending"


def test_a_stopping_worker_says_what_it_waits_for(pgq: PgQueue, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    @pgq.task
    def held_up() -> None:
        gate.pass_through()

    enqueue(held_up)

    with caplog.at_level(logging.INFO, logger="pgqueue"), working(pgq, shutdown_timeout=7) as worker:
        wait_for(lambda: gate.inside == 1, "the job to run")
        worker.stop()
        wait_for(lambda: "waiting up to 7 s for running jobs" in caplog.text, "the log line")
        gate.open()
