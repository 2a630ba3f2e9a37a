"""The rows of the table, by what they need."""

from __future__ import annotations

from benchmarks.scenarios import cost, drain, endurance, enqueue, fairness, history, pickup

ROWS = tuple(
    sorted(
        (*drain.ROWS, *enqueue.ROWS, *pickup.ROWS, *endurance.ROWS, *cost.ROWS, *history.ROWS, *fairness.ROWS),
        key=lambda row: row.number,
    )
)
