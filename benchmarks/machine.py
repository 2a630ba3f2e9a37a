"""What a run was measured on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess

from benchmarks import broker
from benchmarks.systems import NODE, PEERS
from pgqueue.bench import describe_machine, describe_versions

PACKAGES = {
    "pgqueuer": "pgqueuer",
    "procrastinate": "procrastinate",
    "chancy": "chancy",
    "awa": "awa-pg",
    "rabbitmq": "pika",
}
MODULES = {"graphile-worker": "graphile-worker", "pg-boss": "pg-boss"}


def limit_cpus(count: int) -> None:
    """Keep this process, and all that it starts, on the first so many of the processors it may use; 0: all."""
    if count and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def prefer_this_process() -> None:
    """A little more priority than the rest of the machine has, where that is allowed."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(-5)


def describe() -> list[str]:
    return [describe_machine(), describe_versions()]


def peer_version(system: str) -> str | None:
    """The version that is installed for a peer; None when none is."""
    if system == "rabbitmq" and not broker.is_installed():
        return None
    if system in PACKAGES:
        python = PEERS / system / "bin" / "python"
        code = f"import importlib.metadata as m; print(m.version({PACKAGES[system]!r}))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True) if python.exists() else None
        return done.stdout.strip() if done is not None and done.returncode == 0 else None
    if system in MODULES:
        manifest = NODE / "node_modules" / MODULES[system] / "package.json"
        return str(json.loads(manifest.read_text())["version"]) if manifest.exists() else None
    return None
