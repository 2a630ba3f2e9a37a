"""The Python in docs/uniqueness.md runs, from top to bottom."""

from __future__ import annotations

from typing import Any

from documents import PROJECT, blocks, table_below
from sqlalchemy.orm import Session

from pgqueue import OnConflict, PgQueue

PAGE = PROJECT / "docs" / "uniqueness.md"


def test_the_page_about_unique_jobs_works(pgq: PgQueue) -> None:
    def resize(file: str) -> None: ...

    with Session(pgq.engine) as session, session.begin():
        names: dict[str, Any] = {"pgq": pgq, "session": session, "resize": pgq.task(resize)}
        for block in blocks(PAGE):
            assert block.language == "python"
            exec(compile("\n" * block.line + block.text, str(PAGE), "exec", dont_inherit=True), names)

    assert sorted(job.task for job in pgq.list_jobs()) == ["remind", "resize", "thumbnail", "thumbnail"]


def test_the_page_names_every_way_to_meet_a_conflict() -> None:
    assert [row[0] for row in table_below(PAGE, "By a key")] == [f'`"{how}"`' for how in OnConflict]
