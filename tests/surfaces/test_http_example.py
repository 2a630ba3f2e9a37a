"""The example of producers and workers over HTTP: its own worker, three times, and the curl lines of its README."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import running
from documents import PROJECT, blocks
from support import PATIENCE_SECONDS, Process, wait_for

from pgqueue import JobStatus, PgQueue

EXAMPLE = PROJECT / "examples" / "http"

PAGE = PROJECT / "docs" / "http.md"

SERVE = "pgqueue serve --any-type"

#: What a test cannot run, and why.
NOT_RUN = {
    "docker compose up --build": "Docker need not be there",
    "docker compose kill worker-1": "likewise",
    "TASK_TYPES=email python worker.py": "test_a_worker_takes_only_the_types_it_names",
}

#: curl as far as the lines need it, for machines without.
CURL = """#!{python}
import argparse, sys, urllib.error, urllib.request
parser = argparse.ArgumentParser()
parser.add_argument("-X", default="GET")
parser.add_argument("-H", action="append", default=[])
parser.add_argument("-d")
parser.add_argument("url")
given = parser.parse_args()
headers = dict(header.split(": ", 1) for header in given.H)
data = given.d.encode() if given.d is not None else None
try:
    answer = urllib.request.urlopen(urllib.request.Request(given.url, data, headers, method=given.X))
except urllib.error.HTTPError as error:
    sys.exit(f"{{error.code}} {{error.read().decode()}}")
print(answer.read().decode())
"""


@pytest.fixture
def curl(tmp_path: Path) -> Path:
    """A folder with a `curl`."""
    program = tmp_path / "bin" / "curl"
    program.parent.mkdir()
    program.write_text(CURL.format(python=sys.executable))
    program.chmod(0o755)
    return program.parent


class System:
    """A server, and workers that call it."""

    def __init__(self, pgq: PgQueue, url: str, folder: Path, processes: ExitStack) -> None:
        self.pgq = pgq
        self._folder = folder
        self._processes = processes
        self._database = url
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://localhost:{self.port}"

    def serve(self) -> Process:
        arguments = shlex.split(SERVE)[1:]
        environ = {"PORT": str(self.port), "PGQUEUE_HTTP_TOKENS": ""}
        server = self._processes.enter_context(running(*arguments, cwd=self._folder, url=self._database, **environ))
        wait_for(lambda: "listening on" in server.output(), "the server to listen")
        return server

    def work(self, name: str, **environ: str) -> Process:
        settings = {"WORK_SECONDS": "0.1", "FAIL_RATE": "0", "LEASE_SECONDS": "2", **environ}
        process = Process(
            [sys.executable, str(EXAMPLE / "worker.py")],
            cwd=self._folder,
            WORKER_ID=name,
            QUEUE_URL=self.url,
            **settings,
        )
        self._processes.callback(process.close)
        wait_for(lambda: "started" in process.output(), f"{name} to start")
        return process

    def shell(self, line: str, curl: Path) -> str:
        done = subprocess.run(
            ["bash", "-euc", line.replace("http://localhost:3000", self.url)],
            env={**os.environ, "PATH": f"{curl}:{os.environ.get('PATH', os.defpath)}"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def wait_until_done(self) -> None:
        def are_done() -> bool:
            return all(summary.ready == 0 and summary.running == 0 for summary in self.pgq.queues())

        wait_for(are_done, "all due jobs to end", every=0.05)

    def jobs(self) -> dict[int, Any]:
        return {job.id: job for job in self.pgq.list_jobs(limit=1000)}


@pytest.fixture
def system(pgq: PgQueue, url: str, tmp_path: Path) -> Iterator[System]:
    with ExitStack() as processes:
        yield System(pgq, url, tmp_path, processes)


def test_the_lines_of_the_readme_work_with_three_workers(system: System, curl: Path) -> None:
    commands = [command for block in blocks(EXAMPLE / "README.md") for command in block.commands]
    assert {SERVE, *NOT_RUN} <= set(commands)
    system.serve()

    workers = []
    for command in commands:
        if command in NOT_RUN or command == SERVE:
            continue
        if command.endswith("python worker.py"):
            workers.append(system.work(command.split()[0].removeprefix("WORKER_ID=")))
            continue
        if "/retry" in command:
            system.wait_until_done()
        system.shell(command, curl)
    system.wait_until_done()

    jobs = system.jobs()
    assert len(workers) == 3
    assert len(jobs) == 15
    assert (jobs[1].result, jobs[2].result) == (
        {"sent": True, "to": "user@example.com"},
        {"processed": True, "url": "https://example.com/image.jpg"},
    )
    assert jobs[3].result == {"generated": True, "format": "pdf"}
    assert {jobs[number].status for number in range(1, 14)} == {JobStatus.COMPLETED}
    assert (jobs[13].priority, jobs[14].status) == (10, JobStatus.PENDING)
    assert (jobs[15].status, jobs[15].attempt, jobs[15].error["message"]) == (JobStatus.DEAD, 2, "KeyError: 'url'")
    for worker in workers:
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert "stopped" in worker.output()


def test_the_lines_of_the_page_about_http_work(system: System, curl: Path) -> None:
    commands = [command for block in blocks(PAGE) if block.language == "sh" for command in block.commands]
    system.serve()

    printed = [system.shell(command, curl) for command in commands if command.startswith("curl")]

    assert set(commands) - {command for command in commands if command.startswith("curl")} == {
        "pip install '.[binary,http]'",
        SERVE,
    }
    assert [json.loads(text) for text in printed[:2]] == [
        {"taskId": "1", "message": "Task enqueued", "stats": {**NOTHING, "pending": 1}},
        {**NOTHING, "pending": 1},
    ]
    assert json.loads(printed[2])["token"]
    assert json.loads(printed[3])["status"] == "processing"
    assert json.loads(printed[4])["taskId"] == json.loads(printed[5])["taskId"] == "2"


NOTHING = {"pending": 0, "processing": 0, "completed": 0, "failed": 0}


def test_when_a_worker_is_killed_half_way_the_others_do_everything(system: System) -> None:
    system.serve()
    report = system.pgq.external_task("report")
    with system.pgq.begin() as connection:
        report.enqueue_many(connection, [{"id": n} for n in range(30)])

    # The one that is killed has a job that it would not end for long.
    doomed = system.work("worker-1", WORK_SECONDS="600")
    (held,) = wait_for(lambda: re.findall(r"job (\d+) \(report\)", doomed.output()), "worker-1 to have a job")
    others = [system.work(name) for name in ("worker-2", "worker-3")]
    wait_for(lambda: others[0].output().count("is completed") >= 3, "worker-2 to be at work")
    doomed.signal(signal.SIGKILL)
    doomed.wait()
    system.wait_until_done()

    jobs = system.jobs()
    assert {job.status for job in jobs.values()} == {JobStatus.COMPLETED}
    assert {job.claimed_by for job in jobs.values()} == {"worker-2", "worker-3"}
    assert (jobs[int(held)].attempt, jobs[int(held)].retries) == (2, 1)
    assert {job.attempt for number, job in jobs.items() if number != int(held)} == {1}


def test_what_fails_by_chance_is_retried(system: System) -> None:
    system.serve()
    with system.pgq.begin() as connection:
        system.pgq.external_task("report").enqueue(connection)

    worker = system.work("worker-1", FAIL_RATE="1")
    wait_for(lambda: "job 1 is pending" in worker.output(), "the job to fail")

    job = system.jobs()[1]
    assert (job.retries, job.error["message"]) == (1, "RuntimeError: no luck")


def test_workers_outlast_their_server(system: System) -> None:
    server = system.serve()
    worker = system.work("worker-1")
    server.signal(signal.SIGKILL)
    server.wait()
    wait_for(lambda: "cannot be reached" in worker.output(), "the worker to miss its server")

    system.serve()
    with system.pgq.begin() as connection:
        system.pgq.external_task("report").enqueue(connection)

    system.wait_until_done()
    assert system.jobs()[1].status == JobStatus.COMPLETED


def test_a_worker_takes_only_the_types_it_names(system: System) -> None:
    system.serve()
    with system.pgq.begin() as connection:
        system.pgq.external_task("report").enqueue(connection)
        system.pgq.external_task("email").enqueue(connection, to="ada")

    worker = system.work("worker-1", TASK_TYPES="email")

    wait_for(lambda: "job 2 is completed" in worker.output(), "the e-mail to be sent")
    assert system.jobs()[1].status == JobStatus.PENDING


def test_the_compose_file_starts_a_server_and_three_workers() -> None:
    services = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())["services"]

    workers = [service for name, service in services.items() if name.startswith("worker-")]
    variables = set(re.findall(r'environ.get\("(\w+)"', (EXAMPLE / "worker.py").read_text()))

    assert len(workers) == 3
    assert all(worker["environment"].keys() <= variables for worker in workers)
    assert len({worker["environment"]["WORKER_ID"] for worker in workers}) == 3
    assert services["server"]["command"].startswith(SERVE)
    assert (
        services["server"]["environment"]["PGQUEUE_DATABASE_URL"]
        == services["tables"]["environment"]["PGQUEUE_DATABASE_URL"]
    )
