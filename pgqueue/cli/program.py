"""The frame around every command: the global options, errors and exit codes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pgqueue.config import DEFAULT_SCHEMA
from pgqueue.errors import (
    ClaimLost,
    ConfigurationError,
    DatabaseUnreachable,
    DuplicateJob,
    IllegalTransition,
    InvalidPayload,
    InvalidTask,
    JobNotFound,
    PgqueueError,
    QueueFull,
    ScheduleNotFound,
    SchemaMissing,
    SchemaOutdated,
    TaskNotFound,
    WrongSession,
)
from pgqueue.output import Format, Output, logging_to_stderr, print_error
from pgqueue.settings import Sources
from pgqueue.version import VERSION

OK, FAILURE, USAGE, NOT_FOUND, CONFLICT, UNREACHABLE, SCHEMA = range(7)
INTERRUPTED = 130

#: What an error ends in: the first line that fits. Anything else is FAILURE.
EXIT_CODES: tuple[tuple[type[PgqueueError], int], ...] = (
    (TaskNotFound, NOT_FOUND),
    (JobNotFound, NOT_FOUND),
    (ScheduleNotFound, NOT_FOUND),
    (DuplicateJob, CONFLICT),
    (IllegalTransition, CONFLICT),
    (ClaimLost, CONFLICT),
    (QueueFull, CONFLICT),
    (DatabaseUnreachable, UNREACHABLE),
    (SchemaMissing, SCHEMA),
    (SchemaOutdated, SCHEMA),
    (ConfigurationError, USAGE),
    (InvalidPayload, USAGE),
    (InvalidTask, USAGE),
    (WrongSession, USAGE),
)

#: What all usage errors have in common, in whichever copy of Click this Typer uses.
UsageError: Any = typer.BadParameter.__mro__[1]

#: The order of the help.
COMMANDS = (
    "worker",
    "serve",
    "enqueue",
    "jobs",
    "queues",
    "limits",
    "schedules",
    "stats",
    "prune",
    "config",
    "db",
    "bench",
    "demo",
)


class Program(TyperGroup):
    """The top command: turns every error into a line on stderr and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=COMMANDS.index)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        run = functools.partial(
            super().main, args, prog_name, complete_var, False, windows_expand_args=windows_expand_args, **extra
        )
        if not standalone_mode:
            return run()
        try:
            code = run()  # an exit code comes back as a number; a command returns nothing
        except UsageError as error:
            code = _show_usage_error(error)
        except PgqueueError as error:
            print_error(f"error: {error}")
            code = exit_code(error)
        except (KeyboardInterrupt, typer.Abort):
            print_error("interrupted")
            code = INTERRUPTED
        except Exception as error:  # noqa: BLE001 — whatever it is, it ends here and shows no secrets
            print_error("".join(traceback.format_exception(error)).rstrip())
            print_error(f"error: unexpected {type(error).__name__}")
            code = FAILURE
        sys.exit(code if isinstance(code, int) else OK)


def exit_code(error: PgqueueError) -> int:
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), FAILURE)


def _show_usage_error(error: Any) -> int:
    context, message = error.ctx, error.format_message().replace(": Value error, ", ": ")
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is what is shown
        if message:
            print_error(message)
    elif context is None:
        print_error(f"error: {message}")
    else:
        print_error(f"{context.get_usage()}\nTry: {context.command_path} --help\nerror: {message}")
    return int(error.exit_code)


# Global options --------------------------------------------------------------------------------------------


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The global options, as given before and after the name of the command."""

    database_url: str | None = None
    schema: str | None = None
    app: str | None = None
    output: Format | None = None
    log_level: LogLevel | None = None
    verbose: int = 0
    quiet: int = 0
    no_color: bool = False

    def overridden(self, later: Settings) -> Settings:
        changes = {
            field.name: getattr(later, field.name)
            for field in dataclasses.fields(later)
            if getattr(later, field.name) not in (None, False, 0)  # an empty text is something that was given
        }
        return dataclasses.replace(self, **changes)

    def with_app(self) -> Settings:
        """With the app of the environment or the file when no option names one."""
        return dataclasses.replace(self, app=Sources().find("app", self.app).value)

    def printer(self) -> Output:
        return Output(self.output or Format.TABLE, color=not self.no_color, quiet=self.quiet > 0)

    def level(self, normal: int) -> int:
        """The log level: `normal`, unless -v, -q or --log-level say otherwise."""
        if self.log_level is not None:
            return logging.getLevelNamesMapping()[self.log_level.upper()]
        steps = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
        return steps[max(0, min(len(steps) - 1, steps.index(normal) - self.verbose + self.quiet))]


def _global_options() -> list[inspect.Parameter]:
    """The parameters behind `Settings`."""

    def option(name: str, kind: Any, default: Any, *names: str, **more: Any) -> Any:
        info = typer.Option(*names, rich_help_panel="Global options", **more)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )

    return [
        option(
            "database_url",
            str | None,
            None,
            "--database-url",
            metavar="URL",
            help="postgresql://… or sqlite:///FILE; better set in PGQUEUE_DATABASE_URL or DATABASE_URL, which other "
            "users of this machine cannot see.",
        ),
        option(
            "schema",
            str | None,
            None,
            "--schema",
            metavar="NAME",
            help="The schema with pgqueue's tables (SQLite: their prefix). Otherwise the app's, or that of "
            f"PGQUEUE_SCHEMA or pgqueue.toml, or {DEFAULT_SCHEMA}.",
        ),
        option(
            "app",
            str | None,
            None,
            "--app",
            metavar="APP",
            help="The application's queue, such as myapp.jobs:pgq; also from PGQUEUE_APP or pgqueue.toml.",
        ),
        option(
            "output",
            Format | None,
            None,
            "--output",
            "-o",
            metavar="FORMAT",
            help="table, json (one document) or jsonl (one a line).",
        ),
        option(
            "log_level", LogLevel | None, None, "--log-level", metavar="LEVEL", help="debug, info, warning or error."
        ),
        option("verbose", int, 0, "--verbose", "-v", count=True, show_default=False, help="Log more; repeatable."),
        option("quiet", int, 0, "--quiet", "-q", count=True, show_default=False, help="Log less, announce nothing."),
        option("no_color", bool, False, "--no-color", help="No colours; so does the variable NO_COLOR."),
    ]


def command(
    group: typer.Typer, name: str | None = None, *, log_level: int = logging.WARNING
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command. Its first parameter gets the Settings; all others come from its own
    options, to which the global ones are added."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        @functools.wraps(function)
        def run(context: typer.Context, **values: Any) -> None:
            given = Settings(**{field.name: values.pop(field.name) for field in dataclasses.fields(Settings)})
            settings = context.find_root().obj.overridden(given).with_app()
            with logging_to_stderr(settings.level(log_level), settings.level(logging.WARNING)):
                function(settings, **values)

        _declare(run, [*own, *_global_options()])
        group.command(name)(run)
        return function

    return register


def _declare(function: Any, parameters: Sequence[inspect.Parameter]) -> None:
    """Make a function of `context` and keywords look as if it had these parameters: what Typer reads."""
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    function.__signature__ = inspect.Signature([context, *keywords])
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in (context, *keywords)}


# The program itself ----------------------------------------------------------------------------------------

app = typer.Typer(cls=Program, name="pgqueue", no_args_is_help=True, pretty_exceptions_enable=False)


def program(context: typer.Context, *, version: bool, **values: Any) -> None:
    """Background jobs in the application's own SQL database.

    The database is, in this order:
      1. the one of --database-url
      2. the one that the app (--app) gave to its PgQueue
      3. the one of the variable PGQUEUE_DATABASE_URL
      4. the one of the variable DATABASE_URL
      5. database_url of pgqueue.toml, or of [tool.pgqueue] in pyproject.toml
      6. the SQLite file pgqueue.db in the working directory; only this one,
         which nobody named, is created and upgraded by itself

    Exit codes: 0 ok, 1 failure, 2 usage, 3 not found, 4 conflict,
    5 database unreachable, 6 schema missing or outdated, 8 drained with dead
    jobs, 130 and 143 stopped at once by a second SIGINT or SIGTERM.
    """
    context.obj = Settings(**values)


def show_version(asked: bool) -> None:
    if asked:
        Output().text(f"pgqueue {VERSION}")
        raise typer.Exit


def _declare_program() -> None:
    version = inspect.Parameter(
        "version",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
        ],
    )
    _declare(program, [version, *_global_options()])
    app.callback()(program)


_declare_program()


def main() -> None:
    """What the console script `pgqueue` calls."""
    app(prog_name="pgqueue")
