"""Proof that the ledger bites: each scenario balances with the worker as it is, and not with a bug planted in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from faults import ledger
from faults.bugs import STRUCK
from faults.campaign import enqueue_load, runs_started, wait_for_status, wait_until_all_final
from faults.fleet import Fleet
from sqlalchemy.orm import Session
from support import execute, scalar, wait_for

from pgqueue import PgQueue

Scenario = Callable[[PgQueue, Fleet, str | None], None]


def a_frozen_worker_goes_on(pgq: PgQueue, fleet: Fleet, bug: str | None) -> None:
    job = enqueue(pgq, "hold", until="done")
    frozen = fleet.worker(bug=bug)
    wait_for(lambda: runs_started(pgq) == 1, "the job to run")
    frozen.freeze()
    fleet.open_gate("done")
    fleet.worker(bug=bug)
    wait_for_status(pgq, job, "completed")
    frozen.thaw()
    frozen.terminate()
    frozen.exit_code()


def a_worker_dies_right_after_a_commit(pgq: PgQueue, fleet: Fleet, bug: str | None) -> None:
    enqueue(pgq, "die", when="after_commit")
    assert fleet.worker(bug=bug).exit_code() == -9
    fleet.worker(bug=bug)
    wait_until_all_final(pgq)


def a_worker_dies_in_the_task(pgq: PgQueue, fleet: Fleet, bug: str | None) -> None:
    enqueue(pgq, "die", when="in_task")
    assert fleet.worker(bug=bug).exit_code() == -9
    fleet.worker(bug=bug)
    wait_until_all_final(pgq)


def a_job_is_finished_late_while_it_is_being_swept(pgq: PgQueue, fleet: Fleet, bug: str | None) -> None:
    job = enqueue(pgq, "hold", until="done")
    late = fleet.worker(sweep_interval=1000)
    wait_for(lambda: runs_started(pgq) == 1, "the job to run")
    late.freeze()
    fleet.worker(bug=bug)
    if bug:
        wait_for((fleet.gates / "expired_jobs_seen").exists, "the sweep to have seen the job")
    fleet.open_gate("done")
    late.thaw()
    wait_for_status(pgq, job, "completed")
    fleet.open_gate("sweep")
    late.terminate()
    late.exit_code()
    wait_for(lambda: not bug or scalar(pgq.engine, "SELECT count(*) FROM pgqueue.job_events"), "the sweep")
    wait_until_all_final(pgq)


def two_workers_look_for_jobs_at_once(pgq: PgQueue, fleet: Fleet, bug: str | None) -> None:
    fleet.workers(2, bug=bug)
    enqueue(pgq, "charge")
    if bug:
        wait_for((fleet.gates / STRUCK).exists, "the second worker to claim the same job")
    wait_until_all_final(pgq)


@pytest.mark.parametrize(
    ("scenario", "bug", "finding"),
    [
        (a_frozen_worker_goes_on, "finish_without_fence", "2 effects, expected 1"),
        (a_worker_dies_right_after_a_commit, "effects_in_another_transaction", "2 effects, expected 1"),
        (a_worker_dies_in_the_task, "completed_before_it_ran", "0 effects, expected 1"),
        (a_job_is_finished_late_while_it_is_being_swept, "sweep_without_second_look", "2 effects, expected 1"),
        (two_workers_look_for_jobs_at_once, "claim_without_lock", "attempts in its row, the ends of"),
    ],
)
def test_the_ledger_balances_without_the_bug_and_names_what_the_bug_did(
    pg_fleet: tuple[PgQueue, Fleet], scenario: Scenario, bug: str, finding: str
) -> None:
    pgq, fleet = pg_fleet

    scenario(pgq, fleet, None)
    without = ledger.audit(pgq)
    start_afresh(pgq, fleet)
    scenario(pgq, fleet, bug)
    with_bug = ledger.audit(pgq)

    assert without == []
    assert (fleet.gates / STRUCK).exists(), "the code of the bug was never run"
    assert any(finding in problem for problem in with_bug), with_bug


#: What is done to one job each, and what the ledger is to say of it.
DAMAGES = [
    ("DELETE FROM pgqueue.jobs WHERE id = :job", "ran but does not exist"),
    ("UPDATE pgqueue.jobs SET status = 'pending', finished_at = NULL WHERE id = :job", "is pending, not final"),
    ("UPDATE pgqueue.jobs SET retries = 1 WHERE id = :job", "1 retries in its row, 0 in its events"),
    ("UPDATE pgqueue.jobs SET result = '2' WHERE id = :job", "with the result of attempt 2"),
    ("UPDATE pgqueue.jobs SET attempt = 2, result = '2' WHERE id = :job", "2 attempts in its row, the ends of 1"),
    ("UPDATE pgqueue.jobs SET status = 'dead' WHERE id = :job", "is dead, but its last event made it pending"),
    ("DELETE FROM effects WHERE job_id = :job", "0 effects, expected 1"),
    ("INSERT INTO effects (job_id, attempt) VALUES (:job, 1)", "2 effects, expected 1"),
    ("UPDATE effects SET attempt = 2 WHERE job_id = :job", "an effect of attempt 2, but attempt 1 was the last"),
    ("DELETE FROM runs WHERE job_id = :job", "completed, but its attempt 1 never ran"),
    ("INSERT INTO runs (job_id, attempt, claim_token, pid) VALUES (:job, 1, 'x', 1)", "attempt 1 ran 2 times"),
    (
        "INSERT INTO runs (job_id, attempt, claim_token, pid) SELECT :job, 2, claim_token, 1 FROM runs"
        " WHERE job_id = :job",
        "2 runs under 1 claims",
    ),
    (
        "INSERT INTO pgqueue.job_events (job_id, queue, event, actor, attempt, from_status, to_status)"
        " VALUES (:job, 'default', 'sweep', 'x', 1, 'completed', 'pending')",
        "event sweep from completed to pending is against the rules",
    ),
    (
        "INSERT INTO pgqueue.job_events (job_id, queue, event, actor, attempt, from_status, to_status)"
        " VALUES (:job, 'default', 'sweep', 'x', 2, 'running', 'pending')",
        "event sweep ends attempt 2 after attempt 0 ended",
    ),
    (
        "INSERT INTO pgqueue.job_events (job_id, queue, event, actor, attempt, from_status, to_status)"
        " SELECT :job, 'default', event, 'x', 1, 'running', to_status"
        " FROM (VALUES ('dead', 'dead'), ('retry', 'pending')) AS two (event, to_status)",
        "event retry after the job was dead",
    ),
    (
        "WITH again AS (UPDATE pgqueue.jobs SET attempt = 2, result = '2', retries = 1 WHERE id = :job), "
        "later AS (INSERT INTO runs (job_id, attempt, claim_token, pid) VALUES (:job, 2, 'x', 1)) "
        "INSERT INTO pgqueue.job_events (at, job_id, queue, event, actor, attempt, from_status, to_status)"
        " VALUES (now() + interval '1 s', :job, 'default', 'sweep', 'x', 1, 'running', 'pending')",
        "attempt 2 began before attempt 1 was over",
    ),
]


def test_the_ledger_finds_each_kind_of_damage(pg_fleet: tuple[PgQueue, Fleet]) -> None:
    pgq, fleet = pg_fleet
    ids = enqueue_load(pgq, len(DAMAGES) + len(DAMAGES) % 2, seconds=0.0)
    fleet.worker(drain=True).exit_code()
    before = ledger.audit(pgq, acknowledged=ids)

    for job, (damage, _) in zip(ids, DAMAGES, strict=False):
        execute(pgq.engine, damage, job=job)

    after = ledger.audit(pgq, acknowledged=ids)
    assert before == []
    assert f"job {ids[0]}: enqueued but not there" in after
    for job, (damage, finding) in zip(ids, DAMAGES, strict=False):
        found = [problem for problem in after if problem.startswith((f"job {job} ", f"job {job}:"))]
        assert any(finding in problem for problem in found), (damage, found)


@pytest.mark.parametrize("bug", [None, "job enqueued outside the transaction"])
def test_the_ledger_finds_a_job_whose_business_row_was_never_committed(
    pg_fleet: tuple[PgQueue, Fleet], bug: str | None
) -> None:
    pgq, fleet = pg_fleet

    fleet.enqueuer(bug=bug, die_before_commit=True).exit_code()

    assert ledger.audit_orders(pgq) == (["order 1: a job, but no order"] if bug else [])


def enqueue(pgq: PgQueue, task: str, **payload: str) -> int:
    with Session(pgq.engine) as session, session.begin():
        return pgq.tasks[task].enqueue(session, **payload).id


def start_afresh(pgq: PgQueue, fleet: Fleet) -> None:
    for member in fleet.members:
        member.kill()
    for gate in fleet.gates.iterdir():
        gate.unlink()
    execute(pgq.engine, "TRUNCATE pgqueue.jobs, pgqueue.job_events, runs, effects")
