"""Whether the speed lasts while another session holds an old snapshot, which keeps dead rows from being removed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.rows import WINDOW_SECONDS, Claim, Metrics, Row, Scale, window
from benchmarks.systems import CHUNK, POSTGRESQL_PEERS, Bench, Records, Refused, System

FIRST, LAST, LASTED = "first 10 s: jobs/s", "last 10 s: jobs/s", "last ÷ first"
LATE, OTHERS = "longest wait of a job committed late, s", "longest wait of the others, s"

#: Of jobs that were committed late, and of the others: the longest time from when one could be seen, or was taken back
#: from a lost consumer, which takes the oldest and so the same ones over and over, to its next claim. Claims that were
#: lost are known by when they were taken back, so such a wait comes out too long rather than too short.
LONGEST_WAITS = """
    WITH late AS (
        SELECT n, to_timestamp(at / 1e6) AS at FROM unnest(%s::bigint[], %s::bigint[]) AS late (n, at)
    ), waited AS (
        SELECT id, late.n IS NOT NULL AS is_late, coalesce(late.at, run_at) AS since, claimed_at
          FROM pgqueue.jobs LEFT JOIN late ON late.n = (payload->>'n')::bigint WHERE attempt = retries + 1
    ), moments AS (
        SELECT id, is_late, since AS at FROM waited
        UNION ALL SELECT id, is_late, claimed_at FROM waited
        UNION ALL SELECT waited.id, is_late, lost.at FROM waited JOIN pgqueue.job_events lost ON lost.job_id = waited.id
                   WHERE lost.event = 'sweep' AND lost.at > waited.since
    ), waits AS (
        SELECT is_late, at - lag(at) OVER (PARTITION BY id ORDER BY at) AS wait FROM moments
    )
    SELECT is_late, extract(epoch FROM max(wait)) FROM waits GROUP BY is_late
"""

#: So many jobs are kept waiting, so that neither the worker nor the producer runs dry or away.
AHEAD = 20_000


@contextmanager
def pinned_snapshot(bench: Bench, database: str) -> Iterator[None]:
    """Another session that reads, and stays in its transaction."""
    with bench.cluster.connect(database) as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM pg_class")
        yield
        connection.execute("ROLLBACK")


def endure(bench: Bench, system: System, scale: Scale) -> Metrics:
    """Enqueue and drain at the same time, as fast as goes."""
    with (
        bench.database(system) as database,
        pinned_snapshot(bench, database),
        bench.workers(system, database) as workers,
    ):
        environ = {"BENCH_RECORDS": str(workers.folder)}
        options = {"seconds": scale.endurance_seconds, "ahead": AHEAD, "chunk": CHUNK}
        told = bench.run(system, database, "feed", environ, **options)
        workers.wait_for_runs(told["jobs"])
        records = workers.records()
    records.require_exactly_once(told["jobs"])
    return by_window(records, told["began"], scale)


def by_window(records: Records, began: int, scale: Scale) -> Metrics:
    count = int(scale.endurance_seconds // WINDOW_SECONDS)
    counts = [0] * count
    for at, _ in records.runs:
        number = (at - began) // (WINDOW_SECONDS * 1_000_000)
        if 0 <= number < count:
            counts[number] += 1
    if count < 2:
        raise Refused(f"{scale.endurance_seconds} s are too short to compare their first and last {WINDOW_SECONDS}")
    rates = [runs / WINDOW_SECONDS for runs in counts]
    if not rates[0]:
        raise Refused(f"nothing ran in the first {WINDOW_SECONDS} s")
    return {
        FIRST: rates[0],
        LAST: rates[-1],
        LASTED: rates[-1] / rates[0],
        **{window(number): rate for number, rate in enumerate(rates)},
    }


def endure_mixed(bench: Bench, system: System, scale: Scale) -> Metrics:
    """The same with failing attempts, lost claims and transactions that commit late."""
    with (
        bench.database(system) as database,
        bench.cluster.connect(database) as connection,
        pinned_snapshot(bench, database),
        bench.workers_of("mixed:pgq", system, database) as workers,
    ):
        environ = {"BENCH_RECORDS": str(workers.folder)}
        options = {"seconds": scale.endurance_seconds, "ahead": AHEAD}
        told = bench.run_program("mixed.py", system, database, "feed", environ, **options)
        bench.wait_until_finished(system, connection, workers)
        records = workers.records()
        statuses = dict(connection.execute("SELECT status, count(*) FROM pgqueue.jobs GROUP BY 1").fetchall())
        numbers, committed = zip(*told["late"], strict=True)
        waited = dict(connection.execute(LONGEST_WAITS, [list(numbers), list(committed)]).fetchall())
    if set(statuses) != {"completed"}:
        raise Refused(f"not all jobs were completed: {json.dumps(statuses)}")
    return {**by_window(records, told["began"], scale), LATE: float(waited[True]), OTHERS: float(waited[False])}


ROWS = (
    Row(
        10,
        "Enqueue and drain while another session holds an old snapshot",
        (LASTED, FIRST, LAST),
        ("pgqueue", "limit", *POSTGRESQL_PEERS),
        endure,
        claims=(
            Claim(("pgqueue", LASTED), at_least=0.9),
            Claim(
                ("pgqueue", LAST),
                tuple((peer, FIRST) for peer in POSTGRESQL_PEERS if "graphile" not in peer),
                at_least=1.0,
            ),
            Claim(("pgqueue", LAST), (("graphile-worker", FIRST),), at_least=0.9),
        ),
        repeat=1,
        curve=True,
    ),
    Row(
        11,
        "The same with failing attempts, lost claims and late commits",
        (LASTED, FIRST, LAST, LATE, OTHERS),
        ("pgqueue",),
        endure_mixed,
        claims=(
            Claim(("pgqueue", LASTED), at_least=0.8),
            Claim(("pgqueue", LATE), at_most=30),
            Claim(("pgqueue", OTHERS), at_most=30),
        ),
        repeat=1,
    ),
)
