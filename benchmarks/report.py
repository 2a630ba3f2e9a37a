"""Tables, in Markdown."""

from __future__ import annotations

from benchmarks.rows import Claim, Figure, Row, Samples
from benchmarks.systems import SYSTEMS


def row_table(row: Row, samples: Samples) -> str:
    """The figures of one row: medians and extremes, and how pgqueue compares."""
    lines = [f"### {row.number}. {row.title}", ""]
    lines.append("| system | measured | median | lowest | highest | pgqueue ÷ it |")
    lines.append("|---|---|--:|--:|--:|--:|")
    own = row.systems[0]
    for system in row.systems:
        for metric in row.metrics:
            values = samples.of(row).get((system, metric))
            if not values:
                continue
            ratio = None
            if system != own:
                ratio = samples.ratio(row, (own, metric), (system, metric))
            median = samples.median(row, (system, metric))
            cells = (number(median), number(min(values)), number(max(values)), "" if ratio is None else f"{ratio:.2f}")
            lines.append(f"| {shown(system)} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(system: str) -> str:
    history = "" if SYSTEMS[system].keeps_history else " (no history)"
    return system + history


def claims_table(rows: list[Row], samples: Samples) -> str:
    lines = ["| # | claim | measured | wanted | met |", "|--:|---|--:|--:|---|"]
    for row in rows:
        for claim in row.claims:
            judged = judge(row, claim, samples)
            if judged is None:
                continue
            value, text = judged
            met = (claim.at_least is None or value >= claim.at_least) and (
                claim.at_most is None or value <= claim.at_most
            )
            wanted = f"≥ {claim.at_least:g}" if claim.at_least is not None else f"≤ {claim.at_most:g}"
            lines.append(f"| {row.number} | {text} | {number(value)} | {wanted} | {'yes' if met else '**no**'} |")
    return "\n".join(lines)


def judge(row: Row, claim: Claim, samples: Samples) -> tuple[float, str] | None:
    """The figure of a claim, and the claim in words; None if it was not measured."""
    value = samples.median(row, claim.figure)
    if value is None:
        return None
    if not claim.over:
        return value, _name(row, claim.figure)
    there = [(samples.median(row, other), other) for other in claim.over]
    measured = [(median, other) for median, other in there if median is not None]
    if not measured:
        return None
    best = (min if row.lower_is_better else max)(measured)[1]
    ratio = samples.ratio(row, claim.figure, best)
    if ratio is None:
        return None
    return ratio, f"{_name(row, claim.figure)} ÷ {_name(row, best)}"


def _name(row: Row, figure: Figure) -> str:
    system, metric = figure
    if len(row.systems) == 1:
        return metric
    return system if metric == row.metrics[0] else f"{system}: {metric}"


def systems_table(names: list[str]) -> str:
    lines = ["| system | set up as |", "|---|---|"]
    lines.extend(f"| {name} | {SYSTEMS[name].note} |" for name in names)
    return "\n".join(lines)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
