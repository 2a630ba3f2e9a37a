"""`pgqueue limits`."""

from __future__ import annotations

import pytest
from command import Command

from pgqueue import PgQueue


@pytest.fixture
def pgqueue(url: str) -> Command:
    return Command(url)


def test_limits_that_are_set_are_listed_with_who_set_them(pgqueue: Command, pgq: PgQueue) -> None:
    kept = pgqueue.json("limits", "set", "task:resize", "--concurrency", 4, "--rate", "90/minute", "--burst", 2)
    pgqueue("limits", "set", "queue:mail", "--max-depth", 100, "--promote-after", "10m")

    assert (kept["concurrency"], kept["rate"], kept["burst"]) == (4, 1.5, 2)
    listed = {row["whose"]: row for row in pgqueue.json("limits", "list")}
    assert listed["task:resize"]["concurrency"] == 4
    assert listed["queue:mail"]["max_depth"] == 100
    assert listed["queue:mail"]["on_full"] == "error"
    assert listed["queue:mail"]["promote_after"] == 600
    assert listed["queue:mail"]["declared_by"].startswith("cli:")


def test_what_is_not_named_stays_and_none_lifts(pgqueue: Command, pgq: PgQueue) -> None:
    pgqueue("limits", "set", "task:resize", "--concurrency", 4, "--rate", "5/10s")

    kept = pgqueue.json("limits", "set", "task:resize", "--rate", "none")

    assert (kept["concurrency"], kept["rate"], kept["burst"]) == (4, None, None)


def test_what_belongs_to_a_limit_stays_when_the_limit_changes(pgqueue: Command, pgq: PgQueue) -> None:
    pgqueue("limits", "set", "queue:mail", "--max-depth", 5, "--on-full", "drop", "--rate", "1/minute", "--burst", 9)
    pgqueue("limits", "set", "queue:mail", "--promote-after", "10m")

    kept = pgqueue.json(
        "limits", "set", "queue:mail", "--max-depth", 6, "--rate", "2/minute", "--promote-after", "none"
    )

    assert (kept["max_depth"], kept["on_full"], kept["burst"], kept["promote_after"]) == (6, "drop", 9, None)


def test_a_slow_rate_is_not_shown_as_none_at_all(pgqueue: Command, pgq: PgQueue) -> None:
    assert "0.0167" in pgqueue("limits", "set", "queue:mail", "--rate", "1/minute").stdout


def test_a_change_is_on_record_with_its_reason(pgqueue: Command, pgq: PgQueue) -> None:
    pgqueue("limits", "set", "queue:mail", "--concurrency", 4, "--reason", "the provider asked")

    with pgq.reading() as connection:
        (event,) = connection.execute(pgq.tables.job_events.select()).all()
    assert (event.queue, event.event, event.reason) == ("mail", "limit", "concurrency 4: the provider asked")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["mail", "--concurrency", "1"], "expected queue:NAME or task:NAME"),
        (["job:mail", "--concurrency", "1"], "expected queue:NAME or task:NAME"),
        (["queue:", "--concurrency", "1"], "expected queue:NAME or task:NAME"),
        (["queue:mail"], "name at least one limit"),
        (["queue:mail", "--concurrency", "few"], "expected a whole number or none"),
        (["queue:mail", "--concurrency", "0"], "at least 1"),
        (["queue:mail", "--rate", "100"], "expected a number and a time"),
        (["queue:mail", "--rate", "100/fortnight"], "expected a number and a time"),
        (["queue:mail", "--rate", "-1/second"], "more than 0"),
        (["queue:mail", "--on-full", "drop"], "belong together"),
        (["queue:mail", "--key-concurrency", "2"], "is a limit of tasks"),
        (["queue:mail", "--max-depth", "none", "--on-full", "drop"], "max_depth and on_full belong together"),
        (["queue:mail", "--rate", "none", "--burst", "3"], "rate and burst belong together"),
        (["queue:mail", "--rate", "1e-300/day"], "make the rate larger"),
        (["queue:mail", "--promote-after", "soon"], "such as 30s, 5m, 1h30m or 7d, got 'soon', or none"),
    ],
)
def test_bad_arguments_are_usage_errors_that_say_what_was_expected(
    pgqueue: Command, pgq: PgQueue, arguments: list[str], complaint: str
) -> None:
    result = pgqueue("limits", "set", *arguments, code=2)

    assert complaint in " ".join(result.stderr.split())
