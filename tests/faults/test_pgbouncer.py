"""Workers behind a real PgBouncer in transaction mode: all that they do, and what becomes of it when it is restarted.

The application of the fault tests, run by `pgqueue worker` through the pooler. The test itself looks past it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Command, program
from faults import app, ledger
from faults.campaign import enqueue_load, runs_started, statuses, wait_until_all_final, wait_until_completed
from faults.fleet import TESTS
from pgbouncer import POOL_SIZE, Bouncer
from sqlalchemy.orm import Session
from support import Process, execute, rows, scalar, wait_for

from pgqueue import JobStatus, PgQueue

CODE = """
import os
import time
from pathlib import Path

from faults.app import PATIENT, build
from pgqueue import Retry

gates = Path(os.environ["GATES"])
pgq = build(os.environ["PGQUEUE_DATABASE_URL"], gates)
note = pgq.tasks["note"]  # it records that it ran


@pgq.task(retry=Retry(max_retries=3, backoff="constant", base=0.05))
def flaky() -> int:
    attempt = note()
    if attempt < 3:
        raise OSError("try again")
    return attempt


@pgq.task(retry=Retry(max_retries=1, backoff="constant", base=0.05))
def hopeless() -> None:
    note()
    raise OSError("never")


@pgq.task(concurrency=1, retry=Retry(max_retries=0))
def alone() -> int:
    inside = gates / "inside"
    inside.touch(exist_ok=False)  # fails while another one is
    time.sleep(0.005)
    inside.unlink()
    return note()


@pgq.task(isolation="process", retry=PATIENT)
def apart() -> int:
    return note()
"""

QUICK = ("--queue=default=4", "--sweep-interval=0.2", "--poll-interval=0.1")


class Shop:
    """The application, before the pooler and behind it."""

    def __init__(self, url: str, pooled_url: str, folder: Path) -> None:
        self.direct, self.pooled = app.build(url), app.build(pooled_url)
        app.metadata.create_all(self.pooled.engine)
        self.gates = folder / "gates"
        self.gates.mkdir()
        self.command = Command(pooled_url)
        self.workers: list[Process] = []
        self._folder = folder
        (folder / "shop.py").write_text(CODE)

    def start_worker(self, *, lease: float, listen: str = "--no-listen") -> Process:
        """`pgqueue worker`, through the pooler."""
        worker = Process(
            program("worker", "shop:pgq", *QUICK, f"--lease={lease}", listen),
            cwd=self._folder,
            PGQUEUE_DATABASE_URL=self.pooled.url.render_as_string(hide_password=False),
            GATES=str(self.gates),
            PYTHONPATH=f"{self._folder}:{TESTS}:{TESTS.parent}",
        )
        self.workers.append(worker)
        return worker

    def enqueue(self, task: str, count: int = 1, **payload: Any) -> list[int]:
        """Through the pooler; also of tasks that only the workers know."""
        known = self.pooled.tasks.get(task) or self.pooled.external_task(task)
        with Session(self.pooled.engine) as session, session.begin():
            return known.enqueue_many(session, [payload] * count)

    def is_running(self, job_id: int) -> bool:
        return self.direct.get_job(job_id).status == JobStatus.RUNNING

    def close(self) -> None:
        for worker in self.workers:
            print(worker.output())  # shown when the test failed
            worker.close()
        for pgq in (self.direct, self.pooled):
            pgq.dispose()


@pytest.fixture
def shop(pg_url: str, bouncer: Bouncer, tmp_path: Path) -> Iterator[Shop]:
    opened = Shop(pg_url, bouncer.url(pg_url), tmp_path)
    yield opened
    opened.close()


def test_workers_behind_it_do_all_that_workers_do_and_leave_nothing_in_its_sessions(
    shop: Shop, pg_url: str, bouncer: Bouncer
) -> None:
    ids = enqueue_load(shop.pooled, 100, seconds=0.01)
    ids += shop.enqueue("note", 60) + shop.enqueue("alone", 8) + shop.enqueue("flaky", 5) + shop.enqueue("apart")
    ids += shop.enqueue("hopeless", 2)
    with Session(shop.pooled.engine) as session, session.begin():
        shop.pooled.schedules.upsert(session, "minutely", cron="* * * * *", task=shop.pooled.tasks["note"])
    execute(shop.direct.engine, "UPDATE pgqueue.schedules SET next_tick_at = date_trunc('minute', now())")

    for _ in range(3):
        shop.start_worker(lease=10)
    wait_for(lambda: scalar(shop.direct.engine, "SELECT count(*) FROM pgqueue.schedule_ticks"), "the tick")
    wait_until_all_final(shop.direct)
    for worker in shop.workers:
        worker.signal(signal.SIGTERM)
    codes = [worker.wait() for worker in shop.workers]

    assert codes == [0, 0, 0]
    assert ledger.audit(shop.direct, acknowledged=ids) == []
    assert statuses(shop.direct)["dead"] == 2
    assert rows(shop.direct.engine, "SELECT DISTINCT task FROM pgqueue.jobs WHERE status = 'dead'") == [("hopeless",)]
    assert scalar(shop.direct.engine, "SELECT count(DISTINCT pid) FROM runs") == 4, "three workers, and the child"
    assert shop.direct.workers() == []
    assert 2 <= bouncer.server_connections(pg_url) <= POOL_SIZE
    assert bouncer.left_behind(pg_url) == []
    troubles = [line for worker in shop.workers for line in worker.output().splitlines() if "pgqueue.loop" in line]
    assert troubles == []


def test_jobs_that_outlast_their_lease_are_kept_and_operators_are_obeyed(shop: Shop) -> None:
    (kept,) = shop.enqueue("hold", until="done")
    (cancelled,) = shop.enqueue("hold_async", until="never")
    worker = shop.start_worker(lease=2)
    wait_for(lambda: runs_started(shop.direct) == 2, "the jobs to run")

    extended = "SELECT count(*) FROM pgqueue.jobs WHERE claim_expires_at > claimed_at + interval '4.5 s'"
    wait_for(lambda: scalar(shop.direct.engine, extended) == 2, "the lease of two seconds to be extended")
    shop.command("queues", "pause", "default")
    (paused,) = shop.enqueue("note")
    shop.command("jobs", "cancel", cancelled)
    wait_for(lambda: not shop.is_running(cancelled), "the job to be cancelled")
    status_while_paused = shop.direct.get_job(paused).status
    shop.command("queues", "resume", "default")
    wait_for(lambda: shop.direct.get_job(paused).status == JobStatus.COMPLETED, "the job that was held back")
    worker.signal(signal.SIGTERM)
    wait_for(lambda: "waiting up to" in worker.output(), "the worker to wait for its job")
    (shop.gates / "done").touch()
    code = worker.wait()

    assert (code, status_while_paused) == (0, JobStatus.PENDING)
    assert statuses(shop.direct) == {"completed": 2, "cancelled": 1}
    assert shop.direct.get_job(kept).attempt == 1
    assert rows(shop.direct.engine, "SELECT job_id FROM effects") == [(kept,)]


def test_when_it_is_interrupted_and_workers_are_killed_nothing_is_lost_and_no_effect_repeated(
    shop: Shop, bouncer: Bouncer
) -> None:
    ids = enqueue_load(shop.pooled, 140)
    killed = shop.start_worker(lease=1)
    survivors = [shop.start_worker(lease=1, listen="--listen")]

    wait_until_completed(shop.direct, 20, "progress before the restart")
    bouncer.restart()
    wait_until_completed(shop.direct, 50, "progress before the pause")
    pause_for_longer_than_a_lease(bouncer, shop.direct)
    wait_until_completed(shop.direct, 80, "progress before the kill")
    survivors.append(shop.start_worker(lease=1))
    wait_for(lambda: holds_jobs(shop.direct, killed), "the victim to be busy")
    killed.signal(signal.SIGKILL)
    wait_until_all_final(shop.direct)
    for worker in survivors:
        worker.signal(signal.SIGTERM)
    codes = [worker.wait() for worker in survivors]

    assert codes == [0, 0]
    assert ledger.audit(shop.direct, acknowledged=ids) == []
    assert statuses(shop.direct) == {"completed": 140}
    warnings = [worker.output().count("not listening for wake-ups") for worker in shop.workers]
    assert warnings == [0, 1, 0], "said once, whatever happens later"


def pause_for_longer_than_a_lease(bouncer: Bouncer, pgq: PgQueue) -> None:
    """As while one server takes over from another."""
    bouncer.ask("PAUSE")
    held = "SELECT count(*) FROM pgqueue.jobs WHERE status = 'running' AND claim_expires_at > now()"
    wait_for(lambda: scalar(pgq.engine, held) == 0, "the leases to end")
    bouncer.ask("RESUME")


def holds_jobs(pgq: PgQueue, worker: Process) -> bool:
    held = "SELECT count(*) FROM pgqueue.jobs WHERE status = 'running' AND claimed_by LIKE :worker"
    return bool(scalar(pgq.engine, held, worker=f"%:{worker.pid}:%"))
