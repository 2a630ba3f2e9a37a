"""AWA (awa-pg): a Rust engine with Python handlers. Its README recommends enqueue_many_copy for high volume; workers
per queue are the other means (docs/benchmarking in its repository uses up to 256 in one process)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from awa import AsyncClient
from program import at_odd_moments_async, chunks, main, stop_requested, timed_async
from recorder import run

WORKERS = 256


@dataclass
class Noop:
    n: int


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


async def bulk(url: str, jobs: int, chunk: int) -> Any:
    client = AsyncClient(url)

    async def enqueue() -> None:
        for numbers in chunks(jobs, chunk):
            await client.enqueue_many_copy([Noop(n) for n in numbers], queue="bench")

    return await timed_async(enqueue)


async def single(url: str, jobs: int) -> Any:
    client = AsyncClient(url)

    async def enqueue() -> None:
        for n in range(jobs):
            await client.insert(Noop(n), queue="bench")

    return await timed_async(enqueue)


async def latency(url: str, gaps: list[float]) -> Any:
    client = AsyncClient(url)
    return await at_odd_moments_async(gaps, lambda n: client.insert(Noop(n), queue="bench"))


async def work(url: str) -> None:
    client = application(url)
    await client.start([("bench", WORKERS)])
    await stop_requested()
    await client.shutdown()


if __name__ == "__main__":
    main({"setup": setup, "bulk": bulk, "single": single, "latency": latency, "work": work})
