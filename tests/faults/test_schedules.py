"""Schedules while workers are killed: each tick gets its job, once."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from faults.fleet import Fleet
from sqlalchemy.orm import Session
from support import execute, rows, scalar, wait_for

from pgqueue import PgQueue
from pgqueue.cron import CronRule

SCHEDULES = 6
MISSED = timedelta(minutes=500)
KILLS = 12

#: How many ticks are settled.
SETTLED = "SELECT count(*) FROM pgqueue.schedule_ticks"

OPEN = "SELECT count(*) FROM pgqueue.schedules WHERE next_tick_at <= now()"


def test_while_workers_are_killed_each_tick_gets_exactly_one_job(pg_fleet: tuple[PgQueue, Fleet]) -> None:
    pgq, fleet = pg_fleet
    first = datetime.now(UTC).replace(microsecond=0) - MISSED
    make_schedules(pgq, first)
    chance = random.Random(9)
    workers = fleet.workers(3)

    kills = 0
    for goal in itertools.count(step=150):
        wait_for(lambda goal=goal: scalar(pgq.engine, SETTLED) > goal or not scalar(pgq.engine, OPEN), "more ticks")
        if not scalar(pgq.engine, OPEN) or kills == KILLS:
            break
        time.sleep(chance.uniform(0.0, 0.03))  # at any point of the next transaction
        victim = workers.pop(chance.randrange(len(workers)))
        victim.kill()
        kills += 1
        workers.append(fleet.worker())
    wait_for(lambda: not scalar(pgq.engine, OPEN), "every tick to be settled")
    for worker in workers:
        worker.kill()

    assert kills == KILLS
    assert_each_tick_has_its_job(pgq, first)


def make_schedules(pgq: PgQueue, first: datetime) -> None:
    """Schedules whose ticks were missed for a while; nobody runs their jobs."""
    task = pgq.tasks["charge"].using(queue="elsewhere")
    with Session(pgq.engine) as session, session.begin():
        for number in range(SCHEDULES):
            pgq.schedules.upsert(session, f"s{number}", cron="* * * * *", task=task, catchup="all")
    execute(pgq.engine, "UPDATE pgqueue.schedules SET next_tick_at = :first", first=first)


def assert_each_tick_has_its_job(pgq: PgQueue, first: datetime) -> None:
    jobs = rows(pgq.engine, "SELECT id, metadata->>'schedule', metadata->>'tick_at' FROM pgqueue.jobs")
    made = sorted((name, datetime.fromisoformat(tick), job_id) for job_id, name, tick in jobs)
    ticks = rows(pgq.engine, "SELECT schedule, tick_at, job_id FROM pgqueue.schedule_ticks")
    assert made == sorted(tuple(tick) for tick in ticks)
    assert [(name, tick) for name, tick, _ in made] == sorted(expected(pgq, first))


def expected(pgq: PgQueue, first: datetime) -> Iterator[tuple[str, datetime]]:
    for schedule in pgq.schedules.list():
        ticks = CronRule("* * * * *").ticks_after(first - timedelta(seconds=1))
        for tick in itertools.takewhile(lambda tick, end=schedule.next_tick_at: tick < end, ticks):
            yield schedule.name, tick
