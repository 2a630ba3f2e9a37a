"""Requests made up from the OpenAPI document: none is answered with an error of the server's, or with something that
the document does not tell.

A few hundred of them. PGQUEUE_FUZZ_REQUESTS says how many there shall be instead, such as 5000.
"""

from __future__ import annotations

import json
import os
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import wait_for

from pgqueue import PgQueue
from pgqueue.http import create_app
from pgqueue.openapi import OPERATIONS, document
from pgqueue.serving import listening, url_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import schemathesis
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

#: By default; per operation and database.
EXAMPLES = 10

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
    method
    for operation in OPERATIONS
    for method in operation.methods
    if operation.has_id or operation.body or operation.query.model_fields
]


@dataclass(frozen=True)
class Target:
    """A server, and what is in its queue."""

    url: str
    claims: list[tuple[str, str]]  #: ids and tokens of jobs that are held
    dead: list[str]


@pytest.fixture
def target(pgq: PgQueue) -> Iterator[Target]:
    """A server on PostgreSQL, then one on SQLite."""

    @pgq.task
    def resize(file: str, size: int = 1024) -> None: ...

    app = create_app(pgq, unprotected=True, any_type=True, trusted_hosts=["*"])
    with listening("127.0.0.1", 0) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", access_log=False, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            wait_for(lambda: server.started, "the server to start")
            yield Target(url_of(sock), *prepare(pgq))
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
    operation = schemathesis.openapi.from_dict(document())[path][method]
    modes = [schemathesis.GenerationMode.POSITIVE]
    if operation.body or any(operation.query) or any(operation.path_parameters):
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))

    @given(case=cases, data=st.data())
    @settings(
        max_examples=REQUESTS // len(VARIED) // 2 + 1 if REQUESTS else EXAMPLES,
        deadline=None,
        database=None,
        derandomize=not REQUESTS,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any, data: st.DataObject) -> None:
        if "{id}" in path and data.draw(st.booleans()):
            make_real(case, data, target)
        case.call_and_validate(base_url=target.url, checks=CHECKS)

    ask()


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
