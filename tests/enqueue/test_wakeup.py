"""Wake-ups on PostgreSQL: after the commit, once per queue, never in the application's transaction."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from jobs import add, claim_one, died, external, finish, statuses
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support import PATIENCE_SECONDS, execute

from pgqueue import PgQueue
from pgqueue.notifier import channel

#: The queue whose wake-up ends a test: what was to come before it has come.
MARKER = "marker"


class Listener:
    def __init__(self, pg: PgQueue) -> None:
        self._pg = pg
        self._came: deque[str] = deque()
        url = pg.url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._connection = psycopg.connect(url, autocommit=True)
        self._connection.execute(f'LISTEN "{channel(pg.schema)}"')

    def next(self) -> str:
        assert self.has_more(timeout=PATIENCE_SECONDS), "no wake-up came"
        return self._came.popleft()

    def has_more(self, *, timeout: float) -> bool:
        if not self._came:  # one answer of the server may hold several
            notices = self._connection.notifies(timeout=timeout, stop_after=1)
            self._came.extend(notice.payload for notice in notices)
        return bool(self._came)

    def until_marker(self) -> list[str]:
        """Enqueue into the marker's queue; the queues whose wake-ups came before that one's."""
        add(self._pg, queue=MARKER)
        came = []
        while (queue := self.next()) != MARKER:
            came.append(queue)
        return came

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def listener(pg: PgQueue) -> Iterator[Listener]:
    listening = Listener(pg)
    yield listening
    listening.close()


@pytest.fixture
def theirs(pg: PgQueue) -> Iterator[sa.Engine]:
    """The application's own engine, so that its statements can be told from pgqueue's."""
    engine = sa.create_engine(pg.url)
    yield engine
    engine.dispose()


def test_a_commit_of_a_session_wakes_its_queue(pg: PgQueue, listener: Listener) -> None:
    with Session(pg.engine) as session:
        external(pg).using(queue="mail").enqueue(session, n=1)
        session.commit()

        assert listener.next() == "mail"


def test_a_commit_of_a_connection_wakes_its_queue(pg: PgQueue, listener: Listener) -> None:
    with pg.engine.connect() as connection:
        external(pg).using(queue="mail").enqueue(connection, n=1)
        connection.commit()

        assert listener.next() == "mail"


def test_a_job_added_to_a_session_wakes_its_queue(pg: PgQueue, listener: Listener) -> None:
    with Session(pg.engine) as session, session.begin():
        session.add(external(pg).using(queue="mail").new(n=1))

    assert listener.next() == "mail"


def test_a_bulk_enqueue_wakes_its_queue(pg: PgQueue, listener: Listener) -> None:
    with Session(pg.engine) as session, session.begin():
        external(pg).using(queue="mail").enqueue_many(session, [{"n": n} for n in range(2_500)])

    assert listener.next() == "mail"
    assert listener.until_marker() == []


def run(pg: PgQueue, work: Coroutine[Any, Any, None]) -> None:
    async def worked() -> None:
        try:
            await work
        finally:
            await pg.async_engine.dispose()

    asyncio.run(worked())


def test_a_commit_of_an_asynchronous_session_or_connection_wakes_its_queue(pg: PgQueue, listener: Listener) -> None:
    async def work() -> None:
        async with AsyncSession(pg.async_engine) as session, session.begin():
            await external(pg).using(queue="mail").enqueue_async(session, n=1)
        async with pg.async_engine.begin() as connection:
            await external(pg).using(queue="images").enqueue_async(connection, n=1)

    run(pg, work())

    assert {listener.next(), listener.next()} == {"mail", "images"}


def test_a_two_phase_commit_wakes_its_queue(pg: PgQueue, listener: Listener) -> None:
    with Session(pg.engine, twophase=True) as session, session.begin():
        external(pg).using(queue="mail").enqueue(session, n=1)
    assert listener.next() == "mail"

    with pg.engine.connect() as connection:
        transaction = connection.begin_twophase()
        external(pg).using(queue="images").enqueue(connection, n=1)
        transaction.prepare()
        transaction.commit()
    assert listener.next() == "images"


def test_an_autocommit_connection_wakes_its_queue_at_once(pg: PgQueue, listener: Listener) -> None:
    with pg.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        external(pg).using(queue="mail").enqueue(connection, n=1)

        assert listener.next() == "mail"


def test_an_autocommit_session_wakes_its_queue_at_once(pg: PgQueue, listener: Listener) -> None:
    with Session(pg.engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        external(pg).using(queue="mail").enqueue(session, n=1)
        session.add(external(pg).using(queue="images").new(n=1))
        session.flush()

        assert {listener.next(), listener.next()} == {"mail", "images"}


# When nobody is woken --------------------------------------------------------------------------------------


def rolled_back_session(pg: PgQueue) -> None:
    with Session(pg.engine) as session:
        external(pg).using(queue="mail").enqueue(session, n=1)
        session.add(external(pg).using(queue="mail").new(n=1))
        session.flush()
        session.rollback()
        external(pg).using(queue="other").enqueue(session, n=1)
        session.rollback()
        session.execute(sa.text("SELECT 1"))
        session.commit()


def closed_session(pg: PgQueue) -> None:
    with Session(pg.engine) as session:
        external(pg).using(queue="mail").enqueue(session, n=1)
        session.close()
        session.execute(sa.text("SELECT 1"))
        session.commit()


def rolled_back_connection(pg: PgQueue) -> None:
    with pg.engine.connect() as connection:
        external(pg).using(queue="mail").enqueue(connection, n=1)
        connection.rollback()
        connection.execute(sa.text("SELECT 1"))
        connection.commit()


def rolled_back_two_phase_connection(pg: PgQueue) -> None:
    with pg.engine.connect() as connection:
        for prepared in (True, False):
            transaction = connection.begin_twophase()
            external(pg).using(queue="mail").enqueue(connection, n=1)
            if prepared:
                transaction.prepare()
            transaction.rollback()
        connection.execute(sa.text("SELECT 1"))
        connection.commit()


def rolled_back_two_phase_session(pg: PgQueue) -> None:
    with Session(pg.engine, twophase=True) as session:
        external(pg).using(queue="mail").enqueue(session, n=1)
        session.prepare()
        session.rollback()
        session.execute(sa.text("SELECT 1"))
        session.commit()


@pytest.mark.parametrize(
    "leave_no_job",
    [
        rolled_back_session,
        closed_session,
        rolled_back_connection,
        rolled_back_two_phase_connection,
        rolled_back_two_phase_session,
    ],
)
def test_a_rollback_wakes_nobody_then_or_later(
    pg: PgQueue, listener: Listener, leave_no_job: Callable[[PgQueue], None]
) -> None:
    leave_no_job(pg)

    assert listener.until_marker() == []
    assert len(statuses(pg)) == 1


def test_nobody_is_woken_while_the_transaction_is_open(pg: PgQueue, listener: Listener) -> None:
    with Session(pg.engine) as session:
        external(pg).using(queue="mail").enqueue(session, n=1)
        while_open = listener.until_marker()
        session.commit()

        assert while_open == []
        assert listener.next() == "mail"


def test_a_session_whose_info_was_cleared_meanwhile_commits_all_the_same(pg: PgQueue) -> None:
    async def enqueue_async() -> None:
        async with AsyncSession(pg.async_engine) as session:
            await external(pg).enqueue_async(session, n=2)
            session.info.clear()
            await session.commit()
        await pg.async_engine.dispose()

    with Session(pg.engine) as session:
        external(pg).enqueue(session, n=1)
        session.info.clear()
        session.commit()
    asyncio.run(enqueue_async())

    assert len(statuses(pg)) == 2


def test_the_release_of_a_savepoint_alone_wakes_nobody(pg: PgQueue, listener: Listener) -> None:
    with Session(pg.engine) as session, pg.engine.connect() as connection:
        for transaction in (session, connection):
            with transaction.begin_nested():
                external(pg).using(queue="mail").enqueue(transaction, n=1)
        while_open = listener.until_marker()
        session.commit()
        connection.rollback()

        assert while_open == []
        assert listener.next() == "mail"
        assert listener.until_marker() == []


@pytest.mark.parametrize("options", [{"delay": 60}, {"delay": 0.001}])
def test_a_job_for_later_wakes_nobody(pg: PgQueue, listener: Listener, options: dict[str, Any]) -> None:
    later = external(pg).using(queue="mail", **options)
    with Session(pg.engine) as session, session.begin():
        later.enqueue(session, n=1)
        later.enqueue_many(session, [{"n": 2}])
        session.add(later.new(n=3))

    assert listener.until_marker() == []
    assert len(statuses(pg)) == 4


def test_a_job_that_was_not_inserted_wakes_nobody(pg: PgQueue, listener: Listener) -> None:
    task = external(pg).using(queue="mail", unique_key="a")
    with Session(pg.engine) as session, session.begin():
        task.enqueue(session, n=1)
    assert listener.next() == "mail"

    with Session(pg.engine) as session, session.begin():
        task.enqueue(session, n=2)

    assert listener.until_marker() == []


def test_many_payloads_of_which_there_are_none_wake_nobody(pg: PgQueue, listener: Listener) -> None:
    with Session(pg.engine) as session, session.begin():
        external(pg).using(queue="mail").enqueue_many(session, [])

    assert listener.until_marker() == []


# How -------------------------------------------------------------------------------------------------------


def test_many_jobs_of_one_transaction_are_one_wake_up_per_queue(pg: PgQueue, listener: Listener) -> None:
    with Session(pg.engine) as session, session.begin():
        for n in range(50):
            external(pg).using(queue="mail").enqueue(session, n=n)
            external(pg).using(queue="images").enqueue(session, n=n)

    assert sorted(listener.until_marker()) == ["images", "mail"]


def test_the_wake_ups_of_many_transactions_are_coalesced(
    pg: PgQueue, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one wake-up is on its way, those that follow wait, and become one."""
    monkeypatch.setattr("pgqueue.notifier.COALESCE_SECONDS", 1.0)
    monkeypatch.setattr("pgqueue.notifier.COALESCE_SECONDS_MAX", 1.0)
    add(pg, queue="first")
    assert listener.next() == "first"

    for _ in range(20):
        add(pg, queue="mail")

    assert listener.until_marker().count("mail") == 1


def test_the_application_never_sends_the_wake_up_itself(pg: PgQueue, listener: Listener, theirs: sa.Engine) -> None:
    statements = []
    sa.event.listen(theirs, "before_cursor_execute", lambda *given: statements.append(given[2]))

    with Session(theirs) as session, session.begin():
        external(pg).using(queue="mail").enqueue(session, n=1)
        session.add(external(pg).using(queue="mail").new(n=1))

    assert listener.next() == "mail"
    assert len(statements) == 2
    assert not [sql for sql in statements if "notify" in sql.lower()]


def test_a_wake_up_that_cannot_be_sent_does_not_disturb_the_commit(pg: PgQueue, theirs: sa.Engine) -> None:
    pg.engine.dispose()
    pg.connect_to(pg.url.set(database="there_is_none"))

    with Session(theirs) as session, session.begin():
        external(pg).enqueue(session, n=1)

    with theirs.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM pgqueue.jobs")) == 1


def test_wake_ups_go_on_after_their_connection_was_cut(pg: PgQueue, listener: Listener) -> None:
    add(pg, queue="mail")
    assert listener.next() == "mail"
    execute(
        pg.engine,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'NOTIFY%'"
        " AND datname = current_database() AND pid <> pg_backend_pid()",
    )

    # The first after the cut may be lost: it is only a hint.
    for number in range(100):
        add(pg, queue=f"mail{number}")
        if listener.has_more(timeout=0.1):
            break
    else:
        pytest.fail("no wake-up came again")


def test_each_schema_has_a_channel_of_its_own() -> None:
    assert channel("pgqueue") != channel("other")


def test_a_replayed_job_and_a_resumed_queue_wake_their_queue(pg: PgQueue, listener: Listener) -> None:
    (job_id,) = add(pg, queue="mail")
    assert listener.next() == "mail"
    finish(pg, died(claim_one(pg, queue="mail")))

    pg.replay(job_id)
    assert listener.next() == "mail"

    pg.pause("mail")
    pg.resume("mail")
    assert listener.next() == "mail"
