"""procrastinate. Its documentation names one means for throughput: concurrency, many coroutines in one worker process
(howto/production/concurrency); and a short polling interval where LISTEN is not used, which it is here."""

from __future__ import annotations

import asyncio
from typing import Any

from procrastinate import App, PsycopgConnector
from program import at_odd_moments_async, chunks, main, stop_requested, timed_async
from recorder import run

CONCURRENCY = 50


def application(url: str) -> tuple[App, Any]:
    app = App(connector=PsycopgConnector(conninfo=url, max_size=20))

    @app.task(name="noop")
    async def noop(n: int) -> None:
        run(n)

    return app, noop


async def setup(url: str) -> None:
    app, _ = application(url)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


async def bulk(url: str, jobs: int, chunk: int) -> Any:
    app, noop = application(url)

    async def enqueue() -> None:
        for numbers in chunks(jobs, chunk):
            await noop.batch_defer_async(*({"n": n} for n in numbers))

    async with app.open_async():
        return await timed_async(enqueue)


async def single(url: str, jobs: int) -> Any:
    app, noop = application(url)

    async def enqueue() -> None:
        for n in range(jobs):
            await noop.defer_async(n=n)

    async with app.open_async():
        return await timed_async(enqueue)


async def latency(url: str, gaps: list[float]) -> Any:
    app, noop = application(url)
    async with app.open_async():
        return await at_odd_moments_async(gaps, lambda n: noop.defer_async(n=n))


async def work(url: str) -> None:
    app, _ = application(url)
    async with app.open_async():
        running = asyncio.create_task(app.run_worker_async(concurrency=CONCURRENCY, install_signal_handlers=False))
        await stop_requested()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


if __name__ == "__main__":
    main({"setup": setup, "bulk": bulk, "single": single, "latency": latency, "work": work})
