"""Jobs that are not worth running any more."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from jobs import add, add_one, claim, claim_one, events, is_postgresql, put, retried, row, statuses
from jobs import finish as write
from sqlalchemy.orm import Session
from support import rows, wait_for
from working import Gate, drain, enqueue, table, wait_for_status, working

from pgqueue import ConfigurationError, JobFailed, PgQueue, Retry, expiry
from pgqueue.job import Expired
from pgqueue.retry import decide

LONG_AGO = sa.literal_column("'2020-01-01 00:00:00.000'")


def let_expire(pgq: PgQueue, *ids: int) -> None:
    put(pgq, ids, expires_at=LONG_AGO)


def expire(pgq: PgQueue, limit: int = 100) -> list[int]:
    with pgq.begin() as connection:
        return expiry.expire(connection, pgq.tables, actor="sweeper", limit=limit)


def seconds_from_due_to_expiry(pgq: PgQueue, job_id: int) -> float:
    found = row(pgq, job_id)
    seconds: float = (found.expires_at - found.run_at).total_seconds()
    return seconds


# Enqueue


def test_a_job_without_an_expiry_never_expires(pgq: PgQueue) -> None:
    job_id = add_one(pgq)

    assert row(pgq, job_id).expires_at is None
    assert claim_one(pgq).expires_in is None


@pytest.mark.parametrize("options", [{}, {"delay": 3600}, {"at": datetime(2040, 1, 1, tzinfo=UTC)}])
def test_an_expiry_counts_from_when_the_job_is_due(pgq: PgQueue, options: dict[str, Any]) -> None:
    one = add_one(pgq, expires_in=timedelta(minutes=1), **options)
    many = add(pgq, 2, expires_in=60, **options)

    for job_id in (one, *many):
        assert seconds_from_due_to_expiry(pgq, job_id) == pytest.approx(60, abs=0.002)


def test_an_expiry_counts_seconds_also_where_the_clock_is_changed(pgq: PgQueue) -> None:
    """Within one zone Python reckons by the clock on the wall: an hour after 02:30 would be two."""
    at = datetime(2036, 10, 26, 2, 30, tzinfo=ZoneInfo("Europe/Zurich"))

    job_id = add_one(pgq, at=at, expires_in=3600)

    assert seconds_from_due_to_expiry(pgq, job_id) == 3600


def test_an_expiry_can_be_a_moment(pgq: PgQueue) -> None:
    moment = datetime(2040, 1, 1, 12, tzinfo=UTC)

    ids = [add_one(pgq, expires_at=moment), add_one(pgq, expires_at=moment, at=moment - timedelta(hours=1))]

    assert [row(pgq, job_id).expires_at for job_id in ids] == [moment, moment]


def test_the_task_says_how_long_its_jobs_are_worth_starting_unless_the_enqueue_does(pgq: PgQueue) -> None:
    @pgq.task(expires_in=60)
    def work() -> None: ...

    moment = datetime(2040, 1, 1, 12, tzinfo=UTC)

    assert seconds_from_due_to_expiry(pgq, enqueue(work)) == pytest.approx(60, abs=0.002)
    assert seconds_from_due_to_expiry(pgq, enqueue(work.using(expires_in=5))) == pytest.approx(5, abs=0.002)
    assert row(pgq, enqueue(work.using(expires_at=moment))).expires_at == moment


@pytest.mark.parametrize("options", [{"expires_in": 60, "delay": 5}, {"expires_at": datetime(2040, 1, 1, tzinfo=UTC)}])
def test_a_job_that_the_session_adds_expires_too(pgq: PgQueue, options: dict[str, Any]) -> None:
    task = pgq.external_task("work").using(**options)

    with Session(pgq.engine) as session, session.begin():
        job = task.new()
        session.add(job)
        session.flush()
        job_id = job.id

    if "expires_at" in options:
        assert row(pgq, job_id).expires_at == options["expires_at"]
    else:
        assert seconds_from_due_to_expiry(pgq, job_id) == pytest.approx(60, abs=0.002)


def test_replacing_a_job_replaces_its_expiry(pgq: PgQueue) -> None:
    unique = {"unique_key": "a", "on_conflict": "replace"}
    job_id = add_one(pgq, expires_in=60, **unique)

    add_one(pgq, expires_in=5, **unique)
    assert seconds_from_due_to_expiry(pgq, job_id) == pytest.approx(5, abs=0.002)

    add_one(pgq, **unique)
    assert row(pgq, job_id).expires_at is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"expires_in": 0}, "expires_in must be more than 0"),
        ({"expires_in": -1}, "expires_in must be more than 0"),
        ({"expires_in": float("nan")}, "expires_in must be more than 0"),
        ({"expires_in": timedelta(days=-1)}, "expires_in must be more than 0"),
        ({"expires_in": "10m"}, "expires_in must be seconds or a timedelta"),
        ({"expires_in": True}, "expires_in must be seconds or a timedelta"),
        ({"expires_at": 60}, "expires_at must be a datetime"),
        ({"expires_at": datetime(2040, 1, 1)}, "expires_at must say its time zone"),  # noqa: DTZ001
        ({"expires_at": datetime(9999, 1, 1, tzinfo=UTC)}, "expires_at must lie between"),
        ({"expires_in": 5, "expires_at": datetime(2040, 1, 1, tzinfo=UTC)}, "not both"),
        (
            {"at": datetime(2040, 1, 2, tzinfo=UTC), "expires_at": datetime(2040, 1, 1, tzinfo=UTC)},
            "would expire before it is due.*give expires_in",
        ),
    ],
)
def test_an_expiry_that_makes_no_sense_is_an_error(options: dict[str, Any], problem: str) -> None:
    task = PgQueue("sqlite://").external_task("work")

    with pytest.raises(ConfigurationError, match=problem):
        task.using(**options)


def test_an_expiry_of_a_task_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="expires_in must be more than 0"):
        PgQueue("sqlite://").task(expires_in=-5)(lambda: None)


def test_a_job_far_in_the_future_still_fits_into_the_column(pgq: PgQueue) -> None:
    job_id = add_one(pgq, at=datetime(8999, 12, 31, tzinfo=UTC), expires_in=timedelta(days=36_000))

    assert row(pgq, job_id).expires_at.year == 8999


# Claim and sweep


def test_an_expired_job_is_not_claimed(pgq: PgQueue) -> None:
    expired, fresh, plain = add_one(pgq, expires_in=60), add_one(pgq, expires_in=60), add_one(pgq)
    let_expire(pgq, expired)

    assert [job.id for job in claim(pgq, limit=5)] == [fresh, plain]


def test_a_claim_says_how_long_a_job_is_worth_starting(pgq: PgQueue) -> None:
    add(pgq, expires_in=60)

    expires_in = claim_one(pgq).expires_in

    assert expires_in is not None
    assert 30 < expires_in <= 60


def test_an_expired_job_becomes_dead_with_an_event(pgq: PgQueue) -> None:
    expired, fresh, plain = add_one(pgq, expires_in=60), add_one(pgq, expires_in=60), add_one(pgq)
    let_expire(pgq, expired)

    assert expire(pgq) == [expired]
    assert expire(pgq) == []

    assert statuses(pgq) == {expired: "dead", fresh: "pending", plain: "pending"}
    (event,) = pgq.job_events(expired)
    assert (event["event"], event["reason"], event["actor"]) == ("expire", "expired", "sweeper")
    assert (event["from_status"], event["to_status"]) == ("pending", "dead")
    with pytest.raises(JobFailed, match="Expired"):
        pgq.result(expired)


def test_a_job_that_waits_for_a_limit_expires_too(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    put(pgq, [job_id], waits_for="task", expires_at=LONG_AGO)

    assert expire(pgq) == [job_id]
    assert row(pgq, job_id).waits_for is None


def test_a_running_job_goes_on_past_its_expiry(pgq: PgQueue) -> None:
    job_id = add_one(pgq, expires_in=60)
    job = claim_one(pgq)
    let_expire(pgq, job_id)

    assert expire(pgq) == []
    pgq.ack(job)

    assert statuses(pgq) == {job_id: "completed"}


def test_a_retry_that_would_come_after_the_expiry_does_not_come(pgq: PgQueue) -> None:
    job_id = add_one(pgq, expires_in=60)
    write(pgq, retried(claim_one(pgq), delay=3600))
    let_expire(pgq, job_id)

    assert expire(pgq) == [job_id]
    assert events(pgq, job_id) == ["retry", "expire"]


def test_expiring_goes_in_steps_and_skips_what_is_locked(pg: PgQueue) -> None:
    ids = add(pg, 5)
    let_expire(pg, *ids)

    with pg.engine.begin() as other:
        other.execute(sa.text("SELECT FROM pgqueue.jobs WHERE id = :id FOR UPDATE"), {"id": ids[0]})
        assert len(expire(pg, limit=3)) == 3
        assert len(expire(pg)) == 1

    assert expire(pg) == [ids[0]]


def test_a_consumer_that_is_no_worker_lets_expired_jobs_be_dead(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    let_expire(pgq, job_id)

    assert pgq.claim("me") == []
    assert statuses(pgq) == {job_id: "dead"}


def test_a_replayed_job_does_not_expire_again(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    let_expire(pgq, job_id)
    expire(pgq)

    pgq.replay(job_id)

    assert row(pgq, job_id).expires_at is None
    assert claim_one(pgq).id == job_id


# Workers


def test_a_draining_worker_does_not_run_what_has_expired(pgq: PgQueue) -> None:
    ran = []

    @pgq.task(retry=Retry(max_retries=0), keep_dead=3600)
    def work() -> None:
        ran.append(1)

    job_id = enqueue(work.using(expires_at=datetime(2020, 1, 1, tzinfo=UTC)))
    report = drain(pgq)

    assert ran == []
    assert report.dead == 1
    assert events(pgq, job_id) == ["expire"]
    assert row(pgq, job_id).prune_at is not None


def test_a_worker_sweeps_jobs_that_expire(pgq: PgQueue) -> None:
    @pgq.task
    def work() -> None: ...

    job_id = enqueue(work.using(delay=3600))
    let_expire(pgq, job_id)

    with working(pgq, sweep_interval=0.05):
        wait_for_status(pgq, job_id, "dead")

    assert events(pgq, job_id) == ["expire"]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_job_that_expires_in_a_workers_buffer_is_not_started(pgq: PgQueue, is_async: bool) -> None:
    gate, ran = Gate(), []

    @pgq.task
    def hold() -> None:
        gate.pass_through()

    if is_async:

        @pgq.task
        async def work() -> None:
            ran.append(1)
    else:

        @pgq.task
        def work() -> None:
            ran.append(1)

    with Session(pgq.engine) as session, session.begin():
        hold.enqueue(session)
        job_id = work.using(expires_in=1.5).enqueue(session).id

    with working(pgq, queues={"default": 1}, prefetch=10) as worker:
        wait_for(lambda: gate.came == 1 and statuses(pgq)[job_id] == "running", "the job to be in the buffer")
        wait_for(lambda: has_expired(pgq, job_id), "the job to expire")
        gate.open()
        wait_for_status(pgq, job_id, "dead")

    assert ran == []
    assert events(pgq, job_id) == ["expire"]
    assert row(pgq, job_id).error["type"] == "Expired"
    assert worker.report.dead == 1


def test_listeners_are_told_of_jobs_that_expired(pgq: PgQueue) -> None:
    told: list[tuple[str, int]] = []
    pgq.on("job:*", lambda event: told.append((str(event.name), event.job_id)))

    @pgq.task
    def work() -> None: ...

    with Session(pgq.engine) as session, session.begin():
        job_id = work.using(expires_at=datetime(2020, 1, 1, tzinfo=UTC)).enqueue(session).id
    drain(pgq)

    wait_for(lambda: ("job:dead", job_id) in told, "the events")
    assert [name for name, _ in told] == ["job:enqueued", "job:expired", "job:dead"]


def has_expired(pgq: PgQueue, job_id: int) -> bool:
    now = "now()" if is_postgresql(pgq) else "strftime('%Y-%m-%d %H:%M:%f', 'now')"
    found = rows(pgq.engine, f"SELECT expires_at <= {now} FROM {table(pgq, 'jobs')} WHERE id = :id", id=job_id)
    return bool(found[0][0])


def test_a_job_that_expired_with_its_claimer_charges_no_retry(pgq: PgQueue) -> None:
    add(pgq, expires_in=60)
    job = claim_one(pgq)

    transition = decide(job, Expired(), Retry(), random=0.5)

    assert (str(transition.status), str(transition.event), transition.reason) == ("dead", "expire", "expired")
    assert not transition.charge_retry
