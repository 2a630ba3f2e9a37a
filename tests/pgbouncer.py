"""A real PgBouncer before the tests' PostgreSQL. As that, it refuses to run as root."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from pgserver import Server
from support import PATIENCE_SECONDS, wait_for
from testing.common.database import get_unused_port

#: So many server connections has each database, whatever the number of clients.
POOL_SIZE = 6

#: Set where a test that needs PgBouncer is not to be skipped.
REQUIRED_VARIABLE = "PGQUEUE_TEST_REQUIRE_PGBOUNCER"

SETTINGS = """
[databases]
* = host={host} port={server_port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users.txt
admin_users = {user}
query_wait_timeout = 20
"""

#: As a session of the server sees itself. PgBouncer keeps track of five settings.
LEFT_BEHIND = """
    SELECT 'setting', name FROM pg_settings WHERE source = 'session'
    AND name NOT IN ('application_name', 'client_encoding', 'DateStyle', 'TimeZone', 'standard_conforming_strings')
    UNION ALL SELECT 'listens to', pg_listening_channels()
    UNION ALL SELECT 'prepared', statement FROM pg_prepared_statements
    UNION ALL SELECT 'cursor', statement FROM pg_cursors
    UNION ALL SELECT 'advisory lock', objid::text FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()
    UNION ALL SELECT 'temporary tables', '' WHERE pg_my_temp_schema() <> 0
"""


def require() -> str:
    """The program, which Debian puts where only root looks for programs. Without it, the test is skipped."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        missing = "no pgbouncer in PATH or /usr/sbin; install the package pgbouncer (apt-get install pgbouncer)"
        if os.environ.get(REQUIRED_VARIABLE):
            pytest.fail(missing)
        pytest.skip(missing)
    return program


class Bouncer:
    """One process, with a folder and a port of its own."""

    def __init__(self, server: Server, **settings: str | int) -> None:
        """`settings`: of pgbouncer.ini, over those of the tests."""
        self._program = require()
        self._server = server.dsn()
        self._settings = {"pool_mode": "transaction", "default_pool_size": POOL_SIZE, **settings}
        self._folder = Path(tempfile.mkdtemp(prefix="pgqueue-pgbouncer-"))
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = get_unused_port()
        self.start()

    def url(self, url: str) -> str:
        """The URL of a database, through the pooler."""
        through = sa.make_url(url).set(host="127.0.0.1", port=self.port)
        return through.render_as_string(hide_password=False)

    def start(self) -> None:
        """Returns when it accepts connections."""
        server = self._server
        settings = SETTINGS.format(
            host=server["host"],
            server_port=server["port"],
            user=server["user"],
            port=self.port,
            folder=self._folder,
        ) + "".join(f"{name} = {value}\n" for name, value in self._settings.items())
        (self._folder / "pgbouncer.ini").write_text(settings)
        (self._folder / "users.txt").write_text(f'"{server["user"]}" ""\n')
        drop: dict[str, Any] = {}
        if self._account is not None:
            drop = {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}
            for path in (self._folder, *self._folder.iterdir()):
                os.chown(path, self._account.pw_uid, self._account.pw_gid)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "-q", str(self._folder / "pgbouncer.ini")],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **drop,
            )
        wait_for(self._answers, "PgBouncer to accept connections")

    def stop(self) -> None:
        """End it at once, with every connection through it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE_SECONDS)
            self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def ask(self, command: str) -> list[dict[str, Any]]:
        """A command of its console, such as SHOW SERVERS."""
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user=self._server["user"], dbname="pgbouncer", autocommit=True
        ) as console:
            cursor = psycopg.ClientCursor(console, row_factory=psycopg.rows.dict_row)
            cursor.execute(command)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def left_behind(self, url: str) -> list[tuple[Any, ...]]:
        """What the sessions of a database's server connections hold that PgBouncer does not look after."""
        count = self.server_connections(url)
        pids, found = set(), []
        with ExitStack() as stack:
            for _ in range(count):
                client = stack.enter_context(psycopg.connect(self.url(url).replace("+psycopg", "")))
                # Each transaction stays open, so that the next one gets another server connection.
                pids.add(client.execute("SELECT pg_backend_pid()").fetchall()[0])
                found += client.execute(LEFT_BEHIND).fetchall()
        assert len(pids) == count >= 1
        return found

    def server_connections(self, url: str) -> int:
        """How many connections to a database it has."""
        name = sa.make_url(url).database
        return sum(server["database"] == name for server in self.ask("SHOW SERVERS"))

    @property
    def log(self) -> Path:
        return self._folder / "pgbouncer.log"

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"PgBouncer does not run:\n{self.log.read_text(errors='replace')}"
        try:
            self.ask("SHOW VERSION")
        except psycopg.OperationalError:
            return False
        return True
