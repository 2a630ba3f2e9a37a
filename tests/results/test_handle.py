"""What an enqueue returns, and waiting for the end of jobs."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import add, add_one, claim_one
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support import wait_for
from working import drain, working

from pgqueue import (
    ConfigurationError,
    Discard,
    ErrorInfo,
    JobCancelled,
    JobFailed,
    JobHandle,
    JobNotFound,
    JobStatus,
    PgQueue,
    Retry,
    handle,
)
from pgqueue import ResultTimeout as Overdue


def commit(pgq: PgQueue, task: Any, **payload: Any) -> JobHandle:
    with Session(pgq.engine) as session, session.begin():
        enqueued: JobHandle = task.enqueue(session, **payload)
    return enqueued


def once_looked_at(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when somebody has looked at a job in vain."""
    looked = threading.Event()
    take = handle.Waiting.take

    def taken(waiting: handle.Waiting, found: Any) -> float:
        pause = take(waiting, found)
        looked.set()
        return pause

    monkeypatch.setattr(handle.Waiting, "take", taken)
    return looked


def in_background(work: Callable[[], Any]) -> Any:
    return ThreadPoolExecutor(1).submit(work)


# Results


def test_the_result_of_a_completed_job_is_what_its_task_returned(pgq: PgQueue) -> None:
    @pgq.task
    def measure(n: int) -> dict[str, Any]:
        return {"n": n, "list": [1, None, "ü"]}

    enqueued = commit(pgq, measure, n=3)
    drain(pgq)

    assert enqueued.inserted
    assert enqueued.result(timeout=0) == {"n": 3, "list": [1, None, "ü"]}
    assert enqueued.status() is JobStatus.COMPLETED
    assert enqueued.job().id == enqueued.id


def test_a_task_that_returns_none_has_the_result_none(pgq: PgQueue) -> None:
    @pgq.task
    def nothing() -> None: ...

    enqueued = commit(pgq, nothing)
    drain(pgq)

    assert enqueued.result(timeout=0) is None


def test_a_result_is_waited_for(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    @pgq.task
    def double(n: int) -> int:
        return 2 * n

    enqueued = commit(pgq, double, n=4)
    looked = once_looked_at(monkeypatch)

    waiting = in_background(lambda: enqueued.result(timeout=60))
    assert looked.wait(60)
    with working(pgq):
        assert waiting.result(60) == 8


def test_a_result_is_waited_for_without_blocking_the_event_loop(pgq: PgQueue) -> None:
    @pgq.task
    def double(n: int) -> int:
        return 2 * n

    async def enqueue_and_wait() -> None:
        async with AsyncSession(pgq.async_engine) as session, session.begin():
            enqueued = await double.enqueue_async(session, n=4)

        waiting = asyncio.create_task(enqueued.result_async(timeout=timedelta(seconds=60)))
        await asyncio.sleep(0.02)  # the loop goes on meanwhile
        await asyncio.to_thread(drain, pgq)

        assert await waiting == 8
        assert await pgq.result_async(enqueued.id) == 8
        assert await pgq.results_async([enqueued, enqueued.id]) == [8, 8]
        await pgq.async_engine.dispose()

    asyncio.run(enqueue_and_wait())


def test_the_result_of_a_dead_job_is_an_error_with_what_went_wrong(pgq: PgQueue) -> None:
    @pgq.task(retry=Retry(max_retries=0))
    def fail() -> None:
        raise ValueError("number 7 is wrong")

    enqueued = commit(pgq, fail)
    drain(pgq)

    with pytest.raises(JobFailed, match=rf"^job {enqueued.id} is dead: it failed with ValueError$") as caught:
        enqueued.result(timeout=60)
    assert caught.value.job_id == enqueued.id
    assert isinstance(caught.value.error, ErrorInfo)
    assert caught.value.error.message == "number 7 is wrong"
    assert "in fail" in caught.value.error.traceback


def test_a_job_that_was_discarded_has_failed_too(pgq: PgQueue) -> None:
    @pgq.task
    def refuse() -> None:
        raise Discard("no such customer")

    enqueued = commit(pgq, refuse)
    drain(pgq)

    with pytest.raises(JobFailed) as caught:
        enqueued.result(timeout=60)
    assert caught.value.error is not None
    assert caught.value.error.message == "no such customer"


def test_an_error_that_somebody_else_stored_is_given_as_it_is(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    pgq.nack(claim_one(pgq), dead=True, error="no")
    with pgq.begin() as connection:
        connection.execute(sa.update(pgq.tables.jobs).values(error=["of", "mine"]))

    with pytest.raises(JobFailed) as caught:
        pgq.result(job_id, timeout=0)

    assert caught.value.error is not None
    assert "mine" in caught.value.error.message


def test_the_result_of_a_cancelled_job_is_an_error_of_its_own(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    pgq.cancel(job_id)

    with pytest.raises(JobCancelled, match=f"job {job_id} was cancelled") as caught:
        pgq.result(job_id, timeout=60)
    assert caught.value.job_id == job_id


def test_a_job_that_does_not_end_in_time_is_a_timeout(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    began = time.monotonic()

    with pytest.raises(Overdue, match=rf"job {job_id} did not end within 0\.05 s"):
        pgq.result(job_id, timeout=0.05)

    assert time.monotonic() - began >= 0.05
    with pytest.raises(TimeoutError):
        pgq.result(job_id, timeout=0)


def test_a_replayed_job_is_waited_for_again(pgq: PgQueue) -> None:
    outcomes = [ValueError("first"), None]

    @pgq.task(retry=Retry(max_retries=0))
    def second_time_lucky() -> str:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return "done"

    enqueued = commit(pgq, second_time_lucky)
    drain(pgq)
    with pytest.raises(JobFailed):
        enqueued.result(timeout=0)
    pgq.replay(enqueued.id)

    with pytest.raises(Overdue):
        enqueued.result(timeout=0)

    drain(pgq)
    assert enqueued.result(timeout=0) == "done"


# Jobs that are not there


def test_asking_for_a_result_before_the_commit_says_so_at_once(pgq: PgQueue) -> None:
    work = pgq.external_task("work")

    with Session(pgq.engine) as session, session.begin():
        enqueued = work.enqueue(session)

        for ask in (enqueued.result, enqueued.job, enqueued.status):
            with pytest.raises(JobNotFound, match="the transaction that enqueues it is still open"):
                ask()

    assert enqueued.status() is JobStatus.PENDING


def test_the_asynchronous_call_says_so_too(pgq: PgQueue) -> None:
    work = pgq.external_task("work")

    async def ask_too_early() -> None:
        async with AsyncSession(pgq.async_engine) as session, session.begin():
            enqueued = await work.enqueue_async(session)

            with pytest.raises(JobNotFound, match="still open"):
                await enqueued.result_async()
        await pgq.async_engine.dispose()

    asyncio.run(ask_too_early())


def test_a_job_enqueued_with_autocommit_is_there_at_once(pg: PgQueue) -> None:
    work = pg.external_task("work")

    with pg.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        enqueued = work.enqueue(connection)

        assert enqueued.status() is JobStatus.PENDING


def test_a_transaction_that_was_rolled_back_is_asked_about_at_once(pgq: PgQueue) -> None:
    work = pgq.external_task("work")
    with Session(pgq.engine) as session:
        enqueued = work.enqueue(session)
        session.rollback()
    looks = _count_looks(pgq)

    with pytest.raises(JobNotFound, match="was its transaction committed"):
        enqueued.result()

    assert looks == [1]


def test_a_handle_keeps_nothing_of_its_session_alive(pgq: PgQueue) -> None:
    work = pgq.external_task("work")
    with Session(pgq.engine) as session, session.begin():
        enqueued = work.enqueue(session)
    del session
    gc.collect()

    assert enqueued._transaction is not None
    assert enqueued._transaction() is None
    with pytest.raises(Overdue):
        enqueued.result(timeout=0)


def test_a_job_of_a_transaction_elsewhere_may_appear_while_it_is_looked_for(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = add_one(pgq) + 1
    monkeypatch.setattr(handle, "MISSING_SECONDS", 60.0)
    looked = once_looked_at(monkeypatch)
    waiting = handle.Waiting([expected], 60, missing_seconds=60)

    found = in_background(lambda: handle.wait(pgq, waiting))
    assert looked.wait(60)
    assert add_one(pgq) == expected
    pgq.ack([job for job in pgq.claim("me", limit=2) if job.id == expected], result="here")

    assert found.result(60) == ["here"]


def test_an_id_that_no_job_has_is_looked_for_and_then_an_error(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()

    with pytest.raises(JobNotFound, match=r"there is no job 77: was its transaction committed\?.*retention"):
        pgq.result(77)

    assert time.monotonic() - began >= handle.MISSING_SECONDS
    with pytest.raises(JobNotFound):
        pgq.result(77, timeout=0)


def test_a_job_that_is_deleted_while_it_is_waited_for_is_an_error(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = add_one(pgq)
    looked = once_looked_at(monkeypatch)
    waiting = in_background(lambda: pgq.result(job_id, timeout=60))
    assert looked.wait(60)

    pgq.delete(job_id)

    with pytest.raises(JobNotFound, match="retention"):
        waiting.result(60)


# Many


def test_many_jobs_are_waited_for_with_one_statement_a_look(pgq: PgQueue) -> None:
    ids = add(pgq, 5)
    for job in reversed(pgq.claim("me", limit=5)):
        pgq.ack(job, result=job.payload["n"])
    looks = _count_looks(pgq)

    assert pgq.results(ids, timeout=60) == [0, 1, 2, 3, 4]
    assert pgq.results([ids[3], ids[0], ids[3]]) == [3, 0, 3]
    assert pgq.results([]) == []
    assert looks == [2]


def test_the_first_job_of_many_that_fails_ends_the_wait(pgq: PgQueue) -> None:
    ids = add(pgq, 3)
    first, second, _ = pgq.claim("me", limit=3)
    pgq.ack(first, result="fine")
    pgq.nack(second, dead=True, error="no")

    with pytest.raises(JobFailed, match=f"job {second.id} is dead"):
        pgq.results(ids)


def test_the_errors_of_many_can_be_had_among_the_results(pgq: PgQueue) -> None:
    ids = add(pgq, 3)
    first, second = pgq.claim("me", limit=2)
    pgq.ack(first, result="fine")
    pgq.nack(second, dead=True, error="no")
    pgq.cancel(ids[2])

    fine, failed, cancelled, missing = pgq.results([*ids, 99], timeout=0, return_errors=True)

    assert fine == "fine"
    assert isinstance(failed, JobFailed)
    assert isinstance(cancelled, JobCancelled)
    assert isinstance(missing, JobNotFound)


def test_a_timeout_names_the_jobs_that_have_not_ended(pgq: PgQueue) -> None:
    ids = add(pgq, 12)
    pgq.ack(pgq.claim("me"))

    with pytest.raises(Overdue, match=rf"jobs {ids[1]}, .*{ids[10]}, … did not end within 0 s"):
        pgq.results(ids, timeout=0)


# The handle


def test_a_handle_can_be_pickled_and_says_what_it_lacks_then(pgq: PgQueue) -> None:
    enqueued = commit(pgq, pgq.external_task("work"))

    copy = pickle.loads(pickle.dumps(enqueued))

    assert copy == enqueued
    assert hash(copy) == hash(enqueued)
    assert repr(copy) == f"JobHandle(id={enqueued.id}, inserted=True)"
    with pytest.raises(ConfigurationError, match=rf"use pgq\.result\({enqueued.id}\)"):
        copy.result()


def test_the_handle_of_a_job_that_was_there_already_waits_for_that_one(pgq: PgQueue) -> None:
    work = pgq.external_task("work").using(unique_key="a")
    first = commit(pgq, work)

    with Session(pgq.engine) as session, session.begin():
        second = work.enqueue(session)
        assert second.status() is JobStatus.PENDING  # though this transaction is open

    assert (second.id, second.inserted) == (first.id, False)
    pgq.ack(pgq.claim("me"), result=3)
    assert second.result() == 3


def test_the_handle_of_a_job_that_a_full_queue_dropped_says_so(pgq: PgQueue) -> None:
    dropped = JobHandle(handle.DROPPED_ID, inserted=False, queue=pgq)

    with pytest.raises(JobNotFound, match="its queue was full"):
        dropped.result()


def test_errors_of_results_can_be_pickled() -> None:
    failed = pickle.loads(pickle.dumps(JobFailed("job 3 is dead", 3, ErrorInfo("ValueError", "no"))))

    assert (str(failed), failed.job_id, failed.error) == ("job 3 is dead", 3, ErrorInfo("ValueError", "no"))


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", True, timedelta(seconds=-1)])
def test_a_timeout_must_be_a_time(pgq: PgQueue, timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match="timeout must be 0 seconds or more"):
        pgq.result(1, timeout=timeout)


def test_the_longest_timeout_is_no_error(pgq: PgQueue) -> None:
    with pytest.raises(JobNotFound):
        pgq.result(1, timeout=10**400)


@pytest.mark.parametrize("ids", [None, 5, "12"])
def test_several_results_need_several_ids(pgq: PgQueue, ids: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected several jobs"):
        pgq.results(ids)


@pytest.mark.parametrize("job_id", [0, -1, 2**63, "5", True, None, 1.0])
def test_an_id_must_be_one(pgq: PgQueue, job_id: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected the id of a job"):
        pgq.result(job_id)


def test_looks_become_less_frequent() -> None:
    waiting = handle.Waiting([1], None)
    pending = {1: handle.Standing(JobStatus.PENDING)}

    pauses = [waiting.take(pending) for _ in range(20)]

    assert pauses[0] == 0.01
    assert pauses == sorted(pauses)
    assert pauses[-1] == 1.0


def _count_looks(pgq: PgQueue) -> list[int]:
    looks = [0]

    @sa.event.listens_for(pgq.engine, "before_cursor_execute")
    def executed(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "SELECT" in statement and "jobs" in statement:
            looks[0] += 1

    return looks


def test_waiting_is_over_soon_after_the_end(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    waiting = in_background(lambda: pgq.result(job_id))

    pgq.ack(pgq.claim("me"), result="soon")

    assert wait_for(waiting.done, "the result", timeout=10)
    assert waiting.result() == "soon"
