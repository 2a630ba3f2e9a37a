"""A worker whose sessions keep plans, when something changes underneath."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from pgbouncer import Bouncer
from support import execute, wait_for
from working import enqueue, enqueue_many, statuses, wait_for_status, working

from pgqueue import PgQueue, plans, pooler


def test_a_worker_goes_on_when_the_type_of_a_column_changes_under_its_plans(
    pg: PgQueue, caplog: pytest.LogCaptureFixture
) -> None:
    greet = pg.task(name="greet")(lambda: None)

    with working(pg):
        wait_for_status(pg, enqueue(greet), "completed")
        drop_views(pg)
        execute(pg.engine, "ALTER TABLE pgqueue.jobs ALTER COLUMN max_retries TYPE bigint")
        after = enqueue(greet)
        wait_for_status(pg, after, "completed")

    assert "cached plan must not change result type" in caplog.text
    assert "the database can be used again" in caplog.text


def drop_views(pg: PgQueue) -> None:
    """So that columns can be altered."""
    with pg.begin() as connection:
        for name in sa.inspect(connection).get_view_names("pgqueue"):
            connection.exec_driver_sql(f'DROP VIEW IF EXISTS pgqueue."{name}" CASCADE')


def test_a_worker_that_takes_a_pooler_for_the_server_stops_keeping_plans_and_goes_on(
    pg_url: str, bouncer: Bouncer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pooler, "is_own_session", lambda connection: True)
    pgq = PgQueue(bouncer.url(pg_url))
    greet = pgq.task(name="greet")(lambda: None)

    with working(pgq, lease=1):
        enqueue_many(greet, 20)
        wait_for(lambda: statuses(pgq) == {"completed": 20}, "all jobs to be completed")
        wait_for(lambda: "keeps no plans any more" in caplog.text, "a loop to find out")

    pgq.dispose()


def test_the_claims_of_a_worker_keep_their_plans(pg: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, kept = plans.keep, []
    monkeypatch.setattr(plans, "keep", lambda connection: kept.append(keep(connection)))
    greet = pg.task(name="greet")(lambda: None)

    with working(pg):
        wait_for_status(pg, enqueue(greet), "completed")

    assert kept == [True] * 3, "of the claimer, the finisher and the heartbeat"


def test_a_worker_has_its_plans_made_anew_once_in_a_while(pg: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    renew, renewed = plans.renew, []
    monkeypatch.setattr(plans, "RENEW_SECONDS", 0.0)
    monkeypatch.setattr(plans, "renew", lambda connection: renewed.append(renew(connection)))
    greet = pg.task(name="greet")(lambda: None)

    with working(pg):
        wait_for(lambda: len(renewed) > 5, "plans to be renewed")
        wait_for_status(pg, enqueue(greet), "completed")
