"""Bugs that a worker process can be started with, to prove that the ledger finds them.

Each is a mistake that a job queue may really contain. Where it shows only when two processes meet at the wrong
moment, the bug waits for that moment, so that the tests need no luck.

A bug that sits where nothing passes any more would prove nothing: each tells by a gate, STRUCK, that its code was run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqueue import store
from pgqueue.executor import execute
from pgqueue.job import ClaimedJob, Completed, EventType, Outcome, SweepResult, Transition
from pgqueue.retry import decide
from pgqueue.schema import Tables
from pgqueue.task import TaskDefinition
from pgqueue.transactional import Transactional

STRUCK = "bug_struck"

BACK_TO_PENDING = (
    "UPDATE pgqueue.jobs SET status = 'pending', claim_token = NULL, claim_expires_at = NULL, finished_at = NULL, "
    "retries = retries + :charge WHERE id = ANY(:ids) RETURNING id, queue, task, attempt, claimed_by, claimed_at"
)


def plant(bug: str, gates: Path) -> None:
    """Change this process's pgqueue for the worse."""
    BUGS[bug](gates)


def finish_without_fence(gates: Path) -> None:
    """A completion is written by id, whoever has the job now, and no heartbeat tells that a claim was lost."""

    def complete(connection: sa.Connection, tables: Tables, transition: Transition, *, frozen_after: float) -> bool:
        (gates / STRUCK).touch()
        statement = sa.text(
            "UPDATE pgqueue.jobs SET status = 'completed', claim_token = NULL, claim_expires_at = NULL, "
            "finished_at = now(), result = CAST(:result AS jsonb) WHERE id = :id"
        )
        connection.execute(statement, {"id": transition.job_id, "result": transition.result_json})
        return True

    def extend(
        connection: sa.Connection, tables: Tables, claims: Sequence[store.Claim], *, lease: float
    ) -> dict[int, bool]:
        return dict.fromkeys((job_id for job_id, _ in claims), False)

    store.complete_in_transaction = complete
    store.extend = extend


def effects_in_another_transaction(gates: Path) -> None:
    """A transactional task commits, and then its completion does."""

    def run(self: Transactional, definition: TaskDefinition, job: ClaimedJob) -> Outcome:
        (gates / STRUCK).touch()
        with Session(self._engine) as session, session.begin():
            return execute(definition, job, session)

    Transactional.run = run  # type: ignore[method-assign]


def completed_before_it_ran(gates: Path) -> None:
    """A job counts as done when it was handed out."""

    def run(self: Transactional, definition: TaskDefinition, job: ClaimedJob) -> None:
        (gates / STRUCK).touch()
        with self._engine.begin() as connection:
            transition = decide(job, Completed("1"), definition.retry, 0.0)
            store.finish(connection, self._tables, [transition], actor=job.claimed_by)
        with Session(self._engine) as session, session.begin():
            execute(definition, job, session)

    Transactional.run = run  # type: ignore[method-assign]


def sweep_without_second_look(gates: Path) -> None:
    """The sweep takes back what it found a moment ago, whatever became of it since. Waits there for a gate."""

    def sweep(connection: sa.Connection, tables: Tables, *, limit: int, actor: str, **_: Any) -> SweepResult:
        expired = "SELECT id FROM pgqueue.jobs WHERE status = 'running' AND claim_expires_at < now()"
        ids = list(connection.execute(sa.text(expired)).scalars())
        if not ids:
            return SweepResult()
        (gates / "expired_jobs_seen").touch()
        _wait(lambda: (gates / "sweep").exists())
        (gates / STRUCK).touch()
        swept = connection.execute(sa.text(BACK_TO_PENDING), {"ids": ids, "charge": 1}).all()
        store.record_all(
            connection,
            tables,
            swept,
            event=EventType.SWEEP,
            actor=actor,
            from_status="running",
            to_status="pending",
            reason="lease over",
        )
        return SweepResult(returned=ids)

    store.sweep = sweep


def claim_without_lock(gates: Path) -> None:
    """A claim updates what it found a moment ago. Two workers find the same, and one waits until the other has it."""
    claim = store.claim

    def claim_found(connection: sa.Connection, tables: Tables, **parameters: Any) -> list[ClaimedJob]:
        def pending() -> list[int]:
            return list(connection.execute(sa.text("SELECT id FROM pgqueue.jobs WHERE status = 'pending'")).scalars())

        if ids := pending():
            (gates / f"found-{os.getpid():09}").touch()
            _wait(lambda: len(list(gates.glob("found-*"))) == 2)
            if min(gates.glob("found-*")).name != f"found-{os.getpid():09}":
                _wait(lambda: not pending())
                (gates / STRUCK).touch()
                connection.execute(sa.text(BACK_TO_PENDING), {"ids": ids, "charge": 0})
        return claim(connection, tables, **parameters)

    store.claim = claim_found


def _wait(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


BUGS: dict[str, Callable[[Path], None]] = {
    bug.__name__: bug
    for bug in (
        finish_without_fence,
        effects_in_another_transaction,
        completed_before_it_ran,
        sweep_without_second_look,
        claim_without_lock,
    )
}
