"""What a payload can carry: everything that JSON and pydantic can, and the same on both databases."""

from __future__ import annotations

import inspect
import math
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import pydantic
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jobs import claim_one, external
from sqlalchemy.orm import Session

from pgqueue import ConfigurationError, InvalidPayload, PgQueue, Task


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


@dataclass
class Point:
    x: int
    y: float = 0.5


class Customer(pydantic.BaseModel):
    name: str
    joined: date
    tags: set[str] = set()


class Pair(NamedTuple):
    left: int
    right: str


VALUES: list[tuple[Any, Any]] = [
    (bool, True),
    (int, 2**63),
    (int, -(10**30)),
    (float, 0.1),
    (float, 1e308),
    (float, 5e-324),
    (str, "héllo ☃ 😀 \\u0000 \"quoted\" 'single' \n\t\x7f"),
    (str, "NaN and Infinity as words"),
    (str, ""),
    (bytes, b"text"),
    (str | None, None),
    (list[int], [1, 2, 3]),
    (tuple[int, str], (1, "a")),
    (set[int], {1, 2}),
    (dict[str, list[int]], {"a": [1], "": []}),
    (dict[int, str], {1: "one"}),
    (datetime, datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)),
    (datetime, datetime(2030, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=5, minutes=30)))),
    (datetime, datetime(2030, 1, 2, 3, 4)),  # noqa: DTZ001 — a payload may hold a naive one
    (date, date(2030, 1, 2)),
    (time, time(3, 4, 5)),
    (timedelta, timedelta(days=2, microseconds=5)),
    (uuid.UUID, uuid.UUID(int=7)),
    (Decimal, Decimal("12345678901234567890.123456789")),
    (PurePosixPath, PurePosixPath("/tmp/a b")),
    (Colour, Colour.RED),
    (Level, Level.HIGH),
    (Literal["a", "b"], "b"),
    (Point, Point(1, 2.5)),
    (Customer, Customer(name="Ada", joined=date(1815, 12, 10), tags={"x"})),
    (list[Customer], [Customer(name="Ada", joined=date(1815, 12, 10))]),
    (Pair, Pair(1, "r")),
    (int | str, "7"),
    (Any, {"deep": [{"er": [None, True, 1, 1.5, "x"]}]}),
]


@pytest.mark.parametrize(("kind", "value"), VALUES, ids=lambda given: None)
def test_a_value_arrives_as_it_was_sent(pgq: PgQueue, kind: Any, value: Any) -> None:
    def function(value: Any) -> None: ...

    function.__annotations__["value"] = kind
    task = pgq.task(function)

    for send in (by_enqueue, by_bulk, by_orm):
        send(task, {"value": value})

        arrived = arguments_of_next(task)["value"]
        assert arrived == value
        assert type(arrived) is type(value)


def by_enqueue(task: Task[..., Any], payload: dict[str, Any]) -> None:
    with task.pgq.begin() as connection:
        task.enqueue(connection, **payload)


def by_bulk(task: Task[..., Any], payload: dict[str, Any]) -> None:
    with task.pgq.begin() as connection:
        task.enqueue_many(connection, [payload])


def by_orm(task: Task[..., Any], payload: dict[str, Any]) -> None:
    with Session(task.pgq.engine) as session, session.begin():
        session.add(task.new(**payload))


def arguments_of_next(task: Task[..., Any]) -> dict[str, Any]:
    """What the function of the next job would be called with."""
    job = claim_one(task.pgq)
    return task.definition.decode(job.payload_json)


# Parameters ------------------------------------------------------------------------------------------------


def test_a_parameter_with_a_default_may_be_left_out(pgq: PgQueue) -> None:
    @pgq.task
    def resize(file: str, size: int = 1024) -> None: ...

    by_enqueue(resize, {"file": "a.jpg"})

    assert arguments_of_next(resize) == {"file": "a.jpg"}


def test_keyword_arguments_carry_what_has_no_parameter_of_its_own(pgq: PgQueue) -> None:
    @pgq.task
    def log(level: str, **details: Any) -> None: ...

    by_enqueue(log, {"level": "info", "user": 7, "path": ["a"]})

    assert arguments_of_next(log) == {"level": "info", "user": 7, "path": ["a"]}


def test_arguments_may_be_given_by_position(pgq: PgQueue) -> None:
    @pgq.task
    def resize(file: str, size: int = 1024) -> None: ...

    with pgq.begin() as connection:
        resize.enqueue(connection, "a.jpg", 5)

    assert arguments_of_next(resize) == {"file": "a.jpg", "size": 5}


ODD_NAMES = [
    "json",
    "copy",
    "dict",
    "model_config",
    "model_fields",
    "schema",
    "self",
    "self_",
    "cls",
    "session",
    "payload",
    "args",
    "kwargs",
    "_private",
    "__dunder__",
    "größe",
    "id",
    "metadata",
    "registry",
    "Any",
]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("send", [by_enqueue, by_bulk, by_orm])
def test_a_parameter_may_have_any_name(sqlite_url: str, name: str, send: Callable[..., None]) -> None:
    pgq = PgQueue(sqlite_url)
    task = pgq.task(name="odd")(function_with(name))

    send(task, {name: 5})

    assert arguments_of_next(task) == {name: 5}


def function_with(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = eval(f"lambda {name}: None")
    assert list(inspect.signature(function).parameters) == [name]
    return function


def test_a_payload_key_with_signs_is_carried(pgq: PgQueue) -> None:
    key = 'it\'s a "key" -- with; %s :signs {}'

    by_enqueue(external(pgq), {key: 1})

    assert claim_one(pgq).payload == {key: 1}


def test_a_value_is_converted_to_the_type_that_the_parameter_names(pgq: PgQueue) -> None:
    @pgq.task
    def double(n: int) -> None: ...

    by_enqueue(double, {"n": "21"})

    assert claim_one(pgq).payload == {"n": 21}


def test_metadata_arrives_as_it_was_sent(pgq: PgQueue) -> None:
    metadata = {"traceparent": "00-ab-cd-01", "tags": ["a", {"b": None}], "day": date(2030, 1, 2)}

    with pgq.begin() as connection:
        external(pgq).using(metadata=metadata).enqueue(connection)

    assert claim_one(pgq).metadata == {**metadata, "day": "2030-01-02"}


# What cannot be carried is refused when it is enqueued ------------------------------------------------------


@dataclass
class Holder:
    number: float


class Model(pydantic.BaseModel):
    number: float


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("kind", "wrap"),
    [
        (float, lambda number: number),
        (Any, lambda number: number),
        (list[float], lambda number: [1.0, number]),
        (dict[str, Any], lambda number: {"deep": [number]}),
        (Holder, Holder),
        (Model, lambda number: Model(number=number)),
        (Any, lambda number: {"model": Model(number=number)}),
        (Any, Holder),
        (set[float], lambda number: {number}),
        (tuple[float, None], lambda number: (number, None)),
    ],
)
def test_nan_and_infinity_are_refused_and_never_become_null(
    sqlite_url: str, number: float, kind: Any, wrap: Callable[[float], Any]
) -> None:
    def function(value: Any) -> None: ...

    function.__annotations__["value"] = kind
    task = PgQueue(sqlite_url).task(function)

    with pytest.raises(InvalidPayload, match=r"cannot be stored: .*(NaN|Infinity)"):
        task.definition.encode({"value": wrap(number)})


def test_null_itself_is_no_nan(sqlite_url: str) -> None:
    @PgQueue(sqlite_url).task
    def function(value: Any, other: float | None) -> None: ...

    assert function.definition.encode({"value": [None, "null"], "other": None}) == (
        '{"value":[null,"null"],"other":null}'
    )


def test_metadata_and_results_with_nan_are_refused(pgq: PgQueue) -> None:
    with pgq.begin() as connection, pytest.raises(InvalidPayload, match="metadata cannot be stored: it contains NaN"):
        external(pgq).using(metadata={"a": Model(number=math.nan)}).enqueue(connection)
    by_enqueue(external(pgq), {})
    job = claim_one(pgq)

    with pytest.raises(InvalidPayload, match="result cannot be stored: it contains NaN"):
        pgq.ack(job, result=Model(number=math.nan))

    assert pgq.get_job(job.id).status == "running"


@pytest.mark.parametrize(
    "value",
    [10**4300, -(10**5000), {"a": 10**4400}],
    ids=["4301 digits", "5001 digits", "inside"],
)
def test_a_number_with_too_many_digits_to_be_read_back_is_refused(sqlite_url: str, value: Any) -> None:
    with pytest.raises(InvalidPayload, match="payload of task 'work' cannot be stored: it could not be read back"):
        external(PgQueue(sqlite_url)).definition.encode({"value": value})


@pytest.mark.parametrize("value", [10**4299, "7" * 5_000], ids=["4300 digits", "text"])
def test_a_long_number_that_can_be_read_back_is_taken(pgq: PgQueue, value: Any) -> None:
    by_enqueue(external(pgq), {"value": value})

    assert arguments_of_next(external(pgq)) == {"value": value}


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [1, 100, 150, 180, 199, 200, 201, 220, 250, 300, 2_000])
def test_nesting_is_refused_exactly_when_it_could_not_be_read_back(sqlite_url: str, depth: int) -> None:
    task = external(PgQueue(sqlite_url))

    try:
        encoded = task.definition.encode({"value": nested(depth)})
    except InvalidPayload:
        assert depth > 150
    else:
        assert task.definition.decode(encoded) == {"value": nested(depth)}


def test_a_payload_that_contains_itself_is_refused(sqlite_url: str) -> None:
    value: list[Any] = []
    value.append(value)

    with pytest.raises(InvalidPayload, match=r"cannot be stored as JSON: .*Circular"):
        external(PgQueue(sqlite_url)).definition.encode({"value": value})


@pytest.mark.parametrize(("size", "fits"), [(1024 * 1024, True), (1024 * 1024 + 1, False)])
def test_the_size_limit_counts_the_bytes_of_the_json_text(sqlite_url: str, size: int, fits: bool) -> None:
    task = external(PgQueue(sqlite_url))
    payload = {"a": "é" * ((size - 8) // 2) + "x" * (size % 2)}

    if fits:
        assert len(task.definition.encode(payload).encode()) == size
    else:
        with pytest.raises(InvalidPayload, match="is 1,048,577 bytes of JSON, more than the 1,048,576 allowed"):
            task.definition.encode(payload)


# Both databases agree --------------------------------------------------------------------------------------

#: A float beyond this comes back from jsonb as a whole number; see the test of a parameter that says `float`.
PLAIN_FLOAT_MAX = 1e15

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**4298, max_value=10**4301)
    | st.floats(min_value=-PLAIN_FLOAT_MAX, max_value=PLAIN_FLOAT_MAX)
    | st.sampled_from([math.nan, math.inf, -math.inf])
    | st.text(st.characters(exclude_categories=()))
    | st.dates()
    | st.uuids()
    | st.binary(max_size=4)
)
payloads = st.dictionaries(
    st.text(st.characters(exclude_categories=())),
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    ),
    max_size=4,
)


@pytest.fixture
def both(pg_url: str, sqlite_url: str) -> Iterator[tuple[PgQueue, PgQueue]]:
    queues = PgQueue(pg_url), PgQueue(sqlite_url)
    yield queues
    for queue in queues:
        queue.dispose()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=payloads)
@example(payload={"a": "\0"})
@example(payload={"\0": 1})
@example(payload={"a": ["\ud800"]})
@example(payload={"\udfff": 1})
@example(payload={"a": math.nan})
@example(payload={"a": {"b": [math.inf, None]}})
@example(payload={"a": 10**4300})
@example(payload={"a": nested(198)})
@example(payload={"a": nested(250)})
@example(payload={"": "", "a": -0.0, "b": 1e-300})
def test_postgresql_and_sqlite_take_and_refuse_the_same_payloads_and_give_them_back_alike(
    both: tuple[PgQueue, PgQueue], payload: dict[str, Any]
) -> None:
    received = [send_and_receive(queue, payload) for queue in both]

    assert received[0] == received[1]
    if not isinstance(received[0], str):
        assert received[0] == [plain(payload)] * 2


def send_and_receive(pgq: PgQueue, payload: dict[str, Any]) -> list[dict[str, Any]] | str:
    """The payload as a worker gets it, sent singly and in bulk; or the error that refused it."""
    task = external(pgq)
    try:
        by_enqueue(task, payload)
        by_bulk(task, payload)
    except (InvalidPayload, ConfigurationError) as error:
        return str(error)
    return [arguments_of_next(task), arguments_of_next(task)]


def plain(value: Any) -> Any:
    """What JSON makes of a value."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, date):
        return value.isoformat()
    return str(value) if isinstance(value, uuid.UUID) else value


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_parameter_gets_exactly_the_float_that_was_sent(both: tuple[PgQueue, PgQueue], number: float) -> None:
    for pgq in both:

        @pgq.task
        def measure(number: float) -> None: ...

        by_enqueue(measure, {"number": number})

        arrived = arguments_of_next(measure)["number"]
        assert (type(arrived), arrived) == (float, number)


# Many together ---------------------------------------------------------------------------------------------

STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(["null", "NaN", "\0", "\\u0000", "\ud800", "[[[{", "9" * 5000, [[]] * 200, object(), {1, 2}]),
)
PAYLOADS = st.lists(
    st.dictionaries(st.text(max_size=3), st.recursive(STRANGE, lambda inner: st.lists(inner, max_size=3))), max_size=8
)


@given(PAYLOADS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_payloads_encoded_together_are_those_encoded_one_by_one(payloads: list[dict[str, Any]]) -> None:
    definition = external(PgQueue("sqlite://")).definition
    one_by_one: list[str] | None
    try:
        one_by_one = [definition.encode(payload) for payload in payloads]
    except InvalidPayload:
        one_by_one = None

    together = definition.encode_together(payloads)

    if one_by_one is None:
        assert together is None
    elif together is not None:  # they may be too large or deep together, or ask for a second look
        assert together == f"[{','.join(one_by_one)}]"


def test_plain_payloads_are_encoded_together() -> None:
    """Guards the test above, and the speed of bulk enqueues."""
    definition = external(PgQueue("sqlite://")).definition

    together = definition.encode_together([{"n": n, "lines": [{"sku": "a", "note": None}]} for n in range(1_000)])

    assert together is not None


@pytest.mark.parametrize("size", [100, 3_000, 400_000])
def test_many_payloads_arrive_in_their_order_whatever_their_size(pgq: PgQueue, size: int) -> None:
    payloads = [{"n": n, "text": "x" * size} for n in range(40)]
    task = external(pgq)

    with pgq.begin() as connection:
        ids = task.enqueue_many(connection, payloads)

    assert [pgq.get_job(job_id).payload for job_id in (ids[0], ids[17], ids[-1])] == [
        payloads[index] for index in (0, 17, -1)
    ]
    assert len(ids) == len(set(ids)) == 40
