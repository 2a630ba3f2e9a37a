"""`pgqueue bench`: what it measures, what it leaves behind, when it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from command import Command
from jobs import add, everything
from support import execute, rows

from pgqueue import ConfigurationError, DatabaseUnreachable, PgQueue, PgqueueError, bench
from pgqueue.claiming import Claimer


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SINGLE_SECONDS", 0.0)
    monkeypatch.setattr(bench, "PICKUP_SECONDS", 0.0)
    monkeypatch.setattr(bench, "SAMPLES_MIN", 2)


def url_of(pgq: PgQueue) -> str:
    return pgq.url.render_as_string(hide_password=False)


def tables(pgq: PgQueue) -> set[str]:
    """The names of all tables but pgqueue's own, with their schema."""
    inspector = sa.inspect(pgq.engine)
    schemas = inspector.get_schema_names() if pgq.engine.dialect.name == "postgresql" else [None]
    names = {f"{schema}.{name}" for schema in schemas for name in inspector.get_table_names(schema)}
    return {name for name in names if not name.startswith(("pgqueue.", "information_schema.", "pg_catalog."))}


def test_a_bench_measures_enqueueing_a_drain_and_pick_up_in_each_round(pgq: PgQueue) -> None:
    told: list[int] = []

    report = bench.run_bench(pgq.url, schema="pgqueue", jobs=300, rounds=2, measured=told.append)

    assert [(measure.measure, measure.unit) for measure in report.measures] == list(bench.UNITS.items())
    for measure in report.measures:
        assert len(measure.rounds) == 2
        assert 0 < measure.lowest <= measure.median <= measure.highest
    assert (report.jobs, told) == (300, [1, 1])
    assert report.server.startswith(("PostgreSQL", "SQLite"))
    assert "pgqueue" in report.versions
    assert "processors" in report.machine


def test_a_bench_leaves_the_jobs_of_the_application_alone_and_nothing_behind(pgq: PgQueue) -> None:
    add(pgq, 3)
    before, tables_before = everything(pgq), tables(pgq)

    bench.run_bench(pgq.url, schema="pgqueue", jobs=10, rounds=1)

    assert everything(pgq) == before
    assert tables(pgq) == tables_before
    if pgq.engine.dialect.name == "postgresql":
        assert "pgqueue_bench" not in sa.inspect(pgq.engine).get_schema_names()


def test_a_bench_refuses_a_schema_that_exists_and_leaves_it_as_it_is(pgq: PgQueue) -> None:
    on_postgresql = pgq.engine.dialect.name == "postgresql"
    name = "pgqueue_bench.jobs" if on_postgresql else "pgqueue_bench_jobs"
    if on_postgresql:
        execute(pgq.engine, "CREATE SCHEMA pgqueue_bench")
    execute(pgq.engine, f"CREATE TABLE {name} (precious integer)")
    execute(pgq.engine, f"INSERT INTO {name} VALUES (7)")

    with pytest.raises(ConfigurationError, match="the schema 'pgqueue_bench' exists"):
        bench.run_bench(pgq.url, schema="pgqueue", jobs=10, rounds=1)

    assert [row[0] for row in rows(pgq.engine, f"SELECT precious FROM {name}")] == [7]


@pytest.mark.parametrize("error", [KeyboardInterrupt, PgqueueError])
def test_a_bench_that_is_interrupted_leaves_nothing_behind(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before = tables(pgq)

    def fail(*_: object) -> float:
        raise error

    monkeypatch.setattr(bench._Bench, "_drain", fail)

    with pytest.raises(error):
        bench.run_bench(pgq.url, schema="pgqueue", jobs=10, rounds=1)

    assert tables(pgq) == before


def test_a_bench_in_which_nothing_happens_says_so(pg: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(Claimer, "_fill_all", lambda *_: 60.0)

    with pytest.raises(PgqueueError, match=r"no job ended for 0\.2 s; 0 of 12 had"):
        bench.run_bench(pg.url, schema="pgqueue", jobs=10, rounds=1)

    assert "pgqueue_bench" not in sa.inspect(pg.engine).get_schema_names()


@pytest.mark.parametrize("name", ["jobs", "rounds"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, 10**9])
def test_a_bench_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be between 1 and"):
        bench.run_bench(None, schema="pgqueue", **{name: value})


def test_a_database_in_memory_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="in memory"):
        bench.run_bench("sqlite://", schema="pgqueue")


def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    with pytest.raises(DatabaseUnreachable, match=r"127\.0\.0\.1") as caught:
        bench.run_bench("postgresql://ada:secret@127.0.0.1:1/shop", schema="pgqueue")

    assert "secret" not in str(caught.value)


def test_the_command_prints_a_table_and_json(url: str) -> None:
    pgqueue = Command(url)

    table = pgqueue("bench", "--jobs", 50, "--rounds", 1).stdout
    document = pgqueue.json("bench", "--jobs", 50, "--rounds", 1, "--no-listen")

    assert "drain, one worker" in table
    assert [measure["unit"] for measure in document["measures"]] == list(bench.UNITS.values())
    assert document["jobs"] == 50


def test_without_a_database_it_measures_sqlite_in_a_temporary_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pgqueue", "bench", "--jobs", "20", "--rounds", "1", "-o", "json"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(done.stdout)["database"] == "SQLite, a temporary file"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
