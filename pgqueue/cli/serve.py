"""`pgqueue serve`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from pgqueue.cli.opening import Before, opened
from pgqueue.cli.parameters import duration_option
from pgqueue.cli.program import Settings, app, command
from pgqueue.errors import ConfigurationError
from pgqueue.tokens import TOKENS_VARIABLE, tokens_from_environment, tokens_from_file


@command(app, log_level=logging.INFO)
def serve(
    settings: Settings,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="To listen on; 0.0.0.0 for every network, with tokens.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, envvar="PORT", help="0: any that is free.")
    ] = 3000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help=f"Lines of NAME:SCOPE,SCOPE:SECRET; the scopes are enqueue, work, operate and read. Otherwise they "
            f"are taken from {TOKENS_VARIABLE}, separated by white space.",
        ),
    ] = None,
    trusted_host: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-host",
            metavar="NAME",
            help="A name by which clients may call this server, beside its address and localhost; repeatable; * for "
            "any.",
        ),
    ] = None,
    any_type: Annotated[
        bool, typer.Option("--any-type", help="Take jobs of types that the app does not declare, too.")
    ] = False,
    threads: Annotated[
        int,
        typer.Option("--threads", metavar="N", min=2, max=1000, help="Requests at once, each with a connection."),
    ] = 16,
    shutdown_timeout: Annotated[
        float | None,
        duration_option("--shutdown-timeout", "How long requests may go on after the first signal.", default="10s"),
    ] = None,
) -> None:
    """Serve the queue over HTTP, for producers and workers in any language.

    Without tokens it listens on this machine only. Types of jobs are the app's
    tasks, whose payloads are checked; those of any other name need --any-type.

    Examples:
      pgqueue serve --any-type
      pgqueue serve --app myapp.jobs:pgq --port 8080
      pgqueue serve --app myapp.jobs:pgq --host 0.0.0.0 --token-file tokens --trusted-host queue.internal
    """
    try:
        from pgqueue.http import LOCAL_HOSTS, create_app
        from pgqueue.serving import is_loopback, listening, url_of
        from pgqueue.serving import serve as run
    except ImportError as error:
        raise ConfigurationError(
            f"serving needs the package {error.name}; install it with pgqueue: pip install 'pgqueue[http]'"
        ) from None

    tokens = tokens_from_file(token_file) if token_file is not None else tokens_from_environment()
    if not tokens and not is_loopback(host):
        raise ConfigurationError(
            f"without tokens anybody who reaches {host} could take and change jobs. Name tokens with --token-file or "
            f"{TOKENS_VARIABLE}, or listen on this machine only: --host 127.0.0.1"
        )
    if settings.app is None and not any_type:
        raise ConfigurationError("without an app no type of jobs is known: name one with --app, or say --any-type")
    output = settings.printer()
    with opened(settings, Before.CREATE) as pgq:
        application = create_app(
            pgq,
            tokens=tokens,
            unprotected=not tokens,
            trusted_hosts=[host, *LOCAL_HOSTS, *(trusted_host or ())],
            any_type=any_type,
            threads=threads,
        )
        with listening(host, port) as server:
            output.note(
                f"listening on {url_of(server)}" + ("" if tokens else ", without tokens: for this machine only")
            )
            run(application, server, shutdown_timeout=10.0 if shutdown_timeout is None else shutdown_timeout)
