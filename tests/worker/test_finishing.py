"""How the ends of jobs get into the database: in batches of a bearable size, each one counted for what it is."""

from __future__ import annotations

import threading
from typing import Any

import jobs
import pytest
import sqlalchemy as sa
from support import execute, wait_for
from working import Gate, enqueue, enqueue_many, events, wait_for_status, working

from pgqueue import PgQueue, finishing, store

LONG_LEASE = {"lease": 600.0, "sweep_interval": 600.0}


class HeldUp:
    """`store.finish`, which gets nowhere until it is let go, and notes what it was given then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._finish = store.finish
        self._free = threading.Event()
        self.batches: list[list[Any]] = []
        monkeypatch.setattr(store, "finish", self)

    def __call__(self, connection: sa.Connection, tables: Any, batch: Any, *, actor: str) -> set[int]:
        if not self._free.is_set():
            raise sa.exc.OperationalError("UPDATE", {}, ConnectionError("no answer"))
        self.batches.append(list(batch))
        return self._finish(connection, tables, batch, actor=actor)

    def let_go(self) -> None:
        self._free.set()


def test_ends_with_large_results_are_written_in_smaller_batches(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    @pgq.task
    def returns_much() -> str:
        return "x" * 1_000

    monkeypatch.setattr(finishing, "FINISH_CHARACTERS_MAX", 10_000)
    finish = HeldUp(monkeypatch)
    enqueue_many(returns_much, 100)
    with working(pgq) as running:
        wait_for(lambda: running._finisher._ended.qsize() > 50, "ends to pile up")
        finish.let_go()
        wait_for(lambda: running.report.completed == 100, "all ends to be written")

    assert max(len(batch) for batch in finish.batches) == 10


def test_an_end_that_lost_its_claim_to_a_later_one_in_the_same_batch_counts_as_lost(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    @pgq.task
    def work() -> None:
        attempts.append(1)

    finish = HeldUp(monkeypatch)
    job_id = enqueue(work)
    with working(pgq, **LONG_LEASE) as running:
        wait_for(lambda: len(attempts) == 1, "the first attempt")
        jobs.expire(pgq)
        jobs.sweep(pgq)
        wait_for(lambda: len(running._finisher._unwritten) == 2, "the end of a second attempt")
        finish.let_go()
        wait_for_status(pgq, job_id, "completed")
        wait_for(lambda: not running._holds.by_id, "both ends to be settled")

    assert [len(batch) for batch in finish.batches][:1] == [2]
    assert (running.report.completed, running.report.lost) == (1, 1)
    assert "claim lost: job" in caplog.text
    assert events(pgq, job_id) == ["sweep"]


def test_an_end_that_cannot_be_written_for_a_reason_that_is_not_its_own_is_written_later(
    pgq: PgQueue, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()

    @pgq.task
    def work() -> str:
        gate.pass_through()
        return "done"

    job_id = enqueue(work)
    there, away = ("pgqueue_jobs", "away") if pgq.engine.dialect.name == "sqlite" else ("pgqueue.jobs", "pgqueue.away")
    with working(pgq):
        wait_for(lambda: gate.inside, "the task to run")
        execute(pgq.engine, f"ALTER TABLE {there} RENAME TO {away.rpartition('.')[2]}")
        gate.open()
        wait_for(lambda: "pgqueue-finish: failed, trying again" in caplog.text, "the end to be refused")
        execute(pgq.engine, f"ALTER TABLE {away} RENAME TO {there.rpartition('.')[2]}")
        job = wait_for_status(pgq, job_id, "completed")

    assert (job.result, job.attempt) == ("done", 1)


def test_a_transaction_that_cannot_be_begun_is_not_tried_again_at_once(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    @pgq.task(transactional=True)
    def work(session: object) -> None: ...

    connect = sa.Engine.connect

    def connect_but_for_tasks(engine: sa.Engine) -> sa.Connection:
        if threading.current_thread().name == "pgqueue-default":
            raise sa.exc.OperationalError("", {}, ConnectionError("too many clients"))
        return connect(engine)

    monkeypatch.setattr(sa.Engine, "connect", connect_but_for_tasks)
    job_id = enqueue(work)
    with working(pgq):
        wait_for(lambda: events(pgq, job_id), "the job to be released")
        wait = jobs.seconds_until_due(pgq, job_id)

    assert events(pgq, job_id) == ["release"]
    assert 0 < wait <= 1
