"""Calls of the HTTP application, made without a socket."""

from __future__ import annotations

import asyncio
import atexit
from typing import Any

import httpx

from pgqueue import PgQueue
from pgqueue.http import create_app

_loop = asyncio.Runner()
atexit.register(_loop.close)


class Client:
    """An HTTP client of an ASGI application."""

    def __init__(self, app: Any, **headers: str) -> None:
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://localhost:3000",
            headers=headers,
        )

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return _loop.run(self._client.request(method, path, **options))


class Caller:
    """Somebody who calls the application of a queue: without tokens, from this machine, unless said otherwise."""

    def __init__(self, pgq: PgQueue, *, token: str | None = None, **options: Any) -> None:
        if "tokens" not in options:
            options.setdefault("unprotected", True)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.client = Client(create_app(pgq, **options), **headers)

    def get(self, path: str, *, status: int = 200, **options: Any) -> Any:
        return self.call("GET", path, status=status, **options)

    def post(self, path: str, body: Any = None, *, status: int = 200, **options: Any) -> Any:
        if body is not None:
            options["json"] = body
        return self.call("POST", path, status=status, **options)

    def call(self, method: str, path: str, *, status: int, **options: Any) -> Any:
        """What the answer says, decoded; None when it has no body. Fails unless the answer has that status."""
        answer = self.client.request(method, path, **options)
        assert answer.status_code == status, f"{answer.status_code} {answer.text}"
        if not answer.content:
            return None
        assert answer.headers["content-type"] == "application/json"
        return answer.json()

    def enqueue(self, type: str = "email", payload: Any = None, **options: Any) -> str:
        """The id of the new job."""
        answer = self.post("/task", {"type": type, "payload": payload or {}, **options}, status=202)
        return str(answer["taskId"])

    def dequeue(self, **parameters: Any) -> Any:
        """The job that was claimed."""
        return self.get("/dequeue", params=parameters)
