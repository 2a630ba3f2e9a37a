"""The books: whether what is in the tables after a campaign can have come about by the rules alone.

A job's history is its row, its events, the runs that its attempts recorded and the effects they left. These are
written in different transactions by different processes, so that an error in one shows against the others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa
from faults import app

from pgqueue import PgQueue

FINAL = ("completed", "dead", "cancelled")

#: The events that end an attempt, and what the job may then be.
ENDS = {
    "retry": ("pending",),
    "snooze": ("pending",),
    "release": ("pending",),
    "sweep": ("pending", "dead", "cancelled"),
    "dead": ("dead",),
    "cancel": ("cancelled",),
}


def audit(pgq: PgQueue, *, acknowledged: Iterable[int] = ()) -> list[str]:
    """What is wrong, one line each; an empty list when the books balance.

    Expects that all work is over. `acknowledged` are ids of jobs whose enqueue was committed: they must exist.
    """
    tables = pgq.tables
    with pgq.reading() as connection:
        jobs = connection.execute(sa.select(tables.jobs).order_by(tables.jobs.c.id)).all()
        events = _by_job(connection.execute(sa.select(tables.job_events).order_by(tables.job_events.c.id)).all())
        runs = _by_job(connection.execute(sa.select(app.runs).order_by(app.runs.c.id)).all())
        effects = _by_job(connection.execute(sa.select(app.effects).order_by(app.effects.c.id)).all())
    problems = [f"job {missing}: enqueued but not there" for missing in set(acknowledged) - {job.id for job in jobs}]
    for job in jobs:
        for problem in (
            *_row_problems(job, events[job.id]),
            *_path_problems(job, events[job.id]),
            *_run_problems(job, events[job.id], runs[job.id]),
            *_effect_problems(job, effects[job.id]),
        ):
            problems.append(f"job {job.id} ({job.task}): {problem}")
    strangers = (effects.keys() | runs.keys()) - {job.id for job in jobs}
    return problems + [f"job {stranger}: ran but does not exist" for stranger in strangers]


def audit_orders(pgq: PgQueue) -> list[str]:
    """What is wrong between business rows and jobs that were written in the same transactions."""
    with pgq.reading() as connection:
        orders = set(connection.execute(sa.select(app.orders.c.id)).scalars())
        payloads = connection.execute(sa.select(pgq.tables.jobs.c.payload)).scalars()
        jobs = Counter(payload["order"] for payload in payloads)
    return [
        *(f"order {order}: no job" for order in orders - jobs.keys()),
        *(f"order {order}: a job, but no order" for order in jobs.keys() - orders),
        *(f"order {order}: {count} jobs" for order, count in jobs.items() if count > 1),
    ]


def _by_job(rows: Iterable[Any]) -> defaultdict[int, list[Any]]:
    grouped: defaultdict[int, list[Any]] = defaultdict(list)
    for row in rows:
        grouped[row.job_id].append(row)
    return grouped


def _row_problems(job: Any, events: list[Any]) -> Iterator[str]:
    if job.status not in FINAL:
        yield f"is {job.status}, not final"
    charged = sum(event.event == "retry" or (event.event, event.to_status) == ("sweep", "pending") for event in events)
    if job.retries != charged:
        yield f"{job.retries} retries in its row, {charged} in its events"
    if job.status == "completed" and job.result != job.attempt:
        yield f"completed by attempt {job.attempt} with the result of attempt {job.result}"


def _path_problems(job: Any, events: list[Any]) -> Iterator[str]:
    """Each attempt has exactly one end: an event, or the completion that the row records."""
    status = "pending"
    attempt = 0
    for event in events:
        if event.to_status not in ENDS.get(event.event, ()) or event.from_status != "running":
            yield f"event {event.event} from {event.from_status} to {event.to_status} is against the rules"
        if status != "pending":
            yield f"event {event.event} after the job was {status}"
        if event.attempt != attempt + 1:
            yield f"event {event.event} ends attempt {event.attempt} after attempt {attempt} ended"
        status, attempt = event.to_status, event.attempt
    if job.status == "completed":
        if status != "pending":
            yield f"completed after it was {status}"
        attempt += 1
    elif job.status != status:
        yield f"is {job.status}, but its last event made it {status}"
    if job.attempt != attempt:
        yield f"{job.attempt} attempts in its row, the ends of {attempt} recorded"


def _run_problems(job: Any, events: list[Any], runs: list[Any]) -> Iterator[str]:
    """No attempt ran twice or out of thin air, and none began before the claim before it was over."""
    ended_at = {event.attempt: event.at for event in events}
    tokens = {run.claim_token for run in runs}
    for attempt, times in Counter(run.attempt for run in runs).items():
        if times > 1:
            yield f"attempt {attempt} ran {times} times"
        if not 1 <= attempt <= job.attempt:
            yield f"attempt {attempt} ran, but it was claimed {job.attempt} times"
    if len(tokens) != len(runs):
        yield f"{len(runs)} runs under {len(tokens)} claims"
    for run in runs:
        before = ended_at.get(run.attempt - 1)
        if run.attempt > 1 and before is None:
            yield f"attempt {run.attempt} ran, but nothing ended the one before"
        elif before is not None and run.started_at < before:
            yield f"attempt {run.attempt} began before attempt {run.attempt - 1} was over"
    if job.status == "completed" and all(run.attempt != job.attempt for run in runs):
        yield f"completed, but its attempt {job.attempt} never ran"


def _effect_problems(job: Any, effects: list[Any]) -> Iterator[str]:
    expected = 1 if job.status == "completed" and job.task in app.TRANSACTIONAL else 0
    if len(effects) != expected:
        yield f"{len(effects)} effects, expected {expected}"
    for effect in effects:
        if effect.attempt != job.attempt:
            yield f"an effect of attempt {effect.attempt}, but attempt {job.attempt} was the last"
