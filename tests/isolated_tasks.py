"""Tasks for tests of isolation: their processes import them from here."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgqueue import Discard, PgQueue, Retry, current_job, isolation, progress, reporting

pgq = PgQueue()

ONCE = Retry(max_retries=0)
MIB = 1024 * 1024


@pgq.task(isolation="process", retry=ONCE)
def look() -> dict[str, Any]:
    job = current_job()
    return {"pid": os.getpid(), "parent": os.getppid(), "id": job.id, "attempt": job.attempt, "payload": job.payload}


@pgq.task(isolation="process", retry=ONCE)
async def look_async(n: int) -> int:
    await asyncio.sleep(0)
    return n * current_job().attempt


@pgq.task(isolation="process", retry=ONCE)
def crash(how: str) -> None:
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        os.environ.pop("PYTHONFAULTHANDLER", None)
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "sys.exit":
        raise SystemExit(4)
    if how == "discard":
        raise Discard("no use")
    raise ValueError(how)


@pgq.task(isolation="process", retry=ONCE, timeout=0.5)
def stuck(pid_file: str) -> None:
    """In C code, with a process of its own."""
    child = subprocess.Popen(["sleep", "60"])
    Path(pid_file).write_text(f"{os.getpid()} {child.pid}")
    ctypes.PyDLL(None).sleep(60)  # keeps the GIL


@pgq.task(isolation="process", retry=Retry(max_retries=3))
def waits(pid_file: str) -> None:
    Path(pid_file).write_text(f"{os.getpid()}")
    time.sleep(60)


@pgq.task(isolation="process", retry=ONCE, memory_limit=1024 * MIB)
def takes(mib: int) -> int:
    return len(bytearray(mib * MIB))


@pgq.task(isolation="process", retry=ONCE, memory_limit=MIB)
def starved() -> None: ...


def wait_until_there(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.005)


@pgq.task(isolation="process", retry=ONCE)
def reports(seen: str, go: str) -> None:
    progress(0, 3, "step 0")
    wait_until_there(seen)
    for done in (1, 2):
        progress(done, 3, f"step {done}")
    wait_until_there(go)
    progress(3, 3)


@pgq.task(isolation="process", retry=ONCE)
async def reports_much(count: int) -> None:
    for done in range(count):
        progress(done + 1, count)


@pgq.task(isolation="process", retry=ONCE)
def patient(pid_file: str, go: str) -> str:
    Path(pid_file).write_text(f"{os.getpid()}")
    wait_until_there(go)
    return "done"


@pgq.task(isolation="process", retry=ONCE, timeout=30)
def misbehaves(how: str) -> str:
    job = current_job()
    line = reporting.reporters[job.claimed_by].__self__  # type: ignore[attr-defined]
    say = {
        "no message": b"\xff\xfe{",
        "speaks for another": isolation.message_of(
            replace(job, claim_token=uuid.uuid4()), "Completed", {"result_json": '"another"'}
        ),
    }.get(how)
    if say is not None:
        line._send(say)
    if how == "truncated":
        line._worker.sendall((100).to_bytes(isolation.LENGTH_BYTES) + b"0123456789")
        os._exit(0)
    if how == "exits well":
        os._exit(0)
    if how == "closes its files":
        os.closerange(3, 512)
        time.sleep(60)
    if how == "forks":
        sys.warnoptions[:] = []
        fork = os.fork()
        if fork == 0:
            return "the fork"
        os.waitpid(fork, 0)
        return "the task"
    if how == "returns much":
        return "x" * 100_000
    return "as usual"


@pgq.task(isolation="process", retry=ONCE)
def enqueues() -> str | None:
    with pgq.begin() as connection:
        plain.enqueue(connection)
    return os.environ.pop("AROUND", None)


@pgq.task
def plain() -> int:
    return os.getpid()
