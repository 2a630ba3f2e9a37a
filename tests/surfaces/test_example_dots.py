"""The example of texts whose dots are work: the lines of its README, with two workers."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from documents import PROJECT, Reader, blocks
from forks import Forks
from support import Process, wait_for
from working import wait_for_status

from pgqueue import JobStatus, PgQueue

EXAMPLE = PROJECT / "examples" / "dots"

#: What a test cannot run, and why.
NOT_RUN = {"export PGQUEUE_DATABASE_URL=sqlite:///dots.db": "each test has a database of its own"}

WORKER = "python worker.py"

#: The first text has thirty dots: time enough for the other worker to do all the rest.
QUICK = {"DOT_SECONDS": "0.1", "RETRY_SECONDS": "0.2"}


class Terminals:
    """Somebody with a terminal for commands, and one for each worker."""

    def __init__(self, folder: Path, url: str, forks: Forks, processes: ExitStack) -> None:
        self.reader = Reader(folder, url, forks)
        self.reader.environ.update(QUICK)
        self._processes = processes

    def work(self) -> Process:
        worker = Process([sys.executable, "worker.py"], cwd=self.reader.folder, **self.reader.environ)
        self._processes.callback(worker.close)
        wait_for(lambda: "Waiting" in worker.output(), "the worker to start")
        return worker


@pytest.fixture
def terminals(url: str, tmp_path: Path, forks: Forks) -> Iterator[Terminals]:
    folder = tmp_path / "dots"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", "*.db*"))
    with ExitStack() as processes:
        yield Terminals(folder, url, forks, processes)


def test_the_lines_of_the_readme_work(terminals: Terminals, pgq: PgQueue) -> None:
    commands = [command for block in blocks(EXAMPLE / "README.md") for command in block.commands]
    workers = []

    for command in commands:
        if command == WORKER:
            workers.append(terminals.work())
        elif "replay" in command:
            wait_for_status(pgq, 8, "dead")
            terminals.reader.run(command)
        elif command not in NOT_RUN:
            terminals.reader.run(command)
    wait_for(lambda: {job.status for job in pgq.list_jobs()} == {JobStatus.COMPLETED}, "all texts to be done")

    jobs = {job.id: job for job in pgq.list_jobs()}
    assert len(workers) == 2
    assert set(NOT_RUN) <= set(commands), "an excuse for a command that is not in the README"
    assert [jobs[number].result for number in sorted(jobs)] == [30, 1, 1, 1, 1, 0, 1, 1]
    assert (jobs[7].attempt, jobs[7].retries) == (2, 1)
    assert jobs[8].payload == {"text": "A possible text."}


def test_while_one_worker_is_busy_the_other_does_the_rest(terminals: Terminals, pgq: PgQueue) -> None:
    for _ in range(2):
        terminals.work()
    terminals.reader.run("python new_task.py A long text" + 50 * ".")
    wait_for(lambda: pgq.get_job(1).status == "running", "the long text to be taken")

    for text in ("First.", "Second.", "Third.", "Fourth."):
        terminals.reader.run(f"python new_task.py {text}")
    last = wait_for_status(pgq, 5, "completed")

    jobs = pgq.list_jobs()
    assert {job.claimed_by for job in jobs if job.id > 1} == {last.claimed_by}
    assert [job.claimed_by for job in jobs if job.id == 1] != [last.claimed_by]


def test_a_failed_text_is_tried_again_later_and_an_impossible_one_is_dead_at_once(
    terminals: Terminals, pgq: PgQueue
) -> None:
    terminals.reader.run("python new_task.py An unlucky text")
    terminals.reader.run("python new_task.py An impossible text")

    terminals.work()
    unlucky, impossible = wait_for_status(pgq, 1, "completed"), wait_for_status(pgq, 2, "dead")

    (failure,) = pgq.job_events(1)
    assert (unlucky.attempt, unlucky.retries) == (2, 1)
    assert unlucky.finished_at is not None
    assert (unlucky.finished_at - failure["at"]).total_seconds() >= float(QUICK["RETRY_SECONDS"])
    assert (impossible.attempt, impossible.retries) == (1, 0)
    assert impossible.error is not None
    assert impossible.error["type"].endswith("PermanentError")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_is_stopped_finishes_its_text_and_takes_no_other(
    terminals: Terminals, pgq: PgQueue, number: signal.Signals
) -> None:
    terminals.reader.run("python new_task.py A text" + 5 * ".")
    terminals.reader.run("python new_task.py Another text.")
    worker = terminals.work()
    wait_for(lambda: "Received" in worker.output(), "the worker to be at work")

    worker.signal(number)

    assert worker.wait() == 0
    assert worker.output().splitlines()[-1] == " [*] Stopped"
    assert (pgq.get_job(1).status, pgq.get_job(2).status) == (JobStatus.COMPLETED, JobStatus.PENDING)
