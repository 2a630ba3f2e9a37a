"""`pgqueue db`: the tables."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from pgqueue import dialect, migration
from pgqueue.cli.opening import Before, find_queue, opened, require_file
from pgqueue.cli.program import FAILURE, Settings, app, command
from pgqueue.client import PgQueue
from pgqueue.engine import describe_url
from pgqueue.errors import ConfigurationError, SchemaOutdated
from pgqueue.output import ask

database = typer.Typer(no_args_is_help=True)
app.add_typer(database, name="db", help="Create and upgrade pgqueue's tables.")


@command(database)
def upgrade(
    settings: Settings,
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="Of pgqueue's migrations.")] = "head",
) -> None:
    """Create pgqueue's tables, or upgrade them. Safe for several deployers at once."""
    with opened(settings, Before.NOTHING) as pgq:
        migration.upgrade(pgq.engine, pgq.schema, revision)
        settings.printer().record(_revisions(pgq))


@command(database)
def downgrade(
    settings: Settings,
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="Of pgqueue's migrations; base: before all.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take the tables back to an older revision. Data goes with what is dropped: with base, everything."""
    with opened(settings, Before.NOTHING) as pgq:
        require_file(pgq)
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigurationError("a downgrade may delete data; confirm it with --yes")
            question = f"Downgrade {describe_url(pgq.url)}, schema {pgq.schema}, to {revision}? Data may be lost."
            if not ask(question):
                raise typer.Exit(FAILURE)
        migration.downgrade(pgq.engine, pgq.schema, revision)
        settings.printer().record(_revisions(pgq))


@command(database)
def current(settings: Settings) -> None:
    """Show the revision of the tables, and the newest one that this program knows."""
    with opened(settings, Before.NOTHING) as pgq:
        require_file(pgq)
        settings.printer().record(_revisions(pgq))


@command(database)
def check(settings: Settings) -> None:
    """Check that the tables are what this program needs: exit code 6 if they are not."""
    with opened(settings) as pgq:
        with pgq.reading() as connection:
            differences = migration.differences(connection, pgq.schema)
        if differences:
            raise SchemaOutdated(
                f"the tables of schema {pgq.schema!r} differ from what this program needs: "
                + "; ".join(str(difference) for difference in differences)
            )
        # Also those of an application's own history, which have no revision here.
        settings.printer().record({**_revisions(pgq), "up_to_date": True})


def _revisions(pgq: PgQueue) -> dict[str, Any]:
    with pgq.reading() as connection:
        found = migration.current_revision(connection, pgq.schema)
    head = migration.head_revision()
    return {"schema": pgq.schema, "current": found, "head": head, "up_to_date": found == head}


class Dialect(StrEnum):
    POSTGRESQL = dialect.POSTGRESQL
    SQLITE = dialect.SQLITE


@command(database)
def sql(
    settings: Settings,
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="Up to this one, or FROM:TO.")] = "head",
    of: Annotated[
        Dialect, typer.Option("--dialect", metavar="NAME", help="postgresql or sqlite.")
    ] = Dialect.POSTGRESQL,
) -> None:
    """Print the statements of an upgrade, for people who run SQL themselves.

    Connects to nothing.

    Example:
      pgqueue db sql | psql --set ON_ERROR_STOP=1 shop
    """
    schema = find_queue(settings)[0].schema
    settings.printer().text(migration.offline_sql(of, schema, revision))


@command(database)
def path(settings: Settings) -> None:
    """Print the folder with pgqueue's migrations."""
    settings.printer().text(str(migration.migrations_path()))
