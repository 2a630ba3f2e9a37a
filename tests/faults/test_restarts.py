"""A PostgreSQL server that crashes under load and recovers, with its durability switched on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pgserver
import pytest
import sqlalchemy as sa
from faults import ledger
from faults.campaign import completed, statuses, wait_until_all_final, wait_until_completed
from faults.conftest import MakeFleet
from sqlalchemy.orm import Session
from support import scalar

from pgqueue import DatabaseUnreachable, PgQueue, migration

RESTARTS = 3


@pytest.fixture
def durable_server(pg_version: str | None) -> Iterator[pgserver.Server]:
    """A server of this test's own that keeps what it has acknowledged."""
    _, folder = pgserver.choose_server(pg_version)
    server = pgserver.Server(folder, durable=True)
    yield server
    server.stop()


def test_a_server_that_crashes_under_load_keeps_every_acknowledged_job_and_repeats_no_effect(
    durable_server: pgserver.Server, make_fleet: MakeFleet
) -> None:
    url = durable_server.url()
    engine = sa.create_engine(url)
    migration.upgrade(engine, "pgqueue")
    engine.dispose()
    pgq, fleet = make_fleet(url)
    workers = fleet.workers(3)

    with Enqueuer(pgq) as enqueuer:
        for restart in range(1, RESTARTS + 1):
            seen = completed(pgq)
            wait_until_completed(pgq, seen + 100, f"progress before restart {restart}")
            durable_server.restart_immediately()
            before = completed(pgq)
            wait_until_completed(pgq, before + 1, f"progress after restart {restart}", timeout=15)
    wait_until_all_final(pgq)

    assert scalar(pgq.engine, "SELECT setting FROM pg_settings WHERE name = 'fsync'") == "on"
    assert enqueuer.failures >= RESTARTS, "each crash was noticed"
    assert ledger.audit(pgq, acknowledged=enqueuer.acknowledged) == []
    assert set(statuses(pgq)) == {"completed"}
    assert all(worker.alive for worker in workers)


class Enqueuer:
    """Enqueues jobs from a thread, one a transaction, whatever happens to the server."""

    def __init__(self, pgq: PgQueue) -> None:
        self.acknowledged: list[int] = []  #: ids of the jobs whose commit was answered
        self.failures = 0
        self._pgq = pgq
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Enqueuer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.001):
            try:
                with Session(self._pgq.engine) as session, session.begin():
                    job = self._pgq.tasks["charge"].enqueue(session, seconds=0.01)
            except (sa.exc.DBAPIError, DatabaseUnreachable):
                self.failures += 1
                self._over.wait(0.05)
            else:
                self.acknowledged.append(job.id)
