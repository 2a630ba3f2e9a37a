"""pgqueuer. Its guide on performance says: batches larger than the default for short jobs, an asyncpg connection of
its own for the manager, and its autovacuum settings (docs/guides/performance-tuning.md); its own benchmark runs on
uvloop (tools/benchmark.py). Durability stays at the default, "durable"."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries
from program import at_odd_moments_async, chunks, main, stop_requested, timed_async
from recorder import run

BATCH = 2_000

uvloop.install()


async def queries(url: str) -> Queries:
    return Queries(AsyncpgDriver(await asyncpg.connect(url)))


async def setup(url: str) -> None:
    q = await queries(url)
    await q.install()
    await q.optimize_autovacuum()


async def bulk(url: str, jobs: int, chunk: int) -> Any:
    q = await queries(url)

    async def enqueue() -> None:
        for numbers in chunks(jobs, chunk):
            count = len(numbers)
            await q.enqueue(["noop"] * count, [b'{"n": %d}' % n for n in numbers], [0] * count)

    return await timed_async(enqueue)


async def single(url: str, jobs: int) -> Any:
    q = await queries(url)

    async def enqueue() -> None:
        for n in range(jobs):
            await q.enqueue("noop", b'{"n": %d}' % n)

    return await timed_async(enqueue)


async def latency(url: str, gaps: list[float]) -> Any:
    q = await queries(url)
    return await at_odd_moments_async(gaps, lambda n: q.enqueue("noop", b'{"n": %d}' % n))


async def work(url: str) -> None:
    pgq = PgQueuer(AsyncpgDriver(await asyncpg.connect(url)))

    @pgq.entrypoint("noop")
    async def noop(job: Job) -> None:
        run(**json.loads(job.payload or b"{}"))

    running = asyncio.create_task(pgq.run(batch_size=BATCH))
    await stop_requested()
    pgq.shutdown.set()
    await running


if __name__ == "__main__":
    main({"setup": setup, "bulk": bulk, "single": single, "latency": latency, "work": work})
