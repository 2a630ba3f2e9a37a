"""The caller's transaction: which connection an enqueue goes through, and what happens when it commits."""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, SessionTransaction, scoped_session
from sqlalchemy.util import await_only

from pgqueue.engine import commits_by_itself
from pgqueue.errors import NotAwaited, WrongSession
from pgqueue.job import Job
from pgqueue.shield import shielded

logger = logging.getLogger(__name__)

T = TypeVar("T")

SyncTransaction = Session | scoped_session[Session] | sa.Connection
AsyncTransaction = AsyncSession | async_scoped_session[AsyncSession] | AsyncConnection

#: Called with the queues that have new jobs, and whether the commit is already over.
Wake = Callable[[set[str], bool], None]

_WAKES = "pgqueue_wakes"
_UNAWAITED = "pgqueue_unawaited"

_connection_wakes: weakref.WeakKeyDictionary[sa.Connection, dict[Wake, set[str]]] = weakref.WeakKeyDictionary()
_connection_tells: weakref.WeakKeyDictionary[sa.Connection, _Tells] = weakref.WeakKeyDictionary()
_connection_unawaited: weakref.WeakKeyDictionary[sa.Connection, dict[object, str]] = weakref.WeakKeyDictionary()


def open_transaction(
    given: object, call: str, job_class: type[Job] | None
) -> tuple[Session | sa.Connection, sa.Connection]:
    """The session or connection that was given, and the connection of its transaction. Raises WrongSession.

    job_class: the mapped one, if known. It tells a session with several databases which one to use.
    """
    if isinstance(given, scoped_session):
        given = given()
    if isinstance(given, Session):
        return given, _connection_of(given, job_class)
    if isinstance(given, sa.Connection):
        return given, given
    if isinstance(given, AsyncSession | async_scoped_session | AsyncConnection):
        raise WrongSession(
            f"{call}() takes a synchronous Session or Connection, got {type(given).__name__}; "
            f"use: await ….{call}_async(…)"
        )
    raise _refusal(given, call, "a Session, scoped_session or Connection")


async def run_in_transaction(
    given: object,
    call: str,
    job_class: type[Job] | None,
    work: Callable[[Session | sa.Connection, sa.Connection], T],
) -> T:
    """Run `work` on the transaction of an asynchronous session or connection. Raises WrongSession."""
    given = checked_async(given, call)
    if isinstance(given, AsyncSession):
        return await given.run_sync(lambda session: work(session, _connection_of(session, job_class)))
    return await given.run_sync(lambda connection: work(connection, connection))


def pause(connection: sa.Connection, seconds: float) -> None:
    """Wait within a transaction; an asynchronous one's event loop goes on meanwhile."""
    if connection.dialect.is_async:
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def _connection_of(session: Session, job_class: type[Job] | None) -> sa.Connection:
    return session.connection(bind_arguments={} if job_class is None else {"mapper": sa.inspect(job_class)})


def open_root(connection: sa.Connection) -> sa.RootTransaction | None:
    """The outermost transaction of the connection; None where each statement commits by itself."""
    in_transaction = getattr(connection.connection.driver_connection, "in_transaction", None)  # as SQLite says it
    by_itself = commits_by_itself(connection) if in_transaction is None else not in_transaction
    return None if by_itself else connection.get_transaction()


def checked_async(given: object, call: str) -> AsyncSession | AsyncConnection:
    if isinstance(given, async_scoped_session):
        given = given()
    if isinstance(given, AsyncSession | AsyncConnection):
        return given
    if isinstance(given, Session | scoped_session | sa.Connection):
        raise WrongSession(
            f"{call}() takes an AsyncSession or AsyncConnection, got {type(given).__name__}; "
            f"use: ….{call.removesuffix('_async')}(session, …)"
        )
    raise _refusal(given, call, "an AsyncSession, async_scoped_session or AsyncConnection")


def _refusal(given: object, call: str, expected: str) -> WrongSession:
    hint = ""
    if isinstance(given, sa.Engine | AsyncEngine):
        hint = ": an engine is not a transaction; open one with `with Session(engine) as session, session.begin():`"
    elif isinstance(given, type) or callable(given):
        hint = ": is this a factory that still has to be called?"
    return WrongSession(f"{call}() takes {expected} as its session, got {type(given).__name__}{hint}")


# After the commit ------------------------------------------------------------------------------------------


def wake_after_commit(target: Session | sa.Connection, connection: sa.Connection, queue: str, wake: Wake) -> None:
    """Call `wake` with the queue once the transaction of `target` is committed; never when it is rolled back.

    connection: the one of that transaction, `target` itself or the session's.

    A wake-up is a hint: losing one costs a poll interval. So it never goes out inside the transaction, where a
    NOTIFY takes a lock for the whole server through the commit's fsync.
    """
    if commits_by_itself(connection):
        _send({wake: {queue}}, committed=True)
        return
    if isinstance(target, Session):
        wakes = target.info.get(_WAKES)
        if wakes is None:
            wakes = target.info[_WAKES] = {}
            event.listen(target, "after_commit", _session_committed)
            event.listen(target, "after_transaction_end", _session_transaction_ended)
    else:
        wakes = _connection_wakes.get(target)
        if wakes is None:
            wakes = _connection_wakes[target] = {}
            event.listen(target, "commit", _connection_commits)
            event.listen(target, "commit_twophase", _connection_commits_twophase)
            event.listen(target, "rollback", _connection_rolls_back)
            event.listen(target, "rollback_twophase", _connection_rolls_back_twophase)
    wakes.setdefault(wake, set()).add(queue)


def _session_committed(session: Session) -> None:
    if session.in_nested_transaction():
        return  # a savepoint was released; the transaction goes on
    _send(session.info.get(_WAKES, {}), committed=True)


def _session_transaction_ended(session: Session, transaction: SessionTransaction) -> None:
    # After a commit nothing is left; what is left was rolled back, or closed without a commit.
    if transaction.parent is None:
        session.info.get(_WAKES, {}).clear()


def _connection_commits(connection: sa.Connection) -> None:
    # SQLAlchemy tells of a connection's commit just before it happens.
    _send(_connection_wakes.get(connection, {}), committed=False)


def _connection_commits_twophase(connection: sa.Connection, xid: Any, is_prepared: bool) -> None:
    _connection_commits(connection)


def _connection_rolls_back(connection: sa.Connection) -> None:
    _connection_wakes.get(connection, {}).clear()


def _connection_rolls_back_twophase(connection: sa.Connection, xid: Any, is_prepared: bool) -> None:
    _connection_rolls_back(connection)


def _send(wakes: dict[Wake, set[str]], *, committed: bool) -> None:
    if not wakes:
        return
    with shielded():
        due = list(wakes.items())
        wakes.clear()
        for wake, queues in due:
            try:
                wake(queues, committed)
            except Exception:  # the jobs are stored; nothing about a hint may fail the commit
                logger.exception(
                    "the wake-up for queues %s failed; their workers will find the jobs by polling", queues
                )


def tell_after_commit(connection: sa.Connection, tell: Callable[[], None]) -> None:
    """Call `tell` once what was done on this connection until now is committed; never when it is rolled back, not even
    to a savepoint. Unlike a wake-up it is no hint: it happens after the commit, exactly then, and once."""
    if commits_by_itself(connection):
        _tell([tell])
        return
    told = _connection_tells.get(connection)
    if told is None:
        told = _connection_tells[connection] = _Tells()
        told.watch(connection)
    told.waiting.append(tell)


class _Tells:
    """What is to be told once a connection's transaction is committed."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self._savepoints: dict[str, int] = {}  # how much was waiting when each began

    def watch(self, connection: sa.Connection) -> None:
        event.listen(connection, "rollback", lambda _: self._forget())
        event.listen(connection, "rollback_twophase", lambda *_: self._forget())
        event.listen(connection, "rollback_savepoint", lambda _, name, context: self._forget_since(name))
        # SQLAlchemy tells of a commit just before it happens and has no event for the moment after; and it tells of a
        # savepoint before that has a name.
        for name, watched in (
            ("_commit_impl", self._then_tell),
            ("_commit_twophase_impl", self._then_tell),
            ("_savepoint_impl", self._then_mark),
        ):
            setattr(connection, name, watched(getattr(connection, name)))

    def _then_tell(self, commit: Callable[..., None]) -> Callable[..., None]:
        def commit_and_tell(*arguments: object) -> None:
            due = list(self.waiting)
            self._forget()
            commit(*arguments)
            _tell(due)

        return commit_and_tell

    def _then_mark(self, begin: Callable[..., str]) -> Callable[..., str]:
        def begin_and_mark(*arguments: object) -> str:
            name = begin(*arguments)
            self._savepoints[name] = len(self.waiting)
            return name

        return begin_and_mark

    def _forget(self) -> None:
        self.waiting.clear()
        self._savepoints.clear()

    def _forget_since(self, savepoint: str) -> None:
        # All of it, when the savepoint is older than what is waiting.
        del self.waiting[self._savepoints.get(savepoint, 0) :]


def _tell(due: Sequence[Callable[[], None]]) -> None:
    """After a commit: nothing that goes wrong may look as if that had failed."""
    with shielded():
        for tell in due:
            try:
                tell()
            except Exception:
                logger.exception("listeners could not be told of what was just committed")


# A coroutine that was forgotten ----------------------------------------------------------------------------


class MustAwait(Awaitable[T], Generic[T]):
    """What the `_async` calls return: awaitable once, and loud when forgotten.

    A forgotten one makes the commit of its session fail, and warns when it is thrown away.
    """

    def __init__(self, start: Callable[[], Awaitable[T]], call: str, target: AsyncSession | AsyncConnection) -> None:
        self._start: Callable[[], Awaitable[T]] | None = start
        self._call = call
        self._unawaited = _expect_await(target)
        self._key = object()  # not id(self), which the next object may have once this one is thrown away
        self._unawaited[self._key] = call

    def __await__(self) -> Generator[Any, None, T]:
        if self._start is None:
            raise RuntimeError(f"{self._call} was awaited twice")
        start, self._start = self._start, None
        self._unawaited.pop(self._key, None)
        return start().__await__()

    def __del__(self) -> None:
        if getattr(self, "_start", None) is not None:
            warnings.warn(f"{self._call} was never awaited: nothing was enqueued", RuntimeWarning, stacklevel=2)


def _expect_await(target: AsyncSession | AsyncConnection) -> dict[object, str]:
    """The calls on this session that were not awaited yet; from now on its commit fails while there are any."""
    unawaited: dict[object, str] | None
    if isinstance(target, AsyncSession):
        session = target.sync_session
        unawaited = session.info.get(_UNAWAITED)
        if unawaited is None:
            unawaited = session.info[_UNAWAITED] = {}
            event.listen(
                session, "before_commit", lambda committing: _require_awaited(committing.info.get(_UNAWAITED, {}))
            )
        return unawaited
    connection = target.sync_connection
    if connection is None:
        return {}  # not started: awaiting will say so
    unawaited = _connection_unawaited.get(connection)
    if unawaited is None:
        unawaited = _connection_unawaited[connection] = {}
        event.listen(
            connection,
            "commit",
            lambda committing: _require_awaited(_connection_unawaited.get(committing, {})),
        )
    return unawaited


def _require_awaited(unawaited: dict[object, str]) -> None:
    if unawaited:
        calls = ", ".join(unawaited.values())
        unawaited.clear()
        raise NotAwaited(f"{calls} was never awaited, so nothing was enqueued; put `await` in front of it")
