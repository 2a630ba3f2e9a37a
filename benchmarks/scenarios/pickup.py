"""How soon an idle worker starts a job that was enqueued."""

from __future__ import annotations

import random
import statistics

from benchmarks.rows import Claim, Metrics, Row, Scale
from benchmarks.systems import PEER_NAMES, POSTGRESQL_PEERS, Bench, Refused, System

#: Between two jobs, in seconds: long enough for a worker to be idle again, and never in step with anything.
GAP_SECONDS = (0.02, 0.12)

P50, P95, P99, AFTER = "p50 ms", "p95 ms", "p99 ms", "p50 ms after the commit returned"
WARM_UP_JOBS = 3
POLL_INTERVAL_MS = 1_000.0
POLL_SLACK_MS = 10.0


def pickup(bench: Bench, system: System, scale: Scale) -> Metrics:
    random_gaps = random.Random(scale.pickups)
    gaps = [random_gaps.uniform(*GAP_SECONDS) for _ in range(scale.pickups)]
    with bench.database(system) as database, bench.workers(system, database) as workers:
        bench.run(system, database, "single", jobs=WARM_UP_JOBS)
        workers.wait_for_runs(WARM_UP_JOBS)
        moments = bench.run(system, database, "pickup", gaps=gaps)["moments"]
        workers.wait_for_runs(WARM_UP_JOBS + scale.pickups)
        runs = workers.records().runs[WARM_UP_JOBS:]
    started = {number: at for at, number in runs}
    if len(runs) != scale.pickups or len(started) != scale.pickups:
        raise Refused(f"{system.name} made {len(runs)} runs of {scale.pickups} jobs")
    waits = sorted((started[n] - before) / 1_000 for n, before, _ in moments)
    after = statistics.median((started[n] - done) / 1_000 for n, _, done in moments)
    return {P50: statistics.median(waits), P95: quantile(waits, 0.95), P99: quantile(waits, 0.99), AFTER: after}


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


ROWS = (
    Row(
        7,
        "Pick-up by an idle worker: from the commit to the start of the task",
        (P50, P95, P99, AFTER),
        ("pgqueue", "pgqueue-polling", "limit", *PEER_NAMES),
        pickup,
        claims=(
            Claim(("pgqueue", P50), at_most=2.5),
            Claim(("pgqueue", P99), at_most=8.0),
            Claim(("pgqueue", P50), tuple((peer, P50) for peer in POSTGRESQL_PEERS), at_most=1.0),
            Claim(("pgqueue", P99), tuple((peer, P99) for peer in POSTGRESQL_PEERS), at_most=1.0),
            Claim(("pgqueue-polling", P99), at_most=POLL_INTERVAL_MS + POLL_SLACK_MS),
        ),
        lower_is_better=True,
        plotted=True,
        unplotted=("pgqueue-polling",),
    ),
)
