"""Everything in docs/dead-letter.md that can be run is run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from command import Command
from documents import PROJECT, blocks

from pgqueue import PgQueue, Worker, WorkerConfig

PAGE = PROJECT / "docs" / "dead-letter.md"


def mail(to: str) -> None:
    raise ConnectionError("no route")


@pytest.fixture
def dead(pgq: PgQueue) -> list[int]:
    task = pgq.task(name="mail")(mail).using(max_retries=0)
    with pgq.begin() as connection:
        ids = task.enqueue_many(connection, [{"to": f"{n}@example.com"} for n in range(8)])
    Worker(pgq, WorkerConfig(drain=True)).run()
    return ids


def kill_all(pgq: PgQueue) -> None:
    claimed = pgq.claim("worker", limit=100)
    if claimed:
        pgq.nack(claimed, dead=True, error=ConnectionError("no route"))


def test_the_page_about_dead_jobs_works(
    pgq: PgQueue, dead: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = Command(pgq.url.render_as_string(hide_password=False))
    names: dict[str, Any] = {"pgq": pgq, "dead": dead}

    for block in blocks(PAGE):
        if block.language == "python":
            kill_all(pgq)  # the commands above have replayed them
            exec(compile(block.text, f"{PAGE}:{block.line}", "exec"), names)
        else:
            assert block.language == "sh"
            for line in block.commands:
                assert command(*shlex.split(line)[1:]).exit_code == 0

    assert len((tmp_path / "dead.jsonl").read_text().splitlines()) == len(dead)
    assert pgq.list_jobs(status="dead") == []


def test_the_page_names_the_columns_of_the_view(pgq: PgQueue) -> None:
    view = f"{pgq.tables.jobs.fullname.removesuffix('jobs')}dead_jobs"
    with pgq.begin() as connection:
        columns = connection.execute(sa.text(f"SELECT * FROM {view}")).keys()

    sentence = PAGE.read_text().partition("the view `")[2].partition(". Its columns")[0]
    assert [name for name in columns if f"`{name}`" not in sentence] == []
