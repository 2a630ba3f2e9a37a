"""chancy. Its documentation of Queue and executors names the means for throughput: the asyncio executor for many small
jobs, a high concurrency, and eager_polling, which looks for more as soon as a job is done."""

from __future__ import annotations

import logging
from typing import Any

from chancy import Chancy, Queue, Worker
from chancy import job as chancy_job
from program import at_odd_moments_async, main, stop_requested, timed_async
from recorder import run

CONCURRENCY = 1_000

logger = logging.getLogger("quiet")
logger.addHandler(logging.NullHandler())
logger.propagate = False


@chancy_job(queue="bench")
async def noop(*, n: int) -> None:
    run(n)


def chancy(url: str) -> Chancy:
    return Chancy(url, log=logger)


async def setup(url: str) -> None:
    async with chancy(url) as app:
        await app.migrate()
        await app.declare(
            Queue(
                "bench",
                concurrency=CONCURRENCY,
                executor=Chancy.Executor.Async,
                polling_interval=1,
                eager_polling=True,
            )
        )


async def bulk(url: str, jobs: int, chunk: int) -> Any:
    async with chancy(url) as app:

        async def enqueue() -> None:
            pushed = [noop.job.with_kwargs(n=n) for n in range(jobs)]
            async for _ in app.push_many(pushed, batch_size=chunk):
                pass

        return await timed_async(enqueue)


async def single(url: str, jobs: int) -> Any:
    async with chancy(url) as app:

        async def enqueue() -> None:
            for n in range(jobs):
                await app.push(noop.job.with_kwargs(n=n))

        return await timed_async(enqueue)


async def latency(url: str, gaps: list[float]) -> Any:
    async with chancy(url) as app:
        return await at_odd_moments_async(gaps, lambda n: app.push(noop.job.with_kwargs(n=n)))


async def work(url: str) -> None:
    async with chancy(url) as app, Worker(app, register_signal_handlers=False):
        await stop_requested()


if __name__ == "__main__":
    main({"setup": setup, "bulk": bulk, "single": single, "latency": latency, "work": work})
