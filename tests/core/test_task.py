"""From a function's signature to its payload and back."""

from __future__ import annotations

import dataclasses
import functools
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqueue import ConfigurationError, InvalidPayload, InvalidTask, Retry
from pgqueue.task import PAYLOAD_BYTES_MAX, TaskDefinition, checked_name


class Colour(Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Order(pydantic.BaseModel):
    id: int
    lines: list[str] = []


def task(function: Callable[..., Any], **settings: Any) -> TaskDefinition:
    return TaskDefinition(name="t", function=function, **settings)


def carried(function: Callable[..., Any], **payload: Any) -> dict[str, Any]:
    """What the function is called with when this payload went through the database."""
    definition = task(function)
    return definition.decode(definition.encode(payload))


# Round trips -----------------------------------------------------------------------------------------------


def test_values_arrive_as_the_types_that_the_signature_names() -> None:
    def function(
        when: datetime,
        day: date,
        wait: timedelta,
        key: uuid.UUID,
        price: Decimal,
        point: Point,
        order: Order,
        colour: Colour,
        tags: set[str],
        mode: Literal["fast", "slow"],
        maybe: int | None,
    ) -> None: ...

    payload = {
        "when": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        "day": date(2026, 1, 2),
        "wait": timedelta(seconds=1.5),
        "key": uuid.uuid4(),
        "price": Decimal("19.90"),
        "point": Point(1, 2),
        "order": Order(id=1, lines=["a"]),
        "colour": Colour.RED,
        "tags": {"a", "b"},
        "mode": "fast",
        "maybe": None,
    }

    assert carried(function, **payload) == payload


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**53), max_value=2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text("abc", max_size=3), children, max_size=4),
    max_leaves=10,
)


@given(json_values)
def test_an_unannotated_parameter_carries_whatever_json_can(value: Any) -> None:
    def function(value): ...  # type: ignore[no-untyped-def]

    assert carried(function, value=value) == {"value": value}


def test_a_missing_argument_with_a_default_is_left_to_the_function() -> None:
    def function(file: str, size: int = 1024) -> None: ...

    assert carried(function, file="a") == {"file": "a"}


def test_keyword_arguments_take_any_name() -> None:
    def function(n: int, **others: Any) -> None: ...

    assert carried(function, n=1, colour="red", size=[1]) == {"n": 1, "colour": "red", "size": [1]}


@pytest.mark.parametrize("name", ["model_config", "schema", "json", "copy", "self", "_private", "class_", "ünï"])
def test_a_parameter_may_have_any_name(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def function({name}: int): ...", namespace)

    assert carried(namespace["function"], **{name: 1}) == {name: 1}


def test_constraints_of_annotations_are_checked() -> None:
    def function(n: Annotated[int, pydantic.Field(gt=0)]) -> None: ...

    with pytest.raises(InvalidPayload, match="n: Input should be greater than 0"):
        task(function).encode({"n": 0})


def test_a_bound_method_can_be_a_task() -> None:
    class Resizer:
        def resize(self, n: int) -> None: ...

    assert carried(Resizer().resize, n=2) == {"n": 2}


def test_a_partial_function_is_refused_because_its_annotations_cannot_be_read() -> None:
    with pytest.raises(InvalidTask, match="the annotations of its function cannot be read"):
        task(functools.partial(lambda m, n: None, 1))


# Payloads that do not fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        ({}, "n: Field required"),
        ({"n": "many"}, "n: Input should be a valid integer"),
        ({"n": 1, "m": 2}, "m: Extra inputs are not permitted"),
        ({"n": 1.5}, "n: Input should be a valid integer"),
    ],
)
def test_a_payload_that_does_not_fit_is_refused_by_name(payload: dict[str, Any], problem: str) -> None:
    def function(n: int) -> None: ...

    with pytest.raises(InvalidPayload) as refused:
        task(function).encode(payload)

    assert str(refused.value).startswith("payload of task 't' does not fit: ")
    assert problem in str(refused.value)


def test_a_refusal_never_shows_the_values() -> None:
    def function(password: int) -> None: ...

    with pytest.raises(InvalidPayload) as refused:
        task(function).encode({"password": "hunter2"})

    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("payload", [None, [], "text", 1, [("n", 1)]])
def test_a_payload_is_a_mapping(payload: Any) -> None:
    with pytest.raises(InvalidPayload, match="must be a mapping of its parameters, got"):
        task(lambda n: None).encode(payload)


@pytest.mark.parametrize(
    "value",
    [object(), float("nan"), float("inf"), "a\0b", {"deep": ["\ud800"]}, {"a\0": 1}, lambda: None],
    ids=["object", "nan", "infinity", "nul", "surrogate", "nul-key", "function"],
)
def test_a_value_that_json_cannot_carry_is_refused(value: Any) -> None:
    with pytest.raises(InvalidPayload, match="payload of task 't'"):
        task(lambda value: None).encode({"value": value})


def test_the_largest_payload_is_a_mebibyte() -> None:
    definition = task(lambda value: None)
    frame = len('{"value":""}')

    definition.encode({"value": "x" * (PAYLOAD_BYTES_MAX - frame)})
    with pytest.raises(InvalidPayload, match=r"is 1,048,577 bytes of JSON, more than the 1,048,576 allowed"):
        definition.encode({"value": "x" * (PAYLOAD_BYTES_MAX - frame + 1)})


@pytest.mark.parametrize("stored", ["", "{", "[1]", "null", '{"n": {}}', '{"n": ' + "9" * 5000 + "}"])
def test_a_stored_payload_that_cannot_be_used_is_an_invalid_payload(stored: str) -> None:
    def function(n: int) -> None: ...

    with pytest.raises(InvalidPayload, match="payload of task 't' does not fit"):
        task(function).decode(stored)


def test_a_number_too_long_to_read_is_an_invalid_payload_also_where_anything_is_taken() -> None:
    with pytest.raises(InvalidPayload, match="number out of range"):
        task(lambda n: None).decode('{"n": ' + "9" * 5000 + "}")


# Functions that cannot be tasks ----------------------------------------------------------------------------


def _positional_only(n: int, /) -> None: ...
def _variadic(*numbers: int) -> None: ...
def _no_session() -> None: ...
def _only_keywords(*, session: object, n: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "settings", "problem"),
    [
        (_positional_only, {}, "parameter 'n' cannot be given by name"),
        (_variadic, {}, "parameter 'numbers' cannot be given by name"),
        (_no_session, {"transactional": True}, "its first parameter must be the session"),
        (_only_keywords, {"transactional": True}, "its first parameter must be the session"),
    ],
)
def test_a_signature_that_a_payload_cannot_fill_is_refused(
    function: Callable[..., Any], settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidTask) as refused:
        task(function, **settings)

    assert problem in str(refused.value)


def test_an_annotation_that_cannot_be_resolved_is_refused_with_the_remedy() -> None:
    def function(n: OnlyForTypeCheckers) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(InvalidTask, match="import what they name outside `if TYPE_CHECKING`"):
        task(function)


def test_a_type_that_json_cannot_carry_is_refused_when_the_task_is_made() -> None:
    class Connection: ...

    namespace: dict[str, Any] = {"Connection": Connection}
    exec("def function(connection: Connection): ...", namespace)

    with pytest.raises(InvalidTask, match="a parameter's type cannot be carried as JSON"):
        task(namespace["function"])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"priority": 40000}, "priority must be a whole number between -32768 and 32767, got 40000"),
        ({"priority": True}, "priority must be a whole number"),
        ({"queue": "a;b"}, "queue name must be 1 to 128 letters"),
        ({"retry": 5}, "retry of task 't' must be a Retry(…), such as Retry(max_retries=5), got 5"),
        ({"retry": Retry}, "retry of task 't' must be a Retry(…)"),
        ({"transactional": "no"}, "transactional of task 't' must be True or False, got 'no'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        task(lambda: None, **settings)

    assert problem in str(refused.value)


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_timeout_is_more_than_nothing(timeout: float) -> None:
    async def function() -> None: ...

    with pytest.raises(ConfigurationError, match="must be more than 0 seconds"):
        task(function, timeout=timeout)


# Names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A9", "_x", "images.resize", "a:b", "a-b", "9lives", "x" * 128])
def test_a_name_of_plain_characters_is_taken(name: str) -> None:
    assert checked_name("task", name) == name


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", "a;b", "a'b", 'a"b', "-a", ".a", "a\n", "ä", "x" * 129, "a/b", "a\0", None, 5, "<lambda>"],
)
def test_any_other_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="task name must be 1 to 128 letters"):
        checked_name("task", name)


@given(st.text(max_size=200))
def test_an_accepted_name_needs_no_quoting_anywhere(name: str) -> None:
    try:
        checked_name("queue", name)
    except ConfigurationError:
        return
    assert name.isascii()
    assert name.isprintable()
    assert not set(name) & set("'\"`;\\ %/$")
