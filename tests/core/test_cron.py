"""When schedules tick, across the changes of clocks, and what becomes of ticks that were missed."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

from pgqueue import ConfigurationError, cron
from pgqueue.cron import CATCHUP_TICKS_MAX, MISSED_SECONDS, TICKS_PER_PASS, Catchup, CronRule, Due, Schedule, settle

ZURICH = "Europe/Zurich"
MINUTE = timedelta(minutes=1)

#: Zones whose clocks change by an hour or half of one, at night, at midnight, on either half of the year, or never;
#: and moments around which they do.
ZONES = {
    "UTC": datetime(2026, 3, 29, 1, tzinfo=UTC),
    ZURICH: datetime(2026, 3, 29, 1, tzinfo=UTC),
    "America/New_York": datetime(2026, 11, 1, 6, tzinfo=UTC),
    "America/Santiago": datetime(2026, 9, 6, 4, tzinfo=UTC),  # from 00:00 to 01:00
    "America/Havana": datetime(2026, 11, 1, 5, tzinfo=UTC),  # from 01:00 to 00:00
    "Australia/Lord_Howe": datetime(2026, 4, 4, 15, tzinfo=UTC),  # half an hour back
    "Africa/Casablanca": datetime(2026, 3, 22, 2, tzinfo=UTC),  # back at the end of Ramadan
    "Asia/Kathmandu": datetime(2026, 3, 29, 1, tzinfo=UTC),
}

TIMES = st.sampled_from(["*", "*/7", "*/30", "0", "30", "0,30", "15-45/15", "59"])
HOURS = st.sampled_from(["*", "*/2", "*/3", "0", "1", "2", "3", "23", "1-3", "0,2"])
DAYS = st.sampled_from(["* * *", "* * 0", "* * 1", "1 * *", "29 3 *", "L * *", "* 3,9 SUN", "1 * MON#1"])
EXPRESSIONS = st.builds("{} {} {}".format, TIMES, HOURS, DAYS)


def ticks(rule: CronRule, after: datetime, count: int) -> list[datetime]:
    return list(itertools.islice(rule.ticks_after(after), count))


def local_ticks(expression: str, zone: str, day: str, count: int) -> list[str]:
    """The first ticks of a day, with the date and by the local clock."""
    midnight = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone))
    found = ticks(CronRule(expression, zone), midnight - timedelta(seconds=1), count)
    return [tick.astimezone(ZoneInfo(zone)).strftime("%d. %H:%M%z") for tick in found]


# The changes of clocks -------------------------------------------------------------------------------------


def test_a_time_of_day_that_does_not_exist_ticks_when_the_clock_jumps() -> None:
    found = local_ticks("30 2 * * *", ZURICH, "2026-03-28", 3)

    assert found == ["28. 02:30+0100", "29. 03:00+0200", "30. 02:30+0200"]


def test_several_times_of_day_that_do_not_exist_tick_once() -> None:
    found = local_ticks("0,15,30 2,3 * * *", ZURICH, "2026-03-29", 4)

    assert found == ["29. 03:00+0200", "29. 03:15+0200", "29. 03:30+0200", "30. 02:00+0200"]


def test_a_time_of_day_that_occurs_twice_ticks_the_first_time() -> None:
    found = local_ticks("30 2 * * *", ZURICH, "2026-10-24", 3)

    assert found == ["24. 02:30+0200", "25. 02:30+0200", "26. 02:30+0100"]


def test_an_interval_has_no_ticks_in_an_hour_that_does_not_exist() -> None:
    found = local_ticks("*/30 2 * * *", ZURICH, "2026-03-28", 4)

    assert found == ["28. 02:00+0100", "28. 02:30+0100", "30. 02:00+0200", "30. 02:30+0200"]


def test_an_interval_ticks_twice_in_an_hour_that_occurs_twice() -> None:
    found = local_ticks("*/30 2 * * *", ZURICH, "2026-10-25", 5)

    assert found == ["25. 02:00+0200", "25. 02:30+0200", "25. 02:00+0100", "25. 02:30+0100", "26. 02:00+0100"]


@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25"])
def test_every_hour_is_every_hour_across_both_changes(day: str) -> None:
    found = ticks(CronRule("0 * * * *", ZURICH), datetime.fromisoformat(f"{day}T00:00Z"), 48)

    assert {later - earlier for earlier, later in itertools.pairwise(found)} == {timedelta(hours=1)}


def test_the_same_rules_hold_on_the_other_side_of_the_world_at_midnight() -> None:
    sprung = local_ticks("0 0 * * *", "America/Santiago", "2026-09-05", 3)
    fallen = local_ticks("30 23 * * *", "America/Santiago", "2026-04-04", 2)
    every = local_ticks("*/30 23 * * *", "America/Santiago", "2026-04-04", 4)

    assert sprung == ["05. 00:00-0400", "06. 01:00-0300", "07. 00:00-0300"]
    assert fallen == ["04. 23:30-0300", "05. 23:30-0400"]
    assert every == ["04. 23:00-0300", "04. 23:30-0300", "04. 23:00-0400", "04. 23:30-0400"]


def test_a_change_by_half_an_hour_loses_no_tick_behind_it() -> None:
    found = local_ticks("*/30 1,2 * * *", "Australia/Lord_Howe", "2026-04-05", 5)

    assert found == ["05. 01:00+1100", "05. 01:30+1100", "05. 01:30+1030", "05. 02:00+1030", "05. 02:30+1030"]


def by_brute_force(expression: str, zone: ZoneInfo, after: datetime, until: datetime) -> list[datetime]:
    """The ticks by the rules as they are written down, one minute after the other."""

    def fits(local: datetime) -> bool:
        naive = local.replace(tzinfo=None)
        return next(CronSim(expression, naive - timedelta(seconds=1))) == naive

    is_time_of_day = not any("*" in part for part in expression.split()[:2])
    found = []
    moment = after
    while (moment := moment + MINUTE) <= until:
        local, before = moment.astimezone(zone), (moment - MINUTE).astimezone(zone)
        jumped = local.replace(tzinfo=None) - before.replace(tzinfo=None) - MINUTE
        if not is_time_of_day:
            hit = fits(local)
        else:
            hit = fits(local) and not local.fold
            while jumped > timedelta(0):  # the times that do not exist
                hit = hit or fits(local - jumped)
                jumped -= MINUTE
        if hit:
            found.append(moment)
    return found


@settings(max_examples=30, deadline=None)
@given(EXPRESSIONS, st.sampled_from(sorted(ZONES)), st.integers(0, 6 * 60), st.sampled_from([0, 182]))
def test_ticks_are_those_that_the_rules_name_minute_by_minute(
    expression: str, zone: str, minutes: int, days: int
) -> None:
    after = ZONES[zone] + timedelta(days=days) - minutes * MINUTE
    until = after + timedelta(hours=9)
    rule = CronRule(expression, zone)

    found = list(itertools.takewhile(lambda tick: tick <= until, rule.ticks_after(after)))

    assert found == by_brute_force(expression, ZoneInfo(zone), after, until)


@settings(max_examples=150, deadline=None)
@given(EXPRESSIONS, st.sampled_from(sorted(ZONES)), st.integers(0, 400 * 86_400), st.floats(0, 1))
def test_ticks_only_rise_and_are_the_same_from_wherever_one_starts(
    expression: str, zone: str, seconds: int, share: float
) -> None:
    rule = CronRule(expression, zone)
    after = datetime(2025, 12, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    found = ticks(rule, after, 12)

    assert found == sorted(set(found))
    assert found[0] > after
    middle = after + (found[-1] - after) * share
    assert ticks(rule, middle, 12)[: len([tick for tick in found if tick > middle])] == [
        tick for tick in found if tick > middle
    ]
    for tick, following in itertools.pairwise(found):
        assert rule.next_after(tick) == rule.next_after(tick + timedelta(microseconds=1)) == following


def test_six_fields_begin_with_the_second() -> None:
    found = ticks(CronRule("*/20 * * * * *"), datetime(2026, 1, 1, 0, 0, 5, tzinfo=UTC), 3)

    assert [tick.strftime("%M:%S") for tick in found] == ["00:20", "00:40", "01:00"]


# What cannot be a rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        ("", "at most 256 characters"),
        ("* * * *", "Wrong number of fields"),
        ("@daily", "Wrong number of fields"),
        ("61 * * * *", "Bad minute"),
        ("* 24 * * *", "Bad hour"),
        ("* * * * FUN", "Bad day-of-week"),
        ("0 0 30 2 *", "Bad day-of-month"),
        ("0 0 31 4,6 *", "Bad day-of-month"),
        ("* " * 200, "at most 256 characters"),
        ("9" * 200 + " * * * *", "Bad minute"),
        (None, "at most 256 characters"),
        (3, "at most 256 characters"),
    ],
)
def test_an_expression_that_cannot_be_is_refused_with_what_is_wrong(expression: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        CronRule(expression)


@pytest.mark.parametrize("zone", ["", "Europe", "Europe/Zuerich", "../../etc/passwd", "/etc/passwd", "a\0b", None, 1])
def test_a_time_zone_that_is_not_there_is_refused(zone: str) -> None:
    with pytest.raises(ConfigurationError, match="there is no time zone"):
        CronRule("* * * * *", zone)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789*/,-#LWSUNMOJA ", max_size=24))
def test_any_text_is_a_rule_with_a_tick_or_refused(expression: str) -> None:
    try:
        rule = CronRule(expression, ZURICH)
    except ConfigurationError:
        return

    assert rule.next_after(datetime(2026, 1, 1, tzinfo=UTC)) > datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("zone", ["UTC", ZURICH, "America/New_York"])
def test_a_moment_behind_which_there_is_no_tick_is_said(zone: str) -> None:
    with pytest.raises(ConfigurationError, match="no tick before the year 10000"):
        CronRule("0 3 * * *", zone).next_after(datetime(9999, 12, 31, 23, 59, 58, tzinfo=UTC))


def test_catchup_is_one_of_three_words() -> None:
    assert cron.checked_catchup("all") is Catchup.ALL
    with pytest.raises(ConfigurationError, match="none, latest, all"):
        cron.checked_catchup("some")


# Ticks that are due ----------------------------------------------------------------------------------------

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
EVERY_MINUTE = CronRule("* * * * *")


@pytest.mark.parametrize("catchup", list(Catchup))
def test_nothing_is_due_before_the_next_tick(catchup: Catchup) -> None:
    due = settle(EVERY_MINUTE, catchup, NOON, NOON - timedelta(milliseconds=1))

    assert (due.ticks, due.next_tick_at, due.skipped) == ([], NOON, None)


@pytest.mark.parametrize("catchup", list(Catchup))
@pytest.mark.parametrize("late", [0.0, 0.5, 8.0, 59.0])
def test_a_tick_that_is_a_little_late_runs_whatever_the_catchup(catchup: Catchup, late: float) -> None:
    due = settle(EVERY_MINUTE, catchup, NOON, NOON + timedelta(seconds=late))

    assert (due.ticks, due.next_tick_at, due.skipped) == ([NOON], NOON + MINUTE, None)


@pytest.mark.parametrize("catchup", list(Catchup))
@pytest.mark.parametrize("moment", [ZONES[ZURICH], datetime(2026, 10, 25, 1, tzinfo=UTC)])
def test_in_which_zone_the_database_gives_its_moments_makes_no_difference(catchup: Catchup, moment: datetime) -> None:
    """Python reckons by the wall clock within one zone: a second before 03:00 is in an hour that does not exist."""
    zone = ZoneInfo(ZURICH)
    since, now = moment.astimezone(zone), (moment + timedelta(seconds=1)).astimezone(zone)

    due = settle(CronRule("0 * * * *"), catchup, since, now)

    assert due == Due([moment], moment + timedelta(hours=1))


def test_the_next_ticks_of_a_row_are_the_same_in_whichever_zone_it_was_read() -> None:
    moment = ZONES[ZURICH]

    row = Schedule(
        name="hourly",
        cron="0 * * * *",
        timezone="UTC",
        task="report",
        payload_json="{}",
        queue="default",
        priority=0,
        max_retries=3,
        catchup="all",
        overlap=True,
        enabled=True,
        declared_by="sql",
        next_tick_at=moment.astimezone(ZoneInfo(ZURICH)),
        created_at=moment,
        updated_at=moment,
    )

    assert row.next_ticks(2) == [moment, moment + timedelta(hours=1)]


def test_none_skips_what_was_missed() -> None:
    rule = CronRule("0 * * * *")

    due = settle(rule, Catchup.NONE, NOON, NOON + timedelta(hours=3, seconds=MISSED_SECONDS + 1))

    assert due.ticks == []
    assert due.next_tick_at == NOON + timedelta(hours=4)
    assert due.skipped == (NOON, NOON + timedelta(hours=3))


def test_none_runs_the_tick_that_is_just_due_after_a_downtime() -> None:
    due = settle(CronRule("0 * * * *"), Catchup.NONE, NOON, NOON + timedelta(hours=3, seconds=2))

    assert due.ticks == [NOON + timedelta(hours=3)]
    assert due.skipped == (NOON, NOON + timedelta(hours=2))


def test_latest_runs_one_job_for_the_latest_that_was_missed() -> None:
    due = settle(EVERY_MINUTE, Catchup.LATEST, NOON, NOON + timedelta(days=200, seconds=30))

    assert due.ticks == [NOON + timedelta(days=200)]
    assert due.next_tick_at == NOON + timedelta(days=200) + MINUTE
    assert due.skipped == (NOON, NOON + timedelta(days=200) - MINUTE)


def test_all_runs_each_in_passes_of_a_bounded_number() -> None:
    now = NOON + 250 * MINUTE
    since, found, passes = NOON, [], 0

    while since <= now:
        due = settle(EVERY_MINUTE, Catchup.ALL, since, now)
        found += due.ticks
        since, passes = due.next_tick_at, passes + 1

    assert found == [NOON + n * MINUTE for n in range(251)]
    assert passes == -(-251 // TICKS_PER_PASS)


def test_all_makes_up_for_the_latest_of_too_many() -> None:
    now = NOON + timedelta(days=100)

    due = settle(EVERY_MINUTE, Catchup.ALL, NOON, now)

    first = now - (CATCHUP_TICKS_MAX - 1) * MINUTE
    assert due.ticks == [first + n * MINUTE for n in range(TICKS_PER_PASS)]
    assert due.skipped == (NOON, first - MINUTE)


@settings(max_examples=100, deadline=None)
@given(
    EXPRESSIONS,
    st.sampled_from(sorted(ZONES)),
    st.sampled_from(list(Catchup)),
    st.integers(0, 40 * 86_400),
    st.integers(0, 10 * 86_400_000),
)
def test_what_is_settled_covers_every_tick_exactly_once(
    expression: str, zone: str, catchup: Catchup, start: int, milliseconds: int
) -> None:
    rule = CronRule(expression, zone)
    since = datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=start)
    now = since + timedelta(milliseconds=milliseconds)
    expected = list(itertools.takewhile(lambda tick: tick <= now, rule.ticks_after(since - timedelta(seconds=1))))

    due = settle(rule, catchup, since, now)

    skipped = [tick for tick in expected if due.skipped and due.skipped[0] <= tick <= due.skipped[1]]
    if due.skipped:
        assert skipped[0] == due.skipped[0]
        assert skipped[-1] == due.skipped[1]
    settled = skipped + due.ticks
    assert settled == expected[: len(settled)]
    if len(due.ticks) < TICKS_PER_PASS:
        assert settled == expected
    assert due.next_tick_at == (rule.next_after(settled[-1]) if settled else rule.next_after(now))
