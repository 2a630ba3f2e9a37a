"""A consumer that is no worker: it claims jobs itself, and says itself how each of them ended.

For programs that have a loop of their own. Run it with PGQUEUE_DATABASE_URL set, after `pgqueue db upgrade`.
"""

from __future__ import annotations

import hashlib

from sqlalchemy.orm import Session

from pgqueue import ClaimedJob, PgQueue

LEASE_SECONDS = 30.0

pgq = PgQueue()

#: Worked on by whoever claims the queue; `pgqueue worker` leaves it alone. One retry, then it is dead.
checksum = pgq.external_task("checksum", queue="checksums", max_retries=1)


def produce() -> None:
    texts = ["spring", "summer", None, "autumn", "winter"]
    with Session(pgq.engine) as session, session.begin():
        checksum.enqueue_many(session, [{"text": text} for text in texts])


def consume() -> None:
    while jobs := pgq.claim("consumer-1", queue="checksums", limit=2, lease=LEASE_SECONDS):
        for job in jobs:
            # Should this program die here, the job can be claimed again once its lease is over.
            consume_one(job)


def consume_one(job: ClaimedJob) -> None:
    text = job.payload["text"]
    if text is None and job.retries < job.max_retries:
        pgq.nack(job, error="no text", delay=0)  # a failed attempt: charges a retry
        print(f"job {job.id}: given back after attempt {job.attempt}")
        return
    if text is None:
        pgq.nack(job, error="no text", dead=True)
        print(f"job {job.id}: dead after attempt {job.attempt}")
        return
    pgq.extend(job, lease=LEASE_SECONDS)  # for work that takes longer than was thought
    pgq.ack(job, result={"sha256": hashlib.sha256(text.encode()).hexdigest()})
    print(f"job {job.id}: completed")


if __name__ == "__main__":
    produce()
    consume()
