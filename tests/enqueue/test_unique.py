"""Jobs that count as the same: keys from the payload, periods, in bulk, at the same time."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import claim, claim_one, completed, died, everything, finish, is_postgresql, put, retried, row, statuses
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support import execute, scalar

from pgqueue import (
    ConfigurationError,
    DuplicateJob,
    InvalidPayload,
    PgQueue,
    Task,
    Unique,
    dialect,
    retention,
    store,
    uniqueness,
)

HOUR = 3600.0
FAR = datetime(2999, 1, 1, tzinfo=UTC)


def make(pgq: PgQueue, unique: Unique | None, **options: Any) -> Task[..., Any]:
    def resize(file: str, size: int = 1024, tags: set[str] | None = None) -> None: ...

    return pgq.task(unique=unique, **options)(resize)


def enqueue(task: Task[..., Any], **payload: Any) -> tuple[int, bool]:
    with task.pgq.begin() as connection:
        handle = task.enqueue(connection, **payload)
        return handle.id, handle.inserted


def periods(pgq: PgQueue) -> int:
    found: int = scalar(pgq.engine, f"SELECT count(*) FROM {pgq.tables.unique_periods.fullname}")
    return found


def let_periods_end(pgq: PgQueue) -> None:
    past = "now() - interval '1 s'" if is_postgresql(pgq) else "strftime('%Y-%m-%d %H:%M:%f', 'now', '-1 seconds')"
    execute(pgq.engine, f"UPDATE {pgq.tables.unique_periods.fullname} SET until = {past}")


# The key -----------------------------------------------------------------------------------------------------


def test_jobs_with_the_same_values_of_the_named_parameters_are_the_same(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",)))

    first, again, other = enqueue(resize, file="a"), enqueue(resize, file="a", size=1), enqueue(resize, file="b")

    assert first[1]
    assert again == (first[0], False)
    assert other[1]


def test_without_names_the_whole_payload_counts_and_a_default_is_as_good_as_its_value(pgq: PgQueue) -> None:
    resize = make(pgq, Unique())

    first = enqueue(resize, file="a")

    assert enqueue(resize, file="a", size=1024) == enqueue(resize, size="1024", file="a") == (first[0], False)
    assert enqueue(resize, file="a", size=1)[1]


def test_a_set_is_the_same_in_every_order(pgq: PgQueue) -> None:
    resize = make(pgq, Unique())
    stored = '{"file":"a","tags":["x","y","z"]}'

    keys = {
        resize.definition.unique_key({"file": "a", "tags": tags}, stored)
        for tags in (["x", "y", "z"], {"x", "y", "z"}, ["z", "y", "x"])
    }
    shuffled = resize.definition.unique_key({"file": "a", "tags": {"x", "y"}}, '{"file":"a","tags":["y","x"]}')

    assert len(keys) == 1
    assert shuffled == resize.definition.unique_key({"file": "a", "tags": {"x", "y"}}, '{"file":"a","tags":["x","y"]}')


def test_the_key_shows_nothing_of_the_payload_and_always_fits(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), on_conflict="raise"))
    job_id, _ = enqueue(resize, file="hunter2" * 1000)

    with pytest.raises(DuplicateJob) as caught:
        enqueue(resize, file="hunter2" * 1000)

    assert row(pgq, job_id).unique_key.startswith("sha256:")
    assert len(row(pgq, job_id).unique_key) == 71
    assert "hunter2" not in str(caught.value)


def test_once_a_job_has_ended_there_can_be_another(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=["file"]))
    enqueue(resize, file="a")
    finish(pgq, completed(claim_one(pgq)))

    assert enqueue(resize, file="a")[1]


def test_an_option_of_the_call_goes_before_the_rule_of_the_task(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), on_conflict="raise"))
    first, _ = enqueue(resize, file="a")

    by_hand = enqueue(resize.using(unique_key="mine"), file="a")
    skipped = enqueue(resize.using(on_conflict="skip"), file="a")

    assert by_hand[1]
    assert row(pgq, by_hand[0]).unique_key == "mine"
    assert skipped == (first, False)
    with pytest.raises(DuplicateJob):
        enqueue(resize, file="a")


def test_a_replaced_job_takes_the_new_payload(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), on_conflict="replace"))
    first, _ = enqueue(resize, file="a", size=1)

    assert enqueue(resize, file="a", size=2) == (first, False)
    assert row(pgq, first).payload == {"file": "a", "size": 2}


def test_a_replaced_job_starts_anew(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), on_conflict="replace"))
    job_id, _ = enqueue(resize, file="a")
    finish(pgq, retried(claim_one(pgq)))
    assert row(pgq, job_id).retries == 1

    assert enqueue(resize, file="a", size=5) == (job_id, False)

    replaced = row(pgq, job_id)
    assert (replaced.retries, replaced.error, replaced.attempt) == (0, None, 1)


def test_an_orm_object_has_the_key_too(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",)))
    first, _ = enqueue(resize, file="a")

    with Session(pgq.engine) as session:
        session.add(resize.new(file="a", size=3))
        with pytest.raises(sa.exc.IntegrityError):
            session.flush()

    assert list(statuses(pgq)) == [first]


@pytest.mark.parametrize("state", ["pending", "dead"])
def test_an_edited_payload_brings_its_key_along(pgq: PgQueue, state: str) -> None:
    resize = make(pgq, Unique(by=("file",)))
    (first, _), (second, _) = enqueue(resize, file="a"), enqueue(resize, file="b")
    if state == "dead":
        finish(pgq, died(claim_one(pgq)))
        pgq.edit(first, payload={"file": "b"})
        with pytest.raises(DuplicateJob):
            pgq.replay(first)
    else:
        before = everything(pgq)
        with pytest.raises(DuplicateJob, match=f"job {first} cannot be edited so"):
            pgq.edit(first, payload={"file": "b"})
        assert everything(pgq) == before

    pgq.edit(first, payload={"file": "c"})
    assert enqueue(resize, file="c")[1] is (state == "dead")
    assert enqueue(resize, file="b") == (second, False)


def test_a_key_that_was_given_by_hand_stays_through_an_edit(pgq: PgQueue) -> None:
    job_id, _ = enqueue(make(pgq, Unique(by=("file",))).using(unique_key="mine"), file="a")

    pgq.edit(job_id, payload={"file": "b"})

    assert row(pgq, job_id).unique_key == "mine"


# Periods -----------------------------------------------------------------------------------------------------


def test_within_the_period_there_is_no_second_job_even_if_the_first_completed(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), period=timedelta(hours=1)))
    first, _ = enqueue(resize, file="a")
    while_open = enqueue(resize, file="a")
    finish(pgq, completed(claim_one(pgq)))

    after_its_end = enqueue(resize, file="a")
    other = enqueue(resize, file="b")
    let_periods_end(pgq)
    later = enqueue(resize, file="a")

    assert while_open == after_its_end == (first, False)
    assert other[1]
    assert later[1]


def test_a_job_that_was_deleted_on_completion_still_counts(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), period=HOUR))
    first, _ = enqueue(resize, file="a")
    finish(pgq, completed(claim_one(pgq)))
    execute(pgq.engine, f"DELETE FROM {pgq.tables.jobs.fullname}")

    assert enqueue(resize, file="a") == (first, False)
    with pytest.raises(DuplicateJob, match="enqueued less than 3600 s ago: it is gone"):
        enqueue(resize.using(on_conflict="replace"), file="a")


def test_a_period_that_is_over_leaves_an_open_job_in_its_place(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), period=HOUR))
    first, _ = enqueue(resize, file="a")
    let_periods_end(pgq)

    assert enqueue(resize, file="a") == (first, False)


@pytest.mark.parametrize("end", ["dead", "cancelled", "deleted", "purged"])
def test_a_job_that_came_to_nothing_holds_nobody_up(pgq: PgQueue, end: str) -> None:
    resize = make(pgq, Unique(by=("file",), period=HOUR))
    first, _ = enqueue(resize, file="a")
    if end in ("dead", "purged"):
        finish(pgq, died(claim_one(pgq)))
    if end == "purged":
        assert pgq.purge() == 1
    if end == "cancelled":
        pgq.cancel(first)
    if end == "deleted":
        pgq.delete(first)

    second = enqueue(resize, file="a")

    assert second[1]
    assert enqueue(resize, file="a") == (second[0], False)


@pytest.mark.parametrize(
    ("on_conflict", "message"),
    [("raise", r"enqueued less than 3600 s ago$"), ("replace", "it is completed, so its payload can no longer be")],
)
def test_an_enqueue_within_the_period_of_a_completed_job_raises_if_it_must(
    pgq: PgQueue, on_conflict: str, message: str
) -> None:
    resize = make(pgq, Unique(by=("file",), period=HOUR, on_conflict=on_conflict))
    enqueue(resize, file="a")
    finish(pgq, completed(claim_one(pgq)))
    before = everything(pgq)

    with pytest.raises(DuplicateJob, match=message):
        enqueue(resize, file="a")

    assert everything(pgq) == before


@pytest.mark.parametrize("end", ["dead", "cancelled"])
def test_a_job_that_came_to_nothing_holds_nobody_up_once_it_was_pruned_either(pgq: PgQueue, end: str) -> None:
    resize = make(pgq, Unique(by=("file",), period=HOUR))
    for file in ("a", "b"):
        job_id, _ = enqueue(resize, file=file)
        if end == "dead":
            finish(pgq, died(claim_one(pgq)))
        else:
            pgq.cancel(job_id)
        if file == "a":
            pgq.prune(older_than=0, statuses=["dead", "cancelled"])
        else:
            put(pgq, [job_id], prune_at=sa.literal_column("'2020-01-01 00:00:00.000'"))
            with pgq.begin() as connection:
                retention.prune_due(connection, pgq.tables)
        assert statuses(pgq) == {}

        again, inserted = enqueue(resize, file=file)

        assert inserted
        pgq.delete(again)
    assert periods(pgq) == 0


def test_an_edit_takes_the_period_along_to_the_new_key(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), period=HOUR))
    job_id, _ = enqueue(resize, file="a")

    pgq.edit(job_id, payload={"file": "b"})

    assert enqueue(resize, file="a") != (job_id, False)
    finish(pgq, *map(completed, claim(pgq, limit=2)))
    assert enqueue(resize, file="b") == (job_id, False)
    pgq.delete(job_id)
    assert enqueue(resize, file="b")[1]


def test_an_edit_to_a_key_whose_period_another_job_began_leaves_it_to_that(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), period=HOUR))
    first, _ = enqueue(resize, file="b")
    finish(pgq, completed(claim_one(pgq)))
    job_id, _ = enqueue(resize, file="a")

    pgq.edit(job_id, payload={"file": "b"})
    pgq.cancel(job_id)

    assert enqueue(resize, file="b") == (first, False)
    assert enqueue(resize, file="a")[1]


def test_a_pending_job_is_replaced_within_its_period(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), period=HOUR, on_conflict="replace"))
    first, _ = enqueue(resize, file="a", size=1)

    assert enqueue(resize, file="a", size=2) == (first, False)
    assert row(pgq, first).payload["size"] == 2
    claim_one(pgq)
    with pytest.raises(DuplicateJob, match="it is running, so its payload can no longer be replaced"):
        enqueue(resize, file="a", size=3)


def test_a_rollback_takes_the_period_back(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), period=HOUR))
    with Session(pgq.engine) as session:
        resize.enqueue(session, file="a")
        session.rollback()

    assert periods(pgq) == 0
    assert enqueue(resize, file="a")[1]


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_period_that_another_enqueue_took_meanwhile_takes_the_new_job_back(
    pg: PgQueue, autocommit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the other had committed, and its job completed, just after the look at the periods."""
    resize = make(pg, Unique(by=("file",), period=HOUR))
    insert, calls = store.insert_keyed_jobs, []

    def insert_first(connection: sa.Connection, *arguments: Any) -> dict[str, int]:
        calls.append(1)
        inserted = insert(connection, *arguments)
        if len(calls) == 1:
            (key,) = inserted
            with pg.begin() as other:
                other.execute(
                    sa.insert(pg.tables.unique_periods).values(task="resize", unique_key=key, until=FAR, job_id=999)
                )
        return inserted

    monkeypatch.setattr(store, "insert_keyed_jobs", insert_first)

    engine = pg.engine.execution_options(isolation_level="AUTOCOMMIT") if autocommit else pg.engine
    with engine.connect() as connection:
        handle = resize.enqueue(connection, file="a")
        connection.commit()

    assert (handle.id, handle.inserted) == (999, False)
    assert statuses(pg) == {}


def test_periods_that_are_over_are_forgotten_in_batches(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), period=HOUR))
    for file in "abc":
        enqueue(resize, file=file)
    let_periods_end(pgq)
    enqueue(resize, file="d")

    with pgq.begin() as connection:
        counts = [uniqueness.forget_periods(connection, pgq.tables, limit=2) for _ in range(3)]

    assert counts == [2, 1, 0]
    assert periods(pgq) == 1


def test_an_orm_object_of_a_task_with_a_period_is_refused(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(period=HOUR))

    with pytest.raises(ConfigurationError, match=r"unique for a period.*use enqueue\(\)"):
        resize.new(file="a")


# In bulk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [None, HOUR])
def test_in_bulk_each_payload_gets_the_id_of_the_job_that_has_its_key(pgq: PgQueue, period: float | None) -> None:
    resize = make(pgq, Unique(by=("file",), period=period))
    held, _ = enqueue(resize, file="b")

    with pgq.begin() as connection:
        a, b, c, a_again = resize.enqueue_many(
            connection, [{"file": "a", "size": 1}, {"file": "b"}, {"file": "c"}, {"file": "a", "size": 2}]
        )

    assert (b, a_again) == (held, a)
    assert held < a < c
    assert row(pgq, a).payload == {"file": "a", "size": 1}
    assert list(statuses(pgq)) == [held, a, c]


def test_in_bulk_all_or_none_is_stored_when_one_must_raise(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), on_conflict="raise", period=HOUR))
    enqueue(resize, file="b")
    before = everything(pgq)

    with pgq.begin() as connection:
        with pytest.raises(DuplicateJob, match="already has the pending job 1"):
            resize.enqueue_many(connection, [{"file": "a"}, {"file": "b"}])
        with pytest.raises(DuplicateJob, match="the payloads 0 and 2, counted from 0, have the same unique key"):
            resize.enqueue_many(connection, [{"file": "x"}, {"file": "y"}, {"file": "x"}])

    assert everything(pgq) == before


def test_in_bulk_pending_jobs_take_the_last_payload(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), on_conflict="replace"))
    held, _ = enqueue(resize, file="b")

    with pgq.begin() as connection:
        ids = resize.enqueue_many(
            connection, [{"file": "b", "size": 1}, {"file": "c", "size": 1}, {"file": "c", "size": 2}]
        )

    assert ids[0] == held
    assert ids[1] == ids[2]
    assert row(pgq, held).payload["size"] == 1
    assert row(pgq, ids[1]).payload["size"] == 2


def test_bulk_is_cut_into_statements(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "INSERT_JOBS_MAX", 3)
    resize = make(pgq, Unique(by=("file",), period=HOUR))

    with pgq.begin() as connection:
        ids = resize.enqueue_many(connection, [{"file": str(n % 7)} for n in range(10)])
        none = resize.enqueue_many(connection, [])

    assert ids[7:] == ids[:3]
    assert sorted(ids[:7]) == sorted(set(ids))
    assert none == []


@pytest.mark.parametrize("period", [None, HOUR])
@pytest.mark.parametrize("options", [{"expires_in": 60, "delay": 5}, {"expires_at": FAR}])
def test_what_is_unique_expires_too(pgq: PgQueue, period: float | None, options: dict[str, Any]) -> None:
    resize = make(pgq, Unique(by=("file",), period=period)).using(**options)
    one, _ = enqueue(resize, file="a")
    with pgq.begin() as connection:
        many = resize.enqueue_many(connection, [{"file": "b"}, {"file": "c"}])

    for job_id in (one, *many):
        job = row(pgq, job_id)
        if "expires_at" in options:
            assert job.expires_at == FAR
        else:
            assert (job.expires_at - job.run_at).total_seconds() == pytest.approx(60, abs=0.002)


@pytest.mark.parametrize("options", [{}, {"delay": 5}, {"at": FAR}])
def test_in_bulk_jobs_start_in_the_order_of_the_payloads(pgq: PgQueue, options: dict[str, Any]) -> None:
    resize = make(pgq, Unique(by=("file",))).using(**options)
    files = [str(n) for n in range(50)]

    with pgq.begin() as connection:
        resize.enqueue_many(connection, [{"file": file} for file in files])
        jobs = pgq.tables.jobs
        due_at_once = connection.scalar(sa.select(sa.func.count()).where(jobs.c.run_at <= dialect.now()))

    with pgq.reading() as connection:
        in_order = connection.execute(sa.select(jobs.c.payload).order_by(jobs.c.run_at, jobs.c.id)).scalars()
        assert [payload["file"] for payload in in_order] == files
    assert due_at_once == (0 if options else 50), "even in the same transaction"


def test_in_bulk_limits_keep_their_keys(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",)), ordered_by="file")

    with pgq.begin() as connection:
        ids = resize.enqueue_many(connection, [{"file": "a"}, {"file": "b"}])

    assert [row(pgq, job_id).ordering_key for job_id in ids] == ["a", "b"]


async def enqueue_many_async(pgq: PgQueue, resize: Task[..., Any]) -> list[int]:
    async with AsyncSession(pgq.async_engine) as session, session.begin():
        ids = await resize.enqueue_many_async(session, [{"file": "a"}, {"file": "a"}])
        one = await resize.enqueue_async(session, file="a")
    await pgq.async_engine.dispose()
    return [*ids, one.id]


def test_asynchronous_calls_do_the_same(pgq: PgQueue) -> None:
    resize = make(pgq, Unique(by=("file",), period=HOUR))

    ids = asyncio.run(enqueue_many_async(pgq, resize))

    assert len(set(ids)) == 1


# At the same time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [None, HOUR])
@pytest.mark.parametrize("many", [False, True])
def test_of_many_who_enqueue_the_same_at_once_one_does(pgq: PgQueue, period: float | None, many: bool) -> None:
    resize = make(pgq, Unique(by=("file",), period=period))
    start = threading.Barrier(8)
    ids: list[int] = []

    def run() -> None:
        start.wait()
        for n in range(5):
            with pgq.begin() as connection:
                if many:
                    ids.extend(resize.enqueue_many(connection, [{"file": f"{n}{m}"} for m in range(3)]))
                else:
                    ids.append(resize.enqueue(connection, file=str(n)).id)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(ids) == 8 * 5 * (3 if many else 1)
    assert set(ids) == set(statuses(pgq))
    assert len(set(ids)) == 5 * (3 if many else 1)


def test_an_enqueue_that_waited_for_another_finds_its_job(pg: PgQueue) -> None:
    resize = make(pg, Unique(by=("file",), period=HOUR))
    found: list[tuple[int, bool]] = []

    with pg.engine.connect() as first:
        mine = resize.enqueue(first, file="a").id
        second = threading.Thread(target=lambda: found.append(enqueue(resize, file="a")))
        second.start()
        first.commit()
    second.join()

    assert found == [(mine, False)]


# Mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "file"}, r"takes the names of parameters, such as by=\('file',\)"),
        ({"by": 3}, "takes the names of parameters"),
        ({"by": ()}, "at least one parameter"),
        ({"by": (1,)}, "each as a string"),
        ({"by": ("a", "a")}, "names a parameter twice"),
        ({"period": 0}, "more than 0"),
        ({"period": -1.0}, "more than 0"),
        ({"period": float("nan")}, "more than 0"),
        ({"period": 1e30}, "at most"),
        ({"period": timedelta.max}, "at most"),
        ({"period": "1h"}, "seconds or a timedelta, got str"),
        ({"period": True}, "seconds or a timedelta, got bool"),
        ({"on_conflict": "ignore"}, "one of skip, raise, replace, got 'ignore'"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Unique(**options)


def test_a_rule_must_fit_the_function() -> None:
    pgq = PgQueue()

    with pytest.raises(ConfigurationError, match=r"names the parameter 'path', which its function does not have"):
        make(pgq, Unique(by=("path",)))
    with pytest.raises(ConfigurationError, match=r"unique of task 'resize' must be a Unique\(…\), got True"):
        make(pgq, True)  # type: ignore[arg-type]

    opaque = threading.Lock()

    def strange(one: Any = opaque, two: int = 2) -> None: ...

    with pytest.raises(ConfigurationError, match=r"the default of its parameter 'one', of type lock"):
        pgq.task(unique=Unique())(strange)
    pgq.task(unique=Unique(by=("two",)))(strange)


def test_a_payload_that_does_not_fit_is_refused_before_anything_is_asked(pgq: PgQueue) -> None:
    resize = make(pgq, Unique())

    with pgq.begin() as connection, pytest.raises(InvalidPayload):
        resize.enqueue(connection, size=3)
    with pgq.begin() as connection, pytest.raises(InvalidPayload):
        resize.enqueue_many(connection, [{"file": "a"}, {"size": 3}])
    with pgq.begin() as connection, pytest.raises(ConfigurationError, match="leave it away"):
        resize.using(unique_key="k").enqueue_many(connection, [{"file": "a"}])

    assert statuses(pgq) == {}


# An engine as SQLite's driver has it -----------------------------------------------------------------------------


@pytest.mark.parametrize("on_conflict", ["skip", "raise", "replace"])
def test_a_rollback_takes_bulk_back_where_the_driver_begins_transactions_late(
    sqlite_url: str, on_conflict: str
) -> None:
    engine = sa.create_engine(sqlite_url)
    pgq = PgQueue(engine)
    resize = make(pgq, Unique(by=("file",), on_conflict=on_conflict))

    with Session(engine) as session:
        resize.enqueue_many(session, [{"file": "a"}, {"file": "b"}])
        session.rollback()

    assert statuses(pgq) == {}
    engine.dispose()
    pgq.dispose()
