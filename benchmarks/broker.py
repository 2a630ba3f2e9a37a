"""A RabbitMQ of the benchmarks' own, when the server is installed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.cluster import cpu_seconds_of

BOOT_SECONDS = 60.0


def is_installed() -> bool:
    return shutil.which("rabbitmq-server") is not None


class Broker:
    """A server in a temporary folder, with the durability that a queue and its messages ask for."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pgqueue-bench-rabbitmq-"))
        self.folder.chmod(0o777)  # the server may change to an account of its own
        self.port, distribution_port = free_port(), free_port()
        configuration = self.folder / "rabbitmq.conf"
        configuration.write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\nlog.console = true\n")
        environ = {
            **os.environ,
            "HOME": str(self.folder),
            "RABBITMQ_NODENAME": f"bench{self.port}@localhost",
            "RABBITMQ_CONFIG_FILE": str(configuration),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-setcookie bench",
            "ERL_EPMD_PORT": str(free_port()),
        }
        self.environ = environ
        environ.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            ["rabbitmq-server"],
            env=environ,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "output").open("w"),
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        deadline = time.monotonic() + BOOT_SECONDS
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                output = (self.folder / "output").read_text()[-1_500:]
                self.stop()
                raise RuntimeError(f"rabbitmq-server did not start:\n{output}")
            time.sleep(0.2)

    def url(self, queue: str) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F#queue={queue}"

    def cpu_seconds(self) -> float:
        return cpu_seconds_of(self.process.pid)

    def stop(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        # Erlang's port mapper, which the server has started beside itself and leaves behind.
        if shutil.which("epmd"):
            subprocess.run(["epmd", "-kill"], env=self.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_up(self) -> bool:
        return "Server startup complete" in (self.folder / "output").read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
