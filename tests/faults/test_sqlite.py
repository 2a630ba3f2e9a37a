"""Many on one SQLite file: who waits for whom, and eight processes of which some are killed."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from faults import ledger
from faults.campaign import completed, enqueue_load, held_by, statuses, wait_until_all_final, wait_until_completed
from faults.conftest import MakeFleet
from sqlalchemy.orm import Session
from support import scalar, wait_for

from pgqueue import DatabaseUnreachable, PgQueue, engine

JOBS = 200


def test_killing_some_of_eight_processes_on_one_file_loses_nothing_and_repeats_no_effect(
    sqlite_url: str, make_fleet: MakeFleet
) -> None:
    pgq, fleet = make_fleet(sqlite_url)
    with Session(pgq.engine) as session, session.begin():
        held = pgq.tasks["hold_plain"].using(priority=9).enqueue(session, until="killed").id
    ids = [held, *enqueue_load(pgq, JOBS, seconds=0.0)]
    workers = fleet.workers(8, lease=3.0)
    chance = random.Random(6)

    wait_for(lambda: scalar(pgq.engine, "SELECT count(*) FROM runs WHERE job_id = :id", id=held), "the held job to run")
    wait_until_completed(pgq, JOBS // 4, "progress before the first kill")
    holder = next(worker for worker in workers if f":{worker.pid}:" in str(pgq.get_job(held).claimed_by))
    others = chance.sample([worker for worker in workers if worker is not holder], 2)
    for victim in (holder, *others):
        wait_for(
            lambda victim=victim: held_by(pgq, victim) or completed(pgq) >= JOBS // 2, "a running job to interrupt"
        )
        victim.kill()
    fleet.open_gate("killed")
    wait_until_all_final(pgq)

    assert ledger.audit(pgq, acknowledged=ids) == []
    assert statuses(pgq) == {"completed": JOBS + 1}
    assert pgq.get_job(held).attempt >= 2
    assert scalar(pgq.engine, "PRAGMA integrity_check") == "ok"
    assert sum(worker.alive for worker in workers) == 5


@pytest.fixture
def lite(sqlite_url: str) -> Iterator[PgQueue]:
    """A queue on a SQLite file, with one task."""
    pgq = PgQueue(sqlite_url)
    pgq.external_task("note")
    yield pgq
    pgq.dispose()


def test_who_reads_waits_for_no_writer(lite: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SQLITE_BUSY_SECONDS", 0.0)
    job = enqueue(lite)

    with lite.begin() as connection:
        lite.tasks["note"].enqueue(connection)
        seen = (lite.get_job(job).id, len(lite.list_jobs()), lite.queues()[0].ready, lite.workers())
        events = lite.job_events(job)

    assert seen == (job, 1, 1, [])
    assert events == []
    assert lite.queues()[0].ready == 2


def test_no_writer_waits_for_who_reads(lite: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SQLITE_BUSY_SECONDS", 0.0)
    enqueue(lite)
    count = sa.select(sa.func.count()).select_from(lite.tables.jobs)

    with lite.reading() as connection:
        before = connection.scalar(count)
        enqueue(lite)
        meanwhile = connection.scalar(count)

    assert (before, meanwhile) == (1, 1), "what a transaction sees does not change"
    assert len(lite.list_jobs()) == 2


def test_who_has_waited_long_to_write_looks_for_its_turn_as_often_as_who_has_just_come(lite: PgQueue) -> None:
    """SQLite by itself would look less and less often, and on a busy file hardly ever get its turn."""
    looks = 0

    def count(statement: str) -> None:
        nonlocal looks
        looks += statement == "BEGIN IMMEDIATE"

    other = engine.make_engine(lite.url)
    sa.event.listen(other, "connect", lambda connection, _: connection.set_trace_callback(count))

    def write() -> None:
        with other.begin():
            pass

    waiting = threading.Thread(target=write)
    with lite.begin():
        waiting.start()
        wait_for(lambda: looks >= 10, "the other to look again and again", timeout=20)
    waiting.join()


def test_a_new_file_is_opened_while_another_program_writes_to_it(tmp_path: Path) -> None:
    """SQLite refuses at once to keep a write-ahead log from then on, however long it is told to wait."""
    asked, opened = 0, []

    def count(statement: str) -> None:
        nonlocal asked
        asked += statement == "PRAGMA journal_mode = WAL"

    opener = engine.make_engine(sa.make_url(f"sqlite:///{tmp_path}/new.db"))
    sa.event.listen(opener, "connect", lambda connection, _: connection.set_trace_callback(count), insert=True)

    def open_it() -> None:
        with opener.connect() as connection:
            opened.append(connection.exec_driver_sql("PRAGMA journal_mode").scalar())

    opening = threading.Thread(target=open_it)
    with closing(sqlite3.connect(tmp_path / "new.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        opening.start()
        wait_for(lambda: asked >= 2 or not opening.is_alive(), "the other to ask again")
        writer.execute("COMMIT")
        opening.join()
    opener.dispose()

    assert opened == ["wal"]


def test_a_file_that_another_program_keeps_locked_is_named_and_nothing_is_written(
    lite: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "SQLITE_BUSY_SECONDS", 0.2)
    job = enqueue(lite)
    other = engine.make_engine(lite.url)

    with other.begin(), pytest.raises(DatabaseUnreachable) as caught:
        lite.cancel(job)

    assert str(caught.value) == (
        f"{lite.url} has been locked by another process for 0.2 seconds; which program holds a transaction open on it?"
    )
    assert lite.get_job(job).status == "pending"


@pytest.mark.parametrize("message", ["database is locked", "database table is locked", "locking protocol"])
def test_what_sqlite_says_when_many_meet_at_a_file_is_reason_to_try_again(message: str) -> None:
    error = sa.exc.OperationalError("BEGIN", {}, sqlite3.OperationalError(message))

    assert engine.is_transient(error)
    assert not engine.is_refusal(error)


def enqueue(pgq: PgQueue) -> int:
    with pgq.begin() as connection:
        return pgq.tasks["note"].enqueue(connection).id
