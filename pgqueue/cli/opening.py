"""Which queue a command works on: the application's, and in which database."""

from __future__ import annotations

import getpass
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from pgqueue import migration
from pgqueue.cli.program import Settings
from pgqueue.client import PgQueue
from pgqueue.config import LOCAL_URL
from pgqueue.dialect import SQLITE
from pgqueue.errors import ConfigurationError, PgqueueError, SchemaMissing
from pgqueue.output import print_error
from pgqueue.settings import Sources

LOCAL_FILE = Path(LOCAL_URL.removeprefix("sqlite:///"))


class Before(StrEnum):
    """What is done to the tables before a command is."""

    CHECK = "check"  #: raise SchemaMissing or SchemaOutdated
    CREATE = "create"  #: likewise, but a database that nobody named is created and upgraded
    NOTHING = "nothing"


@contextmanager
def opened(settings: Settings, before: Before = Before.CHECK) -> Iterator[PgQueue]:
    """The queue that the settings name.

    The database is, in this order: the one of --database-url; the one that the application gave to its PgQueue;
    that of PGQUEUE_DATABASE_URL or DATABASE_URL; that of pgqueue.toml; a file in the working directory. Nobody
    named that last one, so it is announced, and it alone is ever created or upgraded unasked.
    """
    pgq, local = find_queue(settings)
    output = settings.printer()
    try:
        if local:
            output.note(
                f"no database was named: using the file {LOCAL_FILE.absolute()} "
                "(name another with --database-url or PGQUEUE_DATABASE_URL)"
            )
        if local and before is Before.CREATE:
            if not LOCAL_FILE.exists():
                output.note(f"creating {LOCAL_FILE.absolute()}")
            migration.upgrade(pgq.engine, pgq.schema)
        if before is not Before.NOTHING:
            require_file(pgq)
            with pgq.reading() as connection:
                warning = migration.require_current(connection, pgq.schema)
            if warning:
                output.note(f"note: {warning}")
        yield pgq
    finally:
        pgq.dispose()


def require_file(pgq: PgQueue) -> None:
    """Raise SchemaMissing when the SQLite file is not there: connecting would make an empty one."""
    name = pgq.url.database
    if pgq.url.get_backend_name() != SQLITE or not name or name.startswith((":memory:", "file:")):
        return
    path = Path(name).absolute()
    if path.parent.is_dir() and not path.exists():
        raise SchemaMissing(f"there is no file {path}; create it, with pgqueue's tables, with: pgqueue db upgrade")


def find_queue(settings: Settings) -> tuple[PgQueue, bool]:
    """The queue that the settings name, and whether it is on the local file that nobody named."""
    if settings.app is None:
        pgq = PgQueue(schema=settings.schema)
    else:
        pgq = load_app(settings.app)
        if settings.schema is not None:
            pgq.use_schema(settings.schema)
    if settings.database_url is not None:
        pgq.connect_to(settings.database_url)
    if pgq.has_database or Sources().find("database_url").value is not None:
        return pgq, False
    pgq.connect_to(LOCAL_URL)
    return pgq, True


def load_app(reference: str) -> PgQueue:
    """The PgQueue at `package.module:name`. Modules of the working directory can be imported."""
    module_name, separator, path = reference.partition(":")
    if not (separator and module_name and path):
        raise ConfigurationError(f"the app must look like package.module:name, got {reference!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except PgqueueError:
        raise
    except Exception as error:  # noqa: BLE001 — an application may raise anything while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigurationError(
                f"the app {reference!r}: there is no module {error.name!r}, neither in {os.getcwd()} nor installed"
            ) from None
        print_error("".join(traceback.format_exception(error)).rstrip())
        raise ConfigurationError(
            f"the app {reference!r}: importing {module_name} failed with {type(error).__name__}: {error}"
        ) from None
    for name in path.split("."):
        if not hasattr(found, name):
            raise ConfigurationError(f"the app {reference!r}: {module_name} has no {path!r}")
        found = getattr(found, name)
    if not isinstance(found, PgQueue):
        raise ConfigurationError(f"the app {reference!r} must be a PgQueue, got {type(found).__name__}")
    return found


def actor() -> str:
    """Who acts, for the record."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli:unknown"
