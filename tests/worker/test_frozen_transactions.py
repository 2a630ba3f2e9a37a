"""A process may freeze between a statement and its commit. The rows it has locked then are skipped by everybody else,
whatever their lease says, so the server has to end the transaction."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from jobs import add, claim_one, expire
from sqlalchemy import event
from support import PATIENCE_SECONDS, scalar, wait_for
from working import enqueue, wait_for_status, working

from pgqueue import DatabaseUnreachable, PgQueue, Retry, Snooze, current_job, database
from pgqueue.engine import make_engine

STATE = "SELECT state FROM pg_stat_activity WHERE pid = :pid"


class Freeze:
    """Holds up the first commit of a thread, as long as the block lasts or until it is ended.

    of_transaction: not that of a statement which commits by itself.
    """

    def __init__(self, engine: sa.Engine, thread: str, *, of_transaction: bool = False) -> None:
        self._thread = thread
        self._of_transaction = of_transaction
        self._pids: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._began = False
        event.listen(engine, "commit", self._commits)

    def __enter__(self) -> Freeze:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def pid(self) -> int:
        """The server's process of the frozen transaction, once there is one."""
        return self._pids.get(timeout=PATIENCE_SECONDS)

    def end(self) -> None:
        self._ended.set()

    def _commits(self, connection: sa.Connection) -> None:
        if self._of_transaction and connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            return
        if threading.current_thread().name == self._thread and not self._began:
            self._began = True
            self._pids.put(connection.connection.driver_connection.info.backend_pid)  # type: ignore[union-attr]
            self._ended.wait(2 * PATIENCE_SECONDS)


@pytest.mark.parametrize("duty", ["finish", "heartbeat", "sweep"])
def test_rows_locked_by_a_worker_that_freezes_are_free_again_after_its_lease(
    pg: PgQueue, pg_url: str, duty: str
) -> None:
    frozen = threading.Event()

    @pg.task
    def work() -> None:
        if duty == "finish" and current_job().attempt == 1:
            raise Snooze(0)  # written with its event, and so in a transaction
        if duty == "heartbeat":
            assert frozen.wait(PATIENCE_SECONDS)  # a lease that is to be extended

    bystander = make_engine(pg_url)
    job_id = enqueue(work)
    if duty == "sweep":
        claim_one(pg)
        expire(pg)
    with Freeze(pg.engine, f"pgqueue-{duty}", of_transaction=True) as freeze, working(pg, lease=0.6):
        pid = freeze.pid()
        assert scalar(bystander, STATE, pid=pid) == "idle in transaction"
        wait_for(lambda: scalar(bystander, STATE, pid=pid) is None, "the server to end the frozen transaction")
        frozen.set()
        freeze.end()
        wait_for_status(pg, job_id, "completed")

    bystander.dispose()


@pytest.mark.parametrize("duty", ["claim", "finish"])
def test_a_claim_and_a_completion_lock_nothing_when_their_worker_freezes_behind_them(
    pg: PgQueue, pg_url: str, duty: str
) -> None:
    @pg.task
    def work() -> None:
        pass

    bystander = make_engine(pg_url)
    job_id = enqueue(work)
    with Freeze(pg.engine, f"pgqueue-{duty}") as freeze, working(pg, lease=30):
        pid = freeze.pid()
        assert scalar(bystander, STATE, pid=pid) == "idle"
        assert scalar(bystander, "SELECT id FROM pgqueue.jobs FOR UPDATE SKIP LOCKED") == job_id
        freeze.end()
        wait_for_status(pg, job_id, "completed")

    bystander.dispose()


@pytest.mark.parametrize("keep_completed", [None, 60])
def test_a_transactional_task_that_freezes_before_its_commit_lets_go_of_its_job(
    pg: PgQueue, pg_url: str, keep_completed: float | None
) -> None:
    @pg.task(transactional=True, keep_completed=keep_completed)
    def work(session: object) -> None:
        pass

    bystander = make_engine(pg_url)
    job_id = enqueue(work)
    with Freeze(pg.engine, "pgqueue-default", of_transaction=True) as freeze, working(pg, lease=0.6):
        pid = freeze.pid()
        assert scalar(bystander, STATE, pid=pid) == "idle in transaction"
        wait_for(lambda: scalar(bystander, STATE, pid=pid) is None, "the server to end the frozen transaction")
        freeze.end()
        job = wait_for_status(pg, job_id, "completed")

    assert job.attempt > 1
    bystander.dispose()


@pytest.mark.parametrize("lease", [0.5, 3_000_000.0])
def test_a_transactional_task_works_with_the_shortest_and_with_a_very_long_lease(pg: PgQueue, lease: float) -> None:
    @pg.task(transactional=True, retry=Retry(max_retries=0))
    def work(session: object) -> None:
        pass

    job_id = enqueue(work)
    with working(pg, lease=lease):
        wait_for(lambda: pg.get_job(job_id).finished_at, "the job to end")

    assert pg.get_job(job_id).status == "completed"


@pytest.mark.parametrize("call", ["claim", "extend", "ack", "nack"])
def test_rows_locked_by_a_consumer_that_freezes_are_free_again_after_a_while(
    pg: PgQueue, pg_url: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bystander = PgQueue(pg_url)
    add(pg, 2)
    (job,) = pg.claim("consumer-1")
    calls: dict[str, Callable[[], object]] = {
        "claim": lambda: pg.claim("consumer-1"),
        "extend": lambda: pg.extend(job),
        "ack": lambda: pg.ack(job),
        "nack": lambda: pg.nack(job, error="no"),
    }
    errors: list[Exception] = []

    def consume() -> None:
        try:
            calls[call]()
        except DatabaseUnreachable as error:
            errors.append(error)

    consumer = threading.Thread(target=consume, name="consumer")
    with monkeypatch.context() as patch, Freeze(pg.engine, "consumer") as freeze:
        patch.setattr(database, "FROZEN_SECONDS", 0.2)  # nobody else's: a busy machine may hold them up for so long
        consumer.start()
        pid = freeze.pid()
        wait_for(lambda: scalar(bystander.engine, STATE, pid=pid) is None, "the server to end the frozen transaction")
    consumer.join()

    assert len(errors) == 1
    bystander.ack(job)
    assert len(bystander.claim("consumer-2")) == 1
    bystander.dispose()
