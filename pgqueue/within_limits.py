"""Claims that keep limits: how many jobs run at once, how many start in a time, and which goes first.

All of it happens in the claim. A claim from a queue with limits locks the rows of `limits` that concern it (`gating`),
so it is the only one that decides about them; then it

1. finds slots that came free and that others wait for: their holders run no more, whatever ended them, and are found by
   the index `slots`;
2. offers each of these to the next job that waits for it (`offers`);
3. looks at the due jobs, lets `admission.admit` decide which of them may start, and claims those;
4. sets the others aside (`waits_for`), out of the index that claims go by, until a later claim offers them a slot.

So a job that waits costs later claims nothing, however many there are, and neither finishing, nor sweeping, nor
cancelling has to know about limits: a slot is in use exactly while its job is running, and cannot leak.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import sqlalchemy as sa

from pgqueue import buckets, dialect, gating, offers, overlooked, store
from pgqueue.admission import WAITS_FOR_KEY, WAITS_FOR_TASK, Admission, Bucket, Candidate, InUse, admit
from pgqueue.dialect import IdArray, TextArray, id_among, id_in, text_in
from pgqueue.gating import Gates
from pgqueue.job import ClaimedJob
from pgqueue.schema import Tables
from pgqueue.store import AWAITED, HELD, IDS

#: How many due jobs a claim looks at beyond those it wants, because some may have to wait.
LOOK_AHEAD = 32

#: How often one claim looks at more due jobs, when all it looked at had to wait.
ROUNDS_MAX = 8

#: One claim in so many looks for slots that nobody was told of, however much there is to claim.
LOOK_AROUND_EVERY = 16

#: The most holders of slots of which one claim notes that others wait for their end.
AWAITED_MAX = 1_000

#: Two counts in one number, from one probe of the index: see _slots_in_use.
TRACKED = 2**32


@dataclass(frozen=True, slots=True)
class LimitedClaim:
    """What a claim under limits found."""

    jobs: list[ClaimedJob] = field(default_factory=list)
    kept: bool = True  #: False: there are no limits to keep, so that a plain claim is the right one
    again: bool = False  #: there are more due jobs to look at
    next_token_seconds: float | None = None  #: until a job that waits for its rate may start


def claim_as_needed(
    connection: sa.Connection, tables: Tables, *, expect_limits: bool = False, bounded: bool = True, **asked: Any
) -> LimitedClaim:
    """A plain claim, or one within limits where there are some to keep; begins with what is expected."""
    if not expect_limits and (claimed := store.claim(connection, tables, **asked)):
        return LimitedClaim(claimed, kept=False)
    found = claim(connection, tables, bounded=bounded, **asked)
    if expect_limits and not found.kept:
        return LimitedClaim(store.claim(connection, tables, **asked), kept=False)
    return found


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

    In a transaction, which should be short and do nothing else after this: other claims under the same limits wait for
    its end. How long they do if it is `bounded`, see `gating.lock`. Raises LockNotWon.
    """
    gates = gating.lock(connection, tables, queue, tasks, lease=lease, flush=flush, bounded=bounded)
    if gates is None:
        return LimitedClaim(kept=False)
    # What it was told with the lock may be old by now: so it looks again before it comes back with too little.
    found_freed = offers.offer_freed(connection, tables, gates) if gates.something_ended else False
    looked = gates.something_ended
    offers.let_go(connection, tables, gates)
    if token.int % LOOK_AROUND_EVERY == 0:
        overlooked.look_around(connection, tables, gates)
    tokens_come: list[float | None] = []
    claimed: list[ClaimedJob] = []
    # First those that have been due for so long, whatever their priority.
    waited = gates.queue.promote_after if gates.queue is not None else None
    has_looked_around = False
    for number in range(ROUNDS_MAX):
        want = limit - len(claimed)
        at_most = want + (LOOK_AHEAD if number else 0)
        seen = _look(connection, tables, gates, tasks, limit=at_most, waited=waited)
        if not number and gates.rates:
            next_token, offered = buckets.offer_tokens(connection, tables, gates, seen.awaited)
            tokens_come.append(next_token)
            if offered:
                continue
        decision = admit(
            seen.candidates, want=want, queue_name=queue, queue=gates.queue, tasks=gates.tasks, in_use=seen.in_use
        )
        contended = _contended(seen.candidates, decision)
        spent, next_token = buckets.spent(gates, decision, seen.in_use.tokens)
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
        passed_on = offers.pass_on_offers(connection, tables, seen.candidates, set_aside, again)
        if len(claimed) == limit or len(decision.admitted) + len(decision.waits) < len(seen.candidates):
            break  # it has what it wants, or what the queue's own limits allow
        if len(seen.candidates) < at_most and not passed_on:
            if waited is not None:
                waited = None
                continue
            # It has looked at all.
            if not looked:
                looked = True
                found_freed = offers.offer_freed(connection, tables, gates)
                if found_freed:
                    continue
            if claimed or found_freed or has_looked_around or not overlooked.look_around(connection, tables, gates):
                break
            has_looked_around = True
    else:
        return LimitedClaim(claimed, again=True)
    return LimitedClaim(
        claimed, next_token_seconds=min((seconds for seconds in tokens_come if seconds is not None), default=None)
    )


# What is due, and what is in use ---------------------------------------------------------------------------


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
    gates: Gates,
    tasks: Sequence[str] | None,
    *,
    limit: int,
    waited: float | None,
) -> _Seen:
    """Due jobs in the order of claims, locked: those that have been due for `waited` seconds. With what is in use."""
    limited, rates = gates.limited, gates.rates
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
        of_tokens=bool(rates) and ("queue", gates.queue_name) not in rates,
    )
    found = dialect.execute(connection, _look_at_jobs(tables, tasks is not None, counts), parameters)
    # A lane that comes into being meanwhile may be seen twice.
    rows: list[Any] = list({row[0]: row for row in found}.values())
    tokens: dict[Bucket, float] = {}
    awaited: Sequence[Any] = ()
    if counts.of_tokens and rows and not rows[0].tokens_awaited:
        tokens = buckets.tokens_seen(rows, rates)
    elif rates:
        tokens, awaited = buckets.look(connection, tables, gates, rows)
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
        leaders = offers.leaders_of(connection, tables, gates.queue_name, keys)  # put there by plain SQL
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
def _look_at_jobs(tables: Tables, of_tasks: bool, counts: _Counts) -> sa.Select[Any]:
    jobs = tables.jobs
    queue = sa.bindparam("of_queue", type_=sa.Text())
    filters = store.claim_filters(tables, queue, of_tasks)
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
        leader = (
            offers.leader_of(tables, jobs.c.ordering_key == candidate.c.ordering_key)
            .correlate(candidate)
            .scalar_subquery()
        )
        looked.append(sa.case((candidate.c.ordering_key.is_not(None), leader)).label("leader"))
    if counts.of_queue:
        of_queue = sa.select(sa.func.count()).select_from(jobs).where(*offers.holds_slot(tables), jobs.c.queue == queue)
        looked.append(of_queue.scalar_subquery().label("of_queue"))
    if counts.of_tasks:
        limited = text_in(jobs.c.task, sa.bindparam("limited", type_=TextArray()))
        of_each = _slots_in_use(tables, limited).add_columns(jobs.c.task).group_by(jobs.c.task).subquery("of_each")
        of_tasks_at_all = dialect.object_of(tables.dialect_name, of_each.c.task, of_each.c.n)
        looked.append(sa.select(of_tasks_at_all).scalar_subquery().label("of_tasks"))
    if counts.of_tokens:
        looked += buckets.columns_of(tables, candidate)
    return sa.select(*looked)


def _slots_in_use(tables: Tables, *conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """How many slots are in use, plus TRACKED times how many of their holders will be found when they end."""
    jobs = tables.jobs
    tracked = sa.func.count().filter(jobs.c.slot == AWAITED) * sa.literal_column(str(TRACKED))
    return (
        sa.select((sa.func.count() + tracked).label("n"))
        .select_from(jobs)
        .where(*offers.holds_slot(tables), *conditions)
    )


# Jobs that start -------------------------------------------------------------------------------------------


def _take(
    connection: sa.Connection,
    tables: Tables,
    gates: Gates,
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
        connection.execute(buckets.put(tables), {"buckets": json.dumps(spent)})
    if not decision.admitted:
        return []
    parameters: dict[str, Any] = {"ids": sorted(decision.admitted), "worker": worker, "token": token, "lease": lease}
    if gates.holding is not None:
        parameters["tasks"] = gates.holding
    # Behind a job that was offered its slot others may wait.
    parameters["awaited"] = [
        job.id
        for job in seen.candidates
        if job.tracked or (contended and not contended.isdisjoint(offers.slots_of(job)))
    ]
    if together:
        parameters["buckets"] = json.dumps(spent)
    rows = dialect.execute(connection, _take_jobs(tables, gates.holding is None, together), parameters)
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
    return take.add_cte(buckets.put(tables).cte("spent")) if spending else take


# Jobs that have to wait ------------------------------------------------------------------------------------


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


def _set_aside(
    connection: sa.Connection,
    tables: Tables,
    gates: Gates,
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
        led = offers.lead(connection, tables, gates.queue_name, leaders)
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
    gates: Gates,
    seen: _Seen,
    decision: Admission,
    contended: Set[tuple[str, str]],
) -> set[tuple[str, str]]:
    """Note on those that hold these slots that others wait for their end. Of which slots not all have been noted.

    Some of their rows are locked, or they have ended since they were counted.
    """
    admitted = set(decision.admitted)
    tracked = Counter(slot for job in seen.candidates if job.id in admitted for slot in offers.slots_of(job))
    for task, count in seen.tracked_of_tasks.items():
        tracked[task, WAITS_FOR_TASK] += count
    for (task, key), count in seen.tracked_of_keys.items():
        tracked[task, WAITS_FOR_KEY + key] += count

    def missing() -> dict[tuple[str, str], int]:
        lacks = {slot: gates.slots(slot) - tracked[slot] for slot in contended}
        return {slot: count for slot, count in lacks.items() if count > 0}

    for of_keys in (False, True):  # what is noted for the first may do for the second
        slots = [
            {"task": task, "n": n} | ({"key": what.removeprefix(WAITS_FOR_KEY)} if of_keys else {})
            for (task, what), n in sorted(missing().items())
            if (what != WAITS_FOR_TASK) is of_keys
        ]
        if slots:
            for row in connection.execute(_await(tables, of_keys), {"slots": json.dumps(slots)}):
                tracked.update(offers.slots_of(row))
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
        .where(*offers.holds_slot(tables), jobs.c.slot == HELD)
        .limit(AWAITED_MAX)
        .with_for_update(of=jobs, skip_locked=True)
    )
    return (
        sa.update(jobs)
        .where(id_in(jobs.c.id, holding.scalar_subquery()))
        .values(slot=AWAITED)
        .returning(jobs.c.task, jobs.c.concurrency_key)
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
