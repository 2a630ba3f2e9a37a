"""What a listener is told of, when, and what it cannot harm."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from support import PATIENCE_SECONDS, wait_for
from working import Gate, drain, enqueue, seize, wait_for_status, working

from pgqueue import (
    Cancel,
    ClaimedJob,
    ConfigurationError,
    Discard,
    JobEvent,
    PgQueue,
    Retry,
    Snooze,
    Worker,
    WorkerConfig,
    events,
)
from pgqueue.job import ErrorInfo


class Ear:
    """A listener that remembers."""

    def __init__(self, pgq: PgQueue, name: str = "job:*", **filters: Any) -> None:
        self.heard: list[JobEvent] = []
        self.subscription = pgq.on(name, self.heard.append, **filters)

    def names(self, job_id: int | None = None) -> list[str]:
        return [event.name for event in self.heard if job_id in (None, event.job_id)]

    def wait_for(self, count: int) -> list[JobEvent]:
        wait_for(lambda: len(self.heard) >= count, f"{count} events; heard {self.names()}")
        return self.heard


# Of attempts -----------------------------------------------------------------------------------------------


def test_a_job_that_succeeds_is_enqueued_started_and_completed(pgq: PgQueue) -> None:
    ear = Ear(pgq)

    @pgq.task(queue="sums")
    def add(a: int, b: int) -> int:
        return a + b

    job_id = enqueue(add.using(metadata={"tenant": "x"}), a=1, b=2)
    drain(pgq, queues={"sums": 1}, name="ann")

    assert ear.names() == ["job:enqueued", "job:started", "job:completed"]
    enqueued, started, completed = ear.heard
    assert (enqueued.attempt, started.attempt, completed.attempt) == (0, 1, 1)
    assert enqueued.worker is None
    assert completed.worker is not None
    assert completed.worker.startswith("ann:")
    assert {(event.job_id, event.task, event.queue) for event in ear.heard} == {(job_id, "add", "sums")}
    assert completed.result == 3
    assert completed.duration is not None
    assert 0 <= completed.duration < 60
    assert [event.payload for event in ear.heard] == [{"a": 1, "b": 2}] * 3
    assert [event.metadata for event in ear.heard] == [{"tenant": "x"}] * 3


def test_an_attempt_that_fails_is_told_with_its_error_and_then_what_became_of_the_job(pgq: PgQueue) -> None:
    ear = Ear(pgq)

    @pgq.task(retry=Retry(max_retries=1, base=0.0))
    def fail() -> None:
        raise ValueError("no")

    enqueue(fail)
    drain(pgq)

    assert ear.names() == [
        *("job:enqueued", "job:started", "job:failed", "job:retried"),
        *("job:started", "job:failed", "job:dead"),
    ]
    assert [event.attempt for event in ear.heard] == [0, 1, 1, 1, 2, 2, 2]
    retried, dead = ear.heard[3], ear.heard[6]
    assert retried.delay == 0.0
    assert dead.error is not None
    assert (dead.error.type, dead.error.message) == ("ValueError", "no")
    assert dead.reason == "1 of 1 retries used"


@pytest.mark.parametrize(
    ("signal", "names"),
    [
        (Cancel("unwanted"), ["job:cancelled"]),
        (Snooze(3600, "later"), ["job:snoozed"]),
        (Discard("never"), ["job:failed", "job:dead"]),
    ],
)
def test_what_a_task_says_of_its_end_is_told(pgq: PgQueue, signal: Exception, names: list[str]) -> None:
    ear = Ear(pgq)

    @pgq.task
    async def end() -> None:
        raise signal

    enqueue(end)
    with working(pgq):
        ear.wait_for(2 + len(names))

    assert ear.names()[2:] == names
    assert ear.heard[-1].reason == str(signal)


def test_a_transactional_task_is_told_of_after_its_commit(pgq: PgQueue) -> None:
    seen: list[str] = []
    pgq.on("job:completed", lambda event: seen.append(pgq.get_job(event.job_id).status))

    @pgq.task(transactional=True)
    def book(session: Session) -> None: ...

    @pgq.task(transactional=True)
    async def book_async(session: Any) -> None: ...

    enqueue(book)
    enqueue(book_async)
    drain(pgq)

    assert seen == ["completed", "completed"]


def test_a_completion_is_told_once_it_can_be_read(pgq: PgQueue) -> None:
    seen: list[str] = []
    pgq.on("job:completed", lambda event: seen.append(pgq.get_job(event.job_id).status))

    @pgq.task
    def add() -> None: ...

    with pgq.begin() as connection:
        add.enqueue_many(connection, [{}] * 50)
    drain(pgq)

    assert seen == ["completed"] * 50


def test_a_completion_that_was_refused_is_told_as_a_lost_claim(pgq: PgQueue) -> None:
    ear, gate = Ear(pgq), Gate()

    @pgq.task
    def work() -> None:
        gate.pass_through()

    job_id = enqueue(work)
    with working(pgq, lease=60):
        wait_for(lambda: gate.inside, "the job to start")
        seize(pgq, job_id)
        gate.open()
        ear.wait_for(3)

    assert ear.names(job_id) == ["job:enqueued", "job:started", "job:lost"]


def test_a_claim_that_the_heartbeat_finds_lost_is_told(pgq: PgQueue) -> None:
    ear, gate = Ear(pgq, "job:lost"), Gate()

    @pgq.task
    def work() -> None:
        gate.pass_through()

    job_id = enqueue(work)
    with working(pgq, lease=60, heartbeat_interval=0.02):
        wait_for(lambda: gate.inside, "the job to start")
        seize(pgq, job_id)
        ear.wait_for(1)
        gate.open()

    assert ear.names() == ["job:lost"]


def test_jobs_given_back_at_a_stop_are_told_as_released_before_the_worker_is_gone(pgq: PgQueue) -> None:
    ear, gate = Ear(pgq, "job:released"), Gate()

    @pgq.task
    def work() -> None:
        gate.pass_through()

    enqueue(work)
    worker = Worker(pgq, WorkerConfig(shutdown_timeout=0, poll_interval=0.05)).start()
    wait_for(lambda: gate.inside, "the job to start")
    worker.stop()
    worker.join(60)

    assert ear.names() == ["job:released"]
    gate.open()


def test_jobs_of_a_dead_worker_are_told_as_failed_and_as_what_became_of_them(pgq: PgQueue) -> None:
    @pgq.task
    def work() -> None: ...

    enqueue(work.using(max_retries=0))
    enqueue(work.using(max_retries=1))
    claimed = pgq.claim("dead-worker", limit=2, lease=60)
    with pgq.begin() as connection:
        jobs = pgq.tables.jobs
        connection.execute(sa.update(jobs).values(claim_expires_at=jobs.c.created_at))
    ear = Ear(pgq)

    drain(pgq, sweep_interval=0.05)

    first, second = (job.id for job in claimed)
    assert ear.names(first) == ["job:failed", "job:dead"]
    assert ear.names(second) == ["job:failed", "job:retried", "job:started", "job:completed"]
    failed = ear.heard[0]
    assert (failed.worker, failed.reason) == ("dead-worker", "the lease of dead-worker ran out")
    assert failed.error is not None
    assert failed.error.type == "WorkerLost"


def test_a_job_that_is_cancelled_by_hand_is_told_where_that_was_done(pgq: PgQueue) -> None:
    ear = Ear(pgq, "job:cancelled")

    @pgq.task
    def work(secret: str) -> None: ...

    job_id = enqueue(work, secret="x")
    pgq.cancel(job_id, reason="not needed")

    (event,) = ear.wait_for(1)
    assert (event.job_id, event.task, event.reason, event.payload) == (job_id, "work", "not needed", {"secret": "x"})


def test_acks_and_nacks_of_consumers_are_told_after_their_commit(pgq: PgQueue) -> None:
    work = pgq.external_task("work")
    for _ in range(3):
        enqueue(work)
    first, second, third = pgq.claim("consumer", limit=3)
    ear = Ear(pgq)

    pgq.ack(first, result=5)
    with Session(pgq.engine) as session:
        pgq.ack(second, session=session)
        session.rollback()
    with Session(pgq.engine) as session:
        pgq.nack(third, error="busy", session=session)
        assert ear.heard == [] or [event.job_id for event in ear.heard] == [first.id]
        session.commit()

    ear.wait_for(3)
    assert [(event.job_id, event.name) for event in ear.heard] == [
        (first.id, "job:completed"),
        (third.id, "job:failed"),
        (third.id, "job:retried"),
    ]


# Who listens to what ---------------------------------------------------------------------------------------


def test_a_listener_hears_only_of_its_event_task_and_queue(pgq: PgQueue) -> None:
    @pgq.task
    def one() -> None: ...

    @pgq.task
    def two() -> None: ...

    ears = [
        Ear(pgq, "job:completed"),
        Ear(pgq, "job:completed", task="one"),
        Ear(pgq, "job:completed", task=two),
        Ear(pgq, "job:completed", queue="other"),
    ]
    enqueue(one)
    enqueue(two)
    enqueue(two.using(queue="other"))
    drain(pgq, queues={"default": 1, "other": 1})

    heard = [sorted((event.task, event.queue) for event in ear.heard) for ear in ears]
    assert heard == [
        [("one", "default"), ("two", "default"), ("two", "other")],
        [("one", "default")],
        [("two", "default"), ("two", "other")],
        [("two", "other")],
    ]


def test_a_decorated_function_listens_and_stays_what_it_is(pgq: PgQueue) -> None:
    heard: list[str] = []

    @pgq.on("job:completed", task="work")
    def completed(event: JobEvent) -> None:
        heard.append(event.task)

    @pgq.task
    def work() -> None: ...

    enqueue(work)
    drain(pgq)

    assert heard == ["work"]
    assert completed.__name__ == "completed"


def test_async_listeners_are_awaited_on_one_loop_of_their_own(pgq: PgQueue) -> None:
    loops: list[object] = []

    @pgq.on("job:completed")
    async def completed(event: JobEvent) -> None:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())

    @pgq.task
    def work() -> None: ...

    enqueue(work)
    enqueue(work)
    drain(pgq)

    assert len(loops) == 2
    assert loops[0] is loops[1]


def test_an_ended_subscription_hears_no_more(pgq: PgQueue) -> None:
    called, with_block, kept = Ear(pgq), Ear(pgq), Ear(pgq)

    @pgq.task
    def work() -> None: ...

    called.subscription()
    called.subscription()
    with with_block.subscription:
        enqueue(work)
        with_block.wait_for(1)
    enqueue(work)
    kept.wait_for(2)

    assert (called.names(), with_block.names()) == ([], ["job:enqueued"])


def test_a_listener_that_ends_its_own_subscription_hears_no_more(pgq: PgQueue) -> None:
    heard: list[JobEvent] = []

    @pgq.task
    def work() -> None: ...

    def once(event: JobEvent) -> None:
        heard.append(event)
        subscription()

    subscription = pgq.on("job:*", once)
    for _ in range(3):
        enqueue(work)
    thread = subscription._thread

    wait_for(lambda: heard, "the first event")
    drain(pgq)

    assert len(heard) == 1
    if thread is not None:
        wait_for(lambda: not thread.is_alive(), "its thread to end")


def test_a_listener_may_enqueue(pgq: PgQueue) -> None:
    @pgq.task
    def follow_up() -> None: ...

    @pgq.task
    def work() -> None: ...

    with pgq.on("job:completed", lambda event: enqueue(follow_up), task=work):
        for _ in range(3):
            enqueue(work)
        drain(pgq)
        assert pgq._listeners.deliver(60)
        drain(pgq)

    assert [job.status for job in pgq.list_jobs(task="follow_up")] == ["completed"] * 3


def test_the_thread_of_an_ended_subscription_ends(pgq: PgQueue) -> None:
    @pgq.task
    def work() -> None: ...

    def shortlived(event: JobEvent) -> None:
        subscription()

    subscription = pgq.on("job:enqueued", shortlived)
    enqueue(work)

    wait_for(
        lambda: not any("shortlived" in thread.name for thread in threading.enumerate()), "the listener's thread to end"
    )
    assert pgq._listeners.wanted == frozenset()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "job:faild",
            r"there is no event 'job:faild' \(did you mean 'job:failed'\?\); events are: job:\*, job:enqueued",
        ),
        ("failed", r"there is no event 'failed' \(did you mean 'job:failed'\?\)"),
        ("", "there is no event ''; events are"),
        (None, "there is no event None"),
        (5, "there is no event 5"),
    ],
)
def test_an_unknown_event_is_refused_with_the_nearest_name(name: Any, message: str) -> None:
    pgq = PgQueue("sqlite://")

    with pytest.raises(ConfigurationError, match=message):
        pgq.on(name, print)


def test_what_cannot_listen_or_filter_is_refused() -> None:
    pgq = PgQueue("sqlite://")

    with pytest.raises(ConfigurationError, match="a listener to job:failed must be a function, got str"):
        pgq.on("job:failed", "print")  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match="queue name must be"):
        pgq.on("job:failed", print, queue="a b")
    with pytest.raises(ConfigurationError, match="task name must be"):
        pgq.on("job:failed", print, task="")


# What an event shows ---------------------------------------------------------------------------------------


def test_an_event_cannot_be_changed_and_its_repr_shows_no_payload_result_or_error(pgq: PgQueue) -> None:
    ear = Ear(pgq)

    @pgq.task(retry=Retry(max_retries=0))
    def leak(password: str, fails: bool) -> str:
        if fails:
            raise ValueError(password)
        return password

    enqueue(leak.using(metadata={"token": "hunter2"}), password="hunter2", fails=True)
    enqueue(leak, password="hunter2", fails=False)
    drain(pgq)

    assert len(ear.heard) == 7
    assert not any("hunter2" in repr(event) for event in ear.heard)
    with pytest.raises(AttributeError):
        ear.heard[0].task = "other"  # type: ignore[misc]


# What a listener cannot harm -------------------------------------------------------------------------------


def test_a_listener_that_raises_is_logged_once_without_the_message_and_harms_nothing(
    pgq: PgQueue, caplog: pytest.LogCaptureFixture
) -> None:
    @pgq.on("job:completed")
    def careless(event: JobEvent) -> None:
        raise RuntimeError("hunter2")

    @pgq.on("job:completed")
    def exiting(event: JobEvent) -> None:
        raise SystemExit

    ear = Ear(pgq, "job:completed")

    @pgq.task
    def work() -> None: ...

    for _ in range(5):
        enqueue(work)
    report = drain(pgq)

    assert report.completed == 5
    assert len(ear.heard) == 5
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert any("careless failed on job:completed of job" in error and "RuntimeError" in error for error in errors)
    assert "test_listening.py" in errors[0]
    assert "hunter2" not in caplog.text


def test_a_listener_that_blocks_holds_up_neither_jobs_nor_other_listeners_nor_the_stop_for_ever(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgqueue.worker.DELIVER_SECONDS", 0.2)
    released = threading.Event()
    blocked = pgq.on("job:*", lambda event: released.wait(60))
    ear = Ear(pgq, "job:completed")

    @pgq.task
    def work() -> None: ...

    with pgq.begin() as connection:
        work.enqueue_many(connection, [{}] * 20)
    began = time.monotonic()
    report = drain(pgq)

    assert report.completed == 20
    assert len(ear.heard) == 20
    assert time.monotonic() - began < 30
    blocked()
    released.set()


def test_what_a_listener_cannot_keep_up_with_is_dropped_and_counted_and_logged_once(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "BACKLOG_MAX", 3)
    monkeypatch.setattr("pgqueue.worker.DELIVER_SECONDS", 0.0)
    gate = Gate()
    heard: list[JobEvent] = []

    def slow(event: JobEvent) -> None:
        gate.pass_through()
        heard.append(event)

    subscription = pgq.on("job:completed", slow)

    @pgq.task
    def work() -> None: ...

    with pgq.begin() as connection:
        work.enqueue_many(connection, [{}] * 10)
    drain(pgq)
    gate.open()
    wait_for(lambda: len(heard) + subscription.dropped == 10, "every event to be heard or dropped")

    assert subscription.dropped >= 6
    assert sum("too slow" in record.getMessage() for record in caplog.records) == 1


def test_large_payloads_count_for_more_in_a_backlog(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "BACKLOG_MAX", 20)
    gate = Gate()
    subscription = pgq.on("job:enqueued", lambda event: gate.pass_through())

    @pgq.task
    def work(text: str) -> None: ...

    enqueue(work, text="")
    wait_for(lambda: gate.inside, "the listener")
    for _ in range(4):
        enqueue(work, text="x" * 10 * events.CHARACTERS_PER_EVENT)

    assert subscription.dropped == 3
    gate.open()
    subscription()


def claimed(**changes: Any) -> ClaimedJob:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    given: dict[str, Any] = {"id": 1, "queue": "default", "task": "work", "payload_json": "{}", "priority": 0}
    given |= {"run_at": moment, "attempt": 1, "retries": 0, "max_retries": 3, "claimed_by": "worker-1"}
    given |= {"claim_token": uuid.uuid4(), "created_at": moment, "metadata_json": "{}"}
    return ClaimedJob(**(given | changes))


def test_an_event_larger_than_the_backlog_is_heard_by_a_listener_that_has_nothing_else_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "BACKLOG_MAX", 10)
    listeners, heard = events.Listeners(), list[str]()
    subscription = listeners.add("job:completed", lambda event: heard.append(event.name), task=None, queue=None)
    job = claimed(payload_json="x" * 20 * events.CHARACTERS_PER_EVENT)

    for _ in range(3):
        listeners.tell([events.event_of(events.EventName.COMPLETED, job)])
        assert listeners.deliver(60)

    assert (heard, subscription.dropped) == (["job:completed"] * 3, 0)
    subscription()


@pytest.mark.parametrize("what", ["payload", "metadata", "result", "error", "progress"])
def test_whatever_is_large_of_an_event_counts_in_a_backlog(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(events, "BACKLOG_MAX", 10)
    listeners, gate = events.Listeners(), Gate()
    subscription = listeners.add("job:failed", lambda event: gate.pass_through(), task=None, queue=None)
    text = "x" * 4 * events.CHARACTERS_PER_EVENT
    job = claimed(**({f"{what}_json": text} if what in ("payload", "metadata") else {}))
    large: dict[str, Any] = {
        "error": {"error": ErrorInfo("ValueError", "", text)},
        "result": {"result_json": text},
        "progress": {"progress": {"done": 1, "total": 2, "note": text}},
    }.get(what, {})
    listeners.tell([events.event_of(events.EventName.FAILED, job)])
    wait_for(lambda: gate.inside, "the listener")

    listeners.tell(events.event_of(events.EventName.FAILED, job, **large) for _ in range(10))

    assert subscription.dropped == 8
    gate.open()
    subscription()


def test_progress_is_told_at_most_once_a_second_of_each_job_but_the_last_step_always(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "PROGRESS_SECONDS", 3600.0)
    ear = Ear(pgq, "job:progress")
    work = pgq.external_task("work")
    enqueue(work)
    enqueue(work)
    one, two = pgq.claim("consumer", limit=2)

    for done in range(1, 101):
        for job in (one, two):
            pgq._listeners.tell_progress(job, {"done": done, "total": 100})

    ear.wait_for(4)
    assert [(event.job_id, event.progress) for event in ear.heard] == [
        (job.id, {"done": done, "total": 100}) for done in (1, 100) for job in (one, two)
    ]


def test_the_first_progress_of_an_attempt_is_told_however_soon_it_comes_after_another_attempt_s(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "PROGRESS_SECONDS", 3600.0)
    ear = Ear(pgq, "job:progress")
    enqueue(pgq.external_task("work"))

    for attempt in (1, 2):
        (job,) = pgq.claim("consumer", limit=1)
        pgq._listeners.tell_progress(job, {"done": attempt, "total": 9})
        pgq.nack(job, delay=0)

    ear.wait_for(2)
    assert [event.progress for event in ear.heard] == [{"done": attempt, "total": 9} for attempt in (1, 2)]


def test_nothing_is_noted_of_attempts_while_nobody_listens(pgq: PgQueue) -> None:
    @pgq.task
    def work() -> None: ...

    before = threading.active_count()
    enqueue(work)
    worker = Worker(pgq, WorkerConfig(drain=True))
    worker.run()

    assert pgq._listeners.wanted == frozenset()
    assert threading.active_count() <= before + 1  # the sender of wake-ups


def test_events_of_a_job_come_in_their_order(pgq: PgQueue) -> None:
    ear = Ear(pgq)

    @pgq.task(retry=Retry(max_retries=2, base=0.0))
    def flaky() -> None:
        raise ValueError

    job_ids = [enqueue(flaky) for _ in range(5)]
    drain(pgq)

    attempt = ["job:started", "job:failed", "job:retried"]
    for job_id in job_ids:
        assert ear.names(job_id) == ["job:enqueued", *attempt, *attempt, "job:started", "job:failed", "job:dead"]


def test_the_last_events_of_a_worker_are_delivered_before_it_ends(pgq: PgQueue) -> None:
    heard = []

    @pgq.on("job:completed")
    def slowly(event: JobEvent) -> None:
        time.sleep(0.01)
        heard.append(event)

    @pgq.task
    def work() -> None: ...

    with pgq.begin() as connection:
        work.enqueue_many(connection, [{}] * 20)
    with working(pgq) as worker:
        wait_for(lambda: worker.report.completed == 20, "all jobs")

    assert len(heard) == 20


def test_disposing_from_within_a_listener_does_not_wait_for_itself(pgq: PgQueue) -> None:
    took: list[float] = []

    @pgq.on("job:enqueued")
    def leave(event: JobEvent) -> None:
        began = time.monotonic()
        pgq._listeners.deliver(30)
        took.append(time.monotonic() - began)

    @pgq.task
    def work() -> None: ...

    job_id = enqueue(work)
    wait_for_status(pgq, job_id, "pending")
    wait_for(lambda: took, "the listener")

    assert took[0] < 10


def test_disposing_ends_the_threads_of_listeners_and_a_later_event_is_heard_all_the_same(pgq: PgQueue) -> None:
    ear = Ear(pgq)
    before = set(threading.enumerate())

    @pgq.task
    def work() -> None: ...

    first = enqueue(work)
    ear.wait_for(1)
    (thread,) = [thread for thread in set(threading.enumerate()) - before if "listener" in thread.name]
    pgq.dispose()
    thread.join(PATIENCE_SECONDS)
    ended = not thread.is_alive()
    second = enqueue(work)
    ear.wait_for(2)

    assert ended
    assert [event.job_id for event in ear.heard] == [first, second]
