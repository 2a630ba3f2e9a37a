"""Processes that migrate a database at the same moment."""

from __future__ import annotations

import sys
from pathlib import Path

from support import Process, wait_for

from pgqueue import migration

HEAD = migration.head_revision()

#: What a test adds to the history.
NEXT = f"pgqueue_{int(HEAD.removeprefix('pgqueue_')) + 1:04}"

DEPLOY = """
import logging, sys, time
from pathlib import Path
from pgqueue import migration
from pgqueue.engine import make_engine

url, folder, number = sys.argv[1:]
logging.basicConfig(level=logging.INFO)
migration.migrations_path = lambda: Path(folder)
Path(f"ready-{number}").touch()
while not Path("go").exists():
    time.sleep(0.001)
migration.upgrade(make_engine(url), "pgqueue")
"""


class Deployers:
    """Processes that call `migration.upgrade` once they are let go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Process] = []
        (folder / "deploy.py").write_text(DEPLOY)

    def start(self, url: str, **environ: str) -> Process:
        number = str(len(self.processes))
        arguments = [sys.executable, "deploy.py", url, str(migration.migrations_path()), number]
        process = Process(arguments, cwd=self.folder, **environ)
        self.processes.append(process)
        wait_for(lambda: (self.folder / f"ready-{number}").exists(), "a deployer to be ready")
        return process

    def go(self) -> None:
        (self.folder / "go").touch()

    def close(self) -> None:
        for process in self.processes:
            process.close()
