"""A process that has used its queue may fork, as servers of web applications do: the child goes on with its own."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable

import psycopg
import pytest
import sqlalchemy as sa
from support import PATIENCE_SECONDS, rows, scalar

from pgqueue import PgQueue

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")  # that it is risky is why this is tested

BACKEND = sa.text("SELECT pg_backend_pid()")


def in_a_child(do: Callable[[], None]) -> int:
    """Run it in a forked child; the child's exit status, 0 when nothing was raised."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a child that hangs is to die
        signal.alarm(int(PATIENCE_SECONDS / 2))
        try:
            do()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_parent_and_child_enqueue_each_on_connections_of_their_own(pg: PgQueue) -> None:
    external = pg.external_task("external")

    def enqueue() -> None:
        with pg.begin() as connection:
            external.enqueue(connection, backend=connection.scalar(BACKEND))

    enqueue()
    assert in_a_child(enqueue) == 0
    enqueue()

    first, second, third = (
        row.backend for row in rows(pg.engine, "SELECT payload ->> 'backend' AS backend FROM pgqueue.jobs ORDER BY id")
    )
    assert second not in (first, third)


def test_a_child_can_use_its_queue_although_a_thread_of_its_parent_was_just_using_it(pg: PgQueue) -> None:
    assert pg.engine.url == pg.async_engine.url
    in_use, go_on = threading.Event(), threading.Event()

    def use() -> None:
        with pg._lock:
            in_use.set()
            go_on.wait(PATIENCE_SECONDS)

    thread = threading.Thread(target=use)
    thread.start()
    in_use.wait(PATIENCE_SECONDS)

    def enqueue() -> None:
        with pg.begin() as connection:
            pg.external_task("external").enqueue(connection)

    status = in_a_child(enqueue)
    go_on.set()
    thread.join()

    assert status == 0
    assert scalar(pg.engine, "SELECT count(*) FROM pgqueue.jobs") == 1


def test_a_child_wakes_workers_as_its_parent_does(pg: PgQueue, pg_url: str) -> None:
    external = pg.external_task("external")

    def enqueue() -> None:
        with pg.begin() as connection:
            external.enqueue(connection)
        pg.dispose()

    with psycopg.connect(pg_url.replace("+psycopg", ""), autocommit=True) as listener:
        listener.execute('LISTEN "pgqueue_pgqueue"')
        enqueue()
        parents = [notice.pid for notice in listener.notifies(timeout=PATIENCE_SECONDS, stop_after=1)]
        assert in_a_child(enqueue) == 0
        childs = [notice.pid for notice in listener.notifies(timeout=PATIENCE_SECONDS, stop_after=1)]

    assert len(parents) == len(childs) == 1
    assert parents != childs


def test_a_child_tells_listeners_of_what_it_does_itself(pg: PgQueue) -> None:
    external = pg.external_task("external")
    heard: list[int] = []
    pg.on("job:enqueued", lambda event: heard.append(os.getpid()))

    def enqueue() -> None:
        with pg.begin() as connection:
            external.enqueue(connection)
        assert pg._listeners.deliver(PATIENCE_SECONDS / 4)

    def enqueue_in_child() -> None:
        heard.clear()
        enqueue()
        assert heard == [os.getpid()]

    enqueue()
    with pg._listeners._lock:
        assert in_a_child(enqueue_in_child) == 0
    enqueue()

    assert heard == [os.getpid()] * 2
