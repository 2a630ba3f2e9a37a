"""`pgqueue limits`: how much of a queue or a task may run, start or wait."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import typer

from pgqueue.admission import Limits
from pgqueue.cli.opening import actor, opened
from pgqueue.cli.parameters import Reason
from pgqueue.cli.program import Settings, app, command
from pgqueue.config import parse_duration
from pgqueue.errors import ConfigurationError

limits = typer.Typer(no_args_is_help=True)
app.add_typer(limits, name="limits", help="Look at limits of queues and tasks; change them while workers run.")

FIELDS = tuple(field.name for field in dataclasses.fields(Limits))

Whose = Annotated[str, typer.Argument(metavar="WHOSE", help="queue:NAME or task:NAME.")]


@command(limits, "list")
def list_limits(settings: Settings) -> None:
    """List the limits of queues and tasks, and who set them: the code, or somebody since."""
    with opened(settings) as pgq:
        rows = [
            {"whose": f"{row.scope}:{row.name}", **dataclasses.asdict(row.limits), "declared_by": row.declared_by}
            for row in pgq.list_limits()
        ]
    settings.printer().rows(rows, ("whose", *FIELDS, "declared_by"))


@command(limits, "set")
def set_limits(
    settings: Settings,
    whose: Whose,
    concurrency: Annotated[
        str | None, typer.Option("--concurrency", metavar="N|none", help="How many of its jobs may run at once.")
    ] = None,
    key_concurrency: Annotated[
        str | None,
        typer.Option("--key-concurrency", metavar="N|none", help="Of a task: the same, of each concurrency key."),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", metavar="N/UNIT|none", help="How many may start in a time, e.g. 100/minute or 5/10s."),
    ] = None,
    burst: Annotated[
        int | None, typer.Option("--burst", metavar="N", min=1, help="How many may start at once after a quiet time.")
    ] = None,
    max_depth: Annotated[
        str | None,
        typer.Option("--max-depth", metavar="N|none", help="Of a queue: how many of its jobs may be pending."),
    ] = None,
    on_full: Annotated[
        str | None, typer.Option("--on-full", metavar="error|block|drop", help="What an enqueue does then.")
    ] = None,
    promote_after: Annotated[
        str | None,
        typer.Option(
            "--promote-after",
            metavar="DURATION|none",
            help="Of a queue: after so long a due job goes before all others, e.g. 10m.",
        ),
    ] = None,
    reason: Reason = None,
) -> None:
    """Change limits of a queue or a task. Running workers keep them from the next claim on.

    What is not named stays as it is; `none` lifts a limit. Limits that were set here outlast those that the code
    declares, until `pgqueue limits reset`.

    Example:
      pgqueue limits set task:resize --concurrency 4 --rate 100/minute
    """
    changes: dict[str, Any] = {}
    for name, text in (("concurrency", concurrency), ("key_concurrency", key_concurrency), ("max_depth", max_depth)):
        if text is not None:
            changes[name] = _number(name, text)
    if rate is not None:
        changes["rate"] = _rate(rate)
    if burst is not None:
        changes["burst"] = burst
    if on_full is not None:
        changes["on_full"] = on_full
    if promote_after is not None:
        changes["promote_after"] = _duration("--promote-after", promote_after)
    if not changes:
        raise typer.BadParameter("name at least one limit, such as --concurrency 4")
    scope, name = _whose(whose)
    with opened(settings) as pgq:
        kept = pgq.set_limits(
            queue=name if scope == "queue" else None,
            task=name if scope == "task" else None,
            reason=reason,
            actor=actor(),
            **changes,
        )
    settings.printer().record({"whose": whose, **dataclasses.asdict(kept)})


@command(limits, "reset")
def reset_limits(settings: Settings, whose: Whose, reason: Reason = None) -> None:
    """Give a queue or a task the limits back that the application declares (name it with --app)."""
    scope, name = _whose(whose)
    with opened(settings) as pgq:
        kept = pgq.reset_limits(
            queue=name if scope == "queue" else None,
            task=name if scope == "task" else None,
            reason=reason,
            actor=actor(),
        )
    settings.printer().record({"whose": whose, **dataclasses.asdict(kept)})


def _whose(text: str) -> tuple[Literal["queue", "task"], str]:
    scope, separator, name = text.partition(":")
    if not separator or not name or scope not in ("queue", "task"):
        raise typer.BadParameter(f"expected queue:NAME or task:NAME, got {text!r}")
    return ("queue" if scope == "queue" else "task"), name


def _number(name: str, text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"--{name.replace('_', '-')}: expected a whole number or none, got {text!r}") from None


def _duration(option: str, text: str) -> float | None:
    if text == "none":
        return None
    try:
        return parse_duration(text)
    except ConfigurationError as error:
        raise typer.BadParameter(f"{option}: {error}, or none") from None


def _rate(text: str) -> float | None:
    """Jobs per second of "100/minute", "5/10s" or "none"."""
    if text == "none":
        return None
    count, separator, unit = text.partition("/")
    seconds = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86_400.0}
    try:
        if not separator:
            raise ConfigurationError("no unit")
        per = seconds[unit] if unit in seconds else parse_duration(unit)
        return float(count) / per
    except (ValueError, ConfigurationError, ZeroDivisionError):
        raise typer.BadParameter(
            f"--rate: expected a number and a time, such as 100/minute, 5/10s or none, got {text!r}"
        ) from None
