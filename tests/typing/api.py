"""The public API as a type checker sees it: `make types` fails if a mistake below is no longer found.

mypy reports a `type: ignore` that nothing needs, so each one states that the line is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqueue import (
    ClaimedJob,
    EnqueueRequest,
    Job,
    JobEvent,
    JobHandle,
    JobStatus,
    PgQueue,
    ReplayResult,
    Retry,
    Schedule,
    Subscription,
    Unique,
)
from pgqueue.testing import Tester, crash, crash_matrix, drain

pgq = PgQueue("sqlite://")


@pgq.task
def plain(file: str, size: int = 1024) -> dict[str, Any]:
    return {"file": file, "size": size}


@pgq.task(queue="images", retry=Retry(max_retries=5))
async def asynchronous(file: str) -> None: ...


@pgq.task(unique=Unique(by=("file",), period=60, on_conflict="raise"))
def once(file: str) -> None: ...


@pgq.task(transactional=True)
def transactional(session: Session, invoice_id: int) -> None: ...


@pgq.cron("0 3 * * *", tz="Europe/Zurich", payload={"file": "a.jpg"})
@pgq.task(queue="images")
def nightly(file: str) -> int:
    return len(file)


@pgq.cron("0 * * * *", catchup="all", overlap=False)
async def hourly(size: int = 1) -> None: ...


def schedule(session: Session) -> Schedule:
    nightly.enqueue(session, file="a.jpg")
    nightly.enqueue(session, fiel="a.jpg")  # type: ignore[call-arg]
    hourly.enqueue(session, size="one")  # type: ignore[arg-type]
    pgq.cron("0 3 * * *")("nightly")  # type: ignore[call-overload]
    return pgq.schedules.upsert(session, "tenant-1", cron="*/5 * * * *", task=nightly, payload={"file": "b.jpg"})


async def schedule_async(session: AsyncSession) -> Schedule:
    pgq.schedules.upsert(session, "tenant-1", cron="*/5 * * * *", task="nightly")  # type: ignore[arg-type]
    handle: JobHandle = await pgq.schedules.run_now_async("tenant-1", session=session)
    await pgq.schedules.disable_async("tenant-1", session="x")  # type: ignore[arg-type]
    assert await handle.status_async()
    return await pgq.schedules.upsert_async(session, "tenant-1", cron="*/5 * * * *", task="nightly")


def enqueue(session: Session) -> JobHandle:
    plain.enqueue(session, file="a.jpg")
    plain.enqueue(session, "a.jpg", size=800)
    plain.enqueue(session, fiel="a.jpg")  # type: ignore[call-arg]
    plain.enqueue(session, file=1)  # type: ignore[arg-type]
    plain.enqueue(file="a.jpg")  # type: ignore[call-arg]
    transactional.enqueue(session, invoice_id=3)
    transactional.enqueue(session, invoice_id="three")  # type: ignore[arg-type]
    ids: list[int] = plain.enqueue_many(session, [{"file": "a.jpg"}])
    assert ids
    job: Job = plain.new(file="a.jpg")
    session.add(job)
    plain.new(size=3)  # type: ignore[call-arg]
    result: dict[str, Any] = plain(file="a.jpg")
    assert result
    return plain.using(delay=5, priority=9).enqueue(session, file="a.jpg")


async def enqueue_async(session: AsyncSession) -> int:
    await asynchronous.enqueue_async(session, file="a.jpg")
    await asynchronous.enqueue_async(session, size=3)  # type: ignore[call-arg]
    plain.enqueue(session, file="a.jpg")  # type: ignore[arg-type]
    return (await plain.enqueue_async(session, file="a.jpg")).id


def operate(session: Session) -> ReplayResult:
    pgq.replay(1, payload={"file": "a.jpg"}, session=session)
    once.enqueue(session, file="a.jpg")
    once.enqueue(session, fiel="a.jpg")  # type: ignore[call-arg]
    pgq.edit(1, payload={"file": "b.jpg"}, reason="typo")
    count: int = pgq.purge(task="once", dry_run=True)
    assert count
    pgq.replay([1, 2], payload={})  # type: ignore[call-overload]
    return pgq.replay([1, 2])


async def operate_async(session: AsyncSession) -> ReplayResult:
    await pgq.enqueue_async(session, "plain", {"file": "a.jpg"})
    await pgq.replay_async(1, payload={"file": "a.jpg"}, session=session)
    await pgq.edit_async(1, payload={"file": "b.jpg"}, reason="typo")
    status: JobStatus = await pgq.cancel_async(1)
    assert status
    count: int = await pgq.purge_async(task="once", dry_run=True)
    assert count
    await pgq.pause_async("images", duration="long")  # type: ignore[arg-type]
    await pgq.replay_async([1, 2], payload={})  # type: ignore[call-overload]
    pgq.replay([1, 2], session=session)  # type: ignore[call-overload]
    ids: list[int] = [job.id async for job in pgq.iter_jobs_async(status="dead")]
    claimed: list[ClaimedJob] = await pgq.claim_async("w")
    await pgq.ack_async(claimed, result=ids, session=session)
    return await pgq.replay_async(ids)


def listen() -> Subscription:
    def note(event: JobEvent) -> None: ...

    with pgq.on("job:failed", note):
        pass
    pgq.on("job:failed", lambda event: event.payload, task=plain, queue="images")
    pgq.on("job:failed", "note")  # type: ignore[call-overload]
    return pgq.on("job:*", note)


@pgq.on("job:completed")
async def completed(event: JobEvent) -> None: ...


@pgq.on("job:completed")  # type: ignore[type-var]
def without_event() -> None: ...


@pgq.middleware("run")
def around(job: ClaimedJob) -> Iterator[None]:
    yield


@pgq.middleware("enqueue")
def before(request: EnqueueRequest) -> None:
    request.metadata["by"] = request.task


@pgq.middleware("claim")  # type: ignore[arg-type]
def neither(job: ClaimedJob) -> Iterator[None]:
    yield


def in_a_test(tester: Tester, session: Session) -> int:
    job: Job = tester.assert_enqueued(plain, queue="images", count=1)
    tester.travel(minutes=31)
    tester.travel(weeks=1)  # type: ignore[call-arg]
    drain(session)  # type: ignore[call-arg]
    crash(plain, {}, at="never")  # type: ignore[arg-type]
    crash_matrix(plain, {}, check=lambda ended: ended.status)
    return tester.drain(raise_errors=False).completed + job.id
