"""`pgqueue serve`: a real server, with its socket and signals."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer.main
from command import Command, running
from pgbouncer import Bouncer
from support import Process, execute, rows, wait_for
from working import table

from pgqueue import PgQueue, cli
from pgqueue.serving import is_loopback

TOKEN = "0123456789-a-secret"


@contextmanager
def serving(*arguments: str, cwd: Path, url: str, **environ: str) -> Iterator[tuple[Process, httpx.Client]]:
    """A server on a port of its own, and a client of it."""
    environ = {"PGQUEUE_HTTP_TOKENS": "", **environ}
    with running("serve", "--port", "0", *arguments, cwd=cwd, url=url, **environ) as process:
        found = wait_for(
            lambda: re.search(r"listening on (http://[^\s,]+)[\s,]", process.output()), "the server's address"
        )
        with httpx.Client(base_url=found[1], timeout=60, trust_env=False) as client:
            yield process, client


def test_a_job_goes_all_its_way_and_the_server_stops_on_sigterm(url: str, tmp_path: Path) -> None:
    with serving("--any-type", cwd=tmp_path, url=url) as (process, client):
        enqueued = client.post("/task", json={"type": "email", "payload": {"to": "ada"}})
        job = client.get("/dequeue", params={"worker": "worker-1"}).json()
        completed = client.post(f"/complete/{job['id']}", json={"token": job["token"], "result": {"sent": True}})
        # Where counting takes long, as on a busy machine, a count is good for a while.
        counts = {"pending": 0, "processing": 0, "completed": 1, "failed": 0}
        wait_for(lambda: client.get("/stats").json() == counts, "the job to be counted")
        process.signal(signal.SIGTERM)
        code = process.wait()

    assert (enqueued.status_code, completed.status_code) == (202, 200)
    assert code == 0, process.output()
    assert "without tokens: for this machine only" in process.output()
    assert "completed job 1 (email)" in process.output()


def test_the_server_works_behind_a_pooler(pg_url: str, bouncer: Bouncer, tmp_path: Path) -> None:
    with serving("--any-type", cwd=tmp_path, url=bouncer.url(pg_url)) as (process, client):
        for number in range(8):
            client.post("/task", json={"type": "email", "payload": {"number": number}}).raise_for_status()
        for _ in range(8):
            job = client.get("/dequeue", params={"worker": "worker-1"}).json()
            answer = client.post(f"/complete/{job['id']}", json={"token": job["token"], "result": None})
            answer.raise_for_status()
        process.signal(signal.SIGTERM)
        code = process.wait()

    pgq = PgQueue(pg_url)
    assert code == 0, process.output()
    assert rows(pgq.engine, "SELECT status, count(*) FROM pgqueue.jobs GROUP BY status") == [("completed", 8)]
    assert bouncer.left_behind(pg_url) == []
    pgq.dispose()


def test_a_request_under_way_is_finished_before_the_server_ends(pg_url: str, tmp_path: Path) -> None:
    pgq = PgQueue(pg_url)
    lock = pgq.engine.connect()
    with serving("--any-type", cwd=tmp_path, url=pg_url) as (process, client):
        lock.begin()
        lock.exec_driver_sql(f"LOCK TABLE {table(pgq, 'jobs')} IN EXCLUSIVE MODE")
        waiting = subprocess.Popen(
            [sys.executable, "-c", POST, f"{client.base_url}/task"], stdout=subprocess.PIPE, text=True
        )
        wait_for(lambda: execute(pgq.engine, WAITERS), "the request to wait for the lock")
        process.signal(signal.SIGTERM)
        wait_for(lambda: refuses(client), "the server to listen no more")
        lock.rollback()
        printed, _ = waiting.communicate(timeout=60)
        code = process.wait()

    assert (printed.strip(), code) == ("202", 0), process.output()
    lock.close()
    pgq.dispose()


#: A producer with nothing but the standard library.
POST = """
import sys, urllib.request as r
q = r.Request(sys.argv[1], b'{"type": "a", "payload": {}}', {"Content-Type": "application/json"})
print(r.urlopen(q, timeout=60).status)
"""

WAITERS = "SELECT 1 FROM pg_locks WHERE NOT granted"


def refuses(client: httpx.Client) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((client.base_url.host, client.base_url.port)) != 0


def test_tokens_come_from_a_file_and_nothing_prints_them(sqlite_url: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"shop:enqueue,read:{TOKEN}\n")

    with serving("--any-type", "--token-file", "tokens", cwd=tmp_path, url=sqlite_url) as (process, client):
        without = client.get("/stats")
        answer = client.get("/stats", headers={"Authorization": f"Bearer {TOKEN}"})
        process.signal(signal.SIGINT)
        code = process.wait()

    assert (without.status_code, answer.status_code, code) == (401, 200, 0)
    assert TOKEN not in process.output()
    assert "request" in process.output()
    assert " of shop" in process.output()


def test_a_server_in_the_network_answers_by_the_names_it_was_given(sqlite_url: str, tmp_path: Path) -> None:
    arguments = ("--any-type", "--host", "0.0.0.0", "--trusted-host", "queue.internal")
    headers = {"Authorization": f"Bearer {TOKEN}"}

    with serving(*arguments, cwd=tmp_path, url=sqlite_url, PGQUEUE_HTTP_TOKENS=f"a:read:{TOKEN}") as (_, client):
        statuses = [
            client.get("/stats", headers={**headers, "Host": host}).status_code
            for host in ("queue.internal", "localhost:1", "evil.example")
        ]

    assert statuses == [200, 200, 421]


# What cannot be --------------------------------------------------------------------------------------------


@pytest.fixture
def pgqueue(sqlite_url: str) -> Command:
    return Command(sqlite_url, PGQUEUE_HTTP_TOKENS="", PORT="")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "queue.internal"])
def test_a_server_in_the_network_needs_tokens(pgqueue: Command, host: str) -> None:
    stderr = pgqueue("serve", "--any-type", "--host", host, code=2).stderr

    assert "--token-file" in stderr
    assert "--host 127.0.0.1" in stderr


def test_without_an_app_any_type_must_be_wanted(pgqueue: Command) -> None:
    assert "--any-type" in pgqueue("serve", code=2).stderr


def test_a_port_that_is_taken_is_named(pgqueue: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        stderr = pgqueue("serve", "--any-type", "--port", port, code=2).stderr

    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in stderr


def test_a_token_file_that_is_missing_is_named(pgqueue: Command) -> None:
    assert "cannot read the tokens in 'nowhere'" in pgqueue("serve", "--token-file", "nowhere", code=2).stderr


def test_the_port_is_3000_unless_the_environment_or_an_option_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORT", raising=False)

    default = port_of("--any-type")
    monkeypatch.setenv("PORT", "4000")

    assert (default, port_of("--any-type"), port_of("--port", "5000")) == (3000, 4000, 5000)


def port_of(*arguments: str) -> Any:
    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    return command.make_context("serve", list(arguments)).params["port"]


def test_a_port_of_the_environment_is_checked(sqlite_url: str) -> None:
    assert "PORT" in Command(sqlite_url, PORT="many")("serve", "--any-type", code=2).stderr


def test_a_missing_library_is_named_with_the_way_to_get_it(pgqueue: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pgqueue.http", None)

    assert "pip install 'pgqueue[http]'" in pgqueue("serve", "--any-type", code=2).stderr


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "")),
    ],
)
def test_what_only_this_machine_can_reach_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
