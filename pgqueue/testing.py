"""For the tests of applications: what was enqueued, and running it, inside of the test's own transaction.

    def test_checkout(session):
        checkout(session)

        assert_enqueued(session, resize, file="a.jpg")
        report = drain(session, pgq)
        assert report.completed == 1

Everything goes through the statements and the policy of a real worker, on the connection that the test hands over, and
ends with the test's transaction. The pytest plugin's fixture `pgqueue_tester` is a `Tester`, which knows both.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqueue import operations
from pgqueue.client import PgQueue, Task
from pgqueue.crashing import CRASH_POINTS, CrashPoint, crash, crash_matrix
from pgqueue.database import Database
from pgqueue.engine import begins_late
from pgqueue.errors import ConfigurationError
from pgqueue.job import Job
from pgqueue.operations import JobFilter
from pgqueue.rehearsal import ATTEMPTS_MAX, Attempt, DrainReport, Rehearsal, scheduler_of
from pgqueue.task import encode_json
from pgqueue.transaction import AsyncTransaction, SyncTransaction, open_transaction, run_in_transaction
from pgqueue.travel import travel as _age

__all__ = [
    "CRASH_POINTS",
    "Attempt",
    "CrashPoint",
    "DrainReport",
    "Tester",
    "assert_enqueued",
    "assert_enqueued_async",
    "crash",
    "crash_matrix",
    "drain",
    "drain_async",
    "enqueued",
    "enqueued_async",
    "inline",
    "refute_enqueued",
    "refute_enqueued_async",
    "travel",
    "travel_async",
]

T = TypeVar("T")

#: Jobs that are looked at; a test with more has another purpose.
JOBS_MAX = 10_000

#: The longest journey: what is stored must stay behind 1970.
TRAVEL_SECONDS_MAX = 20 * 366 * 86_400.0


# What was enqueued -----------------------------------------------------------------------------------------


def enqueued(session: SyncTransaction, task: Task[..., Any], /, **wanted: Any) -> list[Job]:
    """The jobs of the task that are pending in the transaction of `session`, due or not, in the order of their ids.

    wanted: values that the payload must have, as a worker would read them from JSON; other keys may have any.
    `queue` is the name of the queue. Where the payload has a key of that name: `payload={"queue": …}`.
    """
    return _in(session, "enqueued", task.pgq, lambda connection: _pending(connection, task, wanted))


def assert_enqueued(
    session: SyncTransaction, task: Task[..., Any], /, *, count: int | None = None, **wanted: Any
) -> Job:
    """Fail unless there is such a job, see `enqueued`; the first of them. count: unless there are exactly so many."""
    return _in(session, "assert_enqueued", task.pgq, lambda connection: _assert(connection, task, count, wanted))


def refute_enqueued(session: SyncTransaction, task: Task[..., Any], /, **wanted: Any) -> None:
    """Fail if there is such a job, see `enqueued`."""
    _in(session, "refute_enqueued", task.pgq, lambda connection: _refute(connection, task, wanted))


async def enqueued_async(session: AsyncTransaction, task: Task[..., Any], /, **wanted: Any) -> list[Job]:
    return await _in_async(session, "enqueued_async", task.pgq, lambda connection: _pending(connection, task, wanted))


async def assert_enqueued_async(
    session: AsyncTransaction, task: Task[..., Any], /, *, count: int | None = None, **wanted: Any
) -> Job:
    return await _in_async(
        session, "assert_enqueued_async", task.pgq, lambda connection: _assert(connection, task, count, wanted)
    )


async def refute_enqueued_async(session: AsyncTransaction, task: Task[..., Any], /, **wanted: Any) -> None:
    await _in_async(session, "refute_enqueued_async", task.pgq, lambda connection: _refute(connection, task, wanted))


def _pending(connection: sa.Connection, task: Task[..., Any], wanted: dict[str, Any]) -> list[Job]:
    return [job for job in _all_pending(connection, task) if _fits(job, wanted)]


def _assert(connection: sa.Connection, task: Task[..., Any], count: int | None, wanted: dict[str, Any]) -> Job:
    pending = _all_pending(connection, task)
    found = [job for job in pending if _fits(job, wanted)]
    if found and count in (None, len(found)):
        return found[0]
    many = "a job" if count is None else f"{count} jobs"
    raise AssertionError(
        f"expected {many} of task {task.name!r}{_described(wanted)}, found {len(found) or 'none'}. {_listed(pending)}"
    )


def _refute(connection: sa.Connection, task: Task[..., Any], wanted: dict[str, Any]) -> None:
    found = _pending(connection, task, wanted)
    if found:
        raise AssertionError(f"expected no job of task {task.name!r}{_described(wanted)}. {_listed(found)}")


def _all_pending(connection: sa.Connection, task: Task[..., Any]) -> list[Job]:
    tables = task.pgq._tables_of(connection)
    wanted = JobFilter(status="pending", task=task.name)
    return operations.jobs_after(connection, tables, wanted, after_id=0, limit=JOBS_MAX)


def _fits(job: Job, wanted: dict[str, Any]) -> bool:
    wanted = dict(wanted)
    queue = wanted.pop("queue", None)
    payload = wanted.pop("payload", {})
    if not isinstance(payload, Mapping):
        raise ConfigurationError(f"payload= takes a mapping of the payload's keys, got {type(payload).__name__}")
    wanted |= payload
    absent = object()
    return queue in (None, job.queue) and all(
        job.payload.get(name, absent) in (value, _as_stored(value)) for name, value in wanted.items()
    )


def _as_stored(value: Any) -> Any:
    """A value as it is in a payload: a date as its text, a tuple as a list."""
    return json.loads(encode_json({"value": value}, "the payload wanted"))["value"]


def _described(wanted: dict[str, Any]) -> str:
    return " with " + ", ".join(f"{name}={value!r}" for name, value in wanted.items()) if wanted else ""


def _listed(pending: list[Job]) -> str:
    shown = [f"\n  job {job.id}: queue {job.queue!r}, due {job.run_at}, payload {job.payload}" for job in pending[:20]]
    more = f"\n  … and {len(pending) - 20} more" if len(pending) > 20 else ""
    return "Pending of this task:" + "".join(shown) + more if shown else "No job of this task is pending."


# Running it ------------------------------------------------------------------------------------------------


def drain(
    session: SyncTransaction,
    pgq: PgQueue,
    /,
    *,
    queue: str | None = None,
    task: Task[..., Any] | None = None,
    raise_errors: bool = True,
    schedules: bool = False,
    attempts_max: int = ATTEMPTS_MAX,
) -> DrainReport:
    """Run the jobs that are due, and those that they enqueue, in the transaction of `session`, one after another.

    Each is claimed, run in a savepoint, and finished as a worker would: it may be retried, dead, snoozed or held back
    by a limit. A transactional task gets a session on this very connection. Jobs that are not due yet, and retries
    that wait for their backoff, are left; `travel` makes them due.

    raise_errors: what a task raises is raised here, once the end of its attempt is written. With False it is only in
    the report.
    schedules: enqueue first what the schedules say.
    queue, task: only jobs of these.
    attempts_max: AssertionError after so many, for tasks that enqueue themselves without end.

    Objects of a Session are expired, so that the test sees what the jobs have written.
    """
    target, connection = open_transaction(session, "drain", pgq._job_class)
    options = _options(queue, task, schedules)
    rehearsal = _rehearsal(pgq, target, connection, attempts_max, raise_errors)
    try:
        rehearsal.run(**options)
    finally:
        if isinstance(target, Session):
            target.expire_all()
    return rehearsal.report


async def drain_async(
    session: AsyncTransaction,
    pgq: PgQueue,
    /,
    *,
    queue: str | None = None,
    task: Task[..., Any] | None = None,
    raise_errors: bool = True,
    schedules: bool = False,
    attempts_max: int = ATTEMPTS_MAX,
) -> DrainReport:
    """As `drain`, on an AsyncSession or AsyncConnection. Nothing is expired: refresh what the jobs have changed."""
    options = _options(queue, task, schedules)

    def work(target: Session | sa.Connection, connection: sa.Connection) -> DrainReport:
        rehearsal = _rehearsal(pgq, target, connection, attempts_max, raise_errors)
        rehearsal.run(**options)
        return rehearsal.report

    return await run_in_transaction(session, "drain_async", pgq._job_class, work)


def _options(queue: str | None, task: Task[..., Any] | None, schedules: bool) -> dict[str, Any]:
    return {"queue": queue, "tasks": None if task is None else [task.name], "schedules": schedules}


def _rehearsal(
    pgq: PgQueue,
    target: Session | sa.Connection,
    connection: sa.Connection,
    attempts_max: int,
    raise_errors: bool,
) -> Rehearsal:
    shared = None
    if isinstance(target, Session):
        target.flush()
        if _has_savepoint(target, connection):
            if begins_late(connection):
                raise ConfigurationError(
                    "this SQLite engine leaves the begin of transactions to the driver, which takes the savepoint of "
                    "the test's session for a transaction and commits it. Use pgq.engine, or have the engine begin as "
                    "SQLAlchemy's documentation on SQLite and savepoints says"
                )
            shared = target
            keep, target.expire_on_commit = target.expire_on_commit, False
            target.commit()  # the savepoint; the test's transaction goes on
            target.expire_on_commit = keep
    return Rehearsal(pgq, connection, shared, attempts_max=attempts_max, raise_errors=raise_errors)


def _has_savepoint(session: Session, connection: sa.Connection) -> bool:
    """Whether the session has joined the test's transaction with a savepoint, so that its commit ends only that."""
    return (
        session.join_transaction_mode == "create_savepoint"
        and isinstance(session.bind, sa.Connection)
        and connection.in_nested_transaction()
        and not session.in_nested_transaction()
    )


@contextmanager
def inline(pgq: PgQueue, *, raise_errors: bool = True) -> Iterator[None]:
    """Meanwhile every enqueue is followed by a drain of its transaction: the job has run when the call returns.

    A job that another one enqueues runs once that has ended. What `session.add(task.new(…))` stores waits for the
    next enqueue or drain. Not for several threads at once.
    """

    def run(target: Session | sa.Connection, connection: sa.Connection) -> None:
        rehearsal = Rehearsal(pgq, connection, raise_errors=raise_errors)
        if rehearsal.is_under_way:
            return
        if isinstance(target, Session):
            target.flush()
        rehearsal.run()

    before, pgq._after_enqueue = pgq._after_enqueue, run
    try:
        yield
    finally:
        pgq._after_enqueue = before


# Time ------------------------------------------------------------------------------------------------------


def travel(
    session: SyncTransaction,
    pgq: PgQueue,
    /,
    *,
    seconds: float = 0.0,
    minutes: float = 0.0,
    hours: float = 0.0,
    days: float = 0.0,
) -> None:
    """Let so much time pass, for what is stored: jobs fall due, leases and pauses end, jobs expire, schedules tick.

    No clock is changed. Every moment in pgqueue's tables is moved into the past, in the transaction of `session`, which
    has to be rolled back: other jobs of the database become older, too.
    """
    total = _checked_journey(seconds, minutes, hours, days)
    _in(session, "travel", pgq, lambda connection: _travel(connection, pgq, total))


async def travel_async(
    session: AsyncTransaction,
    pgq: PgQueue,
    /,
    *,
    seconds: float = 0.0,
    minutes: float = 0.0,
    hours: float = 0.0,
    days: float = 0.0,
) -> None:
    """As `travel`."""
    total = _checked_journey(seconds, minutes, hours, days)
    await _in_async(session, "travel_async", pgq, lambda connection: _travel(connection, pgq, total))


def _travel(connection: sa.Connection, pgq: PgQueue, seconds: float) -> None:
    tables = pgq._tables_of(connection)
    scheduler_of(pgq, tables, actor="test").declare_in(connection)  # as workers did when they started
    _age(connection, tables, seconds=seconds)


def _checked_journey(seconds: float, minutes: float, hours: float, days: float) -> float:
    for name, value in (("seconds", seconds), ("minutes", minutes), ("hours", hours), ("days", days)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigurationError(f"{name} of travel() must be a number, got {type(value).__name__}")
    try:
        total = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
    except (OverflowError, ValueError):
        total = float("inf")
    if not 0 < total <= TRAVEL_SECONDS_MAX:
        raise ConfigurationError(
            f"travel() goes more than 0 and at most {TRAVEL_SECONDS_MAX:.0f} seconds ahead, got {total:g}; say how "
            "far, for example: minutes=31"
        )
    return total


# Both at hand ----------------------------------------------------------------------------------------------


class Tester:
    """The functions of this module for one queue and one session or connection; what the fixture gives."""

    __test__ = False  # for pytest: no class of tests

    def __init__(self, pgq: PgQueue, session: SyncTransaction) -> None:
        self.pgq = pgq
        self.session = session

    def enqueued(self, task: Task[..., Any], /, **wanted: Any) -> list[Job]:
        return enqueued(self.session, task, **wanted)

    def assert_enqueued(self, task: Task[..., Any], /, *, count: int | None = None, **wanted: Any) -> Job:
        return assert_enqueued(self.session, task, count=count, **wanted)

    def refute_enqueued(self, task: Task[..., Any], /, **wanted: Any) -> None:
        refute_enqueued(self.session, task, **wanted)

    def drain(
        self,
        *,
        queue: str | None = None,
        task: Task[..., Any] | None = None,
        raise_errors: bool = True,
        schedules: bool = False,
        attempts_max: int = ATTEMPTS_MAX,
    ) -> DrainReport:
        return drain(
            self.session,
            self.pgq,
            queue=queue,
            task=task,
            raise_errors=raise_errors,
            schedules=schedules,
            attempts_max=attempts_max,
        )

    def travel(self, *, seconds: float = 0.0, minutes: float = 0.0, hours: float = 0.0, days: float = 0.0) -> None:
        travel(self.session, self.pgq, seconds=seconds, minutes=minutes, hours=hours, days=days)

    @contextmanager
    def inline(self, *, raise_errors: bool = True) -> Iterator[None]:
        with inline(self.pgq, raise_errors=raise_errors):
            yield


def _in(given: object, call: str, pgq: Database, work: Callable[[sa.Connection], T]) -> T:
    target, connection = open_transaction(given, call, pgq._job_class)
    if isinstance(target, Session):
        target.flush()
    return work(connection)


def _in_async(given: object, call: str, pgq: Database, work: Callable[[sa.Connection], T]) -> Awaitable[T]:
    def flushed(target: Session | sa.Connection, connection: sa.Connection) -> T:
        if isinstance(target, Session):
            target.flush()
        return work(connection)

    return run_in_transaction(given, call, pgq._job_class, flushed)
