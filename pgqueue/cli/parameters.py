"""Arguments and options that several commands have, and what is written in them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer

from pgqueue.config import parse_duration
from pgqueue.errors import ConfigurationError

ID_MAX = 2**63 - 1

JobId = Annotated[int, typer.Argument(metavar="ID", min=1, max=ID_MAX, help="The job's id.")]
JobIds = Annotated[list[int], typer.Argument(metavar="ID", min=1, max=ID_MAX, help="The jobs' ids.")]
QueueNames = Annotated[list[str], typer.Argument(metavar="QUEUE", help="The queues' names.")]
Reason = Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why, for the record.")]


def duration_option(name: str, help: str, *, default: str | None = None, bare_numbers: bool = True) -> Any:
    """An option for a duration. `default` is what the help says; `bare_numbers` takes seconds without a unit."""

    def parse(text: str) -> float:
        try:
            return parse_duration(text, bare_numbers=bare_numbers)
        except ConfigurationError as error:
            raise typer.BadParameter(str(error)) from None

    return typer.Option(name, metavar="DURATION", parser=parse, help=help, show_default=default or False)


def moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"expected ISO 8601 with a time zone, such as 2030-01-31T12:00:00Z, got {text!r}"
        ) from None
