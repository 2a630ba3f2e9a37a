"""What is printed where: formats, times, colours, and nothing that a terminal would obey."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from command import Command, finished
from support import execute

from pgqueue import PgQueue
from pgqueue.output import Format, Output, printable, redact, timestamp, to_json

JOB_KEYS = [
    "id",
    "queue",
    "task",
    "payload",
    "priority",
    "status",
    "run_at",
    "claimed_by",
    "claim_expires_at",
    "attempt",
    "retries",
    "max_retries",
    "expires_at",
    "unique_key",
    "ordering_key",
    "concurrency_key",
    "metadata",
    "result",
    "error",
    "progress",
    "created_at",
    "claimed_at",
    "finished_at",
    "rate_key",
    "waits_for",
    "slot",
    "leads_order",
    "cancel_requested_at",
    "prune_at",
]
EVENT_KEYS = ["id", "at", "job_id", "queue", "task", "event", "actor", "attempt"]
EVENT_KEYS += ["from_status", "to_status", "reason", "error", "worker", "claimed_at"]
QUEUE_KEYS = ["queue", "ready", "scheduled", "retrying", "running", "completed", "dead", "cancelled"]
QUEUE_KEYS += ["oldest_ready_seconds", "paused", "paused_until", "estimated"]
WORKER_KEYS = ["id", "host", "pid", "version", "queues", "tasks", "started_at", "heartbeat_at", "silent_seconds"]


def test_json_has_stable_keys_and_times_in_utc(url: str, pgq: PgQueue) -> None:
    pgqueue = Command(url)
    before = datetime.now(UTC)
    job_id = int(pgqueue("enqueue", "work", '{"n": 1}').stdout)
    pgqueue("jobs", "cancel", job_id)

    shown = pgqueue.json("jobs", "show", job_id)
    listed = pgqueue.json("jobs", "list")
    queues = pgqueue.json("queues", "list")

    assert list(shown) == [*JOB_KEYS, "events"]
    assert [list(event) for event in shown["events"]] == [EVENT_KEYS]
    assert [list(job) for job in listed] == [JOB_KEYS]
    assert [list(queue) for queue in queues] == [QUEUE_KEYS]
    assert shown["created_at"].endswith("Z")
    assert abs((datetime.fromisoformat(shown["created_at"]) - before).total_seconds()) < 60


def test_stats_are_queues_and_workers(url: str, pgq: PgQueue) -> None:
    pgqueue = Command(url)
    pgqueue("enqueue", "work")
    execute(
        pgq.engine,
        f"INSERT INTO {pgq.tables.workers.fullname} (id, host, pid, version, queues, tasks)"
        " VALUES ('w', 'h', 1, '0', '{\"default\": 1}', '[\"work\"]')",
    )

    stats = pgqueue.json("stats")
    table = pgqueue("stats").stdout

    assert list(stats) == ["queues", "workers"]
    assert [list(queue) for queue in stats["queues"]] == [QUEUE_KEYS]
    assert [list(worker) for worker in stats["workers"]] == [WORKER_KEYS]
    assert stats["queues"][0]["ready"] == 1
    assert [line.split()[0] for line in table.splitlines() if line] == [
        *("queues", "queue", "default"),
        *("workers", "id", "w"),
    ]


def test_jsonl_is_one_document_a_line(url: str) -> None:
    pgqueue = Command(url)
    for _ in range(3):
        pgqueue("enqueue", "work")

    lines = pgqueue("jobs", "list", "-o", "jsonl").stdout.splitlines()

    assert [json.loads(line)["task"] for line in lines] == ["work"] * 3


def test_global_options_count_before_and_after_the_command_and_the_later_one_wins(url: str) -> None:
    pgqueue = Command(url)
    pgqueue("enqueue", "work")

    before = pgqueue("-o", "json", "jobs", "list").stdout
    after = pgqueue("-o", "jsonl", "jobs", "list", "-o", "json").stdout

    assert before == after
    assert len(json.loads(before)) == 1


def test_a_table_in_a_pipe_is_not_cut_to_the_width_of_a_terminal(url: str) -> None:
    pgqueue = Command(url)
    name = "a" * 120
    pgqueue("enqueue", name, "--queue", "q" * 100)

    lines = pgqueue("jobs", "list").stdout.splitlines()

    assert len(lines) == 2
    assert name in lines[1]
    assert "\x1b" not in lines[1]


def test_what_is_stored_cannot_steer_the_terminal(url: str) -> None:
    pgqueue = Command(url)
    evil = "\x1b[2J\x9b31m\u202e[red]\r"
    job_id = int(pgqueue("enqueue", "work", json.dumps({"evil": evil})).stdout)

    for arguments in (
        ["jobs", "show", job_id],
        ["jobs", "show", job_id, "-o", "json"],
        ["jobs", "list", "-o", "jsonl"],
    ):
        printed = pgqueue(*arguments).stdout
        assert all(character.isprintable() or character == "\n" for character in printed)
        assert "[red]" in printed
    assert pgqueue.json("jobs", "show", job_id)["payload"] == {"evil": evil}


def test_a_row_that_cannot_be_decoded_is_still_listed_and_shown(url: str, pgq: PgQueue) -> None:
    huge = "1" * 5000
    execute(
        pgq.engine,
        f"INSERT INTO {pgq.tables.jobs.fullname} (task, payload) VALUES ('work', '{{\"n\": {huge}}}')",
    )
    pgqueue = Command(url)

    listed = pgqueue("jobs", "list").stdout
    shown = pgqueue("jobs", "show", 1, "-o", "json").stdout

    assert "work" in listed
    assert huge in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)}, '{"a": "2030-01-02T03:04:05.000000Z"}'),
        ({"ä": "€ 😀"}, '{"ä": "€ 😀"}'),
        ("\x7f\x9b\u202e\U000e0001", '"\\u007f\\u009b\\u202e\\udb40\\udc01"'),
    ],
)
def test_json_keeps_what_can_be_read_and_escapes_the_rest(value: object, text: str) -> None:
    assert to_json(value) == text


def test_times_are_given_in_utc_whatever_their_zone() -> None:
    assert timestamp(datetime.fromisoformat("2030-01-01T01:00:00+02:00")) == "2029-12-31T23:00:00.000000Z"


def test_json_that_cannot_be_encoded_is_escaped(tmp_path: Path, sqlite_url: str) -> None:
    Command(sqlite_url)("enqueue", "work", '{"name": "Ärger"}')

    document = finished("jobs", "show", 1, "-o", "json", cwd=tmp_path, url=sqlite_url, PYTHONIOENCODING="ascii")

    assert document.stdout.isascii()
    assert json.loads(document.stdout)["payload"] == {"name": "Ärger"}


def test_a_table_that_cannot_be_encoded_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))

    Output().rows([{"name": "Ärger"}], ("name",))

    assert written.getvalue() == b"name\n\\xc4rger\n"


@pytest.mark.parametrize(
    ("color", "variables", "colored"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False)],
)
def test_progress_on_a_terminal_has_colours_only_if_wanted(
    color: bool, variables: dict[str, str], colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with terminal(monkeypatch) as written, Output(color=color).progress("jobs deleted") as advance:
        advance(3)

    assert "jobs deleted" in written()
    assert "3/?" in written()
    assert (re.search(r"\x1b\[(3|1;3)[0-9]", written()) is not None) is colored


def test_progress_is_not_drawn_when_quiet_or_not_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Output().progress("jobs deleted") as advance:
        advance(3)
    with terminal(monkeypatch) as written, Output(quiet=True).progress("jobs deleted") as advance:
        advance(3)

    assert written() == ""
    assert capsys.readouterr().err == ""


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Make stderr a terminal. Gives a function for what was written to it, to be called afterwards too."""
    ours, theirs = pty.openpty()
    parts: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the other side was closed
            while part := os.read(ours, 4096):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch:
        stderr = os.fdopen(theirs, "w")
        patch.setattr(sys, "stderr", stderr)

        def written() -> str:
            if not stderr.closed:
                stderr.close()
                reader.join()
                os.close(ours)
            return b"".join(parts).decode()

        yield written
    written()


def test_quiet_announces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert Command()("enqueue", "work", "-q").stderr == ""
    assert "pgqueue.db" in Command()("enqueue", "work").stderr


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://ada:s3cret@db/shop",
        "postgresql://ada:s3c@ret@db/shop",
        "x postgresql+psycopg://ada:s3cret@[::1]:5432/shop?password=s3cret y",
        "host=db password=s3cret user=ada",
        "postgresql://db/shop?sslpassword=s3cret&x=1",
        "https://s3cret@host/",
    ],
)
def test_credentials_are_taken_out_of_messages(text: str) -> None:
    cleaned = redact(text)

    assert "s3c" not in cleaned
    assert "ret" not in cleaned
    assert "***" in cleaned


def test_the_user_of_a_database_is_kept_in_messages() -> None:
    assert (
        redact("cannot use postgresql+psycopg://ada:x@db/shop!") == "cannot use postgresql+psycopg://ada:***@db/shop!"
    )
    assert redact("cannot use postgresql://ada@db/shop") == "cannot use postgresql://ada@db/shop"
    assert redact("https://token@host/x and ada@host") == "https://***@host/x and ada@host"


def test_lines_and_tabs_survive_where_control_codes_do_not() -> None:
    assert printable("a\tb\nc\x1b[0m\r\x00") == "a\tb\nc\\x1b[0m\\r\\x00"


def test_an_empty_list_is_an_empty_document_or_a_table_with_a_heading(capsys: pytest.CaptureFixture[str]) -> None:
    Output(Format.JSON).rows([], ("id",))
    Output(Format.JSONL).rows([], ("id",))
    Output(Format.TABLE).rows([], ("id", "task"))

    assert capsys.readouterr().out == "[]\nid  task\n"
