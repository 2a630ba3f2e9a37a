"""Doing something again and again for a share of the time."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqueue.budget import Budget

SECONDS = st.floats(min_value=0, max_value=1e6)


def test_what_was_never_done_may_be_done() -> None:
    assert Budget(0.05, judged=3).allows()


@given(times=st.lists(SECONDS, min_size=3, max_size=9), rest_max=st.just(math.inf) | SECONDS)
def test_the_quickest_of_the_last_times_says_how_long_to_rest_up_to_the_longest_rest(
    times: list[float], rest_max: float
) -> None:
    budget = Budget(0.05, judged=3, rest_max=rest_max)

    for seconds in times:
        rest = budget.spent(began=10.0, ended=10.0 + seconds)

    assert rest == pytest.approx(min(min(times[-3:]) / 0.05, rest_max), abs=1e-6)
    assert budget.allowed_at == 10.0 + times[-1] + rest


def test_a_first_time_that_is_slow_costs_no_rest() -> None:
    """It may be slow because all caches are cold."""
    assert Budget(0.05, judged=3).spent(began=0.0, ended=9.0) == 0.0


def test_it_may_be_allowed_whatever_was_spent() -> None:
    budget = Budget(0.05, judged=1)
    present = time.monotonic()
    budget.spent(began=present - 3600, ended=present)
    assert not budget.allows()

    budget.allow()

    assert budget.allows()
