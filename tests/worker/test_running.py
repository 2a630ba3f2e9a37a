"""A worker runs jobs, as many at once as it may, and writes down how each ended."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any

import pytest
from jobs import seconds_until_due
from support import execute, scalar, wait_for
from working import Gate, drain, enqueue, enqueue_many, events, statuses, table, wait_for_status, working

from pgqueue import (
    Cancel,
    Discard,
    PgQueue,
    Retry,
    RetryAfter,
    Snooze,
    Worker,
    WorkerConfig,
    claiming,
    current_job,
    running,
    store,
)
from pgqueue.claiming import Claimer
from pgqueue.finishing import Finisher

AT_ONCE = Retry(max_retries=2, backoff="constant", base=0, jitter=False)


def boom() -> None:
    raise ValueError("boom")


def boom_as_well(retry: int) -> float:
    raise ValueError("boom")


# How attempts end ------------------------------------------------------------------------------------------


def test_def_and_async_def_tasks_complete_with_their_results(pgq: PgQueue) -> None:
    @pgq.task
    def double(n: int) -> int:
        return 2 * n

    @pgq.task
    async def triple(n: int) -> dict[str, int]:
        await asyncio.sleep(0)
        return {"n": 3 * n}

    ids = [enqueue(double, n=21), enqueue(triple, n=5)]

    report = drain(pgq)

    assert [pgq.get_job(job_id).result for job_id in ids] == [42, {"n": 15}]
    assert report.completed == 2
    for job_id in ids:
        job = pgq.get_job(job_id)
        assert (job.status, job.attempt, job.retries, job.error) == ("completed", 1, 0, None)
        assert events(pgq, job_id) == []


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_defect_in_running_a_job_costs_neither_the_slot_nor_the_end_of_the_job(
    pgq: PgQueue, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @pgq.task(retry=AT_ONCE)
    def plain() -> None: ...

    @pgq.task(retry=AT_ONCE)
    async def asynchronous() -> None: ...

    name = "execute" if kind == "def" else "execute_async"
    works, broken = getattr(running, name), iter([True])

    def breaks_once(*given: Any) -> Any:
        if next(broken, False):
            raise RuntimeError("a defect")
        return works(*given)

    monkeypatch.setattr(running, name, breaks_once)
    job_id = enqueue(plain if kind == "def" else asynchronous)

    drain(pgq, queues={"default": 1})

    job = pgq.get_job(job_id)
    assert (job.status, job.attempt, job.retries) == ("completed", 2, 1)
    assert pgq.job_events(job_id)[0]["error"]["message"] == "a defect"


def test_a_failing_job_is_retried_until_its_retries_are_used_and_then_is_dead(pgq: PgQueue) -> None:
    failing = pgq.task(retry=AT_ONCE, name="failing")(boom)
    job_id = enqueue(failing)

    report = drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.attempt, job.retries) == ("dead", 3, 2)
    assert job.error is not None
    assert (job.error["type"], job.error["message"]) == ("ValueError", "boom")
    assert 'raise ValueError("boom")' in job.error["traceback"]
    assert (report.retried, report.dead, report.completed) == (2, 1, 0)


def test_without_retries_the_first_failure_is_logged_and_makes_the_job_dead(
    pgq: PgQueue, caplog: pytest.LogCaptureFixture
) -> None:
    failing = pgq.task(retry=Retry(max_retries=0), name="failing")(boom)
    job_id = enqueue(failing)

    report = drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.attempt, job.retries) == ("dead", 1, 0)
    assert f"task failing, job {job_id}, attempt 1 failed with ValueError; no retries allowed" in caplog.text
    assert (report.dead, report.retried) == (1, 0)


def test_each_failed_attempt_is_recorded_with_its_error(pgq: PgQueue) -> None:
    @pgq.task(retry=AT_ONCE)
    def failing() -> None:
        raise ValueError(f"attempt {current_job().attempt}")

    job_id = enqueue(failing)

    drain(pgq)

    recorded = pgq.job_events(job_id)
    assert [(event["event"], event["attempt"], event["to_status"]) for event in recorded] == [
        ("retry", 1, "pending"),
        ("retry", 2, "pending"),
        ("dead", 3, "dead"),
    ]
    assert [event["error"]["message"] for event in recorded] == ["attempt 1", "attempt 2", "attempt 3"]
    assert recorded[-1]["reason"] == "2 of 2 retries used"


def test_a_retry_waits_for_its_backoff(pgq: PgQueue) -> None:
    failing = pgq.task(retry=Retry(backoff="constant", base=3600, cap=3600, jitter=False), name="failing")(boom)
    job_id = enqueue(failing)

    with working(pgq):
        wait_for(lambda: events(pgq, job_id) == ["retry"], "the first attempt to fail")

    job = pgq.get_job(job_id)
    assert (job.status, job.retries) == ("pending", 1)
    assert 3500 < (job.run_at - job.created_at).total_seconds() < 3700


def test_a_job_that_succeeds_at_a_later_attempt_is_completed(pgq: PgQueue) -> None:
    @pgq.task(retry=AT_ONCE)
    def flaky() -> int:
        if current_job().attempt < 3:
            raise ValueError("not yet")
        return current_job().attempt

    job_id = enqueue(flaky)

    drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.result, job.attempt, job.retries) == ("completed", 3, 3, 2)


def test_a_backoff_function_that_fails_does_not_keep_the_failure_from_being_recorded(pgq: PgQueue) -> None:
    failing = pgq.task(retry=Retry(max_retries=1, backoff=boom_as_well, cap=0, jitter=False), name="failing")(boom)
    job_id = enqueue(failing)

    drain(pgq)

    assert pgq.get_job(job_id).status == "dead"


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(
    "error", [SystemExit(1), KeyboardInterrupt(), BaseException("base")], ids=lambda error: type(error).__name__
)
def test_a_task_that_raises_what_ends_programs_ends_only_its_attempt(
    pgq: PgQueue, error: BaseException, kind: str
) -> None:
    def exits() -> None:
        raise error

    async def exits_async() -> None:
        raise error

    @pgq.task
    def works() -> int:
        return 1

    task = pgq.task(retry=Retry(max_retries=0), name="exits")(exits if kind == "def" else exits_async)
    first, second = enqueue(task), enqueue(works)

    drain(pgq, queues={"default": 1})

    assert pgq.get_job(first).status == "dead"
    assert pgq.get_job(second).status == "completed"


def test_a_coroutine_that_a_task_left_running_cannot_end_the_event_loop(
    pgq: PgQueue, caplog: pytest.LogCaptureFixture
) -> None:
    left: list[asyncio.Task[None]] = []

    async def exits() -> None:
        raise SystemExit(3)

    @pgq.task
    async def leaves_behind() -> None:
        left.append(asyncio.get_running_loop().create_task(exits()))
        await asyncio.sleep(0.01)

    job_id, later = enqueue(leaves_behind), enqueue(leaves_behind)

    drain(pgq, queues={"default": 1})

    assert pgq.get_job(job_id).status == "completed"
    assert pgq.get_job(later).status == "completed"
    assert "SystemExit came out of the event loop, which goes on" in caplog.text
    for task in left:
        assert isinstance(task.exception(), SystemExit)


def test_a_task_that_cancels_itself_has_failed_and_the_next_one_is_not_touched(pgq: PgQueue) -> None:
    @pgq.task(retry=Retry(max_retries=0))
    async def cancels_itself() -> None:
        running = asyncio.current_task()
        assert running is not None
        running.cancel()
        await asyncio.sleep(60)

    @pgq.task
    async def cancels_itself_too_late() -> int:
        running = asyncio.current_task()
        assert running is not None
        running.cancel()
        return 1

    @pgq.task
    async def works() -> int:
        await asyncio.sleep(0.001)
        return 1

    ids = [enqueue(cancels_itself), enqueue(works), enqueue(cancels_itself_too_late), enqueue(works)]

    drain(pgq, queues={"default": 1})

    assert [pgq.get_job(job_id).status for job_id in ids] == ["dead", "completed", "completed", "completed"]
    assert pgq.get_job(ids[0]).error["message"] == "the task cancelled itself"  # type: ignore[index]


def test_a_task_can_ask_to_run_later_without_a_retry_being_charged(pgq: PgQueue) -> None:
    @pgq.task
    def patient() -> int:
        if current_job().attempt < 3:
            raise Snooze(0, reason="not ready")
        return current_job().attempt

    job_id = enqueue(patient)

    report = drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.result, job.retries) == ("completed", 3, 0)
    assert events(pgq, job_id) == ["snooze", "snooze"]
    assert report.snoozed == 2


def test_a_task_can_discard_or_cancel_its_job(pgq: PgQueue) -> None:
    @pgq.task
    def hopeless() -> None:
        raise Discard("no such customer")

    @pgq.task
    async def unwanted() -> None:
        raise Cancel("order withdrawn")

    discarded, cancelled = enqueue(hopeless), enqueue(unwanted)

    report = drain(pgq)

    assert (pgq.get_job(discarded).status, pgq.get_job(cancelled).status) == ("dead", "cancelled")
    assert pgq.job_events(discarded)[0]["reason"] == "no such customer"
    assert pgq.job_events(cancelled)[0]["reason"] == "order withdrawn"
    assert (report.dead, report.cancelled, report.retried) == (1, 1, 0)


def test_an_error_is_treated_as_the_policy_says_of_its_class(pgq: PgQueue) -> None:
    policy = Retry(retry_on=ConnectionError, discard_on=KeyError, snooze_on={BlockingIOError: 3600}, base=0, cap=0)

    @pgq.task(retry=policy)
    def fails(how: str) -> None:
        raise {"lost": ConnectionResetError, "missing": KeyError, "busy": BlockingIOError, "other": ValueError}[how]

    ids = {how: enqueue(fails, how=how) for how in ("lost", "missing", "busy", "other")}

    report = drain(pgq)

    jobs = {how: pgq.get_job(job_id) for how, job_id in ids.items()}
    assert {how: (job.status, job.attempt, job.retries) for how, job in jobs.items()} == {
        "lost": ("dead", 4, 3),
        "missing": ("dead", 1, 0),
        "busy": ("pending", 1, 0),
        "other": ("dead", 1, 0),
    }
    (snoozed,) = pgq.job_events(ids["busy"])
    assert (snoozed["event"], snoozed["reason"]) == ("snooze", "BlockingIOError: runs again in 3600 s (snooze_on)")
    assert snoozed["error"]["type"] == "BlockingIOError"
    assert pgq.job_events(ids["other"])[0]["reason"] == ("ValueError is not among the errors to be retried (retry_on)")
    assert (report.retried, report.dead, report.snoozed) == (3, 3, 1)


@pytest.mark.parametrize("max_retries", [0, 1])
def test_a_task_can_say_when_it_is_to_be_tried_again(pgq: PgQueue, max_retries: int) -> None:
    @pgq.task(retry=Retry(max_retries=max_retries, base=0))
    def limited() -> None:
        raise RetryAfter(3600, "HTTP 429")

    job_id = enqueue(limited)

    with working(pgq):
        wait_for(lambda: events(pgq, job_id), "the attempt to end")

    job = pgq.get_job(job_id)
    assert (job.status, job.retries) == (("pending", 1) if max_retries else ("dead", 0))
    assert job.error["message"] == "HTTP 429"  # type: ignore[index]
    if max_retries:
        assert 3590 < seconds_until_due(pgq, job_id) <= 3600


def test_a_result_that_is_not_json_makes_the_job_dead_and_says_so(pgq: PgQueue) -> None:
    @pgq.task
    def returns_an_object() -> Any:
        return object()

    job_id = enqueue(returns_an_object)

    drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.attempt) == ("dead", 1)
    assert "its return value cannot be stored" in job.error["message"]  # type: ignore[index]


def test_an_async_task_is_stopped_at_its_timeout_and_retried(pgq: PgQueue) -> None:
    @pgq.task(timeout=0.05, retry=AT_ONCE)
    async def slow() -> int:
        if current_job().attempt == 1:
            await asyncio.sleep(60)
        return current_job().attempt

    job_id = enqueue(slow)

    drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.result, job.retries) == ("completed", 2, 1)
    assert pgq.job_events(job_id)[0]["error"]["type"] == "TimeoutError"


# Rows that somebody else wrote -----------------------------------------------------------------------------


def insert(pgq: PgQueue, task: str, payload: str) -> int:
    """A job as plain SQL would store it; its id."""
    sql = f"INSERT INTO {table(pgq, 'jobs')} (task, payload) VALUES (:task, :payload) RETURNING id"
    job_id: int = scalar(pgq.engine, sql, task=task, payload=payload)
    return job_id


@pytest.mark.parametrize(
    "payload",
    ['{"n": ' + "9" * 5000 + "}", '{"n": "many"}', '{"n": null}', '{"m": 1}', "{}", '{"n": {"deep": [1]}}'],
    ids=["5000-digits", "text", "null", "other-name", "nothing", "nested"],
)
def test_a_payload_that_cannot_be_used_fails_that_job_only(pgq: PgQueue, payload: str) -> None:
    ran = []

    @pgq.task
    def count(n: int) -> None:
        ran.append(n)

    good = [enqueue(count, n=1)]
    bad = insert(pgq, "count", payload)
    good.append(enqueue(count, n=2))

    drain(pgq, queues={"default": 1}, prefetch=10)

    assert [pgq.get_job(job_id).status for job_id in good] == ["completed", "completed"]
    assert sorted(ran) == [1, 2]
    job_row = pgq.job_events(bad)
    assert [event["event"] for event in job_row] == ["dead"]
    assert job_row[0]["reason"] == "the payload cannot be used"


def test_a_job_of_an_unknown_task_stays_pending_while_others_run(pgq: PgQueue) -> None:
    @pgq.task
    def known() -> None: ...

    unknown = insert(pgq, "of_the_next_release", "{}")
    job_id = enqueue(known)

    drain(pgq)

    assert pgq.get_job(job_id).status == "completed"
    job = pgq.get_job(unknown)
    assert (job.status, job.attempt) == ("pending", 0)


def test_many_jobs_of_unknown_tasks_do_not_hide_a_known_one_behind_them(pgq: PgQueue) -> None:
    @pgq.task
    def known() -> None: ...

    @pgq.task
    def unknown() -> None: ...

    enqueue_many(unknown, 1500)
    del pgq.tasks["unknown"]
    job_id = enqueue(known)

    drain(pgq)

    assert pgq.get_job(job_id).status == "completed"
    assert statuses(pgq) == {"completed": 1, "pending": 1500}


def test_a_job_that_plain_sql_inserted_is_run(pgq: PgQueue) -> None:
    @pgq.task
    def double(n: int) -> int:
        return 2 * n

    job_id = insert(pgq, "double", '{"n": 4}')

    drain(pgq)

    assert pgq.get_job(job_id).result == 8


def test_a_moment_that_plain_sql_wrote_without_milliseconds_does_not_stop_the_queue(pgq: PgQueue) -> None:
    @pgq.task
    def double(n: int) -> int:
        return 2 * n

    job_id = insert(pgq, "double", '{"n": 4}')
    moment = "'2020-01-01 00:00:00'"
    execute(pgq.engine, f"UPDATE {table(pgq, 'jobs')} SET run_at = {moment}, created_at = {moment}")

    drain(pgq)

    assert pgq.get_job(job_id).result == 8


# Concurrency -----------------------------------------------------------------------------------------------


def test_def_and_async_def_tasks_of_a_queue_share_its_concurrency_exactly(pgq: PgQueue) -> None:
    gate = Gate()

    @pgq.task
    def in_a_thread() -> None:
        gate.pass_through()

    @pgq.task
    async def in_the_loop() -> None:
        await gate.pass_through_async()

    for _ in range(15):
        enqueue(in_a_thread)
        enqueue(in_the_loop)

    with working(pgq, queues={"default": 4}):
        wait_for(lambda: gate.inside == 4, "four jobs to run at once")
        gate.open()
        wait_for(lambda: statuses(pgq) == {"completed": 30}, "all to complete")

    assert gate.inside_max == 4


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_never_more_jobs_of_a_queue_run_than_it_may(pgq: PgQueue, kind: str, concurrency: int) -> None:
    lock = threading.Lock()
    inside = most = 0

    def enter(change: int) -> None:
        nonlocal inside, most
        with lock:
            inside += change
            most = max(most, inside)

    def in_a_thread() -> None:
        enter(+1)
        time.sleep(0.001)
        enter(-1)

    async def in_the_loop() -> None:
        enter(+1)
        await asyncio.sleep(0.001)
        enter(-1)

    task = pgq.task(name="t")(in_a_thread if kind == "def" else in_the_loop)
    enqueue_many(task, 100)

    report = drain(pgq, queues={"default": concurrency})

    assert report.completed == 100
    assert most <= concurrency


def test_each_queue_has_slots_of_its_own(pgq: PgQueue) -> None:
    slow, fast = Gate(), Gate()

    @pgq.task(queue="slow")
    def held_up() -> None:
        slow.pass_through()

    @pgq.task(queue="fast")
    def quick() -> None:
        fast.pass_through()

    fast.open()
    enqueue_many(held_up, 5)

    with working(pgq, queues={"slow": 2, "fast": 1}):
        wait_for(lambda: slow.inside == 2, "the slow queue to be full")
        quick_id = enqueue(quick)
        wait_for_status(pgq, quick_id, "completed")
        assert slow.inside_max == 2
        slow.open()


def test_a_worker_leaves_queues_alone_that_it_was_not_given(pgq: PgQueue) -> None:
    @pgq.task(queue="mine")
    def mine() -> None: ...

    @pgq.task(queue="theirs")
    def theirs() -> None: ...

    own, other = enqueue(mine), enqueue(theirs)

    drain(pgq, queues={"mine": 1})

    assert (pgq.get_job(own).status, pgq.get_job(other).status) == ("completed", "pending")


def test_jobs_start_in_the_order_of_priority_then_age(pgq: PgQueue) -> None:
    order: list[int] = []

    @pgq.task
    def note(n: int) -> None:
        order.append(n)

    with pgq.engine.begin() as connection:
        for n, priority in [(1, 0), (2, 5), (3, 0), (4, 9), (5, 5)]:
            note.using(priority=priority).enqueue(connection, n=n)

    drain(pgq, queues={"default": 1})

    assert order == [4, 2, 5, 1, 3]


def test_a_worker_stops_after_so_many_jobs(pgq: PgQueue) -> None:
    @pgq.task
    def works() -> None: ...

    enqueue_many(works, 10)

    report = Worker(pgq, WorkerConfig(max_jobs=4, queues={"default": 3})).run()

    assert report.completed == 4
    assert statuses(pgq) == {"completed": 4, "pending": 6}


def test_every_job_of_several_workers_runs_once(pgq: PgQueue) -> None:
    ran: list[int] = []

    @pgq.task
    def note(n: int) -> None:
        ran.append(n)

    with pgq.engine.begin() as connection:
        note.enqueue_many(connection, [{"n": n} for n in range(300)])

    with working(pgq), working(pgq), working(pgq):
        wait_for(lambda: statuses(pgq) == {"completed": 300}, "all to complete")

    assert sorted(ran) == list(range(300))


def test_what_a_worker_did_is_counted_however_many_threads_end_jobs(pg: PgQueue) -> None:
    @pg.task(transactional=True)
    def works(session: Any) -> None: ...

    enqueue_many(works, 400)

    report = drain(pg, queues={"default": 16})

    assert report.completed == 400
    assert report.lost == 0


# Wake-ups --------------------------------------------------------------------------------------------------


def test_an_enqueue_wakes_an_idle_worker(pg: PgQueue) -> None:
    @pg.task
    def works() -> None: ...

    with working(pg, poll_interval=300):
        for _ in range(5):
            wait_for_status(pg, enqueue(works), "completed")


@pytest.mark.parametrize("question", ["is_any_pending", "lanes", "claim"])
def test_a_wake_up_that_comes_while_the_database_is_asked_for_jobs_is_not_lost(
    pg: PgQueue, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    @pg.task
    def works() -> None: ...

    if question != "is_any_pending":
        enqueue(works)
    ids: list[int] = []
    ask = getattr(store, question)

    def ask_and_miss(*arguments: Any, **settings: Any) -> Any:
        found = ask(*arguments, **settings)
        if not ids:
            # After the question's snapshot and before its answer is looked at.
            ids.append(enqueue(works.using(priority=5)))
            worker._woken("default")
        return found

    monkeypatch.setattr(store, question, ask_and_miss)

    with working(pg, poll_interval=300, listen=False) as worker:
        wait_for(lambda: ids, "the question that misses a job")
        wait_for_status(pg, ids[0], "completed")


def test_nothing_more_is_claimed_while_the_ends_of_many_jobs_wait_to_be_written(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a worker whose database is slow at writing would come to hold the whole backlog."""

    @pgq.task
    def works() -> None: ...

    database, written, behind = Gate(), Finisher._write, []

    def write_later(finisher: Finisher, *arguments: Any) -> set[int]:
        database.pass_through()
        return written(finisher, *arguments)

    def look(claimer: Claimer) -> int:
        unwritten = counted(claimer)
        behind.extend([unwritten] * (unwritten > 20))
        return unwritten

    counted = Claimer._unwritten
    monkeypatch.setattr(Finisher, "_write", write_later)
    monkeypatch.setattr(Claimer, "_unwritten", look)
    monkeypatch.setattr(claiming, "UNWRITTEN_JOBS_MAX", 20)
    enqueue_many(works, 200)

    with working(pgq, queues={"default": 2}, prefetch=10):
        wait_for(lambda: len(behind) >= 20, "the worker to look several times whether its ends are written")
        held = statuses(pgq)["running"]
        database.open()
        wait_for(lambda: statuses(pgq) == {"completed": 200}, "all jobs to complete")

    assert 20 < held <= 20 + 2 * (2 + 10)


def test_failures_are_logged_with_the_task_the_job_and_what_happens_next(
    pgq: PgQueue, caplog: pytest.LogCaptureFixture
) -> None:
    failing = pgq.task(retry=Retry(max_retries=1, base=0), name="failing")(boom)
    job_id = enqueue(failing)

    with caplog.at_level(logging.INFO, logger="pgqueue"):
        drain(pgq)

    assert f"task failing, job {job_id}, attempt 1 failed with ValueError; retry 1 of 1 in 0.0 s" in caplog.text
    assert f"task failing, job {job_id}, attempt 2 failed with ValueError; 1 of 1 retries used" in caplog.text
