"""What a worker needs of SQLite is asked for when it starts, not when a job is lost for the lack of it."""

from __future__ import annotations

import sys

import pytest
from support import PATIENCE_SECONDS
from working import enqueue, statuses

from pgqueue import ConfigurationError, PgQueue, Worker, migration


def test_a_worker_refuses_a_database_in_memory() -> None:
    pgq = PgQueue("sqlite://")
    migration.upgrade(pgq.engine, "pgqueue")

    @pgq.task
    def work() -> None:
        pass

    enqueue(work)
    with pytest.raises(ConfigurationError, match=r"SQLite database in memory.*Use a file, such as sqlite:///jobs.db"):
        Worker(pgq).run()

    assert statuses(pgq) == {"pending": 1}
    pgq.dispose()


def test_a_worker_with_asynchronous_transactional_tasks_asks_for_the_package_they_need(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pgq = PgQueue(sqlite_url)

    @pgq.task(transactional=True)
    async def work(session: object) -> None:
        pass

    enqueue(work)
    monkeypatch.setitem(sys.modules, "aiosqlite", None)
    worker = Worker(pgq).start()
    try:
        with pytest.raises(ConfigurationError, match="pip install aiosqlite"):
            worker.join(PATIENCE_SECONDS)
    finally:
        worker.stop()

    assert statuses(pgq) == {"pending": 1}
    pgq.dispose()
