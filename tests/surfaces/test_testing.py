"""pgqueue.testing: jobs of a test's own transaction, on PostgreSQL and on SQLite."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support import scalar

from pgqueue import Cancel, ConfigurationError, JobFailed, PgQueue, Rate, Retry, Snooze, Unique, progress, store
from pgqueue.testing import (
    Tester,
    assert_enqueued,
    assert_enqueued_async,
    drain,
    drain_async,
    enqueued,
    inline,
    refute_enqueued,
    refute_enqueued_async,
    travel,
    travel_async,
)

NOTES = sa.table("notes", sa.column("text"))


@pytest.fixture(params=["recipe", "plain session", "connection"])
def session(pgq: PgQueue, request: pytest.FixtureRequest) -> Iterator[Session | sa.Connection]:
    """The ways in which tests of an application hold their transaction."""
    make_notes(pgq)
    with pgq.engine.connect() as connection:
        outer = connection.begin()
        if request.param == "connection":
            yield connection
        else:
            how: Any = {"join_transaction_mode": "create_savepoint"} if request.param == "recipe" else {}
            with Session(bind=connection, **how) as given:
                yield given
        outer.rollback()
    assert scalar(pgq.engine, f"SELECT count(*) FROM {pgq.tables.jobs.fullname}") == 0
    assert scalar(pgq.engine, "SELECT count(*) FROM notes") == 0


@pytest.fixture
def recipe(pgq: PgQueue) -> Iterator[Session]:
    make_notes(pgq)
    with pgq.engine.connect() as connection:
        outer = connection.begin()
        with Session(bind=connection, join_transaction_mode="create_savepoint") as given:
            yield given
        outer.rollback()


def make_notes(pgq: PgQueue) -> None:
    with pgq.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE notes (text varchar(100) NOT NULL UNIQUE)"))


def notes(session: Session | sa.Connection) -> list[str]:
    return sorted(session.execute(sa.select(NOTES.c.text)).scalars())


def note(session: Session | sa.Connection, text: str) -> None:
    session.execute(sa.insert(NOTES).values(text=text))


# What was enqueued


def test_jobs_are_found_by_a_part_of_their_payload(pgq: PgQueue, session: Session) -> None:
    @pgq.task(queue="images")
    def resize(file: str, day: date, size: int = 1024) -> None: ...

    resize.enqueue(session, file="a.jpg", day=date(2026, 1, 2))
    resize.using(delay=60).enqueue(session, file="b.jpg", day=date(2026, 1, 2), size=9)

    assert assert_enqueued(session, resize, file="a.jpg").payload["file"] == "a.jpg"
    assert_enqueued(session, resize, day=date(2026, 1, 2), queue="images", count=2)
    refute_enqueued(session, resize, file="c.jpg")
    refute_enqueued(session, resize, queue="other")
    assert [job.payload["file"] for job in enqueued(session, resize)] == ["a.jpg", "b.jpg"]


def test_a_payload_with_a_key_named_queue_is_found_as_well(pgq: PgQueue, recipe: Session) -> None:
    @pgq.task
    def move(queue: str, count: int) -> None: ...

    move.enqueue(recipe, queue="left", count=2)

    assert_enqueued(recipe, move, queue="default", payload={"queue": "left", "count": 2})
    refute_enqueued(recipe, move, payload={"queue": "right"})
    with pytest.raises(ConfigurationError, match="payload= takes a mapping of the payload's keys, got str"):
        enqueued(recipe, move, payload="left")


def test_a_failed_assertion_says_what_is_pending(pgq: PgQueue, recipe: Session) -> None:
    @pgq.task
    def resize(file: str) -> None: ...

    with pytest.raises(AssertionError, match=r"expected a job of task 'resize', found none. No job of this task is pe"):
        assert_enqueued(recipe, resize)
    resize.enqueue(recipe, file="a.jpg")

    with pytest.raises(AssertionError, match=r"with file='b.jpg', found none.*\n.*payload \{'file': 'a.jpg'\}"):
        assert_enqueued(recipe, resize, file="b.jpg")
    with pytest.raises(AssertionError, match="expected 2 jobs of task 'resize', found 1"):
        assert_enqueued(recipe, resize, count=2)
    with pytest.raises(AssertionError, match="expected no job of task 'resize'"):
        refute_enqueued(recipe, resize)


# Drain


def test_a_drain_runs_due_jobs_in_the_tests_transaction(pgq: PgQueue, session: Session) -> None:
    @pgq.task(transactional=True)
    def write(session: Session, text: str) -> str:
        note(session, text)
        read.enqueue(session, text=text)
        return text

    @pgq.task
    def read(text: str) -> None:
        assert notes(session) == [text]

    write.enqueue(session, text="first")
    write.using(delay=3600).enqueue(session, text="later")

    report = drain(session, pgq)

    assert (report.completed, report.dead, str(report)) == (2, 0, "2 completed")
    assert [(attempt.task, attempt.ended, attempt.number) for attempt in report.attempts] == [
        ("write", "completed", 1),
        ("read", "completed", 1),
    ]
    assert notes(session) == ["first"]
    assert_enqueued(session, write, text="later", count=1)
    row = session.execute(sa.select(pgq.tables.jobs).order_by(pgq.tables.jobs.c.id)).first()
    assert row is not None
    assert (row.status, row.result) == ("completed", "first")


def test_what_a_transactional_task_wrote_is_gone_when_it_fails(pgq: PgQueue, session: Session) -> None:
    @pgq.task(transactional=True, retry=Retry(max_retries=1, base=60))
    def write(session: Session, text: str) -> None:
        note(session, text)
        write.enqueue(session, text="child")
        raise ValueError("no")

    write.enqueue(session, text="first")

    report = drain(session, pgq, raise_errors=False)

    assert (report.retried, notes(session)) == (1, [])
    assert [str(error) for error in report.errors] == ["no"]
    assert_enqueued(session, write, count=1)


def test_rows_that_the_database_refuses_fail_the_attempt_alone(pgq: PgQueue, session: Session) -> None:
    @pgq.task(transactional=True, retry=Retry(max_retries=0))
    def write(session: Session, text: str) -> None:
        note(session, text)

    for _ in range(2):
        write.enqueue(session, text="same")

    report = drain(session, pgq, raise_errors=False)

    assert (report.completed, report.dead, notes(session)) == (1, 1, ["same"])


def test_a_plain_task_that_breaks_the_transaction_fails_alone(pgq: PgQueue, session: Session) -> None:
    connection = session if isinstance(session, sa.Connection) else session.connection()

    @pgq.task(retry=Retry(max_retries=0))
    def write(text: str) -> None:
        note(connection, text)

    for _ in range(2):
        write.enqueue(session, text="same")

    report = drain(session, pgq, raise_errors=False)

    assert (report.completed, report.dead, notes(session)) == (1, 1, ["same"])


def test_a_plain_task_may_commit_and_roll_back_the_session_it_shares_with_the_test(
    pgq: PgQueue, recipe: Session
) -> None:
    @pgq.task(retry=Retry(max_retries=1, base=1))
    def write(text: str) -> None:
        note(recipe, text)
        recipe.commit()
        note(recipe, text + " again")
        if text == "b":
            recipe.rollback()
            raise ValueError

    for text in "ab":
        write.enqueue(recipe, text=text)

    report = drain(recipe, pgq, raise_errors=False)

    assert (report.completed, report.retried) == (1, 1)
    assert notes(recipe) == ["a", "b"]


def test_a_task_that_ends_the_tests_transaction_is_told_so(pgq: PgQueue) -> None:
    with pgq.engine.connect() as connection:
        outer = connection.begin()

        @pgq.task
        def meddle() -> None:
            outer.rollback()

        meddle.enqueue(connection)
        with pytest.raises(ConfigurationError, match="task 'meddle' committed or rolled back the tra"):
            drain(connection, pgq)


def test_a_transactional_task_that_commits_is_refused_as_in_production(pgq: PgQueue, recipe: Session) -> None:
    @pgq.task(transactional=True)
    def meddle(session: Session) -> None:
        session.commit()

    meddle.enqueue(recipe)

    with pytest.raises(Exception, match="the transactional task 'meddle' committed its session"):
        drain(recipe, pgq)


def test_what_a_task_raises_is_raised_once_its_retry_is_written(pgq: PgQueue, session: Session) -> None:
    @pgq.task
    def fail() -> None:
        raise LookupError("gone")

    fail.enqueue(session)

    with pytest.raises(LookupError, match="gone"):
        drain(session, pgq)

    (job,) = enqueued(session, fail)
    assert (job.attempt, job.retries, job.error["type"] if job.error else None) == (1, 1, "LookupError")


def test_what_a_task_does_on_purpose_is_not_raised(pgq: PgQueue, session: Session) -> None:
    @pgq.task
    def wait() -> None:
        raise Snooze(60)

    @pgq.task
    def give_up() -> None:
        raise Cancel("not wanted")

    wait.enqueue(session)
    give_up.enqueue(session)

    report = drain(session, pgq)

    assert (report.snoozed, report.cancelled, report.retried, report.dead) == (1, 1, 0, 0)


def test_an_attempt_that_fails_without_an_exception_is_raised_as_well(pgq: PgQueue, recipe: Session) -> None:
    @pgq.task
    def give() -> object:
        return object()

    give.enqueue(recipe)

    with pytest.raises(JobFailed, match=r"task 'give', job \d+: InvalidResult"):
        drain(recipe, pgq)


def test_ctrl_c_ends_the_test_and_not_the_attempt(pgq: PgQueue, recipe: Session) -> None:
    @pgq.task
    def stop() -> None:
        raise KeyboardInterrupt

    stop.enqueue(recipe)

    with pytest.raises(KeyboardInterrupt):
        drain(recipe, pgq, raise_errors=False)


def test_a_job_is_dead_when_its_retries_are_used_up(pgq: PgQueue, session: Session) -> None:
    @pgq.task(retry=Retry(max_retries=2, backoff="constant", base=60))
    def fail() -> None:
        raise ValueError

    fail.enqueue(session)
    ends = []
    for _ in range(3):
        ends += [attempt.ended for attempt in drain(session, pgq, raise_errors=False).attempts]
        assert drain(session, pgq).attempts == []
        travel(session, pgq, minutes=2)

    assert ends == ["retried", "retried", "dead"]


def test_a_task_that_enqueues_itself_without_end_is_stopped(pgq: PgQueue, recipe: Session) -> None:
    @pgq.task(transactional=True)
    def again(session: Session) -> None:
        again.enqueue(session)

    again.enqueue(recipe)

    with pytest.raises(AssertionError, match="drained 5 attempts, and jobs of queue 'default' are still due"):
        drain(recipe, pgq, attempts_max=5)


def test_a_drain_keeps_to_a_queue_or_a_task(pgq: PgQueue, recipe: Session) -> None:
    ran = []

    @pgq.task
    def one() -> None:
        ran.append("one")

    @pgq.task(queue="other")
    def other() -> None:
        ran.append("other")

    for task in (one, other):
        task.enqueue(recipe)
        task.enqueue(recipe)

    drain(recipe, pgq, queue="other")
    assert ran == ["other", "other"]
    drain(recipe, pgq, task=one)
    assert ran == ["other", "other", "one", "one"]


def test_limits_hold_in_a_drain(pgq: PgQueue, session: Session) -> None:
    @pgq.task(rate=Rate(2, per="hour", burst=2))
    def call(number: int) -> None: ...

    for number in range(5):
        call.enqueue(session, number=number)

    assert drain(session, pgq).completed == 2
    assert drain(session, pgq).completed == 0
    travel(session, pgq, minutes=61)
    assert drain(session, pgq).completed == 2


def test_jobs_of_higher_priority_come_first(pgq: PgQueue, recipe: Session) -> None:
    ran = []

    @pgq.task
    def run(name: str) -> None:
        ran.append(name)
        if name == "first":
            run.using(priority=5).enqueue(recipe, name="urgent")
            recipe.commit()

    run.enqueue(recipe, name="first")
    run.enqueue(recipe, name="second")
    drain(recipe, pgq)

    assert ran == ["first", "urgent", "second"]


def test_progress_of_a_drained_job_is_stored(pgq: PgQueue, recipe: Session) -> None:
    @pgq.task
    def count() -> None:
        progress(1, 3)

    handle = count.enqueue(recipe)
    drain(recipe, pgq)

    job = recipe.get(pgq.Job, handle.id)
    assert job is not None
    assert job.progress is not None
    assert (job.progress["done"], job.progress["total"]) == (1, 3)


def test_middleware_goes_around_drained_jobs(pgq: PgQueue, recipe: Session) -> None:
    seen = []

    @pgq.middleware("run")
    def around(job: Any) -> Iterator[None]:
        seen.append(job.task)
        yield

    @pgq.task
    def one() -> None: ...

    one.enqueue(recipe)
    drain(recipe, pgq)

    assert seen == ["one"]


def test_a_drain_runs_async_tasks(pgq: PgQueue, session: Session) -> None:
    @pgq.task
    async def wait() -> str:
        await asyncio.sleep(0)
        return "done"

    wait.enqueue(session)

    assert drain(session, pgq).completed == 1


def test_an_attempt_that_took_too_long_has_failed(pgq: PgQueue, recipe: Session) -> None:
    @pgq.task(timeout=1e-9)
    def slow() -> None: ...

    slow.enqueue(recipe)

    with pytest.raises(JobFailed, match="TimeoutError: the attempt took longer"):
        drain(recipe, pgq)


def test_the_test_sees_what_jobs_wrote_to_objects_it_has_loaded(pgq: PgQueue, recipe: Session) -> None:
    @pgq.task
    def one() -> None: ...

    recipe.add(one.new())
    recipe.flush()
    (job,) = recipe.scalars(sa.select(pgq.Job))
    assert job.status == "pending"
    drain(recipe, pgq)

    assert job.status == "completed"


def test_a_task_cannot_drain_its_own_transaction(pgq: PgQueue, recipe: Session) -> None:
    @pgq.task
    def one() -> None:
        drain(recipe.connection(), pgq)

    one.enqueue(recipe)

    with pytest.raises(ConfigurationError, match="cannot drain the transaction in which it is run itself"):
        drain(recipe, pgq)


# Inline


def test_inline_a_job_has_run_when_its_enqueue_returns(pgq: PgQueue, session: Session) -> None:
    ran = []

    @pgq.task(transactional=True)
    def parent(session: Session, name: str) -> None:
        child.enqueue(session, name=name)
        ran.append(f"parent {name}")

    @pgq.task
    def child(name: str) -> None:
        ran.append(f"child {name}")

    with inline(pgq):
        parent.enqueue(session, name="a")
        assert ran == ["parent a", "child a"]
        child.enqueue_many(session, [{"name": "b"}, {"name": "c"}])
        assert ran[2:] == ["child b", "child c"]
    child.enqueue(session, name="d")

    assert ran[4:] == []


def test_inline_what_the_job_raises_comes_out_of_the_enqueue(pgq: PgQueue, session: Session) -> None:
    @pgq.task
    def fail() -> None:
        raise LookupError("gone")

    with inline(pgq), pytest.raises(LookupError, match="gone"):
        fail.enqueue(session)
    with inline(pgq, raise_errors=False):
        fail.enqueue(session)


# Time


def test_time_can_be_let_pass(pgq: PgQueue, session: Session) -> None:
    @pgq.task(unique=Unique(period=3600))
    def report() -> None: ...

    @pgq.task(expires_in=60)
    def hurry() -> None: ...

    report.using(delay=1800).enqueue(session)
    hurry.enqueue(session)
    assert drain(session, pgq, task=report).completed == 0
    travel(session, pgq, minutes=31)
    done = drain(session, pgq)
    assert (done.completed, done.dead) == (1, 1)

    assert not report.enqueue(session).inserted
    travel(session, pgq, minutes=31)
    assert report.enqueue(session).inserted


def test_a_lease_runs_out_while_time_passes(pgq: PgQueue, session: Session) -> None:
    @pgq.task
    def one() -> None: ...

    one.enqueue(session)
    connection = session if isinstance(session, sa.Connection) else session.connection()
    claimed = store.claim(connection, pgq.tables, queue="default", worker="w", token=uuid.uuid4(), limit=1, lease=30)
    assert len(claimed) == 1
    assert drain(session, pgq).completed == 0
    travel(session, pgq, seconds=31)
    report = drain(session, pgq)

    assert (report.swept, report.completed) == (1, 1)


def test_schedules_tick_while_time_passes(pgq: PgQueue, session: Session) -> None:
    ran = []

    @pgq.cron("0 3 * * *")
    @pgq.task
    def nightly() -> None:
        ran.append("nightly")

    assert drain(session, pgq, schedules=True).completed == 0
    for nights in (1, 2):
        travel(session, pgq, days=1)
        assert drain(session, pgq).completed == 0
        assert drain(session, pgq, schedules=True).completed == 1
        assert len(ran) == nights


@pytest.mark.parametrize(
    ("distance", "problem"),
    [
        ({}, "more than 0"),
        ({"minutes": -1}, "more than 0"),
        ({"days": 1e12}, "got inf"),
        ({"hours": float("nan")}, "got inf"),
        ({"seconds": "3"}, "seconds of travel.. must be a number, got str"),
    ],
)
def test_journeys_that_cannot_be_made_are_refused(
    pgq: PgQueue, recipe: Session, distance: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        travel(recipe, pgq, **distance)


# Asynchronous tests


def test_everything_works_in_asynchronous_tests(pgq: PgQueue) -> None:
    make_notes(pgq)

    @pgq.task(transactional=True, retry=Retry(max_retries=1, base=60))
    async def write(session: AsyncSession, text: str) -> None:
        await session.execute(sa.insert(NOTES).values(text=text))
        await read.enqueue_async(session, text=text)
        if text == "bad":
            raise ValueError

    @pgq.task(transactional=True)
    def write_plainly(session: Session, text: str) -> None:
        note(session, text)

    @pgq.task
    async def read(text: str) -> None:
        await asyncio.sleep(0)

    async def run() -> None:
        async with pgq.async_engine.connect() as connection:
            outer = await connection.begin()
            async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
                await write.enqueue_async(session, text="good")
                await write.enqueue_async(session, text="bad")
                await write_plainly.enqueue_async(session, text="plain")
                await assert_enqueued_async(session, write, text="bad", count=1)
                report = await drain_async(session, pgq, raise_errors=False)
                assert (report.completed, report.retried) == (3, 1)
                await refute_enqueued_async(session, read)
                texts = (await session.execute(sa.select(NOTES.c.text).order_by(NOTES.c.text))).scalars().all()
                assert texts == ["good", "plain"]
                await travel_async(session, pgq, hours=2)
                with pytest.raises(ValueError):  # noqa: PT011
                    await drain_async(session, pgq)
                with inline(pgq):
                    await write.enqueue_async(session, text="inline")
                await refute_enqueued_async(session, read)
            assert (await drain_async(connection, pgq)).attempts == []
            await outer.rollback()
        await pgq.async_engine.dispose()

    asyncio.run(run())

    assert scalar(pgq.engine, f"SELECT count(*) FROM {pgq.tables.jobs.fullname}") == 0


def test_an_asynchronous_task_in_the_wrong_kind_of_test_is_told_the_right_call(pgq: PgQueue, recipe: Session) -> None:
    @pgq.task(transactional=True)
    async def write(session: AsyncSession) -> None: ...

    @pgq.task(queue="other")
    async def read() -> None: ...

    async def drain_in_loop() -> None:
        drain(recipe, pgq, queue="other")

    write.enqueue(recipe)
    read.enqueue(recipe)

    with pytest.raises(ConfigurationError, match="'write' is asynchronous, and the test's connection is not: use"):
        drain(recipe, pgq, queue="default")
    with pytest.raises(ConfigurationError, match="'read' is asynchronous, and so is the test: use `await drain_async"):
        asyncio.run(drain_in_loop())


def test_an_engine_whose_driver_would_commit_the_tests_savepoint_is_refused(sqlite_url: str) -> None:
    engine = sa.create_engine(sqlite_url)
    pgq = PgQueue(sqlite_url)

    @pgq.task
    def one() -> None: ...

    with engine.connect() as connection:
        outer = connection.begin()
        with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
            one.enqueue(session)
            with pytest.raises(ConfigurationError, match="leaves the begin of transactions to the driver"):
                drain(session, pgq)
        outer.rollback()
    engine.dispose()


def test_a_tester_knows_the_queue_and_the_session(pgq: PgQueue, session: Session) -> None:
    tester = Tester(pgq, session)

    @pgq.task
    def one() -> None: ...

    one.using(delay=60).enqueue(session)
    tester.assert_enqueued(one, count=1)
    tester.travel(minutes=2)
    assert tester.drain().completed == 1
    tester.refute_enqueued(one)
    with tester.inline():
        one.enqueue(session)
    assert tester.enqueued(one) == []
