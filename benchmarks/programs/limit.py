"""The limit: what a loop written by hand reaches on pgqueue's own table, with psycopg and nothing else.

One connection, one thread: claim so many, run them, complete them (or, with BENCH_DELETE=1, delete them). No leases
to extend, no retries, no errors to catch, nothing overlaps. Enqueues with COPY.
"""

from __future__ import annotations

import json
import os
import uuid

import psycopg
from program import at_odd_moments, chunks, main, stop_event, timed
from recorder import run
from sqlalchemy import create_engine

from pgqueue import migration

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


def setup(url: str) -> None:
    migration.upgrade(create_engine(url), "pgqueue")


def bulk(url: str, jobs: int, chunk: int) -> dict[str, float]:
    with psycopg.connect(plain(url)) as connection:

        def work() -> None:
            for numbers in chunks(jobs, chunk):
                with (
                    connection.transaction(),
                    connection.cursor() as cursor,
                    cursor.copy("COPY pgqueue.jobs (task, payload) FROM STDIN") as copy,
                ):
                    for n in numbers:
                        copy.write_row(("noop", f'{{"n": {n}}}'))

        return timed(work)


def single(url: str, jobs: int) -> dict[str, float]:
    with psycopg.connect(plain(url)) as connection:

        def work() -> None:
            for n in range(jobs):
                connection.execute(INSERT, [f'{{"n": {n}}}']).fetchone()
                connection.commit()

        return timed(work)


def latency(url: str, gaps: list[float]) -> object:
    with psycopg.connect(plain(url)) as connection, psycopg.connect(plain(url), autocommit=True) as notifier:

        def commit() -> None:
            connection.commit()
            notifier.execute("NOTIFY limit_jobs")

        return at_odd_moments(gaps, lambda n: connection.execute(INSERT, [f'{{"n": {n}}}']), commit)


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
    main({"setup": setup, "bulk": bulk, "single": single, "latency": latency, "work": work})
