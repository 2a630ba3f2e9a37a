"""Schedules: what code declares and applications store becomes jobs when its time has come, each tick at most once."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support import execute, rows, scalar, wait_for
from working import drain, table, working

from pgqueue import (
    ConfigurationError,
    EnqueueRequest,
    InvalidPayload,
    NotAwaited,
    PerKey,
    PgQueue,
    ScheduleNotFound,
    Task,
    TaskNotFound,
    Unique,
    WorkerConfig,
    WrongSession,
    cron,
    current_job,
    schedules,
    store,
)
from pgqueue.dialect import now, seconds_from_now
from pgqueue.scheduler import ASIDE_SECONDS, Scheduler
from pgqueue.schedules import UNDECLARED_SECONDS, UNKNOWN_TASK_SECONDS

EVERY_MINUTE, EVERY_SECOND, NIGHTLY = "* * * * *", "* * * * * *", "0 3 * * *"


@pytest.fixture
def report(pgq: PgQueue) -> Task[..., Any]:
    @pgq.task(queue="reports", priority=3)
    def report(day: str = "today", size: int = 1) -> None: ...

    return report


class Steps:
    """A scheduler without a worker around it, stepped by the test."""

    def __init__(self, pgq: PgQueue, *, actor: str = "worker-1", tasks: bool = True) -> None:
        self.pgq = pgq
        self.queues: list[set[str]] = []
        declared = list(pgq.declared_schedules.values())
        self.scheduler = Scheduler(
            pgq.tables, pgq.tasks if tasks else {}, declared, actor=actor, enqueued=self.queues.append
        )

    def step(self) -> float:
        with self.pgq.engine.connect() as connection:
            return self.scheduler.step(connection)

    def settle(self) -> None:
        """Step until nothing is due."""
        for _ in range(100):
            if self.step() > 0:
                return
        raise AssertionError("there is always something due")


def upsert(pgq: PgQueue, name: str = "nightly", **changes: Any) -> cron.Schedule:
    given: dict[str, Any] = {"cron": NIGHTLY, "task": "report", **changes}
    with Session(pgq.engine) as session, session.begin():
        return pgq.schedules.upsert(session, name, **given)


def set_back(pgq: PgQueue, name: str = "nightly", **since: float) -> None:
    """Let nobody have looked at the schedule for so long."""
    moment = seconds_from_now(sa.literal(-timedelta(**since).total_seconds(), sa.Float()))
    change(pgq, name, next_tick_at=moment)


def change(pgq: PgQueue, name: str = "nightly", **values: Any) -> None:
    stored = pgq.tables.schedules
    with pgq.begin() as connection:
        assert connection.execute(sa.update(stored).where(stored.c.name == name).values(**values)).rowcount == 1


def database_now(pgq: PgQueue) -> datetime:
    with pgq.begin() as connection:
        moment: datetime = connection.execute(sa.select(now())).scalar_one()
        return moment


def ticks_of(pgq: PgQueue, name: str = "nightly") -> list[tuple[datetime, int | None]]:
    stored = pgq.tables.schedule_ticks
    with pgq.begin() as connection:
        query = sa.select(stored.c.tick_at, stored.c.job_id).where(stored.c.schedule == name).order_by(stored.c.tick_at)
        return [(row.tick_at, row.job_id) for row in connection.execute(query)]


def records(pgq: PgQueue) -> list[str]:
    return [row[0] for row in rows(pgq.engine, f"SELECT reason FROM {table(pgq, 'job_events')} ORDER BY id")]


class Crash(BaseException):
    pass


def crash(*_: object, **__: object) -> None:
    raise Crash


# A tick becomes a job --------------------------------------------------------------------------------------


def test_a_tick_becomes_a_job_as_an_enqueue_would_make_it_with_the_schedule_in_its_metadata(
    pgq: PgQueue, report: Task[..., Any]
) -> None:
    upsert(pgq, task=report.using(max_retries=7), payload={"size": 4}, cron=EVERY_MINUTE)
    set_back(pgq, seconds=90)
    steps = Steps(pgq)

    steps.settle()

    (job,) = pgq.list_jobs()
    ((tick, job_id),) = ticks_of(pgq)
    assert (job.id, job.task, job.queue, job.priority, job.max_retries) == (job_id, "report", "reports", 3, 7)
    assert job.payload == {"size": 4}
    assert job.metadata == {"schedule": "nightly", "tick_at": tick.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    assert job.status == "pending"
    assert tick.second == 0
    assert pgq.schedules.get("nightly").next_tick_at == tick + timedelta(minutes=1)
    assert pgq.schedules.get("nightly").last_tick_at == tick
    assert steps.queues == [{"reports"}]


def test_a_worker_runs_what_its_code_declares_every_second(pgq: PgQueue) -> None:
    seen: list[dict[str, Any]] = []

    @pgq.cron(EVERY_SECOND, payload={"greeting": "hello"}, catchup="all")
    def greet(greeting: str) -> None:
        seen.append({"greeting": greeting, **current_job().metadata})

    with working(pgq):
        wait_for(lambda: len(seen) >= 3, "three ticks")

    assert {(one["greeting"], one["schedule"]) for one in seen} == {("hello", "greet")}
    moments = [datetime.fromisoformat(one["tick_at"]) for one in seen]
    assert {later - earlier for earlier, later in itertools.pairwise(sorted(moments))} == {timedelta(seconds=1)}


def test_a_schedule_that_is_not_due_makes_no_job_and_says_when_it_is(pgq: PgQueue, report: Task[..., Any]) -> None:
    upsert(pgq)
    change(pgq, next_tick_at=seconds_from_now(sa.literal(3.0, sa.Float())))

    wait = Steps(pgq).step()

    assert 0 < wait <= 3.0
    assert pgq.list_jobs() == []


def test_without_schedules_a_look_is_one_statement(pgq: PgQueue) -> None:
    sent: list[str] = []
    steps = Steps(pgq)
    steps.step()
    sa.event.listen(pgq.engine, "before_cursor_execute", lambda c, cursor, text, *rest: sent.append(text))

    wait = steps.step()

    assert wait > 1.0
    assert len([text for text in sent if not text.startswith("BEGIN")]) == 1


@pytest.mark.parametrize("catchup", ["none", "latest", "all"])
def test_ticks_that_were_missed_are_made_up_for_as_the_schedule_says(
    pgq: PgQueue, report: Task[..., Any], catchup: str
) -> None:
    upsert(pgq, cron="0 */2 * * *", catchup=catchup)
    change(pgq, next_tick_at=datetime(2026, 1, 1, tzinfo=UTC))
    present = database_now(pgq)
    rule = cron.CronRule("0 */2 * * *")
    missed = list(itertools.takewhile(lambda t: t <= present, rule.ticks_after(datetime(2025, 12, 31, 23, tzinfo=UTC))))

    Steps(pgq).settle()

    late = (present - missed[-1]).total_seconds() > cron.MISSED_SECONDS
    expected = {"none": [] if late else missed[-1:], "latest": missed[-1:], "all": missed[-cron.CATCHUP_TICKS_MAX :]}
    made = ticks_of(pgq)
    assert [tick for tick, _ in made] == expected[catchup]
    assert all(job_id is not None for _, job_id in made)
    assert len(pgq.list_jobs(limit=5000)) == len(made)
    assert pgq.schedules.get("nightly").next_tick_at == rule.next_after(present)
    assert [f"catchup={catchup}" in why for why in records(pgq)[1:]] == [True]


def test_a_tick_that_somebody_settled_already_makes_no_second_job(pgq: PgQueue, report: Task[..., Any]) -> None:
    upsert(pgq, cron=EVERY_MINUTE, catchup="all")
    set_back(pgq, minutes=3)
    Steps(pgq).settle()
    made = ticks_of(pgq)

    set_back(pgq, minutes=3)
    Steps(pgq, actor="worker-2").settle()

    assert ticks_of(pgq)[: len(made)] == made
    assert len(pgq.list_jobs()) == len(ticks_of(pgq)) in (len(made), len(made) + 1)  # a minute may have passed


@pytest.mark.parametrize("before", [(store, "insert_job"), (schedules, "add_tick"), (schedules, "settled")])
def test_a_crash_between_a_job_its_tick_and_the_step_to_the_next_leaves_none_of_them(
    pgq: PgQueue, report: Task[..., Any], monkeypatch: pytest.MonkeyPatch, before: tuple[Any, str]
) -> None:
    upsert(pgq, cron=EVERY_MINUTE)
    set_back(pgq, seconds=90)
    with monkeypatch.context() as broken:
        broken.setattr(*before, crash)
        with pytest.raises(Crash):
            Steps(pgq).step()
    assert (ticks_of(pgq), pgq.list_jobs()) == ([], [])

    Steps(pgq).settle()

    assert [job_id for _, job_id in ticks_of(pgq)] == [job.id for job in pgq.list_jobs()]
    assert len(pgq.list_jobs()) == 1


def test_many_schedulers_at_once_settle_each_tick_once(pgq: PgQueue, report: Task[..., Any]) -> None:
    names = [f"s{n}" for n in range(30)]
    for name in names:
        upsert(pgq, name, cron=EVERY_MINUTE, catchup="all")
        set_back(pgq, name, minutes=4)
    start = threading.Barrier(6)

    def compete(number: int) -> None:
        steps = Steps(pgq, actor=f"worker-{number}")
        start.wait()
        steps.settle()

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Steps(pgq).settle()

    ids = [job_id for name in names for _, job_id in ticks_of(pgq, name)]
    assert len(ids) >= 4 * len(names)
    assert sorted(ids) == sorted(job.id for job in pgq.list_jobs(limit=1000))


def test_while_operators_change_schedules_each_tick_gets_at_most_one_job_and_nothing_fails(pgq: PgQueue) -> None:
    task = pgq.external_task("report")
    names = [f"s{n}" for n in range(4)]
    for name in names:
        upsert(pgq, name, cron=EVERY_SECOND, task=task, catchup="all")
    over = threading.Event()
    failures: list[BaseException] = []

    def repeat(act: Callable[[random.Random], object], seed: int) -> None:
        dice = random.Random(seed)
        try:
            while not over.is_set():
                act(dice)
        except BaseException as error:
            failures.append(error)

    def change(dice: random.Random) -> None:
        name = dice.choice(names)
        dice.choice(
            [
                lambda: pgq.schedules.disable(name),
                lambda: pgq.schedules.enable(name),
                lambda: pgq.schedules.run_now(name),
                lambda: upsert(pgq, name, task=task, cron=dice.choice([EVERY_SECOND, "*/2 * * * * *"]), catchup="all"),
                lambda: set_back(pgq, name, seconds=3),
            ]
        )()

    steps = [Steps(pgq, actor=f"worker-{number}") for number in range(2)]
    acts = [*(lambda _, one=one: one.step() for one in steps), change, change]
    threads = [threading.Thread(target=repeat, args=(act, seed)) for seed, act in enumerate(acts)]
    for thread in threads:
        thread.start()
    wait_for(lambda: failures or sum(len(ticks_of(pgq, name)) for name in names) > 20, "twenty ticks")
    over.set()
    for thread in threads:
        thread.join()

    assert failures == []
    made = {job_id for name in names for _, job_id in ticks_of(pgq, name)}
    jobs = pgq.list_jobs(limit=100_000)
    assert made == {job.id for job in jobs if "tick_at" in job.metadata}
    assert len({(job.metadata["schedule"], job.metadata["tick_at"]) for job in jobs if job.id in made}) == len(made)


def test_a_locked_schedule_holds_up_no_other(pg: PgQueue) -> None:
    pg.external_task("report")
    for name in ("first", "second"):
        upsert(pg, name, cron=EVERY_MINUTE)
        set_back(pg, name, seconds=90)
    stored = pg.tables.schedules
    with pg.engine.begin() as other:
        other.execute(sa.select(stored).where(stored.c.name == "first").with_for_update())

        waits = [Steps(pg).step(), Steps(pg).step()]

    assert ticks_of(pg, "first") == []
    assert len(ticks_of(pg, "second")) == 1
    assert waits[0] == 0.0
    assert 0 < waits[1] < 1.0  # somebody else is at it: look again soon, but do not spin


def test_a_job_that_overlaps_none_is_not_made_while_the_one_before_is_open(
    pgq: PgQueue, report: Task[..., Any]
) -> None:
    upsert(pgq, cron=EVERY_MINUTE, overlap=False, catchup="all")
    set_back(pgq, minutes=2)
    Steps(pgq).settle()

    made = ticks_of(pgq)
    (job,) = pgq.list_jobs()
    assert [job_id for _, job_id in made] == [job.id, *[None] * (len(made) - 1)]
    assert pgq.schedules.run_now("nightly").inserted is False
    pgq.cancel(job.id)
    assert pgq.schedules.run_now("nightly").inserted is True


def test_the_job_of_a_task_that_nobody_knows_is_made_late_and_stays_pending(pgq: PgQueue) -> None:
    upsert(pgq, task=pgq.external_task("unknown"), cron=NIGHTLY, catchup="all")
    set_back(pgq, days=1)
    change(pgq, next_tick_at=seconds_from_now(sa.literal(-1.0, sa.Float())), cron=EVERY_SECOND)
    steps = Steps(pgq, tasks=False)

    early = steps.step()
    assert pgq.list_jobs() == []
    assert 1.0 < early <= UNKNOWN_TASK_SECONDS
    set_back(pgq, seconds=UNKNOWN_TASK_SECONDS)
    steps.step()

    assert {(job.task, job.status) for job in pgq.list_jobs()} == {("unknown", "pending")}


def test_a_payload_that_fits_no_more_makes_a_job_that_says_so(pgq: PgQueue, report: Task[..., Any]) -> None:
    upsert(pgq, cron=EVERY_MINUTE)
    change(pgq, payload={"sise": 3})
    set_back(pgq, seconds=90)

    Steps(pgq).settle()
    drain(pgq, queues={"reports": 1})

    (job,) = pgq.list_jobs()
    assert job.status == "dead"
    assert job.error is not None
    assert job.error["type"] == "pgqueue.errors.InvalidPayload"


def test_middleware_limits_and_keys_are_those_of_any_enqueue(pgq: PgQueue) -> None:
    @pgq.task(concurrency=PerKey("tenant", 1))
    def visit(tenant: str) -> None: ...

    @pgq.middleware("enqueue")
    def note(request: EnqueueRequest) -> None:
        request.options["metadata"] = {**request.options["metadata"], "noted": True}

    upsert(pgq, task=visit, payload={"tenant": "a"}, cron=EVERY_MINUTE)
    set_back(pgq, seconds=90)

    Steps(pgq).settle()

    (job,) = pgq.list_jobs()
    assert job.concurrency_key is not None
    assert job.metadata["noted"] is True
    assert job.metadata["schedule"] == "nightly"


def test_a_tick_whose_job_would_be_the_second_of_a_unique_one_gets_none(pgq: PgQueue) -> None:
    @pgq.task(unique=Unique(on_conflict="raise"))
    def visit(tenant: str) -> None: ...

    upsert(pgq, task=visit, payload={"tenant": "a"}, cron=EVERY_MINUTE, catchup="all")
    set_back(pgq, minutes=2)

    Steps(pgq).settle()

    (job,) = pgq.list_jobs()
    made = ticks_of(pgq)
    assert [job_id for _, job_id in made] == [job.id, *[None] * (len(made) - 1)]
    assert len(made) >= 2


def test_a_middleware_that_refuses_keeps_the_tick_open(pgq: PgQueue, report: Task[..., Any]) -> None:
    refusing = True

    @pgq.middleware("enqueue")
    def refuse(request: EnqueueRequest) -> None:
        if refusing:
            raise ValueError("not now")

    upsert(pgq, cron=EVERY_MINUTE)
    set_back(pgq, seconds=90)
    steps = Steps(pgq)
    steps.settle()
    assert (pgq.list_jobs(), ticks_of(pgq)) == ([], [])

    refusing = False
    steps.scheduler._aside.clear()  # as after ASIDE_SECONDS
    steps.settle()

    assert len(pgq.list_jobs()) == 1


def test_a_full_queue_keeps_the_tick_open(pgq: PgQueue, report: Task[..., Any]) -> None:
    pgq.queue("reports", max_depth=1, on_full="block", block_timeout=600.0)
    upsert(pgq, cron=EVERY_MINUTE)
    first = pgq.schedules.run_now("nightly")
    set_back(pgq, seconds=90)
    steps = Steps(pgq)
    steps.settle()
    assert ticks_of(pgq) == []

    pgq.cancel(first.id)
    steps.scheduler._aside.clear()  # as after ASIDE_SECONDS
    steps.settle()

    assert len(ticks_of(pgq)) == 1


@pytest.mark.parametrize("on_full", ["error", "block", "drop"])
def test_a_full_queue_keeps_a_tick_open_whatever_it_does_to_others(
    pgq: PgQueue, report: Task[..., Any], on_full: str
) -> None:
    pgq.queue("reports", max_depth=1, on_full=on_full, **({"block_timeout": 600.0} if on_full == "block" else {}))
    upsert(pgq, cron=EVERY_MINUTE)
    pgq.schedules.run_now("nightly")
    set_back(pgq, seconds=90)

    Steps(pgq).settle()

    assert ticks_of(pgq) == []
    assert pgq.schedules.get("nightly").next_tick_at < database_now(pgq)


@pytest.mark.parametrize("payload", [{"size": 2}, {"sise": 2}])
def test_of_many_missed_ticks_a_queue_takes_as_many_as_have_room_and_the_others_later(
    pgq: PgQueue, report: Task[..., Any], payload: dict[str, int]
) -> None:
    pgq.queue("reports", max_depth=3)
    upsert(pgq, cron=EVERY_MINUTE, catchup="all")
    change(pgq, payload=payload)  # one that fits, and one that fits no more
    set_back(pgq, minutes=5)
    steps = Steps(pgq)

    steps.settle()
    first = ticks_of(pgq)
    for job in pgq.list_jobs():
        pgq.cancel(job.id)
    steps.scheduler._aside.clear()  # as after ASIDE_SECONDS
    steps.settle()

    made = ticks_of(pgq)
    assert len(first) == 3
    assert made[:3] == first
    assert len(made) in (5, 6)
    assert {later - earlier for (earlier, _), (later, _) in itertools.pairwise(made)} == {timedelta(minutes=1)}
    assert len({job_id for _, job_id in made}) == len(made)


def test_a_schedule_that_fails_leaves_those_alone_that_are_settled_with_it(
    pgq: PgQueue, report: Task[..., Any]
) -> None:
    commits: list[None] = []
    for number, name in enumerate(("a", "b", "c")):
        upsert(pgq, name, cron=EVERY_MINUTE, payload={"day": name})
        set_back(pgq, name, seconds=100 - number)

    @pgq.middleware("enqueue")
    def refuse(request: EnqueueRequest) -> None:
        if request.payloads[0]["day"] == "b":
            raise KeyError("b")

    sa.event.listen(pgq.engine, "commit", lambda _: commits.append(None))
    steps = Steps(pgq)
    steps.step()

    assert [len(ticks_of(pgq, name)) for name in ("a", "b", "c")] == [1, 0, 1]
    assert set(steps.scheduler._aside) == {"b"}


@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_a_unique_key_in_a_long_transaction_of_the_application_holds_up_its_own_schedule_alone(
    pg: PgQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ends: str
) -> None:
    @pg.task(unique=Unique())
    def visit(tenant: str) -> None: ...

    for number, name in enumerate(("a", "b")):
        upsert(pg, name, task=visit, payload={"tenant": name}, cron=EVERY_MINUTE)
        set_back(pg, name, seconds=100 - number)
    steps = Steps(pg)
    with pg.engine.connect() as application:
        visit.enqueue(application, tenant="a")

        steps.settle()  # waits for nobody
        other = visit.enqueue(application, tenant="c")
        assert (ticks_of(pg, "a"), bool(ticks_of(pg, "b"))) == ([], True)
        getattr(application, ends)()

    steps.scheduler._aside.clear()  # as a little later
    steps.settle()

    jobs = [job_id for _, job_id in ticks_of(pg, "a")]  # one or two: a minute may have begun meanwhile
    assert jobs
    assert (None in jobs) is (ends == "commit")
    assert other.inserted
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_worker_that_starts_waits_for_no_transaction_that_makes_the_schedule(
    pg: PgQueue, caplog: pytest.LogCaptureFixture
) -> None:
    task = pg.external_task("report")
    for name in ("nightly", "other"):
        pg.cron(NIGHTLY, name=name)(task)
    steps = Steps(pg)
    with pg.engine.begin() as application:
        pg.schedules.upsert(application, "nightly", cron="0 4 * * *", task=task)

        steps.step()
        assert [schedule.name for schedule in pg.schedules.list()] == ["other"]

    steps.scheduler._renew_at = 0.0  # as after LOOK_SECONDS
    steps.step()

    assert [schedule.cron for schedule in pg.schedules.list()] == ["0 4 * * *", NIGHTLY]
    assert "are not as the code declares them" in caplog.text


def test_a_schedule_without_overlap_keeps_the_key_of_a_unique_task(pgq: PgQueue) -> None:
    @pgq.task(unique=Unique())
    def visit(tenant: str) -> None: ...

    with pgq.begin() as connection:
        by_hand = visit.enqueue(connection, tenant="a")
    upsert(pgq, task=visit, payload={"tenant": "a"}, cron=EVERY_MINUTE, overlap=False)
    set_back(pgq, seconds=90)

    Steps(pgq).settle()
    run = pgq.schedules.run_now("nightly")

    assert [job.id for job in pgq.list_jobs()] == [by_hand.id]
    assert (run.id, run.inserted) == (by_hand.id, False)


def test_old_rows_of_ticks_are_pruned_also_while_there_is_always_something_due(
    pg: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    upsert(pg, task=pg.external_task("report"), cron=EVERY_MINUTE)
    set_back(pg, seconds=90)
    at = "'2026-01-01 00:00:00.000'"
    execute(
        pg.engine, f"INSERT INTO pgqueue.schedule_ticks (schedule, tick_at, created_at) VALUES ('gone', {at}, {at})"
    )
    steps = Steps(pg)
    steps.scheduler._prune_at = 0.0
    with pg.engine.begin() as other:
        other.execute(sa.select(pg.tables.schedules).with_for_update())

        steps.step()

    assert ticks_of(pg, "gone") == []


def test_a_row_made_by_plain_sql_ticks(pgq: PgQueue, report: Task[..., Any]) -> None:
    execute(
        pgq.engine, f"INSERT INTO {table(pgq, 'schedules')} (name, task, cron) VALUES ('by-sql', 'report', '* * * * *')"
    )

    Steps(pgq).settle()

    assert pgq.schedules.get("by-sql").next_tick_at > database_now(pgq)
    assert len(pgq.list_jobs()) <= 1
    set_back(pgq, "by-sql", seconds=90)
    Steps(pgq).settle()
    assert len(pgq.list_jobs()) >= 1


def test_a_row_that_cannot_be_read_is_told_once_and_holds_up_no_other(
    pgq: PgQueue, report: Task[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    upsert(pgq, "broken", cron=EVERY_MINUTE)
    upsert(pgq, "good", cron=EVERY_MINUTE)
    change(pgq, "broken", cron="every now and then")
    set_back(pgq, "broken", seconds=100)
    set_back(pgq, "good", seconds=90)
    steps = Steps(pgq)

    steps.settle()
    steps.scheduler._aside.clear()  # as after ASIDE_SECONDS
    steps.settle()

    told = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(told) == 1
    assert "schedule broken" in told[0]
    assert "every now and then" in told[0]
    assert f"{ASIDE_SECONDS:g}" in told[0]
    assert len(ticks_of(pgq, "good")) == 1
    assert ticks_of(pgq, "broken") == []


def test_old_rows_of_ticks_are_pruned(pgq: PgQueue) -> None:
    ticks = table(pgq, "schedule_ticks")
    moment = "'2026-01-0{} 00:00:00.000'"
    for day in (1, 2):
        at = moment.format(day)
        execute(pgq.engine, f"INSERT INTO {ticks} (schedule, tick_at, created_at) VALUES ('gone', {at}, {at})")
    execute(pgq.engine, f"INSERT INTO {ticks} (schedule, tick_at) VALUES ('gone', {moment.format(3)})")
    steps = Steps(pgq)
    steps.scheduler._prune_at = time.monotonic()

    steps.step()

    assert len(ticks_of(pgq, "gone")) == 1


def test_a_draining_worker_makes_no_jobs(pgq: PgQueue, report: Task[..., Any]) -> None:
    pgq.cron(EVERY_MINUTE)(report)
    upsert(pgq, "other", cron=EVERY_MINUTE)
    set_back(pgq, "other", seconds=90)

    drain(pgq)

    assert pgq.list_jobs() == []
    assert [schedule.name for schedule in pgq.schedules.list()] == ["other"]


def test_a_worker_can_leave_schedules_to_others(pgq: PgQueue, report: Task[..., Any]) -> None:
    pgq.cron(EVERY_SECOND)(report)

    with working(pgq, schedules=False) as worker:
        wait_for(lambda: pgq.workers(), "the worker to be there")
        assert worker._scheduler is None

    assert pgq.schedules.list() == []
    assert WorkerConfig().schedules


# What code declares ----------------------------------------------------------------------------------------


def test_workers_publish_what_code_declares_and_enqueue_nothing_for_the_past(
    pgq: PgQueue, report: Task[..., Any]
) -> None:
    pgq.cron(NIGHTLY, tz="Europe/Zurich", catchup="all", name="nightly", payload={"size": 2})(report)
    pgq.cron("0 * * * *", name="hourly", overlap=False)(report)

    Steps(pgq).settle()

    hourly, nightly = pgq.schedules.list()
    assert (nightly.name, nightly.cron, nightly.timezone, nightly.catchup) == (
        "nightly",
        NIGHTLY,
        "Europe/Zurich",
        "all",
    )
    assert (nightly.payload, nightly.queue, nightly.priority, nightly.declared_by) == (
        {"size": 2},
        "reports",
        3,
        "code",
    )
    assert (nightly.overlap, hourly.overlap) == (True, False)
    assert nightly.next_tick_at == nightly.rule.next_after(database_now(pgq))
    assert nightly.is_declared
    assert pgq.list_jobs() == []


def test_a_changed_expression_counts_from_now_on(pgq: PgQueue, report: Task[..., Any]) -> None:
    pgq.cron(NIGHTLY, name="nightly", catchup="all")(report)
    Steps(pgq).settle()
    set_back(pgq, days=3)
    pgq.declared_schedules.clear()
    pgq.cron("0 5 * * *", name="nightly", catchup="all")(report)

    Steps(pgq).settle()

    schedule = pgq.schedules.get("nightly")
    assert schedule.cron == "0 5 * * *"
    assert schedule.next_tick_at == schedule.rule.next_after(database_now(pgq))
    assert pgq.list_jobs() == []
    assert "schedule 'nightly' changed by the code" in records(pgq)[0]


def test_a_changed_payload_leaves_missed_ticks_open(pgq: PgQueue, report: Task[..., Any]) -> None:
    pgq.cron(NIGHTLY, name="nightly", catchup="latest")(report)
    Steps(pgq).settle()
    set_back(pgq, days=3)
    pgq.declared_schedules.clear()
    pgq.cron(NIGHTLY, name="nightly", catchup="latest", payload={"size": 9})(report)

    Steps(pgq).settle()

    assert [job.payload for job in pgq.list_jobs()] == [{"size": 9}]


def test_what_an_operator_changed_stays_whatever_code_declares(
    pgq: PgQueue, report: Task[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    pgq.cron(NIGHTLY, name="nightly")(report)
    Steps(pgq).settle()
    upsert(pgq, cron="0 4 * * *", actor="ada")

    Steps(pgq).settle()

    schedule = pgq.schedules.get("nightly")
    assert (schedule.cron, schedule.declared_by) == ("0 4 * * *", "ada")
    assert [record.message for record in caplog.records if "nightly" in record.message]
    pgq.schedules.delete("nightly")
    Steps(pgq).settle()
    assert pgq.schedules.get("nightly").cron == NIGHTLY


def test_a_disabled_schedule_stays_disabled_when_workers_start(pgq: PgQueue, report: Task[..., Any]) -> None:
    pgq.cron(EVERY_MINUTE, name="nightly")(report)
    Steps(pgq).settle()
    pgq.schedules.disable("nightly", reason="too loud", actor="ada")
    set_back(pgq, seconds=90)

    Steps(pgq).settle()

    assert not pgq.schedules.get("nightly").enabled
    assert pgq.list_jobs() == []
    assert "schedule 'nightly' disabled: too loud" in records(pgq)


def test_a_schedule_that_was_removed_from_the_code_stops_once_no_worker_declares_it(
    pgq: PgQueue, report: Task[..., Any]
) -> None:
    pgq.cron(EVERY_MINUTE, name="nightly")(report)
    old = Steps(pgq)
    old.settle()
    pgq.declared_schedules.clear()
    new = Steps(pgq, actor="worker-2")
    set_back(pgq, seconds=90)
    new.settle()
    assert len(pgq.list_jobs()) == 1  # the old worker is still running

    change(pgq, declared_at=seconds_from_now(sa.literal(-UNDECLARED_SECONDS - 1, sa.Float())))
    set_back(pgq, seconds=90)
    new.settle()

    assert len(pgq.list_jobs()) == 1
    assert not pgq.schedules.get("nightly").is_declared
    old.scheduler._renew_at = 0.0
    old.settle()
    assert pgq.schedules.get("nightly").is_declared
    assert len(ticks_of(pgq)) >= 1


def test_in_a_rolling_deploy_the_worker_started_last_counts_and_those_that_stay_win(
    pgq: PgQueue, report: Task[..., Any]
) -> None:
    pgq.cron(NIGHTLY, name="nightly")(report)
    old = Steps(pgq, actor="old")
    pgq.declared_schedules.clear()
    pgq.cron("0 5 * * *", name="nightly")(report)
    new = Steps(pgq, actor="new")
    late_old = Steps(pgq, actor="late-old")
    late_old.scheduler._declared = old.scheduler._declared

    old.settle()
    new.settle()
    assert pgq.schedules.get("nightly").cron == "0 5 * * *"
    old.scheduler._renew_at = 0.0
    old.settle()  # it is only still there
    assert pgq.schedules.get("nightly").cron == "0 5 * * *"
    late_old.settle()  # restarted in the middle of the deploy
    assert pgq.schedules.get("nightly").cron == NIGHTLY
    new.scheduler._renew_at = 0.0
    new.settle()
    assert pgq.schedules.get("nightly").cron == NIGHTLY
    change(pgq, declared_at=seconds_from_now(sa.literal(-UNDECLARED_SECONDS - 1, sa.Float())))  # all old ones ended
    new.scheduler._renew_at = 0.0
    new.settle()

    assert pgq.schedules.get("nightly").cron == "0 5 * * *"
    assert pgq.schedules.get("nightly").is_declared


def test_of_two_workers_that_declare_a_change_at_once_the_second_leaves_the_next_tick_as_the_first_set_it(
    pgq: PgQueue, report: Task[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a tick that comes between the two is skipped."""
    pgq.cron(NIGHTLY, name="nightly")(report)
    Steps(pgq).settle()
    pgq.declared_schedules.clear()
    pgq.cron(EVERY_MINUTE, name="nightly")(report)
    first, second = Steps(pgq, actor="worker-1"), Steps(pgq, actor="worker-2")
    lock = schedules._lock_declared
    due = datetime(2026, 1, 1, tzinfo=UTC)

    def first_is_faster(tables: Any) -> Any:
        monkeypatch.setattr(schedules, "_lock_declared", lock)
        first_declares(connection)
        return lock(tables)

    def first_declares(connection: sa.Connection) -> None:
        first.scheduler.declare_in(connection)
        stored = pgq.tables.schedules
        connection.execute(sa.update(stored).values(next_tick_at=due))

    monkeypatch.setattr(schedules, "_lock_declared", first_is_faster)
    with pgq.begin() as connection:
        second.scheduler.declare_in(connection)

    assert pgq.schedules.get("nightly").cron == EVERY_MINUTE
    assert pgq.schedules.get("nightly").next_tick_at == due


def test_a_worker_that_starts_waits_for_nobody_who_changes_a_schedule(pg: PgQueue) -> None:
    task = pg.external_task("report")
    pg.cron(NIGHTLY, name="nightly")(task)
    Steps(pg).settle()
    pg.declared_schedules.clear()
    pg.cron("0 5 * * *", name="nightly")(task)
    steps = Steps(pg, actor="worker-2")
    stored = pg.tables.schedules
    with pg.engine.begin() as other:
        other.execute(sa.select(stored).with_for_update())

        steps.step()
        assert pg.schedules.get("nightly").cron == NIGHTLY

    steps.scheduler._renew_at = 0.0  # as after LOOK_SECONDS
    steps.step()

    assert pg.schedules.get("nightly").cron == "0 5 * * *"


def test_a_declaration_that_is_wrong_is_refused_where_it_is_made(pgq: PgQueue, report: Task[..., Any]) -> None:
    for expected, message, options in (
        (ConfigurationError, "Bad hour", {"expression": "0 25 * * *"}),
        (ConfigurationError, "no time zone 'Mars'", {"tz": "Mars"}),
        (ConfigurationError, "none, latest, all", {"catchup": "some"}),
        (ConfigurationError, "overlap", {"overlap": "no"}),
        (ConfigurationError, "schedule name", {"name": "two words"}),
        (InvalidPayload, "sise", {"payload": {"sise": 1}}),
        (InvalidPayload, "mapping", {"payload": [1]}),
    ):
        with pytest.raises(expected, match=message):
            pgq.cron(**{"expression": NIGHTLY, **options})(report)  # type: ignore[arg-type]

    pgq.cron(NIGHTLY)(report)
    pgq.cron(NIGHTLY)(report)  # a module that is run and imported as well
    with pytest.raises(ConfigurationError, match="already a schedule named 'report'"):
        pgq.cron("0 4 * * *")(report)
    with pytest.raises(ConfigurationError, match=r"using\(unique_key=…\).*overlap=False"):
        pgq.cron(NIGHTLY, name="other")(report.using(unique_key="a"))
    with pytest.raises(ConfigurationError, match=r"using\(delay=…\)"):
        pgq.cron(NIGHTLY, name="other")(report.using(delay=5))
    with pytest.raises(ConfigurationError, match="directly above the function"):
        pgq.task(queue="x")(report)
    assert list(pgq.declared_schedules) == ["report"]


# What applications and operators do ------------------------------------------------------------------------


def test_a_schedule_is_there_if_and_only_if_its_transaction_commits(pgq: PgQueue, report: Task[..., Any]) -> None:
    with Session(pgq.engine) as session:
        pgq.schedules.upsert(session, "nightly", cron=NIGHTLY, task=report)
        session.rollback()

    assert pgq.schedules.list() == []


def test_an_asynchronous_session_makes_schedules_too(pgq: PgQueue, report: Task[..., Any]) -> None:
    async def make() -> None:
        try:
            async with AsyncSession(pgq.async_engine) as session, session.begin():
                await pgq.schedules.upsert_async(session, "nightly", cron=NIGHTLY, task=report)
            with pytest.raises(NotAwaited):
                async with AsyncSession(pgq.async_engine) as session, session.begin():
                    pgq.schedules.upsert_async(session, "forgotten", cron=NIGHTLY, task=report)._start = None  # type: ignore[attr-defined]
        finally:
            await pgq.async_engine.dispose()

    asyncio.run(make())

    assert [schedule.name for schedule in pgq.schedules.list()] == ["nightly"]


def test_an_upsert_changes_what_is_there_and_one_that_changes_nothing_leaves_no_trace(
    pgq: PgQueue, report: Task[..., Any]
) -> None:
    made = upsert(pgq, payload={"size": 1}, actor="ada", reason="a new tenant")
    again = upsert(pgq, payload={"size": 1}, actor="bob")
    changed = upsert(pgq, payload={"size": 2}, tz="Europe/Zurich", actor="bob")

    assert (made.declared_by, again.declared_by, changed.declared_by) == ("ada", "ada", "bob")
    assert changed.payload == {"size": 2}
    assert changed.next_tick_at == changed.rule.next_after(database_now(pgq)) != made.next_tick_at
    assert len(records(pgq)) == 2
    assert records(pgq)[0].endswith("a new tenant")


def test_an_upsert_leaves_enabled_as_it_is_unless_it_says_otherwise(pgq: PgQueue, report: Task[..., Any]) -> None:
    upsert(pgq)
    pgq.schedules.disable("nightly")

    assert upsert(pgq, cron=EVERY_MINUTE).enabled is False
    assert upsert(pgq, cron=EVERY_MINUTE, enabled=True).enabled is True
    assert upsert(pgq, "other", enabled=False).enabled is False


def test_a_schedule_enabled_again_makes_no_jobs_for_the_time_it_was_disabled(
    pgq: PgQueue, report: Task[..., Any]
) -> None:
    upsert(pgq, cron=EVERY_MINUTE, catchup="all")
    assert pgq.schedules.disable("nightly")
    assert not pgq.schedules.disable("nightly")
    set_back(pgq, hours=3)

    assert pgq.schedules.enable("nightly")
    assert not pgq.schedules.enable("nightly")
    Steps(pgq).settle()

    assert pgq.list_jobs() == []


def test_run_now_enqueues_out_of_turn_and_says_who_did(pgq: PgQueue, report: Task[..., Any]) -> None:
    before = upsert(pgq, payload={"size": 5})

    result = pgq.schedules.run_now("nightly", actor="ada", reason="the customer asked")

    job = pgq.get_job(result.id)
    assert (job.payload, job.metadata, job.queue) == ({"size": 5}, {"schedule": "nightly"}, "reports")
    assert pgq.schedules.get("nightly").next_tick_at == before.next_tick_at
    (event,) = pgq.job_events(result.id)
    assert (event["actor"], event["reason"]) == ("ada", "schedule 'nightly' run now: the customer asked")


def test_a_change_of_a_schedule_can_be_part_of_a_transaction(pgq: PgQueue, report: Task[..., Any]) -> None:
    upsert(pgq)

    with Session(pgq.engine) as session:
        pgq.schedules.disable("nightly", session=session)
        pgq.schedules.run_now("nightly", session=session)
        pgq.schedules.delete("nightly", session=session)
        session.rollback()

    assert pgq.schedules.get("nightly").enabled
    assert pgq.list_jobs() == []


def test_a_deleted_schedule_leaves_its_jobs(pgq: PgQueue, report: Task[..., Any]) -> None:
    upsert(pgq)
    pgq.schedules.run_now("nightly")

    pgq.schedules.delete("nightly", actor="ada")

    assert pgq.schedules.list() == []
    assert len(pgq.list_jobs()) == 1
    assert records(pgq)[-1] == "schedule 'nightly' deleted"


def test_what_is_not_there_is_said(pgq: PgQueue, report: Task[..., Any]) -> None:
    for call in (pgq.schedules.get, pgq.schedules.enable, pgq.schedules.run_now, pgq.schedules.delete):
        with pytest.raises(ScheduleNotFound, match="there is no schedule 'missing'"):
            call("missing")
        with pytest.raises(ConfigurationError, match="the name of a schedule must be a string, got int"):
            call(5)  # type: ignore[arg-type]  # under test


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "reprot"}, TaskNotFound, "no task named 'reprot'"),
        ({"task": 3}, ConfigurationError, "got int"),
        ({"cron": "* * *"}, ConfigurationError, "Wrong number of fields"),
        ({"tz": "CEST2"}, ConfigurationError, "no time zone"),
        ({"payload": {"size": "big"}}, InvalidPayload, "size"),
        ({"catchup": "some"}, ConfigurationError, "catchup must be one of"),
        ({"enabled": "yes"}, ConfigurationError, "enabled must be"),
        ({"overlap": None}, ConfigurationError, "overlap of schedule 'nightly'"),
    ],
)
def test_an_upsert_refuses_what_cannot_be(
    pgq: PgQueue, report: Task[..., Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        upsert(pgq, **options)

    assert pgq.schedules.list() == []


def test_an_upsert_needs_a_session(pgq: PgQueue, report: Task[..., Any]) -> None:
    with pytest.raises(WrongSession, match=r"schedules\.upsert\(\) takes a Session"):
        pgq.schedules.upsert(pgq.engine, "nightly", cron=NIGHTLY, task=report)  # type: ignore[arg-type]


@pytest.fixture
def racing(pg: PgQueue) -> Iterator[sa.Connection]:
    with pg.engine.connect() as connection:
        yield connection


def test_two_upserts_of_a_new_schedule_at_once_make_one(pg: PgQueue, racing: sa.Connection) -> None:
    task = pg.external_task("report")
    racing.begin()
    pg.schedules.upsert(racing, "nightly", cron="0 4 * * *", task=task)
    other = threading.Thread(target=upsert, args=(pg,), kwargs={"cron": NIGHTLY})
    other.start()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    wait_for(lambda: scalar(pg.engine, waiting), "the second one to wait")

    racing.commit()
    other.join()

    assert [schedule.cron for schedule in pg.schedules.list()] == [NIGHTLY]
    assert schedules.BY_CODE not in {schedule.declared_by for schedule in pg.schedules.list()}
