"""`pgqueue bench`: how fast this database is as a queue, in some seconds, in a schema of its own.

Enqueueing, a worker that drains a backlog, and the time from a commit until an idle worker starts the job. The worker
is a thread of this process. The figures hold for this machine at this moment; `docs/performance.md` says how figures
that are to be compared are made.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqueue import migration
from pgqueue.client import PgQueue, Task
from pgqueue.config import WorkerConfig, checked_schema
from pgqueue.dialect import POSTGRESQL, SQLITE
from pgqueue.engine import describe_url, errors_explained, is_in_memory, make_engine, parse_url
from pgqueue.errors import ConfigurationError, PgqueueError
from pgqueue.worker import Worker

TASK = "pgqueue_bench.noop"

#: Jobs per transaction of the bulk enqueue.
BULK_JOBS = 1_000

JOBS_MAX, ROUNDS_MAX = 1_000_000, 100

#: How long a round enqueues jobs one by one, and how long it measures pick-up; at least so many samples of each.
SINGLE_SECONDS, PICKUP_SECONDS, SAMPLES_MIN = 1.0, 1.0, 5

#: An idle worker gets its next job after a time between these; one that polls, at any moment between two polls.
GAP_SECONDS = (0.01, 0.04)

ROUND_TRIPS = 100

#: How long nothing may happen while jobs are open.
STALL_SECONDS = 60.0

MILLISECONDS, PER_SECOND = "ms", "jobs/s"

#: What is measured, in this order.
UNITS = {
    "round trip": MILLISECONDS,
    "enqueue, one per transaction": PER_SECOND,
    f"enqueue, {BULK_JOBS:,} per transaction": PER_SECOND,
    "drain, one worker": PER_SECOND,
    "pick-up, median": MILLISECONDS,
    "pick-up, 95 %": MILLISECONDS,
}


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure: of each round, and of all."""

    measure: str
    unit: str
    median: float
    lowest: float
    highest: float
    rounds: list[float]


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What was measured, and on what."""

    database: str  #: its URL without the password
    server: str  #: its version and what it does for durability
    machine: str  #: that this process ran on
    versions: str
    jobs: int  #: of the backlog of each round
    measures: list[Measure]


def run_bench(
    url: str | sa.URL | None,
    *,
    schema: str,
    jobs: int = 10_000,
    rounds: int = 3,
    listen: bool = True,
    measured: Callable[[int], None] = lambda count: None,
) -> BenchReport:
    """Measure in a schema `{schema}_bench` (on SQLite: a prefix) that must not exist, and is dropped at the end.

    url: the database; None: SQLite, in a temporary file.
    jobs: in the backlog that a worker drains, in each round.
    listen: False: the worker polls, as behind a pooler in transaction mode.
    measured: is called with 1 after each round.

    Raises ConfigurationError when an argument cannot work or the schema exists, DatabaseUnreachable, and PgqueueError
    when nothing happens any more.
    """
    for name, value, most in (("jobs", jobs, JOBS_MAX), ("rounds", rounds, ROUNDS_MAX)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ConfigurationError(f"{name} must be between 1 and {most}, got {value!r}")
    bench_schema = checked_schema(f"{checked_schema(schema)}_bench")
    with tempfile.TemporaryDirectory(prefix="pgqueue-bench-") as folder:
        database = sa.URL.create(SQLITE, database=os.path.join(folder, "bench.db")) if url is None else parse_url(url)
        if is_in_memory(database):
            raise ConfigurationError("a SQLite database in memory cannot be shared by threads; name a file")
        engine = make_engine(database)
        pgq = PgQueue(engine, schema=bench_schema)
        try:
            with errors_explained(database), _tables(pgq):
                bench = _Bench(pgq, jobs, listen)
                found: list[dict[str, float]] = []
                for _ in range(rounds):
                    found.append(bench.round())
                    measured(1)
                server = _server(pgq)
        finally:
            pgq.dispose()
            engine.dispose()
    return BenchReport(
        database="SQLite, a temporary file" if url is None else describe_url(database),
        server=server,
        machine=describe_machine(),
        versions=describe_versions(),
        jobs=jobs,
        measures=[_measure(name, unit, [values[name] for values in found]) for name, unit in UNITS.items()],
    )


def _measure(name: str, unit: str, values: list[float]) -> Measure:
    rounded = [float(f"{value:.4g}") for value in values]
    return Measure(name, unit, statistics.median(rounded), min(rounded), max(rounded), rounded)


class _Bench:
    """The rounds. Each leaves its jobs behind, completed, as an application does."""

    def __init__(self, pgq: PgQueue, jobs: int, listen: bool) -> None:
        self._pgq = pgq
        self._jobs = jobs
        self._listen = listen
        self._starts: list[tuple[int, float]] = []
        starts, clock = self._starts, time.perf_counter

        @pgq.task(name=TASK)
        def noop(n: int) -> None:
            starts.append((n, clock()))

        self._task: Task[..., None] = noop

    def round(self) -> dict[str, float]:
        round_trip = self._round_trip()
        singles, single_rate = self._enqueue_singly()
        bulk_rate = self._enqueue_in_bulk()
        drain_rate = self._drain(singles + self._jobs)
        waits = self._pick_up()
        percentiles = statistics.quantiles(waits, n=20, method="inclusive")
        values = (round_trip, single_rate, bulk_rate, drain_rate, statistics.median(waits), percentiles[-1])
        return dict(zip(UNITS, values, strict=True))

    def _round_trip(self) -> float:
        """Milliseconds that the shortest statement takes."""
        taken = []
        with self._pgq.reading() as connection:
            for _ in range(ROUND_TRIPS):
                began = time.perf_counter()
                connection.exec_driver_sql("SELECT 1")
                taken.append(time.perf_counter() - began)
        return statistics.median(taken) * 1_000

    def _enqueue_singly(self) -> tuple[int, float]:
        """How many jobs were enqueued, each in a transaction of its own, and how many a second."""
        count, began = 0, time.perf_counter()
        while count < SAMPLES_MIN or time.perf_counter() - began < SINGLE_SECONDS:
            with Session(self._pgq.engine) as session, session.begin():
                self._task.enqueue(session, n=count)
            count += 1
        return count, count / (time.perf_counter() - began)

    def _enqueue_in_bulk(self) -> float:
        payloads = [{"n": n} for n in range(self._jobs)]
        began = time.perf_counter()
        for start in range(0, self._jobs, BULK_JOBS):
            with Session(self._pgq.engine) as session, session.begin():
                self._task.enqueue_many(session, payloads[start : start + BULK_JOBS])
        return self._jobs / (time.perf_counter() - began)

    def _drain(self, count: int) -> float:
        """Jobs a second, from the start of the first until the end of the last is written."""
        self._starts.clear()
        with self._working() as worker:
            self._wait_for(worker, lambda: worker.report.completed == count, count)
            ended = time.perf_counter()
        return count / (ended - self._starts[0][1])

    def _pick_up(self) -> list[float]:
        """Milliseconds from just before a commit until an idle worker starts the job."""
        waits: list[float] = []
        listens = self._listen and self._pgq.engine.dialect.name == POSTGRESQL
        gap = GAP_SECONDS if listens else (0.0, WorkerConfig().poll_interval)
        with self._working() as worker:
            # One job first, so that the worker is at work, and all its connections are made.
            self._start_one(worker, -1)
            began = time.perf_counter()
            while len(waits) < SAMPLES_MIN or time.perf_counter() - began < PICKUP_SECONDS:
                time.sleep(random.uniform(*gap))  # noqa: S311 — not to keep step with anything
                waits.append(self._start_one(worker, len(waits)) * 1_000)
        return waits

    def _start_one(self, worker: Worker, number: int) -> float:
        self._starts.clear()
        with Session(self._pgq.engine) as session:
            self._task.enqueue(session, n=number)
            began = time.perf_counter()
            session.commit()
        self._wait_for(worker, lambda: bool(self._starts), 1)
        return self._starts[0][1] - began

    @contextmanager
    def _working(self) -> Iterator[Worker]:
        worker = Worker(self._pgq, WorkerConfig(listen=self._listen)).start()
        try:
            yield worker
        finally:
            worker.stop()
            worker.join()

    def _wait_for(self, worker: Worker, done: Callable[[], bool], count: int) -> None:
        deadline, completed = time.monotonic() + STALL_SECONDS, -1
        while not done():
            try:
                worker.join(0)
            except TimeoutError:
                pass  # it is at work
            else:
                raise PgqueueError("the worker of the bench ended by itself")
            if worker.report.completed > completed:
                deadline, completed = time.monotonic() + STALL_SECONDS, worker.report.completed
            if time.monotonic() > deadline:
                raise PgqueueError(f"no job ended for {STALL_SECONDS:g} s; {completed} of {count} had")
            time.sleep(0.0005)


# The schema ------------------------------------------------------------------------------------------------


@contextmanager
def _tables(pgq: PgQueue) -> Iterator[None]:
    """Make pgqueue's tables in a schema that does not exist, and drop both at the end. Never more: no CASCADE."""
    _create(pgq)
    try:
        migration.upgrade(pgq.engine, pgq.schema)
        yield
    finally:
        with pgq.reading() as connection:
            migrated = migration.current_revision(connection, pgq.schema) is not None
        if migrated:
            migration.downgrade(pgq.engine, pgq.schema, "base")
        with pgq.engine.begin() as connection:
            if connection.dialect.name == POSTGRESQL:
                _table(connection, pgq, "alembic_version").drop(connection, checkfirst=True)
                connection.execute(sa.schema.DropSchema(pgq.schema))
            else:
                _table(connection, pgq, f"{pgq.schema}_alembic_version").drop(connection, checkfirst=True)


def _table(connection: sa.Connection, pgq: PgQueue, name: str) -> sa.Table:
    schema = pgq.schema if connection.dialect.name == POSTGRESQL else None
    return sa.Table(name, sa.MetaData(schema=schema))


def _create(pgq: PgQueue) -> None:
    """Of two that start at once, one makes the schema."""
    exists = ConfigurationError(
        f"the schema {pgq.schema!r} exists: another bench is running, or one was killed. "
        "Wait for its end, drop the schema, or use another one with --schema"
    )
    with pgq.engine.begin() as connection:
        inspector = sa.inspect(connection)
        if connection.dialect.name == POSTGRESQL:
            if pgq.schema in inspector.get_schema_names():
                raise exists
            try:
                connection.execute(sa.schema.CreateSchema(pgq.schema))
            except sa.exc.DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) in ("42P06", "23505"):
                    raise exists from None
                raise
        elif any(name.startswith(f"{pgq.schema}_") for name in inspector.get_table_names()):
            raise exists


# What it was measured on -----------------------------------------------------------------------------------


def _server(pgq: PgQueue) -> str:
    with pgq.reading() as connection:
        if connection.dialect.name == SQLITE:
            return f"SQLite {sqlite3.sqlite_version}"
        names = ("fsync", "synchronous_commit", "full_page_writes")
        version, *settings = [
            connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in ("server_version", *names)
        ]
        said = ", ".join(f"{name} {value}" for name, value in zip(names, settings, strict=True))
        return f"PostgreSQL {version} ({said})"


def describe_machine() -> str:
    """Processor, memory and system."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{_processor()}, {usable} of {os.cpu_count()} processors, {_memory()} of memory, "
        f"{platform.system()} {platform.release()}"
    )


def describe_versions() -> str:
    """Of Python, and of what does the work."""
    packages = ("pgqueue", "SQLAlchemy", "psycopg")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"Python {platform.python_version()}, {versions}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1024**3:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown size"
