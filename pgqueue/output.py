"""What the command line prints: data on stdout, everything else on stderr, never a password or a control code."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pgqueue.cron import Schedule
from pgqueue.errors import ConfigurationError
from pgqueue.job import Job

#: What of a job is not shown: the token is what lets a worker write.
HIDDEN_FIELDS = ("claim_token",)

#: A table that goes into a file or pipe is as wide as its content.
UNLIMITED_WIDTH = 100_000

Row = Mapping[str, Any]


class Format(StrEnum):
    """How data is printed."""

    TABLE = "table"  #: for people
    JSON = "json"  #: one document
    JSONL = "jsonl"  #: one document a line


class Output:
    """Prints in one format."""

    def __init__(self, format: Format = Format.TABLE, *, color: bool = True, quiet: bool = False) -> None:
        self.format = format
        self.quiet = quiet
        self._color = color

    def rows(self, rows: Sequence[Row], columns: Sequence[str]) -> None:
        """Many things of a kind. `columns` are the keys that a table shows; JSON has all of them."""
        if self.format is Format.TABLE:
            self._print_table(_table(rows, columns))
        elif self.format is Format.JSON:
            self._print(to_json(rows, indent=2))
        else:
            for row in rows:
                self._print(to_json(row))

    def record(self, record: Row, *, value: str | None = None, columns: Mapping[str, Sequence[str]] = {}) -> None:
        """One thing. As a table: a line for each key, or only the key `value`; lists of rows become tables below,
        with the `columns` given for their key."""
        if self.format is Format.JSON:
            self._print(to_json(record, indent=2))
        elif self.format is Format.JSONL:
            self._print(to_json(record))
        elif value is not None:
            self._print(_cell(record[value]))
        else:
            self._print_record(record, columns)

    def text(self, text: str) -> None:
        """Something that is data as it stands, in every format: SQL, a path."""
        self._print(text.rstrip("\n"))

    def note(self, text: str) -> None:
        """Tell people something, unless they asked for quiet."""
        if not self.quiet:
            print_error(text)

    @contextmanager
    def progress(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A progress bar on stderr, if that is a terminal. Gives a function to be told of each step's size."""
        console = self.console(sys.stderr)
        if self.quiet or not console.is_terminal:
            yield lambda count: None
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task(description, total=total)
            yield lambda count: progress.advance(bar, count)

    def console(self, file: TextIO) -> Console:
        return Console(
            file=file,
            no_color=None if self._color else True,
            quiet=self.quiet and file is sys.stderr,
            highlight=False,
            markup=False,
            emoji=False,
        )

    def _print_record(self, record: Row, columns: Mapping[str, Sequence[str]]) -> None:
        tables = {key: value for key, value in record.items() if _is_rows(value)}
        plain = {key: value for key, value in record.items() if key not in tables}
        if plain:
            grid = Table.grid(padding=(0, 2, 0, 0))
            grid.add_column(style="bold")
            grid.add_column(overflow="fold")
            for key, value in plain.items():
                grid.add_row(key, Text(_cell(value, indent=2)))
            self._print_table(grid)
        for number, (key, rows) in enumerate(tables.items()):
            self._print(("\n" if plain or number else "") + key)
            self._print_table(_table(rows, columns.get(key) or list(rows[0])) if rows else Text("none"))

    def _print_table(self, table: Table | Text) -> None:
        console = self.console(sys.stdout)
        if console.is_terminal:
            console.print(table)
            return
        console.width = UNLIMITED_WIDTH
        with console.capture() as captured:
            console.print(table)
        self._print("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))

    def _print(self, text: str) -> None:
        _write(sys.stdout, text)


@contextmanager
def lines_to(path: Path | None, *, replace: bool = False) -> Iterator[Callable[[str], None]]:
    """A function that writes a line: to standard output, or to a file that is there once all of it is written.

    The file is for its owner only. ConfigurationError when it is there already, unless `replace`, or cannot be made.
    """
    if path is None:
        yield lambda line: _write(sys.stdout, line)
        return
    if path.exists() and not replace:
        raise ConfigurationError(f"there is already a file {path}; give another name, or replace it with --force")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None
    unfinished = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            yield lambda line: print(line, file=file)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            unfinished.replace(path)
        else:
            _publish(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _publish(unfinished: Path, path: Path) -> None:
    """Give a file its name, unless somebody else took it meanwhile."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise ConfigurationError(f"there is already a file {path}; give another name") from None
    except OSError:  # a file system without hard links
        unfinished.replace(path)


def print_error(text: str) -> None:
    """A line on stderr, without passwords."""
    _write(sys.stderr, printable(redact(text)))


def ask(question: str) -> bool:
    """Ask on stderr, so that stdout has nothing but data; whether the answer is yes."""
    _write(sys.stderr, printable(redact(f"{question} [y/N] ")), end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _write(file: TextIO, text: str, end: str = "\n") -> None:
    encoding = file.encoding or "utf-8"
    file.write(text.encode(encoding, "backslashreplace").decode(encoding) + end)
    file.flush()


# Values ----------------------------------------------------------------------------------------------------


def job_row(job: Job) -> dict[str, Any]:
    """A job as it is shown: all its fields, in the order of the table."""
    return {
        name: getattr(job, name)
        for name in Job.__annotations__
        if name not in HIDDEN_FIELDS and not name.startswith("_")
    }


def schedule_row(schedule: Schedule) -> dict[str, Any]:
    """A schedule as it is shown."""
    try:
        payload: Any = schedule.payload
    except (ValueError, RecursionError):
        payload = schedule.payload_json
    return {
        "name": schedule.name,
        "cron": schedule.cron,
        "timezone": schedule.timezone,
        "task": schedule.task,
        "payload": payload,
        "queue": schedule.queue,
        "priority": schedule.priority,
        "max_retries": schedule.max_retries,
        "catchup": schedule.catchup,
        "overlap": schedule.overlap,
        "state": "disabled" if not schedule.enabled else "enabled" if schedule.is_declared else "undeclared",
        "declared_by": schedule.declared_by,
        "next_tick_at": schedule.next_tick_at,
        "last_tick_at": schedule.last_tick_at,
        "created_at": schedule.created_at,
        "updated_at": schedule.updated_at,
    }


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON with times in ISO 8601 and UTC, and nothing in it that a terminal would act upon."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=_json_value)
    utf = (sys.stdout.encoding or "utf-8").lower().startswith("utf")

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if utf and character.isprintable():
            return character
        units = character.encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))

    # Outside of strings JSON is ASCII, so all that is escaped here stands inside of one.
    return re.sub(r"[^\n -~]", escape, text)


def _json_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return timestamp(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def timestamp(moment: datetime) -> str:
    """ISO 8601, UTC, always with microseconds, so that texts sort like the moments."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _table(rows: Sequence[Row], columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        number = any(isinstance(row.get(name), int | float) and not isinstance(row.get(name), bool) for row in rows)
        table.add_column(name, overflow="fold", justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(name))) for name in columns))
    return table


def _cell(value: Any, indent: int | None = None) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case str():
            return printable(value)
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        case float():
            return f"{value:,.1f}" if value == 0 or abs(value) >= 1 else f"{value:.3g}"
        case {"type": str(kind), "message": str(message), "traceback": str(trace)}:
            brief = printable(f"{kind}: {message}")
            return brief.split("\n")[0] if indent is None else "\n".join(filter(None, (brief, printable(trace))))
        case dict() | list() | tuple():
            return to_json(value, indent=indent)
        case _:
            return printable(str(value))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)


def printable(text: str) -> str:
    """`text` with everything escaped that a terminal might act upon: colours, cursor, hidden or reversed text."""

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        return character if character.isprintable() else character.encode("unicode_escape").decode()

    return re.sub(r"[^\n\t -~]", escape, text)


def redact(text: str) -> str:
    """`text` without the credentials of any URL or connection string in it; the user of a database is kept."""
    # With one slash: what becomes of a URL that was taken for a path.
    text = re.sub(r"(\w*)(\+\w+)?:(//?)([^\s'\"]*)@", _without_credentials, text)
    return re.sub(r"(?i)\b(password|passfile|sslpassword)=[^\s&'\"]+", r"\1=***", text)


def _without_credentials(url: re.Match[str]) -> str:
    # All up to the last @ of the word: a password that was not percent-encoded may itself contain one.
    scheme, driver, slashes, credentials = url[1], url[2] or "", url[3], url[4]
    user, colon, _ = credentials.partition(":")
    if not scheme.startswith("postgres"):
        return f"{scheme}{driver}:{slashes}***@"
    return f"{scheme}{driver}:{slashes}{user}:***@" if colon else url[0]


# Logs ------------------------------------------------------------------------------------------------------


class LogFormatter(logging.Formatter):
    """A line a record, tracebacks below it; no passwords, no control codes."""

    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)))


@contextmanager
def logging_to_stderr(level: int, alembic_level: int) -> Iterator[None]:
    """Log to stderr from `level` on, as long as this lasts. Alembic has a level of its own: it tells of every step."""
    root, alembic = logging.getLogger(), logging.getLogger("alembic")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    before, alembic_before = root.level, alembic.level
    root.addHandler(handler)
    root.setLevel(level)
    alembic.setLevel(alembic_level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        alembic.setLevel(alembic_before)
