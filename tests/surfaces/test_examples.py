"""The examples do what they say they do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from documents import PROJECT, Reader, blocks
from forks import Forks
from PIL import Image
from support import rows

from pgqueue import JobStatus, PgQueue

EXAMPLES = PROJECT / "examples"

#: What a test cannot run, and why.
NOT_RUN = {
    "export PGQUEUE_DATABASE_URL=sqlite:///shop.db": "each test has a database of its own",
    "pip install pillow aiosqlite": "they are among the packages for tests",
    "pip install fastapi uvicorn": "likewise",
    "uvicorn shop.api:app": "test_example_shop_api.py",
}


@pytest.fixture
def reader(url: str, tmp_path: Path, forks: Forks) -> Reader:
    """Somebody in a copy of the examples' folder."""
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("__pycache__", "*.db*"))
    return Reader(folder, url, forks)


def test_the_commands_of_the_examples_readme_work_from_top_to_bottom(reader: Reader, pgq: PgQueue) -> None:
    commands = [command for block in blocks(EXAMPLES / "README.md") for command in block.commands]

    for command in commands:
        if command not in NOT_RUN and not command.startswith("curl "):
            reader.run(command)

    assert set(NOT_RUN) <= set(commands), "an excuse for a command that is not in the README"
    assert {queue.queue: queue.completed for queue in pgq.queues()} == {
        "default": 5,
        "mail": 3,
        "checksums": 4,
        "images": 12,
    }
    assert_the_shop_is_as_the_readme_says(pgq)
    assert_the_consumer_did_what_it_could(pgq)
    assert_the_images_are_smaller(pgq, reader.folder / "resized")


def assert_the_shop_is_as_the_readme_says(pgq: PgQueue) -> None:
    products = rows(pgq.engine, "SELECT name, available, sold FROM product ORDER BY name")
    orders = rows(pgq.engine, "SELECT customer, product, status FROM customer_order ORDER BY product, status")
    assert products == [("cup", 6, 6), ("teapot", 1, 2)]
    assert [(product, status) for _, product, status in orders] == [
        ("cup", "reserved"),
        ("teapot", "rejected"),
        ("teapot", "reserved"),
    ]
    assert "mallory" not in {customer for customer, _, _ in orders}
    assert {job.retries for job in pgq.list_jobs(task="tell_customer")} == {1}


def assert_the_consumer_did_what_it_could(pgq: PgQueue) -> None:
    jobs = sorted(pgq.list_jobs(queue="checksums"), key=lambda job: job.id)
    completed, dead = JobStatus.COMPLETED, JobStatus.DEAD
    assert [job.status for job in jobs] == [completed, completed, dead, completed, completed]
    assert (jobs[2].attempt, jobs[2].error and jobs[2].error["message"]) == (2, "no text")
    assert len(jobs[0].result["sha256"]) == 64


def assert_the_images_are_smaller(pgq: PgQueue, folder: Path) -> None:
    jobs = {job.payload["file"]: job for job in pgq.list_jobs(queue="images")}
    notes = jobs.pop("notes.png")
    assert (notes.status, notes.attempt) == (JobStatus.DEAD, 1)
    for job in jobs.values():
        with Image.open(folder / job.result["file"]) as image:
            assert [*image.size] == job.result["size"]
            assert image.format == "JPEG"
            assert max(image.size) <= 160
    # Those that were given back charged a retry, and so did the one that was left; nobody looked for that.
    assert {name for name, job in jobs.items() if job.retries == 1} == {"image-00.png", "image-03.png", "image-07.png"}
    assert {job.claimed_by for job in jobs.values()} <= {"worker-1", "worker-2", "worker-3", "rescuer"}


def test_many_orders_of_a_product_make_one_pending_count(reader: Reader, pgq: PgQueue) -> None:
    reader.run("python -m shop open")
    reader.run('python -c \'from shop.__main__ import place_order as p; [p("ada", "cup", 1) for _ in range(3)]\'')

    # One slot: the orders are reserved one after the other, in front of the count that the first one asks for.
    reader.run("pgqueue worker shop.tasks:pgq --queue default=1,mail --drain")

    assert len(pgq.list_jobs(task="count_sales")) == 1
    assert rows(pgq.engine, "SELECT available, sold FROM product WHERE name = 'cup'") == [(9, 3)]
