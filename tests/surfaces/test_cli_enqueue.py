"""`pgqueue enqueue`: payloads, options, conflicts, many at once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command import Command, write_application

from pgqueue import PgQueue

CODE = """
from pgqueue import PgQueue

pgq = PgQueue()

@pgq.task(queue="images", priority=3)
def resize(file: str, size: int = 1024) -> None: ...
"""


@pytest.fixture
def pgqueue(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, in a folder with an application."""
    write_application(tmp_path, "shop_jobs", CODE, monkeypatch)
    return Command(url)


APP = ("--app", "shop_jobs:pgq")


def test_the_id_is_printed_and_nothing_else(pgqueue: Command, pgq: PgQueue) -> None:
    result = pgqueue("enqueue", "mail", '{"to": "ada"}')

    job = pgq.get_job(int(result.stdout))
    assert result.stdout == f"{job.id}\n"
    assert result.stderr == ""
    assert (job.task, job.queue, job.payload, job.status) == ("mail", "default", {"to": "ada"}, "pending")
    assert pgqueue.json("enqueue", "mail") == {"id": job.id + 1, "inserted": True}


def test_the_settings_of_the_apps_task_count(pgqueue: Command, pgq: PgQueue) -> None:
    result = pgqueue("enqueue", "resize", '{"file": "a.jpg"}', *APP)

    job = pgq.get_job(int(result.stdout))
    assert (job.queue, job.priority, job.payload) == ("images", 3, {"file": "a.jpg"})


def test_options_change_them(pgqueue: Command, pgq: PgQueue) -> None:
    options = ["--queue", "slow", "--priority", "-2", "--max-retries", "7", "--unique-key", "k"]

    result = pgqueue("enqueue", "resize", '{"file": "a.jpg"}', *APP, *options)

    job = pgq.get_job(int(result.stdout))
    assert (job.queue, job.priority, job.max_retries, job.unique_key) == ("slow", -2, 7, "k")


def test_a_job_can_be_put_off(pgqueue: Command, pgq: PgQueue) -> None:
    later = pgq.get_job(int(pgqueue("enqueue", "mail", "--in", "1h30m").stdout))
    fixed = pgq.get_job(int(pgqueue("enqueue", "mail", "--at", "2040-01-01T02:00:00+02:00").stdout))

    assert later.run_at - later.created_at == pytest.approx(timedelta(minutes=90), abs=timedelta(seconds=1))
    assert fixed.run_at == datetime(2040, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at", "2040-01-01T00:00:00"], "expected ISO 8601 with a time zone"),
        (["--at", "2040-01-01T00:00:00Z", "--in", "5m"], "give either delay or at"),
        (["--queue", "a;b"], "queue name must be"),
        (["--queue", 'a"b'], "queue name must be"),
        (["--priority", "40000"], "priority must be"),
        (["--max-retries", "-1"], "max_retries must be"),
        (["--unique-key", ""], "unique_key must be"),
        (["--in", "100000d"], "a duration is at most"),
    ],
)
def test_options_that_cannot_work_are_refused(
    pgqueue: Command, pgq: PgQueue, arguments: list[str], message: str
) -> None:
    result = pgqueue("enqueue", "mail", *arguments, code=2)

    assert message in result.stderr
    assert pgq.list_jobs() == []


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("{", "the payload is not JSON: Expecting property name enclosed in double quotes, line 1 column 2"),
        ("", "the payload is not JSON"),
        ("[1]", "the payload must be a JSON object, got list"),
        ("1", "the payload must be a JSON object, got int"),
        ('{"n": NaN}', "contains NaN"),
        ('{"n": "\\u0000"}', "NUL character"),
        ('{"n": "\\ud800"}', "surrogate"),
        ('{"n": ' + "1" * 5000 + "}", "digits"),
        ("[" * 100_000, "the payload is not JSON"),
        ('{"n": "' + "x" * 1024 * 1024 + '"}', "more than the 1,048,576 allowed"),
        ("@no-such-file.json", "cannot read 'no-such-file.json': No such file or directory"),
        ("@.", "cannot read '.': Is a directory"),
    ],
    ids=lambda value: value[:20],
)
def test_a_payload_that_cannot_be_stored_is_refused(pgqueue: Command, pgq: PgQueue, payload: str, message: str) -> None:
    result = pgqueue("enqueue", "mail", payload, code=2)

    assert message in result.stderr
    assert pgq.list_jobs() == []


def test_a_payload_that_does_not_fit_the_task_is_refused_without_being_shown(pgqueue: Command, pgq: PgQueue) -> None:
    result = pgqueue("enqueue", "resize", '{"file": "a.jpg", "size": "hunter2"}', *APP, code=2)

    assert "payload of task 'resize' does not fit: size:" in result.stderr
    assert "hunter2" not in result.stderr
    assert pgq.list_jobs() == []


def test_an_unknown_task_of_an_app_exits_3_and_names_those_there_are(pgqueue: Command, pgq: PgQueue) -> None:
    result = pgqueue("enqueue", "rezise", *APP, code=3)

    assert "no task named 'rezise' is registered; registered tasks: resize" in result.stderr
    assert pgq.list_jobs() == []


def test_a_payload_comes_from_a_file_or_from_standard_input(pgqueue: Command, pgq: PgQueue, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{\n  "name": "\xc3\x84da"\n}\n')

    from_file = int(pgqueue("enqueue", "mail", "@a.json").stdout)
    from_input = int(pgqueue("enqueue", "mail", "-", input='{"name": "Äda"}\n').stdout)
    not_text = pgqueue("enqueue", "mail", "-", input=b'{"name": "\xff"}', code=2)

    assert pgq.get_job(from_file).payload == pgq.get_job(from_input).payload == {"name": "Äda"}
    assert "it is not UTF-8" in not_text.stderr


def test_a_unique_key_that_is_taken_is_skipped_refused_or_replaced(pgqueue: Command, pgq: PgQueue) -> None:
    first = int(pgqueue("enqueue", "mail", '{"n": 1}', "--unique-key", "k").stdout)

    skipped = pgqueue("enqueue", "mail", '{"n": 2}', "--unique-key", "k")
    refused = pgqueue("enqueue", "mail", '{"n": 3}', "--unique-key", "k", "--on-conflict", "raise", code=4)
    before = pgq.get_job(first).payload
    replaced = pgqueue("enqueue", "mail", '{"n": 4}', "--unique-key", "k", "--on-conflict", "replace", "-o", "json")

    assert skipped.stdout == f"{first}\n"
    assert "nothing was enqueued" in skipped.stderr
    assert refused.stdout == ""
    assert f"the pending job {first} with the unique key 'k'" in refused.stderr
    assert before == {"n": 1}
    assert f'"id": {first},\n  "inserted": false' in replaced.stdout
    assert pgq.get_job(first).payload == {"n": 4}


def test_keys_of_limits_can_be_given(pgqueue: Command, pgq: PgQueue) -> None:
    keys = ["--ordering-key", "o", "--concurrency-key", "c", "--rate-key", "r"]

    job = pgq.get_job(int(pgqueue("enqueue", "mail", *keys).stdout))

    assert (job.ordering_key, job.concurrency_key, job.rate_key) == ("o", "c", "r")


FULL = """
from pgqueue import PgQueue

pgq = PgQueue()
pgq.queue("mails", max_depth=2, on_full="drop")

@pgq.task(queue="mails")
def mail(n: int = 0) -> None: ...
"""


def test_what_a_full_queue_dropped_is_said(
    pgqueue: Command, pgq: PgQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_application(tmp_path, "mail_jobs", FULL, monkeypatch)
    for _ in range(2):
        pgqueue("enqueue", "mail", "--app", "mail_jobs:pgq")

    dropped = pgqueue("enqueue", "mail", "--app", "mail_jobs:pgq")
    lines = pgqueue("enqueue", "mail", "-", "--lines", "--app", "mail_jobs:pgq", input="{}\n{}\n{}\n")

    assert dropped.stdout == "0\n"
    assert "nothing was enqueued: queue 'mails' is full, and drops jobs then" in dropped.stderr
    assert lines.stdout == "0\n"
    assert "3 were not enqueued: queue 'mails' is full" in lines.stderr
    assert len(pgq.list_jobs()) == 2


def test_many_payloads_are_enqueued_line_by_line(pgqueue: Command, pgq: PgQueue) -> None:
    lines = "".join(f'{{"n": {n}}}\n' for n in range(2500)) + "\n"

    result = pgqueue("enqueue", "mail", "-", "--lines", input=lines)

    assert result.stdout == "2500\n"
    assert pgqueue.json("stats")["queues"][0]["ready"] == 2500
    assert pgq.list_jobs(limit=1)[0].payload == {"n": 2499}


def test_one_bad_line_keeps_all_of_them_out(pgqueue: Command, pgq: PgQueue) -> None:
    lines = "".join(f'{{"n": {n}}}\n' for n in range(1500)) + "{\n"

    result = pgqueue("enqueue", "mail", "-", "--lines", input=lines, code=2)

    assert "line 1501 is not JSON" in result.stderr
    assert pgq.list_jobs() == []


@pytest.mark.parametrize("name", ["", "a b", "a;b", "-", "x" * 129])
def test_a_task_name_that_cannot_be_is_refused(pgqueue: Command, pgq: PgQueue, name: str) -> None:
    assert "task name must be" in pgqueue("enqueue", name, code=2).stderr
    assert pgq.list_jobs() == []
