"""Work of all kinds at once: jobs whose first attempt fails, consumers that are lost with their claims, and
transactions that commit late.

    pgqueue worker mixed:pgq
    python mixed.py feed URL '{"seconds": 120, "ahead": 20000}'

Prints {"jobs", "began", "late": [[number, microseconds of its commit], …]}: the jobs that were committed late.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time

import recorder
from program import runs_so_far
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from pgqueue import PgQueue, Retry

CHUNK = 1_000
WAIT_SECONDS = 0.005
FAILING = 50  #: one of so many fails at its first attempt
LATE_FROM = 8_000_000
LATE_JOBS = 100
LATE_SECONDS = (1.0, 6.0)
LOST_JOBS = 20
LOST_SECONDS = 1.0
LEASE = 0.5

pgq = PgQueue()
failed: set[int] = set()


@pgq.task(retry=Retry(max_retries=100, backoff="constant", base=0.5))
def mixed(n: int) -> None:
    if n % FAILING == 0 and n not in failed:
        failed.add(n)
        raise RuntimeError("the first attempt fails")
    recorder.run(n)


def feed(url: str, seconds: float, ahead: int) -> dict[str, object]:
    pgq.connect_to(url)
    session = Session(create_engine(url))
    mixed.enqueue_many(session, [{"n": n} for n in range(CHUNK)])
    session.commit()
    while not runs_so_far():
        time.sleep(WAIT_SECONDS)
    jobs, began = CHUNK, recorder.microseconds()
    until = time.monotonic() + seconds
    late: list[tuple[int, int]] = []
    others = [
        threading.Thread(target=commit_late, args=(url, until, late)),
        threading.Thread(target=lose_claims, args=(until,)),
    ]
    for thread in others:
        thread.start()
    with session:
        while time.monotonic() < until:
            if jobs - runs_so_far() < ahead:
                mixed.enqueue_many(session, [{"n": n} for n in range(jobs, jobs + CHUNK)])
                session.commit()
                jobs += CHUNK
            else:
                time.sleep(WAIT_SECONDS)
    for thread in others:
        thread.join()
    pgq.dispose()
    return {"jobs": jobs, "began": began, "late": late}


def commit_late(url: str, until: float, late: list[tuple[int, int]]) -> None:
    """Jobs whose moment and id lie far below what workers have come to when they can first be seen."""
    pauses = random.Random(1)
    number = LATE_FROM
    with Session(create_engine(url)) as session:
        while time.monotonic() < until:
            mixed.enqueue_many(session, [{"n": n} for n in range(number, number + LATE_JOBS)])
            time.sleep(pauses.uniform(*LATE_SECONDS))
            session.commit()
            committed = time.time_ns() // 1_000  # of the clock that the server has
            late.extend((n, committed) for n in range(number, number + LATE_JOBS))
            number += LATE_JOBS


def lose_claims(until: float) -> None:
    """A consumer that claims jobs and is never heard of again, over and over."""
    while time.monotonic() < until:
        pgq.claim("lost", limit=LOST_JOBS, lease=LEASE)
        time.sleep(LOST_SECONDS)


if __name__ == "__main__":
    print(json.dumps(feed(sys.argv[2], **json.loads(sys.argv[3]))))
