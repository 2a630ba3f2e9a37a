"""Install the peers into environments of their own under benchmarks/.peers. What cannot be installed is said, and
the rest goes on.

    python -m benchmarks.install [NAME …]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.systems import NODE, PEERS, PROGRAMS

#: The versions that the published figures are of; change them to measure others.
PACKAGES = {
    "pgqueuer": ("pgqueuer[asyncpg]==1.6.0", "uvloop==0.23.0"),
    "procrastinate": ("procrastinate==3.10.0", "psycopg[binary,pool]==3.3.9"),
    "chancy": ("chancy==0.26.0", "psycopg[binary,pool]==3.3.9"),
    "awa": ("awa-pg==0.6.9",),
    "rabbitmq": ("pika==1.4.4",),
}
#: Both want a newer Node than many systems have; the package `node` brings one.
NODE_VERSION = "22.23.3"
MODULES = {"graphile-worker": "0.18.0", "pg-boss": "12.35.0"}


def main() -> None:
    names = sys.argv[1:] or [*PACKAGES, *MODULES]
    failed = False
    for name in names:
        try:
            install(name)
            print(f"{name} is installed", flush=True)
        except CannotInstall as error:
            failed = True
            print(f"{name} cannot be installed and is left out: {error}", file=sys.stderr, flush=True)
    if failed and len(names) == 1:
        raise SystemExit(1)


class CannotInstall(Exception):
    pass


def install(name: str) -> None:
    if name in PACKAGES:
        install_packages(name, PACKAGES[name])
    elif name in MODULES:
        install_module(name, MODULES[name])
    else:
        raise CannotInstall(f"there is no such peer; there are {', '.join([*PACKAGES, *MODULES])}")


def install_packages(name: str, packages: tuple[str, ...]) -> None:
    if name == "rabbitmq" and not shutil.which("rabbitmq-server"):
        raise CannotInstall("there is no rabbitmq-server on this machine")
    folder = PEERS / name
    if not (folder / "bin" / "pip").exists():
        venv.create(folder, with_pip=True, clear=True)
    run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])


def install_module(name: str, version: str) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise CannotInstall("there is no npm on this machine")
    NODE.mkdir(parents=True, exist_ok=True)
    if not (NODE / "package.json").exists():
        (NODE / "package.json").write_text(json.dumps({"private": True}))
    node = NODE / "node_modules" / "node" / "bin" / "node"
    if not node.exists():
        run([npm, "install", "--no-audit", "--no-fund", f"node@{NODE_VERSION}"], NODE)
    # With that Node, so that npm takes the versions that are made for it.
    run([node, Path(npm).resolve(), "install", "--no-audit", "--no-fund", f"{name}@{version}"], NODE)
    for program in PROGRAMS.glob("*.mjs"):
        shutil.copy(program, NODE)


def run(command: list[str | Path], folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        wrong = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise CannotInstall(" ".join(wrong[:3]) or f"exit code {done.returncode}")


if __name__ == "__main__":
    main()
