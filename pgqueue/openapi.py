"""What HTTP requests and answers look like: one source for the checks and for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, StringConstraints, WithJsonSchema
from pydantic.alias_generators import to_camel
from pydantic.json_schema import models_json_schema

from pgqueue.retry import DELAY_SECONDS_MAX
from pgqueue.schema import KEY_CHARACTERS_MAX
from pgqueue.task import NAME_PATTERN
from pgqueue.tokens import Scope
from pgqueue.version import VERSION

#: A body may be a payload of the largest size, and its options.
BODY_BYTES_MAX = 1024 * 1024 + 64 * 1024

#: Arrays and objects within each other.
DEPTH_MAX = 64

#: Jobs in one answer.
PAGE_MAX = 100

#: A worker with more to do extends its claim.
LEASE_SECONDS_MIN, LEASE_SECONDS_MAX, LEASE_SECONDS = 0.5, 3600.0, 30.0

#: What the lesson's words for a priority stand for.
PRIORITIES = {"high": 10, "normal": 0, "low": -10}

IDEMPOTENCY_KEY_CHARACTERS_MAX = 200

#: In milliseconds, 1973 and the year 9000: what lies outside was given in another unit.
MOMENT_MIN, MOMENT_MAX = 100_000_000_000, 221_845_392_000_000


# Requests --------------------------------------------------------------------------------------------------


def _moment(value: int | str) -> datetime:
    if isinstance(value, int):
        return datetime.fromtimestamp(value / 1000, UTC)
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("expected milliseconds since 1970, or ISO 8601 such as 2030-01-31T12:00:00Z") from None
    if moment.utcoffset() is None:
        raise ValueError("the moment must say its time zone, such as 2030-01-31T12:00:00Z")
    return moment


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("a NUL character cannot be stored")
    return text


Name = Annotated[str, StringConstraints(pattern=f"^{NAME_PATTERN.pattern}$")]
Text = Annotated[str, AfterValidator(_without_nul)]
Milliseconds = Annotated[int, Field(ge=MOMENT_MIN, lt=MOMENT_MAX)]
ISO = Annotated[str, StringConstraints(max_length=64), WithJsonSchema({"type": "string", "format": "date-time"})]
Token = Annotated[UUID, Strict(False)]
Lease = Annotated[float, Field(ge=LEASE_SECONDS_MIN, le=LEASE_SECONDS_MAX, description="Seconds.", allow_inf_nan=False)]
Delay = Annotated[float, Field(ge=0, le=DELAY_SECONDS_MAX, allow_inf_nan=False)]
Page = Annotated[int, Field(ge=1, le=PAGE_MAX)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", alias_generator=to_camel)


class TaskBody(_Body):
    """A job to be enqueued."""

    type: Annotated[Name, Field(description="The name of the task.")]
    payload: Annotated[dict[str, Any], Field(description="The task's arguments; may be empty.")]
    queue: Annotated[Name | None, Field(description="Instead of the task's own.")] = None
    priority: Annotated[
        Annotated[int, Field(ge=-32768, le=32767)] | Literal["high", "normal", "low"] | None,
        Field(description=f"Higher is claimed first; the words stand for {PRIORITIES}."),
    ] = None
    max_retries: Annotated[int, Field(ge=0, le=32767)] | None = None
    delay: Annotated[Delay | None, Field(description="Seconds; not claimed before.")] = None
    execute_at: Annotated[
        Annotated[Milliseconds | ISO, AfterValidator(_moment)] | None,
        Field(description="Not claimed before: milliseconds since 1970, or ISO 8601 with a time zone."),
    ] = None
    unique_key: Annotated[
        Annotated[Text, StringConstraints(min_length=1, max_length=KEY_CHARACTERS_MAX)] | None,
        Field(description="At most one pending or processing job of a type has it."),
    ] = None
    on_conflict: Annotated[
        Literal["skip", "raise", "replace"] | None,
        Field(description="When a job has the unique key: name that one (skip), answer 409, or replace its payload."),
    ] = None
    metadata: dict[str, Any] | None = None


class CompleteBody(_Body):
    """How an attempt succeeded."""

    token: Annotated[Token, Field(description="As GET /dequeue gave it with the job.")]
    result: Annotated[Any, Field(description="Stored with the job.")] = None


class FailBody(_Body):
    """How an attempt failed."""

    token: Annotated[Token, Field(description="As GET /dequeue gave it with the job.")]
    error: Annotated[str | None, Field(description="What went wrong; at most 2,000 characters are kept.")] = None
    delay: Annotated[Delay | None, Field(description="Seconds until the retry, instead of the usual backoff.")] = None
    dead: Annotated[bool, Field(description="Fail for good, whatever retries are left.")] = False


class ExtendBody(_Body):
    """For how long a claim is to hold from now on."""

    token: Annotated[Token, Field(description="As GET /dequeue gave it with the job.")]
    lease: Lease = LEASE_SECONDS


class RetryBody(_Body):
    """Why, for the record; may be missing altogether."""

    reason: Annotated[str, StringConstraints(max_length=2000)] | None = None


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NoQuery(_Query):
    """Nothing."""


class StatsQuery(_Query):
    queue: Annotated[Name | None, Field(description="Only this queue.")] = None


class DequeueQuery(_Query):
    worker: Annotated[
        Annotated[Text, StringConstraints(min_length=1, max_length=200)] | None,
        Field(description="Who asks, for the record."),
    ] = None
    queue: Name = "default"
    type: Annotated[list[Name], Field(max_length=100, description="Only jobs of these types; all unless given.")] = []
    limit: Annotated[Page | None, Field(description="Given, the answer is a list of so many jobs at most.")] = None
    lease: Lease = LEASE_SECONDS


class DeadQuery(_Query):
    queue: Annotated[Name | None, Field(description="Only this queue.")] = None
    type: Annotated[Name | None, Field(description="Only this type.")] = None
    limit: Page = 50
    before: Annotated[
        int | None, Field(ge=0, le=2**63 - 1, description="Continue behind this id: `next` of the page before.")
    ] = None


# Answers ---------------------------------------------------------------------------------------------------

Id = Annotated[str, StringConstraints(pattern="^[0-9]+$")]
Status = Literal["pending", "processing", "completed", "failed", "cancelled"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)


class Stats(_Answer):
    """How many jobs stand where. failed: those that will not be retried."""

    pending: int
    processing: int
    completed: int
    failed: int


class Enqueued(_Answer):
    task_id: Id
    message: str
    stats: Annotated[Stats | None, Field(description="null when they could not be counted.")]


class ClaimedTask(_Answer):
    """A job that the caller holds, until its lease ends."""

    id: Id
    type: str
    payload: Any
    status: Literal["processing"]
    queue: str
    priority: int
    attempt: Annotated[int, Field(description="1 for the first.")]
    retries: Annotated[int, Field(description="How many attempts failed so far.")]
    max_retries: int
    created_at: Annotated[int, Field(description="Milliseconds since 1970, as all moments.")]
    metadata: Any
    token: Annotated[str, Field(description="To be sent with /complete, /fail and /extend.")]


class TaskView(_Answer):
    """A job as it stands."""

    id: Id
    type: str
    payload: Any
    status: Status
    queue: str
    priority: int
    attempt: int
    retries: int
    max_retries: int
    created_at: int
    run_at: int
    claimed_at: int | None
    claimed_by: str | None
    finished_at: int | None
    unique_key: str | None
    metadata: Any
    result: Any
    error: Annotated[str | None, Field(description="The message of the last attempt that failed.")]
    error_type: str | None


class Dead(_Answer):
    jobs: list[TaskView]
    next: Annotated[Id | None, Field(description="For `before`; null on the last page.")]


class Moved(_Answer):
    """What became of the job."""

    id: Id
    status: Status


class Failed(_Answer):
    id: Id
    status: Annotated[
        Literal["pending", "failed", "cancelled"],
        Field(description="pending: it will be retried; cancelled: somebody had asked it to stop."),
    ]
    retries: int
    max_retries: int


class Extended(_Answer):
    id: Id
    lease: float
    cancel_requested: Annotated[bool, Field(description="Somebody asks the job to stop: a /fail makes it cancelled.")]


class Health(_Answer):
    status: Literal["ok"]


class Error(_Answer):
    error: str


class Conflict(_Answer):
    error: str
    status: Annotated[Status | None, Field(description="Where the job stands.")] = None


# Operations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that can be asked for."""

    name: str
    methods: tuple[str, ...]
    path: str
    summary: str
    scope: Scope | None  #: None: for everybody
    answers: Mapping[int, Any]  #: models of the answers that are no errors; None: without a body
    query: type[BaseModel] = NoQuery
    body: type[BaseModel] | None = None
    body_optional: bool = False
    errors: tuple[int, ...] = ()  #: beside those that any operation of its kind has
    headers: tuple[str, ...] = field(default=())

    @property
    def has_id(self) -> bool:
        return "{id}" in self.path

    @property
    def statuses(self) -> list[int]:
        """Of all errors."""
        common = [400, 403, 405, 421, 500]
        if self.scope is not None:
            common += [401, 503]
        if self.body is not None:
            common += [408, 413, 415]
        if self.has_id:
            common += [404]
        return sorted({*common, *self.errors})


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "enqueue",
        ("POST",),
        "/task",
        "Enqueue a job",
        Scope.ENQUEUE,
        {202: Enqueued},
        body=TaskBody,
        errors=(409, 422, 429),
        headers=("Idempotency-Key",),
    ),
    Operation("stats", ("GET",), "/stats", "Count the jobs", Scope.READ, {200: Stats}, query=StatsQuery),
    Operation(
        "dequeue",
        ("GET", "POST"),
        "/dequeue",
        "Claim due jobs",
        Scope.WORK,
        {200: ClaimedTask | list[ClaimedTask], 204: None},
        query=DequeueQuery,
    ),
    Operation(
        "complete",
        ("POST",),
        "/complete/{id}",
        "Say that an attempt succeeded",
        Scope.WORK,
        {200: Moved},
        body=CompleteBody,
        errors=(409,),
    ),
    Operation(
        "fail",
        ("POST",),
        "/fail/{id}",
        "Say that an attempt failed",
        Scope.WORK,
        {200: Failed},
        body=FailBody,
        errors=(409,),
    ),
    Operation(
        "extend",
        ("POST",),
        "/extend/{id}",
        "Hold a claim for longer",
        Scope.WORK,
        {200: Extended},
        body=ExtendBody,
        errors=(409,),
    ),
    Operation("dead", ("GET",), "/dead", "List the dead jobs, newest first", Scope.READ, {200: Dead}, query=DeadQuery),
    Operation(
        "retry",
        ("POST",),
        "/dead/{id}/retry",
        "Put a dead job back to pending, with all its retries",
        Scope.OPERATE,
        {200: Moved},
        body=RetryBody,
        body_optional=True,
        errors=(409,),
    ),
    Operation("job", ("GET",), "/jobs/{id}", "Show a job", Scope.READ, {200: TaskView}),
    Operation("healthz", ("GET",), "/healthz", "Whether the server runs", None, {200: Health}),
    Operation("readyz", ("GET",), "/readyz", "Whether its database answers", None, {200: Health}, errors=(503,)),
    Operation("document", ("GET",), "/openapi.json", "This document", None, {200: dict[str, Any]}),
)

ERRORS: dict[int, str] = {
    400: "The request cannot be understood, or does not fit",
    401: "No token, or an unknown one",
    403: "The token does not allow this, or a web page of another site asks",
    404: "There is no such job",
    405: "This path has other methods",
    408: "The body did not arrive in time",
    409: "The claim was lost, or the job's status or unique key does not allow it",
    413: "The body is too large",
    415: "The body is not application/json",
    421: "The Host header names no host that this server answers for",
    422: "The Idempotency-Key was used for another request",
    429: "The queue is full: try again after Retry-After seconds",
    500: "A mistake of the server's; its log has more under the X-Request-Id",
    503: "The database cannot be reached, or the server is busy: try again after Retry-After seconds",
}


# The document ----------------------------------------------------------------------------------------------

_SCHEMAS = "#/components/schemas/{model}"


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document, 3.1."""
    models: list[type[BaseModel]] = [Error, Conflict, *_models()]
    refs, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_SCHEMAS)
    schemas = {model: refs[(model, "validation")] for model in models}
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        for method in operation.methods:
            paths.setdefault(operation.path, {})[method.lower()] = _describe(operation, method, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pgqueue",
            "version": VERSION,
            "description": "A job queue over HTTP, for producers and workers in any language.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "Needed unless started without tokens."}
            },
        },
    }


def _models() -> list[type[BaseModel]]:
    found: dict[type[BaseModel], None] = {}
    for operation in OPERATIONS:
        for answer in (operation.body, *operation.answers.values(), ClaimedTask):
            if isinstance(answer, type) and not hasattr(answer, "__origin__") and issubclass(answer, BaseModel):
                found[answer] = None
    return list(found)


def _describe(operation: Operation, method: str, schemas: Mapping[Any, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name if method == operation.methods[0] else f"{operation.name}_{method.lower()}",
        "summary": operation.summary,
        "parameters": _parameters(operation),
        "responses": _responses(operation, schemas),
        "security": [] if operation.scope is None else [{"bearer": []}],
    }
    if operation.scope is not None:
        described["description"] = f"Scope: {operation.scope}."
    if operation.body is not None:
        described["requestBody"] = {
            "required": not operation.body_optional,
            "content": {"application/json": {"schema": schemas[operation.body]}},
        }
    return described


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    if operation.has_id:
        parameters.append(
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[0-9]{1,19}$"}}
        )
    for name in operation.headers:
        schema = {"type": "string", "minLength": 1, "maxLength": IDEMPOTENCY_KEY_CHARACTERS_MAX, "pattern": "^[!-~]+$"}
        parameters.append({"name": name, "in": "header", "required": False, "schema": schema})
    for name, schema in operation.query.model_json_schema().get("properties", {}).items():
        parameters.append({"name": name, "in": "query", "required": False, "schema": _without_null(schema)})
    return parameters


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A query has no null: a parameter is left away instead."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default") or not kinds}
    return {**rest, **kinds[0]} if len(kinds) == 1 else schema


def _responses(operation: Operation, schemas: Mapping[Any, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, answer in operation.answers.items():
        responses[str(status)] = {"description": "No job is due" if answer is None else operation.summary}
        if answer is not None:
            responses[str(status)]["content"] = {"application/json": {"schema": _schema_of(answer, schemas)}}
    for status in operation.statuses:
        schema = schemas[Conflict if status == 409 else Error]
        responses[str(status)] = {
            "description": ERRORS[status],
            "content": {"application/json": {"schema": schema}},
        }
    return dict(sorted(responses.items()))


def _schema_of(answer: Any, schemas: Mapping[Any, Any]) -> Any:
    if answer in schemas:
        return schemas[answer]
    if answer == ClaimedTask | list[ClaimedTask]:
        one = schemas[ClaimedTask]
        return {"oneOf": [one, {"type": "array", "items": one, "minItems": 1, "maxItems": PAGE_MAX}]}
    return {"type": "object"}
