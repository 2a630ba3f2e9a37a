"""The queue over HTTP, for producers and workers in any language: an ASGI application.

`openapi` says what requests and answers look like, `tokens` who may call; `answering` does what requests ask for, and
`serving` runs the application by itself.
What an operation does is a call of PgQueue, made in a thread: the database is never waited for in the event loop.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, cast

import anyio
import anyio.to_thread
import pydantic
import pydantic_core
from anyio.lowlevel import RunVar
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from pgqueue.answering import RETRY_AFTER_BUSY, Answer, Call, Refused, Service, full
from pgqueue.client import PgQueue
from pgqueue.engine import is_transient
from pgqueue.errors import (
    ClaimLost,
    ConfigurationError,
    DatabaseUnreachable,
    DuplicateJob,
    IllegalTransition,
    InvalidPayload,
    JobNotFound,
    PgqueueError,
    QueueFull,
    SchemaMissing,
    SchemaOutdated,
)
from pgqueue.openapi import (
    BODY_BYTES_MAX,
    DEPTH_MAX,
    OPERATIONS,
    Operation,
    TaskBody,
    document,
)
from pgqueue.task import problems
from pgqueue.tokens import ANYONE, TOKENS_VARIABLE, Principal, Scope, Tokens, parse_tokens, tokens_from_environment

__all__ = ["LOCAL_HOSTS", "create_app"]

logger = logging.getLogger(__name__)

#: Hosts that always mean this machine.
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

#: Requests that work on the database at once, each with a connection of its own.
THREADS = 16

#: Requests that may wait for one of the threads; more are sent away.
WAITING_MAX = 256

#: A body that takes longer to arrive is not waited for.
BODY_SECONDS = 30.0

#: Seconds after which to try again when the database is down.
RETRY_AFTER_OUTAGE = 5

#: The answer to an error: the first line that fits.
ERROR_STATUSES: tuple[tuple[type[PgqueueError], int], ...] = (
    (JobNotFound, 404),
    (ClaimLost, 409),
    (IllegalTransition, 409),
    (DuplicateJob, 409),
    (InvalidPayload, 400),
)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,64}")

_ID = re.compile(r"[0-9]{1,19}")

Scope_ = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope_, Receive, Send], Awaitable[None]]


def create_app(
    pgq: PgQueue,
    *,
    tokens: Tokens | Iterable[str] | None = None,
    unprotected: bool = False,
    trusted_hosts: Sequence[str] | None = None,
    any_type: bool = False,
    threads: int = THREADS,
) -> Starlette:
    """An ASGI application that speaks for the queue: `app.mount("/queue", create_app(pgq))`.

    tokens: lines such as "shop:enqueue,read:SECRET"; those of the variable PGQUEUE_HTTP_TOKENS unless given.
    unprotected: ask for no tokens, where something in front of the application checks who calls.
    trusted_hosts: the names in Host headers that are answered, "*" for any. Unless given: any when there are tokens,
    only this machine's when `unprotected`, as a web page could otherwise make its visitor's browser call.
    any_type: take jobs of types that the application does not declare, too.
    threads: requests that work on the database at once, each with a connection.

    Raises ConfigurationError when there are neither tokens nor `unprotected`.
    """
    if tokens is None:
        accepted = tokens_from_environment()
    else:
        accepted = tokens if isinstance(tokens, Tokens) else parse_tokens(tokens, "tokens")
    if unprotected and accepted:
        raise ConfigurationError("there are tokens, and unprotected=True would ignore them: leave one of the two away")
    if not unprotected and not accepted:
        raise ConfigurationError(
            "there are no tokens, so nobody could call. Set them, NAME:SCOPE,SCOPE:SECRET, in the variable "
            f"{TOKENS_VARIABLE} or as tokens=[…]; or say unprotected=True where something in front of it checks who "
            "calls"
        )
    if not 2 <= threads <= 1000:
        raise ConfigurationError(f"threads must be between 2 and 1000, got {threads!r}")
    if trusted_hosts is None:
        trusted_hosts = LOCAL_HOSTS if unprotected else ("*",)
    endpoints = _Endpoints(Service(pgq, any_type), None if unprotected else accepted, threads)
    app = Starlette(
        routes=[endpoints.route(operation) for operation in OPERATIONS],
        middleware=[Middleware(cast(Any, _Guard), hosts=[_normal_host(host) for host in trusted_hosts])],
        exception_handlers={Refused: _answer_refusal, HTTPException: _answer_router},
    )
    app.router.redirect_slashes = False  # any other path is not found
    return app


# Around every request --------------------------------------------------------------------------------------


class _Guard:
    """Gives the request an id and a line in the log, refuses what comes from elsewhere, and answers every error."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        given = request.headers.get("x-request-id", "")
        request.state.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request.state.note = ""
        request.state.principal = None
        started = time.monotonic()
        status: int | None = None

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                message = {**message, "headers": [*headers, (b"x-request-id", request.state.id.encode())]}
            await send(message)

        try:
            refusal = self._refusal(request)
            if refusal is not None:
                await refusal(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            request.state.note = "the client is gone"
        except Exception:
            logger.exception("request %s failed", request.state.id)
            if status is not None:
                raise
            await _error(500, "Internal server error")(scope, receive, send_with_id)
        finally:
            logger.info(
                "%s %s %s in %.1f ms, request %s%s%s",
                request.method,
                ascii(request.url.path)[1:-1],
                status,
                (time.monotonic() - started) * 1000,
                request.state.id,
                f" of {request.state.principal.name}" if request.state.principal else "",
                f": {request.state.note}" if request.state.note else "",
            )

    def _refusal(self, request: Request) -> Response | None:
        hosts = request.headers.getlist("host")
        if "*" not in self._hosts and (len(hosts) != 1 or _normal_host(hosts[0]) not in self._hosts):
            request.state.note = f"refused the host {ascii(','.join(hosts))[1:-1]}"
            return _error(421, "This server does not answer for that Host; name it with --trusted-host")
        origin = request.headers.get("origin")
        elsewhere = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if elsewhere or (origin is not None and origin.partition("://")[2] != ",".join(hosts)):
            request.state.note = "refused a web page of another site"
            return _error(403, "Web pages of other sites may not ask")
        return None


def _normal_host(host: str) -> str:
    """A host's name or address without port and brackets, in lower case."""
    found = re.fullmatch(r"\[([^\]]*)\](?::\d*)?|([^:]*)(?::\d*)?", host.strip().lower())
    if found is None:
        return host.strip().lower()
    return (found[1] if found[1] is not None else found[2]).rstrip(".")


def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error.status, str(error), error.headers, **error.more)


def _answer_router(request: Request, error: Exception) -> Response:
    """The router knows no such path, or the path has no such method."""
    status, headers = getattr(error, "status_code", 500), getattr(error, "headers", None)
    return _error(status, {404: "Not found", 405: "Method not allowed"}.get(status, "Error"), headers)


def _error(status: int, message: str, headers: Mapping[str, str] | None = None, /, **more: Any) -> Response:
    return _json(status, {"error": message, **more}, headers)


def _json(status: int, content: Any, headers: Mapping[str, str] | None = None) -> Response:
    try:
        text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    except ValueError:
        # SQLite keeps numbers that are too large for Python's float; JSON has no word for what becomes of them.
        text = json.dumps(json.loads(json.dumps(content), parse_constant=str), separators=(",", ":"))
    return Response(text, status, {"cache-control": "no-store", **(headers or {})}, "application/json")


# From a request to a call, and back ------------------------------------------------------------------------


class _Endpoints:
    """Reads requests, runs what they ask for in a thread, writes answers."""

    def __init__(self, service: Service, tokens: Tokens | None, threads: int) -> None:
        self._service = service
        self._tokens = tokens
        self._threads = threads
        self._limiters: RunVar[dict[bool, anyio.CapacityLimiter]] = RunVar(f"pgqueue-http-{uuid.uuid4()}")

    def route(self, operation: Operation) -> Route:
        route = Route(operation.path, partial(self._answer, operation), methods=list(operation.methods))
        route.methods = set(operation.methods)  # without the HEAD that comes with GET: it would claim jobs
        return route

    async def _answer(self, operation: Operation, request: Request) -> Response:
        if operation.name == "document":
            return _json(200, _document_at(request.scope.get("root_path", "")))
        principal = self._authorize(operation, request)
        call = Call(
            principal,
            _id_of(request) if operation.has_id else 0,
            _query_of(operation, request),
            await _body_of(operation, request) if operation.body is not None else None,
            {name: request.headers[name] for name in operation.headers if name in request.headers},
        )
        answer = await self._run(operation, call)
        request.state.note = answer.note
        if answer.claimed and await request.is_disconnected():
            await self._in_thread(partial(self._service.give_back, answer.claimed))
            request.state.note = f"{answer.note}, and given back: the client is gone"
        if answer.content is None:
            return Response(status_code=answer.status, headers={"cache-control": "no-store"})
        return _json(answer.status, answer.content, answer.headers)

    def _authorize(self, operation: Operation, request: Request) -> Principal:
        if operation.scope is None or self._tokens is None:
            return ANYONE
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        principal = self._tokens.find(token.strip()) if kind.lower() == "bearer" else None
        if principal is None:
            raise Refused(401, "A bearer token is required", {"WWW-Authenticate": "Bearer"})
        request.state.principal = principal
        if operation.scope not in principal.scopes:
            challenge = f'Bearer error="insufficient_scope", scope="{operation.scope}"'
            raise Refused(403, f"The token lacks the scope {operation.scope}", {"WWW-Authenticate": challenge})
        return principal

    async def _run(self, operation: Operation, call: Call) -> Answer:
        run: Callable[[Call], Answer] = getattr(self._service, operation.name)
        try:
            answer: Answer = await self._in_thread(partial(run, call), enqueues=operation.scope is Scope.ENQUEUE)
            return answer
        except (SchemaMissing, SchemaOutdated, DatabaseUnreachable) as error:
            logger.warning("the database cannot be used: %s", error)
            raise _unavailable() from None
        except QueueFull as error:
            raise full(str(error)) from None
        except PgqueueError as error:
            status = next((status for kind, status in ERROR_STATUSES if isinstance(error, kind)), None)
            if status is None:
                raise
            if status == 409 and call.id:
                standing = await self._in_thread(partial(self._service.status, call.id))
                raise Refused(status, str(error), None, status=standing) from None
            raise Refused(status, str(error)) from None
        except Exception as error:
            if isinstance(error, Refused) or not is_transient(error):
                raise
            logger.warning("the database did not do it, and may when asked again: %s", type(error).__name__)
            raise _unavailable() from None

    async def _in_thread(self, run: Callable[[], Any], *, enqueues: bool = False) -> Any:
        limiter = self._limiter(enqueues)
        if limiter.statistics().tasks_waiting >= WAITING_MAX:
            raise Refused(503, "Busy; try again later", {"Retry-After": str(RETRY_AFTER_BUSY)})
        return await anyio.to_thread.run_sync(run, limiter=limiter)

    def _limiter(self, enqueues: bool) -> anyio.CapacityLimiter:
        """Enqueues have half of the threads: where they wait for room in a queue, workers must be able to make it."""
        limiters = self._limiters.get(None)
        if limiters is None:
            if self._service.one_at_a_time:
                limiters = dict.fromkeys((True, False), anyio.CapacityLimiter(1))
            else:
                half = self._threads // 2
                limiters = {True: anyio.CapacityLimiter(half), False: anyio.CapacityLimiter(self._threads - half)}
            self._limiters.set(limiters)
        return limiters[enqueues]


def _unavailable() -> Refused:
    message = "The database is not available; try again later"
    return Refused(503, message, {"Retry-After": str(RETRY_AFTER_OUTAGE)})


def _document_at(root_path: str) -> dict[str, Any]:
    return {**document(), "servers": [{"url": root_path or "/"}]}


def _id_of(request: Request) -> int:
    given = request.path_params["id"]
    number = int(given) if _ID.fullmatch(given) else 2**63
    if number >= 2**63:
        raise Refused(404, "There is no such job")
    return number


def _query_of(operation: Operation, request: Request) -> pydantic.BaseModel:
    values: dict[str, Any] = {}
    for name in request.query_params:
        given = request.query_params.getlist(name)
        several = name == "type" and operation.name == "dequeue"
        if len(given) > 1 and not several:
            raise Refused(400, "A parameter is there twice")
        values[name] = given if several else given[0]
    return _fitting(operation.query, values)


async def _body_of(operation: Operation, request: Request) -> pydantic.BaseModel:
    text = await _read(request)
    assert operation.body is not None
    if not text and operation.body_optional:
        return operation.body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "Content-Type must be application/json")
    try:
        content = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        if "recursion" in str(error):
            raise Refused(400, f"Nested deeper than {DEPTH_MAX} levels") from None
        raise Refused(400, "Invalid JSON") from None
    _require_flat(content)
    fields = content if isinstance(content, dict) else {}
    if operation.body is TaskBody and (fields.get("type") in (None, "") or fields.get("payload") is None):
        raise Refused(400, "type and payload required")
    if not isinstance(content, dict):
        raise Refused(400, "The body must be a JSON object")
    if "token" in operation.body.model_fields and fields.get("token") is None:
        raise Refused(400, "token required: send the one that came with the job from /dequeue")
    return _fitting(operation.body, content)


async def _read(request: Request) -> bytes:
    """The body, within the limits of size and time."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:19]) > BODY_BYTES_MAX:
        raise _too_large()
    text = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for chunk in request.stream():
                text += chunk
                if len(text) > BODY_BYTES_MAX:
                    raise _too_large()
    except TimeoutError:
        raise Refused(408, "The body did not arrive in time", {"Connection": "close"}) from None
    return bytes(text)


def _too_large() -> Refused:
    # Whoever sends that much is not listened to until its end.
    return Refused(413, f"The body must be at most {BODY_BYTES_MAX} bytes", {"Connection": "close"})


def _require_flat(content: object) -> None:
    level = [content]
    for _ in range(DEPTH_MAX):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
        if not inner:
            return
        level = inner
    if any(isinstance(value, dict | list) for value in level):
        raise Refused(400, f"Nested deeper than {DEPTH_MAX} levels")


def _fitting(model: type[pydantic.BaseModel], values: Any) -> pydantic.BaseModel:
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise Refused(400, problems(error)) from None
