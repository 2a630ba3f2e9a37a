"""Several consumers that claim for themselves, on one queue."""

from __future__ import annotations

import asyncio
import random

from jobs import add, statuses

from pgqueue import PgQueue


def test_consumers_in_one_event_loop_share_a_queue_and_all_jobs_get_done_although_one_in_five_fails(
    pgq: PgQueue,
) -> None:
    ids = add(pgq, 20)
    luck = random.Random(5)
    done: list[int] = []
    failures: list[int] = []

    async def consume(name: str) -> None:
        while jobs := await pgq.claim_async(name, limit=2):
            for job in jobs:
                await asyncio.sleep(0)  # others come between
                if luck.random() < 0.2:
                    failures.append(job.id)
                    await pgq.nack_async(job)
                else:
                    await pgq.ack_async(job)
                    done.append(job.id)

    async def consume_together() -> None:
        await asyncio.gather(*(consume(f"consumer-{n}") for n in range(3)))
        await pgq.async_engine.dispose()

    asyncio.run(consume_together())

    assert failures
    assert sorted(done) == ids
    assert set(statuses(pgq).values()) == {"completed"}
    assert {job.claimed_by for job in pgq.list_jobs()} <= {"consumer-0", "consumer-1", "consumer-2"}


def test_metadata_stays_with_a_job_through_its_retries(pgq: PgQueue) -> None:
    task = pgq.external_task("import")
    with pgq.begin() as connection:
        task.using(metadata={"tenant": "acme", "tags": ["a", "b"]}).enqueue(connection)

    (first,) = pgq.claim("consumer-1")
    pgq.nack(first, error="no luck", delay=0)
    (second,) = pgq.claim("consumer-2")

    assert second.retries == 1
    assert first.metadata == second.metadata == {"tenant": "acme", "tags": ["a", "b"]}
