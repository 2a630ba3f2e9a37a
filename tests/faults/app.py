"""The application that the fault tests run: its tables, its tasks, and the processes that work for it.

Every task records that it ran, in a transaction of its own, so that the record outlives whatever becomes of the
attempt. Transactional tasks add an effect in the session they are given; the table of effects has no unique
constraint, which would hide what the tests look for. `ledger` compares all of this with the tables of the queue.

`python -m faults.app worker` is one worker process. `python -m faults.app nursery` forks processes on request:
a fork takes milliseconds where a new interpreter takes a second of processor time, and the tests start hundreds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqueue import PgQueue, Retry, Worker, WorkerConfig, current_job
from pgqueue.dialect import BigId, UTCDateTime, now

#: Faults charge retries; here nothing shall die of them, and nothing shall wait long.
PATIENT = Retry(max_retries=1000, backoff="constant", base=0.05)

metadata = sa.MetaData()

effects = sa.Table(
    "effects",
    metadata,
    sa.Column("id", BigId, sa.Identity(), primary_key=True),
    sa.Column("job_id", sa.BigInteger, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", BigId, sa.Identity(), primary_key=True),
    sa.Column("job_id", sa.BigInteger, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("claim_token", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("started_at", UTCDateTime, nullable=False, server_default=now()),
)

orders = sa.Table(
    "orders",
    metadata,
    sa.Column("id", BigId, sa.Identity(), primary_key=True),
)

#: The names of the tasks with effects.
TRANSACTIONAL = frozenset({"charge", "charge_async", "hold", "hold_async", "freeze", "die"})


def build(url: str, gates: str | Path = "/nonexistent") -> PgQueue:
    """The application on a database. `gates` is a folder: a gate is open when it has a file of that name."""
    pgq = PgQueue(url)

    def gate(name: str) -> Path:
        return Path(gates) / name

    def run_recorded() -> None:
        job = current_job()
        with pgq.engine.begin() as connection:
            connection.execute(
                sa.insert(runs).values(
                    job_id=job.id, attempt=job.attempt, claim_token=str(job.claim_token), pid=os.getpid()
                )
            )

    def effect() -> sa.Insert:
        return sa.insert(effects).values(job_id=current_job().id, attempt=current_job().attempt)

    @pgq.task(transactional=True, retry=PATIENT)
    def charge(session: Session, seconds: float = 0.0, order: int = 0) -> int:
        run_recorded()
        session.execute(effect())
        time.sleep(seconds)
        return current_job().attempt

    @pgq.task(transactional=True, retry=PATIENT)
    async def charge_async(session: AsyncSession, seconds: float = 0.0) -> int:
        await asyncio.to_thread(run_recorded)
        await session.execute(effect())
        await asyncio.sleep(seconds)
        return current_job().attempt

    @pgq.task(retry=PATIENT)
    def note() -> int:
        run_recorded()
        return current_job().attempt

    @pgq.task(transactional=True, retry=PATIENT)
    def hold(session: Session, until: str) -> int:
        run_recorded()
        session.execute(effect())
        while not gate(until).exists():
            time.sleep(0.01)
        return current_job().attempt

    @pgq.task(transactional=True, retry=PATIENT)
    async def hold_async(session: AsyncSession, until: str) -> int:
        await asyncio.to_thread(run_recorded)
        await session.execute(effect())
        while not gate(until).exists():
            await asyncio.sleep(0.01)
        return current_job().attempt

    @pgq.task(retry=PATIENT)
    def hold_plain(until: str) -> int:
        run_recorded()
        while not gate(until).exists():
            time.sleep(0.01)
        return current_job().attempt

    @pgq.task(transactional=True, retry=PATIENT)
    def freeze(session: Session) -> int:
        """On the first attempt the process stops itself when all is written and only the commit is missing."""
        run_recorded()
        session.execute(effect())
        thread = threading.get_ident()
        if current_job().attempt == 1:
            # Sent to this thread, not to the process: then this thread is the first to stand still.
            event.listen(session, "before_commit", lambda _: signal.pthread_kill(thread, signal.SIGSTOP))
        return current_job().attempt

    @pgq.task(transactional=True, retry=PATIENT)
    def die(session: Session, when: str) -> int:
        """On the first attempt the process kills itself: `in_task`, `before_commit` or `after_commit`."""
        run_recorded()
        session.execute(effect())
        if current_job().attempt == 1:
            if when == "in_task":
                os.kill(os.getpid(), signal.SIGKILL)
            event.listen(session, when, lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return current_job().attempt

    @pgq.task(retry=PATIENT)
    def stop_worker() -> int:
        """Sends its process a signal that arrives in this thread, which is not the main one."""
        run_recorded()
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return current_job().attempt

    @pgq.task(retry=Retry(max_retries=2, backoff="constant", base=0.05))
    def poison() -> None:
        run_recorded()
        os.kill(os.getpid(), signal.SIGKILL)

    return pgq


# Processes -------------------------------------------------------------------------------------------------


def work(options: dict[str, Any]) -> int:
    """A worker. The first SIGTERM or SIGINT stops it, the second at once."""
    pgq = build(options["url"], options["gates"])
    if options.get("bug"):
        from faults import bugs

        bugs.plant(options["bug"], Path(options["gates"]))
    worker = Worker(pgq, WorkerConfig(**options["config"]))
    signals: list[int] = []

    def stop(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) == 1:
            worker.stop()
        else:
            worker.abort()
        os.write(1, b"stop requested\n")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    worker.run()
    return 0


def enqueue(options: dict[str, Any]) -> int:
    """Places orders for ever, each with its job in the same transaction."""
    pgq = build(options["url"])
    chance = random.Random()
    with Session(pgq.engine) as session:
        while True:
            order = session.execute(sa.insert(orders).returning(orders.c.id)).scalar_one()
            if options.get("bug") == "job enqueued outside the transaction":
                with pgq.begin() as other:
                    pgq.tasks["charge"].enqueue(other, order=order)
            else:
                pgq.tasks["charge"].enqueue(session, order=order)
            if options.get("die_before_commit"):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(chance.random() * 0.002)  # most kills hit an open transaction
            session.commit()


ROLES: dict[str, Callable[[dict[str, Any]], int]] = {"worker": work, "enqueuer": enqueue}


def nursery() -> None:
    """Answers each line of JSON on standard input with one on standard output. Its children die with it."""
    build("postgresql://nowhere/nothing").dispose()  # what that imports, its children need not
    started: set[int] = set()
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        match request["do"]:
            case "start":
                answer: int | None = _fork(request)
                started.add(answer)
                codes.pop(answer, None)  # of an earlier process with the same number
            case "signal":
                os.kill(request["pid"], request["number"])
                answer = None
            case "freeze":
                os.kill(request["pid"], signal.SIGSTOP)
                answer = _wait(request["pid"], codes, os.WUNTRACED)
            case "frozen" | "exited" as question:
                flags = os.WNOHANG | (os.WUNTRACED if question == "frozen" else 0)
                answer = _wait(request["pid"], codes, flags)
            case "wait":
                answer = _wait(request["pid"], codes, 0)
        print(json.dumps(answer), flush=True)
    for pid in started - codes.keys():
        os.kill(pid, signal.SIGKILL)


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = ROLES[request["role"]](request["options"])
    except BaseException:
        logging.exception("the process failed")
    finally:
        os._exit(code)


def _wait(pid: int, codes: dict[int, int], flags: int) -> int | None:
    """The exit code (negative: the signal), the negative number of SIGSTOP for a stopped one, or None."""
    if pid in codes:
        return codes[pid]
    found, status = os.waitpid(pid, flags)
    if not found:
        return None
    if os.WIFSTOPPED(status):
        return -signal.SIGSTOP
    codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[pid]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(process)d %(threadName)s %(message)s")
    if sys.argv[1] == "nursery":
        nursery()
    else:
        sys.exit(ROLES[sys.argv[1]](json.loads(os.environ["FAULTS_OPTIONS"])))
