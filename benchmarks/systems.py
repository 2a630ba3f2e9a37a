"""The systems that are measured: pgqueue, the hand-written limit, and the peers. All have the same interface.

Each is a program in `programs/` with the same verbs, run in an environment of its own. Here is how it is started,
and how its samples are taken: always by the same clock, and by counting what its tasks noted.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.broker import Broker
from benchmarks.cluster import Cluster

PROGRAMS = Path(__file__).resolve().parent / "programs"
PEERS = Path(__file__).resolve().parent / ".peers"
NODE = PEERS / "node"

#: All processes count microseconds from here.
EPOCH = time.monotonic_ns()

POLL_SECONDS = 0.005
START_SECONDS = 60.0
STALLED_SECONDS = 60.0
STOP_SECONDS = 30.0
PROGRAM_SECONDS = 900.0

CHUNK = 1_000


class Refused(Exception):
    """A sample that must not count; says why."""


@dataclass(frozen=True)
class System:
    """One thing that is measured."""

    name: str
    program: tuple[str, ...]  #: how its program is started, without the verb
    open_jobs: str  #: SQL: how many jobs are not finished; empty for a broker, which has no SQL
    #: Whether that is asked to find the end of a drain. Where asking takes long, the end is when the last job ran,
    #: and it is asked afterwards.
    open_jobs_is_cheap: bool = True
    worker: tuple[str, ...] | None = None  #: the command of a worker, where it is not the verb `work`
    environ: dict[str, str] = field(default_factory=dict)
    share: float = 1.0  #: of the jobs that fast ones get, so that slow ones take about as long
    keeps_history: bool = True
    kept_jobs: str | None = None  #: SQL: how many finished jobs are in the table
    note: str = ""
    template: str = ""  #: name of another system whose tables it works on
    in_broker: bool = False  #: its jobs are in RabbitMQ, not in PostgreSQL

    @property
    def database(self) -> str:
        return "bench_" + (self.template or self.name).replace("-", "_").replace(" ", "_")


PYTHON = sys.executable


def _peer(environment: str, program: str) -> tuple[str, ...]:
    return (str(PEERS / environment / "bin" / "python"), str(PROGRAMS / program))


def _node(program: str) -> tuple[str, ...]:
    # A module finds its packages above its own folder, so the programs are copied there when they are installed.
    return (str(NODE / "node_modules" / "node" / "bin" / "node"), str(NODE / program))


PGQUEUE_OPEN = "SELECT count(*) FROM pgqueue.jobs WHERE status IN ('pending', 'running')"
PGQUEUE_KEPT = "SELECT count(*) FROM pgqueue.jobs WHERE status = 'completed'"
PGQUEUE = (PYTHON, "-m", "pgqueue", "--quiet")
PGQUEUE_WORKER = (*PGQUEUE, "worker", "pgqueue_app:pgq")

SYSTEMS = {
    system.name: system
    for system in (
        System(
            "pgqueue",
            (PYTHON, str(PROGRAMS / "pgqueue_app.py")),
            PGQUEUE_OPEN,
            worker=PGQUEUE_WORKER,
            kept_jobs=PGQUEUE_KEPT,
            note="`def` task, `pgqueue worker`",
        ),
        System(
            "pgqueue-async",
            (PYTHON, str(PROGRAMS / "pgqueue_app.py")),
            PGQUEUE_OPEN,
            worker=PGQUEUE_WORKER,
            environ={"BENCH_TASK": "noop_async"},
            kept_jobs=PGQUEUE_KEPT,
            note="`async def` task, `pgqueue worker`",
            template="pgqueue",
        ),
        System(
            "pgqueue-delete",
            (PYTHON, str(PROGRAMS / "pgqueue_app.py")),
            PGQUEUE_OPEN,
            worker=PGQUEUE_WORKER,
            environ={"BENCH_TASK": "noop_deleted"},
            keeps_history=False,
            note="`def` task with `keep_completed=0`, `pgqueue worker`",
            template="pgqueue",
        ),
        System(
            "pgqueue-polling",
            (PYTHON, str(PROGRAMS / "pgqueue_app.py")),
            PGQUEUE_OPEN,
            worker=(*PGQUEUE_WORKER, "--no-listen"),
            kept_jobs=PGQUEUE_KEPT,
            note="`pgqueue worker --no-listen`, polls every second",
            template="pgqueue",
        ),
        System(
            "pgqueue-transactional",
            (PYTHON, str(PROGRAMS / "pgqueue_app.py")),
            PGQUEUE_OPEN,
            worker=(*PGQUEUE_WORKER, "--concurrency=8"),
            environ={"BENCH_TASK": "write_order"},
            share=0.1,
            kept_jobs=PGQUEUE_KEPT,
            note="transactional task that writes a row, `pgqueue worker --concurrency 8`",
            template="pgqueue",
        ),
        System(
            "limit-transactional",
            (PYTHON, str(PROGRAMS / "limit_transactional.py")),
            PGQUEUE_OPEN,
            share=0.1,
            kept_jobs=PGQUEUE_KEPT,
            note="8 threads by hand: claim, insert, complete in one transaction",
            template="pgqueue",
        ),
        System(
            "limit",
            (PYTHON, str(PROGRAMS / "limit.py")),
            PGQUEUE_OPEN,
            kept_jobs=PGQUEUE_KEPT,
            note="psycopg loop by hand on pgqueue's table; COPY",
            template="pgqueue",
        ),
        System(
            "limit-delete",
            (PYTHON, str(PROGRAMS / "limit.py")),
            PGQUEUE_OPEN,
            environ={"BENCH_DELETE": "1"},
            keeps_history=False,
            note="the same, deleting finished rows",
            template="pgqueue",
        ),
        System(
            "graphile-worker",
            _node("graphile_worker.mjs"),
            "SELECT count(*) FROM graphile_worker._private_jobs",
            keeps_history=False,
            note="Node; local queue 2,000, completions in batches",
        ),
        System(
            "pg-boss",
            _node("pg_boss.mjs"),
            "SELECT count(*) FROM pgboss.job WHERE name = 'noop' AND state < 'completed'",
            kept_jobs="SELECT count(*) FROM pgboss.job WHERE name = 'noop' AND state = 'completed'",
            note="Node; batches of 1,000, two at once, burst mode, NOTIFY",
        ),
        System(
            "pgqueuer",
            _peer("pgqueuer", "pgqueuer_program.py"),
            "SELECT count(*) FROM pgqueuer",
            note="asyncpg, uvloop, batches of 2,000",
        ),
        System(
            "chancy",
            _peer("chancy", "chancy_program.py"),
            "SELECT count(*) FROM chancy_jobs WHERE state NOT IN ('succeeded', 'failed')",
            kept_jobs="SELECT count(*) FROM chancy_jobs WHERE state = 'succeeded'",
            share=0.1,
            note="asyncio executor, concurrency 1,000, eager polling",
        ),
        System(
            "procrastinate",
            _peer("procrastinate", "procrastinate_program.py"),
            "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')",
            kept_jobs="SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'",
            share=0.02,
            note="concurrency 50",
        ),
        System(
            "awa",
            _peer("awa", "awa_program.py"),
            "SELECT count(*) FROM awa.jobs WHERE state::text NOT IN ('completed', 'failed', 'cancelled')",
            open_jobs_is_cheap=False,
            share=0.4,
            note="Rust engine, Python handlers, 256 workers",
        ),
        System(
            "rabbitmq",
            _peer("rabbitmq", "rabbitmq_program.py"),
            "",
            open_jobs_is_cheap=False,
            keeps_history=False,
            in_broker=True,
            share=0.2,
            note="pika; durable queue, persistent messages, confirms, prefetch 250",
        ),
    )
}

PEER_NAMES = ("graphile-worker", "pg-boss", "pgqueuer", "awa", "chancy", "procrastinate", "rabbitmq")
#: The peers that keep their jobs in PostgreSQL.
POSTGRESQL_PEERS = tuple(name for name in PEER_NAMES if not SYSTEMS[name].in_broker)


@dataclass
class Records:
    """What the tasks of all worker processes of a sample noted."""

    runs: list[tuple[int, int]]  #: microseconds, job's number; in the order of time
    cpu_seconds: float  #: of the worker processes, from the first job on

    @property
    def numbers(self) -> list[int]:
        return [number for _, number in self.runs]

    def require_exactly_once(self, jobs: int) -> None:
        counts = collections.Counter(self.numbers)
        missing = jobs - len(counts)
        twice = sum(1 for count in counts.values() if count > 1)
        if missing or twice or (counts and max(counts) >= jobs):
            raise Refused(f"of {jobs} jobs {missing} never ran and {twice} ran more than once")


@dataclass
class Drained:
    """How a backlog was worked off."""

    seconds: float  #: from the start of the first job until the database has no open job
    records: Records
    server_cpu_seconds: float


class Bench:
    """Takes samples of systems on one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._ready: set[str] = set()
        self._broker: Broker | None = None
        self._queues = itertools.count(1)

    @property
    def broker(self) -> Broker:
        if self._broker is None:
            try:
                self._broker = Broker()
            except (OSError, RuntimeError) as error:
                raise Refused(str(error)) from None
        return self._broker

    def close(self) -> None:
        if self._broker is not None:
            self._broker.stop()

    def prepare(self, system: System) -> None:
        """Make the tables of a system once, as a template for all its samples."""
        if system.database in self._ready:
            return
        self.cluster.make_template(system.database)
        self.run(system, system.database, "setup")
        self._ready.add(system.database)

    @contextmanager
    def database(self, system: System) -> Iterator[str]:
        """A database with the system's tables, empty; the name of a fresh queue for a broker."""
        if system.in_broker:
            name = f"bench_{next(self._queues)}"
            self.run(system, name, "setup")
            yield name
            return
        self.prepare(system)
        with self.cluster.database(system.database) as name:
            yield name

    @contextmanager
    def filled_database(self, system: System, name: str, statements: Sequence[str]) -> Iterator[str]:
        """A database with the system's tables after these SQL statements, which are run once for each name."""
        self.prepare(system)
        template = f"{system.database}_{name}"
        if template not in self._ready:
            self.cluster.make_template(template, system.database)
            with self.cluster.connect(template) as connection:
                for statement in statements:
                    connection.execute(statement)
                connection.execute("VACUUM ANALYZE")
            self._ready.add(template)
        with self.cluster.database(template) as database:
            yield database

    def url(self, system: System, database: str) -> str:
        if system.in_broker:
            return self.broker.url(database)
        if system.program[0] == PYTHON:
            return self.cluster.url(database=database)
        return self.cluster.plain_url(database)

    def environ(self, system: System, database: str, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "BENCH_EPOCH": str(EPOCH),
            "PGQUEUE_DATABASE_URL": self.cluster.url(database=database),
            **system.environ,
            **more,
        }

    def run(
        self, system: System, database: str, verb: str, environ: Mapping[str, str] | None = None, **options: Any
    ) -> Any:
        """Run a verb of the system's program to its end; what it printed."""
        return self._run(system.program, system, database, verb, options, environ)

    def run_program(
        self,
        program: str,
        system: System,
        database: str,
        verb: str,
        environ: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Any:
        """Likewise another program of pgqueue's own environment."""
        return self._run((PYTHON, str(PROGRAMS / program)), system, database, verb, options, environ)

    def _run(
        self,
        program: Sequence[str],
        system: System,
        database: str,
        verb: str,
        options: Mapping[str, Any],
        environ: Mapping[str, str] | None = None,
    ) -> Any:
        command = [*program, verb, self.url(system, database), json.dumps(options)]
        done = subprocess.run(
            command,
            env=self.environ(system, database, **(environ or {})),
            cwd=PROGRAMS,
            capture_output=True,
            text=True,
            timeout=PROGRAM_SECONDS,
        )
        if done.returncode != 0:
            raise Refused(f"{system.name} {verb} ended with exit code {done.returncode}:\n{tail(done.stderr)}")
        return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None

    def fill(self, system: System, database: str, jobs: int) -> float:
        """Enqueue so many jobs in bulk; jobs per second."""
        seconds: float = self.run(system, database, "bulk", jobs=jobs, chunk=CHUNK)["seconds"]
        return jobs / seconds

    @contextmanager
    def workers(self, system: System, database: str, processes: int = 1) -> Iterator[Workers]:
        """Worker processes of the system; stopped at the end."""
        if system.worker is not None:
            commands = [(*system.worker, f"--processes={processes}")]
        else:
            commands = [(*system.program, "work", self.url(system, database))] * processes
        with self._running(commands, system, database) as workers:
            yield workers

    @contextmanager
    def workers_of(self, application: str, system: System, database: str, *options: str) -> Iterator[Workers]:
        """A worker of pgqueue for another of the applications in `programs/`."""
        with self._running([(*PGQUEUE, "worker", application, *options)], system, database) as workers:
            yield workers

    @contextmanager
    def _running(self, commands: Sequence[Sequence[str]], system: System, database: str) -> Iterator[Workers]:
        with tempfile.TemporaryDirectory(prefix="pgqueue-bench-") as folder, tempfile.TemporaryFile("w+") as log:
            environ = self.environ(system, database, BENCH_RECORDS=folder)
            running = [
                subprocess.Popen(command, env=environ, cwd=PROGRAMS, stdout=log, stderr=log, process_group=0)
                for command in commands
            ]
            workers = Workers(system, running, Path(folder), log)
            try:
                yield workers
            finally:
                workers.stop()

    def drain(self, system: System, database: str, jobs: int, processes: int = 1) -> Drained:
        """Let workers do all jobs of a backlog, numbered from 0, and check that each ran exactly once."""
        server = self.broker if system.in_broker else self.cluster
        if not system.in_broker:
            self.cluster.settle(database)
        # A broker's queue is asked by nobody: its end is when the last job ran.
        with self.cluster.connect("postgres" if system.in_broker else database) as connection:
            server_before = server.cpu_seconds()
            with self.workers(system, database, processes) as workers:
                workers.wait_for_runs(jobs)
                if not system.open_jobs_is_cheap:
                    server_after = server.cpu_seconds()
                self.wait_until_finished(system, connection, workers)
                ended = (time.monotonic_ns() - EPOCH) / 1e9
                if system.open_jobs_is_cheap:
                    server_after = server.cpu_seconds()
                records = workers.records()
            records.require_exactly_once(jobs)
            if not system.open_jobs_is_cheap:
                ended = records.runs[-1][0] / 1e6
            if system.kept_jobs is not None:
                kept = connection.execute(system.kept_jobs).fetchone()[0]
                if kept != jobs:
                    raise Refused(f"{system.name} shows {kept} finished jobs in its table instead of {jobs}")
        return Drained(ended - records.runs[0][0] / 1e6, records, server_after - server_before)

    def drain_part(self, system: System, database: str, jobs: int) -> float:
        """Let a worker do the first so many jobs of a longer backlog; jobs per second."""
        self.cluster.settle(database)
        with self.cluster.connect(database) as connection, self.workers(system, database) as workers:
            workers.wait_for_runs(jobs)
            records = workers.records()
            kept = connection.execute(system.kept_jobs).fetchone()[0] if system.kept_jobs else len(records.runs)
        if len(set(records.numbers)) < len(records.runs) or kept < len(records.runs):
            raise Refused(f"{system.name} made {len(records.runs)} runs, and {kept} jobs are finished in its table")
        return (jobs - 1) / (records.runs[jobs - 1][0] - records.runs[0][0]) * 1e6

    def wait_until_finished(self, system: System, connection: Any, workers: Workers) -> None:
        deadline = time.monotonic() + STALLED_SECONDS
        while self.open_jobs(system, connection):
            workers.require_running()
            if time.monotonic() > deadline:
                raise Refused(f"{system.name} ran all jobs, but some are not finished in the database")
            time.sleep(POLL_SECONDS)

    def open_jobs(self, system: System, connection: Any) -> int:
        if system.in_broker:
            return 0
        return int(connection.execute(system.open_jobs).fetchone()[0])


@dataclass
class Workers:
    """The running worker processes of one sample."""

    system: System
    processes: Sequence[subprocess.Popen[bytes]]
    folder: Path
    log: Any
    stopped: bool = False

    def runs(self) -> int:
        """How many jobs were run so far, not counting the last few milliseconds."""
        return sum(int.from_bytes(path.read_bytes(), "little") for path in self.folder.glob("*.count"))

    def wait_for_runs(self, jobs: int) -> None:
        """Until so many jobs were run. Refused when nothing moves for long."""
        seen, moved, allowed = 0, time.monotonic(), START_SECONDS
        while (now := self.runs()) < jobs:
            self.require_running()
            if now > seen:
                seen, moved, allowed = now, time.monotonic(), STALLED_SECONDS
            elif time.monotonic() - moved > allowed:
                raise Refused(f"{self.system.name} stopped after {seen} of {jobs} jobs:\n{self.output()}")
            time.sleep(POLL_SECONDS)

    def require_running(self) -> None:
        for process in self.processes:
            if process.poll() is not None:
                raise Refused(f"a worker of {self.system.name} ended ({process.returncode}):\n{self.output()}")

    def stop(self) -> None:
        if self.stopped:
            return
        self.stopped = True
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def records(self) -> Records:
        """What the tasks noted; the workers are stopped for that."""
        self.stop()
        runs: list[tuple[int, int]] = []
        cpu_seconds = 0.0
        for path in self.folder.glob("*.json"):
            noted = json.loads(path.read_text())
            runs.extend(zip(noted["microseconds"], noted["numbers"], strict=True))
            cpu_seconds += noted["cpu_seconds"]
        if not runs:
            raise Refused(f"the workers of {self.system.name} noted nothing:\n{self.output()}")
        return Records(sorted(runs), cpu_seconds)

    def output(self) -> str:
        self.log.seek(0)
        return tail(self.log.read())


def tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])
