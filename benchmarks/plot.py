"""The figures as a picture: a panel of bars for each row that compares systems."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from benchmarks.rows import WINDOW_SECONDS, Row, Samples, window
from benchmarks.systems import SYSTEMS

OWN_COLOUR, LIMIT_COLOUR, PEER_COLOUR = "#1f6feb", "#9aa4ad", "#d0a25b"

COLUMNS = 2
PANEL_INCHES = (6.0, 2.9)
TITLE_CHARACTERS = 60

#: Room above the curves for the names of the systems.
LEGEND_SHARE = 0.35


def draw(rows: list[Row], samples: Samples, path: Path) -> bool:
    """Write the picture; False when there is nothing that compares, or matplotlib is missing."""
    shown = [row for row in rows if (row.plotted or row.curve) and len(_medians(row, samples)) > 1]
    if not shown:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "pgqueue"})
    height = -(-len(shown) // COLUMNS)
    figure, axes = pyplot.subplots(
        height, COLUMNS, figsize=(PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * height), squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, row in zip(axes.flat, shown, strict=False):
        axis.set_title(textwrap.fill(f"{row.number}. {row.title}", TITLE_CHARACTERS), loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        if row.curve:
            _draw_curves(axis, row, samples)
            continue
        medians = _medians(row, samples)
        names = sorted(medians, key=lambda name: medians[name], reverse=row.lower_is_better)
        values = [medians[name] for name in names]
        ends = [samples.of(row)[name, row.metrics[0]] for name in names]
        errors = [
            [value - min(each) for value, each in zip(values, ends, strict=True)],
            [max(each) - value for value, each in zip(values, ends, strict=True)],
        ]
        bars = axis.barh(
            [_label(name) for name in names],
            values,
            xerr=errors,
            color=[_colour(name) for name in names],
            ecolor="#555555",
            capsize=2,
        )
        axis.bar_label(bars, labels=[f" {value:,.0f}" if value >= 100 else f" {value:.3g}" for value in values])
        axis.set_xlabel(row.metrics[0] + (", less is better" if row.lower_is_better else ""))
        axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _draw_curves(axis: Any, row: Row, samples: Samples) -> None:
    for name in row.systems:
        colour = _colour(name)
        rates = []
        while (rate := samples.median(row, (name, window(len(rates))))) is not None:
            rates.append(rate)
        if rates:
            seconds = [(number + 0.5) * WINDOW_SECONDS for number in range(len(rates))]
            width = 2.5 if colour == OWN_COLOUR else 1.2
            axis.plot(seconds, rates, label=name, linewidth=width, color=None if colour == PEER_COLOUR else colour)
    axis.set_xlabel("seconds")
    axis.set_ylabel("jobs/s")
    axis.set_ylim(0, axis.get_ylim()[1] * (1 + LEGEND_SHARE))
    axis.legend(fontsize=7, ncols=3, frameon=False, loc="upper left")


def _medians(row: Row, samples: Samples) -> dict[str, float]:
    medians = ((name, samples.median(row, (name, row.metrics[0]))) for name in row.systems if name not in row.unplotted)
    return {name: median for name, median in medians if median is not None}


def _label(name: str) -> str:
    return name if SYSTEMS[name].keeps_history else f"{name} (no history)"


def _colour(name: str) -> str:
    if name.startswith("pgqueue") and name != "pgqueuer":
        return OWN_COLOUR
    return LIMIT_COLOUR if name.startswith("limit") else PEER_COLOUR
