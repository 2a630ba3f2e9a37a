"""What the programs of all Python systems share: `python NAME.py VERB URL '{"options": …}'`.

setup     make the tables in the database of URL
bulk      enqueue `jobs` jobs, `chunk` per transaction; prints {"seconds"}
single    enqueue `jobs` jobs, one per committed transaction; prints {"seconds"}
latency   enqueue `jobs` jobs after the pauses `gaps`; prints {"moments": [[number, before, after], …]},
          "before" being just before the commit was asked for, or the call that includes it
work      run jobs until SIGTERM
"""

from __future__ import annotations

import asyncio
import inspect
import json
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from recorder import microseconds


def main(verbs: dict[str, Callable[..., Any]]) -> None:
    verb, url = sys.argv[1:3]
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    result = verbs[verb](url, **options)
    if inspect.isawaitable(result):
        result = asyncio.run(_awaited(result))
    if result is not None:
        print(json.dumps(result))


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def chunks(jobs: int, chunk: int) -> list[range]:
    return [range(start, min(start + chunk, jobs)) for start in range(0, jobs, chunk)]


def timed(work: Callable[[], object]) -> dict[str, float]:
    began = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - began}


async def timed_async(work: Callable[[], Awaitable[object]]) -> dict[str, float]:
    began = time.perf_counter()
    await work()
    return {"seconds": time.perf_counter() - began}


def at_odd_moments(
    gaps: list[float], prepare: Callable[[int], object], commit: Callable[[], object]
) -> dict[str, list[tuple[int, int, int]]]:
    moments = []
    for n, gap in enumerate(gaps):
        time.sleep(gap)
        prepare(n)
        before = microseconds()
        commit()
        moments.append((n, before, microseconds()))
    return {"moments": moments}


async def at_odd_moments_async(
    gaps: list[float], enqueue: Callable[[int], Awaitable[object]]
) -> dict[str, list[tuple[int, int, int]]]:
    moments = []
    for n, gap in enumerate(gaps):
        await asyncio.sleep(gap)
        before = microseconds()
        await enqueue(n)
        moments.append((n, before, microseconds()))
    return {"moments": moments}


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
