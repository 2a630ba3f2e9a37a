"""chancy. Its documentation of Queue and executors names the means for throughput: the asyncio executor for many small
jobs, a high concurrency, and eager_polling, which looks for more as soon as a job is done."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from chancy import Chancy, Queue, Worker
from chancy import job as chancy_job
from program import main, stop_requested
from recorder import run

CONCURRENCY = 1_000

logger = logging.getLogger("quiet")
logger.addHandler(logging.NullHandler())
logger.propagate = False


@chancy_job(queue="bench")
async def noop(*, n: int) -> None:
    run(n)


class Producer:
    def __init__(self, app: Chancy) -> None:
        self.app = app

    async def many(self, numbers: range) -> None:
        jobs = [noop.job.with_kwargs(n=n) for n in numbers]
        async for _ in self.app.push_many(jobs, batch_size=len(jobs)):
            pass

    async def one(self, n: int) -> None:
        await self.app.push(noop.job.with_kwargs(n=n))


@asynccontextmanager
async def producer(url: str) -> AsyncIterator[Producer]:
    async with Chancy(url, log=logger) as app:
        yield Producer(app)


async def setup(url: str) -> None:
    async with Chancy(url, log=logger) as app:
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


async def work(url: str) -> None:
    async with Chancy(url, log=logger) as app, Worker(app, register_signal_handlers=False):
        await stop_requested()


if __name__ == "__main__":
    main(setup=setup, producer=producer, work=work)
