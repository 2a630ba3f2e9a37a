"""Settings and where they come from: the command line, the environment, a file of the project, defaults.

The first of these that says something decides, setting by setting. The file is `pgqueue.toml`, or the table
`[tool.pgqueue]` of `pyproject.toml`: the nearest one in the working directory or the directories above it, up to the
root of the repository. Outside of a repository only the working directory counts, so that nobody else's file does.
"""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter

from pgqueue.config import (
    DEFAULT_CONCURRENCY,
    DEFAULT_SCHEMA,
    URL_VARIABLES,
    WorkerConfig,
    parse_duration,
    parse_queues,
)
from pgqueue.errors import ConfigurationError
from pgqueue.task import checked_name

FILE_NAME = "pgqueue.toml"
PROJECT_FILE_NAME = "pyproject.toml"

#: Names a file in place of those that would be looked for.
FILE_VARIABLE = "PGQUEUE_CONFIG"

#: What the root of a repository has.
REPOSITORY_MARKS = (".git", ".hg", ".jj")

DEFAULT_SOURCE = "default"


def _seconds(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError
    seconds = parse_duration(value) if isinstance(value, str) else value
    return float(seconds) if isinstance(seconds, int) else seconds


def _queues(value: Any) -> Any:
    """Queues with their concurrency; None where no number is given."""
    if isinstance(value, str):
        return parse_queues([value], None)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return parse_queues(value, None)
    if isinstance(value, Mapping):
        for name in value:
            checked_name("queue", name)
    return value


#: Built when something is first set: most processes set next to nothing.
_LATER = ConfigDict(defer_build=True)

Text = TypeAdapter(Annotated[str, Field(min_length=1)], config=_LATER)
Flag = TypeAdapter(bool, config=_LATER)
Seconds: TypeAdapter[float] = TypeAdapter(
    Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_seconds)], config=_LATER
)
Processes = TypeAdapter(Annotated[int, Field(ge=1, le=1000)], config=_LATER)
Concurrency = TypeAdapter(Annotated[int, Field(ge=1, le=1000)], config=_LATER)
Prefetch = TypeAdapter(Annotated[int, Field(ge=0, le=10_000)], config=_LATER)
Count = TypeAdapter(Annotated[int, Field(ge=1)], config=_LATER)
Queues: TypeAdapter[dict[str, int | None]] = TypeAdapter(
    Annotated[dict[str, Annotated[int, Field(ge=1, le=1000)] | None], Field(min_length=1), BeforeValidator(_queues)],
    config=_LATER,
)

DURATION = 'a duration such as "30s" or "5m", or a number of seconds'


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that can be set."""

    key: str  #: in a file
    option: str  #: on the command line
    kind: TypeAdapter[Any]
    expected: str
    default: Any  #: None: see `meaning`
    meaning: str
    secret: bool = False  #: its value is shown nowhere as it is

    @property
    def variables(self) -> tuple[str, ...]:
        return URL_VARIABLES if self.key == "database_url" else (f"PGQUEUE_{self.key.upper()}",)


_WORKER = WorkerConfig()

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "database_url",
        "--database-url",
        Text,
        "a URL, such as postgresql://localhost/shop",
        None,
        "the database, unless the app names its own",
        secret=True,
    ),
    Setting(
        "schema",
        "--schema",
        Text,
        "a name",
        DEFAULT_SCHEMA,
        "the schema with pgqueue's tables (SQLite: their prefix), unless the app names its own",
    ),
    Setting("app", "--app", Text, "a text such as myapp.jobs:pgq", None, "where the application's queue is"),
    Setting(
        "queues",
        "--queue",
        Queues,
        'queues with their concurrency, such as { images = 4, mails = 10 }, or names such as ["images", "mails"]',
        None,
        "queues to work on, and how many jobs of each at once; without: every queue that a task names",
    ),
    Setting(
        "concurrency",
        "--concurrency",
        Concurrency,
        "a whole number between 1 and 1000",
        DEFAULT_CONCURRENCY,
        "jobs at once of a queue that is named without a number",
    ),
    Setting("processes", "--processes", Processes, "a whole number between 1 and 1000", 1, "worker processes"),
    Setting("lease", "--lease", Seconds, DURATION, _WORKER.lease, "a claim outlives the last sign of life so long"),
    Setting(
        "heartbeat_interval",
        "--heartbeat",
        Seconds,
        DURATION,
        None,
        "between two signs of life; without: a third of the lease",
    ),
    Setting(
        "poll_interval",
        "--poll-interval",
        Seconds,
        DURATION,
        _WORKER.poll_interval,
        "an idle worker that nothing wakes looks again after this",
    ),
    Setting(
        "sweep_interval",
        "--sweep-interval",
        Seconds,
        DURATION,
        _WORKER.sweep_interval,
        "between two searches for the jobs of dead workers",
    ),
    Setting(
        "shutdown_timeout",
        "--shutdown-timeout",
        Seconds,
        DURATION,
        _WORKER.shutdown_timeout,
        "how long running jobs may go on when a worker stops",
    ),
    Setting(
        "prefetch",
        "--prefetch",
        Prefetch,
        "a whole number between 0 and 10000",
        None,
        "jobs claimed ahead of free slots, per queue; without: about 100 ms of work",
    ),
    Setting(
        "listen",
        "--listen",
        Flag,
        "true or false",
        _WORKER.listen,
        "be woken by LISTEN; false behind a connection pooler in transaction mode",
    ),
    Setting(
        "schedules", "--schedules", Flag, "true or false", _WORKER.schedules, "enqueue what schedules say is to be run"
    ),
    Setting("drain", "--drain", Flag, "true or false", _WORKER.drain, "exit when the queues are empty"),
    Setting("max_jobs", "--max-jobs", Count, "a whole number of 1 or more", None, "exit after so many jobs"),
    Setting("name", "--name", Text, "a text", None, "how a worker's id begins; without: the host's name"),
)

_BY_KEY = {setting.key: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Found:
    """What is set, and where."""

    value: Any
    source: str  #: an option, a variable, a file, or "default"

    @property
    def is_default(self) -> bool:
        return self.source == DEFAULT_SOURCE


class Sources:
    """The environment and the file, which is read when something is first looked up there."""

    def __init__(self, environ: Mapping[str, str] | None = None, directory: Path | None = None) -> None:
        self._environ = os.environ if environ is None else environ
        self._directory = Path.cwd() if directory is None else directory

    def find(self, key: str, given: Any = None) -> Found:
        """A setting; `given` is what the command line says of it, if anything. Raises ConfigurationError, which names
        the place and what was expected there."""
        setting = _BY_KEY[key]
        if given is not None:
            return Found(given, setting.option)
        for variable in setting.variables:
            text = self._environ.get(variable)
            if text:
                return Found(_checked(setting, text, f"the variable {variable}", strict=False), variable)
        path, values = self._file
        if path is not None and key in values:
            return Found(values[key], str(path))
        return Found(setting.default, DEFAULT_SOURCE)

    def find_all(self, given: Mapping[str, Any]) -> dict[str, Found]:
        """Every setting, in the order of SETTINGS."""
        return {setting.key: self.find(setting.key, given.get(setting.key)) for setting in SETTINGS}

    @cached_property
    def _file(self) -> tuple[Path | None, Mapping[str, Any]]:
        """The file and what it sets, checked."""
        path, table = self._read()
        if path is None:
            return None, {}
        for key in table:
            if key not in _BY_KEY:
                raise ConfigurationError(f"{path}: there is no setting {key!r}{_nearest(key, _BY_KEY)}")
        return path, {key: _checked(_BY_KEY[key], value, f"{path}: {key}", strict=True) for key, value in table.items()}

    def _read(self) -> tuple[Path | None, Mapping[str, Any]]:
        named = self._environ.get(FILE_VARIABLE)
        if named:
            path = self._directory / named
            document = _document(path)
            return path, _table_of(path, document) or {}
        for folder in _folders(self._directory):
            for path in (folder / FILE_NAME, folder / PROJECT_FILE_NAME):
                if path.is_file() and (table := _table_of(path, _document(path))) is not None:
                    return path, table
        return None, {}

    def misspelled(self) -> Iterator[str]:
        """What is said of variables that look like settings and are none."""
        known = {variable for setting in SETTINGS for variable in setting.variables} | {FILE_VARIABLE}
        for name in sorted(self._environ):
            if name.startswith("PGQUEUE_") and name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
                if near:
                    yield f"the variable {name} sets nothing; did you mean {near[0]}?"


def worker_config(found: Mapping[str, Found], queues: Iterable[str]) -> WorkerConfig:
    """How a worker is to work. `queues` are those to work on when none are set. Raises ConfigurationError, which names
    where a value that cannot work comes from."""
    named = found["queues"].value or dict.fromkeys(queues)
    concurrency = found["concurrency"].value
    keys = WorkerConfig.__dataclass_fields__.keys() - {"queues"}
    try:
        return WorkerConfig(
            queues={name: concurrency if count is None else count for name, count in named.items()},
            **{key: found[key].value for key in keys if found[key].value is not None},
        )
    except ConfigurationError as error:
        places = [
            f"{key} comes from {setting.source}"
            for key, setting in found.items()
            if key in str(error) and not setting.is_default and not setting.source.startswith("--")
        ]
        raise ConfigurationError("; ".join([str(error), *places])) from None


def _checked(setting: Setting, value: Any, where: str, *, strict: bool) -> Any:
    """The value as it is used. `strict`: a number is to be a number, not a text that looks like one."""
    try:
        return setting.kind.validate_python(value, strict=strict)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        cause = problem.get("ctx", {}).get("error")
        why = f" ({cause})" if isinstance(cause, ConfigurationError) else ""
        shown = "" if setting.secret else f", got {_shown(value)}"
        raise ConfigurationError(f"{where} must be {setting.expected}{shown}{why}") from None


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def _folders(directory: Path) -> Iterator[Path]:
    """Where files are looked for: the directory, and those above it up to the root of its repository."""
    chain = [directory, *directory.parents]
    for number, folder in enumerate(chain):
        if any((folder / mark).exists() for mark in REPOSITORY_MARKS):
            return iter(chain[: number + 1])
    return iter([directory])


def _document(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_bytes().decode())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None


@lru_cache(maxsize=8)
def _parsed(text: str) -> dict[str, Any]:
    """Not to be changed: whoever asks for settings again, as each PgQueue does, is given the same."""
    return tomllib.loads(text)


def _table_of(path: Path, document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a document says of pgqueue; None when it says nothing."""
    if path.name != PROJECT_FILE_NAME:
        return document
    tools = document.get("tool")
    table = tools.get("pgqueue") if isinstance(tools, Mapping) else None
    if table is not None and not isinstance(table, Mapping):
        raise ConfigurationError(f"{path}: tool.pgqueue must be a table, [tool.pgqueue]")
    return table


def _nearest(key: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(key.replace("-", "_").lower(), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; settings are: {', '.join(names)}"
