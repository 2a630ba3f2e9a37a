"""Fixtures for the tests of applications; pytest finds them by itself. Loaded by pytest only, which pgqueue does not
need otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from pgqueue.client import PgQueue
from pgqueue.testing import Tester

_QUEUE = """\
the fixture `pgqueue_tester` does not know which queue is tested. Write in conftest.py:

    import pytest
    from app import pgq          # your PgQueue

    @pytest.fixture
    def pgqueue_queue():
        return pgq
"""

_SESSION = """\
the fixture `pgqueue_tester` does not know the session (or connection) of the test. Write in conftest.py:

    import pytest

    @pytest.fixture
    def pgqueue_session(session):    # your fixture with the test's Session or Connection
        return session
"""


@pytest.fixture
def pgqueue_queue() -> Any:
    """The PgQueue under test; to be overridden in conftest.py."""
    pytest.fail(_QUEUE, pytrace=False)


@pytest.fixture
def pgqueue_session() -> Any:
    """The Session or Connection of the test; to be overridden in conftest.py."""
    pytest.fail(_SESSION, pytrace=False)


@pytest.fixture
def pgqueue_tester(pgqueue_queue: Any, pgqueue_session: Any) -> Tester:
    """What was enqueued, running it, and letting time pass, in the test's transaction: a `pgqueue.testing.Tester`."""
    if not isinstance(pgqueue_queue, PgQueue):
        pytest.fail(
            f"the fixture `pgqueue_queue` must return a PgQueue, got {type(pgqueue_queue).__name__}", pytrace=False
        )
    return Tester(pgqueue_queue, pgqueue_session)
