"""A database with the application's tables, and a fleet of its processes, for each fault test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import app
from faults.fleet import Fleet, Nursery

from pgqueue import PgQueue

MakeFleet = Callable[[str], tuple[PgQueue, Fleet]]


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    started = Nursery(tmp_path_factory.mktemp("nursery"))
    yield started
    started.close()


@pytest.fixture
def make_fleet(nursery: Nursery, tmp_path: Path) -> Iterator[MakeFleet]:
    """Makes the application on a database: its queue for the test itself, and a fleet."""
    made: list[tuple[PgQueue, Fleet]] = []

    def make(url: str) -> tuple[PgQueue, Fleet]:
        pgq = app.build(url)
        app.metadata.create_all(pgq.engine)
        folder = tmp_path / f"fleet-{len(made)}"
        folder.mkdir()
        made.append((pgq, Fleet(nursery, url, folder)))
        return made[-1]

    yield make
    for pgq, fleet in made:
        print(fleet.output())  # shown when the test failed
        fleet.close()
        pgq.dispose()


@pytest.fixture
def pg_fleet(pg_url: str, make_fleet: MakeFleet) -> tuple[PgQueue, Fleet]:
    """The application on PostgreSQL."""
    return make_fleet(pg_url)
