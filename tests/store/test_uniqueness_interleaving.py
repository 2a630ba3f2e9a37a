"""An enqueue of a key, and others at the job that has it, in every order of their steps, committed or rolled back.

There is never a second open job, every answer is right, and nobody is held up by a conflict. See interleaving.py.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from typing import Any

import audit
import pytest
import sqlalchemy as sa
from interleaving import Work, orders, play, unexpected
from jobs import add_one, claim, claim_one, completed, died, expire, put, retried, row, statuses
from sqlalchemy.exc import OperationalError

from pgqueue import DuplicateJob, PgQueue, Task, Unique, dead_letter, expiry, operations, retention, store
from pgqueue.job import ClaimedJob
from pgqueue.operations import JobFilter

HOUR = 3600.0
LONG_AGO = sa.literal_column("'2020-01-01 00:00:00.000'")

RULES = ["skip", "raise", "replace"]


def unique_task(pg: PgQueue, period: float | None = None) -> Task[..., Any]:
    def work(key: str, n: int) -> None: ...

    return pg.task(name="work", unique=Unique(by=("key",), period=period))(work)


def enqueues(task: Task[..., Any], n: int, *, key: str = "k", on_conflict: str = "skip", many: bool = False) -> Work:
    made = task.using(on_conflict=on_conflict)

    def enqueue(connection: sa.Connection) -> int:
        if many:
            return made.enqueue_many(connection, [{"key": key, "n": n}, {"key": f"{key}{n}", "n": n}])[0]
        return made.enqueue(connection, key=key, n=n).id

    return enqueue


def clear(pg: PgQueue) -> None:
    with pg.begin() as connection:
        for table in (pg.tables.jobs, pg.tables.job_events, pg.tables.unique_periods):
            connection.execute(sa.delete(table))


def with_key(pg: PgQueue, key: str = "k") -> list[Any]:
    return [found for found in audit.read(pg).jobs if found.payload.get("key") == key]


def open_ones(pg: PgQueue, key: str = "k") -> list[Any]:
    return [found for found in with_key(pg, key) if found.status in audit.OPEN]


def subsets(count: int) -> list[tuple[int, ...]]:
    return [some for size in range(count + 1) for some in itertools.combinations(range(count), size)]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("period", [None, HOUR])
@pytest.mark.parametrize("on_conflict", RULES)
def test_of_two_enqueues_one_stores_and_the_other_learns_of_it(
    pg: PgQueue, on_conflict: str, period: float | None, many: bool
) -> None:
    task = unique_task(pg, period)
    works = [enqueues(task, n, on_conflict=on_conflict, many=many) for n in range(2)]
    for order, rolled_back in itertools.product(orders(2), subsets(2)):
        results = play(pg, works, order, rolled_back=rolled_back)

        told = (order, rolled_back, results)
        refused = [n for n, result in enumerate(results) if isinstance(result, DuplicateJob)]
        assert [result for n, result in enumerate(results) if isinstance(result, Exception) and n not in refused] == []
        kept = [n for n in range(2) if n not in rolled_back and n not in refused]
        kept.sort(key=lambda n: order.index((n, "run")))
        assert [found.id for found in with_key(pg)] == [results[n] for n in kept][:1], told
        assert {results[n] for n in kept} == {found.id for found in with_key(pg)}, told
        if kept:
            assert with_key(pg)[0].payload["n"] == (kept[-1] if on_conflict == "replace" else kept[0]), told
        for n in refused:
            assert on_conflict == "raise", told
            assert 1 - n not in rolled_back, told
        audit.assert_sound(audit.read(pg))
        clear(pg)


def claims(pg: PgQueue, _: Any = None) -> Work:
    return lambda connection: store.claim(
        connection, pg.tables, queue="default", worker="w", token=uuid.uuid4(), limit=10, lease=60
    )


def sweeps(pg: PgQueue, job: ClaimedJob) -> Work:
    expire(pg, [job.id])
    return lambda connection: store.sweep(connection, pg.tables, limit=10, actor="s")


def expires(pg: PgQueue, job_id: int) -> Work:
    put(pg, [job_id], expires_at=LONG_AGO)
    return lambda connection: expiry.expire(connection, pg.tables, actor="s")


def cancels(pg: PgQueue, job_id: int) -> Work:
    return lambda connection: operations.cancel_job(connection, pg.tables, job_id, actor="ann", reason=None, force=True)


def deletes(pg: PgQueue, job_id: int) -> Work:
    return lambda connection: operations.delete_job(connection, pg.tables, job_id, actor="ann", reason=None)


def edits(pg: PgQueue, job_id: int) -> Work:
    return lambda connection: pg.edit(job_id, payload={"key": "other", "n": 5}, session=connection)


def replays(pg: PgQueue, *ids: int) -> Work:
    return lambda connection: dead_letter.replay_ids(connection, pg.tables, ids, actor="ann", reason=None)


def ends(how: Callable[[ClaimedJob], Any]) -> Callable[[PgQueue, ClaimedJob], Work]:
    return lambda pg, job: lambda connection: store.finish(connection, pg.tables, [how(job)], actor="worker-1")


AT_A_PENDING_JOB: dict[str, Callable[[PgQueue, int], Work]] = {
    "claim": claims,
    "expire": expires,
    "cancel": cancels,
    "delete": deletes,
    "edit": edits,
}
AT_A_RUNNING_JOB: dict[str, Callable[[PgQueue, Any], Work]] = {
    "complete": ends(completed),
    "retry": ends(retried),
    "die": ends(died),
    "sweep": sweeps,
    "cancel": lambda pg, job: cancels(pg, job.id),
}
OTHERS = [
    *(("pending", name, None) for name in AT_A_PENDING_JOB),
    *(("running", name, None) for name in AT_A_RUNNING_JOB),
    *(("pending", name, HOUR) for name in ("cancel", "delete", "edit")),
    *(("running", name, HOUR) for name in ("complete", "die")),
]


@pytest.mark.parametrize(("status", "other", "period"), OTHERS)
def test_an_enqueue_and_whatever_happens_to_the_job_that_has_its_key_agree(
    pg: PgQueue, status: str, other: str, period: float | None
) -> None:
    task = unique_task(pg, period)
    for on_conflict, order, rolled_back in itertools.product(RULES, orders(2), [(), (1,)]):
        with pg.begin() as connection:
            holder = task.enqueue(connection, key="k", n=0).id
        if status == "pending":
            does = AT_A_PENDING_JOB[other](pg, holder)
        else:
            does = AT_A_RUNNING_JOB[other](pg, claim_one(pg))

        answer, result = play(pg, [enqueues(task, 1, on_conflict=on_conflict), does], order, rolled_back=rolled_back)

        told = (on_conflict, order, rolled_back, answer, result)
        refused = isinstance(answer, DuplicateJob)
        assert unexpected([] if refused else [answer]) == [], told
        assert unexpected([result]) == [], told
        stored = {found.id: found for found in audit.read(pg).jobs}
        assert len(open_ones(pg)) <= 1, told
        if refused:
            assert on_conflict != "skip", told
        elif answer == holder:
            assert on_conflict != "raise", told
            if on_conflict == "replace" and holder in stored and stored[holder].payload["key"] == "k":
                assert stored[holder].payload["n"] == 1, told
        else:
            assert stored[answer].payload == {"key": "k", "n": 1}, told
            assert holder not in [found.id for found in open_ones(pg)], told
            assert not (period and holder in stored and stored[holder].status == "completed"), told
        audit.assert_sound(audit.read(pg))
        clear(pg)


@pytest.mark.parametrize("on_conflict", ["skip", "replace"])
def test_a_replay_of_many_and_an_enqueue_of_one_of_their_keys_agree(pg: PgQueue, on_conflict: str) -> None:
    task = unique_task(pg)
    for order, rolled_back in itertools.product(orders(2), subsets(2)):
        with pg.begin() as connection:
            dead = task.enqueue_many(connection, [{"key": key, "n": 0} for key in "jkl"])
        dead.append(add_one(pg, task="plain"))
        with pg.begin() as connection:
            store.finish(connection, pg.tables, [died(job) for job in claim(pg, limit=4)], actor="w")

        batch, answer = play(
            pg, [replays(pg, *dead), enqueues(task, 1, on_conflict=on_conflict)], order, rolled_back=rolled_back
        )

        told = (order, rolled_back, batch, answer)
        assert unexpected([batch, answer]) == [], told
        now = statuses(pg)
        if 0 not in rolled_back:
            others = [dead[0], dead[2], dead[3]]
            assert [now[job_id] for job_id in others] == ["pending"] * 3, told
            assert (dead[1] in batch.done) == (now[dead[1]] == "pending") == (dead[1] not in batch.skipped), told
        if 1 not in rolled_back:
            assert [found.id for found in open_ones(pg)] == [answer], told
        assert len(open_ones(pg)) == min(1, 2 - len(rolled_back)), told
        audit.assert_sound(audit.read(pg))
        clear(pg)


def test_an_expiry_a_claim_and_a_cancel_end_a_job_once(pg: PgQueue) -> None:
    for order in itertools.islice(orders(3), 0, None, 3):
        job_id = add_one(pg)

        expired, claimed, cancelled = play(pg, [expires(pg, job_id), claims(pg), cancels(pg, job_id)], order)

        told = (order, expired, claimed, cancelled)
        assert unexpected([expired, claimed, cancelled]) == [], told
        assert claimed == [], told
        assert (row(pg, job_id).status == "dead") == (expired == [job_id]) == (cancelled != "cancelled"), told
        assert len(pg.job_events(job_id)) == 1, told
        audit.assert_sound(audit.read(pg))
        clear(pg)


def test_a_dead_job_is_replayed_or_pruned_or_purged_and_never_two_of_them(pg: PgQueue) -> None:
    for order in itertools.islice(orders(3), 1, None, 3):
        job_id = add_one(pg, unique_key="a")
        with pg.begin() as connection:
            store.finish(connection, pg.tables, [died(claim_one(pg))], actor="w")
        put(pg, [job_id], prune_at=LONG_AGO)

        replayed, pruned, purged = play(
            pg,
            [
                replays(pg, job_id),
                lambda connection: retention.prune_due(connection, pg.tables),
                lambda connection: dead_letter.purge_dead(
                    connection, pg.tables, JobFilter(), after_id=0, limit=10, actor="ann", reason=None
                ),
            ],
            order,
        )

        told = (order, replayed, pruned, purged)
        assert unexpected([replayed, pruned, purged]) == [], told
        assert [*replayed.done, *[job_id] * pruned, *purged.done] == [job_id], told
        assert statuses(pg) == ({job_id: "pending"} if replayed.done else {}), told
        clear(pg)


# Transactions that keep the picture of their beginning -----------------------------------------------------------


@pytest.mark.parametrize("then", ["it is pending", "it is running", "it has completed", "it is dead"])
@pytest.mark.parametrize("period", [None, HOUR])
@pytest.mark.parametrize("on_conflict", RULES)
@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_transaction_that_does_not_see_the_other_job_is_told_to_be_tried_again(
    pg: PgQueue, isolation: str, on_conflict: str, period: float | None, then: str
) -> None:
    task = unique_task(pg, period)
    engine = sa.create_engine(pg.url).execution_options(isolation_level=isolation)
    with engine.connect() as late:
        late.execute(sa.text("SELECT count(*) FROM pgqueue.jobs"))
        with pg.begin() as connection:
            other = task.enqueue(connection, key="k", n=0).id
        if then != "it is pending":
            job = claim_one(pg)
        if then in ("it has completed", "it is dead"):
            with pg.begin() as connection:
                end = completed(job) if then == "it has completed" else died(job)
                store.finish(connection, pg.tables, [end], actor="w")

        answer: Any
        try:
            answer = enqueues(task, 1, on_conflict=on_conflict)(late)
            late.commit()
        except OperationalError as error:
            answer = getattr(error.orig, "sqlstate", None)
            late.rollback()
    engine.dispose()

    if then in ("it is pending", "it is running") or (then == "it has completed" and period):
        assert answer == "40001"
        assert list(statuses(pg)) == [other]
    else:
        assert answer == "40001" or statuses(pg)[answer] == "pending"
    assert len(open_ones(pg)) <= 1


def test_a_transaction_that_still_sees_the_other_job_pending_stores_its_own_once_that_has_ended(pg: PgQueue) -> None:
    task = unique_task(pg)
    engine = sa.create_engine(pg.url).execution_options(isolation_level="REPEATABLE READ")
    with pg.begin() as connection:
        other = task.enqueue(connection, key="k", n=0).id
    with engine.connect() as late:
        late.execute(sa.text("SELECT count(*) FROM pgqueue.jobs"))
        with pg.begin() as connection:
            store.finish(connection, pg.tables, [completed(claim_one(pg))], actor="w")
        answer = enqueues(task, 1)(late)
        late.commit()
    engine.dispose()

    assert statuses(pg) == {other: "completed", answer: "pending"}


@pytest.mark.parametrize("period", [None, HOUR])
@pytest.mark.parametrize("many", [False, True])
def test_a_savepoint_that_is_rolled_back_takes_the_key_and_its_period_back(
    pg: PgQueue, period: float | None, many: bool
) -> None:
    task = unique_task(pg, period)
    with pg.engine.connect() as connection:
        nested = connection.begin_nested()
        first = enqueues(task, 0, many=many)(connection)
        nested.rollback()
        second = enqueues(task, 1, many=many)(connection)
        third = enqueues(task, 2)(connection)
        connection.commit()

    assert first != second == third
    assert [found.payload["n"] for found in with_key(pg)] == [1]
