"""The page about testing: its files are an application with tests, which pass; also in parallel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import PROJECT, blocks, table_below

from pgqueue import testing

PAGE = PROJECT / "docs" / "testing.md"


def run_pytest(folder: Path, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PGQUEUE_DATABASE_URL": url, "PYTHONDONTWRITEBYTECODE": "1"}
    del environ["PYTEST_CURRENT_TEST"]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:schemathesis",
            "-p",
            "no:cacheprovider",
            "-W",
            "error",
            *options,
        ],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_tests_on_the_page_pass(url: str, tmp_path: Path) -> None:
    write_page(tmp_path)

    done = run_pytest(tmp_path, url)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout


def test_the_tests_on_the_page_pass_side_by_side(pg_url: str, tmp_path: Path) -> None:
    write_page(tmp_path)
    # Two processes that make the same tables at once get into each other's way.
    program = "from app import Base, pgq; Base.metadata.create_all(pgq.engine)"
    environ = {**os.environ, "PGQUEUE_DATABASE_URL": pg_url}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environ, check=True, timeout=60)

    done = run_pytest(tmp_path, pg_url, "-n", "2")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout


def write_page(folder: Path) -> None:
    for block in blocks(PAGE):
        assert block.file_name is not None, f"line {block.line}: a block without the name of a file"
        (folder / block.file_name).write_text(block.text)


def test_the_page_names_every_call_of_a_tester_and_every_point_of_a_crash() -> None:
    calls = [row[0].strip("`").partition("(")[0] for row in table_below(PAGE, "What they do")]
    points = [row[0].strip("`") for row in table_below(PAGE, "Crashes")]

    assert sorted(calls) == sorted(name for name in vars(testing.Tester) if not name.startswith("_"))
    assert tuple(points) == testing.CRASH_POINTS


@pytest.mark.parametrize(
    ("conftest", "problems"),
    [
        ("", ["does not know which queue is tested", "def pgqueue_queue():"]),
        (
            "import pgqueue, pytest\n@pytest.fixture\ndef pgqueue_queue(): return pgqueue.PgQueue('sqlite://')\n",
            ["does not know the session (or connection) of the test", "def pgqueue_session(session):"],
        ),
        (
            "import pytest\n@pytest.fixture\ndef pgqueue_queue(): return 3\n"
            "@pytest.fixture\ndef pgqueue_session(): return None\n",
            ["`pgqueue_queue` must return a PgQueue, got int"],
        ),
    ],
)
def test_a_missing_fixture_says_what_to_write(tmp_path: Path, conftest: str, problems: list[str]) -> None:
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_it.py").write_text("def test_it(pgqueue_tester): pass\n")

    done = run_pytest(tmp_path, "sqlite://")

    assert done.returncode == 1
    for problem in problems:
        assert problem in done.stdout
