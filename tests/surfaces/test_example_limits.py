"""The example of limits, events, expiry, pause and isolation does what its README says."""

from __future__ import annotations

import shutil
from pathlib import Path

from documents import PROJECT, Reader, blocks
from forks import Forks

from pgqueue import JobStatus, PgQueue

EXAMPLE = PROJECT / "examples" / "limits"

#: What a test cannot run, and why.
NOT_RUN = {"export PGQUEUE_DATABASE_URL=sqlite:///limits.db": "each test has a database of its own"}

CALLS = range(1, 7)
QUOTE = 7
LETTER, BOMB, INVOICE = 8, 9, 10


def test_the_lines_of_the_readme_work(url: str, pgq: PgQueue, tmp_path: Path, forks: Forks) -> None:
    folder = tmp_path / "limits"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", "*.db*"))
    reader = Reader(folder, url, forks)
    printed: dict[str, str] = {}

    commands = [command for block in blocks(EXAMPLE / "README.md") for command in block.commands]
    for command in commands:
        if command not in NOT_RUN:
            printed[command] = reader.run(command)
        if command == "pgqueue queues list":
            assert {pgq.get_job(number).status for number in CALLS} == {JobStatus.PENDING}

    assert set(NOT_RUN) <= set(commands), "an excuse for a command that is not in the README"
    assert_the_bomb_took_its_own_process_along(pgq)
    assert_the_calls_kept_their_rate_and_the_quote_was_too_late(pgq)
    (of_the_sandbox, of_the_calls) = (text for command, text in printed.items() if "pgqueue worker" in command)
    assert f"job:dead convert {BOMB}" in of_the_sandbox
    assert f"job:expired quote {QUOTE}" in of_the_sandbox + of_the_calls
    assert {f"job:completed call_api {number}" for number in CALLS} <= set(of_the_calls.splitlines())


def assert_the_bomb_took_its_own_process_along(pgq: PgQueue) -> None:
    letter, bomb, invoice = (pgq.get_job(number) for number in (LETTER, BOMB, INVOICE))
    assert (letter.status, invoice.status) == (JobStatus.COMPLETED, JobStatus.COMPLETED)
    assert (bomb.status, bomb.attempt) == (JobStatus.DEAD, 1)
    assert bomb.error is not None
    assert bomb.error["type"].endswith("ProcessDied")


def assert_the_calls_kept_their_rate_and_the_quote_was_too_late(pgq: PgQueue) -> None:
    starts = sorted(job.claimed_at for job in pgq.list_jobs(task="call_api") if job.claimed_at is not None)
    assert len(starts) == len(CALLS)
    # Two at once; each of the other four waits for its token.
    assert (starts[-1] - starts[0]).total_seconds() >= 0.75
    quote = pgq.get_job(QUOTE)
    assert (quote.status, quote.attempt) == (JobStatus.DEAD, 0)
