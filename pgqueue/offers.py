"""What one job leaves is offered to the next that waits for it: a slot, or the turn of its ordering key.

For each slot that a waiting job waits for there is a job that holds it or was offered it. Whichever way that job
leaves, it is found as they are, and the offer goes on to the next. So no job waits for ever.

Those who wait behind an earlier job of their ordering key are offered their turn when that one is final; it is marked
(`leads_order`) under its row's lock when the first one waits behind it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from pgqueue import dialect, gating, store
from pgqueue.admission import WAITS_FOR_KEY, WAITS_FOR_ORDER, WAITS_FOR_RATE, WAITS_FOR_TASK, Candidate
from pgqueue.dialect import TextArray, id_among, id_in, text_in
from pgqueue.schema import ENDED, HOLDS_SLOT, IN_ORDER, SLOTS, Tables
from pgqueue.store import AWAITED, FINAL, IDS, OFFERED, QUEUE, RUNNING, TASK

#: The most slots that one claim finds free, and jobs it lets go when limits were lifted.
FREED_JOBS_MAX = 1_000

#: With so many slots to offer, it is asked first whether anybody waits for one.
SLOTS_MANY = 20

#: The columns that say what a job leaves.
_LEAVES = ("id", "queue", "task", "concurrency_key", "ordering_key")


# What a claim passes on ------------------------------------------------------------------------------------


def offer_freed(connection: sa.Connection, tables: Tables, gates: gating.Gates) -> bool:
    """Find the slots that came free, and offer each to the next job that waits for it; whether there were some."""
    parameters = {"of_queue": gates.queue_name, "tasks": list(gates.tasks), "limit": FREED_JOBS_MAX}
    freed = connection.execute(_find_freed(tables), parameters).all()
    if freed:
        _offer(connection, tables, freed, gates.queue_name)
    return bool(freed)


@cache
def _find_freed(tables: Tables) -> sa.Update:
    """Jobs that held a slot, or were offered one, or led their ordering key, and do so no more."""
    jobs, limits = tables.jobs, tables.limits
    queue = sa.bindparam("of_queue", type_=sa.Text())
    final = jobs.c.status.op("IN")(FINAL)
    # Who waits for a slot of a task is decided under the lock of the task's limits; a turn, under the queue's.
    locked = text_in(jobs.c.task, sa.bindparam("tasks", type_=TextArray()))
    without_limits = ~sa.exists().where(limits.c.scope == TASK, limits.c.name == jobs.c.task, store.are_kept(limits))
    of_slot = sa.or_(locked, sa.and_(jobs.c.queue == queue, without_limits))
    awaited = jobs.c.slot.op("IN")(sa.literal_column("('awaited', 'offered')"))
    freed = (
        sa.select(jobs.c.id)
        .where(
            sa.text(f"({ENDED})"),
            sa.or_(sa.and_(awaited, of_slot), sa.and_(jobs.c.leads_order, jobs.c.queue == queue)),
        )
        .order_by(jobs.c.id)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
        .with_for_update(skip_locked=True)
    )
    return (
        sa.update(jobs)
        .where(id_in(jobs.c.id, freed.scalar_subquery()))
        .values(
            slot=sa.case((of_slot, sa.null()), else_=jobs.c.slot),
            leads_order=sa.and_(jobs.c.leads_order, sa.not_(sa.and_(final, jobs.c.queue == queue))),
        )
        .returning(*(jobs.c[name] for name in _LEAVES))
    )


def pass_on_offers(
    connection: sa.Connection,
    tables: Tables,
    candidates: Sequence[Candidate],
    waits: Mapping[int, str],
    again: Set[int],
) -> bool:
    """Where a job that was offered a slot has to wait for something else, offer the slot to the next; whether there
    was a job to offer it to.

    One that waits for its task keeps the offer: until then no other job of its key could start either.
    """
    left = {
        job.id: [slot for slot in slots_of(job) if slot[1] != waits[job.id]]
        for job in candidates
        if job.tracked and waits.get(job.id, WAITS_FOR_TASK) != WAITS_FOR_TASK
    }
    if not left:
        return False
    jobs = tables.jobs
    cleared = sorted(left.keys() - again)
    connection.execute(sa.update(jobs).where(id_among(jobs.c.id, IDS)).values(slot=sa.null()), {"ids": cleared})
    return _pass_on(connection, tables, left)


def let_go(connection: sa.Connection, tables: Tables, gates: gating.Gates) -> None:
    """Where limits of a task were lifted: let jobs go that waited for them."""
    for task in gates.releasing:
        kept = gates.tasks[task]
        lifted = {
            "of_task": task,
            "no_task": kept.concurrency is None,
            "no_key": kept.key_concurrency is None,
            "no_rate": kept.rate is None,
            "limit": FREED_JOBS_MAX,
        }
        connection.execute(_release(tables), lifted)
        # Not only when there are many: somebody may have locked one.
        if not connection.execute(_anything_to_release(tables), lifted).scalar_one():
            limits = tables.limits
            connection.execute(
                sa.update(limits).where(limits.c.scope == TASK, limits.c.name == task).values(releasing=sa.false())
            )


@cache
def _release(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    waiting = (
        sa.select(jobs.c.id)
        .where(_waits_for_what_was_lifted(tables))
        .order_by(jobs.c.waits_for, jobs.c.priority.desc(), jobs.c.run_at, jobs.c.id)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
        .with_for_update(skip_locked=True)
    )
    return sa.update(jobs).where(id_in(jobs.c.id, waiting.scalar_subquery())).values(waits_for=sa.null())


@cache
def _anything_to_release(tables: Tables) -> sa.Select[Any]:
    return sa.select(sa.exists().where(_waits_for_what_was_lifted(tables)))


def _waits_for_what_was_lifted(tables: Tables) -> sa.ColumnElement[bool]:
    jobs = tables.jobs

    def lifted(parameter: str, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        return sa.and_(sa.bindparam(parameter, type_=sa.Boolean()), condition)

    return sa.and_(
        jobs.c.task == sa.bindparam("of_task", type_=sa.Text()),
        jobs.c.waits_for.is_not(None),
        sa.or_(
            lifted("no_task", jobs.c.waits_for == WAITS_FOR_TASK),
            lifted("no_key", jobs.c.waits_for.like(f"{WAITS_FOR_KEY}%")),
            lifted("no_rate", jobs.c.waits_for.like(f"{WAITS_FOR_RATE}%")),
        ),
    )


# Jobs that are deleted, or get other keys ------------------------------------------------------------------


@contextmanager
def passing_on(connection: sa.Connection, tables: Tables, job_id: int) -> Iterator[None]:
    """Within this a job may be deleted, or get other keys: what it held, was offered, or led goes on to the next.

    It takes the job's row, and no limits: in a transaction of the application that would stop all claims under them.
    It may do so because a claim relies on a job that it judged or saw running, and holds or marks its row for that.
    """
    jobs = tables.jobs
    of_job = sa.select(*(jobs.c[name] for name in _LEAVES)).where(jobs.c.id == job_id)
    before = connection.execute(of_job.with_for_update()).one_or_none()
    yield
    if before is not None and gating.are_kept(connection, tables, queue=before.queue, tasks=[before.task]):
        _offer(connection, tables, [before], before.queue)


def are_done_with(tables: Tables) -> sa.ColumnElement[bool]:
    """A condition on final jobs: no claim has still to find that they ended, so that they may be deleted."""
    jobs, limits = tables.jobs, tables.limits
    names = sa.or_(
        sa.and_(limits.c.scope == QUEUE, limits.c.name == jobs.c.queue),
        sa.and_(limits.c.scope == TASK, limits.c.name == jobs.c.task),
    )
    return sa.or_(store.nobody_waits_for(jobs), ~sa.exists().where(names, store.are_kept(limits)))


# Slots and turns -------------------------------------------------------------------------------------------


def _offer(connection: sa.Connection, tables: Tables, freed: Sequence[Any], queue: str) -> None:
    """Offer what these jobs leave: their slots, and their turns where they are of this queue."""
    _pass_on(connection, tables, {row.id: slots_of(row) for row in freed})
    led: dict[str, list[int]] = {}
    for row in freed:
        if row.ordering_key is not None and row.queue == queue:
            led.setdefault(row.ordering_key, []).append(row.id)
    if led:
        leaders = leaders_of(connection, tables, queue, led)
        leading = lead(connection, tables, queue, leaders)
        # Somebody has locked the next one: find these jobs again in the next claim.
        again = [job_id for key, leader in leaders.items() if leader not in leading for job_id in led[key]]
        if again:
            jobs = tables.jobs
            connection.execute(
                sa.update(jobs).where(id_among(jobs.c.id, IDS)).values(leads_order=sa.true()), {"ids": again}
            )


def _pass_on(connection: sa.Connection, tables: Tables, left: Mapping[int, Sequence[tuple[str, str]]]) -> bool:
    """Offer the slots that each of these jobs leaves; whether there was a job for any."""
    slots: Counter[tuple[str, str]] = Counter()
    for of_job in left.values():
        slots.update(of_job)
    if len(slots) >= SLOTS_MANY and not _anyone_waits(connection, tables, {task for task, _ in slots}):
        return False
    offered = offer_slots(connection, tables, slots)
    missed, again = offered.missed, []
    for job_id, of_job in left.items() if missed else ():
        locked = [slot for slot in of_job if missed[slot] > 0]
        missed.subtract(locked)
        again += [job_id] if locked else []
    if again:
        # Somebody has locked those that are next: find so many of these jobs again in the next claim.
        jobs = tables.jobs
        connection.execute(
            sa.update(jobs).where(id_among(jobs.c.id, IDS), jobs.c.status != RUNNING).values(slot=AWAITED),
            {"ids": again},
        )
    return bool(offered.jobs)


def slots_of(row: Any) -> list[tuple[str, str]]:
    """What a job holds while it runs: of its task, and of its key."""
    of_task = [(row.task, WAITS_FOR_TASK)]
    return of_task if row.concurrency_key is None else [*of_task, (row.task, WAITS_FOR_KEY + row.concurrency_key)]


def holds_slot(tables: Tables) -> list[sa.ColumnElement[bool]]:
    """A condition on jobs, by index."""
    conditions: list[Any] = [sa.text(HOLDS_SLOT)]
    if tables.dialect_name == dialect.SQLITE:
        conditions.append(sa.text(f"({SLOTS})"))  # does not find by itself that the one implies the other
    return conditions


def _anyone_waits(connection: sa.Connection, tables: Tables, tasks: Iterable[str]) -> bool:
    jobs = tables.jobs
    of_tasks = text_in(jobs.c.task, sa.bindparam("tasks", type_=TextArray()))
    waits = sa.exists().where(of_tasks, jobs.c.waits_for.is_not(None), jobs.c.waits_for != WAITS_FOR_ORDER)
    return bool(connection.execute(sa.select(waits), {"tasks": sorted(tasks)}).scalar_one())


@dataclass(frozen=True, slots=True)
class Offered:
    """How many jobs were let go, by their task and what they waited for; and how many others have locked, so that they
    have to be found again."""

    jobs: Counter[tuple[str, str]]
    missed: Counter[tuple[str, str]]


def offer_slots(connection: sa.Connection, tables: Tables, slots: Mapping[tuple[str, str], int]) -> Offered:
    """Let the next so many jobs that wait for each of these be judged again."""
    document = json.dumps([{"task": task, "waits_for": what, "n": n} for (task, what), n in sorted(slots.items())])
    rows = connection.execute(_next_waiting(tables), {"slots": document}).all()
    ids = sorted(row.id for row in rows if row.id is not None)
    if ids:
        connection.execute(_let_be_judged(tables), {"ids": ids})
    found = Counter((row.task, row.waits_for) for row in rows if row.id is not None)
    there = Counter({(row.task, row.waits_for): row.there for row in rows})
    return Offered(found, there - found)


@cache
def _next_waiting(tables: Tables) -> sa.Select[Any]:
    jobs = tables.jobs
    slots = dialect.rows(
        tables.dialect_name,
        "slots",
        sa.column("task", sa.Text),
        sa.column("waits_for", sa.Text),
        sa.column("n", sa.Integer),
    )
    return dialect.first_of_each(
        tables.dialect_name,
        jobs,
        slots,
        sa.and_(jobs.c.task == slots.c.task, jobs.c.waits_for == slots.c.waits_for),
        [jobs.c.priority.desc(), jobs.c.run_at, jobs.c.id],
    )


@cache
def _let_be_judged(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    return sa.update(jobs).where(id_among(jobs.c.id, IDS)).values(waits_for=sa.null(), slot=OFFERED)


def leaders_of(connection: sa.Connection, tables: Tables, queue: str, keys: Iterable[str]) -> dict[str, int]:
    """Of each ordering key: the job that runs, otherwise its first that is not final, if there is one."""
    document = json.dumps([{"key": key} for key in sorted(keys)])
    found = connection.execute(_leaders(tables), {"of_queue": queue, "turns": document})
    return {row.key: row.id for row in found if row.id is not None}


@cache
def _leaders(tables: Tables) -> sa.Select[Any]:
    keys = dialect.rows(tables.dialect_name, "turns", sa.column("key", sa.Text))
    leader = leader_of(tables, tables.jobs.c.ordering_key == keys.c.key).correlate(keys).scalar_subquery()
    return sa.select(keys.c.key, leader.label("id"))


def leader_of(tables: Tables, of_key: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """The job of a key that runs, otherwise the first that is not final. One that was replayed may be earlier than the
    one that runs."""
    jobs = tables.jobs
    return (
        sa.select(jobs.c.id)
        .where(jobs.c.queue == sa.bindparam("of_queue", type_=sa.Text()), of_key, sa.text(IN_ORDER))
        .order_by(jobs.c.status.desc(), jobs.c.id)  # as the index has it
        .limit(sa.literal_column("1"))
    )


def lead(connection: sa.Connection, tables: Tables, queue: str, leaders: Mapping[str, int]) -> set[int]:
    """Note that others wait behind these jobs, by ordering key, and let them be judged if they waited themselves; those
    that lead now. The others are locked, final, or have got another key."""
    rows = [{"id": job_id, "key": key} for key, job_id in sorted(leaders.items(), key=lambda leader: leader[1])]
    parameters = {"of_queue": queue, "leaders": json.dumps(rows)}
    return set(connection.execute(_lead_jobs(tables), parameters).scalars())


@cache
def _lead_jobs(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    leaders = dialect.rows(tables.dialect_name, "leaders", sa.column("id", sa.BigInteger), sa.column("key", sa.Text))
    locked = (
        sa.select(jobs.c.id)
        .join(leaders, jobs.c.id == leaders.c.id)
        .where(
            # An enqueue that replaces a job may have given it another queue or key since it was found.
            jobs.c.queue == sa.bindparam("of_queue", type_=sa.Text()),
            jobs.c.ordering_key == leaders.c.key,
            sa.text("status IN ('pending', 'running')"),
        )
        .with_for_update(of=jobs, skip_locked=True)
    )
    return (
        sa.update(jobs)
        .where(id_in(jobs.c.id, locked.scalar_subquery()))
        .values(
            leads_order=sa.true(),
            waits_for=sa.case((jobs.c.waits_for == WAITS_FOR_ORDER, sa.null()), else_=jobs.c.waits_for),
        )
        .returning(jobs.c.id)
    )
