"""The shop over HTTP: its requests enqueue in their own transactions."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from documents import PROJECT, Reader, blocks
from forks import Forks
from support import Process, rows, wait_for

from pgqueue import PgQueue

EXAMPLES = PROJECT / "examples"


class Shop:
    """The folder of the examples, with the shop opened in a database, and a server for it."""

    def __init__(self, folder: Path, url: str, forks: Forks) -> None:
        self.reader = Reader(folder, url, forks)
        self.reader.run("python -m shop open")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        arguments = [sys.executable, "-m", "uvicorn", "shop.api:app", "--port", port]
        self.server = Process(arguments, cwd=folder, **self.reader.environ)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}")
        wait_for(self._listens, "the shop to open")

    def _listens(self) -> bool:
        assert self.server.process.poll() is None, self.server.output()
        return "Uvicorn running on" in self.server.output()

    def order(self, customer: str, product: str, quantity: int) -> httpx.Response:
        return self.http.post("/orders", json={"customer": customer, "product": product, "quantity": quantity})

    def close(self) -> None:
        self.http.close()
        self.server.close()


@pytest.fixture
def shop(pgq: PgQueue, url: str, tmp_path: Path, forks: Forks) -> Iterator[Shop]:
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("__pycache__", "*.db*"))
    opened = Shop(folder, url, forks)
    yield opened
    opened.close()


def test_an_order_is_accepted_at_once_and_reserved_by_a_worker(shop: Shop) -> None:
    placed = shop.order("ada", "teapot", 2)
    before = shop.http.get("/orders/1").json()

    shop.reader.run("pgqueue worker shop.tasks:pgq --drain")

    assert (placed.status_code, placed.json()) == (202, {"order": 1, "job": 1})
    assert before["status"] == "placed"
    assert shop.http.get("/orders/1").json() == {"order": 1, "product": "teapot", "quantity": 2, "status": "reserved"}


def test_a_job_can_be_asked_for_as_soon_as_the_order_was_answered(shop: Shop, pgq: PgQueue) -> None:
    for _ in range(10):
        placed = shop.order("ada", "cup", 1).json()

        assert pgq.get_job(placed["job"]).payload == {"order_id": placed["order"]}


def test_a_request_that_fails_leaves_neither_order_nor_job(shop: Shop, pgq: PgQueue) -> None:
    refused = [shop.order("mallory", "cup", 1), shop.order("ada", "spoon", 1), shop.order("ada", "cup", 0)]

    assert [answer.status_code for answer in refused] == [402, 404, 422]
    assert rows(pgq.engine, "SELECT id FROM customer_order") == []
    assert pgq.list_jobs() == []


def test_the_request_of_the_readme_is_accepted(shop: Shop) -> None:
    (line,) = (
        command for block in blocks(EXAMPLES / "README.md") for command in block.commands if command.startswith("curl ")
    )
    words = shlex.split(line)

    answer = shop.http.post(words[3].removeprefix("http://localhost:8000"), json=json.loads(words[-1]))

    assert answer.status_code == 202
    assert words[1:3] == ["-X", "POST"]
