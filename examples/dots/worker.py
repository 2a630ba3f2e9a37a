"""A worker that takes a second for each dot of a text: python worker.py

It reads these variables:

DOT_SECONDS    how long a dot takes; 1
RETRY_SECONDS  how long a text that failed waits for its next attempt; 5
"""

from __future__ import annotations

import os
import signal
import time

from pgqueue import PgQueue, Retry, Worker, WorkerConfig, current_job

DOT_SECONDS = float(os.environ.get("DOT_SECONDS", "1"))
RETRY_SECONDS = float(os.environ.get("RETRY_SECONDS", "5"))

pgq = PgQueue()


class TemporaryError(Exception):
    """May be gone the next time."""


class PermanentError(Exception):
    """Will be the same whenever it is tried."""


@pgq.task(queue="dots", retry=Retry(backoff="constant", base=RETRY_SECONDS, jitter=False, discard_on=PermanentError))
def work(text: str) -> int:
    print(f" [x] Received {text}", flush=True)
    time.sleep(DOT_SECONDS * text.count("."))
    if "impossible" in text:
        raise PermanentError(text)
    if "unlucky" in text and current_job().attempt == 1:
        raise TemporaryError(text)
    print(f" [x] Done {text}", flush=True)
    return text.count(".")


def main() -> None:
    # One text at a time, and none taken ahead: whoever is free takes the next one. That is what a worker does with
    # long jobs anyway; `prefetch` says it for short ones as well.
    worker = Worker(pgq, WorkerConfig(queues={"dots": 1}, prefetch=0))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: worker.stop())
    print(" [*] Waiting for texts. To exit press CTRL+C", flush=True)
    worker.run()  # a text that is being worked on is finished first
    print(" [*] Stopped", flush=True)


if __name__ == "__main__":
    main()
