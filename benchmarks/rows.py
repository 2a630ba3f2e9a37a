"""What is measured, and what it should reach: one row after the other.

A row measures some systems by some metrics, and makes claims on the medians. A sample of a row is one system's, in
one repetition; the repetitions of all its systems alternate.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.systems import OWN, PEER_NAMES, Bench, System

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Scale:
    """How much is done: all of it, or a quick look."""

    jobs: int
    single: int
    blocks: int
    pickups: int
    backlog: int
    endurance_seconds: float


FULL = Scale(jobs=50_000, single=1_000, blocks=12, pickups=300, backlog=1_000_000, endurance_seconds=120)
QUICK = Scale(jobs=20_000, single=300, blocks=6, pickups=100, backlog=200_000, endurance_seconds=40)

#: (system, metric)
Figure = tuple[str, str]


@dataclass(frozen=True)
class Claim:
    """A figure of pgqueue's, compared with another of the same run, or with a number."""

    figure: Figure
    over: tuple[Figure, ...] = ()  #: the best of these is what it is compared with
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    number: int
    title: str
    metrics: tuple[str, ...]  #: the first one is what the plot shows; units are part of the name
    systems: tuple[str, ...]
    measure: Callable[[Bench, System, Scale], Metrics]
    claims: tuple[Claim, ...] = ()
    repeat: int | None = None  #: at most so many repetitions, where one takes long
    lower_is_better: bool = False


DRAIN = "jobs/s"
BULK = "enqueued/s"
WORKER_CPU = "worker CPU s per 10,000 jobs"
SERVER_CPU = "server CPU s per 10,000 jobs"
ALL_CPU = "CPU s per 10,000 jobs"


def jobs_for(system: System, scale: Scale) -> int:
    return max(200, int(scale.jobs * system.share))


def drain(bench: Bench, system: System, scale: Scale, processes: int = 1) -> Metrics:
    jobs = jobs_for(system, scale)
    with bench.database(system) as database:
        bench.fill(system, database, jobs)
        drained = bench.drain(system, database, jobs, processes)
    worker, server = (seconds / jobs * 10_000 for seconds in (drained.records.cpu_seconds, drained.server_cpu_seconds))
    return {DRAIN: jobs / drained.seconds, WORKER_CPU: worker, SERVER_CPU: server, ALL_CPU: worker + server}


def drain_by_two(bench: Bench, system: System, scale: Scale) -> Metrics:
    return drain(bench, system, scale, processes=2)


def bulk(bench: Bench, system: System, scale: Scale) -> Metrics:
    with bench.database(system) as database:
        return {BULK: bench.fill(system, database, jobs_for(system, scale))}


def single(bench: Bench, system: System, scale: Scale) -> Metrics:
    with bench.database(system) as database:
        seconds = bench.run(system, database, "single", jobs=scale.single)["seconds"]
    return {BULK: scale.single / seconds}


def transactions(clients: int) -> Callable[[Bench, System, Scale], Metrics]:
    def measure(bench: Bench, system: System, scale: Scale) -> Metrics:
        with bench.database(system) as database:
            rates: Metrics = bench.run_program(
                "transactions.py", system, database, "run", clients=clients, blocks=scale.blocks, block_seconds=0.25
            )
        return {f"{kind}: transactions/s": rate for kind, rate in rates.items()}

    return measure


def _transaction_row(number: int, clients: int) -> Row:
    title = "One job per transaction, beside a row of the application, through a Session: "
    kinds = ("row and enqueue", "row and bare INSERT", "row alone", "row, bare INSERT and NOTIFY inside")
    metrics = tuple(f"{kind}: transactions/s" for kind in kinds)
    return Row(
        number,
        title + ("1 client" if clients == 1 else f"{clients} clients"),
        metrics,
        ("pgqueue",),
        transactions(clients),
        claims=(Claim(("pgqueue", metrics[0]), (("pgqueue", metrics[1]),), at_least=0.9),),
    )


EVERYBODY = (*OWN, *PEER_NAMES)

ROWS: tuple[Row, ...] = (
    Row(
        1,
        "Drain of a backlog of jobs that do nothing, 1 worker process",
        (DRAIN, WORKER_CPU, SERVER_CPU, ALL_CPU),
        EVERYBODY,
        drain,
        claims=(
            Claim(("pgqueue", DRAIN), (("graphile-worker", DRAIN),), at_least=1.0),
            Claim(("pgqueue", DRAIN), (("pgqueuer", DRAIN),), at_least=2.5),
            Claim(("pgqueue", DRAIN), (("limit", DRAIN),), at_least=0.8),
        ),
    ),
    Row(
        2,
        "The same, 2 worker processes",
        (DRAIN,),
        EVERYBODY,
        drain_by_two,
        claims=(Claim(("pgqueue", DRAIN), (("graphile-worker", DRAIN),), at_least=1.0),),
    ),
    Row(
        3,
        "Drain of `async def` tasks, 1 worker process",
        (DRAIN,),
        ("pgqueue-async", "pgqueuer"),
        drain,
        claims=(Claim(("pgqueue-async", DRAIN), (("pgqueuer", DRAIN),), at_least=2.0),),
    ),
    Row(
        4,
        "Bulk enqueue, 1,000 jobs per transaction",
        (BULK,),
        ("pgqueue", "limit", *PEER_NAMES),
        bulk,
        claims=(
            Claim(("pgqueue", BULK), tuple((peer, BULK) for peer in PEER_NAMES), at_least=2.0),
            Claim(("pgqueue", BULK), (("limit", BULK),), at_least=0.75),
        ),
    ),
    _transaction_row(5, clients=1),
    _transaction_row(6, clients=8),
)


@dataclass
class Samples:
    """All samples of a run: {row: {(system, metric): [value per repetition]}}."""

    values: dict[int, dict[Figure, list[float]]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def add(self, row: Row, system: str, metrics: Metrics) -> None:
        of_row = self.values.setdefault(row.number, {})
        for metric, value in metrics.items():
            of_row.setdefault((system, metric), []).append(value)

    def median(self, row: Row, figure: Figure) -> float | None:
        values = self.values.get(row.number, {}).get(figure)
        return statistics.median(values) if values else None

    def ratio(self, row: Row, figure: Figure, other: Figure) -> float | None:
        """The median of the ratios within each repetition, so that both have met the same mood of the machine."""
        of_row = self.values.get(row.number, {})
        ours, theirs = of_row.get(figure), of_row.get(other)
        if not ours or not theirs:
            return None
        if len(ours) == len(theirs):
            return statistics.median(one / two for one, two in zip(ours, theirs, strict=True))
        return statistics.median(ours) / statistics.median(theirs)
