"""`pgqueue schedules`."""

from __future__ import annotations

import getpass
from pathlib import Path

import pytest
from command import Command, write_application
from support import execute
from working import table

from pgqueue import PgQueue

APPLICATION = """
from pgqueue import PgQueue

pgq = PgQueue()


@pgq.task(queue="reports", priority=2)
def report(size: int = 1) -> None: ...
"""

NIGHTLY = ("nightly", "0 3 * * *", "report")


@pytest.fixture
def pgqueue(url: str) -> Command:
    return Command(url)


def test_a_schedule_is_made_listed_and_shown_with_its_next_ticks(pgqueue: Command) -> None:
    made = pgqueue.json("schedules", "add", *NIGHTLY, '{"size": 3}', "--tz", "Europe/Zurich", "--catchup", "all")

    (listed,) = pgqueue.json("schedules", "list")
    shown = pgqueue.json("schedules", "show", "nightly", "--ticks", 3)
    text = pgqueue("schedules", "show", "nightly").stdout

    assert listed == made == {key: value for key, value in shown.items() if key != "next_ticks"}
    assert (made["state"], made["declared_by"]) == ("enabled", f"cli:{getpass.getuser()}")
    assert (made["payload"], made["catchup"], made["timezone"]) == ({"size": 3}, "all", "Europe/Zurich")
    assert shown["next_ticks"][0]["tick_at"] == made["next_tick_at"]
    assert [tick["local"][10:19] for tick in shown["next_ticks"]] == ["T03:00:00"] * 3
    assert text.count("T03:00:00+0") == 5
    assert "Europe/Zurich" in pgqueue("schedules", "list").stdout


def test_the_application_knows_the_task_and_what_its_payload_may_be(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_application(tmp_path, "shop", APPLICATION, monkeypatch)
    pgqueue = Command(url, PGQUEUE_APP="shop:pgq")

    made = pgqueue.json("schedules", "add", *NIGHTLY, "--max-retries", 9)
    unfit = pgqueue("schedules", "add", *NIGHTLY, '{"sise": 1}', code=2)
    unknown = pgqueue("schedules", "add", "nightly", "0 3 * * *", "reprot", code=3)

    assert (made["queue"], made["priority"], made["max_retries"]) == ("reports", 2, 9)
    assert "sise" in unfit.stderr
    assert "registered tasks: report" in unknown.stderr


def test_adding_again_changes_the_schedule(pgqueue: Command) -> None:
    pgqueue("schedules", "add", *NIGHTLY)

    pgqueue("schedules", "add", "nightly", "0 4 * * *", "report", "--disabled", "--no-overlap")

    (listed,) = pgqueue.json("schedules", "list")
    assert (listed["cron"], listed["state"], listed["overlap"]) == ("0 4 * * *", "disabled", False)


def test_schedules_are_disabled_and_enabled_and_it_is_said_what_changed(pgqueue: Command, pgq: PgQueue) -> None:
    pgqueue("schedules", "add", *NIGHTLY)

    assert pgqueue.json("schedules", "disable", "nightly", "--reason", "too loud") == [
        {"name": "nightly", "changed": True}
    ]
    assert pgqueue.json("schedules", "list")[0]["state"] == "disabled"
    assert pgqueue.json("schedules", "disable", "nightly") == [{"name": "nightly", "changed": False}]
    assert pgqueue.json("schedules", "enable", "nightly") == [{"name": "nightly", "changed": True}]
    assert pgq.schedules.get("nightly").enabled


def test_a_schedule_runs_out_of_turn(pgqueue: Command, pgq: PgQueue) -> None:
    pgqueue("schedules", "add", *NIGHTLY, "--no-overlap")

    job_id = int(pgqueue("schedules", "run", "nightly", "--reason", "the customer asked").stdout)
    again = pgqueue("schedules", "run", "nightly")

    assert pgq.get_job(job_id).metadata == {"schedule": "nightly"}
    assert int(again.stdout) == job_id
    assert "nothing was enqueued" in again.stderr


def test_schedules_are_deleted_and_those_that_are_not_there_exit_3(pgqueue: Command) -> None:
    pgqueue("schedules", "add", *NIGHTLY)

    result = pgqueue("schedules", "delete", "missing", "nightly", code=3)

    assert "there is no schedule 'missing'" in result.stderr
    assert "nightly" in result.stdout
    assert pgqueue.json("schedules", "list") == []
    for command in ("show", "run", "enable", "disable"):
        pgqueue("schedules", command, "nightly", code=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nightly", "0 3 * *", "report"], "Wrong number of fields"),
        ([*NIGHTLY, "--tz", "Mars"], "no time zone 'Mars'"),
        ([*NIGHTLY, "[]"], "must be a JSON object"),
        ([*NIGHTLY, "--catchup", "some"], "'none', 'latest', 'all'"),
        (["two words", "0 3 * * *", "report"], "schedule name"),
        (["nightly", "0 3 * * *"], "TASK"),
    ],
)
def test_what_cannot_be_a_schedule_exits_2_and_says_why(pgqueue: Command, arguments: list[str], message: str) -> None:
    result = pgqueue("schedules", "add", *arguments, code=2)

    assert message in result.stderr
    assert pgqueue.json("schedules", "list") == []


def test_a_schedule_that_cannot_be_read_is_shown_all_the_same(pgqueue: Command, pgq: PgQueue) -> None:
    schedules = table(pgq, "schedules")
    execute(pgq.engine, f"INSERT INTO {schedules} (name, task, cron) VALUES ('odd', 'report', 'now and then')")

    shown = pgqueue("schedules", "show", "odd", "-o", "json")

    assert '"next_ticks": []' in shown.stdout
    assert "now and then" in shown.stderr
