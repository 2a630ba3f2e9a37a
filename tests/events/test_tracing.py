"""A trace leads from an enqueue to the runs of its job, as a real OpenTelemetry SDK exports it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace as traces
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy.orm import Session
from working import drain, enqueue

from pgqueue import ConfigurationError, PgQueue, Retry, Snooze
from pgqueue.tracing import trace


class Traced:
    """A provider whose spans are kept in memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("application")

    def spans(self, kind: SpanKind) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.kind is kind]


@pytest.fixture
def traced() -> Iterator[Traced]:
    traced = Traced()
    yield traced
    traced.provider.shutdown()


def context(span: ReadableSpan) -> Any:
    assert span.context is not None
    return span.context


def test_a_run_is_in_the_trace_of_its_enqueue_which_is_in_that_of_the_request(pgq: PgQueue, traced: Traced) -> None:
    trace(pgq, tracer_provider=traced.provider)

    @pgq.task(queue="images")
    def plain() -> None: ...

    @pgq.task(queue="images")
    async def asynchronous() -> None: ...

    with traced.tracer.start_as_current_span("request") as request:
        ids = [enqueue(plain), enqueue(asynchronous)]
    drain(pgq, queues={"images": 1})

    producers, consumers = traced.spans(SpanKind.PRODUCER), traced.spans(SpanKind.CONSUMER)
    assert [span.name for span in producers] == ["enqueue images"] * 2
    assert [span.name for span in consumers] == ["run images"] * 2
    for producer, consumer in zip(producers, consumers, strict=True):
        assert producer.parent is not None
        assert consumer.parent is not None
        assert producer.parent.span_id == request.get_span_context().span_id
        assert consumer.parent.span_id == context(producer).span_id
        assert context(consumer).trace_id == request.get_span_context().trace_id
    assert [dict(span.attributes or {}).get("messaging.message.id") for span in consumers] == [str(i) for i in ids]


def test_spans_are_described_by_the_conventions_for_messaging(pgq: PgQueue, traced: Traced) -> None:
    trace(pgq, tracer_provider=traced.provider)

    @pgq.task(queue="images")
    def resize(file: str) -> str:
        return file

    with pgq.begin() as connection:
        resize.enqueue_many(connection, [{"file": "hunter2"}] * 3)
    drain(pgq, queues={"images": 1}, name="ann")

    (producer,) = traced.spans(SpanKind.PRODUCER)
    consumers = traced.spans(SpanKind.CONSUMER)
    assert dict(producer.attributes or {}) == {
        "messaging.system": "pgqueue",
        "messaging.operation.name": "enqueue",
        "messaging.operation.type": "send",
        "messaging.destination.name": "images",
        "messaging.batch.message_count": 3,
        "pgqueue.task": "resize",
    }
    assert len(consumers) == 3
    attributes = dict(consumers[0].attributes or {})
    assert str(attributes.pop("messaging.client.id")).startswith("ann:")
    assert attributes.pop("messaging.message.id")
    assert attributes == {
        "messaging.system": "pgqueue",
        "messaging.operation.name": "run",
        "messaging.operation.type": "process",
        "messaging.destination.name": "images",
        "pgqueue.task": "resize",
        "pgqueue.attempt": 1,
    }
    assert "hunter2" not in "".join(span.to_json() for span in (producer, *consumers))


def test_spans_of_a_task_and_jobs_it_enqueues_are_below_its_run(pgq: PgQueue, traced: Traced) -> None:
    trace(pgq, tracer_provider=traced.provider)

    @pgq.task
    def follow() -> None: ...

    @pgq.task(transactional=True)
    async def lead(session: Any) -> None:
        with traced.tracer.start_as_current_span("inside"):
            await follow.enqueue_async(session)

    enqueue(lead)
    drain(pgq)

    names = {context(span).span_id: span.name for kind in SpanKind for span in traced.spans(kind)}
    parents = {
        (span.name, names.get(span.parent.span_id)) for kind in SpanKind for span in traced.spans(kind) if span.parent
    }
    assert ("inside", "run default") in parents
    assert ("enqueue default", "inside") in parents
    assert len({context(span).trace_id for kind in SpanKind for span in traced.spans(kind)}) == 1


def test_each_attempt_has_a_span_and_a_failed_one_its_error(pgq: PgQueue, traced: Traced) -> None:
    trace(pgq, tracer_provider=traced.provider)

    @pgq.task(retry=Retry(max_retries=1, base=0.0))
    def fail() -> None:
        raise KeyError("x")

    enqueue(fail)
    drain(pgq)

    spans = traced.spans(SpanKind.CONSUMER)
    assert [dict(span.attributes or {})["pgqueue.attempt"] for span in spans] == [1, 2]
    assert {span.status.status_code for span in spans} == {StatusCode.ERROR}
    assert [dict(span.attributes or {})["error.type"] for span in spans] == ["KeyError"] * 2
    assert [event.name for event in spans[0].events] == ["exception"]


def test_what_a_task_says_of_its_end_is_no_error(pgq: PgQueue, traced: Traced) -> None:
    trace(pgq, tracer_provider=traced.provider)
    tried: list[int] = []

    @pgq.task
    def work() -> None:
        tried.append(1)
        if len(tried) == 1:
            raise Snooze(0)

    enqueue(work)
    drain(pgq)

    first, second = traced.spans(SpanKind.CONSUMER)
    assert dict(first.attributes or {})["pgqueue.outcome"] == "snooze"
    assert first.status.status_code is StatusCode.UNSET
    assert list(first.events) == []
    assert "pgqueue.outcome" not in dict(second.attributes or {})


def test_a_run_can_begin_a_trace_of_its_own_linked_to_its_enqueue(pgq: PgQueue, traced: Traced) -> None:
    trace(pgq, tracer_provider=traced.provider, link=True)

    @pgq.task
    def work() -> None: ...

    enqueue(work)
    drain(pgq)

    (producer,), (consumer,) = traced.spans(SpanKind.PRODUCER), traced.spans(SpanKind.CONSUMER)
    assert consumer.parent is None
    assert context(consumer).trace_id != context(producer).trace_id
    assert [link.context.span_id for link in consumer.links] == [context(producer).span_id]


def test_the_trace_of_another_service_in_the_metadata_is_kept(pgq: PgQueue, traced: Traced) -> None:
    trace(pgq, tracer_provider=traced.provider)
    given = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1"}

    @pgq.task
    def work() -> None: ...

    job_id = enqueue(work.using(metadata=given))
    drain(pgq)

    (consumer,) = traced.spans(SpanKind.CONSUMER)
    assert pgq.get_job(job_id).metadata == given
    assert consumer.parent is not None
    assert f"{consumer.parent.span_id:016x}" == "b7ad6b7169203331"
    assert context(consumer).trace_state.get("a") == "1"


@pytest.mark.parametrize("metadata", [{}, {"traceparent": "nonsense"}, {"traceparent": 5}, {"traceparent": None}])
def test_a_job_without_a_usable_trace_begins_one(pgq: PgQueue, traced: Traced, metadata: dict[str, Any]) -> None:
    work = pgq.task(_work)
    with pgq.begin() as connection:
        job_id = work.using(metadata=metadata).enqueue(connection).id
    trace(pgq, tracer_provider=traced.provider)

    drain(pgq)

    (consumer,) = traced.spans(SpanKind.CONSUMER)
    assert consumer.parent is None
    assert pgq.get_job(job_id).status == "completed"


def _work() -> None: ...


def test_without_an_sdk_nothing_is_added_and_nothing_fails(pgq: PgQueue) -> None:
    assert isinstance(traces.get_tracer_provider(), traces.ProxyTracerProvider)
    trace(pgq)

    @pgq.task(transactional=True)
    def work(session: Session) -> None: ...

    job_id = enqueue(work)
    drain(pgq)

    job = pgq.get_job(job_id)
    assert (job.status, job.metadata) == ("completed", {})


def test_without_opentelemetry_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)

    with pytest.raises(ConfigurationError, match=r"pip install 'pgqueue\[otel\]'"):
        trace(PgQueue("sqlite://"))
