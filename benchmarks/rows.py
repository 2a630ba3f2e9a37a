"""Rows of the table: what is measured, and what it should reach. The rows themselves are in `scenarios/`.

A row measures some systems by some metrics, and makes claims on the medians. A sample of a row is one system's, in
one repetition; the repetitions of all its systems alternate.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.systems import Bench, System

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Scale:
    """How much is done: all of it, or a quick look."""

    jobs: int  #: in the backlogs that are drained
    single: int  #: jobs enqueued one by one
    blocks: int  #: in which clients commit transactions of each kind
    pickups: int
    part: int  #: of a long backlog: so many jobs are run
    long_backlog: int
    history: int  #: finished rows
    pruned: int  #: of these
    endurance_seconds: float
    idle_seconds: float


FULL = Scale(
    jobs=50_000,
    single=1_000,
    blocks=24,
    pickups=300,
    part=20_000,
    long_backlog=1_000_000,
    history=10_000_000,
    pruned=1_000_000,
    endurance_seconds=120,
    idle_seconds=30,
)
QUICK = Scale(
    jobs=20_000,
    single=300,
    blocks=10,
    pickups=100,
    part=10_000,
    long_backlog=200_000,
    history=500_000,
    pruned=100_000,
    endurance_seconds=40,
    idle_seconds=10,
)

#: (system, metric)
Figure = tuple[str, str]


Measure = Callable[[Bench, System, Scale], Metrics]


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
    measure: Measure
    claims: tuple[Claim, ...] = ()
    repeat: int | None = None  #: at most so many repetitions unless asked for more, where one takes long
    samples_of: int | None = None  #: another row; its samples are judged, and none are taken
    lower_is_better: bool = False
    plotted: bool = False  #: a panel of bars by system
    unplotted: tuple[str, ...] = ()  #: systems that would dwarf the rest in it
    curve: bool = False  #: a panel of curves over time, of the metrics that are named like `window`


@dataclass
class Samples:
    """All samples of a run: {row: {(system, metric): [value per repetition]}}."""

    values: dict[int, dict[Figure, list[float]]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def of(self, row: Row) -> dict[Figure, list[float]]:
        return self.values.get(row.samples_of or row.number, {})

    def add(self, row: Row, system: str, metrics: Metrics) -> None:
        of_row = self.values.setdefault(row.number, {})
        for metric, value in metrics.items():
            of_row.setdefault((system, metric), []).append(value)

    def median(self, row: Row, figure: Figure) -> float | None:
        values = self.of(row).get(figure)
        return statistics.median(values) if values else None

    def ratio(self, row: Row, figure: Figure, other: Figure) -> float | None:
        """The median of the ratios within each repetition, so that both have met the same mood of the machine."""
        of_row = self.of(row)
        ours, theirs = of_row.get(figure), of_row.get(other)
        if not ours or not theirs or 0 in theirs:  # CPU time is counted in ticks, of which little work takes none
            return None
        if len(ours) == len(theirs):
            return statistics.median(one / two for one, two in zip(ours, theirs, strict=True))
        return statistics.median(ours) / statistics.median(theirs)


WINDOW_SECONDS = 10


def window(number: int) -> str:
    """The metric of a stretch of time, of a row with a curve."""
    return f"{number * WINDOW_SECONDS}–{(number + 1) * WINDOW_SECONDS} s: jobs/s"
