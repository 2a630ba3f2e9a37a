"""claim, ack, nack and extend of PgQueue: for consumers that are not tasks, synchronous and asynchronous alike."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import (
    add,
    add_one,
    events,
    everything,
    expire,
    external,
    is_postgresql,
    make_due,
    row,
    seconds_of_lease,
    seconds_until_due,
    statuses,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import execute, rows

from pgqueue import ClaimedJob, ClaimLost, ConfigurationError, InvalidPayload, JobNotFound, PgQueue, WrongSession


class Consumer:
    """The four calls, all made in one way: plainly, or awaited in an event loop of their own."""

    def __init__(self, pgq: PgQueue, loop: asyncio.AbstractEventLoop | None) -> None:
        self.pgq = pgq
        self._loop = loop

    def claim(self, worker: str = "consumer-1", **options: Any) -> list[ClaimedJob]:
        claimed: list[ClaimedJob] = self._call("claim", worker, **options)
        return claimed

    def claim_one(self, **options: Any) -> ClaimedJob:
        (job,) = self.claim(**options)
        return job

    def ack(self, jobs: Any, **options: Any) -> None:
        assert self._call("ack", jobs, **options) is None

    def nack(self, jobs: Any, **options: Any) -> None:
        assert self._call("nack", jobs, **options) is None

    def extend(self, jobs: Any, **options: Any) -> None:
        assert self._call("extend", jobs, **options) is None

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        if self._loop is None:
            return getattr(self.pgq, name)(*arguments, **options)
        return self._loop.run_until_complete(getattr(self.pgq, f"{name}_async")(*arguments, **options))


@pytest.fixture(params=["sync", "async"])
def consumer(request: pytest.FixtureRequest, pgq: PgQueue) -> Iterator[Consumer]:
    """The low-level calls, made synchronously, then asynchronously."""
    if request.param == "sync":
        yield Consumer(pgq, None)
        return
    loop = asyncio.new_event_loop()
    yield Consumer(pgq, loop)
    loop.run_until_complete(pgq.async_engine.dispose())
    loop.close()


#: Everything a consumer may say of its claims.
ENDS: dict[str, Callable[[Consumer, Any], None]] = {
    "ack": lambda consumer, jobs: consumer.ack(jobs, result="late"),
    "nack": lambda consumer, jobs: consumer.nack(jobs),
    "nack with a delay": lambda consumer, jobs: consumer.nack(jobs, delay=5),
    "nack with an error": lambda consumer, jobs: consumer.nack(jobs, error="late"),
    "nack as dead": lambda consumer, jobs: consumer.nack(jobs, dead=True),
    "extend": lambda consumer, jobs: consumer.extend(jobs, lease=600),
}


# claim -----------------------------------------------------------------------------------------------------


def test_a_claim_hands_out_due_jobs_of_one_queue_for_a_lease(consumer: Consumer) -> None:
    first, second, third = add(consumer.pgq, 3, queue="images")
    add(consumer.pgq, queue="mail")

    jobs = consumer.claim("consumer-7", queue="images", limit=2, lease=90)

    assert [job.id for job in jobs] == [first, second]
    assert [(job.claimed_by, job.attempt, job.payload) for job in jobs] == [
        ("consumer-7", 1, {"n": 0}),
        ("consumer-7", 1, {"n": 1}),
    ]
    assert 80 < seconds_of_lease(consumer.pgq, first) <= 90
    assert statuses(consumer.pgq)[third] == "pending"


def test_without_more_words_one_job_of_the_default_queue_is_claimed(consumer: Consumer) -> None:
    ids = add(consumer.pgq, 2)

    assert [job.id for job in consumer.claim()] == ids[:1]
    assert 20 < seconds_of_lease(consumer.pgq, ids[0]) <= 30


def test_an_empty_queue_gives_an_empty_list(consumer: Consumer) -> None:
    assert consumer.claim(limit=10) == []


def test_what_a_dead_consumer_held_is_claimed_again_in_the_same_call(consumer: Consumer) -> None:
    add(consumer.pgq)
    old = consumer.claim_one(worker="consumer-1")
    expire(consumer.pgq)

    new = consumer.claim_one(worker="consumer-2")

    assert (new.id, new.attempt, new.retries) == (old.id, 2, 1)
    assert new.claim_token != old.claim_token
    (event,) = consumer.pgq.job_events(old.id)
    assert (event["event"], event["actor"]) == ("sweep", "consumer-2")
    assert event["reason"] == "the lease of consumer-1 ran out"


def test_a_job_without_a_retry_left_is_not_claimed_after_its_consumer_died(consumer: Consumer) -> None:
    add(consumer.pgq, max_retries=0)
    job = consumer.claim_one()
    expire(consumer.pgq)

    assert consumer.claim() == []
    assert statuses(consumer.pgq)[job.id] == "dead"


def test_a_claim_sweeps_the_jobs_of_every_queue(consumer: Consumer) -> None:
    job_id = add_one(consumer.pgq, queue="images")
    consumer.claim(queue="images")
    expire(consumer.pgq)

    consumer.claim(queue="mail")

    assert statuses(consumer.pgq)[job_id] == "pending"


# ack -------------------------------------------------------------------------------------------------------


def test_an_acknowledged_job_is_completed_and_its_claim_gone(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.ack(job)

    stored = row(consumer.pgq, job.id)
    assert (stored.status, stored.result, stored.retries) == ("completed", None, 0)
    assert (stored.claim_token, stored.claim_expires_at) == (None, None)
    assert stored.finished_at is not None
    assert events(consumer.pgq, job.id) == []


def test_a_result_is_stored_in_each_job(pgq: PgQueue) -> None:
    for result in ({"width": 3}, [1, None], "é\n", 0, False, 1.5, {}):
        add(pgq, 2)
        jobs = pgq.claim("w", limit=2)

        pgq.ack(jobs, result=result)

        assert [row(pgq, job.id).result for job in jobs] == [result, result]


def test_a_result_is_stored_by_an_awaited_acknowledgement_as_well(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.ack(job, result={"at": timedelta(seconds=90), "id": uuid.UUID(int=7)})

    assert row(consumer.pgq, job.id).result == {"at": "PT1M30S", "id": str(uuid.UUID(int=7))}


def test_a_result_that_cannot_be_stored_is_refused_and_the_job_still_held(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()
    before = everything(consumer.pgq)

    for result in (object(), float("nan"), "a\x00b", "\ud800", {"x": float("inf")}):
        with pytest.raises(InvalidPayload, match=r"^result "):
            consumer.ack(job, result=result)

    assert everything(consumer.pgq) == before
    consumer.ack(job)


def test_a_second_acknowledgement_says_that_the_claim_is_lost_and_changes_nothing(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()
    consumer.ack(job, result="first")
    before = everything(consumer.pgq)

    with pytest.raises(ClaimLost, match=f"the claim on job {job.id} was lost.*nothing was written for it"):
        consumer.ack(job, result="second")

    assert everything(consumer.pgq) == before


def test_the_same_job_twice_in_one_call_is_one_acknowledgement(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.ack([job, job])

    assert statuses(consumer.pgq) == {job.id: "completed"}


def test_jobs_come_in_any_iterable(pgq: PgQueue) -> None:
    for kind in (list, tuple, set, iter):
        add(pgq, 3)

        pgq.ack(kind(pgq.claim("w", limit=3)))

        assert set(statuses(pgq).values()) == {"completed"}


def test_no_jobs_at_all_is_nothing_to_do(consumer: Consumer) -> None:
    add(consumer.pgq)
    before = everything(consumer.pgq)

    for end in ENDS.values():
        end(consumer, [])

    assert everything(consumer.pgq) == before


def test_something_else_than_a_claimed_job_is_refused(consumer: Consumer) -> None:
    add_one(consumer.pgq)
    before = everything(consumer.pgq)

    for end, wrong in itertools.product(ENDS.values(), (7, "7", None, [7], consumer.pgq.list_jobs())):
        with pytest.raises(WrongSession, match=r"expected jobs as claim\(\) returned them, got"):
            end(consumer, wrong)

    assert everything(consumer.pgq) == before


# nack ------------------------------------------------------------------------------------------------------


def test_a_job_given_back_is_claimable_at_once_and_pays_nothing(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.nack(job)

    stored = row(consumer.pgq, job.id)
    assert (stored.status, stored.retries, stored.run_at, stored.error) == ("pending", 0, job.run_at, None)
    (event,) = consumer.pgq.job_events(job.id)
    assert (event["event"], event["actor"], event["reason"]) == ("release", "consumer-1", "given back by its consumer")
    assert consumer.claim_one().attempt == 2


@pytest.mark.parametrize("delay", [90, 90.0, timedelta(seconds=90)])
def test_a_job_given_back_with_a_delay_is_due_later_and_pays_nothing(
    consumer: Consumer, delay: float | timedelta
) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.nack(job, delay=delay)

    assert 80 < seconds_until_due(consumer.pgq, job.id) <= 90
    assert row(consumer.pgq, job.id).retries == 0
    assert consumer.claim() == []


def test_an_error_charges_a_retry_and_waits_the_default_backoff(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.nack(job, error="the printer is on fire")

    stored = row(consumer.pgq, job.id)
    assert (stored.status, stored.retries) == ("pending", 1)
    assert stored.error == {"type": "Nack", "message": "the printer is on fire", "traceback": ""}
    assert 0.5 < seconds_until_due(consumer.pgq, job.id) <= 2.0
    (event,) = consumer.pgq.job_events(job.id)
    assert (event["event"], event["attempt"], event["error"]) == ("retry", 1, stored.error)


def test_an_error_with_a_delay_waits_that_long(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.nack(job, error="no", delay=timedelta(minutes=10))

    assert row(consumer.pgq, job.id).retries == 1
    assert 590 < seconds_until_due(consumer.pgq, job.id) <= 600


def test_an_error_with_a_delay_of_zero_is_retried_at_once(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.nack(job, error="no", delay=0)

    assert consumer.claim_one().retries == 1


def test_an_exception_is_stored_with_its_type_and_traceback(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    try:
        raise LookupError("no such customer")
    except LookupError as error:
        consumer.nack(job, error=error)

    error = row(consumer.pgq, job.id).error
    assert (error["type"], error["message"]) == ("LookupError", "no such customer")
    assert 'raise LookupError("no such customer")' in error["traceback"]


def test_an_empty_error_is_an_error_all_the_same(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.nack(job, error="")

    assert row(consumer.pgq, job.id).retries == 1


def test_an_error_with_any_text_can_be_stored(consumer: Consumer) -> None:
    """Recording a failure must not be able to fail."""
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.nack(job, error="a\x00b \ud800 100 % :x {y}" + "z" * 1_000_000)

    message = row(consumer.pgq, job.id).error["message"]
    assert message.startswith("a\N{SYMBOL FOR NULL}b ? 100 % :x {y}z")
    assert len(message) < 100_000


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"error": 5}, "error must be a string or an exception, got int"),
        ({"dead": "yes"}, "dead must be True or False"),
    ],
)
def test_a_nack_that_cannot_be_meant_is_refused(consumer: Consumer, options: dict[str, Any], complaint: str) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    with pytest.raises(ConfigurationError, match=complaint):
        consumer.nack(job, **options)

    assert row(consumer.pgq, job.id).status == "running"


def test_the_last_error_makes_the_job_dead(consumer: Consumer) -> None:
    add(consumer.pgq, max_retries=1)

    consumer.nack(consumer.claim_one(), error="first", delay=0)
    job = consumer.claim_one()
    consumer.nack(job, error="second", delay=0)

    stored = row(consumer.pgq, job.id)
    assert (stored.status, stored.retries, stored.attempt) == ("dead", 1, 2)
    assert stored.error["message"] == "second"
    assert stored.finished_at is not None
    assert events(consumer.pgq, job.id) == ["retry", "dead"]


@pytest.mark.parametrize("error", [None, "it is no use"])
def test_a_dead_letter_needs_no_retry_to_be_used_up(consumer: Consumer, error: str | None) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.nack(job, dead=True, error=error)

    stored = row(consumer.pgq, job.id)
    assert (stored.status, stored.retries) == ("dead", 0)
    (event,) = consumer.pgq.job_events(job.id)
    assert (event["event"], event["reason"]) == ("dead", error or "given up by its consumer")


IMPOSSIBLE_NACKS: list[tuple[dict[str, Any], str]] = [
    ({"dead": True, "delay": 5}, "give either delay or dead=True, not both"),
    ({"delay": -1}, "delay must be between 0 and"),
    ({"delay": float("nan")}, "delay must be between 0 and"),
    ({"delay": float("inf"), "error": "no"}, "delay must be between 0 and"),
    ({"delay": timedelta(days=999_999)}, "delay must be between 0 and"),
    ({"delay": "5"}, "delay must be seconds or a timedelta, got str"),
]


def test_giving_back_in_a_way_that_cannot_work_is_refused_and_the_job_still_held(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()
    before = everything(consumer.pgq)

    for options, message in IMPOSSIBLE_NACKS:
        with pytest.raises(ConfigurationError, match=message):
            consumer.nack(job, **options)

    assert everything(consumer.pgq) == before


# extend ----------------------------------------------------------------------------------------------------


def test_an_extended_lease_is_counted_from_now(consumer: Consumer) -> None:
    add(consumer.pgq, 2)
    jobs = consumer.claim(limit=2, lease=600)

    consumer.extend(jobs[0], lease=1200)
    consumer.extend(jobs[1])

    assert 1190 < seconds_of_lease(consumer.pgq, jobs[0].id) <= 1200
    assert 20 < seconds_of_lease(consumer.pgq, jobs[1].id) <= 30


def test_an_expired_claim_that_nobody_took_can_be_extended(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()
    expire(consumer.pgq)

    consumer.extend(job)

    assert consumer.claim("consumer-2") == []
    consumer.ack(job)


def test_a_lease_that_cannot_work_is_refused_and_changes_nothing(consumer: Consumer) -> None:
    add(consumer.pgq, 2)
    job = consumer.claim_one()
    before = everything(consumer.pgq)

    for lease in (0, -1, 0.4, float("nan"), float("inf"), 1e300, 10**400, timedelta.max, "30", True, None):
        with pytest.raises(ConfigurationError, match="lease must be"):
            consumer.claim(lease=lease)
        with pytest.raises(ConfigurationError, match="lease must be"):
            consumer.extend(job, lease=lease)

    assert everything(consumer.pgq) == before


def test_a_lease_may_be_a_timedelta(consumer: Consumer) -> None:
    add(consumer.pgq, 2)

    job = consumer.claim_one(lease=timedelta(minutes=2))
    claimed_for = seconds_of_lease(consumer.pgq, job.id)
    consumer.extend(job, lease=timedelta(minutes=5))

    assert 110 < claimed_for <= 120
    assert 290 < seconds_of_lease(consumer.pgq, job.id) <= 300


def test_the_longest_lease_that_is_taken_can_be_read_back(consumer: Consumer) -> None:
    add(consumer.pgq)

    job = consumer.claim_one(lease=100 * 366 * 86_400)

    assert consumer.pgq.get_job(job.id).claim_expires_at.year > 2100  # type: ignore[union-attr]


IMPOSSIBLE_CLAIMS: list[tuple[dict[str, Any], str]] = [
    ({"worker": ""}, "worker must be a name"),
    ({"worker": 7}, "worker must be a name"),
    ({"worker": "a\x00b"}, "worker must be a name"),
    ({"worker": "\ud800"}, "worker must be a name"),
    ({"queue": ""}, "queue name must be"),
    ({"queue": 'x"; DROP TABLE jobs'}, "queue name must be"),
    ({"limit": 0}, "limit must be"),
    ({"limit": -1}, "limit must be"),
    ({"limit": 10**12}, "limit must be"),
    ({"limit": "3"}, "limit must be"),
    ({"limit": 1.5}, "limit must be"),
]


def test_a_claim_that_cannot_work_is_refused_and_changes_nothing(consumer: Consumer) -> None:
    add(consumer.pgq, 2)
    consumer.claim()
    expire(consumer.pgq)
    before = everything(consumer.pgq)

    for arguments, message in IMPOSSIBLE_CLAIMS:
        with pytest.raises(ConfigurationError, match=message):
            consumer.claim(**arguments)

    assert everything(consumer.pgq) == before


# Lost claims -----------------------------------------------------------------------------------------------


def assert_every_end_is_refused(consumer: Consumer, job: ClaimedJob) -> None:
    before = everything(consumer.pgq)
    for end in ENDS.values():
        with pytest.raises(ClaimLost, match=f"the claim on job {job.id} was lost"):
            end(consumer, job)
    assert everything(consumer.pgq) == before


def test_a_foreign_token_changes_nothing(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    assert_every_end_is_refused(consumer, replace(job, claim_token=uuid.uuid4()))


def test_the_token_of_another_job_changes_nothing(consumer: Consumer) -> None:
    add(consumer.pgq, 2)
    first, second = consumer.claim_one(), consumer.claim_one()

    assert_every_end_is_refused(consumer, replace(first, claim_token=second.claim_token))


def test_a_claim_that_expired_and_was_taken_changes_nothing(consumer: Consumer) -> None:
    add(consumer.pgq)
    old = consumer.claim_one()
    expire(consumer.pgq)
    new = consumer.claim_one(worker="consumer-2")

    assert_every_end_is_refused(consumer, old)
    consumer.ack(new)


def test_a_claim_that_was_given_back_changes_nothing(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()
    consumer.nack(job)

    assert_every_end_is_refused(consumer, job)


def test_a_claim_on_a_job_that_was_cancelled_or_deleted_changes_nothing(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()

    consumer.pgq.cancel(job.id, force=True)
    assert_every_end_is_refused(consumer, job)
    consumer.pgq.delete(job.id)
    assert_every_end_is_refused(consumer, job)


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_what_was_lost_is_named_and_the_others_are_written(
    consumer: Consumer, end: Callable[[Consumer, Any], None]
) -> None:
    add(consumer.pgq, 4)
    held, cancelled, gone, also_held = jobs = consumer.claim(limit=4)
    consumer.pgq.cancel(cancelled.id, force=True)
    consumer.pgq.cancel(gone.id, force=True)
    before = {job.id: row(consumer.pgq, job.id) for job in jobs}

    with pytest.raises(ClaimLost, match=f"the claim on jobs {cancelled.id}, {gone.id} was lost"):
        end(consumer, jobs)

    after = {job.id: row(consumer.pgq, job.id) for job in jobs}
    assert {job_id for job_id in before if before[job_id] != after[job_id]} == {held.id, also_held.id}


def test_a_late_acknowledgement_counts_as_long_as_nobody_else_took_the_job(consumer: Consumer) -> None:
    add(consumer.pgq)
    job = consumer.claim_one()
    expire(consumer.pgq)

    consumer.ack(job)

    assert statuses(consumer.pgq) == {job.id: "completed"}


# In the caller's transaction -------------------------------------------------------------------------------


@pytest.fixture
def effects(pgq: PgQueue) -> PgQueue:
    """A queue beside a table of the application."""
    execute(pgq.engine, "CREATE TABLE effects (job_id integer NOT NULL)")
    return pgq


def effect_of(job: ClaimedJob) -> Any:
    return sa.text(f"INSERT INTO effects VALUES ({job.id})")


def effects_in(pgq: PgQueue) -> list[int]:
    return [found.job_id for found in rows(pgq.engine, "SELECT job_id FROM effects ORDER BY job_id")]


def sessions(pgq: PgQueue) -> dict[str, Callable[[], Any]]:
    return {
        "Session": lambda: Session(pgq.engine),
        "scoped_session": lambda: scoped_session(sessionmaker(pgq.engine)),
        "Connection": pgq.engine.connect,
    }


@pytest.mark.parametrize("kind", ["Session", "scoped_session", "Connection"])
def test_an_acknowledgement_and_the_consumers_rows_commit_together(effects: PgQueue, kind: str) -> None:
    add(effects)
    job = effects.claim("w")[0]
    session = sessions(effects)[kind]()

    session.execute(effect_of(job))
    effects.ack(job, result=1, session=session)
    session.commit()

    assert effects_in(effects) == [job.id]
    assert row(effects, job.id).status == "completed"
    session.close()


@pytest.mark.parametrize("kind", ["Session", "scoped_session", "Connection"])
def test_a_rollback_takes_the_acknowledgement_and_the_rows_back(effects: PgQueue, kind: str) -> None:
    add(effects)
    job = effects.claim("w")[0]
    before = everything(effects)
    session = sessions(effects)[kind]()

    session.execute(effect_of(job))
    effects.ack(job, session=session)
    session.rollback()
    session.close()

    assert effects_in(effects) == []
    assert everything(effects) == before
    effects.ack(job)


@pytest.mark.parametrize("kind", ["Session", "scoped_session", "Connection"])
def test_a_job_given_back_in_a_transaction_is_given_back_when_that_commits(effects: PgQueue, kind: str) -> None:
    add(effects)
    job = effects.claim("w")[0]
    session = sessions(effects)[kind]()

    effects.nack(job, error="no", session=session)
    session.commit()
    session.close()

    assert (row(effects, job.id).status, events(effects, job.id)) == ("pending", ["retry"])


def test_a_lost_claim_rolls_the_consumers_rows_back_with_its_transaction(effects: PgQueue) -> None:
    """This is what makes effects in the same database happen exactly once."""
    add(effects)
    old = effects.claim("slow")[0]
    expire(effects)
    new = effects.claim("quick")[0]

    def work(job: ClaimedJob) -> None:
        with Session(effects.engine) as session, session.begin():
            session.execute(effect_of(job))
            effects.ack(job, session=session)

    work(new)
    with pytest.raises(ClaimLost):
        work(old)

    assert effects_in(effects) == [new.id]
    assert (row(effects, new.id).claimed_by, row(effects, new.id).attempt) == ("quick", 2)


def test_a_savepoint_takes_back_an_acknowledgement_inside_of_it(effects: PgQueue) -> None:
    add(effects, 2)
    first, second = effects.claim("w", limit=2)

    with Session(effects.engine) as session, session.begin():
        effects.ack(first, session=session)
        with session.begin_nested() as savepoint:
            session.execute(effect_of(second))
            effects.ack(second, session=session)
            savepoint.rollback()

    assert statuses(effects) == {first.id: "completed", second.id: "running"}
    assert effects_in(effects) == []


def test_a_follow_up_job_and_the_acknowledgement_commit_together(pgq: PgQueue) -> None:
    add(pgq)
    job = pgq.claim("w")[0]

    with Session(pgq.engine) as session, session.begin():
        next_id = external(pgq, "next").enqueue(session, n=1).id
        pgq.ack(job, session=session)

    assert statuses(pgq) == {job.id: "completed", next_id: "pending"}


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("kind", ["AsyncSession", "AsyncConnection"])
def test_an_awaited_end_belongs_to_the_callers_asynchronous_transaction(
    effects: PgQueue, kind: str, commits: bool
) -> None:
    add(effects, 2)
    first, second = effects.claim("w", limit=2)
    before = everything(effects)

    async def work() -> None:
        opened = AsyncSession(effects.async_engine) if kind == "AsyncSession" else effects.async_engine.connect()
        async with opened as session:
            await session.execute(effect_of(first))
            await effects.ack_async(first, result="done", session=session)
            await effects.nack_async(second, error="no", session=session)
            await (session.commit() if commits else session.rollback())
        await effects.async_engine.dispose()

    asyncio.run(work())

    if commits:
        assert effects_in(effects) == [first.id]
        assert (row(effects, first.id).status, row(effects, first.id).result) == ("completed", "done")
        assert (row(effects, second.id).status, events(effects, second.id)) == ("pending", ["retry"])
    else:
        assert effects_in(effects) == []
        assert everything(effects) == before


def test_a_synchronous_end_refuses_an_asynchronous_session_and_the_other_way_round(pgq: PgQueue) -> None:
    add(pgq)
    job = pgq.claim("w")[0]
    before = everything(pgq)

    async def work() -> None:
        async with AsyncSession(pgq.async_engine) as session:
            for call in (pgq.ack, pgq.nack):
                with pytest.raises(WrongSession, match=r"takes a synchronous Session .*_async"):
                    call(job, session=session)  # type: ignore[operator]
        with Session(pgq.engine) as plain:
            for awaited in (pgq.ack_async, pgq.nack_async):
                with pytest.raises(WrongSession, match="takes an AsyncSession"):
                    await awaited(job, session=plain)  # type: ignore[operator]
        await pgq.async_engine.dispose()

    asyncio.run(work())

    assert everything(pgq) == before


def test_an_uncommitted_acknowledgement_keeps_others_from_the_job(pg: PgQueue) -> None:
    """Its lease has run out, but its row is locked: a sweep passes over it, and the commit stands."""
    assert is_postgresql(pg)
    add(pg)
    job = pg.claim("w")[0]
    expire(pg)

    with Session(pg.engine) as session, session.begin():
        pg.ack(job, session=session)
        others = pg.claim("consumer-2")

    assert others == []
    assert statuses(pg) == {job.id: "completed"}


# A whole consumer ------------------------------------------------------------------------------------------


def test_a_consumer_works_a_queue_to_its_end(consumer: Consumer) -> None:
    """Every third job fails once, every fifth is given up."""
    ids = add(consumer.pgq, 30)
    done: list[int] = []

    while jobs := consumer.claim(limit=7):
        failed = [job for job in jobs if job.payload["n"] % 3 == 0 and job.attempt == 1]
        hopeless = [job for job in jobs if job.payload["n"] % 5 == 0 and job not in failed]
        good = [job for job in jobs if job not in failed and job not in hopeless]
        consumer.nack(failed, error="try again")
        consumer.nack(hopeless, dead=True)
        consumer.ack(good)
        done.extend(job.id for job in good)
        make_due(consumer.pgq)

    assert sorted(done) == [job_id for n, job_id in enumerate(ids) if n % 5]
    assert statuses(consumer.pgq) == {
        job_id: "completed" if number % 5 else "dead" for number, job_id in enumerate(ids)
    }


# A consumer that keeps only ids and tokens -----------------------------------------------------------------


def test_a_claim_may_be_of_some_tasks_only(consumer: Consumer) -> None:
    for task in ("image", "email", "report"):
        add(consumer.pgq, task=task)

    claimed = consumer.claim(tasks=["email", "report"], limit=10)

    assert [job.task for job in claimed] == ["email", "report"]
    assert consumer.claim(tasks=[]) == []


@pytest.mark.parametrize("tasks", ["email", [1], ["no name"], {"email"}])
def test_tasks_that_are_no_names_are_refused(consumer: Consumer, tasks: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"task"):
        consumer.claim(tasks=tasks)


def test_a_claim_is_found_by_its_token(pgq: PgQueue) -> None:
    add(pgq, priority=3, metadata={"trace": "x"})
    (claimed,) = pgq.claim("consumer-1")

    found = pgq.get_claim(claimed.id, claimed.claim_token)

    names = [name for name in ClaimedJob.__dataclass_fields__ if name != "expires_in"]
    assert [getattr(found, name) for name in names] == [getattr(claimed, name) for name in names]
    pgq.ack(found, result=1)
    assert statuses(pgq) == {claimed.id: "completed"}


def test_a_claim_that_was_lost_is_not_found(pgq: PgQueue) -> None:
    add(pgq)
    (old,) = pgq.claim("consumer-1")
    expire(pgq)
    (new,) = pgq.claim("consumer-2")

    with pytest.raises(ClaimLost, match=f"the claim on job {old.id} was lost"):
        pgq.get_claim(old.id, old.claim_token)
    pgq.ack(new)
    with pytest.raises(ClaimLost):
        pgq.get_claim(new.id, new.claim_token)


@pytest.mark.parametrize("job_id", [999, -1, 2**70])
def test_a_claim_on_no_job_is_not_found(pgq: PgQueue, job_id: int) -> None:
    with pytest.raises(JobNotFound, match=f"there is no job {job_id}"):
        pgq.get_claim(job_id, uuid.uuid4())


def test_a_task_from_outside_of_the_program_need_not_be_registered(pgq: PgQueue) -> None:
    task = pgq.external_task("from-outside", register=False, max_retries=1)

    with pgq.begin() as connection:
        job_id = task.enqueue(connection, anything=[1]).id

    assert (pgq.get_job(job_id).max_retries, pgq.tasks, task.external) == (1, {}, True)
