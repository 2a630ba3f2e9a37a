"""No password is ever printed: by no command, in no error, traceback, log, help page or process list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pgserver
import pytest
import sqlalchemy as sa
from command import Command, running
from support import execute, wait_for

from pgqueue import ConfigurationError
from pgqueue.engine import make_engine, parse_url

SECRET = "s3cret"

UNREACHABLE = {
    "unreachable host": f"postgresql://ada:{SECRET}@127.0.0.1:1/shop",
    "unknown host": f"postgresql://ada:{SECRET}@no-such-host.invalid/shop",
    "hash in the password": f"postgresql://ada:#{SECRET}@127.0.0.1:1/shop",
    "in the query": f"postgresql://127.0.0.1:1/shop?user=ada&password={SECRET}",
}

IMPOSSIBLE = {
    "malformed port": f"postgresql://ada:{SECRET}@db:five/shop",
    "no scheme": f"ada:{SECRET}@db/shop",
    "one slash": f"postgresql:/ada:{SECRET}@db/shop",
    "at sign in the password": f"postgresql://ada:x@{SECRET}@db/shop",
    "at sign and slash in the password": f"postgresql://ada:x@y/{SECRET}@db/shop",
    "question mark in the password": f"postgresql://ada:x?{SECRET}@db@127.0.0.1:1/shop",
    "unknown option": f"postgresql://ada:{SECRET}@127.0.0.1:1/shop?no_such_option=1",
    "another database": f"mysql://ada:{SECRET}@db/shop",
    "connection string": f"host=db user=ada password={SECRET}",
}

URLS = UNREACHABLE | IMPOSSIBLE


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
@pytest.mark.parametrize(
    "arguments",
    [["stats"], ["enqueue", "work"], ["db", "upgrade"], ["db", "current"], ["-v", "jobs", "list"]],
    ids=" ".join,
)
def test_a_url_that_cannot_be_used_is_reported_without_its_password(url: str, arguments: list[str]) -> None:
    code = 5 if url in UNREACHABLE.values() else 2

    for result in (
        Command(url)(*arguments, code=code),
        Command()(*arguments, "--database-url", url, code=code),
    ):
        assert "error: " in result.stderr
        assert SECRET not in result.stdout + result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [URLS["unreachable host"]],
        ["jobs", URLS["at sign in the password"]],
        ["jobs", "show", URLS["unreachable host"]],
        ["jobs", "list", f"--database-uri={URLS['unreachable host']}"],
        ["stats", "--app", URLS["unreachable host"]],
        ["stats", "--schema", URLS["unreachable host"]],
        ["enqueue", URLS["unreachable host"]],
        ["enqueue", "work", "--queue", URLS["unreachable host"]],
        ["enqueue", "work", "--in", URLS["unreachable host"]],
        ["enqueue", "work", "--at", URLS["unreachable host"]],
        ["enqueue", "work", "@" + URLS["unreachable host"]],
        ["db", "upgrade", URLS["unreachable host"]],
        ["demo", URLS["unreachable host"]],
        ["worker", URLS["unreachable host"]],
    ],
    ids=lambda arguments: " ".join(arguments)[:30],
)
def test_a_url_in_the_wrong_place_is_not_repeated_with_its_password(sqlite_url: str, arguments: list[str]) -> None:
    result = Command(sqlite_url)(*arguments, code=2)

    assert result.stderr
    assert SECRET not in result.stdout + result.stderr


@pytest.mark.parametrize("command", [[], ["worker"], ["enqueue"], ["db", "upgrade"], ["demo"]], ids=" ".join)
def test_help_does_not_show_what_is_in_the_environment(command: list[str]) -> None:
    url = URLS["unreachable host"]

    result = Command(url, DATABASE_URL=url, PGQUEUE_APP=f"x:{SECRET}")(*command, "--help")

    assert SECRET not in result.stdout + result.stderr


@pytest.fixture
def guarded_url(pg_server: pgserver.Server, pg_url: str) -> Iterator[str]:
    """The URL of a user that has to give a password, with the right one."""
    rules = pg_server.data_folder / "pg_hba.conf"
    before = rules.read_text()
    engine = make_engine(pg_url)
    execute(engine, f"CREATE ROLE guarded LOGIN SUPERUSER PASSWORD 'right-{SECRET}'")
    rules.write_text(f"host all guarded 127.0.0.1/32 scram-sha-256\n{before}")
    execute(engine, "SELECT pg_reload_conf()")
    url = sa.make_url(pg_url).set(username="guarded", password=f"right-{SECRET}")
    wrong = make_engine(url.set(password="wrong"))
    wait_for(lambda: not can_connect(wrong), "the server to ask for passwords")
    yield url.render_as_string(hide_password=False)
    wrong.dispose()
    rules.write_text(before)
    execute(engine, "SELECT pg_reload_conf()")
    execute(engine, "DROP ROLE guarded")
    engine.dispose()


def can_connect(engine: sa.Engine) -> bool:
    try:
        with engine.connect():
            return True
    except sa.exc.OperationalError:
        return False


def test_a_wrong_password_exits_5_and_is_not_shown(guarded_url: str) -> None:
    assert Command(guarded_url)("stats").stderr == ""

    for arguments in (["stats"], ["db", "upgrade"], ["enqueue", "work"]):
        result = Command(guarded_url.replace("right", "wrong"))(*arguments, code=5)

        assert 'password authentication failed for user "guarded"' in result.stderr
        assert SECRET not in result.stdout + result.stderr


WORKER = """
import os
from pgqueue import PgQueue

pgq = PgQueue()

@pgq.task
def work() -> None:
    raise RuntimeError(f"the password of {os.environ['TOLD']} is wrong")
"""


def test_workers_keep_the_password_out_of_the_process_list_and_of_logs(guarded_url: str, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(WORKER)
    Command(guarded_url)("enqueue", "work", "--max-retries", "0")
    proc = Path("/proc")

    with running(
        *("worker", "shop:pgq", "--processes", "2", "--database-url", guarded_url, "--log-level", "debug"),
        cwd=tmp_path,
        TOLD=guarded_url,
    ) as supervisor:
        wait_for(lambda: supervisor.output().count("starts on") == 2, "two workers")
        wait_for(lambda: "RuntimeError" in supervisor.output(), "the failed attempt")
        children = [
            status.parent for status in proc.glob("[0-9]*/status") if f"PPid:\t{supervisor.pid}\n" in read(status)
        ]
        command_lines = [read(folder / "cmdline") for folder in children]

    assert len(command_lines) == 2
    assert all("worker" in line and SECRET not in line for line in command_lines)
    assert SECRET not in supervisor.output()


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended
        return ""


@pytest.mark.parametrize(
    ("url", "user", "password", "host"),
    [
        ("postgresql://u:p%40ss@h/d", "u", "p@ss", "h"),
        ("postgresql://u@corp:p@h/d", "u@corp", "p", "h"),
        ("postgresql://u:p/a?b@h/d", "u", "p/a?b", "h"),
        ("postgres://h/d?options=a@b", None, None, "h"),
    ],
)
def test_urls_with_signs_in_them_are_understood(url: str, user: str | None, password: str | None, host: str) -> None:
    parsed = parse_url(url)

    assert (parsed.username, parsed.password, parsed.host) == (user, password, host)


@pytest.mark.parametrize("url", ["postgresql://u:p@ss@h/d", "postgresql://u:p@s/s@h/d", "postgresql://u:p?x@y@h/d"])
def test_an_at_sign_left_in_a_password_is_refused_rather_than_taken_for_the_host(url: str) -> None:
    with pytest.raises(ConfigurationError, match="must be percent-encoded") as caught:
        parse_url(url)

    assert "h/d" not in str(caught.value)
