"""A worker for `pgqueue serve`, with nothing but Python's standard library: a pattern for other languages.

It fetches a job, does what the job's type asks for, and says how that ended. It reads these variables:

QUEUE_URL      where the server is; http://localhost:3000
QUEUE_TOKEN    the bearer token, where one is asked for
WORKER_ID      for the record; worker-1
TASK_TYPES     the types it works on, separated by commas; all
LEASE_SECONDS  how long a job is its own; longer than any of them takes; 30
WORK_SECONDS   how long a job takes, about; 1
FAIL_RATE      how many of the jobs fail for no reason; 0.2
HTTP_SECONDS   how long to wait for an answer; 10
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

QUEUE_URL = os.environ.get("QUEUE_URL", "http://localhost:3000")
QUEUE_TOKEN = os.environ.get("QUEUE_TOKEN", "")
WORKER_ID = os.environ.get("WORKER_ID", "worker-1")
TASK_TYPES = [name for name in os.environ.get("TASK_TYPES", "").split(",") if name]
LEASE_SECONDS = float(os.environ.get("LEASE_SECONDS", "30"))
WORK_SECONDS = float(os.environ.get("WORK_SECONDS", "1"))
FAIL_RATE = float(os.environ.get("FAIL_RATE", "0.2"))
HTTP_SECONDS = float(os.environ.get("HTTP_SECONDS", "10"))

#: How long to wait when there is nothing to do, or nobody to ask.
IDLE_SECONDS = 1.0

stopping = threading.Event()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    log("started")
    while not stopping.is_set():
        try:
            worked = work_once()
        except (OSError, http.client.HTTPException, ValueError) as error:
            # The server is away, or something in between answers: it will be back, and so will a job after its lease.
            log(f"the queue cannot be reached: {error}")
            worked = False
        if not worked:
            stopping.wait(IDLE_SECONDS)
    log("stopped")


def work_once() -> bool:
    """Fetch one job and see it through; whether there was one."""
    query = [("worker", WORKER_ID), ("lease", str(LEASE_SECONDS)), *(("type", name) for name in TASK_TYPES)]
    job = call("POST", f"/dequeue?{urllib.parse.urlencode(query)}")
    if job is None:
        return False
    log(f"job {job['id']} ({job['type']}), attempt {job['attempt']}")
    try:
        result = process(job)
    except Exception as error:  # noqa: BLE001 — whatever it is, the attempt has failed
        report(job, "fail", error=f"{type(error).__name__}: {error}")
    else:
        report(job, "complete", result=result)
    return True


def process(job: dict[str, Any]) -> dict[str, Any]:
    """Do what the job asks for; here, pretend to."""
    stopping.wait(WORK_SECONDS * random.uniform(0.5, 1.5))
    if random.random() < FAIL_RATE:
        raise RuntimeError("no luck")
    payload = job["payload"]
    match job["type"]:
        case "email":
            return {"sent": True, "to": payload["to"]}
        case "image":
            return {"processed": True, "url": payload["url"]}
        case "report":
            return {"generated": True, "format": "pdf"}
        case _:
            return {"result": "processed"}


def report(job: dict[str, Any], verb: str, **outcome: Any) -> None:
    """Say how the attempt ended. The token shows that the job is still this worker's."""
    try:
        answer = call("POST", f"/{verb}/{job['id']}", {"token": job["token"], **outcome})
    except urllib.error.HTTPError as error:
        if error.code != 409:
            raise
        # The lease was over and somebody else has the job, or has done it: this attempt no longer counts.
        log(f"job {job['id']} is not mine any more: {json.load(error)['error']}")
        return
    log(f"job {job['id']} is {answer['status']}")


def call(method: str, path: str, body: Any = None) -> Any:
    """What the server answers; None when there is no content. OSError when it is away or refuses, HTTPException or
    ValueError when what comes is no answer of its."""
    request = urllib.request.Request(
        QUEUE_URL + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    if QUEUE_TOKEN:
        request.add_header("Authorization", f"Bearer {QUEUE_TOKEN}")
    with urllib.request.urlopen(request, timeout=HTTP_SECONDS) as answer:
        return json.load(answer) if answer.status != 204 else None


def log(text: str) -> None:
    print(f"[{WORKER_ID}] {text}", flush=True)


if __name__ == "__main__":
    main()
