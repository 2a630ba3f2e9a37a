"""What a worker's task has to do for a benchmark: note which job ran, and when.

No dependencies: this is imported in every peer's own environment. A worker process that ends writes what it noted
to a file in the folder BENCH_RECORDS; while it runs, another small file says how many jobs it has run so far.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from array import array
from pathlib import Path

TICK_SECONDS = 0.01

#: One number per run, so that appending it is one step that no other thread can divide: microseconds since the
#: start of the benchmark, and the job's number in the lowest 24 bits.
NUMBER_BITS = 24

_folder = Path(os.environ.get("BENCH_RECORDS", "."))
_epoch = int(os.environ.get("BENCH_EPOCH", "0"))
_runs = array("Q")
_append = _runs.append
_now = time.monotonic_ns
_cpu_before = 0.0


def microseconds() -> int:
    """Since the start of the benchmark; the same in all processes of this machine."""
    return (_now() - _epoch) // 1_000


def _first(n: int) -> None:
    global record, _cpu_before
    _append((_now() - _epoch) // 1_000 << NUMBER_BITS | n)
    _cpu_before = time.process_time()
    record = _later
    atexit.register(_write)
    threading.Thread(target=_report, daemon=True).start()


def _later(n: int) -> None:
    _append((_now() - _epoch) // 1_000 << NUMBER_BITS | n)


record = _first


def run(n: int) -> None:
    """Note that job number `n` runs now."""
    record(n)


def _report() -> None:
    path = _folder / f"{os.getpid()}.count"
    with path.open("wb", buffering=0) as file:
        while True:
            os.pwrite(file.fileno(), len(_runs).to_bytes(8, "little"), 0)
            time.sleep(TICK_SECONDS)


def _write() -> None:
    cpu = time.process_time() - _cpu_before
    mask = (1 << NUMBER_BITS) - 1
    numbers = [run & mask for run in _runs]
    moments = [run >> NUMBER_BITS for run in _runs]
    content = json.dumps({"cpu_seconds": cpu, "numbers": numbers, "microseconds": moments})
    (_folder / f"{os.getpid()}.json").write_text(content)
