"""A task: a registered function, what its payload may be, and how its jobs are to be treated.

The payload is checked against the function's signature twice: when a job is enqueued, so that a mistake shows
where it is made, and when it is run, because rows also come from SQL and from older code.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NotRequired, Required

import pydantic
import pydantic_core
from typing_extensions import TypedDict

from pgqueue.admission import Limits, PerKey, Rate, checked_limit
from pgqueue.errors import ConfigurationError, InvalidPayload, InvalidTask
from pgqueue.job import JobStatus
from pgqueue.retry import Retry
from pgqueue.unique import Unique, settled, unique_key

#: A payload is a request, not a document store: larger ones slow every claim of their queue.
PAYLOAD_BYTES_MAX = 1024 * 1024

#: The longest number, in digits, that is read back (Python's own limit for text to int).
DIGITS_MAX = 4300

#: With no more brackets than this, no text is nested too deeply to be read back.
NESTING_SAFE = 150

#: A key that is longer is replaced by its hash.
LIMIT_KEY_CHARACTERS_MAX = 200

NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,127}")


def checked_name(kind: str, name: object) -> str:
    """`name` if it can name a queue or task: letters, digits and `_ . : -`, at most 128 characters."""
    if isinstance(name, str) and NAME_PATTERN.fullmatch(name):
        return name
    raise ConfigurationError(
        f"{kind} name must be 1 to 128 letters, digits or any of _ . : - and not start with a sign, got {name!r}"
    )


@dataclass(frozen=True, slots=True)
class TaskDefinition:
    """All a worker needs to know of a task."""

    name: str
    function: Callable[..., Any]
    queue: str = "default"
    priority: int = 0
    retry: Retry = field(default_factory=Retry)
    timeout: float | None = None  #: seconds an attempt may take; None: as long as it likes
    expires_in: float | None = None  #: seconds from when a job is due until it is not worth starting; None: for ever
    keep_completed: float | None = None  #: seconds until a completed job is deleted; None: kept
    keep_dead: float | None = None  #: likewise a dead one
    transactional: bool = False  #: the function's first parameter is a Session that commits its own completion
    isolation: Literal["process"] | None = None  #: each attempt runs in a child process
    memory_limit: int | None = None  #: bytes of address space that this process may have
    concurrency: int | PerKey | None = None  #: jobs running at once, of all workers together, or of each key
    rate: Rate | None = None  #: jobs started in a time
    ordered_by: str | None = None  #: a parameter; jobs with the same value of it run one after another
    unique: Unique | None = None  #: which of its jobs count as the same
    payload_type: Any = field(init=False)  #: a TypedDict of the function's parameters
    payload_adapter: pydantic.TypeAdapter[Any] = field(init=False)
    _payloads_adapter: pydantic.TypeAdapter[Any] | None = field(init=False, default=None, repr=False, compare=False)
    parameters: tuple[str, ...] = field(init=False)  #: names of the payload's keys, in the function's order
    is_async: bool = field(init=False)

    def __post_init__(self) -> None:
        checked_name("task", self.name)
        checked_name("queue", self.queue)
        checked_priority(self.priority)
        if not isinstance(self.retry, Retry):
            raise ConfigurationError(
                f"retry of task {self.name!r} must be a Retry(…), such as Retry(max_retries=5), got {self.retry!r}"
            )
        if not isinstance(self.transactional, bool):
            raise ConfigurationError(
                f"transactional of task {self.name!r} must be True or False, got {self.transactional!r}"
            )
        is_async = inspect.iscoroutinefunction(self.function)
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigurationError(f"timeout of task {self.name!r} must be more than 0 seconds, got {self.timeout!r}")
        self._check_isolation()
        object.__setattr__(self, "is_async", is_async)
        payload_type, adapter, parameters = _read_signature(self)
        object.__setattr__(self, "payload_type", payload_type)
        object.__setattr__(self, "payload_adapter", adapter)
        object.__setattr__(self, "parameters", parameters)
        self._check_limits()
        self._check_unique()

    def _check_isolation(self) -> None:
        if self.isolation not in (None, "process"):
            raise ConfigurationError(
                f"isolation of task {self.name!r} must be None or 'process', got {self.isolation!r}"
            )
        if self.isolation is not None and os.name != "posix":
            raise ConfigurationError(f'task {self.name!r}: isolation="process" needs a POSIX system, this is {os.name}')
        if self.isolation is not None and self.transactional:
            raise ConfigurationError(
                f"task {self.name!r} is transactional, so it cannot be isolated: its session is the worker's, and a "
                "connection cannot go to another process"
            )
        if self.memory_limit is None:
            return
        if self.isolation is None:
            raise ConfigurationError(
                f'memory_limit of task {self.name!r} needs isolation="process": a limit is one of a whole process'
            )
        is_whole = isinstance(self.memory_limit, int) and not isinstance(self.memory_limit, bool)
        if not is_whole or not 1 <= self.memory_limit < 2**63:
            raise ConfigurationError(
                f"memory_limit of task {self.name!r} must be a whole number of bytes, such as 512 * 1024 * 1024, "
                f"got {self.memory_limit!r}"
            )

    @property
    def runs_in_loop(self) -> bool:
        """Whether its jobs run on a worker's event loop."""
        return self.is_async and self.isolation is None

    def _check_unique(self) -> None:
        if self.unique is None:
            return
        if not isinstance(self.unique, Unique):
            raise ConfigurationError(f"unique of task {self.name!r} must be a Unique(…), got {self.unique!r}")
        for name in self.unique.by or ():
            self._require_parameter("unique=Unique(by=…)", name)
        parameters = inspect.signature(self.function).parameters
        for name in self.parameters if self.unique.by is None else self.unique.by:
            default = parameters[name].default
            try:
                pydantic_core.to_json(None if default is inspect.Parameter.empty else default)
            except ValueError:
                raise ConfigurationError(
                    f"unique of task {self.name!r}: the default of its parameter {name!r}, of type "
                    f"{type(default).__name__}, cannot be part of a key; name other parameters with Unique(by=…)"
                ) from None

    def _check_limits(self) -> None:
        if isinstance(self.concurrency, PerKey):
            self._require_parameter("concurrency=PerKey(…)", self.concurrency.field)
        elif self.concurrency is not None:
            checked_limit(f"concurrency of task {self.name!r}", self.concurrency)
        if self.rate is not None:
            if not isinstance(self.rate, Rate):
                raise ConfigurationError(f"rate of task {self.name!r} must be a Rate(…), got {self.rate!r}")
            if self.rate.key is not None:
                self._require_parameter("rate=Rate(…, key=…)", self.rate.key)
        if self.ordered_by is not None:
            self._require_parameter("ordered_by", self.ordered_by)

    def _require_parameter(self, option: str, name: object) -> None:
        if name not in self.parameters:
            raise ConfigurationError(
                f"{option} of task {self.name!r} names the parameter {name!r}, which its function does not have; "
                f"it has {', '.join(self.parameters) or 'none'}"
            )

    @property
    def limits(self) -> Limits:
        """What the task is limited to, as it is declared."""
        per_key = self.concurrency if isinstance(self.concurrency, PerKey) else None
        return Limits(
            concurrency=per_key.total if per_key else self.concurrency,  # type: ignore[arg-type]  # no PerKey here
            key_concurrency=per_key.limit if per_key else None,
            rate=self.rate.per_second if self.rate else None,
            burst=self.rate.burst if self.rate else None,
        )

    @property
    def has_keys(self) -> bool:
        """Whether its jobs have keys that come from the payload."""
        return isinstance(self.concurrency, PerKey) or self.ordered_by is not None or bool(self.rate and self.rate.key)

    def keys_of(self, payload_json: str) -> LimitKeys:
        """The keys of a job with this payload."""
        payload = json.loads(payload_json)

        def key(field: str | None) -> str | None:
            if field is None:
                return None
            value = payload[field] if field in payload else self._default_of(field)
            return limit_key(value)

        return LimitKeys(
            key(self.concurrency.field if isinstance(self.concurrency, PerKey) else None),
            key(self.ordered_by),
            key(self.rate.key if self.rate else None),
        )

    def unique_key(self, payload: Mapping[str, Any], payload_json: str) -> str | None:
        """The unique key of a job with this payload, which was encoded to that JSON; None: any number may be there.

        A parameter that is not given counts with its default. So calls that mean the same have the same key.
        """
        if self.unique is None:
            return None
        stored = json.loads(payload_json)
        checked = self.payload_adapter.validate_python(payload)
        values = self.payload_adapter.dump_python(checked, warnings="none")
        names = self.unique.by
        if names is None:
            names = [*self.parameters, *(name for name in stored if name not in self.parameters)]
        return unique_key(
            {name: settled(values[name], stored[name]) if name in stored else self._default_of(name) for name in names}
        )

    def _default_of(self, field: str) -> Any:
        default = inspect.signature(self.function).parameters[field].default
        return pydantic_core.to_jsonable_python(default, fallback=str)

    @property
    def retains(self) -> bool:
        """Whether its ended jobs have a time to be deleted."""
        return self.keep_completed is not None or self.keep_dead is not None

    def keep_seconds(self, status: JobStatus) -> float | None:
        """How long a job that ended so is kept; None: until somebody prunes."""
        if status is JobStatus.COMPLETED:
            return self.keep_completed
        return self.keep_dead if status is JobStatus.DEAD else None

    def around(self, function: Callable[..., Any]) -> TaskDefinition:
        """The same task with a function that calls this one's."""
        changed = copy.copy(self)
        object.__setattr__(changed, "function", function)
        return changed

    def bind(self, arguments: tuple[Any, ...], payload: dict[str, Any]) -> dict[str, Any]:
        """The payload with arguments that were given by position under their names. Raises InvalidPayload."""
        if not arguments:
            return payload
        if len(arguments) > len(self.parameters):
            raise InvalidPayload(
                f"task {self.name!r} takes {len(self.parameters)} arguments ({', '.join(self.parameters) or 'none'}), "
                f"got {len(arguments)}"
            )
        by_position = dict(zip(self.parameters, arguments, strict=False))
        for name in by_position.keys() & payload.keys():
            raise InvalidPayload(f"task {self.name!r} got its argument {name!r} twice: by position and by name")
        return {**by_position, **payload}

    def encode(self, payload: Mapping[str, Any]) -> str:
        """The payload as JSON text, checked against the signature. Raises InvalidPayload."""
        if not isinstance(payload, Mapping):
            raise InvalidPayload(
                f"payload of task {self.name!r} must be a mapping of its parameters, got {type(payload).__name__}"
            )
        try:
            checked = self.payload_adapter.validate_python(payload)
            text = self.payload_adapter.dump_json(checked, warnings="none").decode()
        except pydantic.ValidationError as error:
            raise InvalidPayload(f"payload of task {self.name!r} does not fit: {problems(error)}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidPayload(
                f"payload of task {self.name!r} cannot be stored as JSON: {type(error).__name__}: {error}"
            ) from None
        what = f"payload of task {self.name!r}"
        if "null" in text:
            _refuse_non_finite(self.payload_adapter.dump_python(checked, warnings="none"), what)
        return checked_json(text, what)

    def encode_together(self, payloads: Sequence[Mapping[str, Any]]) -> str | None:
        """The payloads as one JSON array, in a fraction of the time of as many calls of `encode`.

        None when they are too large together, or when one of them may have to be refused: `encode` will tell.
        """
        adapter = self._payloads_adapter
        if adapter is None:  # most tasks never need it, and it takes longer to make than to use
            of_payloads: Any = types.GenericAlias(list, (self.payload_type,))
            adapter = pydantic.TypeAdapter(of_payloads)
            object.__setattr__(self, "_payloads_adapter", adapter)
        try:
            checked = adapter.validate_python(payloads)
            text = adapter.dump_json(checked, warnings="none").decode()
            if "null" in text:
                _refuse_non_finite(adapter.dump_python(checked, warnings="none"), "a payload")
            return checked_json(text, "a payload")
        except (ValueError, TypeError, RecursionError):  # InvalidPayload is a ValueError
            return None

    def decode(self, payload_json: str) -> dict[str, Any]:
        """The keyword arguments that a stored payload stands for. Raises InvalidPayload."""
        try:
            arguments: dict[str, Any] = self.payload_adapter.validator.validate_json(payload_json)
        except pydantic.ValidationError as error:
            raise InvalidPayload(f"payload of task {self.name!r} does not fit: {problems(error)}") from None
        return arguments


class LimitKeys(NamedTuple):
    """What a job shares limits with others by; None: nothing."""

    concurrency_key: str | None = None
    ordering_key: str | None = None
    rate_key: str | None = None


def limit_key(value: object) -> str:
    """A value of a payload as a key: a string as it is, anything else as JSON; a long one by its SHA-256."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))
    if not text:
        return '""'
    if len(text) > LIMIT_KEY_CHARACTERS_MAX:
        return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return text


def checked_priority(priority: object) -> int:
    if isinstance(priority, int) and not isinstance(priority, bool) and -32768 <= priority <= 32767:
        return priority
    raise ConfigurationError(f"priority must be a whole number between -32768 and 32767, got {priority!r}")


def encode_json(value: object, what: str) -> str:
    """Any value as JSON text that both databases can store. Raises InvalidPayload, naming `what`."""
    try:
        text = pydantic_core.to_json(value, inf_nan_mode="constants").decode()
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidPayload(f"{what} cannot be stored as JSON: {type(error).__name__}: {error}") from None
    if "null" in text:
        _refuse_non_finite(pydantic_core.to_jsonable_python(value, inf_nan_mode="constants"), what)
    return checked_json(text, what)


def checked_json(text: str, what: str) -> str:
    """`text` if both databases can store it and it is not too large. Raises InvalidPayload, naming `what`.

    PostgreSQL refuses NUL characters, NaN and Infinity in jsonb; SQLite would take them and break later.
    """
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if size > PAYLOAD_BYTES_MAX:
        raise InvalidPayload(
            f"{what} is {size:,} bytes of JSON, more than the {PAYLOAD_BYTES_MAX:,} allowed: "
            "store the data elsewhere and pass a reference to it"
        )
    if text.count("[") + text.count("{") > NESTING_SAFE or (
        len(text) > DIGITS_MAX and re.search(rf"\d{{{DIGITS_MAX + 1}}}", text)
    ):
        _refuse_unreadable(text, what)
    # The exact check walks the whole value, so it is made only where these letters occur at all.
    if "NaN" in text or "Infinity" in text or "\\u0000" in text or "\\ud" in text:
        try:
            _refuse_unstorable(json.loads(text, parse_constant=_refuse_constant), "")
        except _Unstorable as error:
            raise InvalidPayload(f"{what} cannot be stored: {error}") from None
    return text


def _refuse_unreadable(text: str, what: str) -> None:
    """Raise InvalidPayload where a worker could not decode the text: JSON is written deeper than it is read."""
    try:
        pydantic_core.from_json(text)
    except ValueError as error:
        raise InvalidPayload(f"{what} cannot be stored: it could not be read back: {error}") from None


def _refuse_non_finite(value: object, what: str) -> None:
    """Raise InvalidPayload for a NaN or Infinity anywhere in `value`: pydantic writes them as null."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting.extend(found.values())
        elif isinstance(found, list | tuple | set | frozenset):
            waiting.extend(found)
        elif isinstance(found, float) and not math.isfinite(found):
            name = "NaN" if math.isnan(found) else "Infinity"
            raise InvalidPayload(f"{what} cannot be stored: it contains {name}, {_NO_CONSTANT}")


class _Unstorable(ValueError):
    pass


_NO_CONSTANT = "which JSON does not know; use None or a string"


def _refuse_constant(constant: str) -> None:
    raise _Unstorable(f"it contains {constant}, {_NO_CONSTANT}")


def _refuse_unstorable(value: object, path: str) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise _Unstorable(f"a NUL character at {path or 'the top'}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _Unstorable(f"a lone surrogate at {path or 'the top'}")
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_unstorable(key, f"{path}.{key!r} (the key)")
            _refuse_unstorable(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unstorable(item, f"{path}[{index}]")


def _read_signature(task: TaskDefinition) -> tuple[Any, pydantic.TypeAdapter[Any], tuple[str, ...]]:
    """A TypedDict with a key per parameter, those with a default may be missing; its pydantic adapter; and the names.

    A TypedDict, not a model, so that a parameter may have any name.
    """
    try:
        hints = typing.get_type_hints(task.function, include_extras=True)
        parameters = list(inspect.signature(task.function).parameters.values())
    except (NameError, TypeError, ValueError) as error:
        raise InvalidTask(
            f"task {task.name!r}: the annotations of its function cannot be read ({error}); "
            "import what they name outside `if TYPE_CHECKING`, at module level"
        ) from None
    if task.transactional:
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            raise InvalidTask(f"task {task.name!r} is transactional, so its first parameter must be the session")
        parameters = parameters[1:]
    extra = "forbid"
    fields: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            extra = "allow"
            continue
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise InvalidTask(
                f"task {task.name!r}: parameter {parameter.name!r} cannot be given by name; "
                "a payload is a mapping of names to values"
            )
        annotation = hints.get(parameter.name, Any)
        required = parameter.default is inspect.Parameter.empty
        fields[parameter.name] = Required[annotation] if required else NotRequired[annotation]
    make_type: Any = TypedDict  # its fields are only known now, which no type checker can follow
    payload_type = make_type(f"payload of {task.name}", fields)
    payload_type.__pydantic_config__ = {"extra": extra, "ser_json_inf_nan": "constants"}
    try:
        return payload_type, pydantic.TypeAdapter(payload_type), tuple(fields)
    except pydantic.errors.PydanticUserError as error:
        raise InvalidTask(
            f"task {task.name!r}: a parameter's type cannot be carried as JSON ({error.message})"
        ) from None


def problems(error: pydantic.ValidationError) -> str:
    """What did not fit, parameter by parameter; without the values, which may be secret."""
    found = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in problem["loc"]) or "payload"
        found.append(f"{where}: {problem['msg']}")
    return "; ".join(found)
