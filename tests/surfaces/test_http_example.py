"""The example of producers and workers over HTTP: its own worker, three times, and the curl lines of its README."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from command import finished, running
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
        settings = {"WORKER_ID": name, "QUEUE_URL": self.url, "WORK_SECONDS": "0.1", "FAIL_RATE": "0"}
        settings |= {"LEASE_SECONDS": "2", **environ}
        process = Process([sys.executable, str(EXAMPLE / "worker.py")], cwd=self._folder, **settings)
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


BROKEN = {
    "nothing at all": b"",
    "an answer that ends too soon": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
    "no HTTP": b"\x00\x01\r\n\r\n",
    "a page of some proxy's": b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
    "an error": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=list(BROKEN))
def test_a_worker_outlasts_an_answer_that_is_none(answer: bytes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_SECONDS)
        environ = {"QUEUE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "HTTP_SECONDS": "0.2"}
        worker = Process([sys.executable, str(EXAMPLE / "worker.py")], cwd=tmp_path, **environ)
        for _ in range(2):  # it comes again
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)
                connection.recv(65536) if not answer else None  # until the worker has waited for long enough
        worker.signal(signal.SIGTERM)

        assert worker.wait() == 0, worker.output()
        assert "cannot be reached" in worker.output()
        worker.close()


# compose.yaml ----------------------------------------------------------------------------------------------


def services() -> dict[str, Any]:
    """Those of compose.yaml, with the variables that it has defaults for."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (EXAMPLE / "compose.yaml").read_text())
    found: dict[str, Any] = yaml.safe_load(text)["services"]
    return found


def test_the_compose_file_starts_a_server_and_three_workers() -> None:
    workers = [service for name, service in services().items() if name.startswith("worker-")]
    variables = set(re.findall(r'environ.get\("(\w+)"', (EXAMPLE / "worker.py").read_text()))

    assert len(workers) == 3
    assert all(worker["environment"].keys() <= variables for worker in workers)
    assert len({worker["environment"]["WORKER_ID"] for worker in workers}) == 3
    assert {name: [*service.get("depends_on", ())] for name, service in services().items()} == {
        "db": [],
        "tables": ["db"],
        "server": ["tables"],
        **{f"worker-{number}": ["server"] for number in (1, 2, 3)},
    }


def test_what_the_compose_file_starts_works_together(empty_pg_url: str, tmp_path: Path) -> None:
    """Its commands with its variables, as processes; instead of its network's names those of this machine."""
    pgq = PgQueue(empty_pg_url)
    here = pgq.url
    with ExitStack() as processes:
        system = System(pgq, empty_pg_url, tmp_path, processes)

        def environ(name: str) -> dict[str, str]:
            given: dict[str, str] = services()[name]["environment"]
            database = sa.make_url(given.get("PGQUEUE_DATABASE_URL", empty_pg_url))
            database = database.set(host=here.host, port=here.port, database=here.database)
            return {
                **{variable: value.replace("http://server:3000", system.url) for variable, value in given.items()},
                "PGQUEUE_DATABASE_URL": database.render_as_string(hide_password=False),
                "PORT": str(system.port),
            }

        def is_healthy() -> bool:
            check = services()["server"]["healthcheck"]["test"].replace("http://localhost:3000", system.url)
            done = subprocess.run(["sh", "-c", check.replace("python", sys.executable)], capture_output=True)
            return done.returncode == 0

        assert not is_healthy()
        tables = finished(*arguments_of("tables"), cwd=tmp_path, **environ("tables"))
        assert tables.returncode == 0, tables.stderr
        server = processes.enter_context(running(*arguments_of("server"), cwd=tmp_path, **environ("server")))
        wait_for(is_healthy, "the server to be healthy", every=0.1)
        assert services()["worker-1"]["command"] == "python worker.py"
        workers = [
            system.work(name, **{**environ(name), "WORK_SECONDS": "0.05"}) for name in services() if "worker-" in name
        ]
        header = re.search(r"header `(Authorization: [^`]+)`", " ".join((EXAMPLE / "README.md").read_text().split()))
        assert header
        for _ in range(6):
            asked = ask(system.port, "POST", "/task", header[1], b'{"type": "report", "payload": {}}')
            assert asked == 202, server.output()
        wait_for(lambda: len(pgq.list_jobs(status="completed")) == 6, "the reports")

        assert {job.claimed_by for job in pgq.list_jobs()} <= {f"everybody/worker-{number}" for number in (1, 2, 3)}
        assert all(worker.process.poll() is None for worker in workers)
        assert ask(system.port, "GET", "/stats", "Authorization: Bearer of somebody else") == 401
        assert ask(system.port, "GET", "/stats", header[1], host="elsewhere") == 421
    pgq.dispose()


def arguments_of(service: str) -> list[str]:
    program, *arguments = shlex.split(services()[service]["command"])
    assert program == "pgqueue"
    return arguments


def ask(port: int, method: str, path: str, header: str, body: bytes | None = None, host: str = "server:3000") -> int:
    """The status of the answer to a request that comes from within the network of compose.yaml."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    name, _, value = header.partition(": ")
    connection.request(method, path, body, {"Host": host, "Content-Type": "application/json", name: value})
    with connection.getresponse() as answer:
        answer.read()
    connection.close()
    return answer.status


def test_the_image_is_built_of_no_more_than_it_needs(tmp_path: Path) -> None:
    """What its .dockerignore lets through is what the wheel and the worker are made of."""
    ignored, *let_through = (EXAMPLE / "Dockerfile.dockerignore").read_text().split()
    context = tmp_path / "src"
    for line in let_through:
        source, target = PROJECT / line.removeprefix("!"), context / line.removeprefix("!")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif line.startswith("!"):
            shutil.copy(source, target)

    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=context, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        names = built.namelist()
    assert ignored == "*"
    assert {"pgqueue/http.py", "pgqueue/cli/serve.py", "pgqueue/migrations/env.py"} <= set(names)
    copied = re.findall(r"/src/(\S+)", (EXAMPLE / "Dockerfile").read_text())
    assert [path for path in copied if not (context / path).exists()] == []
