"""`pgqueue worker` and `pgqueue demo`."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pgqueue.cli.opening import Before, opened
from pgqueue.cli.parameters import duration_option
from pgqueue.cli.program import FAILURE, Settings, app, command
from pgqueue.client import PgQueue
from pgqueue.config import (
    DEFAULT_CONCURRENCY,
    DEFAULT_QUEUE,
    LOCAL_URL,
    WorkerConfig,
    parse_queues,
)
from pgqueue.engine import describe_url, parse_url
from pgqueue.errors import ConfigurationError
from pgqueue.output import Format
from pgqueue.settings import Sources, worker_config
from pgqueue.supervisor import DRAINED_WITH_DEAD, SUPERVISED_VARIABLE, Supervisor, run_worker
from pgqueue.worker import Worker

#: How a supervisor tells its processes the URL that was named on its command line.
CHILD_URL_VARIABLE = "PGQUEUE_SUPERVISED_DATABASE_URL"

SETTINGS = WorkerConfig()  # for the defaults that the help names


@command(app, "worker", log_level=logging.INFO)
def worker_command(
    settings: Settings,
    application: Annotated[
        str | None,
        typer.Argument(metavar="APP", help="Where the tasks are, such as myapp.jobs:pgq; also PGQUEUE_APP."),
    ] = None,
    queue: Annotated[
        list[str] | None,
        typer.Option(
            "--queue",
            metavar="NAME=N",
            help="A queue to work on, and how many of its jobs at once; repeatable, or separated by commas. "
            "Without: the queues that the app's tasks name.",
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            metavar="N",
            show_default=str(DEFAULT_CONCURRENCY),
            help="Jobs at once of a queue that is named without a number.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            metavar="N",
            min=1,
            max=1000,
            show_default="1",
            help="Worker processes, each with that concurrency.",
        ),
    ] = None,
    lease: Annotated[
        float | None,
        duration_option(
            "--lease",
            "A job is given to another worker when its worker was silent for so long.",
            default=f"{SETTINGS.lease:g}s",
        ),
    ] = None,
    heartbeat: Annotated[
        float | None,
        duration_option("--heartbeat", "Between two signs of life.", default="a third of the lease"),
    ] = None,
    poll_interval: Annotated[
        float | None,
        duration_option(
            "--poll-interval",
            "How long an idle worker waits until it looks again, when nothing wakes it.",
            default=f"{SETTINGS.poll_interval:g}s",
        ),
    ] = None,
    sweep_interval: Annotated[
        float | None,
        duration_option(
            "--sweep-interval",
            "Between two searches for jobs of dead workers.",
            default=f"{SETTINGS.sweep_interval:g}s",
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float | None,
        duration_option(
            "--shutdown-timeout",
            "How long running jobs may go on after the first signal.",
            default=f"{SETTINGS.shutdown_timeout:g}s",
        ),
    ] = None,
    prefetch: Annotated[
        int | None,
        typer.Option(
            "--prefetch",
            metavar="N",
            show_default="by the measured run time",
            help="Jobs claimed ahead of those that run, a queue.",
        ),
    ] = None,
    listen: Annotated[
        bool | None,
        typer.Option(
            "--listen/--no-listen",
            show_default="listen",
            help="Be woken by LISTEN, or only poll: for a connection pooler in transaction mode.",
        ),
    ] = None,
    schedules: Annotated[
        bool | None,
        typer.Option(
            "--schedules/--no-schedules",
            show_default="schedules",
            help="Enqueue what schedules say, or leave it to other workers.",
        ),
    ] = None,
    drain: Annotated[
        bool | None,
        typer.Option(
            "--drain/--no-drain",
            show_default="no-drain",
            help="Exit when the queues are empty; leaves schedules to other workers.",
        ),
    ] = None,
    max_jobs: Annotated[
        int | None,
        typer.Option(
            "--max-jobs",
            metavar="N",
            help="Exit after so many jobs. With --processes each process then makes way for a fresh one.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="TEXT", show_default="the host's name", help="How the worker's id begins in the database."
        ),
    ] = None,
) -> None:
    """Run the jobs of an application's tasks.

    Signals:
      SIGTERM, SIGINT   the first: claim nothing more, let running jobs end,
                        give back those not done in --shutdown-timeout, exit 0
                        the second: give all back and exit at once, 143 or 130
      SIGKILL           the jobs run elsewhere once the lease is over

    Examples:
      pgqueue worker myapp.jobs:pgq
      pgqueue worker myapp.jobs:pgq --queue images=4 --queue default=20
      pgqueue worker myapp.jobs:pgq --processes 2
      pgqueue worker myapp.jobs:pgq --queue images=4,mails --drain
    """
    if application is not None:
        settings = dataclasses.replace(settings, app=application)
    if settings.app is None:
        raise ConfigurationError(
            "which app? Name it, such as: pgqueue worker myapp.jobs:pgq (or set PGQUEUE_APP, or app in pgqueue.toml)"
        )
    supervised = os.environ.pop(SUPERVISED_VARIABLE, None) is not None
    child_url = os.environ.pop(CHILD_URL_VARIABLE, None)
    if supervised and child_url is not None:
        settings = dataclasses.replace(settings, database_url=child_url)
    given: dict[str, Any] = {
        "queues": parse_queues(queue, None) if queue else None,
        "concurrency": concurrency,
        "processes": processes,
        "lease": lease,
        "heartbeat_interval": heartbeat,
        "poll_interval": poll_interval,
        "sweep_interval": sweep_interval,
        "shutdown_timeout": shutdown_timeout,
        "prefetch": prefetch,
        "listen": listen,
        "schedules": schedules,
        "drain": drain,
        "max_jobs": max_jobs,
        "name": name,
    }
    sources = Sources()
    for misspelled in sources.misspelled():
        settings.printer().note(f"note: {misspelled}")
    with opened(settings, Before.CREATE) as pgq:
        found = sources.find_all(given)
        config = worker_config(found, _queues_of(pgq))
        processes = found["processes"].value
        assert processes is not None
        worker = Worker(pgq, config)  # also when others are to work: it says what is wrong
        if processes == 1:
            stopped = run_worker(worker, supervised=supervised)
            if config.drain and worker.report.dead and not stopped:
                raise typer.Exit(DRAINED_WITH_DEAD)
            return
        pgq.dispose()
        environ = dict(os.environ)
        if settings.database_url is not None:
            environ[CHILD_URL_VARIABLE] = settings.database_url
        elif pgq.url == parse_url(LOCAL_URL):
            environ[CHILD_URL_VARIABLE] = LOCAL_URL  # announced, created and upgraded by now
        supervisor = Supervisor(_child_command(settings, config), processes, environ=environ, drain=config.drain)
    raise typer.Exit(supervisor.run())


def _queues_of(pgq: PgQueue) -> list[str]:
    return sorted({task.definition.queue for task in pgq.tasks.values() if not task.external}) or [DEFAULT_QUEUE]


def _child_command(settings: Settings, config: WorkerConfig) -> list[str]:
    """One of several processes with the same settings. The URL, which may hold a password, goes another way."""
    options = {
        "--queue": ",".join(f"{name}={count}" for name, count in config.queues.items()),
        "--lease": config.lease,
        "--heartbeat": config.heartbeat_interval,
        "--poll-interval": config.poll_interval,
        "--sweep-interval": config.sweep_interval,
        "--shutdown-timeout": config.shutdown_timeout,
        "--prefetch": config.prefetch,
        "--max-jobs": config.max_jobs,
        "--processes": 1,
        "--name": config.name,
        "--schema": settings.schema,
        "--log-level": logging.getLevelName(settings.level(logging.INFO)).lower(),
    }
    flags = [
        "--listen" if config.listen else "--no-listen",
        "--schedules" if config.schedules else "--no-schedules",
        "--drain" if config.drain else "--no-drain",
        *(["--quiet"] if settings.quiet else []),
    ]
    return [
        *(sys.executable, "-m", "pgqueue", "worker", str(settings.app)),
        *(f"{name}={value}" for name, value in options.items() if value is not None),
        *flags,
    ]


@command(app)
def demo(
    settings: Settings,
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", show_default="Python's standard library", help="Whose files to index."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="Worker processes.")] = 2,
    kill: Annotated[bool, typer.Option("--kill/--no-kill", help="Kill one of them with SIGKILL on the way.")] = True,
) -> None:
    """Index real files, kill a worker on the way, and check that everything happened exactly once.

    On SQLite, or on the database of --database-url, PGQUEUE_DATABASE_URL or
    DATABASE_URL. The demo's tables are its own and are gone at the end. Exits 1
    unless every effect happened exactly once.

    Examples:
      pgqueue demo
      pgqueue demo ~/src --workers 4
      pgqueue demo --database-url postgresql://localhost/test
    """
    from pgqueue.demo import run_demo  # other commands need not load it

    output = settings.printer()
    url = Sources().find("database_url", settings.database_url).value
    output.note(f"the demo runs on {'a temporary SQLite file' if url is None else describe_url(parse_url(url))}")
    report = run_demo(
        directory,
        url,
        schema=Sources().find("schema", settings.schema).value,
        workers=workers,
        kill=kill,
        console=output.console(sys.stderr),
    )
    output.record(dataclasses.asdict(report))
    if not report.exactly_once:
        raise typer.Exit(FAILURE)


@command(app)
def bench(
    settings: Settings,
    jobs: Annotated[
        int, typer.Option("--jobs", metavar="N", help="Of the backlog that a worker drains, in each round.")
    ] = 10_000,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="How often all is measured.")] = 3,
    no_listen: Annotated[
        bool, typer.Option("--no-listen", help="Poll only, as behind a pooler in transaction mode.")
    ] = False,
) -> None:
    """Measure how fast a database is as a queue, in some seconds.

    On the database of --database-url, PGQUEUE_DATABASE_URL or DATABASE_URL;
    without one on SQLite. Enqueues, drains with one worker, and measures the time
    from a commit to the start of the job. In a schema of its own, pgqueue_bench,
    which must not exist, and is dropped at the end: no job of yours is touched.

    Examples:
      pgqueue bench --database-url postgresql://localhost/test
      pgqueue bench --jobs 100000 --rounds 5 -o json
    """
    from pgqueue.bench import run_bench  # other commands need not load it

    output = settings.printer()
    url = Sources().find("database_url", settings.database_url).value
    with output.progress("rounds measured", total=rounds) as advance:
        report = run_bench(
            url,
            schema=Sources().find("schema", settings.schema).value,
            jobs=jobs,
            rounds=rounds,
            listen=not no_listen,
            measured=advance,
        )
    record, columns = dataclasses.asdict(report), ("measure", "unit", "median", "lowest", "highest")
    if output.format is Format.TABLE:
        for measure in record["measures"]:
            measure.update({name: _figure(measure[name]) for name in columns[2:]})
    output.record(record, columns={"measures": columns})


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
