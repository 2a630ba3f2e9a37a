"""How fast a backlog is worked off."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import sqlalchemy as sa

from benchmarks.rows import Claim, Metrics, Row, Scale
from benchmarks.systems import EPOCH, PEER_NAMES, PGQUEUE_WORKER, PROGRAMS, SYSTEMS, Bench, Refused, System, Workers

DRAIN = "jobs/s"
WORKER_CPU = "worker CPU s per 10,000 jobs"
SERVER_CPU = "server CPU s per 10,000 jobs"
ALL_CPU = "CPU s per 10,000 jobs"

#: What is asked of the CPU: the figure of graphile-worker on the machine of the first measurements.
ALL_CPU_SECONDS = 0.68


def jobs_for(system: System, scale: Scale) -> int:
    return max(200, int(scale.jobs * system.share))


def drain(bench: Bench, system: System, scale: Scale, processes: int = 1) -> Metrics:
    jobs = jobs_for(system, scale)
    with bench.database(system) as database:
        bench.fill(system, database, jobs)
        drained = bench.drain(system, database, jobs, processes)
    worker, server = (seconds / jobs * 10_000 for seconds in (drained.records.cpu_seconds, drained.server_cpu_seconds))
    return {DRAIN: jobs / drained.seconds, WORKER_CPU: worker, SERVER_CPU: server, ALL_CPU: worker + server}


def drain_by_two(bench: Bench, system: System, scale: Scale) -> Metrics:
    return drain(bench, system, scale, processes=2)


PENDING = (
    "INSERT INTO pgqueue.jobs (task, payload, priority, run_at)"
    " SELECT 'noop', jsonb_build_object('n', n), {priority}, now() + {due} FROM generate_series(0, {jobs} - 1) AS n"
)


def beside(other: str) -> tuple[str, str]:
    return "jobs/s without", f"jobs/s with {other}"


LONG, SCHEDULED = beside("the long backlog"), beside("the scheduled jobs")


def long_backlog(bench: Bench, system: System, scale: Scale) -> Metrics:
    """The first jobs of a short backlog, and as many of a long one."""
    rates = []
    for jobs in (scale.part, scale.long_backlog):
        fill = [PENDING.format(priority=0, due="interval '0 s'", jobs=jobs)]
        with bench.filled_database(system, f"backlog_{jobs}", fill) as database:
            rates.append(bench.drain_part(system, database, scale.part))
    return dict(zip(LONG, rates, strict=True))


def beside_scheduled(bench: Bench, system: System, scale: Scale) -> Metrics:
    """The same due jobs, without and with many that are scheduled for next week in a higher priority."""
    rates = []
    due = PENDING.format(priority=0, due="interval '0 s'", jobs=scale.part)
    later = PENDING.format(priority=5, due="interval '7 days'", jobs=scale.long_backlog)
    for name, fill in (("due", [due]), ("scheduled", [later, due])):
        with bench.filled_database(system, f"{name}_{scale.part}", fill) as database:
            rates.append(bench.drain_part(system, database, scale.part))
    return dict(zip(SCHEDULED, rates, strict=True))


def transactional(bench: Bench, system: System, scale: Scale) -> Metrics:
    jobs = jobs_for(system, scale)
    with bench.database(system) as database:
        bench.fill(SYSTEMS["pgqueue-transactional"], database, jobs)
        drained = bench.drain(system, database, jobs)
        with bench.cluster.connect(database) as connection:
            written = connection.execute("SELECT count(DISTINCT job), count(*) FROM orders").fetchone()
    if written != (jobs, jobs):
        raise Refused(f"{system.name} wrote {written[1]} rows for {written[0]} of {jobs} jobs")
    return {DRAIN: jobs / drained.seconds}


def on_sqlite(bench: Bench, system: System, scale: Scale) -> Metrics:
    """One worker process on a file. Its own disk, its own way to ask: nothing is shared with PostgreSQL's rows."""
    jobs = jobs_for(system, scale)
    with tempfile.TemporaryDirectory(prefix="pgqueue-bench-") as folder, tempfile.TemporaryFile("w+") as log:
        url = f"sqlite:///{folder}/jobs.db"
        environ = {**os.environ, "PGQUEUE_DATABASE_URL": url, "BENCH_RECORDS": folder, "BENCH_EPOCH": str(EPOCH)}
        for verb, options in (("setup", "{}"), ("bulk", f'{{"jobs": {jobs}, "chunk": 1000}}')):
            command = [*system.program, verb, url, options]
            done = subprocess.run(command, env=environ, cwd=PROGRAMS, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                raise Refused(f"{verb} on SQLite: {done.stderr[-1500:]}")
        process = subprocess.Popen(PGQUEUE_WORKER, env=environ, cwd=PROGRAMS, stdout=log, stderr=log, process_group=0)
        workers = Workers(system, [process], Path(folder), log)
        try:
            workers.wait_for_runs(jobs)
            engine = sa.create_engine(url, poolclass=sa.NullPool)
            unfinished = sa.text("SELECT count(*) FROM pgqueue_jobs WHERE status <> 'completed'")
            deadline = time.monotonic() + 30
            while True:
                with engine.connect() as connection:
                    if connection.scalar(unfinished) == 0:
                        break
                if time.monotonic() > deadline:
                    raise Refused("all jobs were run, but some are not finished in the SQLite file")
                time.sleep(0.01)
            ended = (time.monotonic_ns() - EPOCH) / 1e9
            records = workers.records()
        finally:
            workers.stop()
    records.require_exactly_once(jobs)
    return {DRAIN: jobs / (ended - records.runs[0][0] / 1e6)}


EVERYBODY = ("pgqueue", "pgqueue-delete", "limit", "limit-delete", *PEER_NAMES)

ROWS = (
    Row(
        1,
        "Drain of jobs that do nothing, 1 worker process",
        (DRAIN, WORKER_CPU, SERVER_CPU),
        EVERYBODY,
        drain,
        claims=(
            Claim(("pgqueue", DRAIN), (("graphile-worker", DRAIN),), at_least=1.0),
            Claim(("pgqueue", DRAIN), (("pgqueuer", DRAIN),), at_least=2.5),
            Claim(("pgqueue", DRAIN), (("limit", DRAIN),), at_least=0.8),
            Claim(("pgqueue-delete", DRAIN), (("graphile-worker", DRAIN),), at_least=1.3),
        ),
        plotted=True,
    ),
    Row(
        2,
        "Drain, 2 worker processes",
        (DRAIN,),
        EVERYBODY,
        drain_by_two,
        claims=(
            Claim(("pgqueue", DRAIN), (("graphile-worker", DRAIN),), at_least=1.0),
            Claim(("pgqueue-delete", DRAIN), (("graphile-worker", DRAIN),), at_least=1.2),
        ),
        plotted=True,
    ),
    Row(
        3,
        "Drain of `async def` tasks, 1 worker process",
        (DRAIN,),
        ("pgqueue-async", "pgqueuer"),
        drain,
        claims=(Claim(("pgqueue-async", DRAIN), (("pgqueuer", DRAIN),), at_least=2.0),),
    ),
    Row(
        8,
        "The first jobs of a long backlog against those of a short one",
        LONG,
        ("pgqueue", "limit"),
        long_backlog,
        claims=(Claim(("pgqueue", LONG[1]), (("pgqueue", LONG[0]),), at_least=0.95),),
    ),
    Row(
        9,
        "Due jobs beside many that are scheduled for next week in a higher priority",
        SCHEDULED,
        ("pgqueue",),
        beside_scheduled,
        claims=(Claim(("pgqueue", SCHEDULED[1]), (("pgqueue", SCHEDULED[0]),), at_least=0.95),),
    ),
    Row(
        12,
        "Transactional tasks that write a row each, 8 threads",
        (DRAIN,),
        ("pgqueue-transactional", "limit-transactional"),
        transactional,
        claims=(Claim(("pgqueue-transactional", DRAIN), (("limit-transactional", DRAIN),), at_least=0.7),),
    ),
    Row(
        13,
        "CPU of worker and server",
        (ALL_CPU,),
        EVERYBODY,
        drain,
        samples_of=1,
        claims=(
            Claim(("pgqueue", ALL_CPU), at_most=ALL_CPU_SECONDS),
            Claim(("pgqueue", ALL_CPU), (("graphile-worker", ALL_CPU),), at_most=1.0),
        ),
        lower_is_better=True,
    ),
    Row(
        18,
        "Drain on SQLite, 1 worker process",
        (DRAIN,),
        ("pgqueue",),
        on_sqlite,
        claims=(Claim(("pgqueue", DRAIN), at_least=5_000),),
    ),
)
