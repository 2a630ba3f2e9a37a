"""Dead jobs: replayed one by one, by ids and by filter; edited; purged; looked at through a view."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import (
    add,
    add_one,
    age,
    claim_one,
    died,
    events,
    everything,
    expire,
    finish,
    retried,
    row,
    statuses,
    sweep,
)
from sqlalchemy.orm import Session
from support import execute, rows, scalar

from pgqueue import (
    ConfigurationError,
    DuplicateJob,
    IllegalTransition,
    InvalidPayload,
    JobNotFound,
    PgQueue,
    WrongSession,
    dead_letter,
)

HOUR, DAY = 3600.0, 86_400.0


def kill(pgq: PgQueue, *ids: int, error: str = "ValueError") -> None:
    """Let these jobs be dead, as if their last attempt had failed so."""
    document = f'{{"type": "{error}", "message": "no", "traceback": ""}}'
    jobs = pgq.tables.jobs.fullname
    for job_id in ids:
        execute(
            pgq.engine,
            f"UPDATE {jobs} SET status = 'dead', retries = 3, attempt = 4, finished_at = created_at, error = :e,"
            " claimed_by = 'w', claimed_at = created_at WHERE id = :id",
            e=document,
            id=job_id,
        )


def add_dead(pgq: PgQueue, count: int = 1, *, error: str = "ValueError", **options: Any) -> list[int]:
    ids = add(pgq, count, **options)
    kill(pgq, *ids, error=error)
    return ids


# Replay of one -----------------------------------------------------------------------------------------------


def test_a_replay_gives_all_retries_back_and_keeps_what_happened(pgq: PgQueue) -> None:
    job_id = add_one(pgq, max_retries=1)
    finish(pgq, retried(claim_one(pgq)))
    finish(pgq, died(claim_one(pgq)))

    pgq.replay(job_id, reason="fixed", actor="ann")

    job = pgq.get_job(job_id)
    assert (job.status, job.retries, job.attempt, job.finished_at) == ("pending", 0, 2, None)
    assert job.error is not None, "it stays until an attempt ends otherwise"
    assert events(pgq, job_id) == ["retry", "dead", "replay"]
    told = pgq.job_events(job_id)[-1]
    assert (told["actor"], told["reason"], told["from_status"], told["to_status"]) == (
        "ann",
        "fixed",
        "dead",
        "pending",
    )


def test_a_replay_with_a_payload_is_one_change(pgq: PgQueue) -> None:
    (job_id,) = add_dead(pgq)

    pgq.replay(job_id, payload={"n": 7})

    assert (row(pgq, job_id).status, row(pgq, job_id).payload) == ("pending", {"n": 7})
    assert events(pgq, job_id) == ["edit", "replay"]


def test_a_replay_with_a_payload_that_fails_changes_nothing_in_the_callers_transaction_either(pgq: PgQueue) -> None:
    (job_id,) = add_dead(pgq, unique_key="k")
    add_one(pgq, unique_key="k")
    before = everything(pgq)

    with pgq.begin() as connection, pytest.raises(DuplicateJob, match=f"job {job_id} cannot be replayed"):
        pgq.replay(job_id, payload={"n": 7}, session=connection)

    assert everything(pgq) == before


def test_a_replay_forgets_what_belonged_to_the_end(pgq: PgQueue) -> None:
    (job_id,) = add_dead(pgq)
    past = "created_at" if pgq.tables.dialect_name == "postgresql" else "'2020-01-01 00:00:00.000'"
    execute(pgq.engine, f"UPDATE {pgq.tables.jobs.fullname} SET prune_at = created_at, expires_at = {past}")

    pgq.replay(job_id)

    found = row(pgq, job_id)
    assert (found.prune_at, found.expires_at, found.cancel_requested_at) == (None, None, None)


# Replay of many ----------------------------------------------------------------------------------------------


def test_several_ids_are_replayed_as_far_as_they_can_be(pgq: PgQueue) -> None:
    dead, twin, taken = add_dead(pgq, 3)
    pending = add_one(pgq)
    execute(pgq.engine, f"UPDATE {pgq.tables.jobs.fullname} SET unique_key = 'k' WHERE id IN ({dead}, {twin})")
    execute(pgq.engine, f"UPDATE {pgq.tables.jobs.fullname} SET unique_key = 'l' WHERE id = {taken}")
    holder = add_one(pgq, unique_key="l")

    result = pgq.replay([pending, 999, taken, twin, dead, dead])

    assert result.replayed == [dead]
    assert result.skipped == {
        pending: "it is pending; only a dead or cancelled job can be replayed",
        999: "there is no such job; it may have been deleted or pruned",
        taken: f"job {holder} of its task has the same unique key",
        twin: f"job {dead} of its task has the same unique key",
    }
    assert statuses(pgq) == {dead: "pending", twin: "dead", taken: "dead", pending: "pending", holder: "pending"}


def test_no_ids_are_no_work(pgq: PgQueue) -> None:
    result = pgq.replay([])

    assert (result.replayed, result.skipped) == ([], {})


def test_all_that_fit_a_filter_are_replayed_in_batches_of_their_own(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgqueue.repairing.BATCH_JOBS", 2)
    ours = add_dead(pgq, 5, task="mail", error="Timeout")
    others = [*add_dead(pgq, 2, task="mail"), *add_dead(pgq, 2, task="work", error="Timeout"), *add(pgq, 1)]
    told: list[int] = []

    result = pgq.replay_where(task="mail", error_type="Timeout", replayed=told.append, reason="back", actor="ann")

    assert (result.replayed, result.skipped, told) == (ours, {}, [2, 2, 1])
    assert {job_id for job_id, status in statuses(pgq).items() if status == "pending"} == {*ours, others[-1]}
    assert [(told["actor"], told["reason"]) for told in pgq.job_events(ours[-1])] == [("ann", "back")]


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(pgq: PgQueue) -> None:
    free, *_ = add_dead(pgq, 3)
    (taken,) = add_dead(pgq, unique_key="k")
    holder = add_one(pgq, unique_key="k")
    before = everything(pgq)

    some, all_of_them = pgq.replay_where(limit=1, dry_run=True), pgq.replay_where(dry_run=True)

    assert everything(pgq) == before
    assert some.replayed == [free]
    assert len(all_of_them.replayed) == 3
    assert all_of_them.skipped == {taken: f"job {holder} of its task has the same unique key"}


def test_an_interrupted_replay_goes_on_where_it_stopped(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgqueue.repairing.BATCH_JOBS", 2)
    ids = add_dead(pgq, 5)

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pgq.replay_where(replayed=interrupt)
    rest = pgq.replay_where()

    assert rest.replayed == ids[2:]
    assert set(statuses(pgq).values()) == {"pending"}


def test_filters_tell_jobs_apart(pgq: PgQueue) -> None:
    tagged = add_dead(pgq, metadata={"tenant": "a", "n": 1})
    old = add_dead(pgq, queue="slow")
    age(pgq, old, seconds_ago=2 * DAY)
    age(pgq, tagged, seconds_ago=HOUR)
    yesterday = datetime.now(UTC) - timedelta(days=1)

    def found(**filters: Any) -> list[int]:
        result = pgq.replay_where(dry_run=True, **filters)
        listed = [job.id for job in pgq.list_jobs(status="dead", **filters)]
        assert result.replayed == sorted(listed) == [job.id for job in pgq.iter_jobs(status="dead", **filters)]
        return list(result.replayed)

    assert found() == tagged + old
    assert found(queue="slow") == old
    assert found(error_type="ValueError") == tagged + old
    assert found(error_type="KeyError") == []
    assert found(since=yesterday) == found(since=DAY) == found(since=timedelta(days=1)) == tagged
    assert found(until=yesterday) == found(until=DAY) == old
    assert found(since=3 * DAY, until=DAY) == old
    assert found(tags={"tenant": "a"}) == found(tags={"tenant": "a", "n": "1"}) == tagged
    assert found(tags={"tenant": "b"}) == found(tags={"no": "a"}) == []


def test_a_key_that_is_enqueued_at_the_very_moment_costs_one_job_not_the_batch(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the other transaction had committed between the look at the keys and the write."""
    ids = [add_dead(pgq, unique_key=key)[0] for key in ("k", "l", "m")]
    holder = add_one(pgq, unique_key="l")
    monkeypatch.setattr(dead_letter, "_without_taken", lambda connection, tables, found: (list(found), {}))

    result = pgq.replay_where()

    assert result.replayed == [ids[0], ids[2]]
    assert result.skipped == {ids[1]: dead_letter.KEY_IS_TAKEN}
    assert statuses(pgq) == {ids[0]: "pending", ids[1]: "dead", ids[2]: "pending", holder: "pending"}
    assert events(pgq, ids[1]) == []


def test_what_another_transaction_changes_is_left_alone_and_holds_nobody_up(pg: PgQueue) -> None:
    ids = add_dead(pg, 3)

    with pg.engine.begin() as operator:
        dead_letter.replay_job(operator, pg.tables, ids[1], actor="ann", reason=None)
        by_filter = pg.replay_where(limit=1)
        by_id = pg.replay(ids[1:])

    assert by_filter.replayed == ids[:1]
    assert by_id.replayed == ids[2:]
    assert by_id.skipped == {ids[1]: "another transaction is changing it at this moment"}


@pytest.mark.parametrize("call", ["replay", "replay_where", "purge", "edit"])
def test_it_happens_in_the_applications_transaction(pgq: PgQueue, call: str) -> None:
    ids = add_dead(pgq, 3)
    before = everything(pgq)

    def do(session: Session) -> None:
        calls = {
            "replay": lambda: pgq.replay(ids, session=session),
            "replay_where": lambda: pgq.replay_where(session=session),
            "purge": lambda: pgq.purge(session=session),
            "edit": lambda: pgq.edit(ids[0], priority=3, session=session),
        }
        calls[call]()

    with Session(pgq.engine) as session:
        do(session)
        session.rollback()
    assert everything(pgq) == before
    with Session(pgq.engine) as session:
        do(session)
        session.commit()
    assert everything(pgq) != before


def test_another_kind_of_session_is_refused_with_the_way_to_do_it(pgq: PgQueue) -> None:
    from sqlalchemy.ext.asyncio import AsyncSession

    with pytest.raises(WrongSession, match=r"use: await ….replay_where_async\("):
        pgq.replay_where(session=AsyncSession())  # type: ignore[arg-type]
    with pytest.raises(WrongSession, match="got str"):
        pgq.purge(session="session")  # type: ignore[arg-type]


def test_an_error_is_named_with_its_module_or_without(pgq: PgQueue) -> None:
    named = {
        name: add_dead(pgq, error=name)[0] for name in ("shop.errors.Timeout", "Timeout", "shop.errors.NotTimeout")
    }

    def found(name: str) -> set[str]:
        ids = pgq.replay_where(error_type=name, dry_run=True).replayed
        return {error for error, job_id in named.items() if job_id in ids}

    assert found("Timeout") == {"shop.errors.Timeout", "Timeout"}
    assert found("shop.errors.Timeout") == found("errors.Timeout") == {"shop.errors.Timeout"}
    assert found("_imeout") == found("shop") == found("a" * 500) == set()


# Edit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["pending", "dead", "cancelled"])
def test_an_edit_changes_the_job_and_records_names_without_values(pgq: PgQueue, state: str) -> None:
    job_id = add_one(pgq)
    if state == "dead":
        kill(pgq, job_id)
    if state == "cancelled":
        pgq.cancel(job_id)

    pgq.edit(job_id, payload={"n": 0, "token": "hunter2"}, priority=5, max_retries=9, reason="fix", actor="ann")

    found = row(pgq, job_id)
    assert (found.status, found.payload, found.priority, found.max_retries) == (
        state,
        {"n": 0, "token": "hunter2"},
        5,
        9,
    )
    told = pgq.job_events(job_id)[-1]
    assert (told["event"], told["actor"]) == ("edit", "ann")
    assert told["reason"] == "fix (changed max_retries, priority, payload.token)"


def test_an_edit_that_changes_nothing_says_so(pgq: PgQueue) -> None:
    job_id = add_one(pgq)

    pgq.edit(job_id, payload={"n": 0})

    assert pgq.job_events(job_id)[-1]["reason"] == "changed nothing"


def test_an_edited_payload_must_fit_the_task_where_it_is_known(pgq: PgQueue) -> None:
    @pgq.task
    def resize(file: str) -> None: ...

    with pgq.begin() as connection:
        job_id = resize.enqueue(connection, file="a").id

    with pytest.raises(InvalidPayload, match="payload of task 'resize' does not fit: size"):
        pgq.edit(job_id, payload={"file": "a", "size": 1})
    pgq.edit(job_id, payload={"file": "b"})
    elsewhere = PgQueue(pgq.engine)
    elsewhere.edit(job_id, payload={"anything": [1]})

    assert row(pgq, job_id).payload == {"anything": [1]}


def test_an_edited_payload_brings_its_limit_keys_along_and_the_next_in_the_old_order_goes_on(pgq: PgQueue) -> None:
    @pgq.task(ordered_by="file")
    def convert(file: str) -> None: ...

    with pgq.begin() as connection:
        first = convert.enqueue(connection, file="a").id
        second = convert.enqueue(connection, file="a").id
        by_hand = convert.using(ordering_key="mine").enqueue(connection, file="a").id

    for job_id in (first, by_hand):
        pgq.edit(job_id, payload={"file": "b"})

    assert [row(pgq, job_id).ordering_key for job_id in (first, second, by_hand)] == ["b", "a", "mine"]
    assert {job.id for job in pgq.claim("worker", limit=10)} == {first, second, by_hand}


def test_a_running_or_completed_job_cannot_be_edited(pgq: PgQueue) -> None:
    running = add_one(pgq)
    claimed = claim_one(pgq)
    before = everything(pgq)

    with pytest.raises(IllegalTransition, match=f"job {running} is running; only a pending, dead or cancelled job"):
        pgq.edit(running, priority=3)

    assert everything(pgq) == before
    pgq.ack(claimed)
    with pytest.raises(IllegalTransition, match="is completed"):
        pgq.edit(running, priority=3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, ConfigurationError, "something to change"),
        ({"payload": [1]}, InvalidPayload, "must be a mapping"),
        ({"payload": {"n": float("nan")}}, InvalidPayload, "NaN"),
        ({"priority": 1 << 20}, ConfigurationError, "priority must be"),
        ({"max_retries": -1}, ConfigurationError, "max_retries must be"),
        ({"session": "x", "priority": 1}, WrongSession, "got str"),
    ],
)
def test_an_edit_of_nonsense_is_refused(
    pgq: PgQueue, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    job_id = add_one(pgq)
    before = everything(pgq)

    with pytest.raises(error, match=message):
        pgq.edit(job_id, **changes)

    assert everything(pgq) == before


def test_a_job_that_is_not_there_is_said_to_be_gone(pgq: PgQueue) -> None:
    for call in (lambda: pgq.edit(999, priority=1), lambda: pgq.replay(999), lambda: pgq.replay(2**80)):
        with pytest.raises(JobNotFound, match="there is no job"):
            call()


# Purge -------------------------------------------------------------------------------------------------------


def test_a_purge_deletes_dead_jobs_and_leaves_who_did_it(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgqueue.repairing.BATCH_JOBS", 2)
    job_id = add_one(pgq, max_retries=0)
    finish(pgq, died(claim_one(pgq)))
    more = add_dead(pgq, 4)
    kept = add_dead(pgq, 1, task="other") + add(pgq, 1)
    told: list[int] = []

    planned = pgq.purge(task="work", dry_run=True)
    count = pgq.purge(task="work", purged=told.append, reason="obsolete", actor="ann")

    assert (planned, count, told) == (5, 5, [2, 2, 1])
    assert sorted(statuses(pgq)) == kept
    (event,) = pgq.job_events(job_id)
    assert (event["event"], event["actor"], event["reason"], event["error"]) == ("delete", "ann", "obsolete", None)
    assert events(pgq, more[0]) == ["delete"]


def test_a_purge_stops_at_its_limit(pgq: PgQueue) -> None:
    ids = add_dead(pgq, 4)

    assert pgq.purge(limit=3, dry_run=True) == 3
    assert pgq.purge(limit=3) == 3

    assert list(statuses(pgq)) == ids[3:]


@pytest.mark.parametrize("call", ["replay_where", "purge", "list_jobs"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be at least 1"),
        ({"limit": True}, "limit must be at least 1"),
        ({"since": datetime(2030, 1, 1)}, "since must say its time zone"),  # noqa: DTZ001
        ({"until": "1h"}, "until must be an aware datetime, or how long ago"),
        ({"since": -1}, "since must be between 0 and"),
        ({"since": float("nan")}, "since must be between 0 and"),
        ({"until": datetime(9999, 1, 1, tzinfo=UTC)}, "until must lie between the years 1970 and 9000"),
        ({"queue": 3}, "queue must be a string, got int"),
        ({"task": "a\0"}, "task must not contain NUL"),
        ({"error_type": b"E"}, "error_type must be a string, got bytes"),
        ({"tags": ["a"]}, "tags must be a mapping"),
        ({"tags": {"a": 1}}, "the tag 'a' must be a string, got int"),
        ({"since": 60, "until": 3600}, "since must be earlier than until, or no job fits"),
        (
            {"since": datetime(2030, 1, 2, tzinfo=UTC), "until": datetime(2030, 1, 1, tzinfo=UTC)},
            "since must be earlier than until",
        ),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(
    pgq: PgQueue, call: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        getattr(pgq, call)(**options)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ("12", {}, "an id or several, got str"),
        ("x", {"payload": {}}, "give replay\\(\\) one id"),
        (1.5, {}, "a whole number, got float"),
        ([True], {}, "a whole number, got bool"),
        ([1, 2], {"payload": {}}, "a payload belongs to one job"),
    ],
)
def test_ids_that_are_none_are_refused(pgq: PgQueue, ids: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        pgq.replay(ids, **options)


@pytest.mark.parametrize("call", ["cancel", "delete", "edit", "replay", "get_job", "job_events"])
@pytest.mark.parametrize("job_id", [True, 1.5, "1", None])
def test_one_id_that_is_none_is_refused(pgq: PgQueue, call: str, job_id: Any) -> None:
    add_one(pgq)
    before = everything(pgq)

    with pytest.raises(ConfigurationError, match=r"id is a whole number|replay\(\) takes an id"):
        getattr(pgq, call)(job_id, **({"priority": 1} if call == "edit" else {}))

    assert everything(pgq) == before


@pytest.mark.parametrize("words", [{"reason": 5}, {"actor": b"ann"}])
def test_who_and_why_are_strings(pgq: PgQueue, words: dict[str, Any]) -> None:
    job_id = add_one(pgq)

    with pytest.raises(ConfigurationError, match=r"(reason|actor) must be a string, got (int|bytes)"):
        pgq.cancel(job_id, **words)

    assert statuses(pgq) == {job_id: "pending"}


# What is written down ----------------------------------------------------------------------------------------


def test_every_failed_attempt_is_recorded_with_error_worker_and_times(pgq: PgQueue) -> None:
    job_id = add_one(pgq, max_retries=2)
    first = claim_one(pgq, worker="one")
    begun = row(pgq, job_id).claimed_at
    finish(pgq, retried(first), actor="one")
    claim_one(pgq, worker="two")
    expire(pgq)
    sweep(pgq, actor="sweeper")
    finish(pgq, died(claim_one(pgq, worker="three")), actor="three")

    told = pgq.job_events(job_id)

    assert [(event["attempt"], event["worker"], event["error"]["type"]) for event in told] == [
        (1, "one", "ValueError"),
        (2, "two", "WorkerLost"),
        (3, "three", "ValueError"),
    ]
    assert told[0]["claimed_at"] == begun
    assert all(event["claimed_at"] <= event["at"] for event in told)
    assert told[0]["error"] == {"type": "ValueError", "message": "no", "traceback": "Traceback …"}


def test_the_view_shows_dead_jobs(pgq: PgQueue) -> None:
    job_id = add_one(pgq, max_retries=0, metadata={"tenant": "a"})
    finish(pgq, died(claim_one(pgq, worker="w")))
    add_one(pgq)
    view = f"{pgq.tables.jobs.fullname.removesuffix('jobs')}dead_jobs"

    (found,) = rows(
        pgq.engine,
        "SELECT id, queue, task, error_type, error_message, error_traceback, attempts, retries, max_retries, worker, "
        f"age_seconds FROM {view}",
    )

    assert tuple(found)[:10] == (job_id, "default", "work", "ValueError", "no", "Traceback …", 1, 0, 0, "w")
    assert -1 < found.age_seconds < 300
    assert scalar(pgq.engine, f"SELECT count(*) FROM {view} WHERE died_at >= created_at AND payload IS NOT NULL") == 1


def test_the_view_survives_an_error_that_is_no_json_object(pgq: PgQueue) -> None:
    (job_id,) = add_dead(pgq)
    strange = "'[1]'" if pgq.tables.dialect_name == "postgresql" else "'not json'"
    execute(pgq.engine, f"UPDATE {pgq.tables.jobs.fullname} SET error = {strange}")
    view = f"{pgq.tables.jobs.fullname.removesuffix('jobs')}dead_jobs"

    assert [tuple(found) for found in rows(pgq.engine, f"SELECT id, error_type FROM {view}")] == [(job_id, None)]
    assert pgq.replay_where(error_type="ValueError", dry_run=True).replayed == []


def test_all_jobs_are_read_page_by_page(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgqueue.inspecting.PAGE_JOBS", 2)
    ids = add(pgq, 5)

    reader: Iterator[Any] = pgq.iter_jobs()
    first = [job.id for job in itertools.islice(reader, 2)]
    pgq.delete(ids[2])
    rest = [job.id for job in reader]

    assert first + rest == [*ids[:2], *ids[3:]]


@pytest.mark.parametrize("call", ["edit", "replay", "replay_where"])
def test_a_rollback_takes_a_change_back_where_the_driver_begins_transactions_late(sqlite_url: str, call: str) -> None:
    engine = sa.create_engine(sqlite_url)
    pgq = PgQueue(engine)
    (job_id,) = add_dead(pgq, unique_key="a")

    with Session(engine) as session:
        if call == "edit":
            pgq.edit(job_id, payload={"n": 7}, session=session)
        elif call == "replay":
            pgq.replay(job_id, payload={"n": 7}, session=session)
        else:
            assert pgq.replay_where(session=session).replayed == [job_id]
        session.rollback()

    assert (row(pgq, job_id).status, row(pgq, job_id).payload) == ("dead", {"n": 0})
    engine.dispose()
    pgq.dispose()
