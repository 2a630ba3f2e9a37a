"""Run due jobs inside of somebody's transaction, as a test wants it: by the worker's own policy and statements, but one
by one, in the calling thread, on that transaction's connection.

Each job has a savepoint; its claim and its end are written outside of that, so that they stay whatever the job did.
When a transactional task fails, its savepoint is rolled back, as in production its transaction is. When another task
fails, what it wrote and committed by itself stays, as in production.
"""

from __future__ import annotations

import asyncio
import time
import uuid
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from pgqueue import expiry, limits, reporting, results, retention, store, within_limits
from pgqueue.assignment import with_middleware
from pgqueue.client import PgQueue
from pgqueue.engine import is_aborted
from pgqueue.errors import Cancel, ConfigurationError, Discard, JobFailed, RetryAfter, Snooze
from pgqueue.events import EventName, event_of, events_of
from pgqueue.executor import execute, execute_async, outcome_of, timed_out
from pgqueue.holds import COUNTED, WorkerReport
from pgqueue.job import ClaimedJob, Completed, EventType, Outcome, Transition
from pgqueue.retry import decide
from pgqueue.scheduler import Scheduler
from pgqueue.schema import Tables
from pgqueue.task import TaskDefinition
from pgqueue.transactional import CommitGuard
from pgqueue.travel import due_queues

#: For the jitter: the longest wait, so that a retry is due after the same time in every run of a test.
LONGEST = 1.0

#: A drain makes no more attempts, unless told so.
ATTEMPTS_MAX = 1_000

#: How the queues of jobs begin that test crashes, with workers of their own: no drain takes these.
CRASH_QUEUES = "pgqueue-crash-"

#: Long enough for a debugger.
LEASE_SECONDS = 86_400.0

#: What is taken back or found expired in one go, which is everything.
ALL = 1_000_000

#: Connections on which a rehearsal is going on.
_busy: weakref.WeakSet[sa.Connection] = weakref.WeakSet()

#: How a task says how its attempt ends; nothing went wrong then.
DELIBERATE = (Snooze, RetryAfter, Cancel, Discard)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt that a drain made."""

    job_id: int
    task: str
    number: int  #: 1 for the first of its job
    ended: str  #: completed, retried, dead, cancelled, snoozed or released
    error: BaseException | None = None  #: what the task raised


@dataclass(slots=True)
class DrainReport(WorkerReport):
    """What a drain did, in attempts: `completed`, `retried`, `dead`, `cancelled`, `snoozed`; each one in `attempts`."""

    attempts: list[Attempt] = field(default_factory=list)

    @property
    def errors(self) -> list[BaseException]:
        """What the tasks raised, in order."""
        return [attempt.error for attempt in self.attempts if attempt.error is not None]

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in WorkerReport.__dataclass_fields__}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing done"


class Rehearsal:
    """Runs due jobs in the transaction of `connection`.

    session: one that the test shares with its tasks. It has to join the test's transaction with a savepoint, and that
    is ended before and after each job, so that commits and rollbacks in a task do not go beyond it.
    """

    def __init__(
        self,
        pgq: PgQueue,
        connection: sa.Connection,
        session: Session | None = None,
        *,
        attempts_max: int = ATTEMPTS_MAX,
        raise_errors: bool = True,
    ) -> None:
        self.report = DrainReport()
        self._pgq = pgq
        self._connection = connection
        self._session = session
        self._attempts_max = attempts_max
        self._raise_errors = raise_errors
        self._tables: Tables = pgq._tables_of(connection)
        self._definitions = {name: task.definition for name, task in pgq.tasks.items() if not task.external}
        self._worker = f"test:{uuid.uuid4().hex[:8]}"
        self._reports = reporting.Reports(lambda: None)

    @property
    def is_under_way(self) -> bool:
        """Whether jobs of this connection are run already, further up the stack, and these will have their turn."""
        return self._connection in _busy

    def run(self, *, queue: str | None = None, tasks: Sequence[str] | None = None, schedules: bool = False) -> None:
        """Run what is due until nothing is; `report` says what happened."""
        if self.is_under_way:
            raise ConfigurationError("a task cannot drain the transaction in which it is run itself")
        names = sorted(self._definitions if tasks is None else tasks)
        _busy.add(self._connection)
        reporting.reporters[self._worker] = self._reports.put
        try:
            self._prepare(schedules)
            while job := self._next(queue, names):
                self._attempt(job)
        finally:
            _busy.discard(self._connection)
            reporting.reporters.pop(self._worker, None)
            self._pgq._listeners.deliver()

    def _prepare(self, schedules: bool) -> None:
        """What workers do beside running jobs."""
        connection, tables = self._connection, self._tables
        outdated = limits.outdated(connection, tables, self._pgq.declared_limits, list(self._definitions))
        if outdated:
            limits.declare(connection, tables, outdated)
        keep_dead = {name: definition.keep_dead for name, definition in self._definitions.items()}
        retention.declare(connection, tables, retention.outdated(connection, tables, keep_dead))
        swept = store.sweep(connection, tables, limit=ALL, actor=self._worker)
        expired = expiry.expire(connection, tables, actor=self._worker, limit=ALL)
        self.report.swept += swept.count
        self.report.dead += len(swept.dead) + len(expired)
        self.report.cancelled += len(swept.cancelled)
        if schedules:
            scheduler = scheduler_of(self._pgq, tables, actor=self._worker)
            scheduler.declare_in(connection)
            scheduler.settle_in(connection)

    def _next(self, queue: str | None, tasks: Sequence[str]) -> ClaimedJob | None:
        """Claim one job, so that the next one is chosen when this one has ended."""
        queues = due_queues(self._connection, self._tables, tasks=tasks)
        for name in queues if queue is None else [queue] if queue in queues else []:
            claimed = [] if name.startswith(CRASH_QUEUES) else self._claim(name, tasks)
            if claimed:
                if len(self.report.attempts) >= self._attempts_max:
                    raise AssertionError(
                        f"drained {self._attempts_max} attempts, and jobs of queue {name!r} are still due: does a task "
                        "enqueue itself, or retry without a delay? If not, allow more with attempts_max"
                    )
                return claimed[0]
        return None

    def _claim(self, queue: str, tasks: Sequence[str]) -> list[ClaimedJob]:
        asked: dict[str, Any] = {
            "queue": queue,
            "worker": self._worker,
            "token": uuid.uuid4(),
            "limit": 1,
            "lease": LEASE_SECONDS,
            "tasks": tasks,
        }
        while True:
            found = within_limits.claim_as_needed(self._connection, self._tables, bounded=False, **asked)
            if found.jobs or not found.again:
                return found.jobs

    def _attempt(self, job: ClaimedJob) -> None:
        raised: list[BaseException] = []
        definition = with_middleware(self._definitions[job.task], self._pgq)
        definition = definition.around(watched(definition, raised))
        self._pgq._listeners.tell([event_of(EventName.STARTED, job)])
        began = time.monotonic()
        if definition.transactional:
            outcome = self._run_transactional(definition, job, raised)
        else:
            outcome = self._run_plain(definition, job)
        seconds = time.monotonic() - began
        transition = self._finish(definition, job, outcome)
        self.report.count(transition)
        self._pgq._listeners.tell(events_of(transition, job, seconds))
        error = raised[-1] if raised else unraised(job, transition)
        self.report.attempts.append(Attempt(job.id, job.task, job.attempt, COUNTED[transition.event], error))
        if error is not None and (_is_for_the_test(error) or (self._raise_errors and not _is_deliberate(error))):
            raise error

    def _run_plain(self, definition: TaskDefinition, job: ClaimedJob) -> Outcome:
        savepoint = self._connection.begin_nested()
        outcome = self._execute(definition, job)
        if self._session is not None and self._session.in_transaction():
            self._session.rollback()  # what it did not commit
        if not savepoint.is_active:
            raise ConfigurationError(
                f"task {job.task!r} committed or rolled back the transaction of the test. Give it a session that "
                'cannot: Session(connection, join_transaction_mode="create_savepoint")'
            )
        while (inner := self._connection.get_nested_transaction()) is not savepoint:
            assert inner is not None
            inner.rollback()  # of a session that it left open
        if is_aborted(self._connection):
            savepoint.rollback()
        else:
            savepoint.commit()
        return outcome

    def _execute(self, definition: TaskDefinition, job: ClaimedJob, *leading: Any) -> Outcome:
        if definition.is_async:
            return self._await(execute_async(definition, job, *leading), definition)
        began = time.monotonic()
        outcome = execute(definition, job, *leading)
        if definition.timeout is not None and time.monotonic() - began > definition.timeout:
            return timed_out(definition.retry, definition.timeout)  # it cannot be interrupted here
        return outcome

    def _run_transactional(self, definition: TaskDefinition, job: ClaimedJob, raised: list[BaseException]) -> Outcome:
        if definition.is_async:
            return self._await(self._run_transactional_async(definition, job, raised), definition)
        with Session(self._connection, expire_on_commit=False, join_transaction_mode="create_savepoint") as session:
            guard = CommitGuard(session, None, definition)
            outcome = self._execute(definition, job, session)
            if isinstance(outcome, Completed):
                try:
                    guard.open = True
                    session.commit()
                except Exception as error:  # noqa: BLE001 — the task's rows were refused
                    raised.append(error)
                    return outcome_of(error, definition.retry)
        return outcome

    async def _run_transactional_async(
        self, definition: TaskDefinition, job: ClaimedJob, raised: list[BaseException]
    ) -> Outcome:
        connection = AsyncConnection(AsyncEngine(self._connection.engine), self._connection)
        async with AsyncSession(
            connection, expire_on_commit=False, join_transaction_mode="create_savepoint"
        ) as session:
            guard = CommitGuard(session.sync_session, None, definition)
            outcome = await execute_async(definition, job, session)
            if isinstance(outcome, Completed):
                try:
                    guard.open = True
                    await session.commit()
                except Exception as error:  # noqa: BLE001 — as above
                    raised.append(error)
                    return outcome_of(error, definition.retry)
        return outcome

    def _await(self, running: Coroutine[Any, Any, Outcome], definition: TaskDefinition) -> Outcome:
        if self._connection.dialect.is_async:
            return await_only(running)
        problem = None
        if definition.transactional:
            problem = f"the transactional task {definition.name!r} is asynchronous, and the test's connection is not"
        elif _loop_is_running():
            problem = f"task {definition.name!r} is asynchronous, and so is the test"
        if problem is not None:
            running.close()
            raise ConfigurationError(f"{problem}: use `await drain_async(…)` with an AsyncSession or AsyncConnection")
        return asyncio.run(running)

    def _finish(self, definition: TaskDefinition, job: ClaimedJob, outcome: Outcome) -> Transition:
        transition = decide(job, outcome, definition.retry, LONGEST)
        transition.keep_seconds = definition.keep_seconds(transition.status)
        reports = self._reports.of([(job.id, job.claim_token)])
        if reports:
            self._reports.tried(reports, results.write_progress(self._connection, self._tables, reports))
        if not retention.finish(self._connection, self._tables, [transition], actor=self._worker):
            raise ConfigurationError(
                f"the claim on job {job.id} of task {job.task!r} is gone while it ran: the job was cancelled by force, "
                "deleted, or finished by somebody else"
            )
        return transition


def scheduler_of(pgq: PgQueue, tables: Tables, *, actor: str) -> Scheduler:
    """What a worker of the queue makes of schedules."""
    declared = list(pgq.declared_schedules.values())
    return Scheduler(tables, pgq.tasks, declared, actor=actor, enqueued=lambda queues: None)


def watched(definition: TaskDefinition, raised: list[BaseException]) -> Callable[..., Any]:
    """The task's function; what it raises is kept."""

    def run(*arguments: Any, **payload: Any) -> Any:
        try:
            return definition.function(*arguments, **payload)
        except BaseException as error:
            raised.append(error)
            raise

    async def run_async(*arguments: Any, **payload: Any) -> Any:
        try:
            return await definition.function(*arguments, **payload)
        except BaseException as error:
            raised.append(error)
            raise

    return run_async if definition.is_async else run


def unraised(job: ClaimedJob, transition: Transition) -> BaseException | None:
    """An error for an attempt that failed although its function raised nothing: what it was given or gave cannot be
    used, or it took too long."""
    if transition.error is None or transition.event not in (EventType.RETRY, EventType.DEAD):
        return None
    what = f"{transition.error.type}: {transition.error.message}"
    return JobFailed(f"task {job.task!r}, job {job.id}: {what}", job.id, transition.error)


def _is_deliberate(error: BaseException) -> bool:
    return isinstance(error, DELIBERATE)


def _is_for_the_test(error: BaseException) -> bool:
    """Ctrl-C, `pytest.fail()` and their like are no failures of a task."""
    return not isinstance(error, Exception | SystemExit | asyncio.CancelledError)


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
