"""`pgqueue jobs`, `queues`, `stats` and `prune`: what operators look at and do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from pgqueue.cli.opening import actor, opened
from pgqueue.cli.parameters import JobId, JobIds, QueueNames, Reason, duration_option
from pgqueue.cli.program import OK, Settings, app, command, exit_code
from pgqueue.errors import DuplicateJob, IllegalTransition, JobNotFound
from pgqueue.job import JobStatus
from pgqueue.operations import FINISHED, QueueSummary
from pgqueue.output import Format, job_row, print_error

STATUSES = ", ".join(JobStatus)

Exact = Annotated[bool, typer.Option("--exact", help="Count finished jobs too, however long it takes.")]

jobs = typer.Typer(no_args_is_help=True)
queues = typer.Typer(no_args_is_help=True)
app.add_typer(jobs, name="jobs", help="Look at jobs; retry, cancel or delete them.")
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

    Works in short transactions and can be run at any time. Dead jobs are kept unless named.

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
    queue: Annotated[str | None, typer.Option("--queue", metavar="NAME", help="Only jobs of this queue.")] = None,
    task: Annotated[str | None, typer.Option("--task", metavar="NAME", help="Only jobs of this task.")] = None,
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
      pgqueue jobs list --status dead --queue images -o json
    """
    with opened(settings) as pgq:
        page = pgq.page_of_jobs(status=status, queue=queue, task=task, before_id=before, limit=limit, within=within)
    output = settings.printer()
    output.rows(
        [job_row(job) for job in page.jobs],
        ("id", "task", "queue", "status", "priority", "run_at", "attempt", "retries", "error"),
    )
    if not page.complete:
        output.note(f"looked through {within} jobs; for older ones: --before {page.before_id}")


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


@command(jobs, "retry")
def retry_jobs(settings: Settings, job_ids: JobIds, reason: Reason = None) -> None:
    """Put dead or cancelled jobs back to pending, due now, with all their retries."""
    with opened(settings) as pgq:
        _for_each(settings, job_ids, JobStatus.PENDING, lambda job: pgq.replay(job, reason=reason, actor=actor()))


@command(jobs, "cancel")
def cancel_jobs(settings: Settings, job_ids: JobIds, reason: Reason = None) -> None:
    """Withdraw pending or running jobs. What a running one's worker still writes is refused."""
    with opened(settings) as pgq:
        _for_each(settings, job_ids, JobStatus.CANCELLED, lambda job: pgq.cancel(job, reason=reason, actor=actor()))


@command(jobs, "delete")
def delete_jobs(settings: Settings, job_ids: JobIds, reason: Reason = None) -> None:
    """Delete jobs that are not running. What was recorded of them stays."""
    with opened(settings) as pgq:
        _for_each(settings, job_ids, "deleted", lambda job: pgq.delete(job, reason=reason, actor=actor()))


def _for_each(settings: Settings, job_ids: Iterable[int], status: str, change: Callable[[int], None]) -> None:
    """Change jobs one by one, print those that were, and exit with the code of the first that could not be."""
    changed, code = [], OK
    for job_id in job_ids:
        try:
            change(job_id)
        except (JobNotFound, IllegalTransition, DuplicateJob) as error:
            print_error(f"error: {error}")
            code = code or exit_code(error)
        else:
            changed.append({"id": job_id, "status": str(status)})
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
