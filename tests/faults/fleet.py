"""Processes of the application that a test starts, freezes, kills and replaces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import PATIENCE_SECONDS, wait_for

#: Settings that keep the tests short: a dead worker's jobs are back within 1.2 s.
QUICK: dict[str, Any] = {"queues": {"default": 4}, "lease": 1.0, "sweep_interval": 0.2, "poll_interval": 0.1}

TESTS = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """The environment in which `python -m faults.app` finds its modules."""
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


class Nursery:
    """The process that forks those of all fleets."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.app", "nursery"],
            cwd=folder,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Fleet:
    """Processes of one application on one database."""

    def __init__(self, nursery: Nursery, url: str, folder: Path) -> None:
        self.url = url
        self.gates = folder / "gates"
        self.gates.mkdir()
        self.members: list[Member] = []
        self.ask = nursery.ask
        self._folder = folder

    def options(self, **config: Any) -> dict[str, Any]:
        """What a worker process is told."""
        return {"url": self.url, "gates": str(self.gates), "config": {**QUICK, **config}}

    def worker(self, *, url: str | None = None, bug: str | None = None, **config: Any) -> Member:
        """A new worker process; `config` goes over QUICK."""
        options = {**self.options(**config), "bug": bug}
        return self._start("worker", {**options, "url": url or self.url})

    def workers(self, count: int, **config: Any) -> list[Member]:
        return [self.worker(**config) for _ in range(count)]

    def enqueuer(self, **options: Any) -> Member:
        """A new process that places orders until it is killed."""
        return self._start("enqueuer", {"url": self.url, **options})

    def _start(self, role: str, options: dict[str, Any]) -> Member:
        log = self._folder / f"process-{len(self.members)}.log"
        pid = self.ask({"do": "start", "role": role, "log": str(log), "options": options})
        member = Member(self, pid, log)
        self.members.append(member)
        return member

    def open_gate(self, name: str) -> None:
        (self.gates / name).touch()

    def output(self) -> str:
        """What all processes wrote, for the message of a failure."""
        return "\n".join(f"--- {member.log.name}\n{member.output()[-3000:]}" for member in self.members)

    def close(self) -> None:
        for member in self.members:
            member.kill()


class Member:
    """One process."""

    def __init__(self, fleet: Fleet, pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self._fleet = fleet

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_output(self, text: str) -> None:
        """Wait until the process has written `text`."""
        wait_for(lambda: text in self.output(), f"{text!r} from process {self.pid}")

    def terminate(self) -> None:
        self._fleet.ask({"do": "signal", "pid": self.pid, "number": signal.SIGTERM})

    def freeze(self) -> None:
        """Stop the process where it is; returns when it stands still."""
        self._fleet.ask({"do": "freeze", "pid": self.pid})

    def wait_frozen(self) -> None:
        """Wait until the process has stopped itself."""
        wait_for(lambda: self._ask("frozen") == -signal.SIGSTOP, f"process {self.pid} to freeze")

    def thaw(self) -> None:
        self._fleet.ask({"do": "signal", "pid": self.pid, "number": signal.SIGCONT})

    def kill(self) -> None:
        """End the process, with no chance to do anything; returns when it is gone."""
        if self._ask("exited") is None:
            self._fleet.ask({"do": "signal", "pid": self.pid, "number": signal.SIGKILL})
            self._ask("wait")

    def exit_code(self, timeout: float = PATIENCE_SECONDS) -> int:
        """The exit code; negative is the number of the signal that ended it."""
        wait_for(lambda: self._ask("exited") is not None, f"process {self.pid} to end", timeout=timeout)
        code: int = self._ask("exited")
        return code

    @property
    def alive(self) -> bool:
        return self._ask("exited") is None

    def _ask(self, question: str) -> Any:
        return self._fleet.ask({"do": question, "pid": self.pid})
