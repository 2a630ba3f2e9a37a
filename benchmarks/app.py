"""The application that the benchmarks' workers run: a task that does nothing."""

from __future__ import annotations

from pgqueue import PgQueue

#: A schema of its own, so that a benchmark on somebody's database touches no job of theirs.
SCHEMA = "pgqueue_bench"

pgq = PgQueue(schema=SCHEMA)


@pgq.task
def noop(n: int) -> None:
    pass
