"""A TCP proxy before PostgreSQL that understands enough of the protocol to break it at chosen messages."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum

import sqlalchemy as sa

#: In place of the protocol's version: questions that the server answers with one byte before the real start.
SSL_REQUEST, GSS_REQUEST = 80877103, 80877104

#: The server's message "ready" without its last byte, the state of the transaction: what every answer ends with.
READY = b"Z\x00\x00\x00\x05"


class Fault(Enum):
    """What happens to a message of the client."""

    NONE = "it is forwarded"
    CUT = "the connection is cut before it reaches the server"
    DROP_ANSWER = "the server gets it and answers; the connection is cut before the client gets that"


@dataclass
class Message:
    """A message from the client to the server."""

    number: int  #: among all messages of all connections, from 1
    sql: str | None  #: the text, for a message that carries some
    transaction: list[str] | None  #: the texts before it since BEGIN; None outside of a transaction

    def commits(self, *parts: str) -> bool:
        """Whether this commits a statement that contains all these parts: as COMMIT, or being that statement."""
        if self.sql is None:
            return False
        if self.transaction is None:
            return all(part in self.sql for part in parts)
        return _is(self.sql, "COMMIT") and any(all(part in sql for part in parts) for sql in self.transaction)


class Proxy:
    """Forwards connections to the server; `decide` names the fault for each message of the clients."""

    def __init__(self, url: str, decide: Callable[[Message], Fault]) -> None:
        server = sa.make_url(url)
        assert server.host is not None
        assert server.port is not None
        self.server = (server.host, server.port)
        self._decide = decide
        self._lock = threading.Lock()
        self._messages = 0
        self._faults: list[Fault] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        self.url = server.set(host=host, port=port).render_as_string(hide_password=False)

    @property
    def faults(self) -> int:
        """How many messages met a fault."""
        with self._lock:
            return len(self._faults)

    @property
    def messages(self) -> int:
        """How many messages the clients sent."""
        with self._lock:
            return self._messages

    def accept(self) -> None:
        """Serve connections until closed."""
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self.server)
            except OSError:
                return
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(self, client, server)
            with self._lock:
                self._sockets += [client, server]
            for pump in (link.pump_client, link.pump_server):
                self.start_thread(pump)

    def start_thread(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def judge(self, sql: str | None, transaction: list[str] | None) -> Fault:
        with self._lock:
            self._messages += 1
            fault = self._decide(Message(self._messages, sql, transaction))
            if fault is not Fault.NONE:
                self._faults.append(fault)
            return fault

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for end in self._sockets:
            _cut(end)
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()


@contextmanager
def proxy(url: str, decide: Callable[[Message], Fault]) -> Iterator[Proxy]:
    """A proxy to the server of `url`, for the length of a `with` block."""
    started = Proxy(url, decide)
    started.start_thread(started.accept)
    try:
        yield started
    finally:
        started.close()


class _Link:
    """One connection through the proxy: a client's socket, a server's, and what was said since BEGIN."""

    def __init__(self, owner: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._owner = owner
        self._client = client
        self._server = server
        self._transaction: list[str] | None = None
        self._silenced = False
        self._prepared: dict[bytes, str] = {}

    def pump_client(self) -> None:
        with suppress(OSError, EOFError):
            while self._forward_start() in (SSL_REQUEST, GSS_REQUEST):
                pass
            while self._forward_message():
                pass
        self._cut_both()

    def pump_server(self) -> None:
        answer = b""
        with suppress(OSError):
            while data := self._server.recv(65536):
                if not self._silenced:
                    self._client.sendall(data)
                    continue
                answer += data
                if answer[:-1].endswith(READY):
                    break
        self._cut_both()

    def _forward_start(self) -> int:
        """The first message of a connection has a length and a code, but no type."""
        head = self._receive(8)
        length, code = struct.unpack("!ii", head)
        self._server.sendall(head + self._receive(length - 8))
        return int(code)

    def _forward_message(self) -> bool:
        head = self._receive(5)
        body = self._receive(struct.unpack("!i", head[1:])[0] - 4)
        sql = self._sql_of(head[:1], body)
        if sql is not None and _is(sql, "BEGIN"):
            self._transaction = []
        fault = self._owner.judge(sql, self._transaction)
        if fault is Fault.CUT:
            return False
        if fault is Fault.DROP_ANSWER:
            self._silenced = True  # before the server can answer
        self._server.sendall(head + body)
        if sql is not None and self._transaction is not None:
            self._transaction.append(sql)
            if _is(sql, "COMMIT") or _is(sql, "ROLLBACK"):
                self._transaction = None
        return True

    def _sql_of(self, kind: bytes, body: bytes) -> str | None:
        """The text that the server runs because of this message; where nothing is prepared, once the next has come."""
        if kind == b"Q":
            return body[:-1].decode()
        if kind == b"P":  # Parse: the name of the statement, its text, its parameters' types
            name, text = body.split(b"\0")[:2]
            if not name:
                return text.decode()
            self._prepared[name] = text.decode()
        if kind == b"B":  # Bind: the name of the portal, that of the statement, its parameters
            return self._prepared.get(body.split(b"\0")[1])
        return None

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._client.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def _cut_both(self) -> None:
        _cut(self._client)
        _cut(self._server)


def _is(sql: str, command: str) -> bool:
    return sql.split()[:1] == [command] and "SAVEPOINT" not in sql


def _cut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
