"""Payloads and passwords stay out of the log, also where the database itself would show them."""

from __future__ import annotations

import pytest
from support import execute, wait_for
from working import enqueue, working

from pgqueue import PgQueue


def test_a_row_that_the_server_shows_in_its_refusal_is_not_logged(
    pg: PgQueue, caplog: pytest.LogCaptureFixture
) -> None:
    @pg.task
    def work(card: str) -> None: ...

    enqueue(work, card="4111-1111")
    execute(pg.engine, "ALTER TABLE pgqueue.jobs ADD CONSTRAINT never_claimed CHECK (attempt = 0)")

    with working(pg):
        wait_for(lambda: "pgqueue-claim: failed, trying again" in caplog.text, "the claim to be refused")

    assert "never_claimed" in caplog.text
    assert "4111-1111" not in caplog.text
