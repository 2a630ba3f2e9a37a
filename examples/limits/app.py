"""Tasks with limits, and what is heard of them."""

from __future__ import annotations

import os

from pgqueue import JobEvent, PgQueue, ProcessDied, Rate, Retry

pgq = PgQueue()

#: Of all its tasks and workers together, no more than four jobs of this queue run at once.
pgq.queue("calls", concurrency=4)


@pgq.task(queue="calls", rate=Rate(5, per="second", burst=2))
async def call_api(path: str) -> str:
    """Four may run at once, but the other side allows five calls a second, two of them together."""
    return f"GET {path}"


@pgq.task(queue="calls", expires_in=0.1)
def quote(stock: str) -> None:
    """A price is of no use later than that."""
    raise AssertionError("it was too late to ask")


@pgq.task(queue="sandbox", isolation="process", timeout=60, retry=Retry(discard_on=ProcessDied))
def convert(document: str) -> int:
    """Runs in a process of its own: what kills that, kills neither the worker nor the jobs beside it."""
    if document == "bomb":
        os._exit(1)
    return os.getpid()


@pgq.on("job:*")
def tell(event: JobEvent) -> None:
    if event.name in ("job:completed", "job:expired", "job:failed", "job:dead"):
        print(f"{event.name} {event.task} {event.job_id} {event.reason or ''}".rstrip(), flush=True)
