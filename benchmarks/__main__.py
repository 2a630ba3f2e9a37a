"""Measure pgqueue, and what it is compared with.

    python -m benchmarks                          pgqueue and the limit: some minutes
    python -m benchmarks --peers                  the peers as well (install them first: make bench-peers does)
    python -m benchmarks --only 1,4 --quick       a quick look at two rows

Starts a PostgreSQL server of its own with default durability (every commit is flushed to disk) in a folder under
TMPDIR, which should be on a disk. The repetitions of all systems of a row alternate, so that a slow minute of the
machine meets all of them; figures are medians. Compare figures of one run only: between two runs the disk alone may
differ by half.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import machine, plot, report
from benchmarks.cluster import Cluster
from benchmarks.rows import FULL, QUICK, Row, Samples
from benchmarks.scenarios import ROWS
from benchmarks.systems import PEER_NAMES, SYSTEMS, Bench, Refused

RESULTS = Path(__file__).resolve().parent / "results"
TABLE = "table.md"


def main() -> None:
    options = parse_arguments()
    machine.limit_cpus(options.cpus)
    machine.prefer_this_process()
    versions = installed_peers() if options.peers else {}
    rows = chosen_rows(options.only)
    samples = Samples()
    cluster = Cluster(options.pg)
    try:
        about = [*machine.describe(), cluster.describe()]
        about.extend(f"{name} {version}" for name, version in versions.items())
        console = Console(stderr=True)
        for line in about:
            console.print(line, style="dim", highlight=False)
        wanted = {name for name in SYSTEMS if name not in PEER_NAMES} | set(versions)
        if options.systems:
            wanted &= set(options.systems)
        bench = Bench(cluster)
        try:
            for _ in measure(bench, rows, wanted, options, samples, console):
                save(options.output, rows, about, samples, options)  # a run takes hours and may be interrupted
        finally:
            bench.close()
    finally:
        cluster.stop()
    save(options.output, rows, about, samples, options)
    print((options.output / TABLE).read_text(), end="")
    if not plot.draw(rows, samples, options.output / "plot.svg"):
        print("no picture: nothing to compare, or matplotlib is not installed", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", action="store_true", help="measure the installed peers as well")
    parser.add_argument("--only", type=_numbers, help="rows to measure, such as 1,2,4 (default: all); 13 judges row 1")
    parser.add_argument("--systems", type=_names, help="systems to measure, such as pgqueue,limit (default: all)")
    parser.add_argument(
        "--repeat",
        type=int,
        help="repetitions (default: 5, with --quick 3); fewer of rows that take minutes, unless --only names them",
    )
    parser.add_argument("--quick", action="store_true", help="less work per repetition, and fewer of them")
    parser.add_argument("--jobs", type=int, help="jobs per backlog (default: 50,000, with --quick 20,000)")
    parser.add_argument("--pg", help="major version of the PostgreSQL to start (default: 18 if there is one)")
    parser.add_argument("--cpus", type=int, default=2, help="processors that server and workers share; 0: all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for tables, plot and samples")
    options = parser.parse_args()
    known = {row.number for row in ROWS}
    for number in options.only or ():
        if number not in known:
            parser.error(f"there is no row {number}; there are {', '.join(map(str, sorted(known)))}")
    for name in options.systems or ():
        if name not in SYSTEMS:
            parser.error(f"there is no system {name!r}; there are {', '.join(SYSTEMS)}")
    options.exactly = bool(options.only and options.repeat)
    options.repeat = options.repeat or (3 if options.quick else 5)
    options.scale = QUICK if options.quick else FULL
    if options.jobs:
        options.scale = dataclasses.replace(options.scale, jobs=options.jobs)
    return options


def chosen_rows(only: list[int] | None) -> list[Row]:
    """With those whose samples they judge."""
    if only is None:
        return list(ROWS)
    judged = {row.samples_of for row in ROWS if row.number in only}
    return [row for row in ROWS if row.number in only or row.number in judged]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def installed_peers() -> dict[str, str]:
    versions = {}
    for name in PEER_NAMES:
        version = machine.peer_version(name)
        if version is None:
            print(f"{name} is not installed and is left out; `make bench-peers` installs what it can", file=sys.stderr)
        else:
            versions[name] = version
    return versions


def measure(
    bench: Bench, rows: list[Row], wanted: set[str], options: argparse.Namespace, samples: Samples, console: Console
) -> Iterator[None]:
    """Measures a row with each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for row in rows:
            if row.samples_of is not None:
                continue
            systems = [SYSTEMS[name] for name in row.systems if name in wanted]
            repeat = options.repeat if options.exactly else min(options.repeat, row.repeat or options.repeat)
            task = progress.add_task(f"{row.number}. {row.title}", total=repeat * len(systems))
            for repetition in range(repeat):
                # Each system follows each other one in turn.
                shift = repetition % max(len(systems), 1)
                for system in systems[shift:] + systems[:shift]:
                    try:
                        samples.add(row, system.name, row.measure(bench, system, options.scale))
                    except Refused as refusal:
                        samples.refused.append(f"row {row.number}, {system.name}: {refusal}")
                        console.print(f"refused: {samples.refused[-1]}", style="red", markup=False)
                    progress.advance(task)
                    if not console.is_terminal:
                        console.print(f"row {row.number}, {repetition + 1} of {repeat}, {system.name}", highlight=False)
            yield


def render(rows: list[Row], samples: Samples, about: list[str], options: argparse.Namespace) -> str:
    command = "python -m benchmarks " + " ".join(sys.argv[1:])
    names = [name for name in SYSTEMS if any(name == figure[0] for row in samples.values.values() for figure in row)]
    parts = [
        f"Measured on {datetime.now(UTC):%Y-%m-%d} by `{command.strip()}`, {options.repeat} repetitions.",
        "\n".join(f"* {line}" for line in about),
        report.systems_table(names),
        report.claims_table(rows, samples),
        *(report.row_table(row, samples) for row in rows if samples.of(row) and row.samples_of is None),
    ]
    if samples.refused:
        parts.append("Refused samples:\n\n" + "\n".join(f"* {line}" for line in samples.refused))
    return "\n\n".join(parts) + "\n"


def save(folder: Path, rows: list[Row], about: list[str], samples: Samples, options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text(render(rows, samples, about, options))
    document = {
        "about": about,
        "at": datetime.now(UTC).isoformat(),
        "arguments": sys.argv[1:],
        "samples": [
            {"row": row, "system": system, "metric": metric, "values": values}
            for row, of_row in samples.values.items()
            for (system, metric), values in of_row.items()
        ],
        "refused": samples.refused,
    }
    (folder / "samples.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
