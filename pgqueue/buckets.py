"""The tokens of rates: what is in a bucket, what jobs take from it, and who is next when a token has come."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from pgqueue import dialect, offers
from pgqueue.admission import WAITS_FOR_RATE, Admission, Bucket
from pgqueue.dialect import TextArray, now, seconds_since, text_in
from pgqueue.gating import Gates, Rates
from pgqueue.schema import Tables
from pgqueue.store import QUEUE, TASK

#: The most buckets whose next token one claim hands on.
RIPE_BUCKETS_MAX = 200


def look(
    connection: sa.Connection, tables: Tables, gates: Gates, jobs: Iterable[Any]
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
    rows = dialect.execute(connection, _find(tables), parameters)
    tokens = {
        (row.scope, row.name, row.key): _tokens(row.tokens, row.seconds, *rates[row.scope, row.name])
        for row in rows
        if row.overdue is None
    }
    return tokens, sorted((row for row in rows if row.overdue is not None), key=lambda row: -row.overdue)


@cache
def _find(tables: Tables) -> Any:
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


def columns_of(tables: Tables, candidate: sa.FromClause) -> list[sa.ColumnElement[Any]]:
    """For a look at jobs: what `tokens_seen` reads of the bucket of each, and whether jobs wait for any token."""
    buckets = tables.rate_buckets
    same = [
        buckets.c.scope == TASK,
        buckets.c.name == candidate.c.task,
        buckets.c.key == sa.func.coalesce(candidate.c.rate_key, sa.literal_column("''")),
    ]
    columns: list[sa.ColumnElement[Any]] = [
        sa.select(column).where(*same).correlate(candidate).scalar_subquery().label(column.name)
        for column in (buckets.c.tokens, seconds_since(buckets.c.filled_at).label("seconds"))
    ]
    awaited = sa.exists().where(buckets.c.ripe_at.is_not(None))  # by whomever: see _find
    return [*columns, awaited.label("tokens_awaited")]


def tokens_seen(jobs: Sequence[Any], rates: Rates) -> dict[Bucket, float]:
    """As `look`, by what was read of the jobs' buckets together with them."""
    of_buckets = {("task", job[1], job[4] or ""): job for job in jobs}  # many are in one
    return {
        bucket: _tokens(job.tokens, job.seconds, *rates[bucket[:2]])
        for bucket, job in of_buckets.items()
        if bucket[:2] in rates and job.tokens is not None
    }


def _tokens(left: float, seconds: float, rate: float, burst: int) -> float:
    """What a bucket holds, `seconds` after it held `left`."""
    # Another claim may have written after this transaction began: then no time has passed.
    return min(float(burst), left + max(0.0, seconds) * rate)


def offer_tokens(
    connection: sa.Connection, tables: Tables, gates: Gates, awaited: Sequence[Any]
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
        wanted[row.name, WAITS_FOR_RATE + row.key] = max(1, min(int(have), offers.FREED_JOBS_MAX))
    offered = offers.offer_slots(connection, tables, wanted)
    settled = [
        {"name": name, "key": what.removeprefix(WAITS_FOR_RATE)}
        for (name, what), tokens in wanted.items()
        if offered.jobs[name, what] < tokens and not offered.missed[name, what]
    ]
    if settled:
        connection.execute(_settle(tables), {"settled": json.dumps(settled)})
    return next_token, bool(offered.jobs)


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


def spent(gates: Gates, decision: Admission, have: Mapping[Bucket, float]) -> tuple[list[dict[str, Any]], float | None]:
    """What is left in the buckets after the admitted jobs have taken theirs; and seconds until the next token that jobs
    wait for."""
    rows: list[dict[str, Any]] = []
    rates = gates.rates
    for bucket in sorted({*decision.spent, *decision.wanting}):
        rate, burst = rates[bucket[:2]]
        left = have.get(bucket, float(burst)) - decision.spent.get(bucket, 0)
        ripe = max(0.0, 1.0 - left) / rate if bucket in decision.wanting else None
        rows.append({"scope": bucket[0], "name": bucket[1], "key": bucket[2], "tokens": left, "ripe": ripe})
    return rows, min((row["ripe"] for row in rows if row["ripe"] is not None), default=None)


@cache
def put(tables: Tables) -> Any:
    """Write the rows that `spent` gives: the parameter is `buckets`."""
    buckets = tables.rate_buckets
    rows = dialect.rows(
        tables.dialect_name,
        "buckets",
        *(sa.column(name, sa.Text) for name in ("scope", "name", "key")),
        sa.column("tokens", sa.Double),
        sa.column("ripe", sa.Double),
    )
    ripe_at = sa.case((rows.c.ripe.is_not(None), dialect.seconds_from_now(rows.c.ripe)))
    insert = dialect.insert(tables.dialect_name, buckets).from_select(
        ["scope", "name", "key", "tokens", "filled_at", "ripe_at"],
        sa.select(rows.c.scope, rows.c.name, rows.c.key, rows.c.tokens, now(), ripe_at).where(sa.true()),
    )
    return insert.on_conflict_do_update(
        index_elements=[buckets.c.scope, buckets.c.name, buckets.c.key],
        set_={
            "tokens": insert.excluded.tokens,
            "filled_at": sa.case(
                (buckets.c.filled_at > insert.excluded.filled_at, buckets.c.filled_at), else_=insert.excluded.filled_at
            ),
            # Of a task's bucket it goes away once nothing waits for it: see offer_tokens.
            "ripe_at": sa.case(
                (buckets.c.scope == TASK, sa.func.coalesce(insert.excluded.ripe_at, buckets.c.ripe_at)),
                else_=insert.excluded.ripe_at,
            ),
        },
    )
