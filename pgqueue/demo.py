"""`pgqueue demo`: a small application that indexes real files, loses a worker half-way, and checks every result.

Read it as an example of an application:

1. `File` and `Effect` are its own tables: mapped classes, in the database that also holds the jobs.
2. `open_queue` makes the queue and registers the one task. It is transactional: what it writes and the completion of
   its job commit together.
3. `enqueue_files` stores a row and a job for each file in one transaction: both exist, or neither.
4. `work` is a worker process.
5. `find_problems` compares what the workers wrote with the files themselves.

What follows is the demonstration: `run_demo` starts real worker processes, kills one with SIGKILL while it holds
jobs, waits until every job is final, and takes away all it made.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

import sqlalchemy as sa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgqueue import migration
from pgqueue.client import PgQueue, Task
from pgqueue.config import WorkerConfig, checked_schema
from pgqueue.dialect import POSTGRESQL, SQLITE
from pgqueue.engine import errors_explained, make_engine, parse_url
from pgqueue.errors import ConfigurationError, PgqueueError
from pgqueue.executor import current_job
from pgqueue.job import EventType, JobStatus
from pgqueue.retry import Retry
from pgqueue.worker import Worker

logger = logging.getLogger(__name__)

TASK = "pgqueue_demo.index_file"

#: Not worth indexing: what is installed beside the standard library, and what Python writes by itself.
FOLDERS_LEFT_OUT = ("__pycache__", "site-packages", "dist-packages")

#: Files whose rows and jobs are stored in one transaction.
BATCH_FILES = 200

READ_BYTES = 1024 * 1024


# The application -------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class File(Base):
    """A file to index, and what a worker found in it."""

    __tablename__ = "pgqueue_demo_files"

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]  #: percent-encoded, because the name of a file need not be text
    version: Mapped[str]  #: what tells that the file has not changed since; see `file_version`
    sha256: Mapped[str | None]
    lines: Mapped[int | None] = mapped_column(sa.BigInteger)
    words: Mapped[int | None] = mapped_column(sa.BigInteger)
    error: Mapped[str | None]  #: why there are no numbers: the file could not be read


class Effect(Base):
    """A row per committed run of the task. No constraint keeps a file from having two: that would hide the very
    mistake that the demo looks for."""

    __tablename__ = "pgqueue_demo_effects"

    id: Mapped[int] = mapped_column(primary_key=True)
    file_id: Mapped[int] = mapped_column(index=True)
    worker: Mapped[str]
    attempt: Mapped[int]


def open_queue(url: str | sa.URL, schema: str) -> tuple[PgQueue, Task[[int, str], None]]:
    """The queue and its task, for the process that enqueues and for those that work.

    The application's tables stand beside pgqueue's: on PostgreSQL in the same schema.
    """
    engine = make_engine(url)
    if engine.dialect.name == POSTGRESQL:
        engine = engine.execution_options(schema_translate_map={None: schema})
    pgq = PgQueue(engine, schema=schema)

    @pgq.task(name=TASK, transactional=True, retry=Retry(max_retries=10, base=0.1, cap=2.0))
    def index_file(session: Session, file_id: int, path: str) -> None:
        # First the work that needs no database, so that the transaction is short.
        contents = read_contents(decoded_path(path))
        file = session.get_one(File, file_id)
        file.sha256, file.lines, file.words, file.error = contents
        job = current_job()
        session.add(Effect(file_id=file_id, worker=job.claimed_by, attempt=job.attempt))

    return pgq, index_file


def close_queue(pgq: PgQueue) -> None:
    """Close all connections of a queue that `open_queue` made."""
    pgq.dispose()
    pgq.engine.dispose()


def enqueue_files(session: Session, index_file: Task[[int, str], None], paths: Sequence[Path]) -> None:
    """Store a row and a job for each file, in the transaction of `session`. A file that is gone gets neither."""
    files = [
        File(path=encoded_path(path), version=version) for path in paths if (version := file_version(path)) is not None
    ]
    session.add_all(files)
    session.flush()  # gives them their ids
    index_file.enqueue_many(session, [{"file_id": file.id, "path": file.path} for file in files])


class Contents(NamedTuple):
    """What is in a file; or, when it cannot be read, why not."""

    sha256: str | None = None
    lines: int | None = None  #: newline characters
    words: int | None = None  #: runs of bytes that are not ASCII white space
    error: str | None = None


def read_contents(path: Path) -> Contents:
    """Hash and count a file of any size, as bytes: nothing needs to be decodable. A file that cannot be read is a
    result as well: the error's name."""
    digest, lines, words, inside_word = hashlib.sha256(), 0, 0, False
    try:
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
                lines += chunk.count(b"\n")
                # A word that goes on from the last chunk was counted there.
                words += len(chunk.split()) - (inside_word and not chunk[:1].isspace())
                inside_word = not chunk[-1:].isspace()
    except OSError as error:
        return Contents(error=type(error).__name__)
    return Contents(digest.hexdigest(), lines, words)


def encoded_path(path: Path) -> str:
    return quote_from_bytes(os.fsencode(path))


def decoded_path(path: str) -> Path:
    return Path(os.fsdecode(unquote_to_bytes(path)))


def file_version(path: Path) -> str | None:
    """Something that changes with every change of the file; None when there is no regular file of that name."""
    try:
        found = path.lstat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


# A worker process ------------------------------------------------------------------------------------------

#: Read by the worker processes. Not arguments: those everybody on the machine can read.
URL_VARIABLE, SCHEMA_VARIABLE, NAME_VARIABLE = "PGQUEUE_DEMO_URL", "PGQUEUE_DEMO_SCHEMA", "PGQUEUE_DEMO_WORKER"

#: Short, so that the demo shows in seconds what takes up to `lease + sweep_interval` in production.
LEASE_SECONDS, SWEEP_SECONDS, POLL_SECONDS = 2.0, 0.25, 0.1

#: Files that one worker indexes at once.
CONCURRENCY = 4


def work() -> None:
    """Index files until the demo closes this process's standard input, or is gone, which closes it too."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    pgq, _ = open_queue(os.environ[URL_VARIABLE], os.environ[SCHEMA_VARIABLE])
    worker = Worker(
        pgq,
        WorkerConfig(
            name=os.environ[NAME_VARIABLE],
            queues={"default": CONCURRENCY},
            lease=LEASE_SECONDS,
            sweep_interval=SWEEP_SECONDS,
            poll_interval=POLL_SECONDS,
        ),
    )

    def stop_at_end_of_input() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        worker.stop()

    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    worker.run()
    close_queue(pgq)


# The check -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Findings:
    """What the check found."""

    problems: list[str] = field(default_factory=list)  #: what contradicts "every effect exactly once"
    changed: int = 0  #: files that changed during the demo: their contents cannot be compared
    unreadable: int = 0  #: files that could not be read, and the workers said so


def find_problems(session: Session, pgq: PgQueue) -> Findings:
    """Compare the results with the files themselves: one completed job, one effect and the right numbers for each.

    A file that is not the same as when it was enqueued (another size, time or inode, or gone) still must have its
    one effect, but its numbers are not compared, and it is counted as changed.
    """
    problems = _unfinished_jobs(session, pgq)
    changed = unreadable = 0
    effects = sa.func.count(Effect.id)
    query = sa.select(File, effects).outerjoin(Effect, Effect.file_id == File.id).group_by(File.id).order_by(File.id)
    for file, count in session.execute(query.execution_options(yield_per=BATCH_FILES)):
        path = decoded_path(file.path)
        if count != 1:
            problems.append(f"{file.path}: {count} effects instead of 1")
        stored = Contents(file.sha256, file.lines, file.words, file.error)
        true = read_contents(path)
        if stored == true:
            unreadable += true.error is not None
        elif file_version(path) != file.version:
            changed += 1
        else:
            differing = [name for name in Contents._fields if getattr(stored, name) != getattr(true, name)]
            problems.append(f"{file.path}: the stored {' and '.join(differing)} is not that of the file")
    return Findings(problems, changed, unreadable)


def _unfinished_jobs(session: Session, pgq: PgQueue) -> list[str]:
    """A line for each job that is not completed, and one if there are not as many jobs as files."""
    jobs = pgq.tables.jobs.c
    problems = []
    for job in session.scalars(sa.select(pgq.Job).where(jobs.status != JobStatus.COMPLETED).order_by(jobs.id)):
        error = f": {job.error['type']}: {job.error['message']}" if job.error else ""
        problems.append(f"job {job.id} is {job.status}, not completed{error}")
    stored, files = _count(session, pgq.Job), _count(session, File)
    if stored != files:
        problems.append(f"there are {stored} jobs for {files} files")
    return problems


def _count(session: Session, rows: type) -> int:
    return session.scalars(sa.select(sa.func.count()).select_from(rows)).one()


# The demonstration -----------------------------------------------------------------------------------------

#: The most worker processes.
WORKERS_MAX = 64

#: A worker is killed when this part of the jobs is done.
KILL_AFTER = 1 / 3

#: How often the whole is done again because all jobs were done before a worker that held some could be killed.
ROUNDS_MAX = 3

#: Between two looks at the queue: while the moment to kill a worker must not be missed, and otherwise.
KILL_LOOK_SECONDS, LOOK_SECONDS = 0.005, 0.05

#: How long nothing may happen while jobs are open.
STALL_SECONDS = 60.0

#: How long a worker may take to stop by itself.
STOP_SECONDS = 10.0

#: A worker that gave a sign of life so lately belongs to a demo that is running.
ALIVE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What a demo did."""

    files: int  #: indexed, one way or another
    jobs: int  #: enqueued and final
    workers: int  #: processes at work at a time
    killed: int  #: of them, by SIGKILL
    recovered: int  #: jobs that a killed worker held and the sweep took back
    seconds: float  #: from the first enqueue until the last job was final, recovery included
    jobs_per_second: float
    unreadable: int  #: files whose result is that they cannot be read
    changed: int  #: files that changed meanwhile, so that their contents were not compared
    exactly_once: bool  #: whether `problems` is empty
    problems: list[str]  #: what contradicts that every effect happened exactly once


def run_demo(
    directory: Path | None,
    url: str | None,
    *,
    schema: str,
    workers: int,
    kill: bool,
    console: Console,
) -> DemoReport:
    """Index the regular files below `directory` (None: Python's standard library) and report.

    Links are not followed; folders that may not be read, or are in FOLDERS_LEFT_OUT, are left out. A file that is
    small, binary, unreadable or gone when its turn comes has a result like any other. When all jobs are done before
    a worker that holds some can be killed, as with a handful of files, the whole is done again, a few times.

    url: the database; None: SQLite, in a temporary file.
    schema: the demo keeps its tables apart from real jobs, in a schema `{schema}_demo` (on SQLite: a prefix) that
    must not hold anything else. It is dropped at the end.
    workers: how many processes work; kill: whether one of them is killed, and replaced.
    console: where the progress bar goes, if that is a terminal.

    Raises ConfigurationError when an argument cannot work or the schema is in use, DatabaseUnreachable, and
    PgqueueError when a worker process fails or nothing happens any more.
    """
    if not 1 <= workers <= WORKERS_MAX:
        raise ConfigurationError(f"workers must be between 1 and {WORKERS_MAX}, got {workers!r}")
    checked_schema(schema)
    demo_schema = checked_schema(f"{schema}_demo")
    root = Path(sysconfig.get_paths()["stdlib"]) if directory is None else directory
    if not root.is_dir():
        raise ConfigurationError(f"{str(root)!r} is not a directory; name one whose files are to be indexed")
    paths = list(regular_files(root))

    with _ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="pgqueue-demo-") as folder:
        database = sa.URL.create(SQLITE, database=os.path.join(folder, "demo.db")) if url is None else parse_url(url)
        if database.get_backend_name() == SQLITE and database.database in (None, "", ":memory:"):
            raise ConfigurationError("a SQLite database in memory cannot be shared by processes; name a file")
        with errors_explained(database):
            for _ in range(ROUNDS_MAX):
                report = _Demo(database, demo_schema, paths, workers, kill, Path(folder), console).run()
                if not kill or not report.files or report.recovered or report.problems:
                    return report
                console.print("All jobs were done before a worker that held some of them could be killed.")
    return report


def regular_files(root: Path) -> Iterator[Path]:
    """The files below `root`, in order, as absolute paths."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in FOLDERS_LEFT_OUT)
        for name in sorted(names):
            path = Path(folder, name)
            if file_version(path) is not None:
                yield path.absolute()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process through its `finally` clauses, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


class _Demo:
    """One round: tables made, files indexed, a worker killed, results checked, tables dropped."""

    def __init__(
        self,
        url: sa.URL,
        schema: str,
        paths: Sequence[Path],
        workers: int,
        kill: bool,
        folder: Path,
        console: Console,
    ) -> None:
        self._url = url
        self._pgq, self._index_file = open_queue(url, schema)
        self._paths = paths
        self._workers = workers
        self._kill = kill
        self._crew = _Crew(url, schema, folder)
        self._killed = 0
        self._held: set[int] = set()  #: the jobs that killed workers held when they died
        self._progress = Progress(
            TextColumn("indexing"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def run(self) -> DemoReport:
        try:
            with _demo_tables(self._pgq):
                with self._crew, self._progress:
                    seconds = self._index()
                with Session(self._pgq.engine) as session, session.begin():
                    return self._report(session, seconds)
        finally:
            close_queue(self._pgq)

    def _index(self) -> float:
        """Have all files indexed; how many seconds it took."""
        if not self._paths:
            return 0.0
        for _ in range(self._workers):
            self._crew.start()
        bar = self._progress.add_task("", total=len(self._paths), note="")
        began = time.monotonic()
        for start in range(0, len(self._paths), BATCH_FILES):
            with Session(self._pgq.engine) as session, session.begin():
                enqueue_files(session, self._index_file, self._paths[start : start + BATCH_FILES])
            self._look(bar)
        last_seen, last_change = -1, began
        while True:
            looked_at = time.monotonic()
            done, waiting, running = self._look(bar)
            if not waiting and not running:
                return time.monotonic() - began
            if done != last_seen or running:
                last_seen, last_change = done, looked_at
            elif looked_at - last_change > STALL_SECONDS:
                raise PgqueueError(f"no job was run for {STALL_SECONDS:g} s, although {waiting} are waiting")
            # Counting the jobs of a large directory takes time, and is not what the database is for just now.
            pause = KILL_LOOK_SECONDS if self._kill and not self._held else LOOK_SECONDS
            time.sleep(max(pause, 5 * (time.monotonic() - looked_at)))

    def _look(self, bar: TaskID) -> tuple[int, int, int]:
        """How many jobs are done, waiting, running. Kills a worker when it is time for that."""
        self._crew.require_alive()
        status = self._pgq.tables.jobs.c.status
        with self._pgq.reading() as connection:
            rows = connection.execute(sa.select(status, sa.func.count()).group_by(status))
            jobs: dict[str, int] = {row[0]: row[1] for row in rows}
        waiting, running = jobs.pop(JobStatus.PENDING, 0), jobs.pop(JobStatus.RUNNING, 0)
        done = sum(jobs.values())
        self._progress.update(bar, completed=done)
        if self._kill and not self._held and running and done >= len(self._paths) * KILL_AFTER:
            self._kill_busiest()
            self._progress.update(bar, note=f"killed a worker that held {len(self._held)} jobs")
        return done, waiting, running

    def _kill_busiest(self) -> None:
        """Kill the worker that holds most jobs, note which, and start another one, as a supervisor would."""
        jobs = self._pgq.tables.jobs.c
        running = jobs.status == JobStatus.RUNNING
        most_jobs = sa.select(jobs.claimed_by).where(running).group_by(jobs.claimed_by).order_by(sa.func.count().desc())
        with self._pgq.reading() as connection:
            worker = connection.scalar(most_jobs)
        if worker is None or not self._crew.kill(worker):
            return
        self._killed += 1
        # It is dead: what it holds now, it will hold until its lease ends.
        with self._pgq.reading() as connection:
            self._held.update(connection.scalars(sa.select(jobs.id).where(running, jobs.claimed_by == worker)))
        self._crew.start()

    def _report(self, session: Session, seconds: float) -> DemoReport:
        events = self._pgq.tables.job_events.c
        swept = sa.select(events.job_id).where(events.event == EventType.SWEEP, events.job_id.in_(self._held))
        jobs = _count(session, self._pgq.Job)
        findings = find_problems(session, self._pgq)
        return DemoReport(
            files=_count(session, File),
            jobs=jobs,
            workers=self._workers,
            killed=self._killed,
            recovered=len(session.scalars(swept.distinct()).all()),
            seconds=seconds,
            jobs_per_second=jobs / seconds if seconds else 0.0,
            unreadable=findings.unreadable,
            changed=findings.changed,
            exactly_once=not findings.problems,
            problems=findings.problems,
        )


class _Crew:
    """The worker processes. None outlives it: they stop when their standard input ends, even if this process was
    killed; and they are killed if they do not."""

    def __init__(self, url: sa.URL, schema: str, folder: Path) -> None:
        self._environ = {
            **os.environ,
            URL_VARIABLE: url.render_as_string(hide_password=False),
            SCHEMA_VARIABLE: schema,
        }
        self._log = folder / "workers.log"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started = 0

    def start(self) -> None:
        self._started += 1
        name = f"demo-{self._started}"
        with self._log.open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "pgqueue.demo"],
                env={**self._environ, NAME_VARIABLE: name},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends them
            )

    def kill(self, worker: str) -> bool:
        """SIGKILL the process of a worker, named as in `claimed_by`; whether there is such a process."""
        process = self._processes.pop(worker.partition(":")[0], None)
        if process is None:
            return False
        _end(process)
        return True

    def require_alive(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                lines = self._log.read_text(errors="replace").strip().splitlines()
                raise PgqueueError(
                    f"the demo's worker {name} ended by itself with exit code {process.returncode}; "
                    f"its last words: {lines[-1] if lines else 'none'}"
                )

    def __enter__(self) -> _Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                deadline = time.monotonic() + STOP_SECONDS
                for process in self._processes.values():
                    assert process.stdin is not None
                    process.stdin.close()
                for process in self._processes.values():
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in self._processes.values():
                _end(process)
            self._processes.clear()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


# The demo's tables -----------------------------------------------------------------------------------------


@contextmanager
def _demo_tables(pgq: PgQueue) -> Iterator[None]:
    """Make the application's tables and pgqueue's, in a schema of their own, and drop them at the end.

    Raises ConfigurationError when that schema is in use. What a killed demo left there is dropped first.
    """
    _require_unused(pgq)
    _drop(pgq)
    _create(pgq)
    try:
        migration.upgrade(pgq.engine, pgq.schema)
        yield
    except BaseException:
        try:
            _drop(pgq)
        except Exception as error:  # noqa: BLE001 — the first error says what went wrong
            logger.warning(
                "the demo's tables in schema %r could not be dropped: %s; the next demo drops them", pgq.schema, error
            )
        raise
    _drop(pgq)


def _require_unused(pgq: PgQueue) -> None:
    """Refuse a schema that holds anything but what a demo left there."""
    with pgq.reading() as connection:
        names = _table_names(connection, pgq)
        strange = names - _known_names(pgq)
        if strange:
            raise ConfigurationError(
                f"schema {pgq.schema!r} is not the demo's own: it has the table {min(strange)!r}. "
                "The demo drops its schema at the end; let it use another one with --schema"
            )
        if pgq.tables.jobs.name not in names:
            return
        other = connection.scalar(sa.select(pgq.tables.jobs.c.task).where(pgq.tables.jobs.c.task != TASK).limit(1))
        if other is not None:
            raise ConfigurationError(
                f"schema {pgq.schema!r} is not the demo's own: it has jobs of the task {other!r}. "
                "The demo drops its schema at the end; let it use another one with --schema"
            )
    if any(worker["silent_seconds"] < ALIVE_SECONDS for worker in pgq.workers()):
        raise ConfigurationError(
            f"another demo is running in schema {pgq.schema!r}, or was until a moment ago: wait for its end, "
            "or use another schema with --schema"
        )


def _create(pgq: PgQueue) -> None:
    """Make the application's tables. Of two demos that start at once, only one can."""
    with pgq.engine.begin() as connection:
        if connection.dialect.name == POSTGRESQL:
            connection.execute(sa.schema.CreateSchema(pgq.schema, if_not_exists=True))
        if File.__tablename__ in _table_names(connection, pgq):
            raise ConfigurationError(f"another demo is starting in schema {pgq.schema!r}: wait for its end")
        Base.metadata.create_all(connection, checkfirst=False)


def _drop(pgq: PgQueue) -> None:
    """Drop the demo's tables, as far as they are there, and its schema. Never more: no CASCADE."""
    with pgq.reading() as connection:
        migrated = migration.current_revision(connection, pgq.schema) is not None
    if migrated:
        migration.downgrade(pgq.engine, pgq.schema, "base")
    schema = _schema_name(pgq)
    with pgq.engine.begin() as connection:
        for name in sorted(_table_names(connection, pgq) & _known_names(pgq)):
            sa.Table(name, sa.MetaData(schema=schema)).drop(connection)
        if schema is not None:
            connection.execute(sa.schema.DropSchema(schema, if_exists=True))


def _table_names(connection: sa.Connection, pgq: PgQueue) -> set[str]:
    """The tables in the demo's schema; on SQLite those that have its prefix, and the application's."""
    names = sa.inspect(connection).get_table_names(schema=_schema_name(pgq))
    if connection.dialect.name == SQLITE:
        return {name for name in names if name.startswith(f"{pgq.schema}_") or name in Base.metadata.tables}
    return set(names)


def _known_names(pgq: PgQueue) -> set[str]:
    prefix = "" if pgq.tables.dialect_name == POSTGRESQL else f"{pgq.schema}_"
    pgqueue_tables = {table.name for table in pgq.tables.metadata.tables.values()}
    return pgqueue_tables | set(Base.metadata.tables) | {f"{prefix}alembic_version"}


def _schema_name(pgq: PgQueue) -> str | None:
    return pgq.schema if pgq.tables.dialect_name == POSTGRESQL else None


if __name__ == "__main__":
    work()
