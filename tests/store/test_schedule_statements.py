"""The SQL of the statements that every worker's scheduler runs: what it is, and which indexes it uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from store.test_statements import REWRITES, indexes_in, readable
from support import execute

from pgqueue import PgQueue, schedules

STATEMENTS = Path(__file__).parent / "schedule_statements"

TICK = datetime(2026, 1, 1, tzinfo=UTC)

SENT: dict[str, Callable[[sa.Connection, PgQueue], Any]] = {
    "next_due": lambda connection, pgq: schedules.seconds_until_due(
        connection, pgq.tables, tasks=["work"], aside=["odd"]
    ),
    "lock_due": lambda connection, pgq: schedules.lock_due(
        connection, pgq.tables, tasks=["work"], aside=["odd"], limit=20
    ),
    "add_tick": lambda connection, pgq: schedules.add_tick(connection, pgq.tables, "s1", TICK, 1),
    "prune_ticks": lambda connection, pgq: schedules.prune_ticks(connection, pgq.tables),
}


def statements_of(pgq: PgQueue, name: str) -> list[tuple[str, Any]]:
    """Run one of SENT, take it back, and tell what was sent, each with the first of its parameters."""
    sent: list[tuple[str, Any]] = []

    def record(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if not statement.startswith("BEGIN"):
            sent.append((statement, parameters[0] if many else parameters))

    with pgq.engine.connect() as connection:
        sa.event.listen(connection, "before_cursor_execute", record)
        SENT[name](connection, pgq)
        connection.rollback()
    return sent


@pytest.mark.parametrize("name", SENT)
def test_what_is_sent_is_what_was_reviewed(pgq: PgQueue, name: str) -> None:
    file = STATEMENTS / f"{name}.{pgq.engine.dialect.name}.sql"
    ticks = pgq.tables.schedule_ticks
    with pgq.begin() as connection:
        connection.execute(sa.insert(ticks).values(schedule="s1", tick_at=TICK, created_at=TICK))

    text = "\n\n".join(readable(statement) + ";" for statement, _ in statements_of(pgq, name)) + "\n"

    if os.environ.get(REWRITES):
        file.write_text(text, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == text, f"changed on purpose? Run the test again with {REWRITES}=1"


MANY_SCHEDULES = """
    INSERT INTO pgqueue.schedules (name, task, cron, next_tick_at)
    SELECT 's' || n, 'work', '0 3 * * *', now() + interval '1 s' * (n - 10) FROM generate_series(1, 20000) AS n
"""

MANY_TICKS = """
    INSERT INTO pgqueue.schedule_ticks (schedule, tick_at, created_at)
    SELECT 's' || n % 100, now() - interval '1 minute' * n, now() - interval '1 minute' * n
      FROM generate_series(1, 50000) AS n
"""


def test_beside_many_schedules_and_ticks_every_statement_goes_by_its_index(pg: PgQueue) -> None:
    execute(pg.engine, MANY_SCHEDULES)
    execute(pg.engine, MANY_TICKS)
    execute(pg.engine, "ANALYZE pgqueue.schedules")
    execute(pg.engine, "ANALYZE pgqueue.schedule_ticks")

    used: dict[str, list[set[str]]] = {}
    for name in SENT:
        used[name] = []
        for statement, parameters in statements_of(pg, name):
            with pg.engine.connect() as connection:
                (found,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters).one()
            used[name].append(indexes_in(found[0]["Plan"]))

    assert used == {
        "next_due": [{"schedules_next"}],
        "lock_due": [{"schedules_next"}],
        "add_tick": [{"arbiter pk_schedule_ticks"}],
        "prune_ticks": [{"schedule_ticks_created"}, {"pk_schedule_ticks"}],
    }
