"""Transactions of an application: one row of its own through a Session, and what stands beside it in turn; and a job
alone, through a Connection.

    python transactions.py run URL '{"clients": 8, "blocks": 12, "block_seconds": 0.25}'

The clients are processes that change from one kind to the next together, so that every kind meets the same moods
of the disk. Prints {kind: transactions per second}.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.synchronize
import sys
import time
from collections.abc import Callable

from pgqueue_app import Order, noop, pgq
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.orm import Session

INSERT = "INSERT INTO pgqueue.jobs (task, payload) VALUES (%s, %s) RETURNING id"

KINDS = (
    "row alone",
    "row and bare INSERT",
    "row and enqueue",
    "row, bare INSERT and NOTIFY inside",
    "bare INSERT alone",
    "enqueue alone",
)


def transaction_of(kind: str, session: Session, connection: Connection) -> Callable[[int], None]:
    def row_alone(n: int) -> None:
        session.add(Order(job=1))
        session.commit()

    def row_and_insert(n: int) -> None:
        session.add(Order(job=1))
        session.connection().exec_driver_sql(INSERT, ("noop", f'{{"n": {n}}}')).scalar_one()
        session.commit()

    def row_and_enqueue(n: int) -> None:
        session.add(Order(job=1))
        noop.enqueue(session, n=n)
        session.commit()

    def row_insert_and_notify(n: int) -> None:
        session.add(Order(job=1))
        session.connection().exec_driver_sql(INSERT, ("noop", f'{{"n": {n}}}')).scalar_one()
        session.execute(text("NOTIFY jobs, 'default'"))
        session.commit()

    def insert(n: int) -> None:
        connection.exec_driver_sql(INSERT, ("noop", f'{{"n": {n}}}')).scalar_one()
        connection.commit()

    def enqueue(n: int) -> None:
        noop.enqueue(connection, n=n)
        connection.commit()

    transactions = (row_alone, row_and_insert, row_and_enqueue, row_insert_and_notify, insert, enqueue)
    return dict(zip(KINDS, transactions, strict=True))[kind]


def client(
    url: str,
    barrier: multiprocessing.synchronize.Barrier,
    blocks: int,
    block_seconds: float,
    counts: multiprocessing.SimpleQueue[dict[str, float]],
) -> None:
    pgq.connect_to(url)
    done = dict.fromkeys(KINDS, 0)
    spent = dict.fromkeys(KINDS, 0.0)
    engine = create_engine(url)
    with Session(engine) as session, engine.connect() as connection:
        for kind in KINDS:  # statements compiled and caches filled
            transaction = transaction_of(kind, session, connection)
            for n in range(20):
                transaction(n)
        for block in range(blocks):
            shift = block % len(KINDS)
            for kind in KINDS[shift:] + KINDS[:shift]:
                transaction = transaction_of(kind, session, connection)
                barrier.wait()
                began = time.perf_counter()
                until = began + block_seconds
                while time.perf_counter() < until:
                    transaction(1)
                    done[kind] += 1
                spent[kind] += time.perf_counter() - began
    counts.put({kind: done[kind] / spent[kind] for kind in KINDS})
    pgq.dispose()


def run(url: str, clients: int, blocks: int, block_seconds: float) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(clients)
    counts = context.SimpleQueue()
    processes = [
        context.Process(target=client, args=(url, barrier, blocks, block_seconds, counts)) for _ in range(clients)
    ]
    for process in processes:
        process.start()
    rates = [counts.get() for _ in processes]
    for process in processes:
        process.join()
    return {kind: sum(rate[kind] for rate in rates) for kind in KINDS}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[2], **json.loads(sys.argv[3]))))
