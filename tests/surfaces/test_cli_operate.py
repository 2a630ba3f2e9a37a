"""`pgqueue jobs`, `queues`, `stats` and `prune`."""

from __future__ import annotations

import getpass
import json
from datetime import UTC, datetime
from pathlib import Path

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


def test_the_result_of_a_job_can_be_waited_for(pgqueue: Command, pgq: PgQueue) -> None:
    job_id = add(pgq)[0]
    pgq.ack(pgq.claim("me"), result={"a": [1, None]})

    assert pgqueue.json("jobs", "wait", str(job_id), "--timeout", "30s") == {"a": [1, None]}


@pytest.mark.parametrize(
    ("status", "problem"),
    [("dead", "is dead"), ("cancelled", "was cancelled"), ("pending", "did not end within 0 s")],
)
def test_waiting_for_a_job_that_does_not_complete_fails(
    pgqueue: Command, jobs: dict[str, int], status: str, problem: str
) -> None:
    done = pgqueue("jobs", "wait", str(jobs[status]), "--timeout", "0", code=1)

    assert problem in done.stderr


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


@pytest.mark.parametrize("command", ["show", "replay", "cancel", "delete"])
def test_a_job_that_is_not_there_exits_3(pgqueue: Command, command: str) -> None:
    result = pgqueue("jobs", command, 999, code=3)

    assert "there is no job 999" in result.stderr


def test_a_dead_job_is_put_back_with_who_did_it_and_why(pgqueue: Command, pgq: PgQueue, jobs: dict[str, int]) -> None:
    changed = pgqueue.json("jobs", "replay", jobs["dead"], jobs["cancelled"], "--reason", "customer was added")

    assert changed == [{"id": jobs["dead"], "status": "pending"}, {"id": jobs["cancelled"], "status": "pending"}]
    assert status(pgq, jobs["dead"]) == status(pgq, jobs["cancelled"]) == "pending"
    event = pgq.job_events(jobs["dead"])[-1]
    assert (event["event"], event["actor"], event["reason"]) == (
        "replay",
        f"cli:{getpass.getuser()}",
        "customer was added",
    )


def test_a_running_job_is_asked_to_stop_and_cancelled_by_force(pgqueue: Command, pgq: PgQueue) -> None:
    with pgq.begin() as connection:
        job_id = pgq.external_task("running").using(queue="running").enqueue(connection).id
    pgq.claim("worker-1", queue="running")

    asked = pgqueue("jobs", "cancel", job_id, "-o", "jsonl")
    forced = pgqueue.json("jobs", "cancel", job_id, "--force")

    assert asked.stdout == f'{{"id": {job_id}, "status": "running"}}\n'
    assert f"job {job_id} is running; its worker was asked to stop it (--force cancels it at once)" in asked.stderr
    assert forced == [{"id": job_id, "status": "cancelled"}]
    assert [event["event"] for event in pgq.job_events(job_id)] == ["cancel_requested", "cancel"]


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
        ("replay", "pending", "is pending; only a dead or cancelled job can become pending"),
        ("replay", "completed", "is completed; only a dead or cancelled job"),
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

    result = pgqueue("jobs", "replay", jobs["dead"], code=4)

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

    pgqueue("jobs", "replay", jobs["dead"])

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


# Many dead jobs ----------------------------------------------------------------------------------------------


@pytest.fixture
def dead(pgq: PgQueue) -> list[int]:
    """Five dead jobs of the task doomed, two of them in the queue bad."""
    doomed = pgq.task(name="doomed")(give_up)
    with pgq.begin() as connection:
        ids = doomed.enqueue_many(connection, [{}] * 3)
        ids += doomed.using(queue="bad", metadata={"tenant": "acme"}).enqueue_many(connection, [{}] * 2)
    Worker(pgq, WorkerConfig(queues={"default": 1, "bad": 1}, drain=True)).run()
    return ids


def test_dead_jobs_that_fit_are_replayed_after_a_look(pgqueue: Command, pgq: PgQueue, dead: list[int]) -> None:
    filters = ("--queue", "bad", "--task", "doomed", "--error-type", "Discard", "--since", "1h", "--tag", "tenant=acme")

    planned = pgqueue.json("jobs", "replay", *filters, "--dry-run")
    unchanged = len(pgq.list_jobs(status="dead"))
    done = pgqueue.json("jobs", "replay", *filters, "--yes", "--reason", "back")

    assert planned == {"replayed": 2, "skipped": 0, "dry_run": True, "ids": dead[3:], "why_skipped": {}}
    assert unchanged == 5
    assert done == {**planned, "dry_run": False}
    assert [status(pgq, job_id) for job_id in dead] == ["dead"] * 3 + ["pending"] * 2
    assert pgq.job_events(dead[-1])[-1]["actor"] == f"cli:{getpass.getuser()}"


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 1, 5), ("", 1, 5)])
@pytest.mark.parametrize(("verb", "question"), [("replay", "Replay 5 dead jobs?"), ("purge", "Delete 5 dead jobs?")])
def test_many_are_changed_only_after_a_question(
    pgqueue: Command, pgq: PgQueue, dead: list[int], verb: str, question: str, answer: str, code: int, left: int
) -> None:
    result = pgqueue("jobs", verb, "--all", code=code, input=answer)

    assert question in result.stderr
    assert len(pgq.list_jobs(status="dead")) == left


def test_a_job_that_cannot_be_replayed_is_named_and_the_others_are(
    pgqueue: Command, pgq: PgQueue, jobs: dict[str, int], dead: list[int]
) -> None:
    with pgq.begin() as connection:
        holder = pgq.external_task("other").using(unique_key="k").enqueue(connection).id
    execute(pgq.engine, f"UPDATE {pgq.tables.jobs.fullname} SET task = 'doomed' WHERE id = {holder}")

    result = pgqueue("jobs", "replay", "--all", "--yes")

    assert f"job {jobs['dead']} is left as it is: job {holder} of its task has the same unique key" in result.stderr
    assert [job.id for job in pgq.list_jobs(status="dead")] == [jobs["dead"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("replay",), "say which jobs to replay"),
        (("purge",), "say which jobs to purge"),
        (("purge", "--all", "--task", "x"), "contradict each other"),
        (("replay", "1", "--task", "x"), "either ids or filters"),
        (("replay", "1", "--all"), "either ids or filters"),
        (("replay", "1", "2", "--payload", "{}"), "--payload is for one job, got 2 ids"),
        (("replay", "--all", "--payload", "{}"), "--payload is for one job: give its id"),
        (("replay", "1", "--payload", "[1]"), "the payload must be a JSON object, got list"),
        (("replay", "--all", "--since", "yesterday"), "expected how long ago"),
        (("replay", "--all", "--since", "2030-01-31T12:00:00"), "expected how long ago"),
        (("replay", "--all", "--tag", "tenant"), "expected KEY=VALUE"),
        (("replay", "--all", "--limit", "0"), "--limit"),
        (("edit", "1"), "--payload, --priority or --max-retries"),
        (("edit", "1", "--payload", "{"), "the payload is not JSON"),
        (("export", "-o", "table"), "an export is written as jsonl, got -o table"),
        (("export", "--force"), "--force needs --file"),
    ],
)
def test_arguments_that_cannot_be_meant_exit_2(pgqueue: Command, arguments: tuple[str, ...], message: str) -> None:
    assert message in " ".join(pgqueue("jobs", *arguments, code=2).stderr.split())


def test_a_job_is_edited_and_replayed_with_another_payload(pgqueue: Command, pgq: PgQueue, dead: list[int]) -> None:
    edited = pgqueue.json("jobs", "edit", dead[0], "--payload", '{"n": 1}', "--priority", "3", "--reason", "typo")
    replayed = pgqueue.json("jobs", "replay", dead[1], "--payload", '{"n": 2}')

    assert (edited, replayed) == ([{"id": dead[0], "status": "dead"}], [{"id": dead[1], "status": "pending"}])
    assert (pgq.get_job(dead[0]).payload, pgq.get_job(dead[0]).priority) == ({"n": 1}, 3)
    assert pgq.get_job(dead[1]).payload == {"n": 2}
    assert pgq.job_events(dead[0])[-1]["reason"] == "typo (changed priority, payload.n)"


def test_an_export_is_a_line_a_job_oldest_first(
    pgqueue: Command, pgq: PgQueue, dead: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pgqueue.inspecting.PAGE_JOBS", 2)
    file = tmp_path / "dead.jsonl"

    printed = pgqueue("jobs", "export", "--status", "dead").stdout.splitlines()
    told = pgqueue("jobs", "export", "--status", "dead", "--file", file)

    assert [json.loads(line)["id"] for line in printed] == dead
    assert json.loads(printed[0])["error"]["type"] == "pgqueue.errors.Discard"
    assert "claim_token" not in printed[0]
    assert file.read_text().splitlines() == printed
    assert file.stat().st_mode & 0o777 == 0o600
    assert (told.stdout, told.stderr) == ("", f"5 jobs written to {file}\n")


def test_a_file_that_is_there_is_not_overwritten_unasked(pgqueue: Command, dead: list[int], tmp_path: Path) -> None:
    file = tmp_path / "dead.jsonl"
    file.write_text("precious")

    refused = pgqueue("jobs", "export", "--file", file, code=2)
    content = file.read_text()
    pgqueue("jobs", "export", "--file", file, "--force")

    assert "there is already a file" in refused.stderr
    assert content == "precious"
    assert len(file.read_text().splitlines()) == 5
    assert "cannot write" in pgqueue("jobs", "export", "--file", tmp_path / "no" / "f", code=2).stderr


def test_an_export_that_breaks_leaves_no_file(
    pgqueue: Command, pgq: PgQueue, dead: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("the server went away")

    monkeypatch.setattr("pgqueue.operations.jobs_after", broken)

    pgqueue("jobs", "export", "--file", tmp_path / "dead.jsonl", code=1)

    assert list(tmp_path.iterdir()) == [file for file in tmp_path.iterdir() if file.name.startswith("queue.db")]
