"""What the programs of all Python systems share: `python NAME.py VERB URL '{"options": …}'`.

setup     make the tables in the database of URL
bulk      enqueue `jobs` jobs, `chunk` per transaction; prints {"seconds"}
single    enqueue `jobs` jobs, one per committed transaction; prints {"seconds"}
pickup    enqueue single jobs after the pauses `gaps`; prints {"moments": [[number, before, after], …]}, "before"
          being just before the commit was asked for, or before the call that includes it
feed      for `seconds`, keep up to `ahead` jobs waiting, `chunk` per transaction; prints {"jobs"}
work      run jobs until SIGTERM
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from recorder import microseconds

FULL_WAIT_SECONDS = 0.005


class Producer(Protocol):
    """How jobs are enqueued. Each `many` commits by itself; `one` is committed by `commit`."""

    def many(self, numbers: range) -> object: ...

    def one(self, n: int) -> object: ...

    def commit(self) -> object: ...


class AsyncProducer(Protocol):
    """The same with asyncio; `one` commits by itself."""

    async def many(self, numbers: range) -> object: ...

    async def one(self, n: int) -> object: ...


def main(
    *,
    setup: Callable[[str], Any],
    producer: Callable[[str], AbstractContextManager[Producer] | AbstractAsyncContextManager[AsyncProducer]],
    work: Callable[[str], Any] | None = None,
) -> None:
    verb, url = sys.argv[1:3]
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    if verb in ("setup", "work"):
        result = {"setup": setup, "work": work}[verb](url)  # type: ignore[misc]
        if inspect.isawaitable(result):
            asyncio.run(_awaited(result))
        return
    opened = producer(url)
    if isinstance(opened, AbstractContextManager):
        with opened as sync_producer:
            print(json.dumps(SYNC_VERBS[verb](sync_producer, **options)))
    else:
        print(json.dumps(asyncio.run(_opened(opened, ASYNC_VERBS[verb], options))))


async def _awaited(result: Any) -> Any:
    return await result


async def _opened(
    opened: AbstractAsyncContextManager[AsyncProducer], verb: Callable[..., Any], options: dict[str, Any]
) -> Any:
    async with opened as producer:
        return await verb(producer, **options)


def chunks(jobs: int, chunk: int) -> list[range]:
    return [range(start, min(start + chunk, jobs)) for start in range(0, jobs, chunk)]


# Producers without asyncio ---------------------------------------------------------------------------------


def bulk(producer: Producer, jobs: int, chunk: int) -> Any:
    began = time.perf_counter()
    for numbers in chunks(jobs, chunk):
        producer.many(numbers)
    return {"seconds": time.perf_counter() - began}


def single(producer: Producer, jobs: int) -> Any:
    began = time.perf_counter()
    for n in range(jobs):
        producer.one(n)
        producer.commit()
    return {"seconds": time.perf_counter() - began}


def pickup(producer: Producer, gaps: list[float]) -> Any:
    moments = []
    for n, gap in enumerate(gaps):
        time.sleep(gap)
        producer.one(n)
        before = microseconds()
        producer.commit()
        moments.append((n, before, microseconds()))
    return {"moments": moments}


def feed(producer: Producer, seconds: float, ahead: int, chunk: int) -> Any:
    producer.many(range(chunk))
    while not runs_so_far():
        time.sleep(FULL_WAIT_SECONDS)
    jobs, began = chunk, microseconds()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if jobs - runs_so_far() < ahead:
            producer.many(range(jobs, jobs + chunk))
            jobs += chunk
        else:
            time.sleep(FULL_WAIT_SECONDS)
    return {"jobs": jobs, "began": began}


SYNC_VERBS = {"bulk": bulk, "single": single, "pickup": pickup, "feed": feed}


# Producers with asyncio ------------------------------------------------------------------------------------


async def bulk_async(producer: AsyncProducer, jobs: int, chunk: int) -> Any:
    began = time.perf_counter()
    for numbers in chunks(jobs, chunk):
        await producer.many(numbers)
    return {"seconds": time.perf_counter() - began}


async def single_async(producer: AsyncProducer, jobs: int) -> Any:
    began = time.perf_counter()
    for n in range(jobs):
        await producer.one(n)
    return {"seconds": time.perf_counter() - began}


async def pickup_async(producer: AsyncProducer, gaps: list[float]) -> Any:
    moments = []
    for n, gap in enumerate(gaps):
        await asyncio.sleep(gap)
        before = microseconds()
        await producer.one(n)
        moments.append((n, before, microseconds()))
    return {"moments": moments}


async def feed_async(producer: AsyncProducer, seconds: float, ahead: int, chunk: int) -> Any:
    await producer.many(range(chunk))
    while not runs_so_far():
        await asyncio.sleep(FULL_WAIT_SECONDS)
    jobs, began = chunk, microseconds()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if jobs - runs_so_far() < ahead:
            await producer.many(range(jobs, jobs + chunk))
            jobs += chunk
        else:
            await asyncio.sleep(FULL_WAIT_SECONDS)
    return {"jobs": jobs, "began": began}


ASYNC_VERBS = {"bulk": bulk_async, "single": single_async, "pickup": pickup_async, "feed": feed_async}


# For workers -----------------------------------------------------------------------------------------------


def runs_so_far() -> int:
    """How many jobs the workers of this sample have run, not counting the last few milliseconds."""
    folder = Path(os.environ["BENCH_RECORDS"])
    return sum(int.from_bytes(path.read_bytes(), "little") for path in folder.glob("*.count"))


async def stop_requested() -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()


def stop_event() -> threading.Event:
    """Set when the process shall stop; for programs without an event loop."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    return stopped
