"""Limits and order while workers are killed: never exceeded, never stuck."""

from __future__ import annotations

import random
from collections import Counter

from faults import ledger
from faults.campaign import freeze_a_busy_one, statuses, unfinished, wait_until_all_final, wait_until_completed
from faults.fleet import Fleet
from sqlalchemy.orm import Session
from support import rows

from pgqueue import PgQueue

KEYS, DOCUMENTS = "abc", "xyz"
KILLS = 10

RUNNING_BY_KEY = (
    "SELECT coalesce(concurrency_key, ordering_key), count(*) FROM pgqueue.jobs WHERE status = 'running' GROUP BY 1"
)

#: Pairs of one ordering key of which the later began before the earlier had run for the last time.
OVERLAPS = """
    WITH ran AS (
        SELECT j.id, j.ordering_key, min(r.id) AS first, max(r.id) AS last
          FROM pgqueue.jobs AS j
          JOIN runs AS r ON r.job_id = j.id
         WHERE j.ordering_key IS NOT NULL
         GROUP BY j.id
    )
    SELECT count(*)
      FROM ran AS one
      JOIN ran AS later ON later.ordering_key = one.ordering_key AND later.id > one.id
     WHERE later.first < one.last
"""


def test_workers_that_are_killed_leave_no_slot_taken_and_no_order_broken(pg_fleet: tuple[PgQueue, Fleet]) -> None:
    pgq, fleet = pg_fleet
    pgq.set_limits(task="charge", key_concurrency=2, concurrency=5)
    charge = pgq.tasks["charge"]
    ids: list[int] = []

    def feed() -> None:
        """However long a kill takes, there are jobs to be killed in."""
        if unfinished(pgq) >= 60:
            return
        with Session(pgq.engine) as session, session.begin():
            for n in range(60):
                ids.append(charge.using(concurrency_key=KEYS[n % 3], max_retries=50).enqueue(session, seconds=0.02).id)
                if n % 4 == 0:
                    key = DOCUMENTS[n // 4 % 3]
                    ids.append(charge.using(ordering_key=key, max_retries=50).enqueue(session, seconds=0.01).id)

    feed()
    workers = fleet.workers(4, prefetch=0)
    chance = random.Random(7)
    peaks: Counter[str] = Counter()

    def watch() -> None:
        for key, running in rows(pgq.engine, RUNNING_BY_KEY):
            peaks[key] = max(peaks[key], running)

    for kill in range(1, KILLS + 1):
        wait_until_completed(pgq, 5 * kill, f"progress before kill {kill}")
        watch()
        victim = freeze_a_busy_one(pgq, workers, chance, feed=feed)
        watch()
        victim.kill()
        workers.remove(victim)
        workers.append(fleet.worker(prefetch=0))
    wait_until_all_final(pgq)

    assert ledger.audit(pgq, acknowledged=ids) == []
    assert statuses(pgq) == {"completed": len(ids)}
    assert {key: peak for key, peak in peaks.items() if peak > (2 if key in KEYS else 1)} == {}
    assert rows(pgq.engine, OVERLAPS) == [(0,)]
