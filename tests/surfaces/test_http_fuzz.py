"""Requests made up from the OpenAPI document: none is answered with an error of the server's, or with something that
the document does not tell.

Always the same hundreds of them; `make fuzz` has 5,000 on each database, and others each time. It prints the seed that
makes them again.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import wait_for

from pgqueue import PgQueue
from pgqueue.http import create_app
from pgqueue.openapi import DEPTH_MAX, OPERATIONS, document
from pgqueue.serving import listening, url_of
from pgqueue.tokens import Scope

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import schemathesis
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

#: By default, of an operation on a database.
EXAMPLES = 10

#: On a database, all in all; 0: EXAMPLES.
REQUESTS = int(os.environ.get("PGQUEUE_FUZZ_REQUESTS", "0"))

CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

METHODS = [(operation.path, method) for operation in OPERATIONS for method in operation.methods]

#: Whose requests can differ.
VARIED = [
    (operation.path, method)
    for operation in OPERATIONS
    for method in operation.methods
    if operation.has_id or operation.body or operation.query.model_fields
]


#: Tokens, and what they allow.
SECRETS = {
    "everything-0123456789": frozenset(Scope),
    **{f"only-{scope}-0123456789": frozenset({scope}) for scope in Scope},
}


def examples_of(requests: int) -> Any:
    """Settings for so many requests, always the same unless `make fuzz` gives a seed."""
    return settings(
        max_examples=requests,
        deadline=None,
        database=None,
        derandomize=not REQUESTS,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Target:
    """A server, and what is in its queue."""

    url: str
    claims: list[tuple[str, str]]  #: ids and tokens of jobs that are held
    dead: list[str]


@pytest.fixture
def target(pgq: PgQueue) -> Iterator[Target]:
    """A server on PostgreSQL, then one on SQLite, that answers everybody."""
    with serving(pgq, unprotected=True) as url:
        yield Target(url, *prepare(pgq))


@pytest.fixture
def guarded(pgq: PgQueue) -> Iterator[Target]:
    """Likewise, and it asks for tokens."""
    tokens = [f"t{number}:{','.join(scopes)}:{secret}" for number, (secret, scopes) in enumerate(SECRETS.items())]
    with serving(pgq, tokens=tokens) as url:
        yield Target(url, *prepare(pgq))


@contextmanager
def serving(pgq: PgQueue, **options: Any) -> Iterator[str]:
    @pgq.task
    def resize(file: str, size: int = 1024) -> None: ...

    app = create_app(pgq, any_type=True, trusted_hosts=["*"], **options)
    with listening("127.0.0.1", 0) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", access_log=False, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            wait_for(lambda: server.started, "the server to start")
            yield url_of(sock)
        finally:
            server.should_exit = True
            thread.join()


def prepare(pgq: PgQueue) -> tuple[list[tuple[str, str]], list[str]]:
    """Jobs that are held and jobs that are dead, in a queue that no request names."""
    external = pgq.external_task("prepared", queue="prepared", max_retries=0)
    with pgq.begin() as connection:
        external.enqueue_many(connection, [{"n": n} for n in range(60)])
    held = pgq.claim("fuzz", queue="prepared", limit=60, lease=3600)
    dead = held[40:]
    pgq.nack(dead, error="prepared")
    return [(str(job.id), str(job.claim_token)) for job in held[:40]], [str(job.id) for job in dead]


@pytest.mark.parametrize(("path", "method"), METHODS, ids=[f"{method} {path}" for path, method in METHODS])
def test_every_request_is_answered_as_the_document_says(target: Target, path: str, method: str) -> None:
    requests = REQUESTS // len(VARIED) + 1 if REQUESTS else EXAMPLES
    asked = 0

    @given(case=cases_of(path, method), data=st.data())
    @examples_of(requests)
    def ask(case: Any, data: st.DataObject) -> None:
        nonlocal asked
        asked += 1
        if "{id}" in path and data.draw(st.booleans()):
            make_real(case, data, target)
        case.call_and_validate(base_url=target.url, checks=CHECKS)

    ask()

    assert asked >= (requests if (path, method) in VARIED else 1)


def cases_of(path: str, method: str) -> Any:
    """Requests that the document allows, and such as it does not."""
    operation = schemathesis.openapi.from_dict(document())[path][method]
    modes = [schemathesis.GenerationMode.POSITIVE]
    if operation.body or any(operation.query) or any(operation.path_parameters):
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    return st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))


def make_real(case: Any, data: st.DataObject, target: Target) -> None:
    """Let the request be about a job that there is, and often by the one who holds it."""
    if "dead" in case.path:
        case.path_parameters = {"id": data.draw(st.sampled_from(target.dead))}
        return
    job_id, token = data.draw(st.sampled_from(target.claims))
    case.path_parameters = {"id": job_id}
    if isinstance(case.body, dict):
        case.body["token"] = token


def test_the_document_is_what_the_server_gives_and_is_json(target: Target) -> None:
    with urllib.request.urlopen(f"{target.url}/openapi.json") as answer:
        given = json.load(answer)

    assert given == {**json.loads(json.dumps(document())), "servers": [{"url": "/"}]}


@pytest.mark.parametrize(("path", "method"), METHODS, ids=[f"{method} {path}" for path, method in METHODS])
def test_a_request_is_answered_if_and_only_if_its_token_allows_it(guarded: Target, path: str, method: str) -> None:
    scope = next(operation.scope for operation in OPERATIONS if operation.path == path)
    authorizations = st.one_of(
        st.none(),
        st.sampled_from([f"{kind} {secret}" for secret in SECRETS for kind in ("Bearer", "bearer", "Basic")]),
        st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f")).map(str.strip),
    )

    @given(case=cases_of(path, method), authorization=authorizations)
    @examples_of(REQUESTS // len(METHODS) // 4 + 1 if REQUESTS else EXAMPLES // 2)
    def ask(case: Any, authorization: str | None) -> None:
        case.headers.pop("Authorization", None)
        if authorization is not None:
            case.headers["Authorization"] = authorization.encode("latin-1")

        answer = case.call_and_validate(base_url=guarded.url, checks=CHECKS)

        sent = answer.request.headers.get("Authorization", b"")  # schemathesis leaves it away from some, on purpose
        kind, _, secret = sent.decode("latin-1").partition(" ")
        scopes = SECRETS.get(secret.strip(), frozenset()) if kind.lower() == "bearer" else frozenset()
        if scope is None or scope in scopes:
            assert answer.status_code not in (401, 403)
        else:
            assert answer.status_code == (403 if scopes else 401)

    ask()


# Requests that no document knows ---------------------------------------------------------------------------

#: Names that mean something somewhere, so that what is made up gets further than to the first check.
FIELDS = sorted({name for operation in OPERATIONS if operation.body for name in operation.body.model_fields})
PARAMETERS = sorted({name for operation in OPERATIONS for name in operation.query.model_fields})
HEADERS = ["Content-Type", "Idempotency-Key", "X-Request-Id", "Origin", "Sec-Fetch-Site", "Host", "Accept", "Expect"]

#: Stands for a number of more digits than Python reads.
HUGE = "a huge number"

words = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["resize", "email", "prepared", "high", "skip", "default", "1" * 5000, "\0", "%", "-1", "1e999"]),
)

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        words,
        st.uuids().map(str),
        st.just(HUGE),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(FIELDS), words), inner, max_size=6)
    ),
    max_leaves=12,
)


def text_of(value: Any) -> bytes:
    """As JSON, or nearly: NaN, lone surrogates and numbers of any length may be in it."""
    if isinstance(value, dict):
        return b"{" + b",".join(text_of(str(name)) + b":" + text_of(inner) for name, inner in value.items()) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(text_of(inner) for inner in value) + b"]"
    if value == HUGE:
        return b"1" * 5000
    return json.dumps(value).encode()


def likely(data: st.DataObject, name: str, target: Target) -> Any:
    """A value for a field of a body that has a chance to fit."""
    fitting = {
        "type": ["email", "resize"],
        "payload": [{}, {"file": "a"}],
        "token": [token for _, token in target.claims],
    }
    return data.draw(st.one_of(st.sampled_from(fitting[name]), values) if name in fitting else values)


def made_up_body(data: st.DataObject, target: Target) -> bytes:
    match data.draw(st.sampled_from(["nothing", "bytes", "deep", "value", "fields", "fields"])):
        case "nothing":
            return b""
        case "bytes":
            return data.draw(st.binary(max_size=60))
        case "deep":
            depth = data.draw(st.sampled_from([DEPTH_MAX - 1, DEPTH_MAX + 1, 300, 100_000]))
            return b'{"type":"email","payload":{"a":' + b"[" * depth + b"]" * depth + b"}}"
        case "value":
            return text_of(data.draw(values))
        case _:
            names = data.draw(st.lists(st.sampled_from(FIELDS), unique=True, max_size=6))
            return text_of({_camel(name): likely(data, name, target) for name in names})


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(word.title() for word in others)


def made_up_headers(data: st.DataObject) -> list[tuple[str, bytes]]:
    visible = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40)
    headers = data.draw(
        st.dictionaries(st.sampled_from(HEADERS), visible.map(lambda text: text.encode("latin-1")), max_size=3)
    )
    headers.pop("Expect", None) if data.draw(st.booleans()) else None
    if data.draw(st.booleans()):
        headers["Content-Type"] = b"application/json"
    headers.setdefault("Host", b"localhost")
    return list(headers.items())


def made_up_path(data: st.DataObject, target: Target) -> str:
    template = data.draw(st.sampled_from([*{path for path, _ in METHODS}, "/{id}", "/task/", "/{id}/retry", "//"]))
    ids = st.one_of(words, st.sampled_from([job_id for job_id, _ in target.claims] + target.dead))
    path = template.replace("{id}", urllib.parse.quote(data.draw(ids), safe="", errors="replace"))
    names = data.draw(st.lists(st.one_of(st.sampled_from(PARAMETERS), words), max_size=3))
    query = "&".join(
        f"{urllib.parse.quote(name, errors='replace')}={urllib.parse.quote(data.draw(words), errors='replace')}"
        for name in names
    )
    return f"{path}?{query}" if query else path


def statuses_of(path: str, method: str) -> set[int]:
    """What the document allows for a request; 404 and 405 where it knows none."""
    bare = path.partition("?")[0].split("/")
    for operation in OPERATIONS:
        parts = operation.path.split("/")
        if len(parts) == len(bare) and all(part in ("{id}", given) for part, given in zip(parts, bare, strict=True)):
            known = set(operation.answers) | set(operation.statuses)
            return known if method in operation.methods else {403, 405, 404}
    return {403, 404}


def test_what_nobody_would_ask_is_answered_with_a_documented_error(target: Target) -> None:
    host = urllib.parse.urlsplit(target.url).netloc

    @given(data=st.data())
    @examples_of(REQUESTS // 4 if REQUESTS else 20 * EXAMPLES)
    def ask(data: st.DataObject) -> None:
        path, headers = made_up_path(data, target), made_up_headers(data)
        method = data.draw(st.sampled_from(["GET", "POST", "POST", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "FOO"]))
        body = made_up_body(data, target) if method in ("POST", "PUT") else b""

        connection = http.client.HTTPConnection(host, timeout=60)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in [*headers, ("Content-Length", str(len(body)).encode())]:
            connection.putheader(name, value)
        connection.endheaders(body)
        with connection.getresponse() as answer:
            text = answer.read()
        connection.close()

        assert answer.status in statuses_of(path, method), text
        assert answer.headers["X-Request-Id"]
        assert len(answer.headers["X-Request-Id"]) <= 64
        if text:
            assert isinstance(json.loads(text), dict | list)
            assert answer.status < 400 or json.loads(text)["error"]

    ask()
