"""Middleware: code of the application around every attempt, and before every enqueue."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from working import drain, enqueue

from pgqueue import (
    Cancel,
    ClaimedJob,
    ConfigurationError,
    DuplicateJob,
    EnqueueRequest,
    InvalidPayload,
    PgQueue,
    Retry,
    current_job,
)
from pgqueue.engine import make_async_engine, parse_url

# Around runs -----------------------------------------------------------------------------------------------


def test_a_generator_goes_around_tasks_of_every_kind(pgq: PgQueue) -> None:
    log: list[str] = []

    @pgq.middleware("run")
    def note(job: ClaimedJob) -> Iterator[None]:
        log.append(f"before {job.task}")
        yield
        log.append(f"after {job.task}")

    @pgq.task
    def plain(n: int) -> int:
        log.append("plain")
        return n

    @pgq.task
    async def asynchronous(n: int) -> int:
        await asyncio.sleep(0)
        log.append("asynchronous")
        return n

    @pgq.task(transactional=True)
    def transactional(session: Session, n: int) -> int:
        log.append("transactional")
        return n

    @pgq.task(transactional=True)
    async def both(session: AsyncSession, n: int) -> int:
        log.append("both")
        return n

    results = {}
    for task in (plain, asynchronous, transactional, both):
        log.clear()
        job_id = enqueue(task, n=7)
        drain(pgq)
        results[task.name] = (pgq.get_job(job_id).result, list(log))

    assert results == {
        name: (7, [f"before {name}", name, f"after {name}"])
        for name in ("plain", "asynchronous", "transactional", "both")
    }


def test_the_first_one_registered_is_the_outermost(pgq: PgQueue) -> None:
    log: list[str] = []

    def noting(name: str) -> Any:
        def note(job: ClaimedJob) -> Iterator[None]:
            log.append(f"+{name}")
            yield
            log.append(f"-{name}")

        return note

    pgq.middleware("run")(noting("a"))
    pgq.middleware("run")(noting("b"))

    @pgq.task
    def work() -> None: ...

    enqueue(work)
    drain(pgq)

    assert log == ["+a", "+b", "-b", "-a"]


def test_a_context_variable_set_before_an_async_task_is_seen_in_it(pgq: PgQueue) -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")

    @pgq.middleware("run")
    def set_tenant(job: ClaimedJob) -> Iterator[None]:
        token = tenant.set(job.metadata["tenant"])
        yield
        tenant.reset(token)

    @pgq.task(timeout=30)
    async def asynchronous() -> str:
        return tenant.get()

    @pgq.task
    def plain() -> str:
        return tenant.get()

    ids = [enqueue(task.using(metadata={"tenant": "x"})) for task in (asynchronous, plain)]
    drain(pgq)

    assert [pgq.get_job(job_id).result for job_id in ids] == ["x", "x"]


def test_an_async_generator_goes_around_async_tasks_only(pgq: PgQueue) -> None:
    log: list[str] = []

    @pgq.middleware("run")
    async def note(job: ClaimedJob) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        log.append(f"before {job.task}")
        yield
        log.append(f"after {job.task}")

    @pgq.task
    def plain() -> None:
        log.append("plain")

    @pgq.task
    async def asynchronous() -> None:
        log.append("asynchronous")

    enqueue(plain)
    drain(pgq)
    enqueue(asynchronous)
    drain(pgq)

    assert log == ["plain", "before asynchronous", "asynchronous", "after asynchronous"]


def test_a_function_that_returns_a_context_manager_will_do(pgq: PgQueue) -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def noting(name: str) -> Iterator[None]:
        log.append(f"+{name}")
        yield
        log.append(f"-{name}")

    @pgq.middleware("run")
    def around(job: ClaimedJob) -> AbstractContextManager[None]:
        return noting(job.task)

    @pgq.task
    def work() -> None: ...

    enqueue(work)
    drain(pgq)

    assert log == ["+work", "-work"]


def test_an_error_of_the_task_passes_through_the_middleware(pgq: PgQueue) -> None:
    seen: list[str] = []

    @pgq.middleware("run")
    def report(job: ClaimedJob) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            seen.append(str(error))
            raise

    @pgq.task(retry=Retry(max_retries=0))
    def fail() -> None:
        raise ValueError("no")

    job_id = enqueue(fail)
    drain(pgq)

    error = pgq.get_job(job_id).error
    assert seen == ["no"]
    assert error is not None
    assert (error["type"], error["message"]) == ("ValueError", "no")


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_middleware_raises_the_attempt_has_raised(pgq: PgQueue, when: str) -> None:
    ran: list[int] = []

    @pgq.middleware("run")
    def refuse(job: ClaimedJob) -> Iterator[None]:
        if when == "before":
            raise Cancel("not today")
        yield
        raise KeyError("late")

    @pgq.task(retry=Retry(max_retries=0))
    async def work() -> None:
        ran.append(current_job().id)

    job_id = enqueue(work)
    drain(pgq)

    assert pgq.get_job(job_id).status == ("cancelled" if when == "before" else "dead")
    assert ran == ([] if when == "before" else [job_id])


def test_a_middleware_that_swallows_an_error_completes_the_job(pgq: PgQueue) -> None:
    @pgq.middleware("run")
    def swallow(job: ClaimedJob) -> Iterator[None]:
        with contextlib.suppress(ValueError):
            yield

    @pgq.task
    def plain() -> int:
        raise ValueError

    @pgq.task
    async def asynchronous() -> int:
        raise ValueError

    ids = [enqueue(plain), enqueue(asynchronous)]
    drain(pgq)

    assert [(pgq.get_job(job_id).status, pgq.get_job(job_id).result) for job_id in ids] == [("completed", None)] * 2


def test_the_rows_of_a_transactional_task_are_gone_when_a_middleware_fails_after_it(pgq: PgQueue) -> None:
    follow = pgq.external_task("follow")

    @pgq.middleware("run")
    def refuse(job: ClaimedJob) -> Iterator[None]:
        yield
        raise ValueError

    @pgq.task(transactional=True, retry=Retry(max_retries=0))
    def book(session: Session) -> None:
        follow.enqueue(session)

    enqueue(book)
    drain(pgq)

    assert pgq.list_jobs(task="follow") == []


def test_without_middleware_the_function_itself_is_called(pgq: PgQueue) -> None:
    from pgqueue import Worker

    @pgq.task
    def work() -> None: ...

    assert Worker(pgq)._assignment.definitions["work"] is work.definition


async def _coroutine(job: ClaimedJob) -> None: ...


def _no_parameter() -> Iterator[None]:
    yield


def _two_parameters(job: ClaimedJob, call_next: Any) -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_coroutine, "the run middleware _coroutine must yield once, where the task is to run; it never does"),
        (_no_parameter, "the run middleware _no_parameter must take one argument, the job; it takes"),
        (_two_parameters, "the run middleware _two_parameters must take one argument, the job; it takes"),
        ("text", "a middleware is a function, got str"),
    ],
)
def test_a_function_that_cannot_go_around_a_run_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PgQueue("sqlite://").middleware("run")(function)


def test_a_middleware_must_say_what_it_goes_around() -> None:
    pgq = PgQueue("sqlite://")

    with pytest.raises(ConfigurationError, match="middleware goes around 'run' or 'enqueue', got 'claim'"):
        pgq.middleware("claim")  # type: ignore[arg-type]


def test_a_plain_function_as_run_middleware_fails_the_attempt_and_says_why(pgq: PgQueue) -> None:
    pgq.middleware("run")(lambda job: None)

    @pgq.task(retry=Retry(max_retries=0))
    def work() -> None: ...

    job_id = enqueue(work)
    drain(pgq)

    error = pgq.get_job(job_id).error
    assert error is not None
    assert "must yield once or return a context manager, got NoneType" in error["message"]


# Before enqueues -------------------------------------------------------------------------------------------


def test_a_middleware_changes_payload_options_and_metadata_of_every_enqueue(pgq: PgQueue) -> None:
    @pgq.middleware("enqueue")
    def change(request: EnqueueRequest) -> None:
        for payload in request.payloads:
            payload["n"] += 1
        request.options["queue"] = "changed"
        request.metadata["by"] = request.task

    @pgq.task
    def work(n: int) -> None: ...

    async def enqueue_async() -> None:
        engine = make_async_engine(parse_url(pgq.url))
        async with engine.begin() as connection:
            await work.enqueue_async(connection, n=50)
            await work.enqueue_many_async(connection, [{"n": 60}])
        await engine.dispose()

    with Session(pgq.engine) as session, session.begin():
        work.enqueue(session, n=10)
        work.enqueue_many(session, [{"n": 20}, {"n": 30}])
        session.add(work.using(metadata={"own": 1}).new(n=40))
    asyncio.run(enqueue_async())

    jobs = pgq.list_jobs()
    assert sorted(job.payload["n"] for job in jobs) == [11, 21, 31, 41, 51, 61]
    assert {job.queue for job in jobs} == {"changed"}
    assert {job.metadata["by"] for job in jobs} == {"work"}
    assert [job.metadata for job in jobs if job.payload["n"] == 41] == [{"own": 1, "by": "work"}]


def test_each_request_is_seen_once_by_each_middleware_in_order(pgq: PgQueue) -> None:
    seen: list[tuple[str, int]] = []
    pgq.middleware("enqueue")(lambda request: seen.append(("a", len(request.payloads))))
    pgq.middleware("enqueue")(lambda request: seen.append(("b", len(request.payloads))))

    @pgq.task
    def work() -> None: ...

    enqueue(work)
    with pgq.begin() as connection:
        work.enqueue_many(connection, [{}] * 3)
        pgq.enqueue(connection, "work", {})
    work.new()

    assert seen == [("a", 1), ("b", 1), ("a", 3), ("b", 3), ("a", 1), ("b", 1), ("a", 1), ("b", 1)]


def test_a_middleware_refuses_by_raising(pgq: PgQueue) -> None:
    @pgq.middleware("enqueue")
    def refuse(request: EnqueueRequest) -> None:
        raise PermissionError(request.task)

    @pgq.task
    def work() -> None: ...

    with pgq.begin() as connection, pytest.raises(PermissionError, match="work"):
        work.enqueue(connection)

    assert pgq.list_jobs() == []


def test_what_a_middleware_made_of_a_request_is_checked(pgq: PgQueue) -> None:
    changes: list[Any] = []
    pgq.middleware("enqueue")(lambda request: changes[0](request))

    @pgq.task
    def work(n: int) -> None: ...

    def refusal(change: Any) -> str:
        changes[:] = [change]
        with pgq.begin() as connection, pytest.raises((ConfigurationError, InvalidPayload)) as refused:
            work.enqueue(connection, n=1)
        return str(refused.value)

    assert "payload of task 'work' does not fit: n" in refusal(lambda request: request.payloads[0].update(n="x"))
    assert "an option 'prio'; options are: queue" in refusal(lambda request: request.options.update(prio=1))
    assert "priority must be" in refusal(lambda request: request.options.update(priority="high"))
    assert "made 0 payloads of 1" in refusal(lambda request: request.payloads.clear())


def test_a_unique_key_given_by_a_middleware_counts(pgq: PgQueue) -> None:
    @pgq.middleware("enqueue")
    def unique(request: EnqueueRequest) -> None:
        request.options.update(unique_key=str(request.payloads[0]["n"]), on_conflict="raise")

    @pgq.task
    def work(n: int) -> None: ...

    enqueue(work, n=1)
    with pytest.raises(DuplicateJob):
        enqueue(work, n=1)

    assert len(pgq.list_jobs()) == 1


def test_the_callers_payloads_and_options_stay_as_they_are(pgq: PgQueue) -> None:
    @pgq.middleware("enqueue")
    def change(request: EnqueueRequest) -> None:
        request.payloads[0]["n"] = 2
        request.metadata["a"] = 1

    @pgq.task
    def work(n: int) -> None: ...

    payload, metadata = {"n": 1}, {"own": 1}
    with pgq.begin() as connection:
        work.using(metadata=metadata).enqueue_many(connection, [payload])

    assert (payload, metadata) == ({"n": 1}, {"own": 1})


def _generator(request: EnqueueRequest) -> Iterator[None]:
    yield


@pytest.mark.parametrize("function", [_generator, _coroutine])
def test_an_enqueue_middleware_must_be_a_plain_function(function: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be a plain function"):
        PgQueue("sqlite://").middleware("enqueue")(function)


def test_the_repr_of_a_request_shows_no_payload() -> None:
    assert "hunter2" not in repr(EnqueueRequest("work", [{"password": "hunter2"}], {"metadata": {"a": "hunter2"}}))
