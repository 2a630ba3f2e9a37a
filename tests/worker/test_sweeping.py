"""Where the looks of a sweep begin, when it takes long to look at everything."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from jobs import add, claim, expire, statuses
from support import wait_for
from working import working

from pgqueue import PgQueue, sweeping
from pgqueue.store import SINCE_EVER, Overdue
from pgqueue.sweeping import LOOK_SECONDS_MAX, LOOK_SHARE, LOOKS_JUDGED, MARGIN, Seen

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
NOTHING = Overdue(None, None, None)


def looked(seen: Seen, *seconds: float, found: Overdue = NOTHING, until: datetime = NOON) -> None:
    """As often from the beginning as there are durations."""
    for took in seconds:
        seen.looked(SINCE_EVER, time.monotonic() - took, found, until)


def test_quick_looks_all_begin_at_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    seen = Seen()
    looked(seen, *[0.0] * LOOKS_JUDGED)

    assert seen.since() is SINCE_EVER


def test_after_slow_looks_the_next_begin_where_the_last_found_something_or_a_little_before_it_ended() -> None:
    seen = Seen()
    looked(seen, *[1.0] * LOOKS_JUDGED, found=Overdue(None, NOON - timedelta(hours=1), None))

    assert seen.since() == (NOON - MARGIN, NOON - timedelta(hours=1), NOON - MARGIN)

    seen.looked(seen.since(), time.monotonic(), Overdue(NOON, None, None), NOON)

    assert seen.since() == (NOON - MARGIN,) * 3


def test_a_slow_look_is_repeated_when_it_takes_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    looked(seen, *[1.0] * LOOKS_JUDGED)
    present = time.monotonic()

    monkeypatch.setattr(time, "monotonic", lambda: present + 1.0 / LOOK_SHARE + 0.1)

    assert seen.since() is SINCE_EVER


def test_however_slow_it_is_it_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    looked(seen, *[3600.0] * LOOKS_JUDGED)
    present = time.monotonic()

    monkeypatch.setattr(time, "monotonic", lambda: present + LOOK_SECONDS_MAX + 0.1)

    assert seen.since() is SINCE_EVER


@pytest.fixture
def slow_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look is the only one from the beginning for long."""
    monkeypatch.setattr(sweeping, "LOOK_SHARE", 1e-9)
    monkeypatch.setattr(sweeping, "LOOKS_JUDGED", 1)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Overdue]:
    """Where they began."""
    began = []
    since = Seen.since

    def note(seen: Seen) -> Overdue:
        began.append(since(seen))
        return began[-1]

    monkeypatch.setattr(Seen, "since", note)
    return began


@pytest.mark.usefixtures("slow_looks")
def test_a_worker_whose_looks_do_not_begin_at_the_beginning_sees_to_what_becomes_overdue(
    pgq: PgQueue, looks: list[Overdue]
) -> None:
    @pgq.task
    def other() -> None: ...

    with working(pgq, queues={"other": 1}, sweep_interval=0.05):
        wait_for(lambda: any(since is not SINCE_EVER for since in looks), "a look from later on")
        (lost,) = add(pgq)
        claim(pgq, lease=0.5)
        (late,) = add(pgq, expires_in=0.5)

        wait_for(lambda: statuses(pgq) == {lost: "pending", late: "dead"}, "the sweep and the expiry")

    assert looks.count(SINCE_EVER) == 1


@pytest.mark.usefixtures("slow_looks")
def test_what_is_overdue_from_before_is_found_by_the_next_look_from_the_beginning(
    pgq: PgQueue, looks: list[Overdue], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "LOOK_SECONDS_MAX", 2.0)

    @pgq.task
    def other() -> None: ...

    with working(pgq, queues={"other": 1}, sweep_interval=0.05):
        wait_for(lambda: any(since is not SINCE_EVER for since in looks), "a look from later on")
        (job_id,) = add(pgq)
        claim(pgq)
        expire(pgq, seconds_ago=3600)

        wait_for(lambda: statuses(pgq) == {job_id: "pending"}, "the sweep")
