"""Claims that keep limits: how many jobs run at once, how many start in a time, and which goes first.

All of it happens in the claim. A claim from a queue with limits locks the rows of `limits` that concern it, so it is
the only one that decides about them; then it

1. finds slots that came free: jobs that hold one and run no more, whatever ended them, are found by the index `slots`;
2. offers each of these to the next job that waits for it;
3. looks at the due jobs, lets `admission.admit` decide which of them may start, and claims those;
4. sets the others aside (`waits_for`), out of the index that claims go by, until a later claim offers them a slot.

So a job that waits costs later claims nothing, however many there are, and neither finishing, nor sweeping, nor
cancelling has to know about limits: a slot is in use exactly while its job is running, and cannot leak.

What keeps waiting jobs from waiting for ever: for each slot that a waiting job waits for there is a job that holds it
or was offered it. Whichever way that job leaves, it is found as they are, and the offer goes on to the next.
Those who wait behind an earlier job of their ordering key are offered their turn when that one is final; it is marked
(`leads_order`) under its row's lock when the first one waits behind it.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, Literal

import sqlalchemy as sa

from pgqueue import dialect, store
from pgqueue.admission import (
    WAITS_FOR_KEY,
    WAITS_FOR_ORDER,
    WAITS_FOR_RATE,
    WAITS_FOR_TASK,
    Admission,
    Bucket,
    Candidate,
    InUse,
    Limits,
    admit,
)
from pgqueue.dialect import IdArray, TextArray, id_among, id_in, now, seconds_since, text_in
from pgqueue.engine import LOCK_NOT_AVAILABLE, LockNotWon, idle_milliseconds, waiting_at_most
from pgqueue.job import FINAL_STATUSES, ClaimedJob, EventType
from pgqueue.schema import ENDED, HOLDS_SLOT, IN_ORDER, SLOTS, Tables
from pgqueue.store import HELD, IDS, PENDING, RUNNING

#: How long a claim waits for those that go before it, and how long it may do nothing before the server ends it. It
#: takes milliseconds.
CLAIM_WAITS_SECONDS = 0.5
CLAIM_IDLE_SECONDS = 5.0

#: How many due jobs a claim looks at beyond those it wants, because some may have to wait.
LOOK_AHEAD = 32

#: How often one claim looks at more due jobs, when all it looked at had to wait.
ROUNDS_MAX = 8

#: The most slots that one claim finds free, and jobs it lets go when limits were lifted.
FREED_JOBS_MAX = 1_000

#: With so many slots to offer, it is asked first whether anybody waits for one.
SLOTS_MANY = 20

#: One claim in so many looks for slots that nobody was told of, however much there is to claim.
LOOK_AROUND_EVERY = 16

#: So many of the jobs that wait, and of those in an order, it goes on to then.
AROUND_JOBS_MAX = 300

#: Among so many of the jobs that wait for a task, an idle claim looks for some of its queue.
IDLE_JOBS_MAX = 1_000

#: How often, and how long each time, a new limit waits for jobs that are running and locked.
COUNT_TRIES, COUNT_WAITS_SECONDS = 50, 0.1

#: The most buckets whose next token one claim hands on.
RIPE_BUCKETS_MAX = 200

#: The most holders of slots of which one claim notes that others wait for their end.
AWAITED_MAX = 1_000

#: Two counts in one number, from one probe of the index: see _slots_in_use.
TRACKED = 2**32

QUEUE: sa.ColumnClause[str] = sa.literal_column("'queue'")
TASK: sa.ColumnClause[str] = sa.literal_column("'task'")
AWAITED: sa.ColumnClause[str] = sa.literal_column("'awaited'")
OFFERED: sa.ColumnClause[str] = sa.literal_column("'offered'")
FINAL: sa.ColumnClause[str] = sa.literal_column("(" + ", ".join(f"'{status}'" for status in FINAL_STATUSES) + ")")

#: Jobs that others wait for, and that hold or lead no more.
_ENDED = sa.text(f"({ENDED})")

#: The limits that concern claims.
_OF_CLAIMS = ("concurrency", "key_concurrency", "rate", "burst", "promote_after")

_COLUMNS = ("concurrency", "key_concurrency", "rate", "burst", "max_depth", "on_full", "promote_after")


# Claims ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LimitedClaim:
    """What a claim under limits found."""

    jobs: list[ClaimedJob] = field(default_factory=list)
    kept: bool = True  #: False: there are no limits to keep, so that a plain claim is the right one
    again: bool = False  #: there are more due jobs to look at
    next_token_seconds: float | None = None  #: until a job that waits for its rate may start


#: Tokens per second, and the most that a bucket holds; by scope and name.
_Rates = dict[tuple[str, str], tuple[float, int]]


@dataclass(frozen=True, slots=True)
class _Gates:
    """The limits that a claim has locked."""

    queue_name: str
    queue: Limits | None
    tasks: Mapping[str, Limits]
    ordered: bool
    releasing: Sequence[str]  # tasks
    something_ended: bool  # that others wait for; as it was when the claim began to wait for the locks

    @property
    def holding(self) -> list[str] | None:
        """The tasks whose jobs hold a slot while they run; None: all."""
        if self.queue is not None and self.queue.concurrency is not None:
            return None
        return [name for name, limits in self.tasks.items() if limits.holds_slots]

    @property
    def limited(self) -> list[str]:
        """The tasks of which only so many may run."""
        return [name for name, limits in self.tasks.items() if limits.concurrency is not None]

    @property
    def keyed(self) -> bool:
        return any(limits.key_concurrency is not None for limits in self.tasks.values())

    def slots(self, slot: tuple[str, str]) -> int:
        """How many of a slot there are."""
        task, what = slot
        limits = self.tasks[task]
        return (limits.concurrency if what == WAITS_FOR_TASK else limits.key_concurrency) or 0

    @property
    def rates(self) -> _Rates:
        of_tasks: _Rates = {
            ("task", name): (limits.rate, limits.burst)
            for name, limits in self.tasks.items()
            if limits.rate is not None and limits.burst is not None
        }
        if self.queue is not None and self.queue.rate is not None and self.queue.burst is not None:
            of_tasks["queue", self.queue_name] = (self.queue.rate, self.queue.burst)
        return of_tasks


def claim(
    connection: sa.Connection,
    tables: Tables,
    *,
    queue: str,
    worker: str,
    token: uuid.UUID,
    limit: int,
    lease: float,
    tasks: Sequence[str] | None = None,
    flush: bool = True,
    bounded: bool = True,
) -> LimitedClaim:
    """As `store.claim`, keeping the limits of the queue and of the tasks.

    In a transaction, which should be short: other claims under the same limits wait for its end. So, if `bounded`, the
    server ends it when it is idle for CLAIM_IDLE_SECONDS; and LockNotWon is raised when those that go before it take
    longer than CLAIM_WAITS_SECONDS. Both hold to the end of the transaction, which should do nothing else after this.
    """
    gates = _lock(connection, tables, queue, tasks, min(lease, CLAIM_IDLE_SECONDS) if bounded else None)
    if gates is None:
        return LimitedClaim(kept=False)
    # What it was told with the lock may be old by now: so it looks again before it comes back with too little.
    found_freed = _offer_freed(connection, tables, gates) if gates.something_ended else False
    looked = gates.something_ended
    _let_go(connection, tables, gates)
    if token.int % LOOK_AROUND_EVERY == 0:
        _offer_idle(connection, tables, gates)
    tokens_come: list[float | None] = []
    claimed: list[ClaimedJob] = []
    promoting = gates.queue is not None and gates.queue.promote_after is not None
    looked_for_idle = False
    for number in range(ROUNDS_MAX):
        want = limit - len(claimed)
        at_most = want + (LOOK_AHEAD if number else 0)
        seen = _look(
            connection,
            tables,
            gates,
            tasks,
            limit=at_most,
            flush=flush,
            waited=gates.queue.promote_after if promoting and gates.queue is not None else None,
        )
        if not number and gates.rates:
            next_token, offered = _offer_tokens(connection, tables, gates, seen.awaited)
            tokens_come.append(next_token)
            if offered:
                continue
        decision = admit(
            seen.candidates, want=want, queue_name=queue, queue=gates.queue, tasks=gates.tasks, in_use=seen.in_use
        )
        contended = _contended(seen.candidates, decision)
        spent, next_token = _spent(gates, decision, seen.in_use.tokens)
        tokens_come.append(next_token)
        claimed += _take(
            connection,
            tables,
            gates,
            seen,
            decision,
            contended,
            spent,
            queue=queue,
            worker=worker,
            token=token,
            lease=lease,
        )
        set_aside, again = _set_aside(connection, tables, gates, seen, decision, contended)
        passed_on = _pass_on_offers(connection, tables, seen.candidates, set_aside, again)
        if len(claimed) == limit or len(decision.admitted) + len(decision.waits) < len(seen.candidates):
            break  # it has what it wants, or what the queue's own limits allow
        if len(seen.candidates) < at_most and not passed_on:
            if promoting:
                promoting = False
                continue
            # It has looked at all.
            if not looked:
                looked = True
                found_freed = _offer_freed(connection, tables, gates)
                if found_freed:
                    continue
            if claimed or found_freed or looked_for_idle or not _offer_idle(connection, tables, gates):
                break
            looked_for_idle = True
    else:
        return LimitedClaim(claimed, again=True)
    return LimitedClaim(
        claimed, next_token_seconds=min((seconds for seconds in tokens_come if seconds is not None), default=None)
    )


def are_kept(connection: sa.Connection, tables: Tables, *, queue: str, tasks: Sequence[str] | None) -> bool:
    """Whether claims from the queue have to keep limits."""
    parameters = {"of_queue": queue, **({} if tasks is None else {"tasks": list(tasks)})}
    return bool(connection.execute(_are_kept(tables, tasks is not None), parameters).scalar_one())


@cache
def _are_kept(tables: Tables, of_tasks: bool) -> sa.Select[Any]:
    return sa.select(store.has_limits(tables, sa.bindparam("of_queue", type_=sa.Text()), of_tasks))


def _lock(
    connection: sa.Connection, tables: Tables, queue: str, tasks: Sequence[str] | None, idle_seconds: float | None
) -> _Gates | None:
    """Lock the limits of a queue and of the tasks, in one order; None when there are none to keep."""
    parameters: dict[str, Any] = {"of_queue": queue, **({} if tasks is None else {"tasks": list(tasks)})}
    bounded = idle_seconds is not None
    if idle_seconds is not None and tables.dialect_name == dialect.POSTGRESQL:
        parameters |= {
            "waits": idle_milliseconds(CLAIM_WAITS_SECONDS),
            "milliseconds": idle_milliseconds(idle_seconds),
        }
    try:
        rows = dialect.execute(connection, _lock_limits(tables, tasks is not None, bounded), parameters).all()
    except sa.exc.OperationalError as error:
        if bounded and getattr(error.orig, "sqlstate", None) == LOCK_NOT_AVAILABLE:
            raise LockNotWon from error
        raise
    if not rows:
        return None
    limits = {(row.scope, row.name): Limits(**{name: getattr(row, name) for name in _OF_CLAIMS}) for row in rows}
    return _Gates(
        queue,
        limits.get(("queue", queue)),
        {name: found for (scope, name), found in limits.items() if scope == "task"},
        ordered=any(row.ordered for row in rows if row.scope == "queue"),
        releasing=[row.name for row in rows if row.releasing],
        something_ended=bool(rows[0].something_ended),
    )


@cache
def _lock_limits(tables: Tables, of_tasks: bool, bounded: bool) -> sa.Select[Any]:
    limits = tables.limits
    of_task = limits.c.scope == TASK
    if of_tasks:
        of_task = sa.and_(of_task, text_in(limits.c.name, sa.bindparam("tasks", type_=TextArray())))
    of_queue = sa.and_(limits.c.scope == QUEUE, limits.c.name == sa.bindparam("of_queue", type_=sa.Text()))
    # Of any task and queue: each condition more costs as much planning as the whole look.
    ended = sa.exists(sa.select(sa.literal_column("1")).select_from(tables.jobs).where(_ENDED))
    columns = [limits.c[name] for name in ("scope", "name", *_OF_CLAIMS, "ordered", "releasing")]
    conditions = [sa.or_(of_queue, of_task), store.are_kept(limits)]
    if bounded:
        waits, milliseconds = (sa.bindparam(name, type_=sa.Text()) for name in ("waits", "milliseconds"))
        conditions.append(dialect.holds_up_nobody(tables.dialect_name, waits, milliseconds))
    return (
        sa.select(*columns, ended.label("something_ended"))
        .where(*conditions)
        .order_by(limits.c.scope, limits.c.name)
        .with_for_update(of=limits)
    )


# Slots that came free --------------------------------------------------------------------------------------


def _offer_freed(connection: sa.Connection, tables: Tables, gates: _Gates) -> bool:
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
            _ENDED,
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
        .returning(jobs.c.id, jobs.c.queue, jobs.c.task, jobs.c.concurrency_key, jobs.c.ordering_key)
    )


def _offer(connection: sa.Connection, tables: Tables, freed: Sequence[Any], queue: str) -> None:
    """Offer what these jobs leave: their slots, and their turns where they are of this queue."""
    _pass_on(connection, tables, {row.id: _slots_of(row) for row in freed})
    led: dict[str, list[int]] = {}
    for row in freed:
        if row.ordering_key is not None and row.queue == queue:
            led.setdefault(row.ordering_key, []).append(row.id)
    if led:
        leaders = _leaders_of(connection, tables, queue, led)
        leading = _lead(connection, tables, queue, leaders)
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
    offered = _offer_slots(connection, tables, slots)
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


def _slots_of(row: Any) -> list[tuple[str, str]]:
    """What a job holds while it runs: of its task, and of its key."""
    of_task = [(row.task, WAITS_FOR_TASK)]
    return of_task if row.concurrency_key is None else [*of_task, (row.task, WAITS_FOR_KEY + row.concurrency_key)]


def _anyone_waits(connection: sa.Connection, tables: Tables, tasks: Iterable[str]) -> bool:
    jobs = tables.jobs
    of_tasks = text_in(jobs.c.task, sa.bindparam("tasks", type_=TextArray()))
    waits = sa.exists().where(of_tasks, jobs.c.waits_for.is_not(None), jobs.c.waits_for != WAITS_FOR_ORDER)
    return bool(connection.execute(sa.select(waits), {"tasks": sorted(tasks)}).scalar_one())


def _leaders_of(connection: sa.Connection, tables: Tables, queue: str, keys: Iterable[str]) -> dict[str, int]:
    """Of each ordering key: the job that runs, otherwise its first that is not final, if there is one."""
    document = json.dumps([{"key": key} for key in sorted(keys)])
    found = connection.execute(_leaders(tables), {"of_queue": queue, "turns": document})
    return {row.key: row.id for row in found if row.id is not None}


@dataclass(frozen=True, slots=True)
class _Offered:
    """How many jobs were let go, by their task and what they waited for; and how many others have locked, so that they
    have to be found again."""

    jobs: Counter[tuple[str, str]]
    missed: Counter[tuple[str, str]]


def _offer_slots(connection: sa.Connection, tables: Tables, slots: Mapping[tuple[str, str], int]) -> _Offered:
    """Let the next so many jobs that wait for each of these be judged again."""
    document = json.dumps([{"task": task, "waits_for": what, "n": n} for (task, what), n in sorted(slots.items())])
    rows = connection.execute(_next_waiting(tables), {"slots": document}).all()
    ids = sorted(row.id for row in rows if row.id is not None)
    if ids:
        connection.execute(_let_be_judged(tables), {"ids": ids})
    found = Counter((row.task, row.waits_for) for row in rows if row.id is not None)
    there = Counter({(row.task, row.waits_for): row.there for row in rows})
    return _Offered(found, there - found)


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


def _offer_idle(connection: sa.Connection, tables: Tables, gates: _Gates) -> bool:
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


def _next_lines(connection: sa.Connection, tables: Tables, gates: _Gates, place: _Place) -> list[Any]:
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


def _next_turns(connection: sa.Connection, tables: Tables, gates: _Gates, place: _Place) -> list[Any]:
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
    columns = [first.c[name] for name in ("id", "task", "concurrency_key", "ordering_key", "rate_key")]
    return sa.select(*columns).where(first.c.queue == sa.bindparam("of_queue", type_=sa.Text())).limit(LOOK_AHEAD)


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


def _let_go(connection: sa.Connection, tables: Tables, gates: _Gates) -> None:
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


# Tokens ----------------------------------------------------------------------------------------------------


def _offer_tokens(
    connection: sa.Connection, tables: Tables, gates: _Gates, awaited: Sequence[Any]
) -> tuple[float | None, bool]:
    """Where a token has come that jobs wait for, let as many of these be judged again; seconds until the next one
    that is still to come, and whether there was a job for any that came."""
    rates = gates.rates
    ripe = [row for row in awaited if row.overdue >= 0 and row.scope == "task"]
    next_token = next((-row.overdue for row in awaited if row.overdue < 0), None)
    if not ripe:
        return next_token, False
    wanted = {}
    for row in ripe:
        have = _tokens(row.tokens, row.seconds, *rates["task", row.name])
        wanted[row.name, WAITS_FOR_RATE + row.key] = max(1, min(int(have), FREED_JOBS_MAX))
    offered = _offer_slots(connection, tables, wanted)
    settled = [
        {"name": name, "key": what.removeprefix(WAITS_FOR_RATE)}
        for (name, what), tokens in wanted.items()
        if offered.jobs[name, what] < tokens and not offered.missed[name, what]
    ]
    if settled:
        connection.execute(_settle(tables), {"settled": json.dumps(settled)})
    return next_token, bool(offered.jobs)


@cache
def _look_at_buckets(tables: Tables) -> Any:
    """The buckets that are asked for; and those of which jobs wait for a token, with how long that is overdue."""
    buckets = tables.rate_buckets
    names = ("scope", "name", "key")
    wanted = dialect.rows(tables.dialect_name, "buckets", *(sa.column(name, sa.Text) for name in names))
    columns = [*(buckets.c[name] for name in (*names, "tokens")), seconds_since(buckets.c.filled_at).label("seconds")]
    asked = sa.select(*columns, sa.cast(sa.null(), sa.Double).label("overdue")).select_from(
        wanted.join(buckets, sa.and_(*(buckets.c[name] == wanted.c[name] for name in names)))
    )
    awaited = (
        sa.select(*columns, seconds_since(buckets.c.ripe_at).label("overdue"))
        .where(
            sa.or_(
                sa.and_(buckets.c.scope == TASK, text_in(buckets.c.name, sa.bindparam("tasks", type_=TextArray()))),
                sa.and_(buckets.c.scope == QUEUE, buckets.c.name == sa.bindparam("of_queue", type_=sa.Text())),
            ),
            buckets.c.ripe_at.is_not(None),
        )
        .order_by(buckets.c.ripe_at)
        .limit(RIPE_BUCKETS_MAX)
        .subquery("awaited")
    )
    return sa.union_all(asked, sa.select(awaited))


@cache
def _settle(tables: Tables) -> sa.Update:
    """Nothing waits for these buckets any more."""
    buckets = tables.rate_buckets
    rows = dialect.rows(tables.dialect_name, "settled", sa.column("name", sa.Text), sa.column("key", sa.Text))
    return (
        sa.update(buckets)
        .where(buckets.c.scope == TASK, buckets.c.name == rows.c.name, buckets.c.key == rows.c.key)
        .values(ripe_at=sa.null())
    )


def _tokens(left: float, seconds: float, rate: float, burst: int) -> float:
    """What a bucket holds, `seconds` after it held `left`."""
    # Another claim may have written after this transaction began: then no time has passed.
    return min(float(burst), left + max(0.0, seconds) * rate)


def _spent(
    gates: _Gates, decision: Admission, have: Mapping[Bucket, float]
) -> tuple[list[dict[str, Any]], float | None]:
    """What is left in the buckets after the admitted jobs have taken theirs; and seconds until the next token that jobs
    wait for."""
    rows: list[dict[str, Any]] = []
    for bucket in sorted({*decision.spent, *decision.wanting}):
        rate, burst = gates.rates[bucket[:2]]
        left = have.get(bucket, float(burst)) - decision.spent.get(bucket, 0)
        ripe = max(0.0, 1.0 - left) / rate if bucket in decision.wanting else None
        rows.append({"scope": bucket[0], "name": bucket[1], "key": bucket[2], "tokens": left, "ripe": ripe})
    return rows, min((row["ripe"] for row in rows if row["ripe"] is not None), default=None)


@cache
def _put_tokens(tables: Tables) -> Any:
    buckets = tables.rate_buckets
    rows = dialect.rows(
        tables.dialect_name,
        "buckets",
        *(sa.column(name, sa.Text) for name in ("scope", "name", "key")),
        sa.column("tokens", sa.Double),
        sa.column("ripe", sa.Double),
    )
    ripe_at = sa.case((rows.c.ripe.is_not(None), dialect.seconds_from_now(rows.c.ripe)))
    put = dialect.insert(tables.dialect_name, buckets).from_select(
        ["scope", "name", "key", "tokens", "filled_at", "ripe_at"],
        sa.select(rows.c.scope, rows.c.name, rows.c.key, rows.c.tokens, now(), ripe_at).where(sa.true()),
    )
    return put.on_conflict_do_update(
        index_elements=[buckets.c.scope, buckets.c.name, buckets.c.key],
        set_={
            "tokens": put.excluded.tokens,
            "filled_at": sa.case(
                (buckets.c.filled_at > put.excluded.filled_at, buckets.c.filled_at), else_=put.excluded.filled_at
            ),
            # Of a task's bucket it goes away once nothing waits for it: see _offer_tokens.
            "ripe_at": sa.case(
                (buckets.c.scope == TASK, sa.func.coalesce(put.excluded.ripe_at, buckets.c.ripe_at)),
                else_=put.excluded.ripe_at,
            ),
        },
    )


# The decision ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a claim decides about, and by what."""

    candidates: Sequence[Candidate] = ()
    in_use: InUse = field(default_factory=InUse)
    tracked_of_tasks: Mapping[str, int] = field(default_factory=dict)  # of the slots in use: their end will be found
    tracked_of_keys: Mapping[tuple[str, str], int] = field(default_factory=dict)
    awaited: Sequence[Any] = ()  # buckets of which jobs wait for a token


def _look(
    connection: sa.Connection,
    tables: Tables,
    gates: _Gates,
    tasks: Sequence[str] | None,
    *,
    limit: int,
    flush: bool,
    waited: float | None,
) -> _Seen:
    """Due jobs in the order of claims, locked: those that have been due for `waited` seconds. With what is in use."""
    limited = gates.limited
    parameters: dict[str, Any] = {"of_queue": gates.queue_name, "limit": limit}
    if waited is not None:
        parameters["waited"] = waited
    if tasks is not None:
        parameters["tasks"] = list(tasks)
    if limited:
        parameters["limited"] = limited
    counts = _Counts(
        waited=waited is not None,
        of_queue=gates.holding is None,
        of_tasks=bool(limited),
        of_keys=gates.keyed,
        of_order=gates.ordered,
        of_tokens=bool(gates.rates) and ("queue", gates.queue_name) not in gates.rates,
    )
    found = dialect.execute(connection, _look_at_jobs(tables, tasks is not None, flush, counts), parameters).all()
    # A lane that comes into being meanwhile may be seen twice.
    rows: list[Any] = list({row[0]: row for row in found}.values())
    tokens: dict[Bucket, float] = {}
    awaited: Sequence[Any] = ()
    if counts.of_tokens and rows and not rows[0].tokens_awaited:
        tokens = _tokens_seen(rows, gates.rates)
    elif gates.rates:
        tokens, awaited = _look_at_tokens(connection, tables, gates, rows)
    if not rows:
        return _Seen(awaited=awaited)
    candidates = [
        Candidate(row[0], row[1], row[2], row[3], row[4], row[5] == "offered" or row[5] == "awaited") for row in rows
    ]
    of_keys: dict[tuple[str, str], int] = {}
    tracked_of_keys: dict[tuple[str, str], int] = {}
    if counts.of_keys:
        for row in rows:
            if row[6]:
                key = (row[1], row[2])
                tracked_of_keys[key], of_keys[key] = divmod(row[6], TRACKED)
    of_tasks: dict[str, int] = {}
    tracked_of_tasks: dict[str, int] = {}
    if counts.of_tasks:
        for task, count in json.loads(rows[0].of_tasks or "{}").items():
            tracked_of_tasks[task], of_tasks[task] = divmod(count, TRACKED)
    leaders: dict[str, int] = {}
    if counts.of_order:
        leaders = {row[3]: row.leader for row in rows if row[3] is not None}
    elif keys := {job.ordering_key for job in candidates if job.ordering_key is not None}:
        leaders = _leaders_of(connection, tables, gates.queue_name, keys)  # put there by plain SQL
    in_use = InUse(
        rows[0].of_queue if counts.of_queue else 0,
        of_tasks,
        of_keys,
        tokens,
        leaders,
    )
    return _Seen(candidates, in_use, tracked_of_tasks, tracked_of_keys, awaited)


@dataclass(frozen=True)
class _Counts:
    """What a look has to count, and whether of jobs that waited for some time."""

    waited: bool
    of_queue: bool
    of_tasks: bool
    of_keys: bool
    of_order: bool
    of_tokens: bool


@cache
def _look_at_jobs(tables: Tables, of_tasks: bool, flush: bool, counts: _Counts) -> sa.Select[Any]:
    jobs = tables.jobs
    queue = sa.bindparam("of_queue", type_=sa.Text())
    filters = store.claim_filters(tables, queue, of_tasks, flush)
    if counts.waited:
        waited = sa.bindparam("waited", type_=sa.Float())
        filters = sa.and_(filters, jobs.c.run_at <= dialect.seconds_from_now(-waited))
    columns = [jobs.c.id, jobs.c.task, jobs.c.concurrency_key, jobs.c.ordering_key, jobs.c.rate_key, jobs.c.slot]
    candidate = dialect.due(
        tables.dialect_name,
        jobs,
        columns,
        queue,
        filters,
        sa.bindparam("limit", type_=sa.Integer()),
        from_marks=False,
    ).cte("candidate")
    looked: list[sa.ColumnElement[Any]] = list(candidate.c)
    if counts.of_keys:
        of_key = (
            _slots_in_use(
                tables, jobs.c.task == candidate.c.task, jobs.c.concurrency_key == candidate.c.concurrency_key
            )
            .correlate(candidate)
            .scalar_subquery()
        )
        looked.append(sa.case((candidate.c.concurrency_key.is_not(None), of_key)).label("of_key"))  # the first, if any
    if counts.of_order:
        leader = _leader(tables, jobs.c.ordering_key == candidate.c.ordering_key).correlate(candidate).scalar_subquery()
        looked.append(sa.case((candidate.c.ordering_key.is_not(None), leader)).label("leader"))
    if counts.of_queue:
        of_queue = sa.select(sa.func.count()).select_from(jobs).where(*_holds_slot(tables), jobs.c.queue == queue)
        looked.append(of_queue.scalar_subquery().label("of_queue"))
    if counts.of_tasks:
        limited = text_in(jobs.c.task, sa.bindparam("limited", type_=TextArray()))
        of_each = _slots_in_use(tables, limited).add_columns(jobs.c.task).group_by(jobs.c.task).subquery("of_each")
        of_tasks_at_all = dialect.object_of(tables.dialect_name, of_each.c.task, of_each.c.n)
        looked.append(sa.select(of_tasks_at_all).scalar_subquery().label("of_tasks"))
    if counts.of_tokens:
        buckets = tables.rate_buckets
        same = [
            buckets.c.scope == TASK,
            buckets.c.name == candidate.c.task,
            buckets.c.key == sa.func.coalesce(candidate.c.rate_key, sa.literal_column("''")),
        ]
        for column in (buckets.c.tokens, seconds_since(buckets.c.filled_at).label("seconds")):
            looked.append(sa.select(column).where(*same).correlate(candidate).scalar_subquery().label(column.name))
        awaited = sa.exists().where(buckets.c.ripe_at.is_not(None))  # by whomever: see _look_at_buckets
        looked.append(awaited.label("tokens_awaited"))
    return sa.select(*looked)


def _slots_in_use(tables: Tables, *conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """How many slots are in use, plus TRACKED times how many of their holders will be found when they end."""
    jobs = tables.jobs
    tracked = sa.func.count().filter(jobs.c.slot == AWAITED) * sa.literal_column(str(TRACKED))
    return sa.select((sa.func.count() + tracked).label("n")).select_from(jobs).where(*_holds_slot(tables), *conditions)


def _holds_slot(tables: Tables) -> list[sa.ColumnElement[bool]]:
    """A condition on jobs, by index."""
    conditions: list[Any] = [sa.text(HOLDS_SLOT)]
    if tables.dialect_name == dialect.SQLITE:
        conditions.append(sa.text(f"({SLOTS})"))  # does not find by itself that the one implies the other
    return conditions


def _tokens_seen(jobs: Sequence[Any], rates: _Rates) -> dict[Bucket, float]:
    of_buckets = {("task", job[1], job[4] or ""): job for job in jobs}  # many are in one
    return {
        bucket: _tokens(job.tokens, job.seconds, *rates[bucket[:2]])
        for bucket, job in of_buckets.items()
        if bucket[:2] in rates and job.tokens is not None
    }


def _look_at_tokens(
    connection: sa.Connection, tables: Tables, gates: _Gates, jobs: Iterable[Any]
) -> tuple[dict[Bucket, float], Sequence[Any]]:
    """What is in those of the jobs' buckets that there are, the others are full; and the buckets of which jobs wait
    for a token, by when it comes."""
    rates = gates.rates
    if not rates:
        return {}, ()
    wanted: set[Bucket] = {("task", job.task, job.rate_key or "") for job in jobs}
    wanted.add(("queue", gates.queue_name, ""))
    document = [
        dict(zip(("scope", "name", "key"), bucket, strict=True)) for bucket in sorted(wanted) if bucket[:2] in rates
    ]
    parameters = {
        "buckets": json.dumps(document),
        "tasks": [name for scope, name in rates if scope == "task"],
        "of_queue": gates.queue_name,
    }
    rows = dialect.execute(connection, _look_at_buckets(tables), parameters).all()
    tokens = {
        (row.scope, row.name, row.key): _tokens(row.tokens, row.seconds, *rates[row.scope, row.name])
        for row in rows
        if row.overdue is None
    }
    return tokens, sorted((row for row in rows if row.overdue is not None), key=lambda row: -row.overdue)


def _in_use(connection: sa.Connection, tables: Tables, gates: _Gates, candidates: Sequence[Candidate]) -> InUse:
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
    tokens, _ = _look_at_tokens(connection, tables, gates, candidates)
    ordering_keys = {job.ordering_key for job in candidates if job.ordering_key is not None}
    leaders = _leaders_of(connection, tables, gates.queue_name, ordering_keys) if ordering_keys else {}
    return InUse(of_queue, of_tasks, of_keys, tokens, leaders)


@cache
def _count_slots(tables: Tables, of_queue: bool) -> Any:
    """One row for each limited task, each key of a pair, and for the queue."""
    jobs = tables.jobs
    holding = _holds_slot(tables)
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
def _leaders(tables: Tables) -> sa.Select[Any]:
    keys = dialect.rows(tables.dialect_name, "turns", sa.column("key", sa.Text))
    leader = _leader(tables, tables.jobs.c.ordering_key == keys.c.key).correlate(keys).scalar_subquery()
    return sa.select(keys.c.key, leader.label("id"))


def _leader(tables: Tables, of_key: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """The job of a key that runs, otherwise the first that is not final. One that was replayed may be earlier than the
    one that runs."""
    jobs = tables.jobs
    return (
        sa.select(jobs.c.id)
        .where(jobs.c.queue == sa.bindparam("of_queue", type_=sa.Text()), of_key, sa.text(IN_ORDER))
        .order_by(jobs.c.status.desc(), jobs.c.id)  # as the index has it
        .limit(1)
    )


def _contended(candidates: Sequence[Candidate], decision: Admission) -> set[tuple[str, str]]:
    """The slots that jobs have to wait for: task, and what they wait for."""
    waits = decision.waits
    if not waits:
        return set()
    return {
        (job.task, what)
        for job in candidates
        if (what := waits.get(job.id)) is not None and (what == WAITS_FOR_TASK or what.startswith(WAITS_FOR_KEY))
    }


def _take(
    connection: sa.Connection,
    tables: Tables,
    gates: _Gates,
    seen: _Seen,
    decision: Admission,
    contended: Set[tuple[str, str]],
    spent: Sequence[Mapping[str, Any]],
    *,
    queue: str,
    worker: str,
    token: uuid.UUID,
    lease: float,
) -> list[ClaimedJob]:
    """Claim the admitted jobs, and take the tokens that they cost."""
    together = bool(spent and decision.admitted) and tables.dialect_name == dialect.POSTGRESQL
    if spent and not together:
        connection.execute(_put_tokens(tables), {"buckets": json.dumps(spent)})
    if not decision.admitted:
        return []
    parameters: dict[str, Any] = {"ids": sorted(decision.admitted), "worker": worker, "token": token, "lease": lease}
    if gates.holding is not None:
        parameters["tasks"] = gates.holding
    # Behind a job that was offered its slot others may wait.
    parameters["awaited"] = [
        job.id for job in seen.candidates if job.tracked or (contended and not contended.isdisjoint(_slots_of(job)))
    ]
    if together:
        parameters["buckets"] = json.dumps(spent)
    rows = dialect.execute(connection, _take_jobs(tables, gates.holding is None, together), parameters).all()
    return store.claimed_jobs(rows, queue=queue, worker=worker, token=token)


@cache
def _take_jobs(tables: Tables, all_hold: bool, spending: bool) -> sa.Update:
    jobs = tables.jobs
    holds: sa.ColumnElement[Any] = HELD
    if not all_hold:
        holds = sa.case((text_in(jobs.c.task, sa.bindparam("tasks", type_=TextArray())), HELD))
    awaited = id_among(jobs.c.id, sa.bindparam("awaited", type_=IdArray()))
    take = (
        sa.update(jobs)
        .where(id_among(jobs.c.id, IDS))
        .values(store.claim_values(jobs) | {"slot": sa.case((awaited, AWAITED), else_=holds)})
        .returning(*store.claimed_columns(jobs))
    )
    return take.add_cte(_put_tokens(tables).cte("spent")) if spending else take


def _set_aside(
    connection: sa.Connection,
    tables: Tables,
    gates: _Gates,
    seen: _Seen,
    decision: Admission,
    contended: Set[tuple[str, str]],
) -> tuple[dict[int, str], set[int]]:
    """Move what has to wait out of the way of claims; what each of them waits for, and which are to be found again by
    the next claim."""
    waits = decision.waits
    if decision.behind:
        behind = set(decision.behind.values())
        leaders = {key: leader for key, leader in seen.in_use.leaders.items() if leader in behind}
        led = _lead(connection, tables, gates.queue_name, leaders)
        # The row of a leader that is locked may be final in a moment. Those behind it are judged by the next claim.
        waits = {job_id: what for job_id, what in waits.items() if decision.behind.get(job_id) in (None, *led)}
    again: set[int] = set()
    if waits:
        lost = _not_tracked(connection, tables, gates, seen, decision, contended) if contended else ()
        tasks = {job.id: job.task for job in seen.candidates} if lost else {}
        again = {job_id for job_id, what in waits.items() if lost and (tasks[job_id], what) in lost}
        rows = [
            {"id": job_id, "waits_for": what, "again": int(job_id in again)} for job_id, what in sorted(waits.items())
        ]
        connection.execute(_wait(tables), {"waits": json.dumps(rows)})
    return waits, again


def _not_tracked(
    connection: sa.Connection,
    tables: Tables,
    gates: _Gates,
    seen: _Seen,
    decision: Admission,
    contended: Set[tuple[str, str]],
) -> set[tuple[str, str]]:
    """Note on those that hold these slots that others wait for their end. Of which slots not all have been noted.

    Some of their rows are locked, or they have ended since they were counted.
    """
    admitted = set(decision.admitted)
    tracked = Counter(slot for job in seen.candidates if job.id in admitted for slot in _slots_of(job))
    for task, count in seen.tracked_of_tasks.items():
        tracked[task, WAITS_FOR_TASK] += count
    for (task, key), count in seen.tracked_of_keys.items():
        tracked[task, WAITS_FOR_KEY + key] += count

    def missing() -> dict[tuple[str, str], int]:
        lacks = {slot: gates.slots(slot) - tracked[slot] for slot in contended}
        return {slot: count for slot, count in lacks.items() if count > 0}

    of_tasks = [{"task": task, "n": n} for (task, what), n in sorted(missing().items()) if what == WAITS_FOR_TASK]
    if of_tasks:
        marked = connection.execute(_await(tables, of_keys=False), {"slots": json.dumps(of_tasks)})
        for row in marked:
            tracked.update(_slots_of(row))
    of_keys = [
        {"task": task, "key": what.removeprefix(WAITS_FOR_KEY), "n": n}
        for (task, what), n in sorted(missing().items())
        if what != WAITS_FOR_TASK
    ]
    if of_keys:
        marked = connection.execute(_await(tables, of_keys=True), {"slots": json.dumps(of_keys)})
        for row in marked:
            tracked.update(_slots_of(row))
    return set(missing())


@cache
def _await(tables: Tables, of_keys: bool) -> sa.Update:
    """Let the end of jobs be found that hold slots of a task, or of a key; so many that none is missed."""
    jobs = tables.jobs
    texts = [sa.column(name, sa.Text) for name in (("task", "key") if of_keys else ("task",))]
    slots = dialect.rows(tables.dialect_name, "slots", *texts, sa.column("n", sa.Integer))
    same = [jobs.c.task == slots.c.task, *([jobs.c.concurrency_key == slots.c.key] if of_keys else [])]
    holding = (
        sa.select(jobs.c.id)
        .select_from(slots.join(jobs, sa.and_(*same)))
        .where(*_holds_slot(tables), jobs.c.slot == HELD)
        .limit(AWAITED_MAX)
        .with_for_update(of=jobs, skip_locked=True)
    )
    return (
        sa.update(jobs)
        .where(id_in(jobs.c.id, holding.scalar_subquery()))
        .values(slot=AWAITED)
        .returning(jobs.c.task, jobs.c.concurrency_key)
    )


def _pass_on_offers(
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
        job.id: [slot for slot in _slots_of(job) if slot[1] != waits[job.id]]
        for job in candidates
        if job.tracked and waits.get(job.id, WAITS_FOR_TASK) != WAITS_FOR_TASK
    }
    if not left:
        return False
    jobs = tables.jobs
    cleared = sorted(left.keys() - again)
    connection.execute(sa.update(jobs).where(id_among(jobs.c.id, IDS)).values(slot=sa.null()), {"ids": cleared})
    return _pass_on(connection, tables, left)


def _lead(connection: sa.Connection, tables: Tables, queue: str, leaders: Mapping[str, int]) -> set[int]:
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


@cache
def _wait(tables: Tables) -> sa.Update:
    jobs = tables.jobs
    waits = dialect.rows(
        tables.dialect_name,
        "waits",
        sa.column("id", sa.BigInteger),
        sa.column("waits_for", sa.Text),
        sa.column("again", sa.Integer),
    )
    # A job that has slot = 'awaited' while it is pending is taken for one that ended: the next claim offers what it
    # waits for, though nobody was seen to leave it.
    again = sa.case((waits.c.again == sa.literal_column("1"), AWAITED), else_=jobs.c.slot)
    return sa.update(jobs).where(jobs.c.id == waits.c.id).values(waits_for=waits.c.waits_for, slot=again)


# Settings --------------------------------------------------------------------------------------------------

#: Of the jobs that wait for a limit that was raised, so many keys are let go at once; the others as slots come free.
RAISED_KEYS_MAX = 10_000

Scope = Literal["queue", "task"]

#: Who set limits that the application's code declares.
CODE = "code"


@dataclass(frozen=True, slots=True)
class LimitsRow:
    """The limits of a queue or a task as they are kept."""

    scope: Scope
    name: str
    limits: Limits
    declared_by: str  #: "code", or who changed it since
    updated_at: datetime


def list_limits(connection: sa.Connection, tables: Tables) -> list[LimitsRow]:
    """All limits there are, of queues and then of tasks, by name."""
    rows = connection.execute(sa.select(tables.limits).order_by(tables.limits.c.scope, tables.limits.c.name))
    listed = [LimitsRow(row.scope, row.name, _limits_of(row), row.declared_by, row.updated_at) for row in rows]
    return [row for row in listed if row.limits != Limits() or row.declared_by != CODE]


def get_limits(
    connection: sa.Connection, tables: Tables, scope: Scope, name: str, *, lock: bool = False
) -> Limits | None:
    """The limits of a queue or a task; with `lock`, nobody else changes them before this transaction ends."""
    limits = tables.limits
    query = sa.select(limits).where(limits.c.scope == scope, limits.c.name == name)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    return None if row is None else _limits_of(row)


def _limits_of(row: sa.Row[Any]) -> Limits:
    return Limits(**{name: getattr(row, name) for name in _COLUMNS})


def put_limits(
    connection: sa.Connection,
    tables: Tables,
    scope: Scope,
    name: str,
    wanted: Limits,
    *,
    declared_by: str,
    reason: str | None = None,
) -> bool:
    """Set the limits of a queue or a task from now on, for every worker; False when they were so already.

    Jobs that are running count from now on, too. What workers are claiming at this very moment may still pass.
    """
    limits = tables.limits
    row = connection.execute(
        sa.select(limits).where(limits.c.scope == scope, limits.c.name == name).with_for_update()
    ).one_or_none()
    before = Limits() if row is None else _limits_of(row)
    values = {column: getattr(wanted, column) for column in _COLUMNS}
    changed = {"declared_by": declared_by, "updated_at": now(), "releasing": scope == "task"}
    put = dialect.insert(tables.dialect_name, limits).values(scope=scope, name=name, **values, **changed)
    connection.execute(
        put.on_conflict_do_update(index_elements=[limits.c.scope, limits.c.name], set_={**values, **changed})
    )
    if before == wanted:
        return False
    if wanted.holds_slots:
        _count_running(connection, tables, scope, name)
    if scope == "task":
        _raise(connection, tables, name, before, wanted)
    if wanted.rate != before.rate:
        buckets = tables.rate_buckets
        connection.execute(
            sa.update(buckets)
            .where(buckets.c.scope == scope, buckets.c.name == name, buckets.c.ripe_at > now())
            .values(ripe_at=now())
        )
    store.record(
        connection,
        tables,
        [
            {
                "queue": name if scope == "queue" else "*",
                "task": name if scope == "task" else None,
                "event": EventType.LIMIT,
                "actor": declared_by,
                "reason": f"{describe(wanted)}{f': {reason}' if reason else ''}",
            }
        ],
    )
    return True


def describe(limits: Limits) -> str:
    """The limits in words, such as ``concurrency 4, rate 2/s``."""
    parts = [
        f"{column.replace('_', ' ')} {getattr(limits, column):g}{'/s' if column == 'rate' else ''}"
        for column in _COLUMNS
        if column != "on_full" and getattr(limits, column) is not None
    ]
    return ", ".join(parts) or "no limits"


def _count_running(connection: sa.Connection, tables: Tables, scope: Scope, name: str) -> None:
    """Let jobs that run already hold a slot."""
    jobs = tables.jobs
    running = (
        sa.select(jobs.c.id)
        .where(jobs.c.status == RUNNING, (jobs.c.queue if scope == "queue" else jobs.c.task) == name)
        .order_by(jobs.c.id)
        .with_for_update()
    )
    held = sa.update(jobs).where(id_in(jobs.c.id, running.scalar_subquery()), jobs.c.status == RUNNING)
    # A worker that ends several of them takes them in an order of its own: let it go first when we meet half-way.
    for _ in range(COUNT_TRIES):
        with suppress(LockNotWon), waiting_at_most(connection, COUNT_WAITS_SECONDS):
            connection.execute(held.values(slot=AWAITED))
            return
    connection.execute(held.values(slot=AWAITED))


def _raise(connection: sa.Connection, tables: Tables, task: str, before: Limits, wanted: Limits) -> None:
    """Where a limit grew, offer the new slots to jobs that wait for one."""
    slots: dict[tuple[str, str], int] = {}
    more = _growth(before.concurrency, wanted.concurrency)
    if more:
        slots[task, WAITS_FOR_TASK] = more
    more = _growth(before.key_concurrency, wanted.key_concurrency)
    if more:
        jobs = tables.jobs
        waiting = (
            sa.select(jobs.c.waits_for)
            .where(jobs.c.task == task, jobs.c.waits_for.is_not(None), jobs.c.waits_for.like(f"{WAITS_FOR_KEY}%"))
            .distinct()
            .limit(RAISED_KEYS_MAX)
        )
        slots |= {(task, what): more for what in connection.execute(waiting).scalars()}
    if slots:
        _offer_slots(connection, tables, slots)


def _growth(before: int | None, after: int | None) -> int:
    """How many slots more there are; what is no limit any more is let go by claims."""
    return 0 if before is None or after is None else max(0, min(after - before, FREED_JOBS_MAX))


def outdated(
    connection: sa.Connection,
    tables: Tables,
    declared: Mapping[tuple[Scope, str], Limits],
    tasks: Iterable[str],
) -> dict[tuple[Scope, str], Limits]:
    """Of the limits that the code declares: those that are not known yet, and were not changed by somebody since;
    for those of `tasks` that lost theirs: none."""
    known = {(row.scope, row.name): row for row in connection.execute(sa.select(tables.limits))}
    wanted = dict(declared)
    for task in tasks:
        if ("task", task) in known:
            wanted.setdefault(("task", task), Limits())

    def is_outdated(key: tuple[Scope, str]) -> bool:
        row = known.get(key)
        return row is None or (row.declared_by == CODE and _limits_of(row) != wanted[key])

    return {key: wanted[key] for key in sorted(wanted) if is_outdated(key)}


def declare(connection: sa.Connection, tables: Tables, limits: Mapping[tuple[Scope, str], Limits]) -> None:
    """Make known what the code declares, unless somebody changed it since it was looked at."""
    of = tables.limits
    for (scope, name), wanted in limits.items():
        row = sa.select(of.c.declared_by).where(of.c.scope == scope, of.c.name == name).with_for_update()
        if connection.execute(row).scalar_one_or_none() in (None, CODE):
            put_limits(connection, tables, scope, name, wanted, declared_by=CODE)


def note_ordered(connection: sa.Connection, tables: Tables, queue: str) -> bool:
    """Make claims from the queue keep the order of ordering keys, once the transaction commits, and for ever; True
    when they do so already."""
    limits = tables.limits
    of_queue = sa.and_(limits.c.scope == QUEUE, limits.c.name == queue)
    ordered = connection.execute(sa.select(limits.c.ordered).where(of_queue)).scalar_one_or_none()
    if ordered is None:
        put = dialect.insert(tables.dialect_name, limits).values(scope="queue", name=queue, ordered=sa.true())
        connection.execute(put.on_conflict_do_nothing())
    if not ordered:
        connection.execute(sa.update(limits).where(of_queue, sa.not_(limits.c.ordered)).values(ordered=sa.true()))
    return bool(ordered)


def depth(connection: sa.Connection, tables: Tables, queue: str, *, at_most: int) -> int:
    """How many jobs of the queue are pending; it stops counting at `at_most`."""
    jobs = tables.jobs
    of_queue = [jobs.c.queue == queue, jobs.c.status == PENDING]
    counted = 0
    for waits in (jobs.c.waits_for.is_(None), jobs.c.waits_for.is_not(None)):
        some = sa.select(sa.literal_column("1").label("one")).where(*of_queue, waits).limit(at_most).subquery()
        counted += connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one()
    return min(counted, at_most)


# Jobs that are deleted, or get other keys ------------------------------------------------------------------


@contextmanager
def passing_on(connection: sa.Connection, tables: Tables, job_id: int) -> Iterator[None]:
    """Within this a job may be deleted, or get other keys: what it held, was offered, or led goes on to the next.

    It takes the job's row, and no limits: in a transaction of the application that would stop all claims under them.
    It may do so because a claim relies on a job that it judged or saw running, and holds or marks its row for that.
    """
    jobs = tables.jobs
    of_job = sa.select(jobs.c.id, jobs.c.queue, jobs.c.task, jobs.c.concurrency_key, jobs.c.ordering_key).where(
        jobs.c.id == job_id
    )
    before = connection.execute(of_job.with_for_update()).one_or_none()
    yield
    if before is not None and are_kept(connection, tables, queue=before.queue, tasks=[before.task]):
        _offer(connection, tables, [before], before.queue)


def are_done_with(tables: Tables) -> sa.ColumnElement[bool]:
    """A condition on final jobs: no claim has still to find that they ended, so that they may be deleted."""
    jobs, limits = tables.jobs, tables.limits
    names = sa.or_(
        sa.and_(limits.c.scope == QUEUE, limits.c.name == jobs.c.queue),
        sa.and_(limits.c.scope == TASK, limits.c.name == jobs.c.task),
    )
    return sa.or_(store.nobody_waits_for(jobs), ~sa.exists().where(names, store.are_kept(limits)))
