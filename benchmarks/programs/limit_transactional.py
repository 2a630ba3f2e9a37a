"""The limit for transactional tasks: 8 threads, each claims a job, inserts a row and completes the job in one
transaction, with psycopg and nothing else. Enqueues like the other limit."""

from __future__ import annotations

import json
import threading
import time

import psycopg
from limit import plain, producer
from pgqueue_app import setup
from program import main, stop_event
from recorder import run

THREADS = 8

TAKE = """
SELECT id, payload::text FROM pgqueue.jobs
 WHERE queue = 'default' AND status = 'pending' AND priority = 0 AND run_at <= now()
 ORDER BY run_at, id LIMIT 1 FOR UPDATE SKIP LOCKED"""
INSERT = "INSERT INTO orders (job) VALUES (%s)"
COMPLETE = """
UPDATE pgqueue.jobs SET status = 'completed', claimed_by = 'limit', claimed_at = now(), finished_at = now(),
       attempt = attempt + 1
 WHERE id = %s"""


def work_in_thread(url: str, stopped: threading.Event) -> None:
    with psycopg.connect(plain(url)) as connection:
        while not stopped.is_set():
            taken = connection.execute(TAKE).fetchone()
            if taken is None:
                connection.rollback()
                time.sleep(0.05)
                continue
            n = json.loads(taken[1])["n"]
            connection.execute(INSERT, [n])
            connection.execute(COMPLETE, [taken[0]])
            connection.commit()
            run(n)


def work(url: str) -> None:
    stopped = stop_event()
    threads = [threading.Thread(target=work_in_thread, args=(url, stopped)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(setup=setup, producer=producer, work=work)
