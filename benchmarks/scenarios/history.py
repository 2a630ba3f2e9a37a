"""Whether finished rows that are kept slow anything down, and whether pruning them blocks claims."""

from __future__ import annotations

import statistics

from benchmarks.rows import Claim, Metrics, Row, Scale
from benchmarks.systems import Bench, System

#: Claim, finish and every operator view, in milliseconds: with the history ÷ without.
CALLS = ("claim", "ack", "queues", "jobs", "jobs completed", "jobs dead", "job", "events", "workers")
TIMES = tuple(f"{call}: with history ÷ without" for call in CALLS)
PRUNE, CALM, PRUNED = "longest claim during prune, ms", "longest claim before it, ms", "pruned/s"

#: Evenly over the last 100 days, so that a share of them is older than any moment in between.
FINISHED = (
    "INSERT INTO pgqueue.jobs (task, payload, status, run_at, claimed_by, attempt, created_at, claimed_at,"
    " finished_at)"
    " SELECT 'noop', jsonb_build_object('n', n), 'completed', moment, 'earlier', 1, moment, moment, moment"
    " FROM generate_series(1, {jobs}) AS n,"
    " LATERAL (SELECT now() - interval '100 days' * (1 - n / {jobs}::float8)) AS at(moment)"
)
DAYS = 100

#: So often all calls are timed, without the history and with it.
ROUNDS = 3


def history(bench: Bench, system: System, scale: Scale) -> Metrics:
    fill = [FINISHED.format(jobs=scale.history)]
    with (
        bench.filled_database(system, f"history_{scale.history}", fill) as database,
        bench.database(system) as empty,
    ):
        for one in (database, empty):
            bench.cluster.settle(one)
        # In turns: after so many rows were loaded the machine is not the same from one minute to the next.
        rounds = [
            {one: bench.run_program("history.py", system, one, "calls") for one in (empty, database)}
            for _ in range(ROUNDS)
        ]
        older_than = DAYS * 86_400 * (1 - scale.pruned / scale.history)
        pruned = bench.run_program("history.py", system, database, "prune", older_than=older_than)
    metrics = {PRUNE: pruned["during"], CALM: pruned["before"], PRUNED: pruned["rate"]}
    for call, time in zip(CALLS, TIMES, strict=True):
        metrics[time] = statistics.median(took[database][call] / took[empty][call] for took in rounds)
        metrics[f"{call}: ms with history"] = statistics.median(took[database][call] for took in rounds)
    return metrics


ROWS = (
    Row(
        16,
        "With a long history in the table",
        (*TIMES, PRUNE, CALM, PRUNED),
        ("pgqueue",),
        history,
        claims=(
            *(Claim(("pgqueue", time), at_most=1.2) for time in TIMES),
            Claim(("pgqueue", PRUNE), at_most=50),
        ),
        repeat=1,
    ),
)
