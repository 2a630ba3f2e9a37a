"""What workers cost: memory, and idling."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.cluster import cpu_seconds_of
from benchmarks.rows import Claim, Metrics, Row, Scale
from benchmarks.scenarios.drain import PENDING
from benchmarks.systems import Bench, Refused, System, Workers

SHORT_BACKLOG = 10_000
SAMPLE_SECONDS = 0.5
DRAIN_SECONDS_MAX = 600.0

MEMORY, MORE_WAITING, MORE_DONE = "MiB", "MiB more beside a long backlog", "MiB more after all of it"

IDLE_WORKERS = 10
SETTLE_SECONDS = 5.0
CPU, STATEMENTS, WORKER_CPU, SERVER_CPU = (
    "% of a core",
    "statements/s",
    "% of a core, workers",
    "% of a core, server",
)


def memory(bench: Bench, system: System, scale: Scale) -> Metrics:
    """The largest memory of a worker process so far: after a short backlog, and in the course of a long one."""
    short = peak_memory(bench, system, SHORT_BACKLOG)
    long = peak_memory(bench, system, scale.long_backlog)
    return {MEMORY: short[-1], MORE_WAITING: long[0] - short[-1], MORE_DONE: long[-1] - short[-1]}


def peak_memory(bench: Bench, system: System, jobs: int) -> list[float]:
    """MiB when SHORT_BACKLOG jobs were done, and when all were."""
    fill = [PENDING.format(priority=0, due="interval '0 s'", jobs=jobs).replace("'noop'", "'silent'")]
    with (
        bench.filled_database(system, f"silent_{jobs}", fill) as database,
        bench.cluster.connect(database) as connection,
        bench.workers(system, database) as workers,
    ):
        early: float | None = None
        deadline = time.monotonic() + DRAIN_SECONDS_MAX
        while True:
            workers.require_running()
            pending = _pending(connection)
            peak = _peak(workers.processes[0].pid)
            if early is None and pending <= jobs - SHORT_BACKLOG:
                early = peak
            if pending == 0 and bench.open_jobs(system, connection) == 0:
                return [early if early is not None else peak, _peak(workers.processes[0].pid)]
            if time.monotonic() > deadline:
                raise Refused(f"{pending} of {jobs} jobs were still waiting after {DRAIN_SECONDS_MAX:g} s")
            time.sleep(SAMPLE_SECONDS)


def _pending(connection: Any) -> int:
    return int(connection.execute("SELECT count(*) FROM pgqueue.jobs WHERE status = 'pending'").fetchone()[0])


def _peak(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise Refused(f"process {pid} does not tell its memory")


def idle(bench: Bench, system: System, scale: Scale) -> Metrics:
    """Ten worker processes on one database, with nothing to do."""
    with bench.database(system) as database:
        with bench.cluster.connect() as connection:
            connection.execute(f"ALTER DATABASE \"{database}\" SET log_statement = 'all'")
        with bench.workers(system, database, IDLE_WORKERS) as workers:
            _wait_for_heartbeats(bench, database)
            time.sleep(SETTLE_SECONDS)
            workers_before, server_before = _cpu_seconds(workers), bench.cluster.cpu_seconds()
            logged_before, began = bench.cluster.statements_logged(), time.monotonic()
            time.sleep(scale.idle_seconds)
            seconds = time.monotonic() - began
            statements = bench.cluster.statements_logged() - logged_before
            workers_after, server_after = _cpu_seconds(workers), bench.cluster.cpu_seconds()
    of_workers = (workers_after - workers_before) / seconds * 100
    of_server = (server_after - server_before) / seconds * 100
    return {
        CPU: of_workers + of_server,
        STATEMENTS: statements / seconds,
        WORKER_CPU: of_workers,
        SERVER_CPU: of_server,
    }


def _wait_for_heartbeats(bench: Bench, database: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        with bench.cluster.connect(database) as connection:
            alive = connection.execute("SELECT count(*) FROM pgqueue.workers").fetchone()[0]
        if alive == IDLE_WORKERS:
            return
        if time.monotonic() > deadline:
            raise Refused(f"of {IDLE_WORKERS} workers {alive} came up")
        time.sleep(0.2)


def _cpu_seconds(workers: Workers) -> float:
    """Of the worker processes and their supervisor."""
    return sum(cpu_seconds_of(process.pid) for process in workers.processes)


ROWS = (
    Row(
        14,
        "Memory of a worker process",
        (MEMORY, MORE_WAITING, MORE_DONE),
        ("pgqueue",),
        memory,
        claims=(Claim(("pgqueue", MORE_WAITING), at_most=10), Claim(("pgqueue", MORE_DONE), at_most=10)),
        repeat=1,
    ),
    Row(
        15,
        f"{IDLE_WORKERS} idle workers on one database",
        (CPU, STATEMENTS, WORKER_CPU, SERVER_CPU),
        ("pgqueue",),
        idle,
        claims=(Claim(("pgqueue", CPU), at_most=2), Claim(("pgqueue", STATEMENTS), at_most=20)),
        repeat=2,
    ),
)
