"""How long calls take on a table, and how long claims wait while it is pruned.

python history.py calls URL '{}'                        {call: median milliseconds}
python history.py prune URL '{"older_than": seconds}'   {"before", "during": longest claim, ms; "rate"}
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from pgqueue_app import noop, pgq
from sqlalchemy.orm import Session

BATCH = 500
CLAIMS = 15
WARM_UPS = 3
VIEWS, VIEW_SECONDS = 51, 5.0  #: so many times, or as often as fits into so long
CALM_SECONDS = 5.0


def calls(url: str) -> dict[str, float]:
    pgq.connect_to(url)
    claims, acks = [], []
    last = 0
    for _ in range(CLAIMS):
        with Session(pgq.engine) as session:
            last = noop.enqueue_many(session, [{"n": n} for n in range(BATCH)])[-1]
            session.commit()
        took, jobs = timed(lambda: pgq.claim("history", limit=BATCH))
        assert len(jobs) == BATCH
        claims.append(took)
        acks.append(timed(lambda jobs=jobs: pgq.ack(jobs))[0])
    views: dict[str, Callable[[], Any]] = {
        "queues": pgq.queues,
        "jobs": pgq.list_jobs,
        "jobs completed": lambda: pgq.list_jobs(status="completed"),
        "jobs dead": lambda: pgq.list_jobs(status="dead"),
        "job": lambda: pgq.get_job(last),
        "events": lambda: pgq.job_events(last),
        "workers": pgq.workers,
    }
    medians = {name: median_milliseconds(view) for name, view in views.items()}
    return {"claim": statistics.median(claims), "ack": statistics.median(acks), **medians}


def median_milliseconds(call: Callable[[], Any]) -> float:
    taken: list[float] = []
    while len(taken) < VIEWS and (len(taken) <= WARM_UPS or sum(taken) < VIEW_SECONDS * 1_000):
        taken.append(timed(call)[0])
    return statistics.median(taken[WARM_UPS:])


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return (time.perf_counter() - began) * 1_000, result


def prune(url: str, older_than: float) -> dict[str, float]:
    pgq.connect_to(url)
    until = time.monotonic() + CALM_SECONDS
    before = longest_claim(lambda: time.monotonic() > until)
    done = threading.Event()
    outcome: dict[str, float] = {}

    def work() -> None:
        try:
            began = time.perf_counter()
            outcome["jobs"] = pgq.prune(older_than=older_than)
            outcome["seconds"] = time.perf_counter() - began
        finally:
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    during = longest_claim(done.is_set)
    thread.join()
    return {"before": before, "during": during, "rate": outcome["jobs"] / outcome["seconds"]}


def longest_claim(over: Callable[[], bool]) -> float:
    """Of claims of single jobs, one after the other; the enqueueing and the acknowledging are not counted."""
    longest = 0.0
    while not over():
        with Session(pgq.engine) as session:
            noop.enqueue(session, n=0)
            session.commit()
        took, jobs = timed(lambda: pgq.claim("history"))
        longest = max(longest, took)
        pgq.ack(jobs)
    return longest


if __name__ == "__main__":
    verb, url, options = sys.argv[1:4]
    print(json.dumps({"calls": calls, "prune": prune}[verb](url, **json.loads(options))))
    pgq.dispose()
