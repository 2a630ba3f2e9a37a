"""What a sweep sees to, and from which moment on it looks for that."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import add, claim, completed, finish, put, statuses

from pgqueue import PgQueue, expiry, retention, store
from pgqueue.store import EARLIEST, SINCE_EVER, Overdue

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)

#: As a person writes it. On SQLite that has no milliseconds, where pgqueue itself writes some.
BY_HAND = sa.literal_column("'2026-01-01 12:00:00'")


def upkeep(pgq: PgQueue, since: Overdue = SINCE_EVER) -> tuple[Overdue, datetime]:
    with pgq.begin() as connection:
        return store.upkeep(connection, pgq.tables, since)


@pytest.fixture
def overdue(pgq: PgQueue) -> list[int]:
    """A job of each kind that became overdue at noon, and one of each kind a second later."""
    ids = add(pgq, 6)
    claimed = claim(pgq, limit=4)
    finish(pgq, *(completed(job) for job in claimed[2:]))
    for column, (first, later) in zip(
        ("claim_expires_at", "prune_at", "expires_at"), (ids[:2], ids[2:4], ids[4:]), strict=True
    ):
        put(pgq, [first], **{column: NOON})
        put(pgq, [later], **{column: NOON + SECOND})
    return ids


def test_where_nothing_is_overdue_a_look_says_up_to_when_it_looked(pgq: PgQueue) -> None:
    ids = add(pgq, 3, expires_in=3600)
    claim(pgq)
    put(pgq, ids[-1:], prune_at=datetime.now(UTC) + timedelta(hours=1))

    found, until = upkeep(pgq)

    assert found == (None, None, None)
    assert abs(until - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_look_finds_the_earliest_moment_of_each_kind(pgq: PgQueue, overdue: list[int]) -> None:
    assert upkeep(pgq)[0] == Overdue(lapsed=NOON, expired=NOON, prunable=NOON)


def test_a_look_finds_nothing_from_before_it_begins(pgq: PgQueue, overdue: list[int]) -> None:
    late = NOON + SECOND

    assert upkeep(pgq, Overdue(late, late, late))[0] == (late, late, late)
    assert upkeep(pgq, Overdue(EARLIEST, late, late + SECOND))[0] == (NOON, late, None)


@pytest.mark.parametrize("moment", [NOON, BY_HAND], ids=["stored by pgqueue", "written by hand"])
def test_what_became_overdue_at_the_very_moment_where_a_look_begins_is_found(
    pgq: PgQueue, overdue: list[int], moment: Any
) -> None:
    """So the moment that one look found is where the next may begin."""
    put(pgq, overdue[0:1], claim_expires_at=moment)
    put(pgq, overdue[2:3], prune_at=moment)
    put(pgq, overdue[4:5], expires_at=moment)
    found, _ = upkeep(pgq)

    assert upkeep(pgq, found)[0] == found

    assert found.lapsed is not None
    assert found.prunable is not None
    assert found.expired is not None
    with pgq.begin() as connection:
        swept = store.sweep(connection, pgq.tables, limit=1, actor="s", since=found.lapsed)
        expired = expiry.expire(connection, pgq.tables, limit=1, actor="s", since=found.expired)
        assert retention.prune_due(connection, pgq.tables, limit=1, since=found.prunable) == 1
    assert (swept.returned, expired) == ([overdue[0]], [overdue[4]])


def test_nothing_is_done_about_what_was_overdue_before(pgq: PgQueue, overdue: list[int]) -> None:
    late = NOON + SECOND
    with pgq.begin() as connection:
        swept = store.sweep(connection, pgq.tables, limit=10, actor="s", since=late)
        expired = expiry.expire(connection, pgq.tables, limit=10, actor="s", since=late)
        pruned = retention.prune_due(connection, pgq.tables, limit=10, since=late)

    assert (swept.returned, expired, pruned) == ([overdue[1]], [overdue[5]], 1)
    assert set(statuses(pgq)) == set(overdue) - {overdue[3]}


@pytest.mark.parametrize("kind", Overdue._fields)
def test_looks_read_no_entries_from_before_while_a_snapshot_keeps_them(pg: PgQueue, kind: str) -> None:
    """Of jobs that were swept, completed, expired and pruned long since."""
    index = {"lapsed": "jobs_lease", "expired": "jobs_expiry", "prunable": "jobs_prune"}[kind]
    ids = add(pg, 500)
    claimed = claim(pg, limit=500) if kind != "expired" else []
    put(pg, ids, **{"expires_at" if kind == "expired" else "claim_expires_at": NOON})
    if kind == "prunable":
        finish(pg, *(completed(job) for job in claimed))
        put(pg, ids, prune_at=NOON)

    def read(since: Overdue) -> int:
        with pg.begin() as connection:
            returned = f"SELECT pg_stat_get_xact_tuples_returned('pgqueue.{index}'::regclass)"
            before = connection.exec_driver_sql(returned).scalar_one()
            assert store.upkeep(connection, pg.tables, since)[0] == (None, None, None)
            store.sweep(connection, pg.tables, limit=1, actor="s", since=since.lapsed or EARLIEST)
            expiry.expire(connection, pg.tables, limit=1, actor="s", since=since.expired or EARLIEST)
            retention.prune_due(connection, pg.tables, limit=1, since=since.prunable or EARLIEST)
            read: int = connection.exec_driver_sql(returned).scalar_one() - before
            return read

    with pg.engine.connect().execution_options(isolation_level="REPEATABLE READ") as reader:
        reader.exec_driver_sql("SELECT count(*) FROM pgqueue.jobs")
        with pg.begin() as connection:
            store.sweep(connection, pg.tables, limit=500, actor="s")
            expiry.expire(connection, pg.tables, limit=500, actor="s")
            retention.prune_due(connection, pg.tables, limit=500)
        later = NOON + SECOND

        assert read(SINCE_EVER) >= 1_000
        assert read(Overdue(later, later, later)) == 0
