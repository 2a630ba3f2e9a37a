"""procrastinate. Its documentation names one means for throughput: concurrency, many coroutines in one worker process
(howto/production/concurrency)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from procrastinate import App, PsycopgConnector
from program import main, stop_requested
from recorder import run

CONCURRENCY = 50


def application(url: str) -> tuple[App, Any]:
    app = App(connector=PsycopgConnector(conninfo=url, max_size=20))

    @app.task(name="noop")
    async def noop(n: int) -> None:
        run(n)

    return app, noop


class Producer:
    def __init__(self, noop: Any) -> None:
        self.noop = noop

    async def many(self, numbers: range) -> None:
        await self.noop.batch_defer_async(*({"n": n} for n in numbers))

    async def one(self, n: int) -> None:
        await self.noop.defer_async(n=n)


@asynccontextmanager
async def producer(url: str) -> AsyncIterator[Producer]:
    app, noop = application(url)
    async with app.open_async():
        yield Producer(noop)


async def setup(url: str) -> None:
    app, _ = application(url)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


async def work(url: str) -> None:
    app, _ = application(url)
    async with app.open_async():
        running = asyncio.create_task(app.run_worker_async(concurrency=CONCURRENCY, install_signal_handlers=False))
        await stop_requested()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


if __name__ == "__main__":
    main(setup=setup, producer=producer, work=work)
