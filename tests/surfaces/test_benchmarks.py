"""The benchmarks run, and refuse a sample in which a job did not run exactly once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from documents import PROJECT


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROJECT))
    import benchmarks.systems

    return benchmarks.systems


def test_the_benchmarks_measure_and_keep_every_sample(tmp_path: Path, pg_version: str | None) -> None:
    sizes = ["--quick", "--jobs=300", "--repeat=2", "--cpus=0", f"--pg={pg_version or 18}"]
    what = ["--only=1,13", "--systems=pgqueue,limit", f"--output={tmp_path}"]

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *sizes, *what], cwd=PROJECT, capture_output=True, text=True, timeout=200
    )

    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "samples.json").read_text())
    assert document["refused"] == []
    rates = {sample["system"]: sample["values"] for sample in document["samples"] if sample["metric"] == "jobs/s"}
    assert {system: len(values) for system, values in rates.items()} == {"pgqueue": 2, "limit": 2}
    assert all(value > 0 for values in rates.values() for value in values)
    assert (tmp_path / "table.md").read_text() == done.stdout
    assert "| 1 | pgqueue ÷ limit |" in done.stdout
    assert "| 13 | pgqueue |" in done.stdout


def test_a_row_that_judges_the_samples_of_another_is_measured_with_it(systems: ModuleType) -> None:
    from benchmarks.__main__ import chosen_rows

    assert [row.number for row in chosen_rows([13])] == [1, 13]
    assert [row.number for row in chosen_rows([2])] == [2]
    assert [row.number for row in chosen_rows(None)] == list(range(1, 19))


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [([0, 1, 1, 2], "0 never ran and 1 ran more than once"), ([0, 2], "1 never ran and 0 ran more than once")],
)
def test_a_sample_in_which_a_job_did_not_run_exactly_once_is_refused(
    systems: ModuleType, numbers: list[int], complaint: str
) -> None:
    records = systems.Records([(moment, number) for moment, number in enumerate(numbers)], cpu_seconds=0.0)

    with pytest.raises(systems.Refused, match=complaint):
        records.require_exactly_once(3)


def test_a_sample_in_which_every_job_ran_once_is_taken(systems: ModuleType) -> None:
    systems.Records([(9, 2), (10, 0), (11, 1)], cpu_seconds=0.0).require_exactly_once(3)


def test_a_wait_counts_as_unfair_only_while_the_other_worker_is_idle(systems: ModuleType) -> None:
    from benchmarks.scenarios import fairness

    # Worker 1 claims two jobs at 0 and starts the second at 4. Worker 2 is busy in all its slots until 3.
    busy = [{"id": n, "began": 0.0, "ended": 3.0} for n in (10, 11, 12, 13)]
    runs = [{"id": 1, "began": 0.0, "ended": 4.0}, {"id": 2, "began": 4.0, "ended": 5.0}, *busy]
    claims = {1: (0.0, 1), 2: (0.0, 1), **{int(run["id"]): (0.0, 2) for run in busy}}

    measured = fairness.waits(runs, claims, [])

    assert measured[fairness.LONGEST] == pytest.approx(4_000)
    assert measured[fairness.BUFFERED] == pytest.approx(1_000)


def test_a_job_that_was_given_back_waited_until_then(systems: ModuleType) -> None:
    from benchmarks.scenarios import fairness

    runs = [{"id": 1, "began": 0.0, "ended": 4.0}, {"id": 2, "began": 0.5, "ended": 0.6}]
    claims = {1: (0.0, 1), 2: (0.5, 2)}

    measured = fairness.waits(runs, claims, [(1, 0.0, 0.4)])

    assert measured == {fairness.LONGEST: 400.0, fairness.BUFFERED: 0.0, fairness.GIVEN_BACK: 1}
