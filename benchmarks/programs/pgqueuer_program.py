"""pgqueuer. Its guide on performance says: batches larger than the default for short jobs, an asyncpg connection of
its own for the manager, and its autovacuum settings (docs/guides/performance-tuning.md); its own benchmark runs on
uvloop (tools/benchmark.py). Durability stays at the default, "durable"."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries
from program import main, stop_requested
from recorder import run

BATCH = 2_000

uvloop.install()


class Producer:
    def __init__(self, queries: Queries) -> None:
        self.queries = queries

    async def many(self, numbers: range) -> None:
        count = len(numbers)
        await self.queries.enqueue(["noop"] * count, [b'{"n": %d}' % n for n in numbers], [0] * count)

    async def one(self, n: int) -> None:
        await self.queries.enqueue("noop", b'{"n": %d}' % n)


@asynccontextmanager
async def producer(url: str) -> AsyncIterator[Producer]:
    connection = await asyncpg.connect(url)
    yield Producer(Queries(AsyncpgDriver(connection)))
    await connection.close()


async def setup(url: str) -> None:
    async with producer(url) as made:
        await made.queries.install()
        await made.queries.optimize_autovacuum()


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
    main(setup=setup, producer=producer, work=work)
