"""What people read in SQL: the views, and the state of the queue at a past moment."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from documents import PROJECT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jobs import add, add_one, claim, claim_one, completed, died, expire, finish, make_due, put, retried, row
from jobs import sweep as sweep_up
from support import execute, rows, wait_for

from pgqueue import PgQueue, PgqueueError, expiry, store
from pgqueue.dialect import seconds_from_now

PAGE = PROJECT / "docs" / "auditing.md"


def view(pgq: PgQueue, name: str, rest: str = "", **parameters: Any) -> list[dict[str, Any]]:
    """The rows of a view."""
    prefix = pgq.tables.jobs.fullname.removesuffix("jobs")
    with pgq.reading() as connection:
        found = connection.execute(sa.text(f"SELECT * FROM {prefix}{name} {rest}"), parameters)
        return [dict(row._mapping) for row in found]


def history(pgq: PgQueue, job_id: int) -> list[dict[str, Any]]:
    return view(pgq, "job_history", "WHERE job_id = :id ORDER BY job_id, at, position", id=job_id)


def register(pgq: PgQueue, worker: str, *, queue: str = "default", task: str = "work", silent: float = 0.0) -> None:
    with pgq.begin() as connection:
        values = {"id": worker, "host": "h", "pid": 1, "version": "1", "queues": {queue: 1}, "tasks": [task]}
        store.beat(connection, pgq.tables, values)
        workers = pgq.tables.workers
        ago = seconds_from_now(sa.literal(-silent, sa.Float()))
        connection.execute(sa.update(workers).where(workers.c.id == worker).values(heartbeat_at=ago))


# queue_summary, worker_status, stuck_jobs ------------------------------------------------------------------


def test_queue_summary_counts_what_is_open_or_dead(pgq: PgQueue) -> None:
    add(pgq, 3)
    add(pgq, 2, delay=3600)
    retry, dead, run, done = [*claim(pgq, limit=3), claim_one_more(pgq)]
    finish(pgq, retried(retry, delay=60), died(dead), completed(done))
    add_one(pgq, queue="mail")
    make_due(pgq, [add_one(pgq)], seconds_ago=100)
    put(pgq, [add_one(pgq)], waits_for="task")
    pgq.pause("mail", duration=60)
    pgq.pause("empty")

    found = {row["queue"]: row for row in view(pgq, "queue_summary")}

    assert set(found) == {"default", "mail", "empty"}
    counts = ("ready", "scheduled", "retrying", "waiting", "running", "dead", "paused")
    assert tuple(found["default"][name] for name in counts) == (2, 3, 1, 1, 1, 1, False)
    assert tuple(found["mail"][name] for name in counts) == (1, 0, 0, 0, 0, 0, True)
    assert tuple(found["empty"][name] for name in counts) == (0, 0, 0, 0, 0, 0, True)
    assert found["default"]["oldest_ready_seconds"] == pytest.approx(100, abs=50)
    assert found["default"]["oldest_running_seconds"] == pytest.approx(0, abs=50)
    assert found["mail"]["paused_until"] is not None
    assert found["empty"]["paused_until"] is None
    assert row(pgq, run.id).status == "running"


def claim_one_more(pgq: PgQueue) -> Any:
    add(pgq)
    return claim_one(pgq)


def test_queue_summary_says_the_same_as_the_command(pgq: PgQueue) -> None:
    add(pgq, 5)
    finish(pgq, *map(died, claim(pgq, limit=2)))
    claim(pgq)

    (summary,) = pgq.queues()
    (found,) = view(pgq, "queue_summary")

    for name in ("ready", "scheduled", "retrying", "running", "dead", "paused"):
        assert found[name] == getattr(summary, name)


def test_worker_status_tells_what_each_worker_holds(pgq: PgQueue) -> None:
    register(pgq, "busy")
    register(pgq, "idle", silent=300)
    add(pgq, 3)
    held = claim(pgq, limit=2, worker="busy")
    claim(pgq, worker="a consumer without a row")
    expire(pgq, [held[0].id])

    found = {row["id"]: row for row in view(pgq, "worker_status")}

    assert {name: (row["running"], row["lapsed"]) for name, row in found.items()} == {"busy": (2, 1), "idle": (0, 0)}
    assert found["busy"]["oldest_claimed_at"] is not None
    assert found["idle"]["silent_seconds"] == pytest.approx(300, abs=100)


def test_stuck_jobs_names_the_likely_cause_of_each(pgq: PgQueue) -> None:
    register(pgq, "w", queue="default", task="work")
    register(pgq, "gone", queue="left", task="work", silent=600)
    fine, lapsed, asked, long = [job.id for job in claim_all(pgq, add(pgq, 4))]
    expire(pgq, [lapsed])
    hours_ago, minutes_ago = moments_ago(pgq, 7200), moments_ago(pgq, 300)
    put(pgq, [asked], cancel_requested_at=minutes_ago)
    put(pgq, [long], claimed_at=hours_ago)
    late = {
        "others are before it": add_one(pgq),
        "its queue is paused": add_one(pgq, queue="paused"),
        "no worker takes its queue": add_one(pgq, queue="left"),
        "no worker of its queue knows its task": add_one(pgq, task="unknown"),
        "it waits for task": add_one(pgq),
        "it expired, and no worker has looked since": add_one(pgq),
    }
    pgq.pause("paused")
    put(pgq, [late["it waits for task"]], waits_for="task")
    put(pgq, [late["it expired, and no worker has looked since"]], expires_at=minutes_ago)
    make_due(pgq, late.values(), seconds_ago=90)
    just_due = add_one(pgq)

    found = {row["id"]: row for row in view(pgq, "stuck_jobs")}

    assert {job_id: row["why"] for job_id, row in found.items()} == {
        lapsed: "its lease ran out",
        asked: "it goes on although it was asked to stop",
        long: "it runs for over an hour",
        **{job_id: why for why, job_id in late.items()},
    }
    assert not {fine, just_due} & set(found)
    assert found[long]["seconds"] == pytest.approx(7200, abs=100)
    assert (found[long]["worker"], found[long]["status"]) == ("worker-1", "running")


def claim_all(pgq: PgQueue, ids: list[int]) -> list[Any]:
    claimed = claim(pgq, limit=len(ids))
    assert [job.id for job in claimed] == ids
    return claimed


def moments_ago(pgq: PgQueue, seconds: float) -> Any:
    return seconds_from_now(sa.literal(-seconds, sa.Float()))


# job_history -----------------------------------------------------------------------------------------------


def test_job_history_has_the_happy_path_that_no_event_records(pgq: PgQueue) -> None:
    job_id = add_one(pgq)
    finish(pgq, completed(claim_one(pgq, worker="w")))

    found = history(pgq, job_id)

    assert [(h["event"], h["attempt"], h["from_status"], h["to_status"], h["worker"]) for h in found] == [
        ("enqueue", None, None, "pending", None),
        ("claim", 1, "pending", "running", "w"),
        ("complete", 1, "running", "completed", "w"),
    ]
    assert [h["event_id"] for h in found] == [None, None, None]


def test_job_history_has_every_attempt_and_who_interfered(pgq: PgQueue) -> None:
    job_id = add_one(pgq, max_retries=1)
    finish(pgq, retried(claim_one(pgq, worker="w1")))
    make_due(pgq)
    claim_one(pgq, worker="w2")
    pgq.cancel(job_id, actor="cli:ada", reason="no more")
    expire(pgq)
    sweep_up(pgq)
    pgq.replay(job_id, actor="cli:bob", reason="after all")
    pgq.delete(add_one(pgq))

    found = history(pgq, job_id)

    assert [(h["event"], h["attempt"], h["worker"] if h["event"] == "claim" else h["actor"]) for h in found] == [
        ("enqueue", None, None),
        ("claim", 1, "w1"),
        ("retry", 1, "worker-1"),
        ("claim", 2, "w2"),
        ("cancel_requested", 2, "cli:ada"),
        ("sweep", 2, "sweeper"),
        ("replay", 2, "cli:bob"),
    ]
    assert (found[2]["error_type"], found[2]["error_message"]) == ("ValueError", "no")
    assert found[4]["reason"] == "no more"


def test_each_change_in_job_history_begins_where_the_one_before_ended(pgq: PgQueue) -> None:
    Lives(pgq).go_through(some_steps(random.Random(1), 150))

    told: dict[int, list[dict[str, Any]]] = {}
    for h in view(pgq, "job_history", "ORDER BY job_id, at, position"):
        told.setdefault(h["job_id"], []).append(h)

    present = {row["id"]: row["status"] for row in view(pgq, "jobs")}
    assert len(told) > 20
    assert len({h["event"] for changes in told.values() for h in changes}) >= 8
    for job_id, changes in told.items():
        if job_id not in present:
            continue  # deleted: only its events are left
        status = None
        for change in changes:
            assert change["from_status"] == status, changes
            status = change["to_status"]
        assert status == present[job_id]


# throughput_minute, latency_hour, error_groups -------------------------------------------------------------


def test_throughput_minute_counts_what_ended_and_what_is_made_again(pgq: PgQueue) -> None:
    add(pgq, 5)
    one, two, three, four, _ = claim(pgq, limit=5)
    finish(pgq, completed(one), completed(two), died(three), retried(four))
    expire(pgq)
    sweep_up(pgq)
    pgq.cancel(add_one(pgq, queue="mail"))

    found: dict[tuple[str, str, str], int] = {}
    for ended in view(pgq, "throughput_minute"):
        assert str(ended["minute"])[17:19] == "00"
        key = (ended["queue"], ended["task"], ended["outcome"])
        found[key] = found.get(key, 0) + ended["count"]

    assert found == {
        ("default", "work", "completed"): 2,
        ("default", "work", "dead"): 1,
        ("default", "work", "retried"): 2,
        ("mail", "work", "cancelled"): 1,
    }


def test_latency_hour_measures_waits_and_runs(pgq: PgQueue) -> None:
    ids = add(pgq, 101)
    finish(pgq, *map(completed, claim(pgq, limit=101)))
    begin = "2030-01-31 14:00:00.000"
    for n, job_id in enumerate(ids):
        # Waited n seconds, ran n / 10; enqueued with a run_at before, which is no wait.
        move(
            pgq, job_id, run_at=(begin, -60), created_at=(begin, 0), claimed_at=(begin, n), finished_at=(begin, n * 1.1)
        )

    (found,) = view(pgq, "latency_hour")

    assert str(found["hour"])[:19] == "2030-01-31 14:00:00"
    assert (found["queue"], found["task"], found["jobs"]) == ("default", "work", 101)
    measured = [float(found[name]) for name in ("wait_avg", "wait_max", "run_avg", "run_max")]
    assert measured == pytest.approx([50, 100, 5, 10], abs=0.01)
    if pgq.engine.dialect.name == "postgresql":
        percentiles = [found[f"{name}_p{p}"] for name in ("wait", "run") for p in (50, 95, 99)]
        assert percentiles == pytest.approx([50, 95, 99, 5, 9.5, 9.9])
    else:
        assert not [name for name in found if "_p" in name]


def move(pgq: PgQueue, job_id: int, **moments: tuple[str, float]) -> None:
    for column, (start, seconds) in moments.items():
        if pgq.engine.dialect.name == "postgresql":
            moment = f"timestamptz '{start}+00' + interval '{seconds} seconds'"
        else:
            moment = f"strftime('%Y-%m-%d %H:%M:%f', '{start}', '{seconds:+} seconds')"
        with pgq.begin() as connection:
            connection.exec_driver_sql(
                f"UPDATE {pgq.tables.jobs.fullname} SET {column} = {moment} WHERE id = {job_id}".replace(
                    "%", "%%" if pgq.engine.dialect.name == "postgresql" else "%"
                )
            )


def test_error_groups_puts_alike_errors_together(pgq: PgQueue) -> None:
    add(pgq, 3)
    one, two, three = claim(pgq, limit=3)
    pgq.nack([one], error=TimeoutError("no answer from 10.0.0.17 after 3000 ms"), delay=0)
    pgq.nack([two], error=TimeoutError("no answer from 10.0.0.9 after 250 ms"))
    pgq.nack([three], error=TimeoutError("no such host"))
    (again,) = claim(pgq)
    pgq.nack([again], error=TimeoutError("no answer from 10.0.0.1234567890123456789 after 1 ms"))

    found = {row["error_pattern"]: row for row in view(pgq, "error_groups")}

    assert {pattern: (row["attempts"], row["jobs"]) for pattern, row in found.items()} == {
        "no answer from #.#.#.# after # ms": (3, 2),
        "no such host": (1, 1),
    }
    group = found["no answer from #.#.#.# after # ms"]
    assert (group["task"], group["error_type"].rpartition(".")[2], group["last_job_id"]) == ("work", "TimeoutError", 2)
    assert group["first_at"] <= group["last_at"]


def test_error_groups_sees_uuids_and_hexadecimal_numbers_on_postgresql(pg: PgQueue) -> None:
    for text in (
        "row 7b3c9d3e-33a4-4d1c-8f6c-000000000001 at 0xdeadbeef",
        "row aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee at 0x1",
    ):
        add(pg)
        pg.nack(claim(pg), error=ValueError(text), delay=3600)

    (group,) = view(pg, "error_groups")

    assert (group["error_pattern"], group["jobs"]) == ("row # at #", 2)


def test_one_hostile_event_hides_no_other(pgq: PgQueue) -> None:
    add(pgq)
    pgq.nack(claim(pgq), error=ValueError("no"))
    with pgq.begin() as connection:
        events = pgq.tables.job_events
        document = {"postgresql": "'[1]'::jsonb", "sqlite": "'not json'"}[pgq.engine.dialect.name]
        connection.exec_driver_sql(
            f"INSERT INTO {events.fullname} (job_id, queue, task, event, actor, error)"
            f" VALUES (1, 'default', 'work', 'retry', 'sql', {document})"
        )

    assert [row["error_pattern"] for row in view(pgq, "error_groups")] == ["no"]
    assert len(history(pgq, 1)) == 4


# jobs_as_of ------------------------------------------------------------------------------------------------


class Lives:
    """What may happen to jobs. Each method is one thing that happens; the numbers choose among what there is."""

    def __init__(self, pgq: PgQueue) -> None:
        self._pgq = pgq
        self._claims: list[Any] = []
        self._ids: list[int] = []

    def go_through(self, steps: list[Step], seen: Callable[[], None] = lambda: None) -> None:
        """Let these steps happen, and call `seen` after each."""
        for name, number, other in steps:
            with suppress(PgqueueError):  # a claim that was lost, a job that is not there or not so
                getattr(self, name)(number, other)
            seen()

    def enqueue(self, number: int, _: int) -> None:
        self._ids += add(self._pgq, 1 + number % 2, max_retries=1)

    def enqueue_in_place_of_another(self, number: int, _: int) -> None:
        self._ids += add(self._pgq, unique_key="ab"[number % 2], on_conflict="replace")

    def claim(self, number: int, other: int) -> None:
        self._claims += claim(self._pgq, limit=1 + number % 2, worker="ab"[other % 2])

    def end(self, number: int, other: int) -> None:
        if self._claims:
            job, delay = self._claims.pop(number % len(self._claims)), 3600 if number % 3 == 0 else 0
            match other % 4:
                case 0:
                    self._pgq.ack([job])
                case 1:
                    self._pgq.nack([job], delay=delay)
                case 2:
                    self._pgq.nack([job], error="no", delay=delay)
                case _:
                    self._pgq.nack([job], dead=True, error="no")

    def lose_a_worker(self, number: int, _: int) -> None:
        if self._claims:
            expire(self._pgq, [self._claims[number % len(self._claims)].id])
        sweep_up(self._pgq)

    def expire_before_the_start(self, number: int, _: int) -> None:
        with self._pgq.begin() as connection:
            jobs, past = self._pgq.tables.jobs, seconds_from_now(sa.literal(-1.0, sa.Float()))
            pending = [jobs.c.id == self._some(number), jobs.c.status == "pending"]
            connection.execute(sa.update(jobs).where(*pending).values(expires_at=past))
        with self._pgq.begin() as connection:
            expiry.expire(connection, self._pgq.tables, actor="sweeper")

    def let_delays_pass(self, _: int, __: int) -> None:
        make_due(self._pgq)

    def cancel(self, number: int, other: int) -> None:
        self._pgq.cancel(self._some(number), force=other % 2 == 0)

    def replay(self, number: int, _: int) -> None:
        self._pgq.replay(self._some(number))

    def edit(self, number: int, _: int) -> None:
        self._pgq.edit(self._some(number), priority=1)

    def delete(self, number: int, _: int) -> None:
        self._pgq.delete(self._some(number))

    def purge(self, _: int, __: int) -> None:
        self._pgq.purge(limit=1)

    def _some(self, number: int) -> int:
        return self._ids[number % len(self._ids)] if self._ids else 0


#: The name of a method of Lives, and two numbers for it.
Step = tuple[str, int, int]

#: What happens how often, in comparison.
WEIGHTS = {
    "enqueue": 4,
    "enqueue_in_place_of_another": 2,
    "claim": 8,
    "end": 8,
    "lose_a_worker": 2,
    "expire_before_the_start": 2,
    "let_delays_pass": 2,
    "cancel": 6,
    "replay": 3,
    "edit": 2,
    "delete": 1,
    "purge": 1,
}

NAMES = [name for name, weight in WEIGHTS.items() for _ in range(weight)]


def some_steps(chance: random.Random, count: int) -> list[Step]:
    return [(chance.choice(NAMES), chance.randrange(100), chance.randrange(100)) for _ in range(count)]


#: Hypothesis makes up the lives: the same few in each run. PGQUEUE_PAST_EXAMPLES names how many new ones to go through,
#: and has the shortest that fails looked for, which takes minutes: with --timeout 0.
EXAMPLES = os.environ.get("PGQUEUE_PAST_EXAMPLES")


def test_the_state_at_any_past_moment_is_what_was_recorded_then(pgq: PgQueue) -> None:
    statuses: set[str] = set()

    @given(
        st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 99), st.integers(0, 99)), min_size=10, max_size=60)
    )
    @settings(
        max_examples=int(EXAMPLES or 10),
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(steps: list[Step]) -> None:
        for table in (pgq.tables.jobs, pgq.tables.job_events):
            execute(pgq.engine, f"DELETE FROM {table.fullname}")
        recorded: list[tuple[Any, dict[int, tuple[Any, ...]]]] = []

        def record() -> None:
            wait_for_the_clock(pgq)
            recorded.append((moment(pgq), present(pgq)))
            wait_for_the_clock(pgq)

        Lives(pgq).go_through(steps, seen=record)

        left = set(present(pgq))
        for at, states in recorded:
            statuses.update(state[0] for state in states.values())
            assert as_of(pgq, at) == {job_id: state for job_id, state in states.items() if job_id in left}, at

    check()

    assert statuses == {"pending", "running", "completed", "dead", "cancelled"}


def moment(pgq: PgQueue) -> Any:
    now = {"postgresql": "now()", "sqlite": "strftime('%Y-%m-%d %H:%M:%f', 'now')"}[pgq.engine.dialect.name]
    with pgq.reading() as connection:
        return connection.exec_driver_sql(f"SELECT {now}").scalar_one()


def wait_for_the_clock(pgq: PgQueue) -> None:
    before = moment(pgq)
    wait_for(lambda: moment(pgq) > before, "the next millisecond", every=0.0005)


def present(pgq: PgQueue) -> dict[int, tuple[Any, ...]]:
    with pgq.reading() as connection:
        found = connection.execute(sa.select(pgq.tables.jobs))
        return {job.id: (job.status, job.attempt, job.claimed_by if job.status == "running" else None) for job in found}


def as_of(pgq: PgQueue, at: Any) -> dict[int, tuple[Any, ...]]:
    query = "SELECT * FROM pgqueue.jobs_as_of(:moment)"
    if pgq.engine.dialect.name == "sqlite":
        query = PAGE.read_text().partition("-- SQLite: jobs_as_of\n")[2].partition("```")[0].rstrip().rstrip(";")
    with pgq.reading() as connection:
        found = connection.execute(sa.text(query), {"moment": at})
        return {job.id: (job.status, job.attempt, job.worker) for job in found}


def test_nothing_is_known_of_a_job_before_it_was_enqueued(pgq: PgQueue) -> None:
    before = moment(pgq)
    wait_for_the_clock(pgq)

    add(pgq)

    assert as_of(pgq, before) == {}


def test_what_plain_sql_changed_is_said_to_be_unknown(pg: PgQueue) -> None:
    job_id = add_one(pg)
    before = moment(pg)
    execute(pg.engine, "UPDATE pgqueue.jobs SET status = 'cancelled', finished_at = now() WHERE id = :id", id=job_id)

    assert as_of(pg, before) == {job_id: (None, 0, None)}
    assert as_of(pg, moment(pg)) == {job_id: ("cancelled", 0, None)}


def test_the_state_at_a_moment_has_when_the_attempt_began(pg: PgQueue) -> None:
    add(pg)
    claim(pg, worker="w")
    at = moment(pg)
    expire(pg)
    sweep_up(pg)
    make_due(pg)
    finish(pg, completed(claim_one(pg, worker="x")))

    (found,) = rows(pg.engine, "SELECT worker, attempt, claimed_at FROM pgqueue.jobs_as_of(:at)", at=at)

    assert (found.worker, found.attempt) == ("w", 1)
    assert isinstance(found.claimed_at, datetime)
    assert found.claimed_at < at


#: By which indexes of jobs the views for operators read on SQLite; tests/store/test_million.py looks at PostgreSQL.
SQLITE_PLANS = {
    "queue_summary": {"jobs_claim", "jobs_waiting", "jobs_lease", "jobs_dead"},
    "worker_status": {"jobs_lease"},
    "stuck_jobs": {"jobs_claim", "jobs_waiting", "jobs_lease"},
    "dead_jobs": {"jobs_dead"},
    "job_history WHERE job_id = 1": {"PRIMARY KEY"},
}


@pytest.mark.parametrize("name", SQLITE_PLANS)
def test_the_views_for_operators_read_no_history_on_sqlite(sqlite_url: str, name: str) -> None:
    pgq = PgQueue(sqlite_url)

    with pgq.reading() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN SELECT * FROM pgqueue_{name}").all()

    steps = [step.detail for step in plan if re.match(r"\w+ pgqueue_jobs\b", step.detail)]
    found = [re.search(r"INDEX pgqueue_(\w+)|INTEGER (PRIMARY KEY)", step) for step in steps]
    assert all(found), steps
    assert {one[1] or one[2] for one in found if one} == SQLITE_PLANS[name]
    pgq.dispose()


def test_the_views_of_an_empty_queue_are_empty(pgq: PgQueue) -> None:
    for name in (
        "queue_summary",
        "worker_status",
        "stuck_jobs",
        "job_history",
        "throughput_minute",
        "latency_hour",
        "error_groups",
    ):
        assert view(pgq, name) == []
