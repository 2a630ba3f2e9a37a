"""Sessions of a worker that keep the plans of their statements, so that the server makes each plan once in a while.

Planning is half of what a claim of few jobs costs the server. A plan that is kept has to do for all parameters, and for
tables that are empty when it is made and hold a million jobs half a minute later. So it may go by indexes only.
"""

from __future__ import annotations

import sqlalchemy as sa

from pgqueue import pooler
from pgqueue.dialect import POSTGRESQL, PREPARED
from pgqueue.engine import committing_each

#: How long plans are kept. Of several indexes that would do, an empty table may suggest the lesser one.
RENEW_SECONDS = 30.0

#: With these settings each statement of a worker has one plan, whatever the statistics say: by the index that it was
#: written for. What they forbid is merely made to look expensive, so `jit` would set to work on every plan.
SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}


def keep(connection: sa.Connection) -> bool:
    """Have the server keep the plans of all statements of this connection; False where it cannot be relied on to.

    The connection has to be closed when it is no longer needed, not given to others: the settings stay with it. Nothing
    is kept behind a pooler, which may give the session to somebody else.
    """
    if connection.dialect.name != POSTGRESQL or connection.dialect.driver != "psycopg":
        return False
    if not pooler.is_own_session(connection):
        return False
    with committing_each(connection):
        connection.execute(sa.select(*(sa.func.set_config(*setting, sa.false()) for setting in SETTINGS.items())))
    driver = connection.connection.driver_connection
    driver.prepare_threshold = 0  # type: ignore[union-attr]  # psycopg: prepare what is sent for the first time
    connection.info[PREPARED] = {}
    return True


def renew(connection: sa.Connection) -> None:
    """Have the plans made anew, for the tables as they are by now."""
    with committing_each(connection):
        connection.exec_driver_sql("DISCARD PLANS")
