"""Running tasks in the transaction that writes their completion: the two commit together, once, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from pgqueue import store
from pgqueue.assignment import Assignment
from pgqueue.engine import QUERY_WAIT_TIMEOUT, end_if_frozen, is_transient
from pgqueue.errors import IllegalTransition
from pgqueue.executor import execute_async, outcome_of
from pgqueue.finishing import Finisher
from pgqueue.holds import Holds
from pgqueue.job import ClaimedJob, Completed, Failed, Outcome, Released
from pgqueue.progressing import Progress
from pgqueue.retry import Retry, decide
from pgqueue.task import TaskDefinition

NOT_BEGUN = Released("the database could not be reached to begin the task's transaction", delay_seconds=1.0)


class Transactional:
    """Runs transactional tasks.

    A completion that was committed is settled here, and there is no outcome left to write: None.
    """

    def __init__(
        self,
        assignment: Assignment,
        holds: Holds,
        progress: Progress,
        finisher: Finisher,
        execute: Callable[[TaskDefinition, ClaimedJob, Session], Outcome | None],
    ) -> None:
        # With listeners of its own, on the same pool: to add some for each attempt takes a tenth of all its time.
        self._engine = assignment.engine.execution_options()
        self._guards: dict[sa.Connection, CommitGuard] = {}
        event.listen(self._engine, "commit", self._connection_commits)
        self._tables = assignment.tables
        self._lease = assignment.config.lease
        self._holds = holds
        self._progress = progress
        self._finisher = finisher
        self._execute = execute
        self.async_engine: AsyncEngine | None = None  #: of the worker's event loop, while that runs

    def run(self, definition: TaskDefinition, job: ClaimedJob) -> Outcome | None:
        """Run a task in the transaction that writes its completion. None when that was committed or refused."""
        try:
            connection = self._engine.connect()
        except Exception as error:  # noqa: BLE001 — the task did not begin
            return NOT_BEGUN if is_transient(error) else outcome_of(error, definition.retry)
        outcome: Outcome | None = None
        ending = False
        try:
            with connection, _GuardedSession(connection, expire_on_commit=False) as session:
                guard = session.guard = self._guards[connection] = CommitGuard(None, None, definition)
                outcome = self._execute(definition, job, session)
                if outcome is None:
                    connection.invalidate()  # the timeout may have struck anywhere in the driver
                    return None
                if not isinstance(outcome, Completed):
                    begun = not connection.invalidated or _has_begun(outcome)
                    session.rollback()
                    return outcome if begun else NOT_BEGUN
                session.flush()
                ending = self._holds.begin_end(job)
                if not ending:
                    session.rollback()
                    return None
                guard.open = self._complete_in(session.connection(), definition, job, outcome)
                if guard.open:
                    session.commit()
                else:
                    session.rollback()
        except BaseException as error:  # noqa: BLE001 — the task's rows, or the commit, were refused
            if ending:
                self._holds.take_back_end(job)
            return _outcome_of_broken(outcome, error, definition.retry)
        finally:
            self._guards.pop(connection, None)
        self._finisher.settle([decide(job, outcome, definition.retry, random=0.0)], {job.id} if guard.open else set())
        return None

    async def run_async(self, definition: TaskDefinition, job: ClaimedJob) -> Outcome | None:
        assert self.async_engine is not None
        outcome: Outcome | None = None
        ending = False
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    connection = await stack.enter_async_context(self.async_engine.connect())
                except Exception as error:  # noqa: BLE001 — the task did not begin
                    return NOT_BEGUN if is_transient(error) else outcome_of(error, definition.retry)
                # It begins its transaction when the task first uses it: on SQLite that keeps all others from writing.
                session = await stack.enter_async_context(AsyncSession(connection, expire_on_commit=False))
                sync_connection = connection.sync_connection
                assert sync_connection is not None
                guard = CommitGuard(session.sync_session, sync_connection, definition)
                outcome = await execute_async(definition, job, session)
                if not isinstance(outcome, Completed):
                    begun = not connection.invalidated or _has_begun(outcome)
                    await session.rollback()
                    return outcome if begun else NOT_BEGUN
                await session.flush()
                ending = self._holds.begin_end(job)
                if not ending:
                    await session.rollback()
                    return None
                completed = outcome
                guard.open = await session.run_sync(
                    lambda sync: self._complete_in(sync.connection(), definition, job, completed)
                )
                if guard.open:
                    await session.commit()
                else:
                    await session.rollback()
        except asyncio.CancelledError:
            if ending:
                self._holds.take_back_end(job)
            raise
        except BaseException as error:  # noqa: BLE001 — as above
            if ending:
                self._holds.take_back_end(job)
            return _outcome_of_broken(outcome, error, definition.retry)
        self._finisher.settle([decide(job, outcome, definition.retry, random=0.0)], {job.id} if guard.open else set())
        return None

    def _connection_commits(self, connection: sa.Connection) -> None:
        guard = self._guards.get(connection)
        if guard is not None:
            guard.refuse()

    def _complete_in(
        self, connection: sa.Connection, definition: TaskDefinition, job: ClaimedJob, outcome: Completed
    ) -> bool:
        """Complete the job in the task's own transaction; False when its claim was lost."""
        transition = self._finisher.retained(decide(job, outcome, definition.retry, random=0.0), job)
        if transition.keep_seconds is None and not self._progress.reports.latest:
            frozen_after = self._lease
            return store.complete_in_transaction(connection, self._tables, transition, frozen_after=frozen_after)
        end_if_frozen(connection, self._lease)  # from here to the commit the job's row is locked
        if self._progress.reports.latest:
            self._progress.write_last(connection, [transition])
        return bool(self._finisher.finish_in(connection, [transition]))


def _outcome_of_broken(outcome: Outcome | None, error: BaseException, policy: Retry) -> Outcome:
    """The outcome of a transactional attempt whose transaction broke.

    After a commit whose answer was lost this may be a completed job: then its claim is over, and the fence refuses
    what the finisher is about to write. A task that had already said how its attempt ends is heard.
    """
    if outcome is not None and not isinstance(outcome, Completed):
        return outcome
    broken = outcome_of(error, policy)
    return broken if _has_begun(broken) else NOT_BEGUN


def _has_begun(outcome: Outcome) -> bool:
    """Whether the transaction of this attempt, whose connection broke, had begun. A pooler can be reached, and yet
    have no connection to the server."""
    return not (isinstance(outcome, Failed) and QUERY_WAIT_TIMEOUT in outcome.error.message)


class CommitGuard:
    """Keeps a transactional task from committing its session or connection itself, which would part its rows from its
    completion."""

    def __init__(self, session: Session | None, connection: sa.Connection | None, definition: TaskDefinition) -> None:
        """session: None: one that calls `before_commit` by itself.
        connection: of this attempt alone; None: one that goes on afterwards, or whose owner calls `refuse`.
        """
        self.open = False
        self._name = definition.name
        if session is not None:
            event.listen(session, "before_commit", self.before_commit)
        if connection is not None:
            event.listen(connection, "commit", self.refuse)

    def before_commit(self, session: Session) -> None:
        if not session.in_nested_transaction():
            self.refuse()

    def refuse(self, *_: object) -> None:
        if not self.open:
            raise IllegalTransition(
                f"the transactional task {self._name!r} committed its session; leave that to the worker, which commits "
                "it together with the job's completion"
            )


class _GuardedSession(Session):
    """One whose class is listened to, once for all of them."""

    guard: CommitGuard | None = None


@event.listens_for(_GuardedSession, "before_commit")
def _session_commits(session: _GuardedSession) -> None:
    if session.guard is not None:
        session.guard.before_commit(session)
