"""What an idle worker costs its database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import claim_one, expire
from support import rows, wait_for
from working import Gate, enqueue, wait_for_status, working

from pgqueue import PgQueue


@pytest.fixture
def worked(pg: PgQueue) -> PgQueue:
    @pg.task
    def work() -> None:
        pass

    return pg


@contextmanager
def counted(engine: sa.Engine) -> Iterator[list[str]]:
    """What is sent meanwhile: statements, and BEGIN for every transaction that a statement does not make by itself."""
    sent: list[str] = []

    def statement(connection: Any, cursor: Any, text: str, *_: Any) -> None:
        sent.append(text)

    def begin(connection: sa.Connection) -> None:
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            sent.append("BEGIN")

    sa.event.listen(engine, "before_cursor_execute", statement)
    sa.event.listen(engine, "begin", begin)
    try:
        yield sent
    finally:
        sa.event.remove(engine, "before_cursor_execute", statement)
        sa.event.remove(engine, "begin", begin)


def test_a_duty_of_an_idle_worker_is_one_statement_that_is_a_transaction_by_itself(worked: PgQueue) -> None:
    with working(worked, poll_interval=0.1, sweep_interval=0.2, lease=1.5, heartbeat_interval=0.3):
        wait_for_status(worked, enqueue(worked.get_task("work")), "completed")
        wait_for(lambda: rows(worked.engine, "SELECT FROM pgqueue.workers"), "the first heartbeat")

        began = time.monotonic()
        with counted(worked.engine) as sent:
            time.sleep(2)
        seconds = time.monotonic() - began

    assert "BEGIN" not in sent
    # But for the looks with which its work ends, and those for schedules.
    duties = [statement for statement in sent if "WITH RECURSIVE" not in statement and "schedules" not in statement]
    assert len(sent) - len(duties) <= 8
    assert len(duties) <= seconds * (1 / 0.1 + 1 / 0.2 + 1 / 0.3) + 3
    assert len(sent) >= 5  # or they were not counted


def test_a_worker_that_holds_a_job_polls_no_more_often_than_one_that_does_not(pg: PgQueue) -> None:
    gate = Gate()

    @pg.task
    def wait() -> None:
        gate.pass_through()

    with working(pg, poll_interval=0.1, sweep_interval=60.0):
        job = enqueue(wait)
        wait_for_status(pg, job, "running")
        began = time.monotonic()
        with counted(pg.engine) as sent:
            time.sleep(1)
        seconds = time.monotonic() - began
        gate.open()
        wait_for_status(pg, job, "completed")

    assert len(sent) <= seconds / 0.1 + 3


def test_a_claim_that_ran_out_is_found_although_a_sweep_looks_before_it_locks(worked: PgQueue) -> None:
    job = enqueue(worked.get_task("work"))
    claim_one(worked)
    expire(worked)

    with working(worked, poll_interval=60.0, sweep_interval=0.1) as worker:
        wait_for_status(worked, job, "completed")

    assert (worker.report.swept, worker.report.completed) == (1, 1)
