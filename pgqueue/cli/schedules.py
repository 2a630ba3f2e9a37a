"""`pgqueue schedules`: what is enqueued by the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from pgqueue.cli.enqueue import parse_payload, payload_file
from pgqueue.cli.opening import actor, opened
from pgqueue.cli.parameters import Reason
from pgqueue.cli.program import OK, Settings, app, command, exit_code
from pgqueue.client import PgQueue, Task
from pgqueue.cron import Catchup, Schedule
from pgqueue.errors import ConfigurationError, ScheduleNotFound
from pgqueue.output import print_error, schedule_row

#: Columns of a table of schedules.
COLUMNS = ("name", "cron", "timezone", "task", "queue", "catchup", "state", "next_tick_at", "last_tick_at")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The schedule's name.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME", help="The schedules' names.")]

schedules = typer.Typer(no_args_is_help=True)
app.add_typer(schedules, name="schedules", help="Look at schedules; make, change, disable, run and delete them.")


@command(schedules, "list")
def list_schedules(settings: Settings) -> None:
    """List schedules by name.

    Those in the state `undeclared` come from code that no running worker has any
    more. They make no jobs.
    """
    with opened(settings) as pgq:
        rows = [schedule_row(schedule) for schedule in pgq.schedules.list()]
    settings.printer().rows(rows, COLUMNS)


@command(schedules, "show")
def show_schedule(
    settings: Settings,
    name: Name,
    ticks: Annotated[int, typer.Option("--ticks", metavar="N", min=0, max=1000, help="Next ticks to show.")] = 5,
) -> None:
    """Show a schedule and its next ticks, in UTC and by the clock of its time zone."""
    with opened(settings) as pgq:
        schedule = pgq.schedules.get(name)
    settings.printer().record({**schedule_row(schedule), "next_ticks": _next_ticks(schedule, ticks)})


def _next_ticks(schedule: Schedule, count: int) -> list[dict[str, Any]]:
    try:
        return [
            {"tick_at": tick, "local": tick.astimezone(schedule.rule.zone).isoformat()}
            for tick in schedule.next_ticks(count)
        ]
    except ConfigurationError as error:  # somebody stored it by SQL
        print_error(f"note: {error}")
        return []


@command(schedules, "add")
def add_schedule(
    settings: Settings,
    name: Name,
    cron: Annotated[
        str,
        typer.Argument(metavar="CRON", help="'minute hour day month weekday', such as '0 3 * * *'."),
    ],
    task: Annotated[str, typer.Argument(metavar="TASK", help="The name of the task.")],
    payload: Annotated[
        str,
        typer.Argument(metavar="JSON|@FILE|-", help="A JSON object: as it is, from a file, or from standard input."),
    ] = "{}",
    timezone: Annotated[
        str, typer.Option("--tz", metavar="ZONE", help="Where those hours are, such as Europe/Zurich.")
    ] = "UTC",
    catchup: Annotated[
        Catchup,
        typer.Option(
            "--catchup", metavar="HOW", help="Of the ticks that were missed, make up for none, the latest, or all."
        ),
    ] = Catchup.LATEST,
    no_overlap: Annotated[
        bool, typer.Option("--no-overlap", help="No job while the one before is pending or running.")
    ] = False,
    disabled: Annotated[bool, typer.Option("--disabled", help="Make no jobs until it is enabled.")] = False,
    queue: Annotated[str | None, typer.Option("--queue", metavar="NAME", help="Instead of the task's.")] = None,
    priority: Annotated[int | None, typer.Option("--priority", metavar="N", help="Higher is claimed first.")] = None,
    max_retries: Annotated[
        int | None, typer.Option("--max-retries", metavar="N", help="Instead of the task's.")
    ] = None,
    reason: Reason = None,
) -> None:
    """Make a schedule, or change the one of that name.

    With --app (or PGQUEUE_APP) the task is looked up and the payload checked
    against it. Without, the task is just a name, and its payload any JSON object.
    A schedule that the code declares is changed for good: delete it to go back.

    Examples:
      pgqueue schedules add nightly '0 3 * * *' report --tz Europe/Zurich
      pgqueue schedules add poll '*/5 * * * *' poll '{"tenant": 42}' --no-overlap
    """
    with payload_file(payload) as file:
        content = parse_payload(b"".join(file), "the payload")
    with opened(settings) as pgq:
        found = pgq.external_task(task) if settings.app is None else pgq.get_task(task)
        chosen: Task[..., Any] = found.using(queue=queue, priority=priority, max_retries=max_retries)
        with pgq.begin() as connection:
            schedule = pgq.schedules.upsert(
                connection,
                name,
                cron=cron,
                task=chosen,
                payload=content,
                tz=timezone,
                catchup=catchup,
                overlap=not no_overlap,
                enabled=False if disabled else None,
                actor=actor(),
                reason=reason,
            )
    settings.printer().record(schedule_row(schedule))


@command(schedules, "enable")
def enable_schedules(settings: Settings, names: Names, reason: Reason = None) -> None:
    """Let schedules make jobs, from their next ticks on."""
    _for_each(settings, names, lambda pgq, name: {"changed": pgq.schedules.enable(name, reason=reason, actor=actor())})


@command(schedules, "disable")
def disable_schedules(settings: Settings, names: Names, reason: Reason = None) -> None:
    """Let schedules make no more jobs, also when workers start that declare them. Open jobs go on."""
    _for_each(settings, names, lambda pgq, name: {"changed": pgq.schedules.disable(name, reason=reason, actor=actor())})


@command(schedules, "run")
def run_schedule(settings: Settings, name: Name, reason: Reason = None) -> None:
    """Enqueue a job of a schedule now, enabled or not, and print its id. Its ticks stay as they are."""
    output = settings.printer()
    with opened(settings) as pgq:
        result = pgq.schedules.run_now(name, reason=reason, actor=actor())
    if not result.inserted:
        output.note("nothing was enqueued: the job before is not finished, or the queue is full")
    output.record({"id": result.id, "inserted": result.inserted}, value="id")


@command(schedules, "delete")
def delete_schedules(settings: Settings, names: Names, reason: Reason = None) -> None:
    """Delete schedules; their jobs stay. Those that code declares come back when a worker starts: disable them."""

    def delete(pgq: PgQueue, name: str) -> dict[str, Any]:
        pgq.schedules.delete(name, reason=reason, actor=actor())
        return {"deleted": True}

    _for_each(settings, names, delete)


def _for_each(settings: Settings, names: list[str], change: Callable[[PgQueue, str], dict[str, Any]]) -> None:
    """Change schedules one by one, print those that were there, and exit with the code of the first that was not."""
    changed: list[dict[str, Any]] = []
    code = OK
    with opened(settings) as pgq:
        for name in names:
            try:
                changed.append({"name": name, **change(pgq, name)})
            except ScheduleNotFound as error:
                print_error(f"error: {error}")
                code = code or exit_code(error)
    if changed or settings.output is not None:
        settings.printer().rows(changed, list(changed[0]) if changed else ["name"])
    if code:
        raise typer.Exit(code)
