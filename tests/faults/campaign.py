"""What the fault tests do again and again: a load of jobs, looking at how far it is, choosing a victim."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from faults.fleet import Fleet, Member
from sqlalchemy.orm import Session
from support import PATIENCE_SECONDS, rows, scalar, wait_for

from pgqueue import PgQueue

#: Between two looks at how far a load is: counting its jobs is a load itself.
LOOK_SECONDS = 0.05


def enqueue_load(pgq: PgQueue, count: int, *, seconds: float = 0.02) -> list[int]:
    """Enqueue transactional jobs, half `def`, half `async def`, that take `seconds` each; their ids."""
    with Session(pgq.engine) as session, session.begin():
        ids = []
        for task in ("charge", "charge_async"):
            ids += pgq.tasks[task].enqueue_many(session, [{"seconds": seconds}] * (count // 2))
    return ids


def jobs_table(pgq: PgQueue) -> str:
    return pgq.tables.jobs.fullname


def completed(pgq: PgQueue) -> int:
    """How many jobs are completed."""
    return statuses(pgq).get("completed", 0)


def wait_until_completed(pgq: PgQueue, count: int, what: str, *, timeout: float = PATIENCE_SECONDS) -> None:
    wait_for(lambda: completed(pgq) >= count, what, timeout=timeout, every=LOOK_SECONDS)


def statuses(pgq: PgQueue) -> dict[str, int]:
    """How many jobs have each status."""
    counts = rows(pgq.engine, f"SELECT status, count(*) AS count FROM {jobs_table(pgq)} GROUP BY status")
    return {row.status: row.count for row in counts}


def unfinished(pgq: PgQueue) -> int:
    query = f"SELECT count(*) FROM {jobs_table(pgq)} WHERE status IN ('pending', 'running')"
    count: int = scalar(pgq.engine, query)
    return count


def wait_until_all_final(pgq: PgQueue) -> None:
    wait_for(lambda: unfinished(pgq) == 0, "all jobs to be final", every=LOOK_SECONDS)


def held_by(pgq: PgQueue, worker: Member) -> int:
    """How many jobs the process has claimed and not finished."""
    query = f"SELECT count(*) FROM {jobs_table(pgq)} WHERE status = 'running' AND claimed_by LIKE :worker"
    count: int = scalar(pgq.engine, query, worker=f"%:{worker.pid}:%")
    return count


def freeze_a_busy_one(
    pgq: PgQueue, workers: Sequence[Member], chance: random.Random, *, feed: Callable[[], object] = lambda: None
) -> Member:
    """Freeze one of the workers while it is running jobs. `feed` is called before each look: it may see to it that
    there is always something to run."""

    def frozen() -> Member | None:
        feed()
        worker = chance.choice(workers)
        if held_by(pgq, worker) < 2:
            return None
        worker.freeze()
        # What it sent before may still end a job or two; several in the same moment are out of the question.
        if held_by(pgq, worker) >= 2:
            return worker
        worker.thaw()
        return None

    return wait_for(frozen, "a worker with running jobs")


def runs_started(pgq: PgQueue) -> int:
    """How many attempts have recorded that they run."""
    count: int = scalar(pgq.engine, "SELECT count(*) FROM runs")
    return count


def wait_for_status(pgq: PgQueue, job: int, status: str) -> None:
    wait_for(lambda: pgq.get_job(job).status == status, f"job {job} to be {status}")


def assert_quiet(fleet: Fleet) -> None:
    """No process met anything that it did not expect."""
    assert "Traceback" not in fleet.output(), fleet.output()
