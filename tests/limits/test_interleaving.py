"""Claims that keep limits, while another transaction has a row in its hands: nobody is forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from limited import claim, ids, put
from support import wait_for

from pgqueue import PgQueue, limits, overlooked, within_limits
from pgqueue.schema import Tables


def test_a_free_slot_is_kept_for_a_waiting_job_that_somebody_has_locked(pg: PgQueue) -> None:
    (_, waits) = put(pg, pg.external_task("few", concurrency=1), 2)
    (holder,) = claim(pg)
    assert claim(pg) == [], "the second one waits"

    with pg.engine.connect() as connection:
        pg.edit(waits, priority=3, session=connection)
        pg.ack(holder)
        assert claim(pg) == []
        connection.commit()

    assert ids(claim(pg)) == [waits]


def test_a_free_slot_of_a_key_is_kept_for_a_waiting_job_that_somebody_has_locked(pg: PgQueue) -> None:
    pg.set_limits(task="work", key_concurrency=1)
    (_, waits) = put(pg, pg.external_task("work"), 2, concurrency_key="a")
    (holder,) = claim(pg)
    assert claim(pg) == [], "the second one waits"

    with pg.engine.connect() as connection:
        pg.edit(waits, priority=3, session=connection)
        pg.ack(holder)
        assert claim(pg) == []
        connection.commit()

    assert ids(claim(pg)) == [waits]


def test_a_token_is_kept_for_a_waiting_job_that_somebody_has_locked(pg: PgQueue) -> None:
    pg.set_limits(task="work", rate=0.001, burst=1)
    (first, waits) = put(pg, pg.external_task("work"), 2)
    assert ids(claim(pg)) == [first]
    pg.set_limits(task="work", rate=1e6)

    with pg.engine.connect() as connection:
        pg.edit(waits, priority=3, session=connection)
        assert claim(pg) == []
        connection.commit()

    assert ids(claim(pg)) == [waits]


@pytest.mark.parametrize("limit", ["concurrency", "key_concurrency"])
def test_a_job_that_has_to_wait_for_one_that_ends_at_that_moment_is_not_forgotten(
    pg: PgQueue, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(overlooked, "look_around", lambda *arguments: False)
    pg.set_limits(task="work", **{limit: 1})
    (_, waits) = put(pg, pg.external_task("work"), 2, concurrency_key="a")
    (holder,) = claim(pg, 1)

    with pg.engine.connect() as connection:
        pg.ack(holder, session=connection)
        assert claim(pg) == []
        connection.commit()

    assert ids(claim(pg)) == [waits]


@pytest.mark.parametrize("limit", ["concurrency", "key_concurrency"])
def test_a_job_is_not_forgotten_that_has_to_wait_for_one_that_ended_since_it_was_counted(
    pg: PgQueue, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(overlooked, "look_around", lambda *arguments: False)
    pg.set_limits(task="work", **{limit: 1})
    (_, waits) = put(pg, pg.external_task("work"), 2, concurrency_key="a")
    (holder,) = claim(pg, 1)
    look = within_limits._look

    def look_and_be_overtaken(*arguments: Any, **options: Any) -> Any:
        seen = look(*arguments, **options)
        monkeypatch.setattr(within_limits, "_look", look)
        pg.ack(holder)
        return seen

    monkeypatch.setattr(within_limits, "_look", look_and_be_overtaken)
    started = claim(pg) + claim(pg)

    assert ids(started) == [waits]


@pytest.mark.parametrize("limit", [{"concurrency": 1}, {"rate": 0.001, "burst": 1}])
def test_a_lifted_limit_lets_a_job_go_that_somebody_has_locked(pg: PgQueue, limit: dict[str, float]) -> None:
    pg.set_limits(task="work", **limit)
    (first, waits) = put(pg, pg.external_task("work"), 2)
    assert ids(claim(pg)) == [first]

    with pg.engine.connect() as connection:
        pg.edit(waits, priority=3, session=connection)
        pg.set_limits(task="work", **dict.fromkeys(limit))
        assert claim(pg) == []
        connection.commit()

    assert ids(claim(pg)) == [waits]


@pytest.mark.parametrize("change", [{"ordering_key": "b"}, {"ordering_key": "a", "queue": "other"}])
def test_a_leader_that_gets_another_key_at_that_moment_leaves_nobody_behind_it(
    pg: PgQueue, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    task = pg.external_task("work")
    leading = task.using(unique_key="u", on_conflict="replace", delay=3600)
    with pg.begin() as connection:
        leader = leading.using(ordering_key="a").enqueue(connection)
    (behind,) = put(pg, task, ordering_key="a")
    look = within_limits._look

    def look_and_be_overtaken(*arguments: Any, **options: Any) -> Any:
        seen = look(*arguments, **options)
        monkeypatch.setattr(within_limits, "_look", look)
        with pg.begin() as connection:
            assert leading.using(**change).enqueue(connection).id == leader.id
        return seen

    monkeypatch.setattr(within_limits, "_look", look_and_be_overtaken)
    started = claim(pg) + claim(pg)

    assert ids(started) == [behind]


def test_a_process_that_freezes_while_it_changes_limits_holds_claims_up_for_a_time_only(
    pg: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: list[str] = []
    put_limits = limits.put_limits

    def note_timeout(connection: sa.Connection, tables: Tables, *arguments: Any, **named: Any) -> bool:
        timeouts.append(connection.scalar(sa.text("SHOW idle_in_transaction_session_timeout")))
        return put_limits(connection, tables, *arguments, **named)

    monkeypatch.setattr(limits, "put_limits", note_timeout)

    pg.queue("default", concurrency=2)
    pg.declare_limits()
    pg.set_limits(queue="default", concurrency=3)
    pg.reset_limits(queue="default")

    assert len(timeouts) == 3
    assert "0" not in timeouts


def test_what_somebody_sets_while_a_worker_declares_its_limits_stays(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    pgq.external_task("work", concurrency=1)
    find_outdated = limits.outdated

    def find_outdated_and_be_overtaken(connection: sa.Connection, *arguments: Any) -> Any:
        found = find_outdated(connection, *arguments)
        connection.rollback()
        pgq.set_limits(task="work", concurrency=7, actor="ann")
        return found

    monkeypatch.setattr(limits, "outdated", find_outdated_and_be_overtaken)
    pgq.declare_limits()

    (row,) = pgq.list_limits()
    assert (row.limits.concurrency, row.declared_by) == (7, "ann")


@pytest.mark.parametrize("keys", [{}, {"concurrency_key": "a"}, {"ordering_key": "a"}])
def test_a_job_that_expires_while_it_waits_leaves_its_turn_to_the_next(pgq: PgQueue, keys: dict[str, str]) -> None:
    task = pgq.external_task("work")
    if "ordering_key" not in keys:
        pgq.set_limits(task="work", **({"key_concurrency": 1} if keys else {"concurrency": 1}))
    (_, waits, behind) = put(pgq, task, 3, **keys)
    (holder,) = claim(pgq)
    assert claim(pgq) == [], "two wait"

    long_ago = sa.literal_column("'2020-01-01 00:00:00.000'")
    with pgq.begin() as connection:
        jobs = pgq.tables.jobs
        connection.execute(sa.update(jobs).where(jobs.c.id == waits).values(expires_at=long_ago))
    pgq.ack(holder)

    started = wait_for(lambda: claim(pgq), "the one behind")
    assert ids(started) == [behind]
