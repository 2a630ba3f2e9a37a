"""Everything in docs/limits.md that can be run is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from documents import PROJECT, Reader, blocks
from forks import Forks

PAGE = PROJECT / "docs" / "limits.md"


def test_the_programs_and_commands_of_the_page_run(sqlite_url: str, tmp_path: Path, forks: Forks) -> None:
    reader = Reader(tmp_path, sqlite_url, forks)
    for block in blocks(PAGE):
        if block.language == "python":
            assert block.file_name is not None
            (tmp_path / block.file_name).write_text(block.text)

    output = reader.run("python limits.py")
    for block in blocks(PAGE):
        if block.language == "sh":
            for command in block.commands:
                reader.run(command)

    assert "queue 'images' is full" in output


@pytest.mark.parametrize("number", range(sum(block.language == "sql" for block in blocks(PAGE))))
def test_every_query_of_the_page_is_understood(pg_url: str, number: int) -> None:
    block = [block for block in blocks(PAGE) if block.language == "sql"][number]
    engine = sa.create_engine(pg_url)

    with engine.connect() as connection:
        connection.exec_driver_sql(block.text.rstrip().rstrip(";"))
    engine.dispose()


def test_every_block_of_the_page_is_run() -> None:
    assert {block.language for block in blocks(PAGE)} <= {"python", "sql", "sh"}
