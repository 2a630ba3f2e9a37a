"""Databases for the tests: one PostgreSQL server per session, a fresh database per test; SQLite files likewise."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import compiled
import forks
import pgbouncer
import pgserver
import pytest
import sqlalchemy as sa
from hypothesis import settings

import pgqueue
from pgqueue import PgQueue, migration
from pgqueue.engine import make_engine

_serial = itertools.count(1)

settings.register_profile("patient", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    """Let the processes that tests start run the same pgqueue as the tests, whichever happens to be installed, and
    not compile it each. Let statements be compiled once."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    package = str(Path(pgqueue.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    compiled.share()


def pytest_unconfigure(config: pytest.Config) -> None:
    forks.close_shared()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pg",
        default=os.environ.get("PGQUEUE_TEST_PG"),
        help="PostgreSQL versions to test with, e.g. 16 or 16,18 or oldest or all; the newest found unless given",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pg_version" in metafunc.fixturenames:
        metafunc.parametrize("pg_version", _versions(metafunc.config), scope="session", indirect=True)


def _versions(config: pytest.Config) -> list[str | None]:
    wanted = config.getoption("--pg")
    if wanted is None:
        return [None]
    if wanted in ("all", "oldest"):
        found = sorted(pgserver.find_servers(), key=int) or [None]
        return found[:1] if wanted == "oldest" else found
    return list(wanted.split(","))


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    if argname == "pg_version":
        return f"pg{val or ''}"
    return None


@pytest.fixture(scope="session")
def pg_version(request: pytest.FixtureRequest) -> str | None:
    version: str | None = request.param
    return version


@pytest.fixture(scope="session")
def pg_server(pg_version: str | None) -> Iterator[pgserver.Server]:
    """A running server with a migrated template database. Fails, never skips, when there is no PostgreSQL."""
    _, folder = pgserver.choose_server(pg_version)
    server = pgserver.Server(folder)
    try:
        template = make_engine(server.create_database("migrated"))
        migration.upgrade(template, "pgqueue")
        template.dispose()
        yield server
    finally:
        server.stop()


@pytest.fixture
def pg_url(pg_server: pgserver.Server) -> Iterator[str]:
    """A PostgreSQL database of this test's own, with pgqueue's tables."""
    name = f"test_{next(_serial)}"
    yield pg_server.create_database(name, "migrated")
    pg_server.drop_database(name)


@pytest.fixture
def empty_pg_url(pg_server: pgserver.Server) -> Iterator[str]:
    """A PostgreSQL database of this test's own, with nothing in it."""
    name = f"test_{next(_serial)}"
    yield pg_server.create_database(name)
    pg_server.drop_database(name)


@pytest.fixture(scope="session")
def bouncer(pg_server: pgserver.Server) -> Iterator[pgbouncer.Bouncer]:
    """A PgBouncer in transaction mode before that server. The test is skipped where the program is not installed."""
    with closing(pgbouncer.Bouncer(pg_server)) as started:
        yield started


@pytest.fixture
def make_bouncer(pg_server: pgserver.Server) -> Iterator[Callable[..., pgbouncer.Bouncer]]:
    """Starts a PgBouncer for one test, with settings over those of the tests."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(closing(pgbouncer.Bouncer(pg_server, **settings)))


@pytest.fixture(scope="session")
def _migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    engine = make_engine(f"sqlite:///{path}")
    migration.upgrade(engine, "pgqueue")
    with engine.connect() as connection:
        connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return path


@pytest.fixture
def sqlite_url(_migrated_sqlite: Path, tmp_path: Path) -> str:
    """A SQLite file of this test's own, with pgqueue's tables."""
    path = tmp_path / "queue.db"
    shutil.copy(_migrated_sqlite, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest, pg_version: str | None) -> str:
    """A database with pgqueue's tables; the test runs once on PostgreSQL and once on SQLite."""
    chosen: str = request.getfixturevalue("pg_url" if request.param == "postgresql" else "sqlite_url")
    return chosen


@pytest.fixture
def pgq(url: str) -> Iterator[PgQueue]:
    """A queue on PostgreSQL, then on SQLite."""
    queue = PgQueue(url)
    yield queue
    queue.dispose()


@pytest.fixture
def pg(pg_url: str) -> Iterator[PgQueue]:
    """A queue on PostgreSQL only."""
    queue = PgQueue(pg_url)
    yield queue
    queue.dispose()


@pytest.fixture
def engine(pgq: PgQueue) -> sa.Engine:
    """An engine as an application would have it, on the same database."""
    return pgq.engine
