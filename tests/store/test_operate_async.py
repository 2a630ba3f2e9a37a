"""The calls of operators in an event loop: they do what their synchronous twins do, and keep to a given session."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from jobs import add, add_one, age, claim_one, completed, died, events, everything, finish, row, statuses
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqueue import (
    ClaimLost,
    ConfigurationError,
    IllegalTransition,
    JobEvent,
    JobNotFound,
    JobStatus,
    Limits,
    PgQueue,
    ScheduleNotFound,
    TaskNotFound,
    WrongSession,
)

Run = Callable[[Awaitable[Any]], Any]


@pytest.fixture
def run(pgq: PgQueue) -> Iterator[Run]:
    """Awaits something in an event loop that lasts as long as the test."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.run_until_complete(pgq.dispose_async())
    loop.close()


def add_dead(pgq: PgQueue, count: int = 1) -> list[int]:
    ids = []
    for _ in range(count):
        ids.append(add_one(pgq, max_retries=0))
        finish(pgq, died(claim_one(pgq)))
    return ids


# Looking -----------------------------------------------------------------------------------------------------


def test_looking_finds_the_same(pgq: PgQueue, run: Run) -> None:
    dead = add_dead(pgq)
    ids = [*dead, *add(pgq, 3)]
    pgq.set_limits(queue="default", concurrency=2)

    async def listed() -> list[int]:
        return [job.id async for job in pgq.iter_jobs_async(status="pending")]

    assert run(pgq.get_job_async(ids[0])).status == "dead"
    assert [job.id for job in run(pgq.list_jobs_async(limit=2))] == ids[:1:-1]
    assert run(pgq.page_of_jobs_async(limit=2)).before_id == pgq.page_of_jobs(limit=2).before_id
    assert run(listed()) == ids[1:]
    assert run(pgq.job_events_async(ids[0])) == pgq.job_events(ids[0])
    assert [(queue.queue, queue.ready, queue.dead) for queue in run(pgq.queues_async(exact=True))] == [
        ("default", 3, 1)
    ]
    assert run(pgq.workers_async()) == pgq.workers()
    assert run(pgq.list_limits_async()) == pgq.list_limits()


def test_all_jobs_are_read_page_by_page(pgq: PgQueue, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgqueue.inspecting.PAGE_JOBS", 2)
    ids = add(pgq, 5)

    async def listed() -> list[int]:
        return [job.id async for job in pgq.iter_jobs_async()]

    assert run(listed()) == ids


def test_a_handle_asks_for_its_job(pgq: PgQueue, run: Run) -> None:
    @pgq.task
    def greet(name: str) -> None: ...

    async def enqueue() -> Any:
        async with AsyncSession(pgq.async_engine) as session, session.begin():
            handle = await pgq.enqueue_async(session, "greet", {"name": "Ada"}, priority=3)
            with pytest.raises(JobNotFound, match="is still open"):
                await handle.job_async()
        return handle

    handle = run(enqueue())

    assert run(handle.job_async()).payload == {"name": "Ada"}
    assert run(handle.job_async()).priority == 3
    assert run(handle.status_async()) is JobStatus.PENDING
    assert run(handle.progress_async()) is None
    with pytest.raises(TaskNotFound):
        pgq.enqueue_async(AsyncSession(pgq.async_engine), "unknown", {})


def test_a_claim_is_found_by_its_token(pgq: PgQueue, run: Run) -> None:
    add(pgq)
    job = claim_one(pgq)

    found = run(pgq.get_claim_async(job.id, job.claim_token))

    assert (found.id, found.claim_token, found.payload_json) == (job.id, job.claim_token, job.payload_json)
    with pytest.raises(ClaimLost):
        run(pgq.get_claim_async(job.id, uuid.uuid4()))


# Changing ----------------------------------------------------------------------------------------------------


def test_a_cancelled_job_is_told_of_and_recorded(pgq: PgQueue, run: Run) -> None:
    job_id = add_one(pgq)
    told: list[JobEvent] = []
    pgq.on("job:cancelled", told.append)

    status = run(pgq.cancel_async(job_id, reason="ordered twice", actor="ann"))

    assert status is JobStatus.CANCELLED
    assert (pgq.job_events(job_id)[-1]["actor"], pgq.job_events(job_id)[-1]["reason"]) == ("ann", "ordered twice")
    assert pgq._listeners.deliver(30)
    assert [event.job_id for event in told] == [job_id]
    with pytest.raises(IllegalTransition):
        run(pgq.cancel_async(job_id))


def test_a_deleted_job_is_gone(pgq: PgQueue, run: Run) -> None:
    job_id = add_one(pgq)

    run(pgq.delete_async(job_id))

    assert statuses(pgq) == {}
    with pytest.raises(JobNotFound):
        run(pgq.delete_async(job_id))


def test_a_paused_queue_gives_nothing_until_it_is_resumed(pgq: PgQueue, run: Run) -> None:
    add(pgq)

    run(pgq.pause_async("default", duration=60))
    while_paused = run(pgq.claim_async("w"))
    ended = run(pgq.resume_async("default"))

    assert while_paused == []
    assert ended is True
    assert run(pgq.resume_async("default")) is False
    assert len(run(pgq.claim_async("w"))) == 1
    with pytest.raises(ConfigurationError, match="the duration of a pause"):
        run(pgq.pause_async("default", duration=0))


def test_old_jobs_are_pruned(pgq: PgQueue, run: Run) -> None:
    add(pgq, 2)
    finish(pgq, completed(claim_one(pgq)))
    age(pgq, seconds_ago=3600)
    batches: list[int] = []

    assert run(pgq.prune_async(older_than=60, pruned=batches.append)) == 1
    assert sum(batches) == 1
    assert list(statuses(pgq).values()) == ["pending"]


def test_limits_are_declared_set_and_reset(pgq: PgQueue, run: Run) -> None:
    pgq.queue("mail", concurrency=3)

    run(pgq.declare_limits_async())
    declared = pgq.list_limits()
    changed = run(pgq.set_limits_async(queue="mail", concurrency=5))
    reset = run(pgq.reset_limits_async(queue="mail"))

    assert [row.limits.concurrency for row in declared] == [3]
    assert (changed, reset) == (Limits(concurrency=5), Limits(concurrency=3))
    with pytest.raises(ConfigurationError, match="got 'speed'"):
        run(pgq.set_limits_async(queue="mail", speed=5))


def test_a_consumers_first_claim_declares_limits(pgq: PgQueue, run: Run) -> None:
    pgq.queue("default", concurrency=1)
    add(pgq, 2)

    assert len(run(pgq.claim_async("w", limit=2))) == 1


# Repairing ---------------------------------------------------------------------------------------------------


def test_dead_jobs_are_edited_replayed_and_purged(pgq: PgQueue, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgqueue.repairing.BATCH_JOBS", 2)
    ids = add_dead(pgq, 9)
    batches: list[int] = []

    run(pgq.edit_async(ids[0], payload={"n": 1}, priority=4))
    run(pgq.replay_async(ids[0], payload={"n": 2}))
    by_id = run(pgq.replay_async([*ids[1:4], 999_999]))
    would_be = run(pgq.replay_where_async(limit=2, dry_run=True))
    by_filter = run(pgq.replay_where_async(limit=2, replayed=batches.append))
    would_go = run(pgq.purge_async(dry_run=True))
    gone = run(pgq.purge_async(purged=batches.append))

    assert (row(pgq, ids[0]).payload, row(pgq, ids[0]).priority) == ({"n": 2}, 4)
    assert events(pgq, ids[0]) == ["dead", "edit", "edit", "replay"]
    assert (by_id.replayed, list(by_id.skipped)) == (ids[1:4], [999_999])
    assert would_be.replayed == by_filter.replayed == ids[4:6]
    assert would_go == gone == 3
    assert batches[0] == 2
    assert sum(batches[1:]) == 3
    assert set(statuses(pgq).values()) == {"pending"}


def test_bad_arguments_are_refused_when_awaited(pgq: PgQueue, run: Run) -> None:
    before = everything(pgq)

    for call in (
        pgq.replay_async("12"),  # type: ignore[call-overload]
        pgq.replay_where_async(limit=0),
        pgq.purge_async(queue=5),  # type: ignore[arg-type]
        pgq.edit_async(1),
        pgq.list_jobs_async(status="done"),
        pgq.prune_async(older_than=-1),
    ):
        with pytest.raises(ConfigurationError):
            run(call)

    assert everything(pgq) == before


@pytest.mark.parametrize("kind", ["session", "connection"])
@pytest.mark.parametrize("call", ["replay", "replay_where", "purge", "edit"])
def test_it_happens_in_the_applications_transaction(pgq: PgQueue, run: Run, call: str, kind: str) -> None:
    ids = add_dead(pgq, 3)
    before = everything(pgq)

    async def do(*, commits: bool) -> None:
        session: Any = AsyncSession(pgq.async_engine) if kind == "session" else pgq.async_engine.connect()
        async with session:
            calls = {
                "replay": lambda: pgq.replay_async(ids, session=session),
                "replay_where": lambda: pgq.replay_where_async(session=session),
                "purge": lambda: pgq.purge_async(session=session),
                "edit": lambda: pgq.edit_async(ids[0], priority=3, session=session),
            }
            await calls[call]()
            await (session.commit() if commits else session.rollback())

    run(do(commits=False))
    assert everything(pgq) == before

    run(do(commits=True))
    assert everything(pgq) != before


def test_another_kind_of_session_is_refused(pgq: PgQueue, run: Run) -> None:
    async def replay(session: Any) -> None:
        await pgq.replay_where_async(session=session)

    with Session(pgq.engine) as session, pytest.raises(WrongSession, match=r"use: ….replay_where\("):
        run(replay(session))
    with pytest.raises(WrongSession, match="got str"):
        run(replay("session"))


# Schedules ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nightly(pgq: PgQueue) -> str:
    """A schedule in the database."""

    @pgq.task
    def report(days: int) -> None: ...

    with pgq.begin() as connection:
        pgq.schedules.upsert(connection, "nightly", cron="0 3 * * *", task=report, payload={"days": 1})
    return "nightly"


def test_a_schedule_is_looked_at_disabled_run_and_deleted(pgq: PgQueue, run: Run, nightly: str) -> None:
    calls = pgq.schedules

    assert run(calls.get_async(nightly)) == calls.get(nightly)
    assert run(calls.list_async()) == calls.list()
    assert (run(calls.disable_async(nightly)), run(calls.disable_async(nightly))) == (True, False)
    assert run(calls.enable_async(nightly, reason="again", actor="ann")) is True
    handle = run(calls.run_now_async(nightly))
    assert run(handle.job_async()).payload == {"days": 1}
    run(calls.delete_async(nightly))
    with pytest.raises(ScheduleNotFound):
        run(calls.get_async(nightly))


@pytest.mark.parametrize("kind", ["session", "connection"])
def test_a_schedule_is_changed_in_the_applications_transaction(pgq: PgQueue, run: Run, nightly: str, kind: str) -> None:
    async def do(*, commits: bool) -> None:
        session: Any = AsyncSession(pgq.async_engine) if kind == "session" else pgq.async_engine.connect()
        async with session:
            await pgq.schedules.run_now_async(nightly, session=session)
            await pgq.schedules.disable_async(nightly, session=session)
            await (session.commit() if commits else session.rollback())

    run(do(commits=False))
    assert (pgq.schedules.get(nightly).enabled, statuses(pgq)) == (True, {})

    run(do(commits=True))
    assert (pgq.schedules.get(nightly).enabled, list(statuses(pgq).values())) == (False, ["pending"])


# Wake-ups ----------------------------------------------------------------------------------------------------


def test_workers_are_woken_after_the_commit(pg: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = add_dead(pg, 2)
    pg.pause("mail")
    running = add_one(pg, queue="slow")
    claim_one(pg, queue="slow")
    woken: list[set[str]] = []
    monkeypatch.setattr(pg, "_wake_sender", lambda queues, committed: woken.append(set(queues)))

    async def work() -> None:
        await pg.resume_async("mail")
        await pg.cancel_async(running)
        await pg.set_limits_async(queue="mail", concurrency=1)
        await pg.replay_async(ids[0])
        async with AsyncSession(pg.async_engine) as session:
            await pg.replay_async(ids[1:], session=session)
            before = len(woken)
            await session.commit()
        assert len(woken) == before + 1
        await pg.async_engine.dispose()

    asyncio.run(work())

    assert woken == [{"mail"}, {f"!stop {running}"}, {"mail"}, {"default"}, {"default"}]


# Many at once ------------------------------------------------------------------------------------------------


def test_calls_of_one_event_loop_go_on_side_by_side(pgq: PgQueue, run: Run) -> None:
    ids = add(pgq, 8)

    async def cancel_all() -> list[JobStatus]:
        return await asyncio.gather(*(pgq.cancel_async(job_id) for job_id in ids))

    assert run(cancel_all()) == [JobStatus.CANCELLED] * 8
