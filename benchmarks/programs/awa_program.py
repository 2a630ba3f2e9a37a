"""AWA (awa-pg): a Rust engine with Python handlers. Its README recommends enqueue_many_copy for high volume; the other
means is the number of workers of a queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from awa import AsyncClient
from program import main, stop_requested
from recorder import run

WORKERS = 256


@dataclass
class Noop:
    n: int


class Producer:
    def __init__(self, client: AsyncClient) -> None:
        self.client = client

    async def many(self, numbers: range) -> None:
        await self.client.enqueue_many_copy([Noop(n) for n in numbers], queue="bench")

    async def one(self, n: int) -> None:
        await self.client.insert(Noop(n), queue="bench")


@asynccontextmanager
async def producer(url: str) -> AsyncIterator[Producer]:
    yield Producer(AsyncClient(url))


def application(url: str) -> AsyncClient:
    client = AsyncClient(url, max_connections=20)

    @client.task(Noop, queue="bench")
    async def noop(job: Any) -> None:
        run(job.args.n)

    return client


async def setup(url: str) -> None:
    client = application(url)
    await client.migrate()
    # The first worker of a fresh installation switches it to its queue storage, which enqueue_many_copy needs.
    await client.start([("bench", WORKERS)])
    while '"state": "active"' not in await client.storage_status():
        await asyncio.sleep(0.1)
    await client.shutdown()


async def work(url: str) -> None:
    client = application(url)
    await client.start([("bench", WORKERS)])
    await stop_requested()
    await client.shutdown()


if __name__ == "__main__":
    main(setup=setup, producer=producer, work=work)
