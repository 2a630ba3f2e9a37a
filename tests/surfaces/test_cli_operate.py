"""`pgqueue jobs`, `queues`, `stats` and `prune`."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime

import pytest
from command import Command
from jobs import add, claim_one, completed, finish
from support import execute

from pgqueue import Discard, JobStatus, PgQueue, Worker, WorkerConfig, operations


@pytest.fixture
def pgqueue(url: str) -> Command:
    return Command(url)


@pytest.fixture
def jobs(pgq: PgQueue) -> dict[str, int]:
    """A job in each status but running, by status."""
    doomed = pgq.task(name="doomed", queue="bad")(give_up)
    fine = pgq.task(name="fine")(succeed)
    later = pgq.external_task("later")
    with pgq.begin() as connection:
        ids = {
            "completed": fine.enqueue(connection).id,
            "dead": doomed.using(unique_key="k").enqueue(connection).id,
            "pending": later.enqueue(connection).id,
            "cancelled": later.enqueue(connection).id,
        }
    pgq.cancel(ids["cancelled"])
    Worker(pgq, WorkerConfig(queues={"default": 1, "bad": 1}, drain=True)).run()
    return ids


def succeed() -> None: ...


def give_up() -> None:
    raise Discard("no such customer")


def status(pgq: PgQueue, job_id: int) -> str:
    return pgq.get_job(job_id).status


def test_jobs_are_listed_newest_first_and_page_by_page(pgqueue: Command, jobs: dict[str, int]) -> None:
    listed = [job["id"] for job in pgqueue.json("jobs", "list")]
    first_page = [job["id"] for job in pgqueue.json("jobs", "list", "--limit", "3")]
    second_page = [job["id"] for job in pgqueue.json("jobs", "list", "--limit", "3", "--before", first_page[-1])]

    assert listed == sorted(jobs.values(), reverse=True)
    assert first_page + second_page == listed


def test_jobs_are_filtered(pgqueue: Command, jobs: dict[str, int]) -> None:
    assert [job["id"] for job in pgqueue.json("jobs", "list", "--status", "dead")] == [jobs["dead"]]
    assert [job["id"] for job in pgqueue.json("jobs", "list", "--queue", "bad")] == [jobs["dead"]]
    assert [job["id"] for job in pgqueue.json("jobs", "list", "--task", "fine")] == [jobs["completed"]]
    assert pgqueue.json("jobs", "list", "--task", "fine", "--status", "dead") == []


def test_a_job_is_shown_with_what_happened_to_it(pgqueue: Command, jobs: dict[str, int]) -> None:
    shown = pgqueue.json("jobs", "show", jobs["dead"])
    table = pgqueue("jobs", "show", jobs["dead"]).stdout

    assert shown["status"] == "dead"
    assert shown["error"]["message"] == "no such customer"
    assert [event["event"] for event in shown["events"]] == ["dead"]
    assert "no such customer" in table
    assert "Traceback" in table


@pytest.mark.parametrize("command", ["show", "retry", "cancel", "delete"])
def test_a_job_that_is_not_there_exits_3(pgqueue: Command, command: str) -> None:
    result = pgqueue("jobs", command, 999, code=3)

    assert "there is no job 999" in result.stderr


def test_a_dead_job_is_put_back_with_who_did_it_and_why(pgqueue: Command, pgq: PgQueue, jobs: dict[str, int]) -> None:
    changed = pgqueue.json("jobs", "retry", jobs["dead"], jobs["cancelled"], "--reason", "customer was added")

    assert changed == [{"id": jobs["dead"], "status": "pending"}, {"id": jobs["cancelled"], "status": "pending"}]
    assert status(pgq, jobs["dead"]) == status(pgq, jobs["cancelled"]) == "pending"
    event = pgq.job_events(jobs["dead"])[-1]
    assert (event["event"], event["actor"], event["reason"]) == (
        "replay",
        f"cli:{getpass.getuser()}",
        "customer was added",
    )


def test_jobs_are_cancelled_and_deleted(pgqueue: Command, pgq: PgQueue, jobs: dict[str, int]) -> None:
    cancelled = pgqueue.json("jobs", "cancel", jobs["pending"])
    deleted = pgqueue.json("jobs", "delete", jobs["pending"], jobs["dead"])

    assert cancelled == [{"id": jobs["pending"], "status": "cancelled"}]
    assert deleted == [{"id": jobs["pending"], "status": "deleted"}, {"id": jobs["dead"], "status": "deleted"}]
    assert {job.id for job in pgq.list_jobs()} == {jobs["completed"], jobs["cancelled"]}
    assert [event["event"] for event in pgq.job_events(jobs["pending"])] == ["cancel", "delete"]


@pytest.mark.parametrize(
    ("command", "before", "message"),
    [
        ("retry", "pending", "is pending; only a dead or cancelled job can become pending"),
        ("retry", "completed", "is completed; only a dead or cancelled job"),
        ("cancel", "completed", "is completed; only a pending or running job can become cancelled"),
        ("cancel", "dead", "is dead; only a pending or running job"),
    ],
)
def test_what_the_status_does_not_allow_exits_4_and_changes_nothing(
    pgqueue: Command, pgq: PgQueue, jobs: dict[str, int], command: str, before: str, message: str
) -> None:
    result = pgqueue("jobs", command, jobs[before], code=4)

    assert message in result.stderr
    assert status(pgq, jobs[before]) == before


def test_a_running_job_cannot_be_deleted(pgqueue: Command, pgq: PgQueue) -> None:
    job_id = int(pgqueue("enqueue", "work").stdout)
    pgq.claim("tester")

    result = pgqueue("jobs", "delete", job_id, code=4)

    assert f"job {job_id} is running; cancel it first" in result.stderr
    assert status(pgq, job_id) == "running"


def test_a_replay_against_a_taken_unique_key_exits_4(pgqueue: Command, pgq: PgQueue, jobs: dict[str, int]) -> None:
    pgqueue("enqueue", "doomed", "--unique-key", "k")

    result = pgqueue("jobs", "retry", jobs["dead"], code=4)

    assert "another job of its task with the same unique key" in result.stderr
    assert status(pgq, jobs["dead"]) == "dead"


def test_of_several_jobs_those_that_can_be_changed_are(pgqueue: Command, pgq: PgQueue, jobs: dict[str, int]) -> None:
    result = pgqueue("jobs", "cancel", 999, jobs["dead"], jobs["pending"], "-o", "jsonl", code=3)

    assert result.stdout == f'{{"id": {jobs["pending"]}, "status": "cancelled"}}\n'
    assert len(result.stderr.splitlines()) == 2
    assert status(pgq, jobs["pending"]) == "cancelled"


def test_where_nothing_was_changed_nothing_is_printed(pgqueue: Command) -> None:
    assert pgqueue("jobs", "cancel", 998, 999, code=3).stdout == ""
    assert pgqueue("jobs", "cancel", 998, 999, "-o", "json", code=3).stdout == "[]\n"


def test_an_operator_without_a_name_is_recorded_as_unknown(
    pgqueue: Command, pgq: PgQueue, jobs: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> str:
        raise OSError("there is no user of this number")

    monkeypatch.setattr(getpass, "getuser", nobody)

    pgqueue("jobs", "retry", jobs["dead"])

    assert pgq.job_events(jobs["dead"])[-1]["actor"] == "cli:unknown"


def test_a_queue_is_paused_for_a_time_and_resumed(pgqueue: Command, pgq: PgQueue) -> None:
    pgqueue("enqueue", "work")

    (paused,) = pgqueue.json("queues", "pause", "default", "--for", "10m", "--reason", "deploy")
    nothing = pgq.claim("tester")
    (listed,) = pgqueue.json("queues", "list")
    resumed = pgqueue.json("queues", "resume", "default", "other")
    something = pgq.claim("tester")

    until = datetime.fromisoformat(paused["paused_until"])
    assert 500 < (until - datetime.now(UTC)).total_seconds() < 700
    assert nothing == []
    assert (listed["paused"], listed["paused_until"]) == (True, paused["paused_until"])
    assert resumed == [
        {"queue": "default", "paused": False, "was_paused": True},
        {"queue": "other", "paused": False, "was_paused": False},
    ]
    assert len(something) == 1


def test_a_queue_without_a_time_is_paused_until_it_is_resumed(pgqueue: Command) -> None:
    assert pgqueue.json("queues", "pause", "a", "b") == [
        {"queue": "a", "paused": True, "paused_until": None},
        {"queue": "b", "paused": True, "paused_until": None},
    ]


@pytest.mark.parametrize("arguments", [["pause", "a;b"], ["resume", 'a"b'], ["pause", "a", "--for", "0s"]])
def test_a_pause_that_cannot_be_is_refused(pgqueue: Command, pgq: PgQueue, arguments: list[str]) -> None:
    pgqueue("queues", *arguments, code=2)

    assert pgq.queues() == []


def test_prune_deletes_old_final_jobs_and_keeps_dead_ones_unless_named(
    pgqueue: Command, pgq: PgQueue, jobs: dict[str, int]
) -> None:
    too_young = pgqueue.json("prune", "--older-than", "1h")
    execute(
        pgq.engine,
        f"UPDATE {pgq.tables.jobs.fullname} SET finished_at = '2020-01-01 00:00:00.000' WHERE finished_at IS NOT NULL",
    )

    pruned = pgqueue.json("prune", "--older-than", "1h")
    left = {job.status for job in pgq.list_jobs()}
    pruned_dead = pgqueue("prune", "--older-than", "1h", "--status", "dead").stdout

    assert too_young == {"pruned": 0}
    assert pruned == {"pruned": 2}
    assert left == {"pending", "dead"}
    assert pruned_dead == "1\n"
    assert [job.status for job in pgq.list_jobs()] == ["pending"]


@pytest.mark.parametrize("name", [JobStatus.PENDING, JobStatus.RUNNING])
def test_prune_refuses_jobs_that_have_not_ended(
    pgqueue: Command, pgq: PgQueue, jobs: dict[str, int], name: str
) -> None:
    result = pgqueue("prune", "--older-than", "1h", "--status", name, code=2)

    assert f"only completed, dead, cancelled jobs can be pruned, got '{name}'" in result.stderr
    assert len(pgq.list_jobs()) == 4


def test_a_list_that_looked_through_some_jobs_only_says_where_to_go_on(pgqueue: Command, jobs: dict[str, int]) -> None:
    run = pgqueue("jobs", "list", "--queue", "bad", "--within", "2", "-o", "json")

    assert run.stdout.strip() == "[]"
    assert f"looked through 2 jobs; for older ones: --before {jobs['pending']}" in run.stderr


def test_estimates_are_marked_in_a_table_and_told_of_in_json(pg: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "COUNT_BLOCKS_MAX", 0)
    add(pg, 1)
    finish(pg, completed(claim_one(pg)))
    pgqueue = Command(pg.url.render_as_string(hide_password=False))

    table = pgqueue("queues", "list").stdout.splitlines()
    (document,) = pgqueue.json("queues", "list")

    assert "estimated" not in table[0]
    assert "~1" in table[-1].split()
    assert (document["completed"], document["estimated"]) == (1, True)
    assert [queue["estimated"] for queue in pgqueue.json("queues", "list", "--exact")] == [False]
    assert [queue["estimated"] for queue in pgqueue.json("stats", "--exact")["queues"]] == [False]
