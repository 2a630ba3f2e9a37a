"""Let a worker die at a chosen moment of an attempt, and see what a user's task makes of that.

The attempt is one of a worker as far as the database can tell: the same statements in the same transactions. Then its
connection is cut, which is all that the database learns of a process that was killed, and its lease is over at once. A
real worker finds the job and runs it again.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqueue import retention, within_limits
from pgqueue.assignment import with_middleware
from pgqueue.client import PgQueue, Task
from pgqueue.config import WorkerConfig
from pgqueue.engine import is_in_memory, make_async_engine, parse_url
from pgqueue.errors import ConfigurationError
from pgqueue.executor import execute, execute_async
from pgqueue.job import ClaimedJob, Completed, Job, Outcome
from pgqueue.rehearsal import CRASH_QUEUES, unraised, watched
from pgqueue.retry import decide
from pgqueue.task import TaskDefinition
from pgqueue.transactional import CommitGuard
from pgqueue.travel import let_lapse
from pgqueue.worker import Worker

#: When the worker dies: after the claim; when the function has returned and nothing of that is committed; or when
#: everything is, and the worker does not know.
CrashPoint = Literal["before_start", "before_commit", "after_commit"]

CRASH_POINTS: tuple[CrashPoint, ...] = get_args(CrashPoint)

#: Nobody takes the job back before the crash.
LEASE_SECONDS = 86_400.0

#: A test that runs at the same time, and lets time pass for all jobs, has the job locked until it ends.
LOCKED_SECONDS = 3.0


def crash(task: Task[..., Any], payload: Mapping[str, Any], /, *, at: CrashPoint) -> Job:
    """Enqueue a job, let the worker of its first attempt die at that point, and let another one have its turn; the job
    as it stands then.

    What is stored is committed, in the database of the task's queue, and stays: this is not for a test's transaction.
    """
    if at not in CRASH_POINTS:
        raise ConfigurationError(f"at must be one of {', '.join(CRASH_POINTS)}, got {at!r}")
    pgq = cast(PgQueue, task.pgq)  # nothing else registers tasks
    if is_in_memory(pgq.url):
        raise ConfigurationError("a crash needs a database that outlives its connection: PostgreSQL or a SQLite file")
    queue = f"{CRASH_QUEUES}{uuid.uuid4().hex[:12]}"  # with nothing else in it
    with pgq.begin() as connection:
        handle = task.using(queue=queue).enqueue(connection, **payload)
    if not handle.inserted:
        raise ConfigurationError(f"task {task.name!r} has a job with this unique key already, job {handle.id}")
    job = _attempt(pgq, task.name, queue, at)
    with pgq.begin() as connection:
        let_lapse(connection, pgq.tables, job.id, job.claim_token)
    Worker(pgq, WorkerConfig(queues={queue: 1}, drain=True, max_jobs=1, schedules=False, listen=False)).run()
    return pgq.get_job(handle.id)


def crash_matrix(
    task: Task[..., Any],
    payload: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    /,
    *,
    check: Callable[[Job], object],
) -> None:
    """Do `crash` at every point, and call `check` with the job each time. AssertionError naming the points after which
    it failed.

    payload: a function when every point needs rows of its own: it makes them, and returns the payload.
    check: whether everything is as after one undisturbed run. It raises, as `assert` does, when it is not.
    """
    failed: dict[CrashPoint, Exception] = {}
    for point in CRASH_POINTS:
        job = crash(task, payload() if callable(payload) else payload, at=point)
        try:
            check(job)
        except Exception as error:  # noqa: BLE001 — whatever a check raises
            failed[point] = error
    if failed:
        found = "".join(f"\n  {point}: {type(error).__name__}: {error}" for point, error in failed.items())
        raise AssertionError(
            f"task {task.name!r} does not survive the death of its worker at {', '.join(failed)}:{found}"
        ) from next(iter(failed.values()))


def _attempt(pgq: PgQueue, task: str, queue: str, at: CrashPoint) -> ClaimedJob:
    """Claim the job and work on it until that point; from there on nothing is heard of this worker."""
    worker = f"crashed:{uuid.uuid4().hex[:8]}"
    job = _claim(pgq, task, queue, worker)
    if at == "before_start":
        return job
    raised: list[BaseException] = []
    definition = with_middleware(pgq.tasks[task].definition, pgq)
    definition = definition.around(watched(definition, raised))
    end = _End(pgq, definition, job, worker, raised)
    if definition.is_async:
        asyncio.run(_run_async(end, at))
    elif definition.transactional:
        _run_transactional(end, at)
    else:
        outcome = execute(definition, job)
        end.require_completed(outcome)
        if at == "after_commit":
            with pgq.begin() as connection:
                end.write(connection, outcome)
    return job


def _claim(pgq: PgQueue, task: str, queue: str, worker: str) -> ClaimedJob:
    asked: dict[str, Any] = {
        "queue": queue,
        "worker": worker,
        "token": uuid.uuid4(),
        "limit": 1,
        "lease": LEASE_SECONDS,
        "tasks": [task],
    }
    pgq.declare_limits([task])
    deadline = time.monotonic() + LOCKED_SECONDS
    while True:
        with pgq.begin() as connection:
            claimed = within_limits.claim_as_needed(connection, pgq.tables, **asked).jobs
        if claimed:
            return claimed[0]
        if time.monotonic() >= deadline:
            raise ConfigurationError(
                f"the job of task {task!r} cannot be claimed: a limit, or another job, is in its way"
            )
        time.sleep(0.05)


class _End:
    """Writes the completion of one attempt."""

    def __init__(
        self, pgq: PgQueue, definition: TaskDefinition, job: ClaimedJob, worker: str, raised: list[BaseException]
    ) -> None:
        self.pgq = pgq
        self.definition = definition
        self.job = job
        self._worker = worker
        self._raised = raised

    def require_completed(self, outcome: Outcome) -> None:
        """A task that fails by itself does not come to the point. What it raised is raised."""
        if isinstance(outcome, Completed):
            return
        if self._raised:
            raise self._raised[-1]
        transition = decide(self.job, outcome, self.definition.retry, random=0.0)
        raise unraised(self.job, transition) or AssertionError(f"task {self.job.task!r} did not complete: {outcome}")

    def write(self, connection: sa.Connection, outcome: Outcome) -> None:
        transition = decide(self.job, outcome, self.definition.retry, random=0.0)
        transition.keep_seconds = self.definition.keep_seconds(transition.status)
        if not retention.finish(connection, self.pgq.tables, [transition], actor=self._worker):
            raise ConfigurationError(
                f"job {self.job.id} was taken from its worker before the crash: who changes jobs here?"
            )


def _run_transactional(end: _End, at: CrashPoint) -> None:
    connection = end.pgq.engine.connect()
    try:
        session = Session(connection, expire_on_commit=False)
        guard = CommitGuard(session, connection, end.definition)
        outcome = execute(end.definition, end.job, session)
        end.require_completed(outcome)
        session.flush()
        end.write(session.connection(), outcome)
        if at == "after_commit":
            guard.open = True
            session.commit()
    finally:
        connection.invalidate()
        connection.close()


async def _run_async(end: _End, at: CrashPoint) -> None:
    if not end.definition.transactional:
        outcome = await execute_async(end.definition, end.job)
        end.require_completed(outcome)
        if at == "after_commit":
            with end.pgq.begin() as sync_connection:
                end.write(sync_connection, outcome)
        return
    engine = make_async_engine(parse_url(end.pgq.url), pool_size=0)
    connection = await engine.connect()
    try:
        session = AsyncSession(connection, expire_on_commit=False)
        guard = CommitGuard(session.sync_session, connection.sync_connection, end.definition)
        outcome = await execute_async(end.definition, end.job, session)
        end.require_completed(outcome)
        await session.flush()
        await session.run_sync(lambda sync: end.write(sync.connection(), outcome))
        if at == "after_commit":
            guard.open = True
            await session.commit()
    finally:
        await connection.invalidate()
        await connection.close()
        await engine.dispose()
