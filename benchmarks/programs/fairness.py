"""Short and long jobs, which note when they ran.

pgqueue worker fairness:pgq --concurrency 4
python fairness.py enqueue URL '{}'
"""

from __future__ import annotations

import atexit
import json
import os
import random
import sys
import time
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from pgqueue import PgQueue

TEACHING_JOBS = 2_000
WAVES = 6
LONG_JOBS, SHORT_JOBS = 6, 200  #: of a wave
LONG_SECONDS, SHORT_SECONDS = 1.0, 0.0005
WAVE_SECONDS = 3.0

pgq = PgQueue()
runs: list[dict[str, float]] = []


@pgq.task
def sleep(n: int, seconds: float) -> None:
    if not runs:
        atexit.register(write)
    began = time.time()
    time.sleep(seconds)
    runs.append({"n": n, "began": began, "ended": time.time()})


def write() -> None:
    path = Path(os.environ["BENCH_RECORDS"]) / f"{os.getpid()}.runs"
    # A job's number is its id: they are enqueued one after the other into an empty table.
    path.write_text("".join(json.dumps({**run, "id": run["n"]}) + "\n" for run in runs))


def enqueue(url: str) -> dict[str, int]:
    pgq.connect_to(url)
    order = random.Random(1)
    jobs = 0

    def send(session: Session, seconds: list[float]) -> None:
        nonlocal jobs
        ids = sleep.enqueue_many(session, [{"n": jobs + 1 + k, "seconds": each} for k, each in enumerate(seconds)])
        session.commit()
        jobs += len(seconds)
        assert ids[-1] == jobs

    with Session(create_engine(url)) as session:
        send(session, [SHORT_SECONDS] * TEACHING_JOBS)
        time.sleep(WAVE_SECONDS)
        for _ in range(WAVES):
            wave = [LONG_SECONDS] * LONG_JOBS + [SHORT_SECONDS] * SHORT_JOBS
            order.shuffle(wave)
            send(session, wave)
            time.sleep(WAVE_SECONDS)
    pgq.dispose()
    return {"jobs": jobs}


if __name__ == "__main__":
    print(json.dumps(enqueue(sys.argv[2], **json.loads(sys.argv[3]))))
