"""Eight processes on one SQLite file, some of them killed."""

from __future__ import annotations

import random

from faults import ledger
from faults.campaign import completed, enqueue_load, held_by, statuses, wait_until_all_final
from faults.conftest import MakeFleet
from sqlalchemy.orm import Session
from support import scalar, wait_for

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
    wait_for(lambda: completed(pgq) >= JOBS // 4, "progress before the first kill")
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
