"""`pgqueue enqueue`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from pgqueue.cli.opening import Before, opened
from pgqueue.cli.parameters import duration_option, moment
from pgqueue.cli.program import Settings, app, command
from pgqueue.client import PgQueue, Task
from pgqueue.errors import ConfigurationError, InvalidPayload
from pgqueue.handle import DROPPED_ID
from pgqueue.job import OnConflict
from pgqueue.output import Output

#: Payloads read and stored at a time with --lines.
LINES_PER_BATCH = 1_000


@command(app)
def enqueue(
    settings: Settings,
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")],
    payload: Annotated[
        str,
        typer.Argument(metavar="JSON|@FILE|-", help="A JSON object: as it is, from a file, or from standard input."),
    ] = "{}",
    lines: Annotated[
        bool, typer.Option("--lines", help="Each line of the input is a payload: enqueue all of them, or none.")
    ] = False,
    queue: Annotated[str | None, typer.Option("--queue", metavar="NAME", help="Instead of the task's.")] = None,
    priority: Annotated[int | None, typer.Option("--priority", metavar="N", help="Higher is claimed first.")] = None,
    delay: Annotated[float | None, duration_option("--in", "Not before so much later, e.g. 5m.")] = None,
    at: Annotated[
        datetime | None, typer.Option("--at", metavar="ISO", parser=moment, help="Not before 2030-01-31T12:00:00Z.")
    ] = None,
    expires_in: Annotated[
        float | None, duration_option("--expires-in", "Not started later than so long after it is due, e.g. 10m.")
    ] = None,
    concurrency_key: Annotated[
        str | None,
        typer.Option("--concurrency-key", metavar="KEY", help="Shares the task's limit per key with others of it."),
    ] = None,
    ordering_key: Annotated[
        str | None,
        typer.Option("--ordering-key", metavar="KEY", help="Runs after the jobs of its queue with the same one."),
    ] = None,
    rate_key: Annotated[
        str | None, typer.Option("--rate-key", metavar="KEY", help="Shares the task's rate with others of it.")
    ] = None,
    unique_key: Annotated[
        str | None,
        typer.Option("--unique-key", metavar="KEY", help="At most one open job of the task may have this key."),
    ] = None,
    on_conflict: Annotated[
        OnConflict | None,
        typer.Option(
            "--on-conflict",
            metavar="HOW",
            help="When one has it: skip this one, raise (exit code 4), or replace the pending one's payload.",
        ),
    ] = None,
    max_retries: Annotated[
        int | None, typer.Option("--max-retries", metavar="N", help="Instead of the task's.")
    ] = None,
) -> None:
    """Enqueue a job, and print its id.

    With --app (or PGQUEUE_APP) the task is looked up and the payload checked
    against it. Without, the task is just a name, and its payload any JSON object.

    Examples:
      pgqueue enqueue resize '{"file": "a.jpg"}' --app myapp.jobs:pgq --in 5m
      pgqueue enqueue resize @a.json --unique-key a.jpg --on-conflict raise
      jq -c '.[]' files.json | pgqueue enqueue resize - --lines
    """
    output = settings.printer()
    with opened(settings, Before.CREATE) as pgq:
        found = pgq.external_task(task) if settings.app is None else pgq.get_task(task)
        chosen: Task[..., Any] = found.using(
            queue=queue,
            priority=priority,
            delay=delay,
            at=at,
            expires_in=expires_in,
            unique_key=unique_key,
            on_conflict=on_conflict,
            max_retries=max_retries,
            concurrency_key=concurrency_key,
            ordering_key=ordering_key,
            rate_key=rate_key,
        )
        if lines:
            _enqueue_lines(pgq, chosen, payload, output)
            return
        with payload_file(payload) as file:
            content = parse_payload(b"".join(file), "the payload")
        with pgq.begin() as connection:
            result = chosen.enqueue(connection, **content)
    if result.id == DROPPED_ID:
        output.note(
            f"nothing was enqueued: queue {chosen._template.queue!r} is full, and drops jobs then (on_full is drop)"
        )
    elif not result.inserted:
        how = "took the new payload" if chosen._on_conflict is OnConflict.REPLACE else "nothing was enqueued"
        output.note(f"job {result.id} already has this unique key: {how}")
    output.record({"id": result.id, "inserted": result.inserted}, value="id")


def _enqueue_lines(pgq: PgQueue, task: Task[..., Any], source: str, output: Output) -> None:
    count = dropped = 0
    with payload_file(source) as file, pgq.begin() as connection, output.progress("enqueued") as advance:
        payloads = (parse_payload(line, f"line {number}") for number, line in enumerate(file, start=1) if line.strip())
        while batch := list(islice(payloads, LINES_PER_BATCH)):
            stored = len(task.enqueue_many(connection, batch))
            count += stored
            dropped += len(batch) - stored
            advance(stored)
    if dropped:
        output.note(f"{dropped} were not enqueued: queue {task._template.queue!r} is full, and drops jobs then")
    output.record({"enqueued": count}, value="enqueued")


@contextmanager
def payload_file(source: str) -> Iterator[Iterable[bytes]]:
    """The lines of what an argument stands for: standard input, a file, or itself."""
    if source == "-":
        yield sys.stdin.buffer
    elif source.startswith("@"):
        try:
            file = Path(source[1:]).open("rb")  # noqa: SIM115 — closed below
        except OSError as error:
            raise ConfigurationError(f"cannot read {source[1:]!r}: {error.strerror}") from None
        with file:
            yield file
    else:
        yield source.encode(errors="surrogateescape").splitlines(keepends=True)


def parse_payload(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises InvalidPayload, without showing any of it."""
    try:
        payload = json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InvalidPayload(f"{what} is not JSON: {error.msg}, line {error.lineno} column {error.colno}") from None
    except UnicodeDecodeError:
        raise InvalidPayload(f"{what} is not JSON: it is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InvalidPayload(f"{what} is not JSON that can be read: {error}") from None
    if not isinstance(payload, dict):
        raise InvalidPayload(f"{what} must be a JSON object, got {type(payload).__name__}")
    return payload
