"""The Python in docs/results.md runs, from top to bottom."""

from __future__ import annotations

from typing import Any

from documents import PROJECT, blocks
from sqlalchemy.orm import Session
from working import drain

from pgqueue import PgQueue

PAGE = PROJECT / "docs" / "results.md"


def test_the_page_about_results_works(pgq: PgQueue) -> None:
    def add(a: int, b: int) -> int:
        return a + b

    names: dict[str, Any] = {
        "pgq": pgq,
        "engine": pgq.engine,
        "Session": Session,
        "add": pgq.task(add),
        "work": lambda: drain(pgq),
    }

    for block in blocks(PAGE):
        assert block.language == "python"
        exec(compile("\n" * block.line + block.text, str(PAGE), "exec", dont_inherit=True), names)

    assert [job.expires_at is not None for job in pgq.list_jobs(task="mail")] == [True, True]
