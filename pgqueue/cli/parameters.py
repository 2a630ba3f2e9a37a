"""Arguments and options that several commands have, and what is written in them."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

import typer

from pgqueue.config import parse_duration
from pgqueue.errors import ConfigurationError

ID_MAX = 2**63 - 1

JobId = Annotated[int, typer.Argument(metavar="ID", min=1, max=ID_MAX, help="The job's id.")]
JobIds = Annotated[list[int], typer.Argument(metavar="ID", min=1, max=ID_MAX, help="The jobs' ids.")]
QueueNames = Annotated[list[str], typer.Argument(metavar="QUEUE", help="The queues' names.")]
Reason = Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why, for the record.")]


DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="At most so many, the oldest first.")]


def duration_option(name: str, help: str, *, default: str | None = None, bare_numbers: bool = True) -> Any:
    """An option for a duration. `default` is what the help says; `bare_numbers` takes seconds without a unit."""

    def parse(text: str) -> float:
        try:
            return parse_duration(text, bare_numbers=bare_numbers)
        except ConfigurationError as error:
            raise typer.BadParameter(str(error)) from None

    return typer.Option(name, metavar="DURATION", parser=parse, help=help, show_default=default or False)


def moment_or_ago(text: str) -> datetime | timedelta:
    """ISO 8601, or how long ago."""
    try:
        return timedelta(seconds=parse_duration(text, bare_numbers=False))
    except (ConfigurationError, OverflowError):
        pass
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise typer.BadParameter(
            "expected how long ago, such as 2h, or ISO 8601 with a time zone, such as 2030-01-31T12:00:00Z, "
            f"got {text!r}"
        )
    return found


def tag(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise typer.BadParameter(f"expected KEY=VALUE, such as tenant=acme, got {text!r}")
    return key, value


QueueFilter = Annotated[str | None, typer.Option("--queue", metavar="NAME", help="Only jobs of this queue.")]
TaskFilter = Annotated[str | None, typer.Option("--task", metavar="NAME", help="Only jobs of this task.")]
ErrorFilter = Annotated[
    str | None,
    typer.Option("--error-type", metavar="NAME", help="Only jobs whose last attempt failed so, e.g. ValueError."),
]
Since = Annotated[
    Any,
    typer.Option(
        "--since",
        metavar="AGO|ISO",
        parser=moment_or_ago,
        help="Only jobs that ended (open ones: came) since then.",
    ),
]
Until = Annotated[
    Any, typer.Option("--until", metavar="AGO|ISO", parser=moment_or_ago, help="Likewise, before then, e.g. 2h.")
]
Tags = Annotated[
    list[Any] | None,
    typer.Option("--tag", metavar="KEY=VALUE", parser=tag, help="Only jobs with this in their metadata; repeatable."),
]


def moment(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise typer.BadParameter(f"expected ISO 8601 with a time zone, such as 2030-01-31T12:00:00Z, got {text!r}")
    return found
