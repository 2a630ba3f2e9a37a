"""OpenTelemetry: a trace leads from the enqueue of a job, through its metadata, to every attempt to run it.

Needs the extra `otel`. `trace(pgq)` registers the middleware; nothing else in pgqueue knows of OpenTelemetry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pgqueue.client import PgQueue
from pgqueue.errors import ConfigurationError, TaskSignal
from pgqueue.job import ClaimedJob
from pgqueue.middleware import EnqueueRequest
from pgqueue.version import VERSION

#: What of the W3C trace context goes into a job's metadata.
FIELDS = ("traceparent", "tracestate")


def trace(pgq: PgQueue, *, tracer_provider: Any = None, link: bool = False) -> None:
    """Give every enqueue and every attempt a span, the second a child of the first.

    tracer_provider: OpenTelemetry's; the global one unless given.
    link: begin a trace of its own at each attempt, linked to that of the enqueue: for jobs that run days later.

    A caller's own `traceparent` in the metadata is left as it is. Spans are named and described by the semantic
    conventions for messaging. Neither payload nor result is in them; an attempt that fails records its exception.
    Raises ConfigurationError when OpenTelemetry is not installed.
    """
    try:
        from opentelemetry import context as contexts
        from opentelemetry import trace as traces
        from opentelemetry.trace import Link, SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        raise ConfigurationError(
            "tracing needs OpenTelemetry, which is not installed; install it with: pip install 'pgqueue[otel]'"
        ) from None
    tracer = traces.get_tracer("pgqueue", VERSION, tracer_provider=tracer_provider)
    propagator = TraceContextTextMapPropagator()

    @pgq.middleware("enqueue")
    def trace_enqueue(request: EnqueueRequest) -> None:
        task = pgq.get_task(request.task) if request.task in pgq.tasks else None
        queue = request.options.get("queue") or (task.definition.queue if task is not None else None)
        attributes: dict[str, Any] = {
            "messaging.system": "pgqueue",
            "messaging.operation.name": "enqueue",
            "messaging.operation.type": "send",
            "pgqueue.task": request.task,
        }
        if queue is not None:
            attributes["messaging.destination.name"] = queue
        if len(request.payloads) != 1:
            attributes["messaging.batch.message_count"] = len(request.payloads)
        with tracer.start_as_current_span(
            f"enqueue {queue or request.task}", kind=SpanKind.PRODUCER, attributes=attributes
        ):
            if FIELDS[0] not in request.metadata:
                propagator.inject(request.metadata)

    @pgq.middleware("run")
    def trace_run(job: ClaimedJob) -> Iterator[None]:
        carrier = _carrier(job)
        sender = traces.get_current_span(propagator.extract(carrier, contexts.Context())).get_span_context()
        remote = propagator.extract(carrier, contexts.Context())
        attributes: dict[str, Any] = {
            "messaging.system": "pgqueue",
            "messaging.operation.name": "run",
            "messaging.operation.type": "process",
            "messaging.destination.name": job.queue,
            "messaging.message.id": str(job.id),
            "messaging.client.id": job.claimed_by,
            "pgqueue.task": job.task,
            "pgqueue.attempt": job.attempt,
        }
        with tracer.start_as_current_span(
            f"run {job.queue}",
            context=contexts.Context() if link else remote,
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=[Link(sender)] if link and sender.is_valid else [],
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except TaskSignal as signal:  # how the task ends its attempt, and no error
                span.set_attribute("pgqueue.outcome", type(signal).__name__.lower())
                raise
            except BaseException as error:
                span.set_attribute("error.type", type(error).__qualname__)
                span.record_exception(error)
                span.set_status(Status(StatusCode.ERROR))
                raise


def _carrier(job: ClaimedJob) -> dict[str, str]:
    """What of the metadata is trace context; nothing when somebody stored something else there."""
    try:
        metadata = job.metadata
    except ValueError:
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {field: metadata[field] for field in FIELDS if isinstance(metadata.get(field), str)}
