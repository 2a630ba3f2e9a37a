"""What `using(…)` changes: when a job is due, its order and queue, how often it is tried, and that it is unique."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import (
    add,
    add_one,
    claim,
    claim_one,
    completed,
    died,
    events,
    everything,
    external,
    finish,
    is_postgresql,
    row,
    seconds_until_due,
    statuses,
)
from sqlalchemy.orm import Session
from support import execute, wait_for

from pgqueue import DuplicateJob, OnConflict, PgQueue, Retry, Task
from pgqueue.job import NewJob

# Time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [90, 90.0, timedelta(minutes=1.5)])
def test_a_delay_is_counted_from_the_databases_now(pgq: PgQueue, delay: Any) -> None:
    job_id = add_one(pgq, delay=delay)

    assert 80 < seconds_until_due(pgq, job_id) <= 90
    assert claim(pgq) == []


def test_a_delay_of_zero_is_due_at_once(pgq: PgQueue) -> None:
    job_id = add_one(pgq, delay=0)

    assert claim_one(pgq).id == job_id


def test_a_moment_is_kept_in_any_time_zone(pgq: PgQueue) -> None:
    at = datetime(2040, 5, 6, 7, 8, 9, 123_000, tzinfo=timezone(timedelta(hours=-7)))

    job_id = add_one(pgq, at=at)

    assert pgq.get_job(job_id).run_at == at


def test_a_moment_in_the_past_is_due_at_once_and_before_what_was_enqueued_since(pgq: PgQueue) -> None:
    add(pgq, 2)
    job_id = add_one(pgq, at=datetime(2001, 1, 1, tzinfo=UTC))

    assert claim_one(pgq).id == job_id


def test_the_same_options_hold_for_a_job_added_to_a_session(pgq: PgQueue) -> None:
    at = datetime(2040, 1, 1, tzinfo=UTC)
    with Session(pgq.engine) as session, session.begin():
        later = external(pgq).using(delay=90).new(n=1)
        dated = external(pgq).using(at=at).new(n=2)
        session.add_all([later, dated])
        session.flush()
        later_id, dated_id = later.id, dated.id

    assert 80 < seconds_until_due(pgq, later_id) <= 90
    assert pgq.get_job(dated_id).run_at == at


def test_the_same_options_hold_for_a_bulk_enqueue(pgq: PgQueue) -> None:
    at = datetime(2040, 1, 1, tzinfo=UTC)

    (first, _), dated = add(pgq, 2, delay=90), add(pgq, 2, at=at)

    assert 80 < seconds_until_due(pgq, first) <= 90
    assert {pgq.get_job(job_id).run_at for job_id in dated} == {at}


# Order and queue -------------------------------------------------------------------------------------------


def test_a_higher_priority_is_claimed_first(pgq: PgQueue) -> None:
    low, high, middle = (add_one(pgq, priority=priority) for priority in (-32768, 32767, 0))

    assert [job.id for job in claim(pgq, limit=3)] == [high, middle, low]


def test_a_priority_of_zero_overrules_the_tasks_own(pgq: PgQueue) -> None:
    @pgq.task(priority=5)
    def work() -> None: ...

    with pgq.begin() as connection:
        job_id = work.using(priority=0).enqueue(connection).id

    assert pgq.get_job(job_id).priority == 0


def test_a_job_goes_to_the_queue_that_is_named(pgq: PgQueue) -> None:
    job_id = add_one(pgq, queue="mail")

    assert claim(pgq) == []
    assert claim_one(pgq, queue="mail").id == job_id


def test_a_tasks_own_settings_hold_unless_others_are_named(pgq: PgQueue) -> None:
    @pgq.task(queue="images", priority=5, retry=Retry(max_retries=8))
    def resize() -> None: ...

    with pgq.begin() as connection:
        own = resize.enqueue(connection).id
        other = resize.using(queue="slow", priority=-1, max_retries=0).enqueue(connection).id

    assert settings_of(pgq, own) == ("images", 5, 8)
    assert settings_of(pgq, other) == ("slow", -1, 0)


def settings_of(pgq: PgQueue, job_id: int) -> tuple[str, int, int]:
    job = pgq.get_job(job_id)
    return job.queue, job.priority, job.max_retries


def test_options_add_up_and_leave_the_task_they_came_from_alone(pgq: PgQueue) -> None:
    task = external(pgq)

    urgent = task.using(priority=9)
    urgent_mail = urgent.using(queue="mail")

    assert (urgent_mail.options.priority, urgent_mail.options.queue) == (9, "mail")
    assert (urgent.options.queue, task.options.priority) == (None, None)


def test_metadata_is_stored_beside_the_payload(pgq: PgQueue) -> None:
    job_id = add_one(pgq, metadata={"trace": "abc"})

    assert pgq.get_job(job_id).metadata == {"trace": "abc"}


# A unique key: skip ----------------------------------------------------------------------------------------


def test_a_second_job_with_the_same_unique_key_is_not_inserted(pgq: PgQueue) -> None:
    first = add_one(pgq, unique_key="a")

    with pgq.begin() as connection:
        second = external(pgq).using(unique_key="a").enqueue(connection, n=2)

    assert (second.id, second.inserted) == (first, False)
    assert pgq.get_job(first).payload == {"n": 0}
    assert len(statuses(pgq)) == 1


def test_a_running_job_still_has_its_unique_key(pgq: PgQueue) -> None:
    first = add_one(pgq, unique_key="a")
    claim_one(pgq)

    assert add_one(pgq, unique_key="a") == first


def end_by_completing(pgq: PgQueue, job_id: int) -> None:
    finish(pgq, completed(claim_one(pgq)))


def end_by_dying(pgq: PgQueue, job_id: int) -> None:
    finish(pgq, died(claim_one(pgq)))


def end_by_cancelling(pgq: PgQueue, job_id: int) -> None:
    pgq.cancel(job_id)


@pytest.mark.parametrize("end", [end_by_completing, end_by_dying, end_by_cancelling])
def test_a_final_job_gives_its_unique_key_free(pgq: PgQueue, end: Callable[[PgQueue, int], None]) -> None:
    first = add_one(pgq, unique_key="a")
    end(pgq, first)

    second = add_one(pgq, unique_key="a")

    assert second != first
    assert statuses(pgq)[second] == "pending"


def test_unique_keys_of_different_tasks_and_jobs_without_one_do_not_meet(pgq: PgQueue) -> None:
    ids = [
        add_one(pgq, unique_key="a"),
        add_one(pgq, task="other", unique_key="a"),
        add_one(pgq, unique_key="b"),
        add_one(pgq),
        add_one(pgq),
    ]

    assert len(set(ids)) == 5


def test_a_unique_key_may_hold_any_character(pgq: PgQueue) -> None:
    key = "ключ 'quoted' \"too\"; -- %s :x {} \n" + "é" * 400

    first, second = add_one(pgq, unique_key=key), add_one(pgq, unique_key=key)

    assert first == second
    assert pgq.get_job(first).unique_key == key


def test_a_unique_key_taken_inside_the_same_transaction_counts(pgq: PgQueue) -> None:
    task = external(pgq).using(unique_key="a")

    with pgq.begin() as connection:
        first, second = task.enqueue(connection, n=1), task.enqueue(connection, n=2)

    assert (second.id, second.inserted) == (first.id, False)


def test_a_key_taken_in_a_savepoint_that_was_rolled_back_is_free(pgq: PgQueue) -> None:
    task = external(pgq).using(unique_key="a")

    with pgq.begin() as connection:
        savepoint = connection.begin_nested()
        task.enqueue(connection, n=1)
        savepoint.rollback()
        again = task.enqueue(connection, n=2)

    assert again.inserted
    assert pgq.get_job(again.id).payload == {"n": 2}


def test_an_added_job_with_a_taken_unique_key_fails_the_flush(pgq: PgQueue) -> None:
    add(pgq, unique_key="a")

    with Session(pgq.engine) as session:
        session.add(external(pgq).using(unique_key="a").new(n=2))
        with pytest.raises(sa.exc.IntegrityError):
            session.flush()

    assert len(statuses(pgq)) == 1


# A unique key: raise ---------------------------------------------------------------------------------------


def test_raise_names_the_job_and_leaves_the_transaction_usable(pgq: PgQueue) -> None:
    first = add_one(pgq, unique_key="a")
    task = external(pgq)

    with pgq.begin() as connection:
        with pytest.raises(
            DuplicateJob, match=f"task 'work' already has the pending job {first} with the unique key 'a'"
        ):
            task.using(unique_key="a", on_conflict="raise").enqueue(connection, n=2)
        other = task.enqueue(connection, n=3).id

    assert sorted(statuses(pgq)) == [first, other]


# A unique key: replace -------------------------------------------------------------------------------------


def replacing(pgq: PgQueue, **options: Any) -> Task[..., Any]:
    return external(pgq).using(unique_key="a", on_conflict=OnConflict.REPLACE, **options)


def test_replace_inserts_when_the_key_is_free(pgq: PgQueue) -> None:
    with pgq.begin() as connection:
        enqueued = replacing(pgq).enqueue(connection, n=1)

    assert enqueued.inserted
    assert events(pgq, enqueued.id) == []


def test_replace_gives_a_pending_job_the_new_payload_and_options(pgq: PgQueue) -> None:
    first = add_one(pgq, unique_key="a", delay=500, priority=1, metadata={"v": 1})

    with pgq.begin() as connection:
        enqueued = replacing(pgq, queue="mail", priority=7, max_retries=9, metadata={"v": 2}).enqueue(connection, n=2)

    job = pgq.get_job(first)
    assert (enqueued.id, enqueued.inserted) == (first, False)
    assert (job.payload, job.queue, job.priority, job.max_retries, job.metadata) == ({"n": 2}, "mail", 7, 9, {"v": 2})
    assert seconds_until_due(pgq, first) <= 0
    assert (job.status, job.unique_key, job.attempt) == ("pending", "a", 0)
    assert events(pgq, first) == ["replace"]


def test_replace_debounces_with_a_new_delay(pgq: PgQueue) -> None:
    first = add_one(pgq, unique_key="a", delay=5)

    with pgq.begin() as connection:
        replacing(pgq, delay=500).enqueue(connection, n=2)

    assert 490 < seconds_until_due(pgq, first) <= 500


def test_replace_moves_to_a_new_moment(pgq: PgQueue) -> None:
    at = datetime(2040, 1, 1, tzinfo=UTC)
    first = add_one(pgq, unique_key="a")

    with pgq.begin() as connection:
        replacing(pgq, at=at).enqueue(connection, n=2)

    assert pgq.get_job(first).run_at == at


def test_replace_leaves_a_running_job_alone_and_says_so(pgq: PgQueue) -> None:
    first = add_one(pgq, unique_key="a")
    claim_one(pgq)
    before = everything(pgq)

    with (
        pgq.begin() as connection,
        pytest.raises(
            DuplicateJob,
            match=f"already has the running job {first} .*: it is running, so its payload can no longer be replaced",
        ),
    ):
        replacing(pgq).enqueue(connection, n=2)

    assert everything(pgq) == before


def test_replace_touches_no_other_key_or_task(pgq: PgQueue) -> None:
    first = add_one(pgq, unique_key="a")
    others = [add_one(pgq, unique_key="b"), add_one(pgq, task="other", unique_key="a")]
    before = [row(pgq, job_id) for job_id in others]

    with pgq.begin() as connection:
        assert replacing(pgq).enqueue(connection, n=2).id == first

    assert [row(pgq, job_id) for job_id in others] == before


def test_a_replaced_job_is_rolled_back_with_its_transaction(pgq: PgQueue) -> None:
    add(pgq, unique_key="a")
    before = everything(pgq)

    with Session(pgq.engine) as session:
        replacing(pgq).enqueue(session, n=2)
        session.rollback()

    assert everything(pgq) == before


# A unique key: several at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("on_conflict", list(OnConflict))
def test_of_many_concurrent_inserters_with_rollbacks_one_job_remains(pgq: PgQueue, on_conflict: OnConflict) -> None:
    """Every third transaction is rolled back; the key must then go to one that waited for it."""
    inserters = 12 if is_postgresql(pgq) else 6
    rounds = 8
    all_ready = threading.Barrier(inserters)
    task = external(pgq)

    def insert(number: int) -> list[tuple[int, bool]]:
        committed = []
        for round_ in range(rounds):
            all_ready.wait()
            with Session(pgq.engine) as session:
                chosen = task.using(unique_key=f"round {round_}", on_conflict=on_conflict)
                try:
                    enqueued = chosen.enqueue(session, inserter=number)
                except DuplicateJob:
                    assert on_conflict is OnConflict.RAISE
                    continue
                if (number + round_) % 3 == 0:
                    session.rollback()
                else:
                    session.commit()
                    committed.append((enqueued.id, enqueued.inserted))
        return committed

    with ThreadPoolExecutor(inserters) as threads:
        committed = [each for result in threads.map(insert, range(inserters)) for each in result]

    inserted = [job_id for job_id, was_inserted in committed if was_inserted]
    jobs = {job.unique_key: job.id for job in pgq.list_jobs(limit=1_000)}
    assert len(statuses(pgq)) == len(jobs)
    assert sorted(inserted) == sorted(jobs.values())
    assert len(jobs) == rounds or on_conflict is OnConflict.RAISE
    assert {job_id for job_id, _ in committed} == set(jobs.values())


def test_an_inserter_waits_for_a_rival_and_inserts_when_that_rolls_back(pg: PgQueue) -> None:
    task = external(pg).using(unique_key="a")
    results = []

    def second() -> None:
        with Session(pg.engine) as session, session.begin():
            results.append(task.enqueue(session, n=2))

    with Session(pg.engine) as first:
        task.enqueue(first, n=1)
        rival = threading.Thread(target=second)
        rival.start()
        wait_until_blocked(pg)
        first.rollback()
    rival.join()

    assert results[0].inserted
    assert pg.get_job(results[0].id).payload == {"n": 2}


def test_an_inserter_waits_for_a_rival_and_takes_its_job_when_that_commits(pg: PgQueue) -> None:
    task = external(pg).using(unique_key="a")
    results = []

    def second() -> None:
        with Session(pg.engine) as session, session.begin():
            results.append(task.enqueue(session, n=2))

    with Session(pg.engine) as first:
        winner = task.enqueue(first, n=1)
        rival = threading.Thread(target=second)
        rival.start()
        wait_until_blocked(pg)
        first.commit()
    rival.join()

    assert [(result.id, result.inserted) for result in results] == [(winner.id, False)]


def wait_until_blocked(pg: PgQueue) -> None:
    """Until a connection of this database waits for a lock."""
    engine = sa.create_engine(pg.url)

    def blocked() -> bool:
        with engine.connect() as connection:
            return bool(
                connection.scalar(
                    sa.text(
                        "SELECT count(*) FROM pg_stat_activity"
                        " WHERE wait_event_type = 'Lock' AND datname = current_database()"
                    )
                )
            )

    try:
        wait_for(blocked, "a connection that waits for a lock")
    finally:
        engine.dispose()


def test_an_enqueue_beside_the_completion_of_the_keys_holder_gets_a_job_of_its_own(pg: PgQueue) -> None:
    """The holder is completed, uncommitted, when the inserter looks: it must not be taken for an open job."""
    holder = add_one(pg, unique_key="a")
    job = claim_one(pg)
    results = []

    def insert() -> None:
        with Session(pg.engine) as session, session.begin():
            results.append(external(pg).using(unique_key="a").enqueue(session, n=2))

    with Session(pg.engine) as session:
        pg.ack(job, session=session)
        rival = threading.Thread(target=insert)
        rival.start()
        wait_until_blocked(pg)
        session.commit()
    rival.join()

    assert results[0].inserted
    assert statuses(pg) == {holder: "completed", results[0].id: "pending"}


def test_a_task_registered_by_a_plain_call_has_the_options_it_was_given(pgq: PgQueue) -> None:
    task = pgq.task(print_nothing, name="quiet", queue="images", priority=3)

    assert (task.name, task.definition.queue, task.definition.priority) == ("quiet", "images", 3)


def print_nothing() -> None: ...


def test_a_new_job_has_the_defaults_of_the_columns(pgq: PgQueue) -> None:
    """An INSERT leaves out what is as the columns have it."""
    by_python = NewJob("work", "{}")
    named = "pgqueue.jobs" if pgq.engine.dialect.name == "postgresql" else "pgqueue_jobs"

    execute(pgq.engine, f"INSERT INTO {named} (task) VALUES ('work')")

    (job,) = pgq.list_jobs()
    assert (job.queue, job.priority, job.max_retries) == (by_python.queue, by_python.priority, by_python.max_retries)
    assert (job.payload, job.metadata) == (json.loads(by_python.payload_json), json.loads(by_python.metadata_json))
    assert job.run_at == job.created_at
