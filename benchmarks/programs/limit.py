"""The limit: what a loop written by hand reaches on pgqueue's own table, with psycopg and nothing else.

One connection, one thread: claim so many, run them, complete them (or, with BENCH_DELETE=1, delete them). No leases
to extend, no retries, no errors to catch, nothing overlaps. Enqueues with COPY.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from pgqueue_app import setup
from program import main, stop_event
from recorder import run

BATCH = 500

CLAIM = """
UPDATE pgqueue.jobs SET status = 'running', claimed_by = 'limit', claim_token = %s, claimed_at = now(),
       claim_expires_at = now() + interval '30 s', attempt = attempt + 1
 WHERE id = ANY (ARRAY(
       SELECT id FROM pgqueue.jobs
        WHERE queue = 'default' AND status = 'pending' AND priority = 0 AND run_at <= now()
        ORDER BY run_at, id LIMIT %s FOR UPDATE SKIP LOCKED))
RETURNING id, payload::text"""
COMPLETE = """
UPDATE pgqueue.jobs SET status = 'completed', claim_token = NULL, claim_expires_at = NULL, finished_at = now()
 WHERE id = ANY (%s) AND claim_token = %s"""
DELETE = "DELETE FROM pgqueue.jobs WHERE id = ANY (%s) AND claim_token = %s"
INSERT = "INSERT INTO pgqueue.jobs (task, payload) VALUES ('noop', %s) RETURNING id"


def plain(url: str) -> str:
    return url.replace("+psycopg", "")


class Producer:
    def __init__(self, connection: psycopg.Connection, notifier: psycopg.Connection) -> None:
        self.connection = connection
        self.notifier = notifier

    def many(self, numbers: range) -> None:
        with self.connection.cursor() as cursor:
            with cursor.copy("COPY pgqueue.jobs (task, payload) FROM STDIN") as copy:
                for n in numbers:
                    copy.write_row(("noop", f'{{"n": {n}}}'))
            self.connection.commit()

    def one(self, n: int) -> None:
        self.connection.execute(INSERT, [f'{{"n": {n}}}']).fetchone()

    def commit(self) -> None:
        self.connection.commit()
        self.notifier.execute("NOTIFY limit_jobs")


@contextmanager
def producer(url: str) -> Iterator[Producer]:
    with psycopg.connect(plain(url)) as connection, psycopg.connect(plain(url), autocommit=True) as notifier:
        notifier.execute("SET synchronous_commit = off")  # a hint need not wait for the disk
        yield Producer(connection, notifier)


def work(url: str) -> None:
    stopped = stop_event()
    finish = DELETE if os.environ.get("BENCH_DELETE") else COMPLETE
    with psycopg.connect(plain(url), autocommit=True) as connection:
        connection.execute("LISTEN limit_jobs")
        while not stopped.is_set():
            token = uuid.uuid4()
            claimed = connection.execute(CLAIM, [token, BATCH]).fetchall()
            for _, payload in claimed:
                run(**json.loads(payload))
            if claimed:
                connection.execute(finish, [sorted(row[0] for row in claimed), token])
            else:
                for _ in connection.notifies(timeout=0.1, stop_after=1):
                    pass


if __name__ == "__main__":
    main(setup=setup, producer=producer, work=work)
