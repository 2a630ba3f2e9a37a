"""`pgqueue jobs`, `queues`, `stats` and `prune`: what operators look at and do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from pgqueue.cli.enqueue import parse_payload, payload_file
from pgqueue.cli.opening import actor, opened
from pgqueue.cli.parameters import (
    ID_MAX,
    DryRun,
    ErrorFilter,
    JobId,
    JobIds,
    Limit,
    QueueFilter,
    QueueNames,
    Reason,
    Since,
    Tags,
    TaskFilter,
    Until,
    Yes,
    duration_option,
)
from pgqueue.cli.program import FAILURE, OK, Settings, app, command, exit_code
from pgqueue.errors import ConfigurationError, DuplicateJob, IllegalTransition, JobNotFound
from pgqueue.job import JobStatus
from pgqueue.operations import FINISHED, QueueSummary
from pgqueue.output import Format, ask, job_row, lines_to, print_error, to_json

STATUSES = ", ".join(JobStatus)

Exact = Annotated[bool, typer.Option("--exact", help="Count finished jobs too, however long it takes.")]

jobs = typer.Typer(no_args_is_help=True)
queues = typer.Typer(no_args_is_help=True)
app.add_typer(jobs, name="jobs", help="Look at jobs; replay, edit, cancel, delete or export them.")
app.add_typer(queues, name="queues", help="Look at queues; pause and resume them.")


@command(app)
def stats(settings: Settings, exact: Exact = False) -> None:
    """Show how many jobs of each queue stand where, and which workers are alive.

    Beside a long history a table shows estimates of the completed and cancelled jobs, as ~120000.
    """
    with opened(settings) as pgq:
        summaries, workers = pgq.queues(exact=exact), pgq.workers()
    settings.printer().record(
        {"queues": _queue_rows(settings, summaries), "workers": workers},
        columns={"workers": ("id", "pid", "host", "version", "queues", "started_at", "silent_seconds")},
    )


@command(app)
def prune(
    settings: Settings,
    older_than: Annotated[
        float,
        duration_option("--older-than", "How long ago the jobs must have ended, e.g. 7d.", bare_numbers=False),
    ],
    status: Annotated[
        list[JobStatus] | None,
        typer.Option(
            "--status", metavar="STATUS", help="completed, cancelled or dead; repeatable. Otherwise the first two."
        ),
    ] = None,
) -> None:
    """Delete jobs that ended long ago, and print how many.

    Works in short transactions and can be run at any time. Dead jobs are kept unless named. What was recorded of jobs
    that are gone goes, too, when it is as old.

    Example:
      pgqueue prune --older-than 30d --status completed --status dead
    """
    output = settings.printer()
    options: dict[str, Any] = {"statuses": status} if status else {}
    with opened(settings) as pgq, output.progress("jobs deleted") as advance:
        count = pgq.prune(older_than=older_than, pruned=advance, **options)
    output.record({"pruned": count}, value="pruned")


# pgqueue jobs ----------------------------------------------------------------------------------------------


@command(jobs, "list")
def list_jobs(
    settings: Settings,
    status: Annotated[
        JobStatus | None, typer.Option("--status", metavar="STATUS", help=f"Only jobs that are {STATUSES}.")
    ] = None,
    queue: QueueFilter = None,
    task: TaskFilter = None,
    error_type: ErrorFilter = None,
    since: Since = None,
    until: Until = None,
    tags: Tags = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=100_000, help="At most so many.")] = 50,
    before: Annotated[
        int | None, typer.Option("--before", metavar="ID", help="Only jobs older than this one: the next page.")
    ] = None,
    within: Annotated[
        int,
        typer.Option("--within", metavar="N", min=1, help="Look through so many completed jobs at most."),
    ] = 100_000,
) -> None:
    """List jobs, newest first.

    For the next page, give the last id to --before.

    Example:
      pgqueue jobs list --status dead --error-type ValueError --since 2h -o json
    """
    filters = _filters(queue, task, error_type, since, until, tags)
    with opened(settings) as pgq:
        page = pgq.page_of_jobs(status=status, before_id=before, limit=limit, within=within, **filters)
    output = settings.printer()
    output.rows(
        [job_row(job) for job in page.jobs],
        ("id", "task", "queue", "status", "priority", "run_at", "attempt", "retries", "error"),
    )
    if not page.complete:
        output.note(f"looked through {within} jobs; for older ones: --before {page.before_id}")


def _filters(
    queue: str | None,
    task: str | None,
    error_type: str | None,
    since: Any,
    until: Any,
    tags: list[tuple[str, str]] | None,
) -> dict[str, Any]:
    return {
        "queue": queue,
        "task": task,
        "error_type": error_type,
        "since": since,
        "until": until,
        "tags": dict(tags) if tags else None,
    }


@command(jobs, "show")
def show_job(
    settings: Settings,
    job_id: JobId,
) -> None:
    """Show all there is to know of a job: its row, and what was recorded of it."""
    with opened(settings) as pgq:
        job, events = pgq.get_job(job_id), pgq.job_events(job_id)
    settings.printer().record(
        {**job_row(job), "events": events},
        columns={"events": ("at", "event", "actor", "attempt", "from_status", "to_status", "reason", "error")},
    )


@command(jobs, "wait")
def wait_for_job(
    settings: Settings,
    job_id: JobId,
    timeout: Annotated[float | None, duration_option("--timeout", "At most so long, e.g. 5m. Else: for ever.")] = None,
) -> None:
    """Wait until a job has ended, and print its result as JSON.

    The exit code is 1 when it is dead or cancelled, or has not ended in time.

    Example:
      pgqueue jobs wait 17 --timeout 5m
    """
    with opened(settings) as pgq:
        result = pgq.result(job_id, timeout=timeout)
    settings.printer().text(to_json(result))


@command(jobs, "replay")
def replay_jobs(
    settings: Settings,
    job_ids: Annotated[
        list[int] | None,
        typer.Argument(metavar="ID", min=1, max=ID_MAX, show_default=False, help="Their ids; or give filters."),
    ] = None,
    queue: QueueFilter = None,
    task: TaskFilter = None,
    error_type: ErrorFilter = None,
    since: Since = None,
    until: Until = None,
    tags: Tags = None,
    every: Annotated[bool, typer.Option("--all", help="Replay all dead jobs.")] = False,
    limit: Limit = None,
    payload: Annotated[
        str | None,
        typer.Option("--payload", metavar="JSON|@FILE|-", help="Of one job: give it this payload first."),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    reason: Reason = None,
) -> None:
    """Put dead or cancelled jobs back to pending, due now, with all their retries.

    By ids, or all dead jobs that fit the filters. One that cannot be, because an
    open job has its unique key, is left out and named.

    Examples:
      pgqueue jobs replay 17 18 --reason "the provider is back"
      pgqueue jobs replay --task mail --error-type ConnectionError --since 2h --dry-run
      pgqueue jobs replay 17 --payload '{"file": "b.jpg"}'
    """
    filters = _filters(queue, task, error_type, since, until, tags)
    if job_ids:
        if _is_filtered(filters) or every or limit is not None or dry_run:
            raise ConfigurationError("give either ids or filters (--task, --all, --dry-run, …), not both")
        _replay_ids(settings, job_ids, payload, reason)
        return
    if payload is not None:
        raise ConfigurationError("--payload is for one job: give its id")
    _require_filter(filters, every, "replay")
    output = settings.printer()
    with opened(settings) as pgq:
        planned = pgq.replay_where(limit=limit, dry_run=True, **filters) if dry_run or not yes else None
        if planned is not None and not dry_run and not _confirmed(len(planned.replayed), "Replay", yes):
            output.note("nothing was replayed")
            raise typer.Exit(FAILURE)
        if dry_run:
            result = planned
        else:
            with output.progress("jobs replayed") as advance:
                result = pgq.replay_where(limit=limit, replayed=advance, reason=reason, actor=actor(), **filters)
    assert result is not None
    for job_id, why in result.skipped.items():
        output.note(f"job {job_id} is left as it is: {why}")
    record: dict[str, Any] = {"replayed": len(result.replayed), "skipped": len(result.skipped), "dry_run": dry_run}
    if settings.output not in (None, Format.TABLE):
        record |= {"ids": list(result.replayed), "why_skipped": {str(key): why for key, why in result.skipped.items()}}
    output.record(record)


def _replay_ids(settings: Settings, job_ids: list[int], payload: str | None, reason: str | None) -> None:
    content: dict[str, Any] | None = None
    if payload is not None:
        if len(job_ids) > 1:
            raise ConfigurationError(f"--payload is for one job, got {len(job_ids)} ids")
        content = _payload(payload)
    with opened(settings) as pgq:
        _for_each(
            settings,
            job_ids,
            JobStatus.PENDING,
            lambda job: pgq.replay(job, payload=content, reason=reason, actor=actor()),
        )


@command(jobs, "edit")
def edit_job(
    settings: Settings,
    job_id: JobId,
    payload: Annotated[
        str | None,
        typer.Option("--payload", metavar="JSON|@FILE|-", help="A JSON object instead of the present payload."),
    ] = None,
    priority: Annotated[int | None, typer.Option("--priority", metavar="N", help="Higher is claimed first.")] = None,
    max_retries: Annotated[int | None, typer.Option("--max-retries", metavar="N", help="Retries allowed.")] = None,
    reason: Reason = None,
) -> None:
    """Change a pending, dead or cancelled job.

    With --app (or PGQUEUE_APP) the payload is checked against the task.

    Example:
      pgqueue jobs edit 17 --payload '{"file": "b.jpg"}' --reason "wrong file"
    """
    if payload is None and priority is None and max_retries is None:
        raise typer.BadParameter("say what to change: --payload, --priority or --max-retries")
    content = None if payload is None else _payload(payload)
    with opened(settings) as pgq:
        pgq.edit(job_id, payload=content, priority=priority, max_retries=max_retries, reason=reason, actor=actor())
        status = pgq.get_job(job_id).status
    settings.printer().rows([{"id": job_id, "status": status}], ("id", "status"))


@command(jobs, "purge")
def purge_jobs(
    settings: Settings,
    queue: QueueFilter = None,
    task: TaskFilter = None,
    error_type: ErrorFilter = None,
    since: Since = None,
    until: Until = None,
    tags: Tags = None,
    every: Annotated[bool, typer.Option("--all", help="Delete all dead jobs.")] = False,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    reason: Reason = None,
) -> None:
    """Delete dead jobs that fit the filters, and print how many.

    What was recorded of them goes, too, but for one line each that says who
    deleted it.

    Example:
      pgqueue jobs purge --task mail --until 30d --dry-run
    """
    filters = _filters(queue, task, error_type, since, until, tags)
    _require_filter(filters, every, "purge")
    output = settings.printer()
    with opened(settings) as pgq:
        if dry_run:
            count = pgq.purge(limit=limit, dry_run=True, **filters)
        else:
            if not yes and not _confirmed(pgq.purge(limit=limit, dry_run=True, **filters), "Delete", yes):
                output.note("nothing was deleted")
                raise typer.Exit(FAILURE)
            with output.progress("jobs deleted") as advance:
                count = pgq.purge(limit=limit, purged=advance, reason=reason, actor=actor(), **filters)
    output.record({"purged": count, "dry_run": dry_run}, value="purged")


def _is_filtered(filters: dict[str, Any]) -> bool:
    return any(value is not None for value in filters.values())


def _require_filter(filters: dict[str, Any], every: bool, verb: str) -> None:
    if _is_filtered(filters) == every:
        raise ConfigurationError(
            "--all and filters such as --task contradict each other: give one of the two"
            if every
            else f"say which jobs to {verb}: filters such as --task or --error-type, or --all"
        )


def _confirmed(count: int, verb: str, yes: bool) -> bool:
    """Whether somebody who was asked agrees; one job or none needs no question."""
    return yes or count <= 1 or ask(f"{verb} {count} dead jobs?")


def _payload(source: str) -> dict[str, Any]:
    with payload_file(source) as file:
        return parse_payload(b"".join(file), "the payload")


@command(jobs, "export")
def export_jobs(
    settings: Settings,
    status: Annotated[
        JobStatus | None, typer.Option("--status", metavar="STATUS", help=f"Only jobs that are {STATUSES}.")
    ] = None,
    queue: QueueFilter = None,
    task: TaskFilter = None,
    error_type: ErrorFilter = None,
    since: Since = None,
    until: Until = None,
    tags: Tags = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Write here instead of to standard output.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write jobs with all their fields, oldest first: one JSON document a line.

    Works page by page, for any number of jobs. The file appears when it is
    complete, and only its owner can read it.

    Example:
      pgqueue jobs export --status dead --file dead.jsonl
    """
    if settings.output not in (None, Format.JSONL):
        raise ConfigurationError(f"an export is written as jsonl, got -o {settings.output}")
    if force and file is None:
        raise ConfigurationError("--force needs --file")
    output = settings.printer()
    filters = _filters(queue, task, error_type, since, until, tags)
    count = 0
    with opened(settings) as pgq, lines_to(file, replace=force) as write, output.progress("jobs exported") as advance:
        for job in pgq.iter_jobs(status=status, **filters):
            write(to_json(job_row(job)))
            advance(1)
            count += 1
    if file is not None:
        output.note(f"{count} jobs written to {file}")


@command(jobs, "cancel")
def cancel_jobs(
    settings: Settings,
    job_ids: JobIds,
    force: Annotated[
        bool, typer.Option("--force", help="Cancel running jobs at once; what their workers still write is refused.")
    ] = False,
    reason: Reason = None,
) -> None:
    """Cancel pending jobs, and ask the workers of running ones to stop them.

    The status printed is the job's status then. A running job is cancelled when its worker has stopped it; if it comes
    to its end before, it is completed.
    """

    def cancel(job: int) -> JobStatus:
        status = pgq.cancel(job, force=force, reason=reason, actor=actor())
        if status is JobStatus.RUNNING:
            print_error(f"job {job} is running; its worker was asked to stop it (--force cancels it at once)")
        return status

    with opened(settings) as pgq:
        _for_each(settings, job_ids, JobStatus.CANCELLED, cancel)


@command(jobs, "delete")
def delete_jobs(settings: Settings, job_ids: JobIds, reason: Reason = None) -> None:
    """Delete jobs that are not running. What was recorded of them stays."""
    with opened(settings) as pgq:
        _for_each(settings, job_ids, "deleted", lambda job: pgq.delete(job, reason=reason, actor=actor()))


def _for_each(settings: Settings, job_ids: Iterable[int], status: str, change: Callable[[int], str | None]) -> None:
    """Change jobs one by one, print those that were, and exit with the code of the first that could not be.

    `status` is what they are then, unless `change` says otherwise.
    """
    changed, code = [], OK
    for job_id in job_ids:
        try:
            became = change(job_id) or status
        except (JobNotFound, IllegalTransition, DuplicateJob) as error:
            print_error(f"error: {error}")
            code = code or exit_code(error)
        else:
            changed.append({"id": job_id, "status": str(became)})
    if changed or settings.output is not None:
        settings.printer().rows(changed, ("id", "status"))
    if code:
        raise typer.Exit(code)


# pgqueue queues --------------------------------------------------------------------------------------------


@command(queues, "list")
def list_queues(settings: Settings, exact: Exact = False) -> None:
    """Show how many jobs of each queue stand where.

    Beside a long history a table shows estimates of the completed and cancelled jobs, as ~120000.
    """
    with opened(settings) as pgq:
        rows = _queue_rows(settings, pgq.queues(exact=exact))
    columns = [field.name for field in dataclasses.fields(QueueSummary) if field.name != "estimated"]
    settings.printer().rows(rows, columns)


def _queue_rows(settings: Settings, summaries: Iterable[QueueSummary]) -> list[dict[str, Any]]:
    """For a table, estimates are marked; elsewhere the key `estimated` tells of them."""
    rows = [dataclasses.asdict(summary) for summary in summaries]
    if settings.printer().format is Format.TABLE:
        for row in rows:
            mark = "~" if row.pop("estimated") else ""
            row.update({name: f"{mark}{row[name]}" for name in FINISHED})
    return rows


@command(queues, "pause")
def pause_queues(
    settings: Settings,
    names: QueueNames,
    duration: Annotated[
        float | None,
        duration_option("--for", "E.g. 10m. Without: until it is resumed."),
    ] = None,
    reason: Reason = None,
) -> None:
    """Let nothing be claimed from queues. Running jobs go on, and jobs can be enqueued."""
    with opened(settings) as pgq:
        for name in names:
            pgq.pause(name, duration=duration, reason=reason, actor=actor())
        paused = {summary.queue: summary.paused_until for summary in pgq.queues()}
    rows = [{"queue": name, "paused": True, "paused_until": paused.get(name)} for name in names]
    settings.printer().rows(rows, ("queue", "paused", "paused_until"))


@command(queues, "resume")
def resume_queues(settings: Settings, names: QueueNames, reason: Reason = None) -> None:
    """End the pause of queues. One that is not paused stays as it is."""
    with opened(settings) as pgq:
        rows = [
            {"queue": name, "paused": False, "was_paused": pgq.resume(name, reason=reason, actor=actor())}
            for name in names
        ]
    settings.printer().rows(rows, ("queue", "paused", "was_paused"))
