"""What the tests of the surfaces share."""

from __future__ import annotations

import pytest
from forks import Forks, shared


@pytest.fixture
def forks() -> Forks:
    return shared()
