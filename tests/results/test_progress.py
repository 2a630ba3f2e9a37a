"""How far a running task has come."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import add, claim, put, row
from sqlalchemy.orm import Session
from support import PATIENCE_SECONDS, wait_for
from working import Gate, drain, enqueue, seize, wait_for_status, working

from pgqueue import ConfigurationError, PgQueue, Retry, progress, reporting, results
from pgqueue.executor import execute
from pgqueue.reporting import Report, Reports


def shown(pgq: PgQueue, job_id: int) -> Any:
    found = pgq.get_job(job_id).progress
    return None if found is None else {name: value for name, value in found.items() if name != "at"}


def test_what_a_running_task_reports_is_seen_while_it_runs(pgq: PgQueue) -> None:
    gate = Gate()

    @pgq.task
    def work() -> None:
        progress(3, 10, "images")
        gate.pass_through()

    with Session(pgq.engine) as session, session.begin():
        enqueued = work.enqueue(session)
    assert enqueued.progress() is None

    with working(pgq):
        found = wait_for(enqueued.progress, "the progress")
        gate.open()

    assert {name: found[name] for name in ("done", "total", "note")} == {"done": 3, "total": 10, "note": "images"}
    assert found["at"].startswith("20")


def test_an_asynchronous_task_reports_too(pgq: PgQueue) -> None:
    gate = Gate()

    @pgq.task
    async def work() -> None:
        progress(1)
        await gate.pass_through_async()

    job_id = enqueue(work)
    with working(pgq):
        wait_for(lambda: shown(pgq, job_id) == {"done": 1, "total": None, "note": None}, "the progress")
        gate.open()


def test_a_transactional_task_reports_outside_of_its_transaction(pg: PgQueue) -> None:
    gate = Gate()

    @pg.task(transactional=True)
    def work(session: Session) -> None:
        session.execute(sa.text("SELECT 1"))
        progress(1, 2)
        gate.pass_through()
        progress(2, 2)

    job_id = enqueue(work)
    with working(pg):
        wait_for(lambda: shown(pg, job_id) == {"done": 1, "total": 2, "note": None}, "the progress")
        gate.open()
        wait_for_status(pg, job_id, "completed")

    assert shown(pg, job_id) == {"done": 2, "total": 2, "note": None}


def test_a_transactional_task_that_holds_the_write_lock_of_sqlite_is_not_held_up(pgq: PgQueue) -> None:
    @pgq.task(transactional=True)
    def work(session: Session) -> None:
        session.execute(sa.update(pgq.tables.queues).values(paused_at=None))
        for done in range(100):
            progress(done + 1, 100)

    job_id = enqueue(work)
    with working(pgq):
        wait_for_status(pgq, job_id, "completed")

    assert shown(pgq, job_id) == {"done": 100, "total": 100, "note": None}


@pytest.mark.parametrize("ending", [None, ValueError("no")])
def test_the_last_report_is_written_with_the_end_and_few_of_those_before(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, ending: Exception | None
) -> None:
    writes = []
    write = results.write_progress

    def written(connection: Any, tables: Any, reports: Any, **options: Any) -> set[int]:
        writes.extend(reports)
        return write(connection, tables, reports, **options)

    monkeypatch.setattr(results, "write_progress", written)

    @pgq.task(retry=Retry(max_retries=0))
    def work() -> None:
        for done in range(1000):
            progress(done + 1, 1000)
        if ending is not None:
            raise ending

    job_id = enqueue(work)
    drain(pgq)

    assert shown(pgq, job_id) == {"done": 1000, "total": 1000, "note": None}
    assert len(writes) < 50


def test_a_report_that_cannot_be_written_harms_nobody(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> set[int]:
        raise RuntimeError("no progress today")

    monkeypatch.setattr(results, "write_progress", broken)

    @pgq.task
    def work() -> str:
        progress(1)
        return "done"

    job_id = enqueue(work)
    report = drain(pgq)

    assert report.completed == 1
    assert row(pgq, job_id).result == "done"


def test_reports_of_a_claim_that_was_lost_are_not_written(pgq: PgQueue) -> None:
    gate, reported = Gate(), threading.Event()

    @pgq.task
    def work() -> None:
        gate.pass_through()
        progress(1)
        reported.set()

    job_id = enqueue(work)
    with working(pgq):
        wait_for(lambda: gate.came, "the task")
        seize(pgq, job_id)
        gate.open()
        assert reported.wait(PATIENCE_SECONDS)

    assert row(pgq, job_id).progress is None


def test_reports_of_many_jobs_are_one_statement_and_fenced(pgq: PgQueue) -> None:
    add(pgq, 3)
    first, second, third = claim(pgq, limit=3)
    put(pgq, [third.id], status="completed", claim_token=None, claim_expires_at=None, finished_at=third.created_at)
    reports = [Report(job.id, job.claim_token, '{"done": 5}') for job in (first, second, third)]

    for skip_locked in (False, True):
        with pgq.begin() as connection:
            written = results.write_progress(connection, pgq.tables, reports, skip_locked=skip_locked)
        assert written == {first.id, second.id}

    assert shown(pgq, second.id) == {"done": 5}
    assert row(pgq, third.id).progress is None


def test_a_job_that_is_locked_is_left_out(pg: PgQueue) -> None:
    add(pg, 2)
    first, second = claim(pg, limit=2)
    reports = [Report(job.id, job.claim_token, '{"done": 5}') for job in (first, second)]

    with pg.engine.begin() as other:
        other.execute(sa.text("SELECT FROM pgqueue.jobs WHERE id = :id FOR UPDATE"), {"id": first.id})
        with pg.begin() as connection:
            assert results.write_progress(connection, pg.tables, reports, skip_locked=True) == {second.id}


def test_a_report_is_kept_until_it_is_written_or_given_up(pgq: PgQueue) -> None:
    woken: list[int] = []
    add(pgq)
    (job,) = claim(pgq)
    reports = Reports(lambda: woken.append(1))

    reports.put(job, {"done": 1})
    reports.put(job, {"done": 2})
    (first,) = reports.waiting()
    assert (first.document, len(woken)) == ('{"done": 2}', 1)

    reports.put(job, {"done": 3})
    reports.tried([first], {job.id})
    (second,) = reports.waiting()
    assert second.document == '{"done": 3}'
    for _ in range(reporting.TRIES_MAX):
        assert reports.waiting() == [second]
        reports.tried([second], set())

    assert reports.waiting() == []
    reports.put(job, {"done": 4})
    assert len(woken) == 2


def test_progress_outside_of_a_task_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"outside of a running task.*contextvars.copy_context\(\).run"):
        progress(1)


def test_a_thread_that_runs_in_the_tasks_context_reports_for_it(pgq: PgQueue) -> None:
    @pgq.task
    def work() -> None:
        helper = threading.Thread(target=contextvars.copy_context().run, args=(progress, 3))
        helper.start()
        helper.join()

    job_id = enqueue(work)
    drain(pgq)

    assert shown(pgq, job_id) == {"done": 3, "total": None, "note": None}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("1",), "done of progress"),
        ((float("nan"),), "done of progress"),
        ((True,), "done of progress"),
        ((10**400,), "done of progress"),
        ((None,), "done of progress"),
        ((1, float("inf")), "total of progress"),
        ((1, 2, 3), "note of progress"),
    ],
)
def test_progress_must_be_numbers_and_a_text(pgq: PgQueue, arguments: Any, problem: str) -> None:
    seen = []

    @pgq.task
    def work() -> None:
        try:
            progress(*arguments)
        except ConfigurationError as error:
            seen.append(str(error))

    enqueue(work)
    (job,) = claim(pgq, tasks=["work"])
    execute(work.definition, job)

    assert len(seen) == 1
    assert problem in seen[0]


def test_a_note_that_no_database_could_store_is_cleaned(pgq: PgQueue) -> None:
    @pgq.task
    def work() -> None:
        progress(1, note="a\0b\ud800" + "x" * 1000)

    job_id = enqueue(work)
    drain(pgq)

    assert shown(pgq, job_id)["note"].startswith("a\N{SYMBOL FOR NULL}b")
    assert len(shown(pgq, job_id)["note"]) < 600


def test_a_worker_whose_tasks_report_nothing_has_no_thread_for_it(pgq: PgQueue) -> None:
    gate = Gate()

    @pgq.task
    def work() -> None:
        gate.pass_through()

    enqueue(work)
    with working(pgq) as worker:
        wait_for(lambda: gate.came, "the task")
        assert worker._progress._writer is None
        gate.open()
