"""How many jobs of a queue may be pending, and what an enqueue does when there are so many."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from limited import claim, put
from sqlalchemy.ext.asyncio import create_async_engine
from support import wait_for

from pgqueue import ConfigurationError, PgQueue, QueueFull, Unique
from pgqueue.admission import OnFull


def count(pgq: PgQueue) -> int:
    return len(pgq.list_jobs(limit=1000))


def test_an_enqueue_beyond_the_depth_is_refused_and_the_transaction_goes_on(pgq: PgQueue) -> None:
    pgq.queue("default", max_depth=3)
    task = pgq.external_task("work")

    with pgq.begin() as connection:
        task.enqueue_many(connection, [{}, {}])
        task.enqueue(connection)
        with pytest.raises(QueueFull, match=r"queue 'default' is full: 3 jobs are pending, 1 more .* max_depth of 3"):
            task.enqueue(connection)
        task.using(queue="other").enqueue(connection)

    assert count(pgq) == 4


def test_a_bulk_enqueue_that_does_not_fit_stores_nothing(pgq: PgQueue) -> None:
    pgq.queue("default", max_depth=3)

    with pytest.raises(QueueFull):
        put(pgq, pgq.external_task("work"), 4)

    assert count(pgq) == 0


def test_running_jobs_do_not_count(pgq: PgQueue) -> None:
    pgq.queue("default", max_depth=2)
    task = pgq.external_task("work")
    put(pgq, task, 2)

    claim(pgq)

    put(pgq, task, 2)
    assert count(pgq) == 4


def test_jobs_that_wait_for_a_limit_count(pgq: PgQueue) -> None:
    pgq.queue("default", max_depth=2)
    task = pgq.external_task("few", concurrency=1)
    put(pgq, task, 2)
    claim(pgq)
    put(pgq, task)
    assert claim(pgq) == []

    with pytest.raises(QueueFull):
        put(pgq, task)


def test_a_dropped_job_is_told_from_a_stored_one(pgq: PgQueue) -> None:
    pgq.queue("default", max_depth=1, on_full="drop")
    task = pgq.external_task("work")

    with pgq.begin() as connection:
        stored, dropped = task.enqueue(connection), task.enqueue(connection)
        bulk = task.enqueue_many(connection, [{}])

    assert stored.inserted
    assert (dropped.id, dropped.inserted, bulk) == (0, False, [])
    assert count(pgq) == 1


def test_a_blocked_enqueue_goes_on_once_there_is_room(pg: PgQueue) -> None:
    pg.queue("default", max_depth=1, on_full="block")
    task = pg.external_task("work")
    put(pg, task)
    blocked = threading.Thread(target=put, args=(pg, task))
    blocked.start()

    claim(pg)
    blocked.join(30)

    assert not blocked.is_alive()
    assert count(pg) == 2


def test_a_blocked_enqueue_gives_up_after_its_time(pg: PgQueue) -> None:
    pg.queue("default", max_depth=1, on_full="block", block_timeout=0.1)
    put(pg, pg.external_task("work"))

    with pytest.raises(QueueFull, match="block_timeout"):
        put(pg, pg.external_task("work"))


def test_on_sqlite_where_nobody_could_make_room_an_enqueue_does_not_wait(sqlite_url: str) -> None:
    pgq = PgQueue(sqlite_url)
    pgq.queue("default", max_depth=1, on_full="block", block_timeout=1e6)
    put(pgq, pgq.external_task("work"))

    with pytest.raises(QueueFull, match="cannot wait on SQLite"):
        put(pgq, pgq.external_task("work"))

    pgq.dispose()


def test_a_blocked_enqueue_leaves_the_event_loop_to_others(pg: PgQueue, pg_url: str) -> None:
    pg.queue("default", max_depth=1, on_full="block")
    task = pg.external_task("work")
    put(pg, task)

    async def main() -> int:
        engine = create_async_engine(pg.url)
        ticks = 0

        async def enqueue() -> None:
            async with engine.begin() as connection:
                await task.enqueue_async(connection)

        blocked = asyncio.create_task(enqueue())
        while ticks < 20:
            await asyncio.sleep(0.01)
            ticks += 1
        assert not blocked.done()
        await asyncio.to_thread(claim, pg)
        await blocked
        await engine.dispose()
        return ticks

    assert asyncio.run(main()) == 20
    assert count(pg) == 2


def test_the_depth_can_be_changed_while_producers_run(pgq: PgQueue) -> None:
    pgq.queue("default", max_depth=1)
    task = pgq.external_task("work")
    put(pgq, task)

    pgq.set_limits(queue="default", max_depth=5, on_full="error")

    put(pgq, task, 4)
    with pytest.raises(QueueFull):
        put(pgq, task)


@pytest.mark.parametrize("on_full", ["error", "block", "drop"])
@pytest.mark.parametrize("period", [None, 60.0])
def test_a_full_queue_still_knows_the_jobs_it_has(pgq: PgQueue, on_full: OnFull, period: float | None) -> None:
    pgq.queue("default", max_depth=2, on_full=on_full, block_timeout=0.0)

    @pgq.task(unique=Unique(by=("file",), period=period))
    def resize(file: str, size: int = 1) -> None: ...

    with pgq.begin() as connection:
        first, second = resize.enqueue_many(connection, [{"file": "a"}, {"file": "b"}])

    with pgq.begin() as connection:
        again = resize.enqueue(connection, file="a")
        replaced = resize.using(on_conflict="replace").enqueue(connection, file="a", size=2)
        bulk = resize.enqueue_many(connection, [{"file": "b"}, {"file": "a"}, {"file": "b"}])

    assert (again.id, again.inserted, replaced.id) == (first, False, first)
    assert bulk == [second, first, second]
    assert pgq.get_job(first).payload == {"file": "a", "size": 2}


def test_a_depth_is_for_new_jobs_of_a_bulk_enqueue_and_not_for_those_that_are_there(pgq: PgQueue) -> None:
    pgq.queue("default", max_depth=2)

    @pgq.task(unique=Unique(by=("file",)))
    def resize(file: str) -> None: ...

    with pgq.begin() as connection:
        held = resize.enqueue(connection, file="a")
        bulk = resize.enqueue_many(connection, [{"file": "a"}, {"file": "b"}])
        with pytest.raises(QueueFull, match=r"2 jobs are pending, 1 more"):
            resize.enqueue_many(connection, [{"file": "a"}, {"file": "c"}])

    assert bulk[0] == held.id
    assert count(pgq) == 2


def test_nothing_can_be_enqueued_to_a_queue_beyond_its_depth(pgq: PgQueue) -> None:
    pgq.queue("default", max_depth=3)
    task = pgq.external_task("work")
    put(pgq, task, 3)
    pgq.set_limits(queue="default", max_depth=1)

    with pgq.begin() as connection:
        assert task.enqueue_many(connection, []) == []


def test_an_orm_object_for_a_queue_with_a_depth_is_refused(pgq: PgQueue) -> None:
    pgq.queue("default", max_depth=3)

    with pytest.raises(ConfigurationError, match=r"queue 'default' has a max_depth.*use enqueue\(\)"):
        pgq.external_task("work").new(n=1)


def test_many_producers_pass_the_depth_by_less_than_their_number(pg: PgQueue, tmp_path: Path) -> None:
    pg.queue("default", max_depth=20)
    task = pg.external_task("work")
    refused = []

    def produce() -> None:
        for _ in range(10):
            try:
                put(pg, task)
            except QueueFull:
                refused.append(1)

    threads = [threading.Thread(target=produce) for _ in range(5)]
    for thread in threads:
        thread.start()
    wait_for(lambda: not any(thread.is_alive() for thread in threads), "the producers to end")

    assert 20 <= count(pg) < 25
    assert count(pg) + len(refused) == 50
