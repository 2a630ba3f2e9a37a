"""A schedule of a task, and the jobs that it makes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqueue import store
from pgqueue.actor import who
from pgqueue.cron import CronRule, NewSchedule, Schedule, checked_catchup
from pgqueue.enqueueing import Task
from pgqueue.errors import ConfigurationError, InvalidPayload
from pgqueue.job import EnqueueResult, NewJob, OnConflict
from pgqueue.schema import Tables
from pgqueue.task import checked_name

#: What of a task's settings for one enqueue a schedule can carry.
CARRIED_OPTIONS = ("queue", "priority", "max_retries")

#: Where a job's metadata names its schedule, and the tick that it was made for.
SCHEDULE_KEY, TICK_KEY = "schedule", "tick_at"


def new_schedule(
    task: Task[..., Any],
    name: str | None,
    cron: str,
    payload: Mapping[str, Any] | None,
    tz: str,
    catchup: str,
    overlap: bool,
) -> NewSchedule:
    """A checked schedule of a task. Raises ConfigurationError or InvalidPayload."""
    if not hasattr(task, "definition"):
        raise ConfigurationError(f"a schedule's task is a task or the name of one, got {type(task).__name__}")
    definition = task.definition
    name = definition.name if name is None else checked_name("schedule", name)
    if not isinstance(overlap, bool):
        raise ConfigurationError(f"overlap of schedule {name!r} must be True or False, got {overlap!r}")
    for option in fields(task.options):
        if option.name not in CARRIED_OPTIONS and getattr(task.options, option.name) != option.default:
            hint = "; overlap=False keeps a second job away" if option.name == "unique_key" else ""
            raise ConfigurationError(
                f"schedule {name!r} of task {definition.name!r}: using({option.name}=…) cannot be kept for later jobs, "
                f"only {', '.join(CARRIED_OPTIONS)} can{hint}"
            )
    template = task._template
    return NewSchedule(
        name=name,
        rule=CronRule(cron, tz),
        task=definition.name,
        payload_json=definition.encode({} if payload is None else payload),
        queue=template.queue,
        priority=template.priority,
        max_retries=template.max_retries,
        catchup=checked_catchup(catchup),
        overlap=overlap,
    )


def enqueue(
    target: Session | sa.Connection,
    connection: sa.Connection,
    tables: Tables,
    schedule: Schedule,
    tasks: Mapping[str, Task[..., Any]],
    tick: datetime | None = None,
) -> EnqueueResult:
    """Store the job that a schedule makes, for a tick or out of turn: as an enqueue of its task would.

    Of a task that is not known here, or whose payload fits no more, the job is what the row says. Then it waits for a
    worker that knows the task, or its attempt fails and says why. A queue that is full raises QueueFull for a tick at
    once, whatever it does to others: a tick can wait.

    The key of a schedule without overlap stands back behind that of a task which is unique. As its jobs have one
    payload, they have one key.
    """
    metadata = {SCHEDULE_KEY: schedule.name}
    if tick is not None:
        metadata[TICK_KEY] = tick.astimezone(UTC).isoformat().replace("+00:00", "Z")
    unique_key = None if schedule.overlap else f"schedule:{schedule.name}"
    plain = NewJob(
        task=schedule.task,
        payload_json=schedule.payload_json,
        queue=schedule.queue,
        priority=schedule.priority,
        max_retries=schedule.max_retries,
        unique_key=unique_key,
        metadata_json=json.dumps(metadata),
    )
    task = tasks.get(schedule.task)
    if task is not None:
        payload: dict[str, Any] | None = None
        has_own_key = task.definition.unique is not None
        with suppress(ConfigurationError, ValueError, RecursionError):  # a row that somebody made by SQL
            task = task.using(
                queue=schedule.queue,
                priority=schedule.priority,
                max_retries=schedule.max_retries,
                unique_key=None if has_own_key else unique_key,
                on_conflict=OnConflict.SKIP,
                metadata=metadata,
            )
            payload = schedule.payload
        if payload is not None:
            task, payload = task._seen_by_middleware(payload)
            job = plain
            with suppress(InvalidPayload):
                job = task._new_job((), payload)
            if has_own_key and job.unique_key is None:
                job = replace(job, unique_key=unique_key, period_seconds=None)
            handle = task._insert(target, connection, job, may_block=tick is None)
            return EnqueueResult(handle.id, handle.inserted)
    return store.insert_job(connection, tables, plain, on_conflict=OnConflict.SKIP, actor=who(None))
