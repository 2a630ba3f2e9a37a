"""`pgqueue config` shows every setting and its source, and the other commands follow the settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Command, running, write_application
from support import rows, wait_for

from pgqueue import PgQueue
from pgqueue.settings import SETTINGS

APPLICATION = """
from pgqueue import PgQueue

pgq = PgQueue()


@pgq.task(queue="sums")
def add(a: int, b: int) -> int:
    return a + b
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, and the root of a repository."""
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_setting_is_shown_with_its_value_and_where_it_comes_from(folder: Path) -> None:
    file = folder / "pgqueue.toml"
    file.write_text('app = "shop.jobs:pgq"\nqueues = { images = 4 }\nlease = "20s"\n')

    shown = Command("sqlite:///a.db", PGQUEUE_PROCESSES="2").json("config", "--schema", "shop")

    assert [row["setting"] for row in shown] == [setting.key for setting in SETTINGS]
    assert {row["setting"]: (row["value"], row["source"]) for row in shown if row["source"] != "default"} == {
        "database_url": ("sqlite:///a.db", "PGQUEUE_DATABASE_URL"),
        "schema": ("shop", "--schema"),
        "app": ("shop.jobs:pgq", str(file)),
        "queues": ({"images": 4}, str(file)),
        "processes": (2, "PGQUEUE_PROCESSES"),
        "lease": (20.0, str(file)),
    }


def test_an_app_of_the_command_line_is_shown_as_such(folder: Path) -> None:
    shown = Command(PGQUEUE_APP="a:b").json("config", "--app", "c:d")

    assert [(row["value"], row["source"]) for row in shown if row["setting"] == "app"] == [("c:d", "--app")]


def test_a_table_is_for_people(folder: Path) -> None:
    (folder / "pgqueue.toml").write_text('queues = ["images=4", "mails"]\nlease = 0.5\n')

    lines = [line.split() for line in Command()("config").stdout.splitlines()]

    assert ["queues", "images=4,", "mails", str(folder / "pgqueue.toml")] in lines
    assert ["lease", "0.5", "s", str(folder / "pgqueue.toml")] in lines
    assert ["prefetch", "-", "default"] in lines


@pytest.mark.parametrize("format", ["table", "json", "jsonl"])
@pytest.mark.parametrize(
    "url", ["postgresql://ada:hunter2@localhost/shop", "postgresql://localhost/shop?password=hunter2", "hunter2"]
)
def test_no_password_is_shown(folder: Path, format: str, url: str) -> None:
    (folder / "pgqueue.toml").write_text(f"database_url = {url!r}\n")

    result = Command()("config", "-o", format)

    assert "hunter2" not in result.stdout + result.stderr
    assert "database_url" in result.stdout


def test_a_mistake_in_the_file_ends_every_command_with_exit_code_2(folder: Path) -> None:
    (folder / "pgqueue.toml").write_text("leese = 5\n")

    for arguments in (["config"], ["stats"], ["enqueue", "x"]):
        result = Command()(*arguments, code=2)

        assert f"{folder / 'pgqueue.toml'}: there is no setting 'leese'; did you mean 'lease'?" in result.stderr


def test_a_misspelled_variable_is_pointed_out(folder: Path) -> None:
    result = Command(PGQUEUE_LEESE="5")("config")

    assert "note: the variable PGQUEUE_LEESE sets nothing; did you mean PGQUEUE_LEASE?" in result.stderr


def test_commands_follow_the_file(folder: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_application(folder, "file_app", APPLICATION, monkeypatch)
    (folder / "pgqueue.toml").write_text(f'app = "file_app:pgq"\ndatabase_url = "{sqlite_url}"\ndrain = true\n')
    pgqueue = Command()

    job_id = int(pgqueue("enqueue", "add", '{"a": 1, "b": 2}').stdout)
    pgqueue("worker", "--no-listen")

    assert pgqueue.json("jobs", "show", job_id)["result"] == 3


def test_processes_of_the_environment_are_started_once_and_not_by_each_other(folder: Path, sqlite_url: str) -> None:
    (folder / "file_app.py").write_text(APPLICATION)
    (folder / "pgqueue.toml").write_text("[queues]\nsums = 3\n")
    pgq = PgQueue(sqlite_url)

    with running(
        "worker", "file_app:pgq", cwd=folder, url=sqlite_url, PGQUEUE_PROCESSES="2", PGQUEUE_NAME="ann"
    ) as worker:
        sql = "SELECT id, queues FROM pgqueue_workers"
        wait_for(lambda: len(rows(pgq.engine, sql)) == 2, "two workers")
        found = rows(pgq.engine, sql)
        output = worker.output()
    pgq.dispose()

    assert all(row.id.startswith("ann:") for row in found)
    assert [json.loads(row.queues) for row in found] == [{"sums": 3}] * 2
    assert output.count("worker process") == 2


def test_a_worker_refuses_a_value_that_cannot_work_with_its_place(
    folder: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_application(folder, "file_app", APPLICATION, monkeypatch)
    (folder / "pgqueue.toml").write_text('lease = "100ms"\n')

    result = Command(sqlite_url)("worker", "file_app:pgq", code=2)

    assert "lease must be at least 0.5 seconds" in result.stderr
    assert f"lease comes from {folder / 'pgqueue.toml'}" in result.stderr
