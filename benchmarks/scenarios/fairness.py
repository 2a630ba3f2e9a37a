"""Whether a busy worker keeps jobs in its buffer that an idle one could run."""

from __future__ import annotations

import json
import time

from benchmarks.rows import Claim, Metrics, Row, Scale
from benchmarks.systems import Bench, Refused, System

BUFFERED = "longest wait in a busy worker's buffer beside an idle worker, ms"
LONGEST = "longest wait in a buffer, ms"
GIVEN_BACK = "jobs given back"

CONCURRENCY = 4
WORKERS = 2
Interval = tuple[float, float]


def fairness(bench: Bench, system: System, scale: Scale) -> Metrics:
    """Waves of short jobs, which teach a worker to claim by the hundred, and of long ones among short ones."""
    with bench.database(system) as database, bench.cluster.connect(database) as connection:
        option = f"--concurrency={CONCURRENCY}"
        with (
            bench.workers_of("fairness:pgq", system, database, option) as one,
            bench.workers_of("fairness:pgq", system, database, option) as other,
        ):
            _wait_for_workers(connection)
            jobs = bench.run_program("fairness.py", system, database, "enqueue")["jobs"]
            for workers in (one, other):
                bench.wait_until_finished(system, connection, workers)
                workers.stop()
            runs = [run for workers in (one, other) for path in workers.folder.glob("*.runs") for run in _read(path)]
        claims = {
            job_id: (claimed_at, int(claimed_by.split(":")[1]))
            for job_id, claimed_at, claimed_by in connection.execute(
                "SELECT id, extract(epoch FROM claimed_at)::float8, claimed_by FROM pgqueue.jobs"
                " WHERE status = 'completed'"
            )
        }
        given_back = [
            (int(worker.split(":")[1]), claimed_at, at)
            for worker, claimed_at, at in connection.execute(
                "SELECT worker, extract(epoch FROM claimed_at)::float8, extract(epoch FROM at)::float8"
                " FROM pgqueue.job_events WHERE event = 'release'"
            )
        ]
    if len(runs) != jobs or len(claims) != jobs:
        raise Refused(f"of {jobs} jobs {len(claims)} were completed, in {len(runs)} runs")
    return waits(runs, claims, given_back)


def waits(
    runs: list[dict[str, float]],
    claims: dict[int, tuple[float, int]],
    given_back: list[tuple[int, float, float]],
) -> Metrics:
    """given_back: unstarted; process, when claimed, when given back."""
    by_worker: dict[int, list[tuple[float, float, float]]] = {}
    for run in runs:
        claimed_at, pid = claims[int(run["id"])]
        by_worker.setdefault(pid, []).append((claimed_at, run["began"], run["ended"]))
    for pid, claimed_at, at in given_back:  # as a job that ended when it began
        by_worker.setdefault(pid, []).append((claimed_at, at, at))
    began = max(min(claimed for claimed, _, _ in jobs) for jobs in by_worker.values())
    longest = beside_idle = 0.0
    for pid, jobs in by_worker.items():
        others = [idle_times(other, began) for other_pid, other in by_worker.items() if other_pid != pid]
        for claimed_at, started_at, _ in jobs:
            longest = max(longest, started_at - claimed_at)
            for idle in others:
                wait = sum(max(0.0, min(started_at, end) - max(claimed_at, start)) for start, end in idle)
                beside_idle = max(beside_idle, wait)
    if len(by_worker) < WORKERS:
        raise Refused("one worker ran all the jobs")
    return {BUFFERED: beside_idle * 1_000, LONGEST: longest * 1_000, GIVEN_BACK: len(given_back)}


def idle_times(jobs: list[tuple[float, float, float]], began: float) -> list[Interval]:
    """When a worker had nothing in its buffer and a slot that was free."""
    changes: list[tuple[float, int, int]] = []  # moment, change of the buffer, change of the slots
    for claimed_at, started_at, ended_at in jobs:
        changes += [(claimed_at, 1, 0), (started_at, -1, 1), (ended_at, 0, -1)]
    idle: list[Interval] = []
    buffered = running = 0
    since: float | None = began
    for at, of_buffer, of_slots in sorted(changes):
        buffered += of_buffer
        running += of_slots
        free = buffered == 0 and running < CONCURRENCY
        if free and since is None:
            since = at
        elif not free and since is not None:
            if at > since:
                idle.append((since, at))
            since = None
    if since is not None:
        idle.append((since, float("inf")))
    return [(max(start, began), end) for start, end in idle if end > began]


def _read(path: object) -> list[dict[str, float]]:
    with open(str(path)) as lines:
        return [json.loads(line) for line in lines]


def _wait_for_workers(connection: object) -> None:
    deadline = time.monotonic() + 60
    while connection.execute("SELECT count(*) FROM pgqueue.workers").fetchone()[0] < WORKERS:  # type: ignore[attr-defined]
        if time.monotonic() > deadline:
            raise Refused("the workers did not come up")
        time.sleep(0.1)


ROWS = (
    Row(
        17,
        "A worker with slow jobs beside another one",
        (BUFFERED, LONGEST, GIVEN_BACK),
        ("pgqueue",),
        fairness,
        claims=(Claim(("pgqueue", BUFFERED), at_most=200),),
        repeat=3,
    ),
)
