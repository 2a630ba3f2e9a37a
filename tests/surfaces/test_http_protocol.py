"""The queue over HTTP: what each request does, and how it is answered."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from http_client import Caller, Client
from starlette.applications import Starlette
from support import execute, rows
from working import drain, events, table

from pgqueue import JobStatus, PgQueue, answering
from pgqueue import http as pgqueue_http
from pgqueue.openapi import BODY_BYTES_MAX, DEPTH_MAX

#: A number of more digits than Python reads.
HUGE = b'{"a": ' + b"1" * 5000 + b"}"


@pytest.fixture
def caller(pgq: PgQueue) -> Caller:
    """Calls a server that takes jobs of any type."""
    return Caller(pgq, any_type=True)


@pytest.fixture
def refused(sqlite_url: str) -> Iterator[Caller]:
    """Likewise, for requests that do not get as far as the database."""
    pgq = PgQueue(sqlite_url)
    yield Caller(pgq, any_type=True)
    assert {job.attempt for job in pgq.list_jobs()} <= {0}, "something was claimed"
    pgq.dispose()


# Enqueue ---------------------------------------------------------------------------------------------------


def test_an_enqueued_job_is_accepted_with_its_id_and_the_counts(caller: Caller, pgq: PgQueue) -> None:
    answer = caller.post("/task", {"type": "email", "payload": {"to": "user@example.com"}}, status=202)

    job = pgq.get_job(int(answer["taskId"]))
    assert (job.task, job.payload, job.status) == ("email", {"to": "user@example.com"}, JobStatus.PENDING)
    assert answer == {
        "taskId": str(job.id),
        "message": "Task enqueued",
        "stats": {"pending": 1, "processing": 0, "completed": 0, "failed": 0},
    }


def test_an_empty_object_is_a_payload(caller: Caller) -> None:
    caller.post("/task", {"type": "email", "payload": {}}, status=202)


@pytest.mark.parametrize(
    "body",
    [{}, {"type": "email"}, {"payload": {}}, {"type": "", "payload": {}}, {"type": "email", "payload": None}],
)
def test_type_and_payload_are_required(refused: Caller, body: dict[str, Any]) -> None:
    assert refused.post("/task", body, status=400) == {"error": "type and payload required"}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"type": "email", "payload": {}',
        b"\xff",
        b"'a'",
        b'{"a": NaN}',
        b'"\\ud800"',
        b"\xef\xbb\xbf{}",
        HUGE,
    ],
)
def test_what_is_not_json_is_refused(refused: Caller, text: bytes) -> None:
    headers = {"Content-Type": "application/json"}

    assert refused.call("POST", "/task", status=400, content=text, headers=headers) == {"error": "Invalid JSON"}


@pytest.mark.parametrize("body", [[], "text", 1, None, True])
def test_json_that_is_no_object_is_refused(refused: Caller, body: Any) -> None:
    request = {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}

    answers = [refused.call("POST", path, status=400, **request) for path in ("/task", "/complete/1")]

    assert answers == [{"error": "type and payload required"}, {"error": "The body must be a JSON object"}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("type", 5),
        ("type", "-x"),
        ("type", "a" * 129),
        ("payload", []),
        ("payload", "text"),
        ("payload", {"zero": "\0"}),
        ("queue", "no queue"),
        ("priority", 32768),
        ("priority", "urgent"),
        ("priority", True),
        ("maxRetries", -1),
        ("delay", -1),
        ("delay", "5"),
        ("executeAt", "tomorrow"),
        ("executeAt", "2030-01-31T12:00:00"),
        ("executeAt", "9999-12-31T00:00:00Z"),
        ("executeAt", 1_893_456_000),
        ("uniqueKey", ""),
        ("uniqueKey", "a\0b"),
        ("onConflict", "ignore"),
        ("metadata", []),
        ("prioritY", 1),
    ],
)
def test_an_option_that_cannot_be_is_named_and_nothing_is_enqueued(refused: Caller, field: str, value: Any) -> None:
    body = {"type": "email", "payload": {}, field: value}

    answer = refused.post("/task", body, status=400)

    assert field in answer["error"] or field == "executeAt"
    assert refused.get("/stats")["pending"] == 0


def test_options_are_stored_with_the_job(caller: Caller, pgq: PgQueue) -> None:
    job_id = caller.enqueue(queue="mail", priority=7, maxRetries=1, uniqueKey="k", metadata={"trace": "x"}, delay=60)

    job = pgq.get_job(int(job_id))
    assert (job.queue, job.priority, job.max_retries, job.unique_key) == ("mail", 7, 1, "k")
    assert job.metadata == {"trace": "x"}
    assert timedelta(seconds=50) < job.run_at - job.created_at < timedelta(seconds=70)


@pytest.mark.parametrize(
    "moment", ["2030-01-31T12:00:00Z", "2030-01-31T13:00:00+01:00", 1_896_091_200_000], ids=["Z", "+01:00", "ms"]
)
def test_a_job_is_not_claimed_before_the_moment_it_names(caller: Caller, pgq: PgQueue, moment: Any) -> None:
    job_id = caller.enqueue(executeAt=moment)

    assert pgq.get_job(int(job_id)).run_at == datetime(2030, 1, 31, 12, tzinfo=UTC)
    assert caller.get("/dequeue", status=204) is None


def test_delay_and_moment_exclude_each_other(refused: Caller) -> None:
    body = {"type": "email", "payload": {}, "delay": 1, "executeAt": "2030-01-31T12:00:00Z"}

    assert "not both" in refused.post("/task", body, status=400)["error"]


def test_jobs_of_high_priority_come_before_normal_and_low_ones(caller: Caller) -> None:
    for priority in ("low", "normal", "high", "low", "high"):
        caller.enqueue(payload={"is": priority}, priority=priority)

    order = [job["payload"]["is"] for job in caller.dequeue(limit=10)]

    assert order == ["high", "high", "normal", "low", "low"]


def test_a_unique_key_that_is_taken_names_the_job_that_has_it(caller: Caller) -> None:
    first = caller.enqueue(uniqueKey="k")

    again = caller.post("/task", {"type": "email", "payload": {}, "uniqueKey": "k"}, status=202)

    assert (again["taskId"], again["message"]) == (first, "Task already enqueued")


def test_a_unique_key_that_is_taken_is_a_conflict_when_asked_for(caller: Caller) -> None:
    caller.enqueue(uniqueKey="k")

    body = {"type": "email", "payload": {}, "uniqueKey": "k", "onConflict": "raise"}

    assert "unique key 'k'" in caller.post("/task", body, status=409)["error"]


# Idempotency -----------------------------------------------------------------------------------------------


def test_a_repeated_request_returns_the_same_id(caller: Caller, pgq: PgQueue) -> None:
    body = {"type": "email", "payload": {"to": "ada"}}

    first = caller.client.post("/task", json=body, headers={"Idempotency-Key": "order-1"})
    again = caller.client.post("/task", json=body, headers={"Idempotency-Key": "order-1"})

    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["taskId"] == again.json()["taskId"]
    assert again.json()["message"] == "Task enqueued"
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert len(pgq.list_jobs()) == 1


def test_a_key_that_was_used_for_another_request_is_refused(caller: Caller, pgq: PgQueue) -> None:
    headers = {"Idempotency-Key": "order-1"}
    caller.post("/task", {"type": "email", "payload": {"to": "ada"}}, status=202, headers=headers)

    answer = caller.post("/task", {"type": "email", "payload": {"to": "eve"}}, status=422, headers=headers)

    assert answer == {"error": "This Idempotency-Key was used for another request"}
    assert len(pgq.list_jobs()) == 1


def test_a_repeated_request_returns_the_same_id_after_its_job_was_completed(caller: Caller, pgq: PgQueue) -> None:
    body, headers = {"type": "email", "payload": {"to": "ada"}}, {"Idempotency-Key": "order-1"}
    first = caller.post("/task", body, status=202, headers=headers)
    caller.post(f"/complete/{first['taskId']}", {"token": caller.dequeue()["token"]})

    again = caller.post("/task", body, status=202, headers=headers)

    assert again["taskId"] == first["taskId"]
    assert len(pgq.list_jobs()) == 1


def test_a_repeated_request_with_every_option_is_known_again(caller: Caller) -> None:
    options = {"executeAt": "2030-01-31T12:00:00Z", "priority": "high", "maxRetries": 1, "metadata": {"a": [1.5, None]}}
    body, headers = {"type": "email", "payload": {"n": 10**20}, **options}, {"Idempotency-Key": "1"}

    first, again = (caller.post("/task", body, status=202, headers=headers) for _ in range(2))

    assert first["taskId"] == again["taskId"]


@pytest.mark.parametrize("key", ["", "a b", "a" * 201, "caf\xe9"])
def test_a_key_that_cannot_be_one_is_refused(refused: Caller, key: str) -> None:
    headers = [(b"Idempotency-Key", key.encode("latin-1"))]

    answer = refused.post("/task", {"type": "email", "payload": {}}, status=400, headers=headers)

    assert "Idempotency-Key must be" in answer["error"]


def test_an_idempotency_key_and_a_unique_key_exclude_each_other(refused: Caller) -> None:
    body = {"type": "email", "payload": {}, "uniqueKey": "k"}

    answer = refused.post("/task", body, status=400, headers={"Idempotency-Key": "order-1"})

    assert "not both" in answer["error"]


# Full queues -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_full", ["error", "drop"])
def test_a_full_queue_is_answered_with_429(pgq: PgQueue, on_full: Any) -> None:
    pgq.queue("mail", max_depth=1, on_full=on_full)
    caller = Caller(pgq, any_type=True)
    body = {"type": "email", "payload": {}, "queue": "mail"}
    caller.post("/task", body, status=202)

    answer = caller.client.post("/task", json=body)

    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert "queue 'mail' is full" in answer.json()["error"]
    assert len(pgq.list_jobs()) == 1


# Types -----------------------------------------------------------------------------------------------------


def test_the_payload_of_a_task_is_checked_and_its_values_are_not_shown(pgq: PgQueue) -> None:
    @pgq.task(queue="images", priority=3)
    def resize(file: str, size: int = 1) -> None: ...

    caller = Caller(pgq)

    answer = caller.post("/task", {"type": "resize", "payload": {"file": 1, "size": "secret"}}, status=400)
    job_id = caller.enqueue("resize", {"file": "a.jpg", "size": 5})

    assert "file: Input should be a valid string; size: Input should be a valid integer" in answer["error"]
    assert "secret" not in answer["error"]
    job = pgq.get_job(int(job_id))
    assert (job.queue, job.priority, job.payload) == ("images", 3, {"file": "a.jpg", "size": 5})


def test_a_type_that_the_application_does_not_declare_is_refused(pgq: PgQueue) -> None:
    pgq.external_task("image")
    caller = Caller(pgq)

    caller.enqueue("image", {"anything": [1, None]})
    answer = caller.post("/task", {"type": "email", "payload": {}}, status=400)

    assert "'email' is not known here" in answer["error"]
    assert "--any-type" in answer["error"]


def test_types_that_come_from_outside_do_not_become_tasks_of_the_application(caller: Caller, pgq: PgQueue) -> None:
    for number in range(3):
        caller.enqueue(f"type-{number}")

    assert pgq.tasks == {}


def test_a_job_enqueued_over_http_is_run_by_a_worker_of_the_application(pgq: PgQueue) -> None:
    @pgq.task
    def double(n: int) -> int:
        return 2 * n

    caller = Caller(pgq)
    job_id = caller.enqueue("double", {"n": 21})

    drain(pgq)

    job = caller.get(f"/jobs/{job_id}")
    assert (job["status"], job["result"]) == ("completed", 42)


# Work ------------------------------------------------------------------------------------------------------


def test_a_job_is_dequeued_with_all_that_a_worker_needs(caller: Caller, pgq: PgQueue) -> None:
    job_id = caller.enqueue(payload={"to": "ada"}, metadata={"trace": "x"}, priority=2)

    job = caller.dequeue(worker="worker-1")

    stored = pgq.get_job(int(job_id))
    assert job == {
        "id": job_id,
        "type": "email",
        "payload": {"to": "ada"},
        "status": "processing",
        "queue": "default",
        "priority": 2,
        "attempt": 1,
        "retries": 0,
        "maxRetries": 3,
        "createdAt": int(stored.created_at.timestamp() * 1000),
        "metadata": {"trace": "x"},
        "token": str(stored.claim_token),
    }
    assert stored.claimed_by == "worker-1"


def test_nothing_is_dequeued_from_an_empty_or_another_queue(caller: Caller) -> None:
    caller.enqueue(queue="mail")

    assert caller.get("/dequeue", status=204) is None
    assert caller.dequeue(queue="mail")["queue"] == "mail"


def test_with_a_limit_a_list_is_dequeued(caller: Caller) -> None:
    ids = [caller.enqueue() for _ in range(3)]

    first, rest = caller.dequeue(limit=1), caller.dequeue(limit=10)

    assert [job["id"] for job in first] == ids[:1]
    assert [job["id"] for job in rest] == ids[1:]
    assert caller.get("/dequeue", params={"limit": 10}, status=204) is None


def test_a_worker_may_take_only_some_types(caller: Caller) -> None:
    for type in ("image", "email", "report", "email"):
        caller.enqueue(type)

    emails = caller.get("/dequeue", params={"type": "email", "limit": 10})
    others = caller.get("/dequeue", params={"type": ["image", "report"], "limit": 10})

    assert [job["type"] for job in emails] == ["email", "email"]
    assert [job["type"] for job in others] == ["image", "report"]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=x",
        "lease=0.1",
        "lease=3601",
        "lease=nan",
        "lease=inf",
        "queue=no%20queue",
        "type=-x",
        "worker=",
        "worker=%00",
        f"worker={'a' * 201}",
        "taype=email",
        "queue=a&queue=b",
    ],
)
def test_a_dequeue_that_cannot_be_is_refused_and_claims_nothing(refused: Caller, query: str) -> None:
    job_id = refused.enqueue()

    refused.get(f"/dequeue?{query}", status=400)

    assert refused.get(f"/jobs/{job_id}")["attempt"] == 0


def test_asking_for_the_headers_of_dequeue_claims_nothing(caller: Caller, pgq: PgQueue) -> None:
    job_id = caller.enqueue()

    caller.call("HEAD", "/dequeue", status=405)

    assert pgq.get_job(int(job_id)).attempt == 0


def test_a_completed_job_has_its_result(caller: Caller) -> None:
    job_id = caller.enqueue()
    job = caller.dequeue()

    answer = caller.post(f"/complete/{job_id}", {"result": {"sent": True}, "token": job["token"]})

    assert answer == {"id": job_id, "status": "completed"}
    seen = caller.get(f"/jobs/{job_id}")
    assert (seen["status"], seen["result"], seen["error"]) == ("completed", {"sent": True}, None)
    assert seen["finishedAt"] >= seen["claimedAt"]


def test_a_failed_job_is_retried_until_its_retries_are_used_up(caller: Caller, pgq: PgQueue) -> None:
    job_id = caller.enqueue(maxRetries=1)

    first = caller.post(f"/fail/{job_id}", {"error": "boom", "delay": 0, "token": caller.dequeue()["token"]})
    again = caller.post(f"/fail/{job_id}", {"error": "bang", "token": caller.dequeue()["token"]})

    assert first == {"id": job_id, "status": "pending", "retries": 1, "maxRetries": 1}
    assert again == {"id": job_id, "status": "failed", "retries": 1, "maxRetries": 1}
    seen = caller.get(f"/jobs/{job_id}")
    assert (seen["status"], seen["error"], seen["attempt"], seen["retries"]) == ("failed", "bang", 2, 1)
    assert events(pgq, int(job_id)) == ["retry", "dead"]


def test_a_failed_job_waits_for_its_backoff(caller: Caller) -> None:
    job_id = caller.enqueue()

    caller.post(f"/fail/{job_id}", {"error": "boom", "token": caller.dequeue()["token"]})

    assert caller.get("/dequeue", status=204) is None


def test_a_job_may_fail_for_good(caller: Caller) -> None:
    job_id = caller.enqueue()

    answer = caller.post(f"/fail/{job_id}", {"error": "no", "dead": True, "token": caller.dequeue()["token"]})

    assert answer["status"] == "failed"


def test_an_error_of_any_text_is_recorded(caller: Caller) -> None:
    job_id = caller.enqueue()

    caller.post(f"/fail/{job_id}", {"error": "a\0b" + "x" * 10_000, "token": caller.dequeue()["token"]})

    assert caller.get(f"/jobs/{job_id}")["error"].startswith("a\N{SYMBOL FOR NULL}bxxx")


def test_a_claim_that_is_extended_outlives_its_lease(caller: Caller, pgq: PgQueue) -> None:
    job_id = caller.enqueue()
    job = caller.dequeue(lease=0.5)

    answer = caller.post(f"/extend/{job_id}", {"lease": 60, "token": job["token"]})

    time.sleep(0.6)  # past the first lease
    assert answer == {"id": job_id, "lease": 60.0, "cancelRequested": False}
    assert caller.get("/dequeue", status=204) is None
    caller.post(f"/complete/{job_id}", {"token": job["token"]})


def test_a_worker_that_extends_its_claim_hears_of_a_cancellation_and_gives_the_job_up(
    caller: Caller, pgq: PgQueue
) -> None:
    job_id = caller.enqueue()
    token = caller.dequeue()["token"]
    pgq.cancel(int(job_id))

    extended = caller.post(f"/extend/{job_id}", {"token": token})
    failed = caller.post(f"/fail/{job_id}", {"error": "stopped", "token": token})

    assert extended["cancelRequested"] is True
    assert failed == {"id": job_id, "status": "cancelled", "retries": 0, "maxRetries": 3}
    assert caller.get(f"/jobs/{job_id}")["status"] == "cancelled"


@pytest.mark.parametrize("verb", ["complete", "fail", "extend"])
def test_a_token_is_required_and_the_answer_says_where_it_comes_from(caller: Caller, verb: str) -> None:
    job_id = caller.enqueue()
    caller.dequeue()

    answer = caller.post(f"/{verb}/{job_id}", {}, status=400)

    assert answer == {"error": "token required: send the one that came with the job from /dequeue"}


@pytest.mark.parametrize("verb", ["complete", "fail", "extend"])
def test_who_lost_the_claim_is_told_and_writes_nothing(caller: Caller, pgq: PgQueue, verb: str) -> None:
    job_id = caller.enqueue()
    stale = caller.dequeue(lease=0.5, worker="slow")["token"]
    time.sleep(0.6)  # its lease is over
    fresh = caller.dequeue(worker="quick")["token"]

    answer = caller.post(f"/{verb}/{job_id}", {"token": stale}, status=409)

    assert answer["error"].startswith(f"the claim on job {job_id} was lost")
    assert answer["status"] == "processing"
    assert str(pgq.get_job(int(job_id)).claim_token) == fresh


def test_a_completion_that_is_repeated_is_told_that_the_job_is_completed(caller: Caller) -> None:
    job_id = caller.enqueue()
    body = {"token": caller.dequeue()["token"], "result": 1}
    caller.post(f"/complete/{job_id}", body)

    answer = caller.post(f"/complete/{job_id}", {**body, "result": 2}, status=409)

    assert answer["status"] == "completed"
    assert caller.get(f"/jobs/{job_id}")["result"] == 1


@pytest.mark.parametrize("job_id", ["999", "0", "9" * 19, "9" * 30, "x", "-1", "%2e%2e", "1.0", "\N{SUPERSCRIPT TWO}"])
@pytest.mark.parametrize("path", ["/complete/{}", "/fail/{}", "/extend/{}", "/dead/{}/retry", "/jobs/{}"])
def test_a_job_that_does_not_exist_is_not_found(refused: Caller, path: str, job_id: str) -> None:
    method, body = ("GET", None) if path.startswith("/jobs") else ("POST", {"token": str(uuid.uuid4())})
    if path.startswith("/dead"):
        body = {}

    answer = refused.call(method, path.format(job_id), status=404, json=body)

    assert "error" in answer


def test_a_payload_that_nobody_can_read_fails_its_own_job_only(pgq: PgQueue) -> None:
    caller = Caller(pgq, any_type=True)
    bad, good = caller.enqueue(priority=1), caller.enqueue()
    number = "1" * 5000
    execute(pgq.engine, f"UPDATE {table(pgq, 'jobs')} SET payload = '{{\"n\": {number}}}' WHERE id = {bad}")

    claimed = caller.dequeue(limit=5)

    assert [job["id"] for job in claimed] == [good]
    assert caller.get(f"/jobs/{bad}")["status"] == "failed"


# Look and operate ------------------------------------------------------------------------------------------


def test_the_counts_follow_the_jobs(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "STATS_QUICK_SECONDS", math.inf)  # however busy this machine is
    ids = [caller.enqueue(maxRetries=0) for _ in range(4)]
    claimed = caller.dequeue(limit=3)
    caller.post(f"/complete/{ids[0]}", {"token": claimed[0]["token"]})
    caller.post(f"/fail/{ids[1]}", {"error": "no", "token": claimed[1]["token"]})
    caller.enqueue(queue="mail", delay=60)

    assert caller.get("/stats") == {"pending": 2, "processing": 1, "completed": 1, "failed": 1}
    assert caller.get("/stats", params={"queue": "mail"})["pending"] == 1


def test_a_slow_count_is_kept_for_ten_times_as_long_and_knows_what_was_enqueued_since(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller(pgq, any_type=True)
    counts, count = [], pgq.queues
    monkeypatch.setattr(pgq, "queues", lambda: (counts.append(1), time.sleep(0.1), count())[2])

    answers = [caller.post("/task", {"type": "a", "payload": {}}, status=202) for _ in range(3)]
    caller.get("/stats")

    assert [answer["stats"]["pending"] for answer in answers] == [1, 2, 3]
    assert len(counts) == 1


def test_a_job_is_enqueued_even_when_the_count_fails(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caller = Caller(pgq, any_type=True)

    def fail() -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(pgq, "queues", fail)

    answer = caller.post("/task", {"type": "a", "payload": {}}, status=202)

    assert answer["stats"] is None
    assert "could not be counted" in caplog.text


def test_dead_jobs_are_listed_by_pages_and_retried(caller: Caller, pgq: PgQueue) -> None:
    ids = [caller.enqueue(maxRetries=0) for _ in range(3)]
    for job in caller.dequeue(limit=3):
        caller.post(f"/fail/{job['id']}", {"error": f"no {job['id']}", "token": job["token"]})

    first = caller.get("/dead", params={"limit": 2})
    rest = caller.get("/dead", params={"limit": 2, "before": first["next"]})
    answer = caller.post(f"/dead/{ids[0]}/retry")

    assert [job["id"] for job in first["jobs"]] == [ids[2], ids[1]]
    assert first["jobs"][0]["error"] == f"no {ids[2]}"
    assert ([job["id"] for job in rest["jobs"]], rest["next"]) == ([ids[0]], None)
    assert answer == {"id": ids[0], "status": "pending"}
    assert caller.dequeue()["id"] == ids[0]
    assert pgq.job_events(int(ids[0]))[-1]["actor"] == "http:anyone"


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "before=-1", "before=x", "queue=", "status=dead"])
def test_a_page_that_cannot_be_is_refused(refused: Caller, query: str) -> None:
    refused.get(f"/dead?{query}", status=400)


def test_only_a_dead_job_is_retried(caller: Caller) -> None:
    job_id = caller.enqueue()

    answer = caller.post(f"/dead/{job_id}/retry", {"reason": "try"}, status=409)

    assert (answer["error"], answer["status"]) == (
        f"job {job_id} is pending; only a failed job can be retried",
        "pending",
    )


def test_a_job_is_shown_without_token_and_traceback(pgq: PgQueue) -> None:
    @pgq.task
    def fail() -> None:
        raise ValueError("no such file")

    caller = Caller(pgq)
    job_id = caller.enqueue("fail", {}, maxRetries=0)
    drain(pgq)

    job = caller.get(f"/jobs/{job_id}")

    assert (job["error"], job["errorType"], job["status"]) == ("no such file", "ValueError", "failed")
    assert "token" not in job
    assert "Traceback" not in json.dumps(job)


# Everything else -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/tasks", "/task/", "/dead/1", "/jobs", "/complete", "/stats/x", "//task"])
def test_any_other_path_is_not_found(refused: Caller, path: str) -> None:
    assert refused.call("GET", f"http://localhost:3000{path}", status=404) == {"error": "Not found"}


def test_a_path_with_other_methods_says_so(refused: Caller) -> None:
    answer = refused.client.get("/task")

    assert (answer.status_code, answer.json()) == (405, {"error": "Method not allowed"})
    assert answer.headers["allow"] == "POST"


def test_a_body_that_is_not_declared_as_json_is_refused(refused: Caller) -> None:
    text = '{"type": "email", "payload": {}}'

    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        answer = refused.call("POST", "/task", status=415, content=text, headers=headers)
        assert answer == {"error": "Content-Type must be application/json"}
    refused.call("POST", "/task", status=202, content=text, headers={"Content-Type": "Application/JSON; charset=utf-8"})


async def pieces(*texts: bytes) -> AsyncIterator[bytes]:
    for text in texts:
        yield text


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused(refused: Caller, declared: bool) -> None:
    text = b'{"type": "email", "payload": {"a": "' + b"x" * BODY_BYTES_MAX + b'"}}'
    content = text if declared else pieces(text[:1000], text[1000:])

    answer = refused.call("POST", "/task", status=413, content=content, headers={"Content-Type": "application/json"})

    assert str(BODY_BYTES_MAX) in answer["error"]


def test_a_payload_that_is_too_large_for_a_job_is_refused(refused: Caller) -> None:
    answer = refused.post("/task", {"type": "email", "payload": {"a": "x" * (1024 * 1024)}}, status=400)

    assert "1,048,576 allowed" in answer["error"]


@pytest.mark.parametrize("depth", [DEPTH_MAX, DEPTH_MAX + 1, 10_000])
def test_json_is_nested_only_so_deep(refused: Caller, depth: int) -> None:
    # The body and the payload are two of the levels.
    text = '{"type":"a","payload":{"a":' + "[" * (depth - 2) + "]" * (depth - 2) + "}}"
    headers = {"Content-Type": "application/json"}

    answer = refused.call("POST", "/task", status=202 if depth <= DEPTH_MAX else 400, content=text, headers=headers)

    assert depth <= DEPTH_MAX or answer == {"error": f"Nested deeper than {DEPTH_MAX} levels"}


def test_a_mistake_of_the_servers_shows_nothing_but_its_id(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caller = Caller(pgq)

    def fail(job_id: int) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(pgq, "get_job", fail)

    answer = caller.client.get("/jobs/1", headers={"X-Request-Id": "abc-1"})

    assert (answer.status_code, answer.json()) == (500, {"error": "Internal server error"})
    assert answer.headers["x-request-id"] == "abc-1"
    assert "request abc-1 failed" in caplog.text
    assert "secret inside" in caplog.text


def test_a_request_id_that_could_forge_log_lines_is_replaced(refused: Caller) -> None:
    answer = refused.client.get("/healthz", headers={"X-Request-Id": "a b"})

    assert uuid.UUID(answer.headers["x-request-id"])


def test_no_answer_may_be_kept_by_a_cache(caller: Caller) -> None:
    for path in ("/stats", "/dequeue", "/nothing", "/openapi.json"):
        assert caller.client.get(path).headers["cache-control"] == "no-store"


def test_a_number_that_json_has_no_word_for_is_shown_as_text(sqlite_url: str) -> None:
    pgq = PgQueue(sqlite_url)
    caller = Caller(pgq, any_type=True)
    job_id = caller.enqueue()
    execute(pgq.engine, f"UPDATE pgqueue_jobs SET payload = '{{\"n\": 1e999}}' WHERE id = {job_id}")

    job = caller.get(f"/jobs/{job_id}")

    assert job["payload"] == {"n": "Infinity"}
    pgq.dispose()


def test_a_database_that_is_down_is_answered_with_503(tmp_path: Any) -> None:
    pgq = PgQueue("postgresql://nobody:secret@127.0.0.1:1/none")
    caller = Caller(pgq, any_type=True)

    answers = [caller.client.get(path) for path in ("/stats", "/dequeue", "/jobs/1", "/readyz")]

    for answer in answers:
        assert answer.status_code == 503
        assert answer.json() == {"error": "The database is not available; try again later"}
        assert answer.headers["retry-after"] == "5"
    caller.get("/healthz")
    pgq.dispose()


def test_tables_that_are_missing_are_answered_with_503(tmp_path: Any) -> None:
    pgq = PgQueue(f"sqlite:///{tmp_path / 'empty.db'}")
    caller = Caller(pgq, any_type=True)

    for path in ("/stats", "/readyz"):
        caller.get(path, status=503)
    pgq.dispose()


def test_too_many_requests_at_once_are_told_to_come_again(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgqueue_http, "WAITING_MAX", 0)
    caller = Caller(pgq)

    answer = caller.client.get("/stats")

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_each_transition_has_its_line_in_the_log(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pgqueue.http")

    job_id = caller.enqueue(payload={"password": "hunter2"}, maxRetries=1)
    caller.post(f"/fail/{job_id}", {"error": "no", "delay": 0, "token": caller.dequeue()["token"]})
    token = caller.dequeue()["token"]
    caller.post(f"/complete/{job_id}", {"token": token})

    for line in ("enqueued job 1 (email)", "dequeued job 1 (email), attempt 1", "failed, retry 1/1", "completed job 1"):
        assert line in caplog.text
    assert "hunter2" not in caplog.text
    assert token not in caplog.text


def test_the_application_can_be_mounted_in_another(pgq: PgQueue) -> None:
    outer = Starlette()
    outer.mount("/queue", pgqueue_http.create_app(pgq, unprotected=True, any_type=True))
    client = Client(outer)

    answer = client.post("/queue/task", json={"type": "email", "payload": {}})

    assert answer.status_code == 202
    assert client.get("/queue/stats").json()["pending"] == 1
    assert client.get("/queue/openapi.json").json()["servers"] == [{"url": "/queue"}]
    assert client.get("/queue/nothing").json() == {"error": "Not found"}
    assert rows(pgq.engine, f"SELECT task FROM {table(pgq, 'jobs')}") == [("email",)]
