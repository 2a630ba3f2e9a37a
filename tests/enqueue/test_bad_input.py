"""What cannot be enqueued is refused at the call, says why, and changes no row."""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pydantic
import pytest
import sqlalchemy as sa
from jobs import add, claim, claim_one, everything, external, statuses
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from pgqueue import (
    ConfigurationError,
    EnqueueRequest,
    InvalidPayload,
    NotAwaited,
    PgQueue,
    PgqueueError,
    TaskNotFound,
    WrongSession,
)


@contextmanager
def refused(pgq: PgQueue, kind: type[PgqueueError], *words: str) -> Iterator[sa.Connection]:
    """The block raises this error with these words in its message, and no row of any table has changed after it.

    The transaction goes on and commits: it is the call that must not have written anything.
    """
    before = everything(pgq)
    with pgq.begin() as connection:
        with pytest.raises(kind) as caught:
            yield connection
        connection.execute(sa.text("SELECT 1"))
    for word in words:
        assert word in str(caught.value)
    assert everything(pgq) == before


# Payloads --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def a_row_that_must_not_change(pgq: PgQueue) -> None:
    add(pgq)


@pytest.mark.parametrize("way", ["enqueue by name", "enqueue_many"])
def test_a_payload_that_is_no_mapping(pgq: PgQueue, way: str) -> None:
    task = external(pgq)

    for payload in (None, 5, "text", ["a"], [("n", 1)], object()):
        words = "payload of task 'work' must be a mapping", type(payload).__name__
        with refused(pgq, InvalidPayload, *words) as connection:
            if way == "enqueue_many":
                task.enqueue_many(connection, [{"n": 1}, payload])  # type: ignore[list-item]  # under test
            else:
                pgq.enqueue(connection, "work", payload)  # type: ignore[arg-type]  # under test


def test_a_payload_whose_keys_are_no_strings(pgq: PgQueue) -> None:
    task = external(pgq)

    with refused(pgq, InvalidPayload, "payload of task 'work'") as connection:
        pgq.enqueue(connection, "work", {1: "a"})  # type: ignore[dict-item]  # the mistake under test
    with refused(pgq, InvalidPayload, "payload of task 'work'") as connection:
        task.enqueue_many(connection, [{1: "a"}])  # type: ignore[dict-item]  # the mistake under test


def test_many_payloads_that_are_no_iterable_of_mappings(pgq: PgQueue) -> None:
    payloads: Any
    for payloads in ({"n": 1}, "text", b"text", None, 5):
        words = "enqueue_many() takes an iterable of payloads", type(payloads).__name__
        with refused(pgq, InvalidPayload, *words) as connection:
            external(pgq).enqueue_many(connection, payloads)


class Secretive(pydantic.BaseModel):
    password: str


def test_a_payload_that_does_not_fit_the_signature_names_every_misfit_and_no_value(pgq: PgQueue) -> None:
    @pgq.task
    def resize(file: str, size: int, customer: Secretive, *, sharp: bool = True) -> None: ...

    payload: Any = {"size": "tiny-secret", "customer": {"password": ["tiny-secret"]}, "colour": "red", "sharp": 7}
    misfits = "file: ", "size: ", "password: ", "colour: ", "sharp: "

    with refused(pgq, InvalidPayload, "payload of task 'resize' does not fit", *misfits) as connection:
        resize.enqueue(connection, **payload)
    with pytest.raises(InvalidPayload) as caught:
        resize.new(**payload)

    assert "tiny-secret" not in str(caught.value)


def test_an_argument_given_twice_or_too_many_of_them(pgq: PgQueue) -> None:
    @pgq.task
    def resize(file: str, size: int = 1) -> None: ...

    enqueue: Any = resize.enqueue
    with refused(pgq, InvalidPayload, "task 'resize' got its argument 'file' twice") as connection:
        enqueue(connection, "a", file="b")
    with refused(pgq, InvalidPayload, "task 'resize' takes 2 arguments (file, size), got 3") as connection:
        enqueue(connection, "a", 1, 2)


def unserialisable() -> list[Any]:
    contains_itself: list[Any] = []
    contains_itself.append(contains_itself)
    return [object(), len, open, {"deep": [object()]}, contains_itself, b"\xff", range, ValueError("x")]


each_way = pytest.mark.parametrize("way", ["enqueue", "enqueue_many", "new", "metadata"])


@each_way
def test_a_value_that_is_not_json(pgq: PgQueue, way: str) -> None:
    what = "metadata" if way == "metadata" else "payload of task 'work'"

    for value in unserialisable():
        with refused(pgq, InvalidPayload, f"{what} cannot be stored as JSON") as connection:
            send(pgq, connection, way, value)


STORABLE_NOWHERE = [
    ("a\0b", "cannot be stored: a NUL character at .value"),
    ({"a\0b": 1}, "cannot be stored: a NUL character at .value"),
    ([{"a": ["\0"]}], "cannot be stored: a NUL character at .value[0].a[0]"),
    ("\ud800", "surrogate"),
    ({"\udfff": 1}, "surrogate"),
    (math.nan, "cannot be stored: it contains NaN"),
    ([math.inf], "cannot be stored: it contains Infinity"),
    ({"a": -math.inf}, "cannot be stored: it contains "),
    (
        "x" * (1024 * 1024),
        "bytes of JSON, more than the 1,048,576 allowed: store the data elsewhere and pass a reference",
    ),
    (10**4400, "cannot be stored: it could not be read back"),
]


@each_way
def test_a_value_that_not_every_database_can_store(pgq: PgQueue, way: str) -> None:
    for value, words in STORABLE_NOWHERE:
        with refused(pgq, InvalidPayload, words) as connection:
            send(pgq, connection, way, value)


def send(pgq: PgQueue, connection: sa.Connection, way: str, value: Any) -> None:
    task = external(pgq)
    if way == "enqueue":
        task.enqueue(connection, value=value)
    elif way == "enqueue_many":
        task.enqueue_many(connection, [{"value": 1}, {"value": value}])
    elif way == "new":
        with Session(connection) as session:
            session.add(task.new(value=value))
    else:
        task.using(metadata={"value": value}).enqueue(connection)


@pytest.mark.parametrize(
    ("payloads", "kind", "words"),
    [(None, ConfigurationError, "must leave the payloads of task 'work' a list"), ([5], InvalidPayload, "a mapping")],
)
def test_payloads_that_a_middleware_made_of_others(
    pgq: PgQueue, payloads: Any, kind: type[PgqueueError], words: str
) -> None:
    @pgq.middleware("enqueue")
    def break_it(request: EnqueueRequest) -> None:
        request.payloads = payloads

    with refused(pgq, kind, words) as connection:
        external(pgq).enqueue(connection, n=1)


def test_metadata_that_is_no_mapping(pgq: PgQueue) -> None:
    with refused(pgq, InvalidPayload, "metadata must be a mapping, got list") as connection:
        external(pgq).using(metadata=["a"]).enqueue(connection)  # type: ignore[arg-type]  # the mistake under test


# Tasks and names -------------------------------------------------------------------------------------------


def test_an_unknown_task_names_those_there_are(pgq: PgQueue) -> None:
    external(pgq, "send")
    external(pgq, "resize")

    with refused(
        pgq, TaskNotFound, "no task named 'resized' is registered; registered tasks: resize, send, work"
    ) as connection:
        pgq.enqueue(connection, "resized", {})


HOSTILE_NAMES = [
    'a"b', "a'b", "a;b", "a b", "a\nb", "a\n", "", "-a", ".a", "a/b", "a%sb", "a\0b", "ä", "a" * 129, "\ud800",
    5, b"a", ["a"],
]  # fmt: skip


def test_a_queue_name_with_other_than_letters_digits_and_few_signs(pgq: PgQueue) -> None:
    name: Any
    for name in HOSTILE_NAMES:
        with refused(pgq, ConfigurationError, "queue name must be 1 to 128 letters, digits", repr(name)) as connection:
            external(pgq).using(queue=name).enqueue(connection)


def test_a_queue_or_task_name_that_a_task_cannot_have(sqlite_url: str) -> None:
    queues = PgQueue(sqlite_url)
    name: Any
    for name in HOSTILE_NAMES:
        with pytest.raises(ConfigurationError, match="queue name must be 1 to 128 letters, digits"):
            queues.external_task("work", queue=name)
        with pytest.raises(ConfigurationError, match="task name must be 1 to 128 letters, digits"):
            queues.external_task(name)

    assert queues.tasks == {}


BAD_TASK_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"timeuot": 5}, "there is no option of a task 'timeuot' (did you mean 'timeout'?); there are: concurrency, "),
    ({"retries": 5}, "there is no option of a task 'retries'"),
    ({"timeout": "5"}, "timeout must be seconds or a timedelta, got str"),
    ({"timeout": True}, "timeout must be seconds or a timedelta, got bool"),
    ({"timeout": math.inf}, "timeout must be between 0 and"),
    ({"timeout": math.nan}, "timeout must be between 0 and"),
    ({"timeout": 10**400}, "timeout must be between 0 and"),
    ({"timeout": 0}, "timeout of task 'work' must be more than 0"),
    ({"expires_in": 0}, "expires_in must be more than 0"),
    ({"keep_dead": -1}, "keep_dead must be between 0 and"),
    ({"isolation": "process", "memory_limit": 10**400}, "memory_limit of task 'work' must be a whole number of bytes"),
]


def test_an_option_that_a_task_cannot_have(sqlite_url: str) -> None:
    queues = PgQueue(sqlite_url)

    def work() -> None: ...

    for options, words in BAD_TASK_OPTIONS:
        with pytest.raises(ConfigurationError) as caught:
            queues.task(**options)(work)
        assert words in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"a task is a function, got str; its name is given with .*name="):
        queues.task("work")  # type: ignore[call-overload]  # under test

    assert queues.tasks == {}


def test_a_schema_name_that_would_need_quotes(sqlite_url: str) -> None:
    name: Any
    for name in [*HOSTILE_NAMES, 7, b"a", "Upper", "1a", "a-b", "a.b", "pg_mine", "a" * 49]:
        with pytest.raises(ConfigurationError, match="schema must be at most 48 lower-case letters, digits and under"):
            PgQueue(sqlite_url, schema=name)


# Options ---------------------------------------------------------------------------------------------------

TOO_EARLY = datetime.min.replace(tzinfo=timezone(timedelta(hours=5)))
TOO_LATE = datetime.max.replace(tzinfo=timezone(timedelta(hours=-5)))

BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"at": datetime(2030, 1, 1)}, "at must say its time zone, got the naive datetime"),  # noqa: DTZ001 — under test
    ({"at": "tomorrow"}, "at must be a datetime, got str"),
    ({"at": datetime.now(UTC).date()}, "at must be a datetime, got date"),
    ({"at": TOO_EARLY}, "at must lie between"),
    ({"at": TOO_LATE}, "at must lie between"),
    ({"at": datetime(44, 3, 15, tzinfo=UTC)}, "at must lie between"),
    ({"at": datetime.max.replace(tzinfo=UTC)}, "at must lie between"),
    ({"delay": -1}, "delay must be between 0 and"),
    ({"delay": timedelta(seconds=-0.001)}, "delay must be between 0 and"),
    ({"delay": math.nan}, "delay must be between 0 and"),
    ({"delay": math.inf}, "delay must be between 0 and"),
    ({"delay": timedelta.max}, "delay must be between 0 and"),
    ({"delay": 1e12}, "delay must be between 0 and"),
    ({"delay": 10**400}, "delay must be between 0 and"),
    ({"delay": "5"}, "delay must be seconds or a timedelta, got str"),
    ({"delay": True}, "delay must be seconds or a timedelta, got bool"),
    ({"delay": 1, "at": datetime(2030, 1, 1, tzinfo=UTC)}, "give either delay or at, not both"),
    ({"priority": 32768}, "priority must be a whole number between -32768 and 32767, got 32768"),
    ({"priority": 1.5}, "priority must be a whole number"),
    ({"priority": True}, "priority must be a whole number"),
    ({"priority": "9"}, "priority must be a whole number"),
    ({"max_retries": -1}, "max_retries must be a whole number between 0 and 32767, got -1"),
    ({"max_retries": 32768}, "max_retries must be a whole number between 0 and 32767, got 32768"),
    ({"max_retries": 1.5}, "max_retries must be a whole number between 0 and 32767, got 1.5"),
    ({"max_retries": "3"}, "max_retries must be a whole number between 0 and 32767, got '3'"),
    ({"unique_key": ""}, "unique_key must be a string of 1 to 512 characters"),
    ({"unique_key": "x" * 513}, "unique_key must be a string of 1 to 512 characters"),
    ({"unique_key": 5}, "unique_key must be a string of 1 to 512 characters"),
    ({"unique_key": "a\0"}, "unique_key must not contain NUL"),
    ({"unique_key": "\ud800"}, "unique_key must not contain NUL characters or lone surrogates"),
    ({"unique_key": "a", "on_conflict": "ignore"}, "on_conflict must be one of skip, raise, replace, got 'ignore'"),
]


def test_an_option_that_cannot_work(pgq: PgQueue) -> None:
    for options, words in BAD_OPTIONS:
        with refused(pgq, ConfigurationError, words) as connection:
            external(pgq).using(**options).enqueue(connection, n=1)


def test_a_unique_key_for_many_jobs(pgq: PgQueue) -> None:
    with refused(pgq, ConfigurationError, "a unique_key allows one") as connection:
        external(pgq).using(unique_key="a").enqueue_many(connection, [{"n": 1}])


def test_a_naive_moment_given_to_the_mapped_class_is_refused_and_not_guessed(pgq: PgQueue) -> None:
    before = everything(pgq)
    naive = datetime(2030, 1, 1)  # noqa: DTZ001 — under test
    with Session(pgq.engine) as session:
        session.add(pgq.Job(task="work", payload={}, run_at=naive))
        with pytest.raises(sa.exc.StatementError, match="says its time zone, got the naive"):
            session.commit()

    assert everything(pgq) == before


def test_the_earliest_and_the_latest_moment_that_are_taken_can_be_read_back(pgq: PgQueue) -> None:
    moments = [datetime(1970, 1, 1, tzinfo=UTC), datetime(8999, 12, 31, 23, tzinfo=timezone(timedelta(hours=14)))]

    ids = [add(pgq, at=moment)[0] for moment in moments]

    assert [pgq.get_job(job_id).run_at for job_id in ids] == moments
    assert claim(pgq, limit=9)[0].id == ids[0]


def test_the_longest_delay_that_is_taken_can_be_read_back(pgq: PgQueue) -> None:
    job_id = add(pgq, delay=timedelta(days=36_500))[0]

    assert pgq.get_job(job_id).run_at.year > 2100


# Sessions --------------------------------------------------------------------------------------------------


def calls(pgq: PgQueue) -> dict[str, Callable[[Any], Any]]:
    """Every call that takes a session, by the name it has in messages."""
    task = external(pgq)
    return {
        "enqueue": lambda session: task.enqueue(session, n=1),
        "enqueue_many": lambda session: task.enqueue_many(session, [{"n": 1}]),
        "enqueue_async": lambda session: task.enqueue_async(session, n=1),
        "enqueue_many_async": lambda session: task.enqueue_many_async(session, [{"n": 1}]),
    }


SYNC_CALLS = ["enqueue", "enqueue_many"]
ASYNC_CALLS = ["enqueue_async", "enqueue_many_async"]


each_call = pytest.mark.parametrize("call", SYNC_CALLS + ASYNC_CALLS)


@each_call
def test_something_else_than_a_session(pgq: PgQueue, call: str) -> None:
    for given in (None, "session", 5, object(), {"n": 1}):
        with refused(pgq, WrongSession, f"{call}() takes ", f"got {type(given).__name__}"):
            calls(pgq)[call](given)


@each_call
def test_an_engine_instead_of_a_session(pgq: PgQueue, call: str) -> None:
    with refused(pgq, WrongSession, f"{call}() takes ", "got Engine", "an engine is not a transaction"):
        calls(pgq)[call](pgq.engine)
    with refused(pgq, WrongSession, f"{call}() takes ", "got AsyncEngine", "an engine is not a transaction"):
        calls(pgq)[call](pgq.async_engine)


@each_call
def test_a_factory_instead_of_a_session(pgq: PgQueue, call: str) -> None:
    for given in (sessionmaker(), async_sessionmaker(), Session, AsyncSession):
        with refused(pgq, WrongSession, f"{call}() takes ", "is this a factory that still has to be called?"):
            calls(pgq)[call](given)


@pytest.mark.parametrize("call", SYNC_CALLS)
def test_an_asynchronous_session_for_a_synchronous_call(pgq: PgQueue, call: str) -> None:
    for given in (AsyncSession(), async_scoped_session(async_sessionmaker(), scopefunc=lambda: 1)):
        with refused(
            pgq, WrongSession, f"{call}() takes a synchronous Session or Connection", f"use: await ….{call}_async("
        ):
            calls(pgq)[call](given)


@pytest.mark.parametrize("call", ASYNC_CALLS)
def test_a_synchronous_session_for_an_asynchronous_call(pgq: PgQueue, call: str) -> None:
    for given in (Session(), scoped_session(sessionmaker())):
        with refused(
            pgq,
            WrongSession,
            f"{call}() takes an AsyncSession or AsyncConnection",
            f"use: ….{call.removesuffix('_async')}(",
        ):
            calls(pgq)[call](given)
    with refused(pgq, WrongSession, f"{call}() takes an AsyncSession", "got Connection") as connection:
        calls(pgq)[call](connection)


def test_acknowledging_with_the_wrong_session(pgq: PgQueue) -> None:
    job = claim_one(pgq)
    ack: Any = pgq.ack
    nack: Any = pgq.nack

    with refused(pgq, WrongSession, "ack() takes a synchronous Session", "got AsyncSession"):
        ack(job, session=AsyncSession())
    with refused(pgq, WrongSession, "nack() takes ", "got Engine"):
        nack(job, session=pgq.engine)
    with refused(pgq, WrongSession, "expected jobs as claim() returned them, got int"):
        ack([job.id])


# A forgotten await -----------------------------------------------------------------------------------------


def run(pgq: PgQueue, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def worked() -> None:
        try:
            await work()
        finally:
            await pgq.async_engine.dispose()

    asyncio.run(worked())


@pytest.mark.parametrize("many", [False, True])
def test_a_forgotten_await_fails_the_commit_of_its_session(pgq: PgQueue, many: bool) -> None:
    task = external(pgq)

    async def work() -> None:
        async with AsyncSession(pgq.async_engine) as session:
            await task.enqueue_async(session, n=1)
            if many:
                kept: Any = task.enqueue_many_async(session, [{"n": 2}])
            else:
                kept = task.enqueue_async(session, n=2)
            with pytest.raises(NotAwaited, match="'work' was never awaited, so nothing was enqueued; put `await`"):
                await session.commit()
            forgotten.append(kept)

    forgotten: list[Any] = []
    run(pgq, work)

    assert len(statuses(pgq)) == 1
    with pytest.warns(RuntimeWarning, match="never awaited"):
        forgotten.clear()


def test_a_forgotten_await_warns_when_it_is_thrown_away(pgq: PgQueue) -> None:
    async def work() -> None:
        async with AsyncSession(pgq.async_engine) as session:
            forgotten = [external(pgq).enqueue_async(session, n=1)]
            with pytest.warns(RuntimeWarning, match=r"enqueue_async\(\) of task 'work' was never awaited: nothing was"):
                forgotten.clear()

    run(pgq, work)


def test_a_forgotten_await_fails_the_commit_also_when_a_later_call_is_awaited(pgq: PgQueue) -> None:
    """The later object may well stand at the same address in memory as the forgotten one."""
    task = external(pgq)

    async def work() -> None:
        async with AsyncSession(pgq.async_engine) as session:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                task.enqueue_async(session, n=1)
            for n in range(5):
                await task.enqueue_async(session, n=n)
            with pytest.raises(NotAwaited):
                await session.commit()

    run(pgq, work)

    assert len(statuses(pgq)) == 1


def test_a_forgotten_await_fails_the_commit_of_a_connection(pgq: PgQueue) -> None:
    async def work() -> None:
        async with pgq.async_engine.begin() as connection:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                external(pgq).enqueue_async(connection, n=1)

    with pytest.raises(NotAwaited):
        run(pgq, work)

    assert len(statuses(pgq)) == 1


def test_a_session_goes_on_after_the_forgotten_await_was_reported(pgq: PgQueue) -> None:
    async def work() -> None:
        async with AsyncSession(pgq.async_engine) as session:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                external(pgq).enqueue_async(session, n=1)
            with pytest.raises(NotAwaited):
                await session.commit()
            await session.rollback()
            await external(pgq).enqueue_async(session, n=2)
            await session.commit()

    run(pgq, work)

    assert [job.payload for job in pgq.list_jobs()] == [{"n": 2}, {"n": 0}]


def test_an_awaitable_cannot_be_awaited_twice(pgq: PgQueue) -> None:
    async def work() -> None:
        async with AsyncSession(pgq.async_engine) as session:
            pending = external(pgq).enqueue_async(session, n=1)
            await pending
            with pytest.raises(RuntimeError, match="awaited twice"):
                await pending
            await session.commit()

    run(pgq, work)

    assert len(statuses(pgq)) == 2


def test_bad_input_to_an_asynchronous_call_is_refused_at_the_call_and_not_at_the_await(pgq: PgQueue) -> None:
    async def work() -> None:
        async with AsyncSession(pgq.async_engine) as session:
            with pytest.raises(InvalidPayload):
                external(pgq).enqueue_async(session, value=object())
            await session.commit()

    run(pgq, work)

    assert len(statuses(pgq)) == 1
