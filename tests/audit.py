"""What holds of the tables at every moment, whatever was done to them and however many did it at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from pgqueue import PgQueue

OPEN = ("pending", "running")


@dataclass(frozen=True)
class Stored:
    """The rows of all jobs, and by job its events, oldest first; those of jobs that are gone among them."""

    jobs: list[Any]
    events: dict[int, list[Any]]


def read(pgq: PgQueue) -> Stored:
    jobs, job_events = pgq.tables.jobs, pgq.tables.job_events
    with pgq.begin() as connection:
        rows = list(connection.execute(sa.select(jobs)))
        recorded = list(
            connection.execute(sa.select(job_events).where(job_events.c.job_id.is_not(None)).order_by(job_events.c.id))
        )
    events: dict[int, list[Any]] = {}
    for event in recorded:
        events.setdefault(event.job_id, []).append(event)
    return Stored(rows, events)


def assert_sound(stored: Stored) -> None:
    assert_no_two_open_jobs_of_a_task_have_one_key(stored.jobs)
    for row in stored.jobs:
        assert_claim_and_end_stand_exactly_where_the_status_says(row)
        assert_events_tell_how_every_attempt_ended_but_a_good_or_present_one(row, stored.events.get(row.id, []))


def assert_no_two_open_jobs_of_a_task_have_one_key(rows: list[Any]) -> None:
    keys = [(row.task, row.unique_key) for row in rows if row.unique_key and row.status in OPEN]
    assert len(keys) == len(set(keys))


def assert_claim_and_end_stand_exactly_where_the_status_says(row: Any) -> None:
    assert (row.claim_token is not None) == (row.claim_expires_at is not None) == (row.status == "running")
    assert (row.finished_at is not None) == (row.status not in OPEN)
    assert row.cancel_requested_at is None or row.status in ("running", "completed")
    assert (row.claimed_by is not None) == (row.claimed_at is not None) == (row.attempt > 0)


def assert_events_tell_how_every_attempt_ended_but_a_good_or_present_one(row: Any, events: list[Any]) -> None:
    is_silent = row.status in ("running", "completed")
    ended = [event.attempt for event in events if event.from_status == "running" != event.to_status]
    assert ended == list(range(1, row.attempt + (0 if is_silent else 1)))
    since_replay = itertools.takewhile(lambda event: event.event not in ("replay", "replace"), reversed(events))
    charged = [event for event in since_replay if event.event in ("retry", "sweep") and event.to_status == "pending"]
    assert row.retries == len(charged)
    if events and not is_silent:
        assert events[-1].to_status == row.status
