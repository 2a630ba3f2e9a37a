"""Where claims go on: behind the mark of each lane, and now and then from the front."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from pgqueue.job import ClaimedJob
from pgqueue.lanes import LOOK_SECONDS_MAX, LOOK_SECONDS_MIN, LOOK_SHARE, LOOKS_JUDGED, Lanes

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def job(number: int, priority: int, run_at: datetime) -> ClaimedJob:
    return ClaimedJob(number, "q", "t", "{}", priority, run_at, 1, 0, 3, "w", uuid.uuid4(), NOON, "{}")


def test_without_a_look_no_lane_is_known_and_a_look_is_due() -> None:
    lanes = Lanes()

    assert lanes.marks() == []
    assert lanes.may_look()
    assert lanes.should_look()


def test_lanes_know_whether_the_last_look_found_anything() -> None:
    lanes = Lanes()
    found_none = [lanes.last_look_found_none]

    for fronts in ([(3, NOON, 7), (0, None, 0)], [], [(0, NOON, 7)]):
        lanes.looked(fronts, began=0.0, ended=0.0)
        found_none.append(lanes.last_look_found_none)

    assert found_none == [True, False, True, False]


def test_claims_go_on_behind_the_last_job_of_each_lane_highest_priority_first() -> None:
    lanes = Lanes()
    lanes.looked([(0, None, 0), (9, NOON, 4)], began=0.0, ended=0.0)

    lanes.claimed([job(5, 9, NOON), job(2, 0, NOON), job(3, 0, NOON + timedelta(seconds=1))])

    assert lanes.marks() == [(9, NOON, 5), (0, NOON + timedelta(seconds=1), 3)]


def test_a_look_sets_the_lanes_that_it_finds_to_where_they_begin_and_forgets_none() -> None:
    lanes = Lanes()
    lanes.claimed([job(5, 9, NOON), job(2, 0, NOON)])

    lanes.looked([(9, NOON, 3), (-3, NOON, 1)], began=0.0, ended=0.0)

    assert lanes.marks() == [(9, NOON, 3), (0, NOON, 2), (-3, NOON, 1)]


def test_a_look_leaves_the_mark_of_a_lane_in_which_nothing_is_due() -> None:
    """Or each claim until something is would step over all that was claimed."""
    lanes = Lanes()
    lanes.claimed([job(5, 9, NOON)])

    lanes.looked([(9, None, 0), (0, None, 0)], began=0.0, ended=0.0)

    assert lanes.marks() == [(9, NOON, 5), (0, None, 0)]


def look(lanes: Lanes, *seconds: float) -> float:
    """Look as often as there are durations; when the last look ended."""
    ended = time.monotonic()
    for took in seconds:
        lanes.looked([], began=ended - took, ended=ended)
    return ended


def test_looks_take_no_more_than_their_share_of_the_time() -> None:
    lanes = Lanes()

    ended = look(lanes, *[0.5] * LOOKS_JUDGED)

    assert lanes.look_allowed_at == pytest.approx(ended + 0.5 / LOOK_SHARE)
    assert not lanes.may_look()
    assert not lanes.should_look()


def test_a_look_that_was_slow_for_once_does_not_put_off_the_next() -> None:
    lanes = Lanes()

    ended = look(lanes, *[0.001] * LOOKS_JUDGED, 5.0)

    assert lanes.look_allowed_at == pytest.approx(ended + 0.001 / LOOK_SHARE)


def test_a_look_is_never_further_away_than_promised_however_long_it_takes() -> None:
    lanes = Lanes()

    ended = look(lanes, *[3_600.0] * LOOKS_JUDGED)

    assert lanes.look_allowed_at == ended + LOOK_SECONDS_MAX


def test_a_quick_look_may_be_repeated_at_once_but_need_not_while_claims_find_enough() -> None:
    lanes = Lanes()
    ended = time.monotonic()

    lanes.looked([], began=ended, ended=ended)

    assert lanes.may_look()
    assert not lanes.should_look() or time.monotonic() >= ended + LOOK_SECONDS_MIN
