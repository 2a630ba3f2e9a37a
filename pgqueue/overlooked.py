"""Slots and turns that nobody was told of: a claim looks around for jobs that wait for one without need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from pgqueue import buckets, dialect, offers, store
from pgqueue.admission import WAITS_FOR_KEY, WAITS_FOR_ORDER, WAITS_FOR_TASK, Candidate, InUse, admit
from pgqueue.dialect import TextArray, id_among, id_in, text_in
from pgqueue.gating import Gates
from pgqueue.schema import IN_ORDER, Tables
from pgqueue.store import IDS, OFFERED

#: So many of the jobs that wait, and of those in an order, a claim goes on to each time.
AROUND_JOBS_MAX = 300

#: Among so many of the jobs that wait for a task, it looks for so many of its queue.
IDLE_JOBS_MAX, FOUND_JOBS_MAX = 1_000, 32


def look_around(connection: sa.Connection, tables: Tables, gates: Gates) -> bool:
    """Let jobs of this queue be judged again that wait for a task or key which has slots left, or for their turn when
    it is; whether there were some.

    Such slots were offered to jobs that nobody claims (their queue is paused or has no workers, or they were put off),
    or who had them was deleted while the next job was locked. Each time it looks at some, and at all in turn.
    """
    rows: list[Any] = []
    if gates.limited:
        document = json.dumps([{"task": task} for task in sorted(gates.limited)])
        rows += connection.execute(_waiting_here(tables), {"tasks": document, "of_queue": gates.queue_name})
    place = _places.setdefault((tables, gates.queue_name), _Place())
    if gates.keyed:
        rows += _next_lines(connection, tables, gates, place)
    if gates.ordered:
        rows += _next_turns(connection, tables, gates, place)
    waiting = [Candidate(row.id, row.task, row.concurrency_key, row.ordering_key, row.rate_key) for row in rows]
    if not waiting:
        return False
    decision = admit(
        waiting,
        want=len(waiting),
        queue_name=gates.queue_name,
        queue=gates.queue,
        tasks=gates.tasks,
        in_use=_in_use(connection, tables, gates, waiting),  # they are few
    )
    if not decision.admitted:
        return False
    return connection.execute(_let_unlocked_be_judged(tables), {"ids": sorted(decision.admitted)}).rowcount > 0


@dataclass(slots=True)
class _Place:
    """How far this process has looked around."""

    line: tuple[str, str] = ("", "")
    turn: str = ""


#: By queue. Only a hint: two threads may look at the same.
_places: dict[tuple[Tables, str], _Place] = {}


@cache
def _waiting_here(tables: Tables) -> sa.Select[Any]:
    """Of each task the jobs of this queue that wait for it, among the first that do so in all queues."""
    jobs = tables.jobs
    tasks = dialect.rows(tables.dialect_name, "tasks", sa.column("task", sa.Text))
    first = dialect.first_where(
        tables.dialect_name,
        jobs,
        tasks,
        sa.and_(jobs.c.task == tasks.c.task, jobs.c.waits_for == WAITS_FOR_TASK),
        [jobs.c.priority.desc(), jobs.c.run_at, jobs.c.id],
        sa.literal_column(str(IDLE_JOBS_MAX)),
    )
    columns = [first.c[name] for name in ("id", "task", *store.LIMIT_KEYS)]
    return sa.select(*columns).where(first.c.queue == sa.bindparam("of_queue", type_=sa.Text())).limit(FOUND_JOBS_MAX)


def _next_lines(connection: sa.Connection, tables: Tables, gates: Gates, place: _Place) -> list[Any]:
    """Of the next keys that jobs wait for, each the first of these jobs that is in this queue."""
    task, what = place.line
    rows = connection.execute(_lines(tables), {"of_task": task, "what": what}).all()
    lines = list(dict.fromkeys((row.task, row.waits_for) for row in rows))
    # Of the last one there may be more, so the next look begins with it; unless it is as long as that.
    place.line = ("", "") if len(rows) < AROUND_JOBS_MAX else lines[-2] if len(lines) > 1 else lines[-1]
    first: dict[tuple[str, str], Any] = {}
    for row in rows:
        if row.queue == gates.queue_name and row.waits_for.startswith(WAITS_FOR_KEY):
            first.setdefault((row.task, row.waits_for), row)
    return list(first.values())


@cache
def _lines(tables: Tables) -> sa.Select[Any]:
    jobs = tables.jobs
    after = sa.tuple_(sa.bindparam("of_task", type_=sa.Text()), sa.bindparam("what", type_=sa.Text()))
    columns = (jobs.c[name] for name in ("id", "queue", "task", "waits_for", *store.LIMIT_KEYS))
    return (
        sa.select(*columns)
        .where(jobs.c.waits_for.is_not(None), sa.tuple_(jobs.c.task, jobs.c.waits_for) > after)
        .order_by(jobs.c.task, jobs.c.waits_for, jobs.c.priority.desc(), jobs.c.run_at, jobs.c.id)
        .limit(AROUND_JOBS_MAX)
    )


def _next_turns(connection: sa.Connection, tables: Tables, gates: Gates, place: _Place) -> list[Any]:
    """Of the next ordering keys, each the job whose turn it is, if that waits for its turn."""
    rows = connection.execute(_turns(tables), {"of_queue": gates.queue_name, "after": place.turn}).all()
    place.turn = "" if len(rows) < AROUND_JOBS_MAX else rows[-1].ordering_key
    first: dict[str, Any] = {}
    for row in rows:
        first.setdefault(row.ordering_key, row)
    return [row for row in first.values() if row.waits_for == WAITS_FOR_ORDER]


@cache
def _turns(tables: Tables) -> sa.Select[Any]:
    jobs = tables.jobs
    columns = (jobs.c[name] for name in ("id", "task", "waits_for", *store.LIMIT_KEYS))
    return (
        sa.select(*columns)
        .where(
            jobs.c.queue == sa.bindparam("of_queue", type_=sa.Text()),
            jobs.c.ordering_key > sa.bindparam("after", type_=sa.Text()),
            sa.text(IN_ORDER),
        )
        .order_by(jobs.c.ordering_key, jobs.c.status.desc(), jobs.c.id)
        .limit(AROUND_JOBS_MAX)
    )


def _in_use(connection: sa.Connection, tables: Tables, gates: Gates, candidates: Sequence[Candidate]) -> InUse:
    """What the decision about jobs that wait depends on."""
    of_queue, of_tasks, of_keys = 0, {}, {}
    if gates.holding != []:
        pairs = {
            (job.task, job.concurrency_key)
            for job in candidates
            if job.concurrency_key is not None
            and (limits := gates.tasks.get(job.task)) is not None
            and limits.key_concurrency is not None
        }
        parameters = {
            "of_queue": gates.queue_name,
            "tasks": gates.limited,
            "pairs": json.dumps([{"task": task, "key": key} for task, key in sorted(pairs)]),
        }
        counts = connection.execute(_count_slots(tables, gates.holding is None), parameters)
        for task, key, count in counts:
            if task is None:
                of_queue = count
            elif key is None:
                of_tasks[task] = count
            else:
                of_keys[task, key] = count
    tokens, _ = buckets.look(connection, tables, gates, candidates)
    ordering_keys = {job.ordering_key for job in candidates if job.ordering_key is not None}
    leaders = offers.leaders_of(connection, tables, gates.queue_name, ordering_keys) if ordering_keys else {}
    return InUse(of_queue, of_tasks, of_keys, tokens, leaders)


@cache
def _count_slots(tables: Tables, of_queue: bool) -> Any:
    """One row for each limited task, each key of a pair, and for the queue."""
    jobs = tables.jobs
    holding = offers.holds_slot(tables)
    nothing = sa.cast(sa.null(), sa.Text)
    of_tasks = (
        sa.select(jobs.c.task.label("task"), nothing.label("key"), sa.func.count().label("count"))
        .where(*holding, text_in(jobs.c.task, sa.bindparam("tasks", type_=TextArray())))
        .group_by(jobs.c.task)
    )
    pairs = dialect.rows(tables.dialect_name, "pairs", sa.column("task", sa.Text), sa.column("key", sa.Text))
    of_pair = (
        sa.select(sa.func.count())
        .select_from(jobs)
        .where(*holding, jobs.c.task == pairs.c.task, jobs.c.concurrency_key == pairs.c.key)
        .correlate(pairs)
        .scalar_subquery()
    )
    counts = [of_tasks, sa.select(pairs.c.task, pairs.c.key, of_pair)]
    if of_queue:
        counts.append(
            sa.select(nothing, nothing, sa.func.count())
            .select_from(jobs)
            .where(*holding, jobs.c.queue == sa.bindparam("of_queue", type_=sa.Text()))
        )
    return sa.union_all(*counts)


@cache
def _let_unlocked_be_judged(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    unlocked = (
        sa.select(jobs.c.id)
        .where(id_among(jobs.c.id, IDS), jobs.c.waits_for.is_not(None))
        .order_by(jobs.c.id)
        .with_for_update(skip_locked=True)
    )
    return sa.update(jobs).where(id_in(jobs.c.id, unlocked.scalar_subquery())).values(waits_for=sa.null(), slot=OFFERED)
