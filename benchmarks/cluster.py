"""A PostgreSQL of the benchmarks' own, with the durability that PostgreSQL has by default."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import pgserver

#: Everything that concerns durability stays at its default; this much is advised for any server in earnest.
SETTINGS = "-c shared_buffers=1GB -c max_wal_size=4GB"

#: A database as large as this is copied file by file.
LARGE_BYTES = 100 * 1024**2

TICKS = os.sysconf("SC_CLK_TCK")

_numbers = itertools.count(1)


class Cluster(pgserver.Server):
    """A server in a temporary folder (on the disk that TMPDIR names), with a fresh database for each sample."""

    def __init__(self, major: str | None = None) -> None:
        _, folder = pgserver.choose_server(major)
        super().__init__(folder, durable=True)

    def initialize(self) -> None:
        self.settings["postgres_args"] += f" {SETTINGS}"
        super().initialize()

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        return psycopg.connect(self.plain_url(database), autocommit=True)

    def plain_url(self, database: str) -> str:
        """The URL as psycopg and all drivers but SQLAlchemy's take it."""
        return self.url(database=database).replace("+psycopg", "")

    def make_template(self, name: str, like: str = "template1") -> str:
        with self.connect() as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}"')
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{like}"')
        return name

    @contextmanager
    def database(self, template: str) -> Iterator[str]:
        """A copy of a template that nothing has been done to; gone afterwards."""
        name = f"{template}_{next(_numbers)}"
        with self.connect() as connection:
            size = connection.execute("SELECT pg_database_size(%s)", [template]).fetchone()[0]
            strategy = "file_copy" if size > LARGE_BYTES else "wal_log"
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY {strategy}')
            try:
                yield name
            finally:
                connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def settle(self, database: str) -> None:
        """Statistics as autovacuum would have made them by now, and no checkpoint left over from what was done."""
        with self.connect(database) as connection:
            connection.execute("ANALYZE")
            connection.execute("CHECKPOINT")

    def cpu_seconds(self) -> float:
        """Of the server with all its processes, those that have ended included."""
        return cpu_seconds_of(self.child_process.pid)

    def statements_logged(self) -> int:
        """How many statements were written to the server's log, by databases with log_statement = all."""
        log = Path(self.base_dir) / f"{self.name}.log"
        with log.open(errors="replace") as lines:
            return sum(1 for line in lines if "LOG:  statement:" in line or "LOG:  execute " in line)

    def describe(self) -> str:
        with self.connect() as connection:
            row = connection.execute("SHOW server_version").fetchone()
            names = ("fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size")
            settings = [f"{name} {connection.execute(f'SHOW {name}').fetchone()[0]}" for name in names]
        return f"PostgreSQL {row[0]} ({', '.join(settings)}), files on {file_system(self.data_folder)}"


def cpu_seconds_of(pid: int) -> float:
    """Of a process, its children, theirs, and of all of these that have ended and were waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = [
            int(child)
            for task in os.listdir(f"/proc/{pid}/task")
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        ]
    except OSError:  # it ended just now
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS + sum(map(cpu_seconds_of, children))


def file_system(folder: Path) -> str:
    """What kind of disk a folder is on: on a tmpfs, durability costs nothing and the figures mean little."""
    try:
        mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    around = [(len(point), kind) for _, point, kind in mounts if folder.is_relative_to(point)]
    return max(around)[1]
