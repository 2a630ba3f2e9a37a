"""Run the HTTP application by itself: a socket, uvicorn, and signals."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from pgqueue.errors import ConfigurationError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens. ConfigurationError when there cannot be one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        server = socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(f"cannot listen on {host} port {port}: {reason}") from None
    with server:
        yield server


def url_of(server: socket.socket) -> str:
    host, port = server.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Any, server: socket.socket, *, shutdown_timeout: float) -> None:
    """Answer requests until SIGINT or SIGTERM; then take no more, and wait so many seconds for those under way."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,  # the application writes a line a request
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=max(1, round(shutdown_timeout)),
    )
    with _signals_are_no_errors():
        uvicorn.Server(config).run(sockets=[server])


@contextmanager
def _signals_are_no_errors() -> Iterator[None]:
    """uvicorn raises the signal that stopped it again at its end, for whoever was there before it."""

    def nothing(number: int, frame: FrameType | None) -> None:
        pass

    before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {
        number: signal.signal(number, nothing) for number in SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
