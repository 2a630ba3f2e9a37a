"""Taking connections from a pool that are still good, without a round trip each time."""

from __future__ import annotations

import select
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc

#: A connection that was given back so recently is looked at; all others are asked, which takes a round trip.
FRESH_SECONDS = 1.0

_GIVEN_BACK = "pgqueue_given_back"


def ask_only_when_in_doubt(engine: sa.Engine) -> None:
    """Instead of `pool_pre_ping`: replace connections that broke while they were not used.

    A server that goes away hangs up, so one that was heard of just now and has not hung up since is there.
    """
    dialect = engine.dialect

    @event.listens_for(engine, "checkin")
    def checkin(dbapi_connection: Any, record: Any) -> None:
        record.info[_GIVEN_BACK] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def checkout(dbapi_connection: Any, record: Any, _: Any) -> None:
        given_back = record.info.get(_GIVEN_BACK)
        if given_back is None:
            return  # it is new
        if time.monotonic() - given_back < FRESH_SECONDS and is_silent(dbapi_connection):
            return
        try:
            dialect.do_ping(dbapi_connection)
        except dialect.loaded_dbapi.Error:
            raise exc.InvalidatePoolError from None


def is_silent(dbapi_connection: Any) -> bool:
    """Whether the server has sent nothing: neither its farewell nor the end of the stream. False when in doubt."""
    driver = getattr(dbapi_connection, "driver_connection", dbapi_connection)
    if driver.closed or not hasattr(select, "poll"):
        return False
    waiting = select.poll()
    waiting.register(driver.fileno(), select.POLLIN)
    return not waiting.poll(0)
