"""Who may call the HTTP application, and from where."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from http_client import Caller, Client

from pgqueue import ConfigurationError, PgQueue
from pgqueue.http import create_app
from pgqueue.openapi import OPERATIONS

SECRETS = {scope: f"the-secret-of-{scope}-0123456789" for scope in ("enqueue", "work", "operate", "read")}
TOKENS = [f"{scope}r:{scope}:{secret}" for scope, secret in SECRETS.items()]


@pytest.fixture
def pgq(sqlite_url: str) -> Iterator[PgQueue]:
    """A queue on SQLite: what is tested here does not depend on the database."""
    queue = PgQueue(sqlite_url)
    yield queue
    queue.dispose()


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGQUEUE_HTTP_TOKENS", raising=False)


#: A request for each operation.
REQUESTS = [
    (operation, method, operation.path.replace("{id}", "1")) for operation in OPERATIONS for method in operation.methods
]


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {SECRETS['work']}"])
def test_without_a_token_only_health_and_document_are_answered(pgq: PgQueue, authorization: str | None) -> None:
    client = Client(create_app(pgq, tokens=TOKENS))
    headers = {} if authorization is None else {"Authorization": authorization}

    for operation, method, path in REQUESTS:
        answer = client.request(method, path, headers=headers)

        if operation.scope is None:
            assert answer.status_code == 200, path
        else:
            assert (answer.status_code, answer.json()) == (401, {"error": "A bearer token is required"}), path
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scope", SECRETS)
def test_a_token_allows_what_its_scopes_say_and_nothing_else(pgq: PgQueue, scope: str) -> None:
    caller = Caller(pgq, tokens=TOKENS, token=SECRETS[scope])

    for operation, method, path in REQUESTS:
        answer = caller.client.request(method, path, json={} if method == "POST" else None)

        allowed = operation.scope in (None, scope)
        assert (answer.status_code != 403) is allowed, (path, answer.text)
        if not allowed:
            assert answer.json() == {"error": f"The token lacks the scope {operation.scope}"}


def test_a_token_may_have_several_scopes(pgq: PgQueue) -> None:
    caller = Caller(pgq, tokens=[f"shop:enqueue,read:{SECRETS['work']}"], token=SECRETS["work"], any_type=True)

    caller.enqueue()

    assert caller.get("/stats")["pending"] == 1
    caller.get("/dequeue", status=403)


def test_tokens_are_taken_from_the_environment(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGQUEUE_HTTP_TOKENS", " ".join(TOKENS))

    client = Client(create_app(pgq))

    assert client.get("/stats").status_code == 401
    assert client.get("/stats", headers={"Authorization": f"bearer {SECRETS['read']}"}).status_code == 200


def test_an_application_without_tokens_must_be_wanted(pgq: PgQueue) -> None:
    with pytest.raises(ConfigurationError, match=r"no tokens.*PGQUEUE_HTTP_TOKENS.*unprotected=True"):
        create_app(pgq)


def test_tokens_are_not_ignored(pgq: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGQUEUE_HTTP_TOKENS", TOKENS[0])

    with pytest.raises(ConfigurationError, match="would ignore them"):
        create_app(pgq, unprotected=True)


@pytest.mark.parametrize("threads", [1, 1001])
def test_a_number_of_threads_that_cannot_be_is_refused(pgq: PgQueue, threads: int) -> None:
    with pytest.raises(ConfigurationError, match="threads must be between 2 and 1000"):
        create_app(pgq, unprotected=True, threads=threads)


def test_who_did_what_is_recorded_under_the_tokens_name(pgq: PgQueue) -> None:
    secret = SECRETS["work"]
    caller = Caller(pgq, tokens=[f"ada:enqueue,work,operate:{secret}"], token=secret, any_type=True)
    job_id = caller.enqueue(maxRetries=0)

    job = caller.dequeue(worker="worker-1")
    caller.post(f"/fail/{job_id}", {"error": "no", "token": job["token"]})
    caller.post(f"/dead/{job_id}/retry", {"reason": "the provider is back"})

    actors = [(event["event"], event["actor"], event["reason"]) for event in pgq.job_events(int(job_id))]
    assert actors[0][:2] == ("dead", "ada/worker-1")
    assert actors[1] == ("replay", "http:ada", "the provider is back")


def test_an_idempotency_key_belongs_to_its_token(pgq: PgQueue) -> None:
    tokens = [f"ada:enqueue:{SECRETS['work']}", f"eve:enqueue:{SECRETS['read']}"]
    body, headers = {"type": "email", "payload": {}}, {"Idempotency-Key": "1"}

    ids = [
        Caller(pgq, tokens=tokens, token=secret, any_type=True).post("/task", body, status=202, headers=headers)[
            "taskId"
        ]
        for secret in (SECRETS["work"], SECRETS["read"])
    ]

    assert ids[0] != ids[1]


def test_no_log_line_and_no_answer_shows_a_token(pgq: PgQueue, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "wrong-secret-0123456789"

    for secret in (SECRETS["read"], wrong):
        answer = Client(create_app(pgq, tokens=TOKENS)).get("/stats", headers={"Authorization": f"Bearer {secret}"})
        assert secret not in answer.text + str(answer.headers)

    assert "of readr" in caplog.text
    assert SECRETS["read"] not in caplog.text
    assert wrong not in caplog.text


# Web pages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::2]", "0.0.0.0", "user@localhost"],
)
def test_a_host_that_is_not_this_one_is_refused(pgq: PgQueue, host: str) -> None:
    client = Client(create_app(pgq, unprotected=True))

    answer = client.get("/dequeue", headers={"Host": host})

    assert answer.status_code == 421
    assert "--trusted-host" in answer.json()["error"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:3000", "localhost.", "127.0.0.1:80", "[::1]:3000", "[::1]"])
def test_this_machines_names_are_answered(pgq: PgQueue, host: str) -> None:
    assert Client(create_app(pgq, unprotected=True)).get("/stats", headers={"Host": host}).status_code == 200


def test_other_names_can_be_trusted(pgq: PgQueue) -> None:
    client = Client(create_app(pgq, unprotected=True, trusted_hosts=["Queue.Internal"]))

    assert client.get("/stats", headers={"Host": "queue.internal:3000"}).status_code == 200
    assert client.get("/stats", headers={"Host": "localhost"}).status_code == 421


def test_with_tokens_any_host_is_answered_unless_said_otherwise(pgq: PgQueue) -> None:
    headers = {"Host": "shop.example", "Authorization": f"Bearer {SECRETS['read']}"}

    assert Client(create_app(pgq, tokens=TOKENS)).get("/stats", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:8000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_web_page_of_another_site_is_refused(pgq: PgQueue, headers: dict[str, str]) -> None:
    caller = Caller(pgq, any_type=True)
    caller.enqueue()

    answer = caller.get("/dequeue", status=403, headers=headers)

    assert answer == {"error": "Web pages of other sites may not ask"}
    assert pgq.list_jobs()[0].attempt == 0


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://localhost:3000"}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}]
)
def test_a_page_of_the_same_server_and_a_person_are_answered(pgq: PgQueue, headers: dict[str, str]) -> None:
    Caller(pgq).get("/stats", headers=headers)


def test_no_other_site_is_given_leave_to_read(pgq: PgQueue) -> None:
    client = Client(create_app(pgq, unprotected=True))
    asking: dict[str, Any] = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}

    answer = client.request("OPTIONS", "/task", headers=asking)

    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]
