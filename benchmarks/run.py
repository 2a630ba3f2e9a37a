"""Measure pgqueue: make bench, or python benchmarks/run.py --help.

Starts a PostgreSQL server of its own with default durability (every commit is flushed to disk), unless a
--database-url is given; there it works in the schema `pgqueue_bench`, which it creates and drops.

    drain    one worker process, started by the ordinary command line, completes jobs that do nothing
    bulk     enqueue_many() through a Session, a transaction per 1,000 jobs
    single   one job per committed transaction, beside a bare INSERT and commit on the same connection
    memory   what a worker process takes to drain a short and a long backlog

The repetitions of drain, bulk and single alternate, so that a slow minute of the machine meets all of them; and
figures are medians. Compare figures of one run only: between two runs the disk alone may differ by half.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "tests")]

from app import SCHEMA, noop, pgq  # noqa: E402 — found through the path set above

from pgqueue import migration  # noqa: E402

JOBS_PER_BATCH = 1_000

#: Transactions of one kind in a row; long enough that what one kind leaves to do behind it does not reach far
#: into the next, short enough that all kinds meet the same moods of the disk.
TRANSACTIONS_PER_BLOCK = 100

SAMPLE_SECONDS = 0.05

Samples = dict[str, list[float]]


def main() -> None:
    options = parse_arguments()
    limit_cpus(options.cpus)
    with database(options) as url:
        pgq.connect_to(url)
        with fresh_tables():
            print_machine()
            samples = measure(options)
    print_table(samples)
    if options.json:
        options.json.write_text(json.dumps(samples, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="what to measure (default: all)")
    parser.add_argument("--database-url", help="a PostgreSQL to measure on, instead of one started for this")
    parser.add_argument("--pg", help="major version of the PostgreSQL to start (default: 18 if there is one)")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of drain, bulk and single (default: 5)")
    parser.add_argument("--jobs", type=int, default=50_000, help="jobs per repetition of drain and bulk")
    parser.add_argument("--transactions", type=int, default=1_000, help="per repetition and kind of single")
    parser.add_argument("--short-backlog", type=int, default=10_000, help="jobs, for memory")
    parser.add_argument("--long-backlog", type=int, default=500_000, help="jobs, for memory")
    parser.add_argument("--cpus", type=int, default=2, help="processors that server and workers share; 0: all")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    known = ("drain", "bulk", "single", "memory")
    for part in options.parts:
        if part not in known:
            parser.error(f"there is no part {part!r}; choose from {', '.join(known)}")
    options.parts = options.parts or list(known)
    return options


def limit_cpus(count: int) -> None:
    """Keep this process, and all that it starts, on the first so many of the processors it may use."""
    if count and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


@contextmanager
def database(options: argparse.Namespace) -> Iterator[str]:
    if options.database_url:
        yield options.database_url
        return
    import pgserver  # needs what the tests need; a given database does not

    _, folder = pgserver.choose_server(options.pg)
    server = pgserver.Server(folder, durable=True)
    try:
        yield server.url()
    finally:
        pgq.dispose()
        server.stop()


@contextmanager
def fresh_tables() -> Iterator[None]:
    migration.upgrade(pgq.engine, SCHEMA)
    try:
        yield
    finally:
        with pgq.engine.begin() as connection:
            connection.execute(sa.schema.DropSchema(SCHEMA, cascade=True))
        pgq.dispose()


def empty_tables() -> None:
    with pgq.engine.begin() as connection:
        connection.execute(sa.text(f"TRUNCATE {SCHEMA}.jobs, {SCHEMA}.job_events RESTART IDENTITY"))


# Measuring -------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Samples:
    samples: Samples = {}
    repeated: dict[str, Callable[[], Samples]] = {
        "bulk": lambda: measure_bulk(options.jobs),
        "drain": lambda: measure_drain(options.jobs),
        "single": lambda: measure_single(options.transactions),
    }
    for repetition in range(1, options.repeat + 1):
        for part in (part for part in repeated if part in options.parts):
            progress(f"{part}, repetition {repetition} of {options.repeat}")
            add(samples, repeated[part]())
    if "memory" in options.parts:
        for name, backlog in (("short", options.short_backlog), ("long", options.long_backlog)):
            progress(f"memory, backlog of {backlog:,} jobs")
            add(samples, measure_memory(name, backlog))
    return samples


def progress(what: str) -> None:
    print(f"… {what}", file=sys.stderr, flush=True)


def add(samples: Samples, measured: Samples) -> None:
    for name, values in measured.items():
        samples.setdefault(name, []).extend(values)


def measure_bulk(jobs: int) -> Samples:
    empty_tables()
    seconds = fill(jobs)
    return {"bulk jobs/s": [jobs / seconds]}


def fill(jobs: int) -> float:
    """Enqueue so many jobs in batches through a Session, a commit per batch; the seconds that took."""
    began = time.perf_counter()
    with Session(pgq.engine) as session:
        for start in range(0, jobs, JOBS_PER_BATCH):
            noop.enqueue_many(session, [{"n": n} for n in range(start, min(start + JOBS_PER_BATCH, jobs))])
            session.commit()
    return time.perf_counter() - began


def measure_drain(jobs: int) -> Samples:
    empty_tables()
    fill(jobs)
    worker = run_worker()
    with pgq.engine.begin() as connection:
        completed, seconds = connection.execute(
            sa.text(
                "SELECT count(*) FILTER (WHERE status = 'completed'),"
                " extract(epoch FROM max(finished_at) - min(claimed_at))"
                f" FROM {SCHEMA}.jobs"
            )
        ).one()
    if completed != jobs:
        raise SystemExit(f"of {jobs} jobs only {completed} were completed; the worker said:\n{worker.output}")
    return {
        "drain jobs/s": [jobs / float(seconds)],
        "drain jobs/s with start and stop": [jobs / worker.seconds],
        "drain worker CPU seconds per 10,000 jobs": [worker.cpu_seconds / jobs * 10_000],
    }


def measure_memory(name: str, backlog: int) -> Samples:
    empty_tables()
    fill(backlog)
    worker = run_worker()
    return {f"memory {name} backlog MiB": [max(worker.memory)]} if worker.memory else {}


@dataclass
class WorkerRun:
    """What one worker process took."""

    seconds: float
    cpu_seconds: float
    output: str
    memory: list[float] = field(default_factory=list)  #: MiB, its peak so far; empty where there is no /proc


def run_worker() -> WorkerRun:
    """Let a worker process, started as a user starts one, drain the queue."""
    memory: list[float] = []
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "pgqueue", "worker", "app:pgq", "--drain"],
            cwd=BENCHMARKS,
            env={**os.environ, "PGQUEUE_DATABASE_URL": pgq.url.render_as_string(hide_password=False)},
            stdout=log,
            stderr=log,
        )
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            memory.extend(peak_memory(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
    if process.returncode != 0:
        raise SystemExit(f"the worker ended with exit code {process.returncode}:\n{output}")
    return WorkerRun(seconds, usage.ru_utime + usage.ru_stime, output, memory)


def peak_memory(pid: int) -> Iterator[float]:
    # Not the ru_maxrss of the ended process: that one counts the memory of the process that started it.
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            yield int(line.split()[1]) / 1024


def measure_single(transactions: int) -> Samples:
    """Transactions per second, each of one job, by how the job gets into the table. All on one connection."""
    empty_tables()
    with pgq.engine.connect() as connection:
        kinds = single_kinds(connection)
        seconds = dict.fromkeys(kinds, 0.0)
        done = 0
        blocks = list(kinds)
        while done < transactions:
            count = min(TRANSACTIONS_PER_BLOCK, transactions - done)
            for kind in blocks:
                seconds[kind] += run_block(kinds[kind], count)
            blocks.append(blocks.pop(0))  # each kind follows each other one in turn
            done += count
    return {f"single {kind} /s": [transactions / took] for kind, took in seconds.items()}


def single_kinds(connection: sa.Connection) -> dict[str, Callable[[int], object]]:
    driver = connection.connection.driver_connection
    assert driver is not None
    insert = f"INSERT INTO {SCHEMA}.jobs (task, payload) VALUES (%s, %s) RETURNING id"
    session = Session(connection)

    def insert_by_driver(n: int) -> None:
        driver.execute(insert, ("noop", f'{{"n": {n}}}')).fetchone()
        driver.commit()

    def insert_by_connection(n: int) -> None:
        connection.exec_driver_sql(insert, ("noop", f'{{"n": {n}}}')).scalar_one()
        connection.commit()

    def enqueue_by_connection(n: int) -> None:
        noop.enqueue(connection, n=n)
        connection.commit()

    def insert_by_session(n: int) -> None:
        session.connection().exec_driver_sql(insert, ("noop", f'{{"n": {n}}}')).scalar_one()
        session.commit()

    def enqueue_by_session(n: int) -> None:
        noop.enqueue(session, n=n)
        session.commit()

    return {
        "INSERT by the driver": insert_by_driver,
        "INSERT by a Connection": insert_by_connection,
        "enqueue by a Connection": enqueue_by_connection,
        "INSERT by a Session": insert_by_session,
        "enqueue by a Session": enqueue_by_session,
    }


def run_block(transaction: Callable[[int], object], count: int) -> float:
    began = time.perf_counter()
    for n in range(count):
        transaction(n)
    return time.perf_counter() - began


# Printing --------------------------------------------------------------------------------------------------


def print_machine() -> None:
    with pgq.engine.begin() as connection:
        server = connection.scalar(sa.text("SHOW server_version"))
        names = ("fsync", "synchronous_commit", "full_page_writes", "shared_buffers")
        settings = {name: connection.scalar(sa.text(f"SHOW {name}")) for name in names}
        local = pgq.url.host in (None, "localhost", "127.0.0.1")
        folder = connection.scalar(sa.text("SELECT current_setting('data_directory', true)")) if local else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("pgqueue", "SQLAlchemy", "psycopg"))
    print(f"{cpu_model()}, {usable} processors, {platform.system()} {platform.release()}")
    settings["files on"] = file_system(folder) if folder else "another machine, or not known"
    print(f"PostgreSQL {server} ({', '.join(f'{name} {value}' for name, value in settings.items())})")
    print(f"Python {platform.python_version()}, {packages}\n")


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def file_system(folder: str) -> str:
    """What kind of disk a folder is on: on a tmpfs, durability costs nothing and the figures mean little."""
    try:
        mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    around = [(len(point), kind) for _, point, kind in mounts if Path(folder).is_relative_to(point)]
    return max(around)[1]


def print_table(samples: Samples) -> None:
    medians = {name: statistics.median(values) for name, values in samples.items()}
    print("| measured | median | lowest | highest | ratio | target |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, values in samples.items():
        ratio, target = compare(name, samples)
        shown = (figure(medians[name]), figure(min(values)), figure(max(values)), ratio, target)
        print(f"| {name} | {' | '.join(shown)} |")


#: Name of a figure: what it is divided by, and what it should reach.
RATIOS = {
    "single INSERT by a Connection /s": ("single INSERT by the driver /s", ""),
    "single enqueue by a Connection /s": ("single INSERT by a Connection /s", "ratio ≥ 0.85"),
    "single INSERT by a Session /s": ("single INSERT by the driver /s", ""),
    "single enqueue by a Session /s": ("single INSERT by a Session /s", "ratio ≥ 0.85"),
    "memory long backlog MiB": ("memory short backlog MiB", "flat"),
}
TARGETS = {"drain jobs/s": "≥ 8,000", "bulk jobs/s": "≥ 30,000"}


def compare(name: str, samples: Samples) -> tuple[str, str]:
    """The median of the ratios within each repetition, and the target, as text."""
    base, target = RATIOS.get(name, ("", TARGETS.get(name, "")))
    if base not in samples:
        return "", target
    ratios = [value / other for value, other in zip(samples[name], samples[base], strict=True)]
    what = base.removeprefix("single ").removeprefix("memory ").removesuffix(" /s").removesuffix(" MiB")
    return f"{statistics.median(ratios):.2f} of {what}", target


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


if __name__ == "__main__":
    main()
