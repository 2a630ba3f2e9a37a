"""`pgqueue demo`: real files, real worker processes, one of them killed, and a check that can fail."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from command import Command, running
from rich.console import Console
from sqlalchemy.orm import Session
from support import execute, scalar, wait_for

from pgqueue import ConfigurationError, PgQueue, PgqueueError, Task, Worker, WorkerConfig, demo, migration, store
from pgqueue.demo import (
    Base,
    Contents,
    DemoReport,
    Effect,
    File,
    Findings,
    close_queue,
    enqueue_files,
    find_problems,
    open_queue,
)
from pgqueue.engine import make_engine

#: Enough for workers to be at work for a while, few enough to be quick.
FILES = 150


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with FILES files in two folders."""
    root = tmp_path / "files"
    for number in range(FILES):
        path = root / f"folder {number % 2}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"some words of file %d\n" % number * 500)
    return root


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A directory with two files."""
    root = tmp_path / "few"
    root.mkdir()
    for name in ("a", "b"):
        (root / name).write_text(name)
    return root


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """All processes that the demo has started so far."""
    started = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return started


def run_demo(directory: Path | None, url: str | None, **options: Any) -> DemoReport:
    settings: dict[str, Any] = {
        "schema": "pgqueue",
        "workers": 2,
        "kill": False,
        "console": Console(file=io.StringIO()),
    }
    return demo.run_demo(directory, url, **{**settings, **options})


def all_tables(url: str) -> set[tuple[str | None, str]]:
    """Every schema and table of the database."""
    engine = make_engine(url)
    inspector = sa.inspect(engine)
    schemas = [name for name in inspector.get_schema_names() if name != "information_schema"]
    found = {(schema, table) for schema in schemas for table in ["", *inspector.get_table_names(schema)]}
    engine.dispose()
    return found


# The demonstration


def test_every_effect_happens_exactly_once_although_a_worker_is_killed(
    url: str, folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    before = all_tables(url)

    report = run_demo(folder, url, workers=3, kill=True)

    assert (report.files, report.jobs, report.workers) == (FILES, FILES, 3)
    assert (report.exactly_once, report.problems) == (True, [])
    assert report.killed >= 1
    assert report.recovered >= 1
    assert report.jobs_per_second == pytest.approx(FILES / report.seconds)
    assert all_tables(url) == before
    assert all(process.returncode is not None for process in processes)
    assert -signal.SIGKILL in [process.returncode for process in processes]


def test_the_only_worker_can_be_killed_because_it_is_replaced(sqlite_url: str, folder: Path) -> None:
    report = run_demo(folder, sqlite_url, workers=1, kill=True)

    assert (report.jobs, report.exactly_once) == (FILES, True)
    assert report.killed >= 1
    assert report.recovered >= 1


def test_nobody_is_killed_unless_wanted(url: str, folder: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    report = run_demo(folder, url, kill=False)

    assert (report.files, report.jobs, report.killed, report.recovered) == (FILES, FILES, 0, 0)
    assert report.exactly_once
    assert [process.returncode for process in processes] == [0, 0]


def test_without_a_database_it_runs_on_a_sqlite_file_that_is_removed(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    report = run_demo(few, None, workers=1)

    assert (report.jobs, report.exactly_once) == (2, True)
    assert list(scratch.iterdir()) == []


def test_an_empty_directory_needs_no_worker(url: str, tmp_path: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    before = all_tables(url)
    (tmp_path / "nothing").mkdir()

    report = run_demo(tmp_path / "nothing", url, kill=True)

    assert (report.files, report.jobs, report.jobs_per_second, report.exactly_once) == (0, 0, 0.0, True)
    assert processes == []
    assert all_tables(url) == before


def test_files_of_any_bytes_and_any_name_are_indexed(url: str, tmp_path: Path) -> None:
    root = tmp_path / "files"
    root.mkdir()
    (root / "binary").write_bytes(bytes(range(256)) * 10)
    (root / "empty").touch()
    (root / "name with 100% ?#\n").write_text("text")
    if sys.platform == "linux":  # elsewhere the name of a file has to be text
        Path(os.fsdecode(os.fsencode(root) + b"/not \xff text")).write_text("text")

    report = run_demo(root, url)

    assert report.files == len(list(root.iterdir()))
    assert (report.unreadable, report.changed, report.problems) == (0, 0, [])


def test_only_regular_files_of_the_directory_itself_are_indexed(tmp_path: Path) -> None:
    root = tmp_path / "files"
    for name in ("kept/a", "__pycache__/b", "site-packages/c", "kept/dist-packages/d"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "link").symlink_to(root / "kept" / "a")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")

    found = list(demo.regular_files(root))

    assert found == [root / "kept" / "a"]


def test_without_a_directory_it_indexes_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(demo, "regular_files", lambda root: seen.append(root) or iter([]))

    run_demo(None, None)

    assert (seen[0] / "asyncio" / "__init__.py").is_file()


def test_jobs_that_are_done_too_soon_to_kill_a_worker_are_done_again(
    sqlite_url: str, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo._Demo, "_kill_busiest", lambda self: None)
    monkeypatch.setattr(demo, "ROUNDS_MAX", 2)
    console = Console(file=io.StringIO())

    report = run_demo(few, sqlite_url, workers=1, kill=True, console=console)

    assert (report.jobs, report.killed, report.exactly_once) == (2, 0, True)
    assert console.file.getvalue().count("done before a worker") == 2  # type: ignore[attr-defined]


def test_progress_is_shown_on_a_terminal_only(sqlite_url: str, few: Path) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True)
    file = Console(file=io.StringIO())

    run_demo(few, sqlite_url, workers=1, console=terminal)
    run_demo(few, sqlite_url, workers=1, console=file)

    assert "2/2" in terminal.file.getvalue()  # type: ignore[attr-defined]
    assert file.file.getvalue() == ""  # type: ignore[attr-defined]


def test_the_command_reports_and_exits_with_1_when_an_effect_did_not_happen_exactly_once(
    sqlite_url: str, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pgqueue = Command(sqlite_url)

    good = pgqueue.json("demo", few, "--no-kill", "--workers", 1)
    monkeypatch.setattr(demo, "find_problems", lambda session, pgq: Findings(["a.txt: 2 effects instead of 1"]))
    bad = pgqueue.json("demo", few, "--no-kill", "--workers", 1, code=1)

    assert (good["files"], good["workers"], good["exactly_once"], good["problems"]) == (2, 1, True, [])
    assert (bad["exactly_once"], bad["problems"]) == (False, ["a.txt: 2 effects instead of 1"])


# The end, whatever happens


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_ends_its_workers_and_drops_its_tables(
    pg_url: str, folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    before = all_tables(pg_url)

    with running("demo", folder, "--no-kill", cwd=tmp_path, url=pg_url) as process:
        with without_effects(pg_url):
            pids = wait_for(lambda: demo_workers(pg_url, 2), "two workers", every=0.05)
            process.signal(number)
        code = process.wait()

    assert code == 128 + number
    assert [pid for pid in pids if is_alive(pid)] == []
    assert all_tables(pg_url) == before


def test_a_killed_demo_leaves_no_worker_and_the_next_one_drops_its_tables(
    pg_url: str, folder: Path, tmp_path: Path
) -> None:
    before = all_tables(pg_url)
    with (
        running("demo", folder, "--no-kill", cwd=tmp_path, url=pg_url) as process,
        without_effects(pg_url),
    ):
        wait_for(lambda: demo_workers(pg_url, 2), "two workers", every=0.05)
        process.signal(signal.SIGKILL)
        process.wait()
    left = all_tables(pg_url)
    wait_for(lambda: demo_workers(pg_url, 0) == [], "the workers to stop by themselves")

    report = run_demo(folder, pg_url)

    assert left > before
    assert (report.files, report.exactly_once) == (FILES, True)
    assert all_tables(pg_url) == before


@contextmanager
def without_effects(url: str) -> Iterator[None]:
    """Let no job end meanwhile: a demo could be over before its second worker has started."""
    engine = make_engine(url)
    try:
        table = "pgqueue_demo.pgqueue_demo_effects"
        wait_for(lambda: scalar(engine, "SELECT to_regclass(:table)", table=table), "the demo's tables")
        with engine.begin() as connection:
            connection.execute(sa.text(f"LOCK TABLE {table} IN SHARE MODE"))
            yield
    finally:
        engine.dispose()


def demo_workers(url: str, at_least: int) -> list[int]:
    """The pids of the demo's workers, if there are so many; else an empty list."""
    engine = make_engine(url)
    try:
        if not sa.inspect(engine).has_table("workers", schema="pgqueue_demo"):
            return []
        with engine.connect() as connection:
            pids = list(connection.execute(sa.text("SELECT pid FROM pgqueue_demo.workers")).scalars())
        return pids if len(pids) >= at_least else []
    except sa.exc.ProgrammingError:  # dropped in between
        return []
    finally:
        engine.dispose()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_that_fails_ends_the_demo_with_its_last_words(
    url: str, few: Path, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = all_tables(url)
    monkeypatch.setattr(demo, "URL_VARIABLE", "PGQUEUE_DEMO_UNKNOWN")  # so that the workers look for it in vain

    with pytest.raises(PgqueueError, match=r"demo-\d ended by itself with exit code 1; .*KeyError: 'PGQUEUE_DEMO_URL'"):
        run_demo(few, url)

    assert all_tables(url) == before
    assert all(process.returncode is not None for process in processes)


def test_the_url_is_not_among_the_arguments_of_a_worker(
    sqlite_url: str, few: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    run_demo(few, sqlite_url)

    assert [process.args for process in processes] == [[sys.executable, "-m", "pgqueue.demo"]] * 2


# Refusals


def test_what_cannot_work_is_refused_before_anything_is_made(
    url: str, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    before = all_tables(url)
    file = tmp_path / "file"
    file.touch()

    with pytest.raises(ConfigurationError, match=r"missing' is not a directory"):
        run_demo(tmp_path / "missing", url)
    with pytest.raises(ConfigurationError, match=r"file' is not a directory"):
        run_demo(file, url)
    with pytest.raises(ConfigurationError, match="workers must be between 1 and 64, got 0"):
        run_demo(tmp_path, url, workers=0)
    with pytest.raises(ConfigurationError, match="schema must be"):
        run_demo(tmp_path, url, schema='"; DROP')
    with pytest.raises(ConfigurationError, match="in memory cannot be shared"):
        run_demo(tmp_path, "sqlite://")

    assert processes == []
    assert all_tables(url) == before


@pytest.fixture
def demo_schema(url: str) -> Iterator[PgQueue]:
    """pgqueue's tables in the schema that the demo would use."""
    queue = PgQueue(url, schema="pgqueue_demo")
    migration.upgrade(queue.engine, queue.schema)
    yield queue
    queue.dispose()


def test_a_schema_with_jobs_that_are_not_the_demos_is_left_alone(url: str, demo_schema: PgQueue, few: Path) -> None:
    with demo_schema.begin() as connection:
        job = demo_schema.external_task("close_invoice").enqueue(connection)

    with pytest.raises(ConfigurationError, match=r"'pgqueue_demo' .* jobs of the task 'close_invoice'"):
        run_demo(few, url)

    assert demo_schema.get_job(job.id).status == "pending"


def test_a_schema_with_a_strange_table_is_left_alone(url: str, demo_schema: PgQueue, few: Path) -> None:
    table = "pgqueue_demo_invoices" if demo_schema.engine.dialect.name == "sqlite" else "pgqueue_demo.invoices"
    execute(demo_schema.engine, f"CREATE TABLE {table} (id integer)")
    execute(demo_schema.engine, f"INSERT INTO {table} VALUES (1)")

    with pytest.raises(ConfigurationError, match=r"it has the table '\w*invoices'"):
        run_demo(few, url)

    assert scalar(demo_schema.engine, f"SELECT id FROM {table}") == 1


def test_a_second_demo_in_the_same_schema_is_refused(url: str, demo_schema: PgQueue, few: Path) -> None:
    with demo_schema.begin() as connection:
        row = {"id": "demo-1:1:a", "host": "h", "pid": 1, "version": "1", "queues": {}, "tasks": []}
        store.beat(connection, demo_schema.tables, row)

    with pytest.raises(ConfigurationError, match="another demo is running in schema 'pgqueue_demo'"):
        run_demo(few, url)

    assert len(demo_schema.workers()) == 1


# The check


class Indexed:
    """Three files that were indexed by a worker."""

    def __init__(self, url: str, root: Path) -> None:
        self.pgq, self.task = open_queue(url, "pgqueue")
        Base.metadata.create_all(self.pgq.engine)
        self.paths = [root / name for name in ("a", "b", "c")]
        for path in self.paths:
            path.write_text(f"the file {path.name}\n")

    def enqueue(self) -> None:
        with Session(self.pgq.engine) as session, session.begin():
            enqueue_files(session, self.task, self.paths)

    def work(self) -> None:
        Worker(self.pgq, WorkerConfig(drain=True, poll_interval=0.05)).run()

    def check(self) -> Findings:
        with Session(self.pgq.engine) as session, session.begin():
            return find_problems(session, self.pgq)


@pytest.fixture
def enqueued(url: str, tmp_path: Path) -> Iterator[Indexed]:
    indexed = Indexed(url, tmp_path)
    indexed.enqueue()
    yield indexed
    close_queue(indexed.pgq)


@pytest.fixture
def indexed(enqueued: Indexed) -> Indexed:
    enqueued.work()
    return enqueued


def test_the_check_finds_nothing_wrong_with_what_workers_wrote(indexed: Indexed) -> None:
    assert indexed.check() == Findings()


@pytest.mark.parametrize(("column", "wrong"), [("sha256", "0" * 64), ("lines", 2), ("words", None), ("error", "Error")])
def test_the_check_finds_a_wrong_result(indexed: Indexed, column: str, wrong: object) -> None:
    with Session(indexed.pgq.engine) as session, session.begin():
        setattr(session.get_one(File, 2), column, wrong)

    assert indexed.check() == Findings([f"{indexed.paths[1]}: the stored {column} is not that of the file"])


def test_the_check_finds_an_effect_that_happened_twice(indexed: Indexed) -> None:
    with Session(indexed.pgq.engine) as session, session.begin():
        session.add(Effect(file_id=2, worker="demo-1:1:a", attempt=2))

    assert indexed.check() == Findings([f"{indexed.paths[1]}: 2 effects instead of 1"])


def test_the_check_finds_an_effect_that_is_missing(indexed: Indexed) -> None:
    with Session(indexed.pgq.engine) as session, session.begin():
        session.execute(sa.delete(Effect).where(Effect.file_id == 2))

    assert indexed.check() == Findings([f"{indexed.paths[1]}: 0 effects instead of 1"])


def test_the_check_finds_a_file_that_was_never_indexed(enqueued: Indexed) -> None:
    findings = enqueued.check()

    assert f"{enqueued.paths[0]}: 0 effects instead of 1" in findings.problems
    assert f"{enqueued.paths[0]}: the stored sha256 and lines and words is not that of the file" in findings.problems
    assert "job 1 is pending, not completed" in findings.problems


def test_the_check_finds_a_dead_job_and_one_too_many(indexed: Indexed) -> None:
    task: Task[[int, str], None] = indexed.task.using(max_retries=0)
    with Session(indexed.pgq.engine) as session, session.begin():
        task.enqueue(session, file_id=4, path="/there-is-no-such-row")
    indexed.work()

    problems = indexed.check().problems

    assert len(problems) == 2
    assert problems[0].startswith("job 4 is dead, not completed: sqlalchemy.exc.NoResultFound: ")
    assert problems[1] == "there are 4 jobs for 3 files"


def test_a_file_that_changed_since_is_counted_and_not_compared(indexed: Indexed) -> None:
    indexed.paths[0].write_text("something else\n")
    indexed.paths[1].unlink()

    assert indexed.check() == Findings(changed=2)


def test_a_file_that_changed_since_still_must_have_one_effect(indexed: Indexed) -> None:
    indexed.paths[0].write_text("something else\n")
    with Session(indexed.pgq.engine) as session, session.begin():
        session.add(Effect(file_id=1, worker="demo-1:1:a", attempt=2))

    assert indexed.check() == Findings([f"{indexed.paths[0]}: 2 effects instead of 1"], changed=1)


def test_a_file_that_cannot_be_read_is_a_result(enqueued: Indexed) -> None:
    enqueued.paths[0].unlink()
    enqueued.paths[1].unlink()
    enqueued.paths[1].mkdir()

    enqueued.work()

    assert enqueued.check() == Findings(unreadable=2)
    with Session(enqueued.pgq.engine) as session, session.begin():
        errors = [file.error for file in session.scalars(sa.select(File).order_by(File.id))]
    assert errors == ["FileNotFoundError", "IsADirectoryError", None]


def test_a_row_and_its_job_are_stored_together_or_not_at_all(enqueued: Indexed) -> None:
    with Session(enqueued.pgq.engine) as session:
        enqueue_files(session, enqueued.task, enqueued.paths)
        session.rollback()

    with Session(enqueued.pgq.engine) as session, session.begin():
        assert session.scalar(sa.select(sa.func.count()).select_from(File)) == 3
    assert sum(queue.ready for queue in enqueued.pgq.queues()) == 3


def test_a_file_is_counted_the_same_whatever_the_pieces_it_is_read_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "READ_BYTES", 2)
    path = tmp_path / "file"
    every = [bytes(parts) for length in range(6) for parts in itertools.product(b"a \n", repeat=length)]

    for data in every:
        path.write_bytes(data)

        contents = demo.read_contents(path)

        assert contents[1:] == (data.count(b"\n"), len(data.split()), None), data
    assert contents == Contents(hashlib.sha256(b"\n" * 5).hexdigest(), 5, 0)
