"""The queue over HTTP, for producers and workers in any language: an ASGI application.

`openapi` says what requests and answers look like, `tokens` who may call, `serving` runs the application by itself.
What an operation does is a call of PgQueue, made in a thread: the database is never waited for in the event loop.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache, partial
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

from pgqueue import migration
from pgqueue.client import PgQueue, Task
from pgqueue.engine import is_in_memory, is_transient
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
    TaskNotFound,
)
from pgqueue.handle import DROPPED_ID
from pgqueue.job import ClaimedJob, Job, JobStatus
from pgqueue.openapi import (
    BODY_BYTES_MAX,
    DEPTH_MAX,
    IDEMPOTENCY_KEY_CHARACTERS_MAX,
    OPERATIONS,
    PRIORITIES,
    CompleteBody,
    DeadQuery,
    DequeueQuery,
    ExtendBody,
    FailBody,
    Operation,
    RetryBody,
    StatsQuery,
    TaskBody,
    document,
)
from pgqueue.operations import QueueSummary
from pgqueue.task import problems
from pgqueue.tokens import ANYONE, TOKENS_VARIABLE, Principal, Scope, Tokens, parse_tokens, tokens_from_environment
from pgqueue.unique import Unique

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

#: Every enqueue asks how many jobs there are, so that a count is used for ten times as long as it took. Who asks for
#: nothing but the count gets a new one, unless it takes longer than the second figure.
STATS_REST, STATS_QUICK_SECONDS = 10.0, 0.05

#: How long an answer of /readyz holds, so that anybody may ask as often as they like.
READY_SECONDS = 1.0

#: Seconds after which to try again, when the database is down and when there is too much to do.
RETRY_AFTER_OUTAGE, RETRY_AFTER_BUSY = 5, 1

#: How long an Idempotency-Key is known, counted from its first request.
IDEMPOTENCY_SECONDS = 86_400.0

#: Types that were not declared, kept for the next request.
UNDECLARED_TYPES_MAX = 256

STATUS_NAMES = {
    JobStatus.PENDING: "pending",
    JobStatus.RUNNING: "processing",
    JobStatus.COMPLETED: "completed",
    JobStatus.DEAD: "failed",
    JobStatus.CANCELLED: "cancelled",
}

#: The answer to an error: the first line that fits.
ERROR_STATUSES: tuple[tuple[type[PgqueueError], int], ...] = (
    (JobNotFound, 404),
    (ClaimLost, 409),
    (IllegalTransition, 409),
    (DuplicateJob, 409),
    (InvalidPayload, 400),
)

FINGERPRINT = "idempotency_fingerprint"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,64}")

_ID = re.compile(r"[0-9]{1,19}")

_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,%d}" % IDEMPOTENCY_KEY_CHARACTERS_MAX)  # noqa: UP031 — braces

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
    endpoints = _Endpoints(_Service(pgq, any_type), None if unprotected else accepted, threads)
    app = Starlette(
        routes=[endpoints.route(operation) for operation in OPERATIONS],
        middleware=[Middleware(cast(Any, _Guard), hosts=[_normal_host(host) for host in trusted_hosts])],
        exception_handlers={_Refused: _answer_refusal, HTTPException: _answer_router},
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


class _Refused(Exception):
    """Ends a request with an error."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None, /, **more: Any) -> None:
        super().__init__(message)
        self.answer = _error(status, message, headers, **more)


def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, _Refused)
    return error.answer


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


@dataclass(frozen=True, slots=True)
class _Call:
    """A request that was understood."""

    principal: Principal
    id: int = 0
    query: Any = None
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    content: Any = None
    note: str = ""  #: for the log
    headers: Mapping[str, str] = field(default_factory=dict)
    claimed: Sequence[ClaimedJob] = ()


class _Endpoints:
    """Reads requests, runs what they ask for in a thread, writes answers."""

    def __init__(self, service: _Service, tokens: Tokens | None, threads: int) -> None:
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
        call = _Call(
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
            raise _Refused(401, "A bearer token is required", {"WWW-Authenticate": "Bearer"})
        request.state.principal = principal
        if operation.scope not in principal.scopes:
            challenge = f'Bearer error="insufficient_scope", scope="{operation.scope}"'
            raise _Refused(403, f"The token lacks the scope {operation.scope}", {"WWW-Authenticate": challenge})
        return principal

    async def _run(self, operation: Operation, call: _Call) -> _Answer:
        run: Callable[[_Call], _Answer] = getattr(self._service, operation.name)
        try:
            answer: _Answer = await self._in_thread(partial(run, call), enqueues=operation.scope is Scope.ENQUEUE)
            return answer
        except (SchemaMissing, SchemaOutdated, DatabaseUnreachable) as error:
            logger.warning("the database cannot be used: %s", error)
            raise _unavailable() from None
        except QueueFull as error:
            raise _full(str(error)) from None
        except PgqueueError as error:
            status = next((status for kind, status in ERROR_STATUSES if isinstance(error, kind)), None)
            if status is None:
                raise
            if status == 409 and call.id:
                standing = await self._in_thread(partial(self._service.status, call.id))
                raise _Refused(status, str(error), None, status=standing) from None
            raise _Refused(status, str(error)) from None
        except Exception as error:
            if isinstance(error, _Refused) or not is_transient(error):
                raise
            logger.warning("the database did not do it, and may when asked again: %s", type(error).__name__)
            raise _unavailable() from None

    async def _in_thread(self, run: Callable[[], Any], *, enqueues: bool = False) -> Any:
        limiter = self._limiter(enqueues)
        if limiter.statistics().tasks_waiting >= WAITING_MAX:
            raise _Refused(503, "Busy; try again later", {"Retry-After": str(RETRY_AFTER_BUSY)})
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


def _full(message: str) -> _Refused:
    return _Refused(429, message, {"Retry-After": str(RETRY_AFTER_BUSY)})


def _unavailable() -> _Refused:
    message = "The database is not available; try again later"
    return _Refused(503, message, {"Retry-After": str(RETRY_AFTER_OUTAGE)})


def _document_at(root_path: str) -> dict[str, Any]:
    return {**document(), "servers": [{"url": root_path or "/"}]}


def _id_of(request: Request) -> int:
    given = request.path_params["id"]
    number = int(given) if _ID.fullmatch(given) else 2**63
    if number >= 2**63:
        raise _Refused(404, "There is no such job")
    return number


def _query_of(operation: Operation, request: Request) -> pydantic.BaseModel:
    values: dict[str, Any] = {}
    for name in request.query_params:
        given = request.query_params.getlist(name)
        several = name == "type" and operation.name == "dequeue"
        if len(given) > 1 and not several:
            raise _Refused(400, "A parameter is there twice")
        values[name] = given if several else given[0]
    return _fitting(operation.query, values)


async def _body_of(operation: Operation, request: Request) -> pydantic.BaseModel:
    text = await _read(request)
    assert operation.body is not None
    if not text and operation.body_optional:
        return operation.body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise _Refused(415, "Content-Type must be application/json")
    try:
        content = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        if "recursion" in str(error):
            raise _Refused(400, f"Nested deeper than {DEPTH_MAX} levels") from None
        raise _Refused(400, "Invalid JSON") from None
    _require_flat(content)
    if operation.body is TaskBody and isinstance(content, dict):
        if content.get("type") in (None, "") or content.get("payload") is None:
            raise _Refused(400, "type and payload required")
    elif "token" in operation.body.model_fields and isinstance(content, dict) and content.get("token") is None:
        raise _Refused(400, "token required: send the one that came with the job from /dequeue")
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
        raise _Refused(408, "The body did not arrive in time", {"Connection": "close"}) from None
    return bytes(text)


def _too_large() -> _Refused:
    # Whoever sends that much is not listened to until its end.
    return _Refused(413, f"The body must be at most {BODY_BYTES_MAX} bytes", {"Connection": "close"})


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
        raise _Refused(400, f"Nested deeper than {DEPTH_MAX} levels")


def _fitting(model: type[pydantic.BaseModel], values: Any) -> pydantic.BaseModel:
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise _Refused(400, problems(error)) from None


# What the operations do ------------------------------------------------------------------------------------


class _Service:
    """A method for each operation; all of them wait for the database."""

    def __init__(self, pgq: PgQueue, any_type: bool) -> None:
        self._pgq = pgq
        self._any_type = any_type
        self._undeclared = lru_cache(UNDECLARED_TYPES_MAX)(partial(pgq.external_task, register=False))
        self._remembering = lru_cache(UNDECLARED_TYPES_MAX)(_remembering)
        self._stats = _Counts(pgq)
        self._ready_until = 0.0

    @property
    def one_at_a_time(self) -> bool:
        """A SQLite database in memory is one connection."""
        return is_in_memory(self._pgq.url)

    def enqueue(self, call: _Call) -> _Answer:
        body: TaskBody = call.body
        key = call.headers.get("Idempotency-Key")
        if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
            raise _Refused(
                400, f"Idempotency-Key must be 1 to {IDEMPOTENCY_KEY_CHARACTERS_MAX} visible ASCII characters"
            )
        if key is not None and body.unique_key is not None:
            raise _Refused(400, "Give either the header Idempotency-Key or uniqueKey, not both")
        try:
            known = self._task(body.type)
            task = (known if key is None else self._remembering(known)).using(**_options(call, body, key))
        except TaskNotFound:
            raise _Refused(
                400,
                f"The type {body.type!r} is not known here: declare it in the application "
                "(external_task), or start the server with --any-type",
            ) from None
        except ConfigurationError as error:
            raise _Refused(400, str(error)) from None
        with self._pgq.begin() as connection:
            result = task.enqueue(connection, **body.payload)
        if result.id == DROPPED_ID:
            raise _full(f"queue {task.options.queue or task.definition.queue!r} is full")
        if key is not None and not result.inserted:
            self._require_same_request(result.id, body)
        queue = task.options.queue or task.definition.queue
        content = {
            "taskId": str(result.id),
            "message": "Task enqueued" if result.inserted or key is not None else "Task already enqueued",
            "stats": self._stats.after_enqueue(result.inserted),
        }
        done = "enqueued" if result.inserted else "found"
        headers = {} if result.inserted or key is None else {"Idempotent-Replayed": "true"}
        return _Answer(202, content, f"{done} job {result.id} ({body.type}) in {queue}", headers)

    def _task(self, name: str) -> Task[..., Any]:
        if self._any_type and name not in self._pgq.tasks:
            return self._undeclared(name)
        return self._pgq.get_task(name)

    def _require_same_request(self, job_id: int, body: TaskBody) -> None:
        try:
            first = self._pgq.get_job(job_id).metadata
        except JobNotFound:
            return  # pruned since
        if isinstance(first, dict) and first.get(FINGERPRINT) != _fingerprint(body):
            raise _Refused(422, "This Idempotency-Key was used for another request")

    def stats(self, call: _Call) -> _Answer:
        query: StatsQuery = call.query
        return _Answer(200, self._stats.get(query.queue))

    def dequeue(self, call: _Call) -> _Answer:
        query: DequeueQuery = call.query
        worker = query.worker or "http"
        jobs = self._pgq.claim(
            worker if call.principal is ANYONE else f"{call.principal.name}/{worker}",
            queue=query.queue,
            tasks=query.type or None,
            limit=query.limit or 1,
            lease=query.lease,
        )
        shown, claimed = [], []
        for job in jobs:
            try:
                shown.append(_claimed(job))
                claimed.append(job)
            except ValueError as error:
                # Plain SQL can store what no client could read: one such job must not hold up the others.
                self._pgq.nack(job, error=f"the payload cannot be decoded: {error}", dead=True)
        if not claimed:
            return _Answer(204)
        note = "dequeued " + ", ".join(f"job {job.id} ({job.task}), attempt {job.attempt}" for job in claimed)
        return _Answer(200, shown[0] if query.limit is None else shown, note, claimed=claimed)

    def give_back(self, jobs: Sequence[ClaimedJob]) -> None:
        """No retry is charged: nobody has seen them."""
        self._pgq.nack(jobs)

    def complete(self, call: _Call) -> _Answer:
        body: CompleteBody = call.body
        job = self._pgq.get_claim(call.id, body.token)
        self._pgq.ack(job, result=body.result)
        return _Answer(200, {"id": str(job.id), "status": "completed"}, f"completed job {job.id} ({job.task})")

    def fail(self, call: _Call) -> _Answer:
        body: FailBody = call.body
        job = self._pgq.get_claim(call.id, body.token)
        self._pgq.nack(job, error=body.error or "", delay=None if body.dead else body.delay, dead=body.dead)
        # A job that somebody had asked to stop is cancelled instead.
        cancelled = self.status(job.id) == "cancelled"
        retried = job.retries < job.max_retries and not body.dead and not cancelled
        retries = job.retries + retried
        status = "cancelled" if cancelled else "pending" if retried else "failed"
        how = {
            "cancelled": "cancelled as asked",
            "pending": f"retry {retries}/{job.max_retries}",
            "failed": f"permanently after {job.attempt} attempts",
        }
        content = {"id": str(job.id), "status": status, "retries": retries, "maxRetries": job.max_retries}
        return _Answer(200, content, f"job {job.id} ({job.task}) failed, {how[status]}")

    def extend(self, call: _Call) -> _Answer:
        body: ExtendBody = call.body
        job = self._pgq.get_claim(call.id, body.token)
        self._pgq.extend(job, lease=body.lease)
        content = {"id": str(job.id), "lease": body.lease, "cancelRequested": job.cancel_requested}
        return _Answer(200, content, f"extended job {job.id}")

    def dead(self, call: _Call) -> _Answer:
        query: DeadQuery = call.query
        jobs = self._pgq.list_jobs(
            status=JobStatus.DEAD, queue=query.queue, task=query.type, before_id=query.before, limit=query.limit
        )
        following = str(jobs[-1].id) if len(jobs) == query.limit else None
        return _Answer(200, {"jobs": [_view(job) for job in jobs], "next": following})

    def retry(self, call: _Call) -> _Answer:
        body: RetryBody = call.body
        job = self._pgq.get_job(call.id)
        if job.status != JobStatus.DEAD:
            raise IllegalTransition(
                f"job {job.id} is {STATUS_NAMES[JobStatus(job.status)]}; only a failed job can be retried"
            )
        self._pgq.replay(job.id, reason=body.reason, actor=f"http:{call.principal.name}")
        return _Answer(200, {"id": str(job.id), "status": "pending"}, f"put job {job.id} ({job.task}) back to pending")

    def job(self, call: _Call) -> _Answer:
        return _Answer(200, _view(self._pgq.get_job(call.id)))

    def status(self, job_id: int) -> str | None:
        """Where a job stands."""
        try:
            return STATUS_NAMES[JobStatus(self._pgq.get_job(job_id).status)]
        except JobNotFound:
            return None

    def healthz(self, call: _Call) -> _Answer:
        return _Answer(200, {"status": "ok"})

    def readyz(self, call: _Call) -> _Answer:
        if time.monotonic() >= self._ready_until:
            with self._pgq.reading() as connection:
                migration.require_current(connection, self._pgq.schema)
            self._ready_until = time.monotonic() + READY_SECONDS
        return _Answer(200, {"status": "ok"})


class _Counts:
    """How many jobs stand where. Small tables are counted when somebody asks, large ones a tenth of the time."""

    def __init__(self, pgq: PgQueue) -> None:
        self._pgq = pgq
        self._counting = threading.Lock()
        self._summaries: list[QueueSummary] | None = None
        self._took = 0.0
        self._good_until = 0.0
        self._enqueued = 0  # here, since the last count

    def get(self, queue: str | None = None) -> dict[str, int]:
        """In one queue or in all."""
        return self._of(self._count(STATS_QUICK_SECONDS), queue)

    def after_enqueue(self, inserted: bool) -> dict[str, int] | None:
        """In all queues, the new job among them; None when they cannot be counted: the job is stored all the same."""
        self._enqueued += inserted
        try:
            counts = self._of(self._count(0.0), None)
        except Exception as error:  # noqa: BLE001 — whatever it is, the answer says that the job is stored
            logger.warning("the jobs could not be counted: %s", type(error).__name__)
            return None
        counts["pending"] += self._enqueued
        return counts

    def _of(self, summaries: Sequence[QueueSummary], queue: str | None) -> dict[str, int]:
        chosen = [summary for summary in summaries if queue in (None, summary.queue)]
        return {
            "pending": sum(summary.ready + summary.scheduled for summary in chosen),
            "processing": sum(summary.running for summary in chosen),
            "completed": sum(summary.completed for summary in chosen),
            "failed": sum(summary.dead for summary in chosen),
        }

    def _count(self, quick_seconds: float) -> list[QueueSummary]:
        known = self._summaries
        if known is not None and self._took >= quick_seconds and time.monotonic() < self._good_until:
            return known
        if not self._counting.acquire(blocking=known is None):
            assert known is not None
            return known  # somebody counts at this moment
        try:
            self._enqueued = 0
            started = time.monotonic()
            self._summaries = counted = self._pgq.queues()
            ended = time.monotonic()
            self._took, self._good_until = ended - started, ended + STATS_REST * (ended - started)
            return counted
        finally:
            self._counting.release()


def _remembering(task: Task[..., Any]) -> Task[..., Any]:
    """The same task, with unique keys that outlast their jobs."""
    unique = Unique(period=IDEMPOTENCY_SECONDS)
    remembering: Task[..., Any] = Task(task.pgq, replace(task.definition, unique=unique))
    remembering.external = task.external
    return remembering


def _options(call: _Call, body: TaskBody, key: str | None) -> dict[str, Any]:
    metadata = body.metadata
    if key is not None:
        metadata = {**(metadata or {}), FINGERPRINT: _fingerprint(body)}
    return {
        "queue": body.queue,
        "priority": PRIORITIES[body.priority] if isinstance(body.priority, str) else body.priority,
        "max_retries": body.max_retries,
        "delay": body.delay,
        "at": body.execute_at,
        "unique_key": body.unique_key if key is None else f"idempotency:{call.principal.name}:{key}",
        "on_conflict": body.on_conflict if key is None else None,
        "metadata": metadata,
    }


def _fingerprint(body: TaskBody) -> str:
    """What tells two requests with the same Idempotency-Key apart."""
    content = json.dumps(body.model_dump(warnings=False), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _claimed(job: ClaimedJob) -> dict[str, Any]:
    """ValueError when the payload cannot be decoded."""
    return {
        "id": str(job.id),
        "type": job.task,
        "payload": job.payload,
        "status": "processing",
        "queue": job.queue,
        "priority": job.priority,
        "attempt": job.attempt,
        "retries": job.retries,
        "maxRetries": job.max_retries,
        "createdAt": _milliseconds(job.created_at),
        "metadata": job.metadata,
        "token": str(job.claim_token),
    }


def _view(job: Job) -> dict[str, Any]:
    """Without the claim's token, which is its holder's alone, and without tracebacks."""
    error = job.error if isinstance(job.error, dict) else {}
    return {
        "id": str(job.id),
        "type": job.task,
        "payload": job.payload,
        "status": STATUS_NAMES[JobStatus(job.status)],
        "queue": job.queue,
        "priority": job.priority,
        "attempt": job.attempt,
        "retries": job.retries,
        "maxRetries": job.max_retries,
        "createdAt": _milliseconds(job.created_at),
        "runAt": _milliseconds(job.run_at),
        "claimedAt": job.claimed_at and _milliseconds(job.claimed_at),
        "claimedBy": job.claimed_by,
        "finishedAt": job.finished_at and _milliseconds(job.finished_at),
        "uniqueKey": job.unique_key,
        "metadata": job.metadata,
        "result": job.result,
        "error": _text_or_none(error.get("message")),
        "errorType": _text_or_none(error.get("type")),
    }


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
