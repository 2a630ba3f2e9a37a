"""docs/events.md: its program works, and its table names every event."""

from __future__ import annotations

from pathlib import Path

from documents import PROJECT, Reader, blocks, table_below
from forks import Forks

from pgqueue import EventName

PAGE = PROJECT / "docs" / "events.md"


def test_the_program_prints_what_the_page_says(url: str, tmp_path: Path, forks: Forks) -> None:
    reader = Reader(tmp_path, url, forks)
    printed = ""

    for block in blocks(PAGE):
        if block.language == "python":
            assert block.file_name is not None, f"{PAGE.name}:{block.line}"
            (tmp_path / block.file_name).write_text(block.text)
        elif block.language == "sh":
            printed += "".join(reader.run(command) for command in block.commands)
        elif block.language == "text":
            assert block.text.strip() in printed

    assert "ship for acme: True" in printed
    assert printed.splitlines()[-1] == "job:enqueued job:started job:completed"


def test_every_event_is_described() -> None:
    described = [row[0].strip("`") for row in table_below(PAGE, "Hear what happens to jobs")]

    assert described == list(EventName)
