"""Everything in docs/schedules.md that can be run is run, and what it says of clocks and limits is so."""

from __future__ import annotations

import itertools
import re
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from documents import PROJECT, Reader, blocks, table_below
from forks import Forks
from support import execute, rows

from pgqueue import PgQueue, cron, scheduler, schedules

PAGE = PROJECT / "docs" / "schedules.md"


def test_the_page_works_from_top_to_bottom(url: str, tmp_path: Path, forks: Forks) -> None:
    reader = Reader(tmp_path, url, forks)
    pgq = PgQueue(url)

    for block in blocks(PAGE):
        if block.language == "python":
            assert block.file_name is not None, f"schedules.md:{block.line}: the first line must name the file"
            (tmp_path / block.file_name).write_text(block.text)
            reader.run(f"python {block.file_name}")
        elif block.language == "sh":
            for command in block.commands:
                reader.run(command)
        else:
            assert block.language == "sql"
            run_sql(pgq, block.text)

    assert [schedule.name for schedule in pgq.schedules.list()] == ["by-sql"]
    assert len(pgq.list_jobs()) == 2
    pgq.dispose()


def run_sql(pgq: PgQueue, text: str) -> None:
    statement = text.strip().rstrip(";")
    if pgq.engine.dialect.name == "sqlite":
        statement = statement.replace("pgqueue.", "pgqueue_")
    if statement.startswith("SELECT"):
        assert rows(pgq.engine, statement)
    else:
        execute(pgq.engine, statement)


@pytest.mark.parametrize("row", table_below(PAGE, "When clocks change"), ids=lambda row: row[0])
def test_the_table_of_changes_of_clocks_is_right(row: list[str]) -> None:
    expression, *days = (cell.strip("`") for cell in row)

    assert [ticks_of(expression, "2026-03-29"), ticks_of(expression, "2026-10-25")] == days


def ticks_of(expression: str, day: str) -> str:
    zone = ZoneInfo("Europe/Zurich")
    midnight = datetime.fromisoformat(day).replace(tzinfo=zone)
    ticks = cron.CronRule(expression, zone.key).ticks_after(midnight - timedelta(seconds=1))
    today = itertools.takewhile(
        lambda local: local.date() == midnight.date(), (tick.astimezone(zone) for tick in ticks)
    )
    return ", ".join(local.isoformat()[11:16] + local.isoformat()[19:] for local in today) or "none"


def test_the_figures_of_the_page_are_those_of_the_code() -> None:
    page = " ".join(PAGE.read_text().split())

    for text, figure in {
        r"see a new or changed schedule within (\d+) seconds": scheduler.LOOK_SECONDS,
        r"no worker came to it within (\d+) seconds": cron.MISSED_SECONDS,
        r"at most (\d+) seconds old": cron.MISSED_SECONDS,
        r"about (\d+) in a transaction": cron.TICKS_PER_PASS,
        r"the latest ([\d,]+) \|": cron.CATCHUP_TICKS_MAX,
        r"tried again every (\d+) seconds": scheduler.ASIDE_SECONDS,
        r"declared for (\d+) minutes": cron.UNDECLARED_SECONDS / 60,
        r"to others for (\d+) seconds": schedules.UNKNOWN_TASK_SECONDS,
        r"deleted after (\d+) days": schedules.TICKS_KEPT_SECONDS / 86_400,
    }.items():
        found = re.search(text, page)
        assert found, text
        assert float(found[1].replace(",", "")) == figure
