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
    ],
)
def test_bad_arguments_are_usage_errors_that_say_what_was_expected(
    pgqueue: Command, pgq: PgQueue, arguments: list[str], complaint: str
) -> None:
    result = pgqueue("limits", "set", *arguments, code=2)

    assert complaint in " ".join(result.stderr.split())
