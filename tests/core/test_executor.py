"""Every way in which a task's function can end its attempt."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pgqueue import Cancel, Discard, InvalidPayload, Snooze, current_job, executor
from pgqueue.executor import MESSAGE_CHARACTERS_MAX, TRACEBACK_CHARACTERS_MAX, clean, describe, execute, execute_async
from pgqueue.job import Cancelled, ClaimedJob, Completed, Discarded, Failed, Outcome, Snoozed
from pgqueue.task import TaskDefinition


def claimed(payload_json: str = "{}") -> ClaimedJob:
    now = datetime.now(UTC)
    return ClaimedJob(7, "default", "t", payload_json, 0, now, 1, 0, 3, "w", uuid.uuid4(), now, "{}")


def run(function: Callable[..., Any], payload_json: str = "{}", *, timeout: float | None = None) -> Outcome:
    """Run a function, `def` or `async def`, as a task."""
    definition = TaskDefinition(name="t", function=function, timeout=timeout)
    if definition.is_async:
        return asyncio.run(execute_async(definition, claimed(payload_json)))
    return execute(definition, claimed(payload_json))


def raising(error: BaseException, kind: str) -> Callable[[], Any]:
    """A task that raises `error`, as a `def` or an `async def`."""

    def task() -> None:
        raise error

    async def async_task() -> None:
        raise error

    return task if kind == "def" else async_task


each_kind = pytest.mark.parametrize("kind", ["def", "async def"])


# Success ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (None, None),
        (0, "0"),
        ({"a": [1, 2.5, None, True, "ü"]}, '{"a":[1,2.5,null,true,"ü"]}'),
        (timedelta(seconds=90), '"PT1M30S"'),
        (datetime(2026, 1, 2, tzinfo=UTC), '"2026-01-02T00:00:00Z"'),
        (uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (
            {
                1,
            },
            "[1]",
        ),
    ],
)
def test_what_a_task_returns_is_stored_as_json(value: object, stored: str | None) -> None:
    assert run(lambda: value) == Completed(stored)


@pytest.mark.parametrize(
    "value",
    [object(), lambda: None, float("nan"), float("inf"), "a\0b", "\ud800", {"x": object()}, "x" * 2_000_000],
    ids=["object", "function", "nan", "infinity", "nul", "surrogate", "nested", "too-large"],
)
def test_a_result_that_cannot_be_stored_makes_the_job_dead_and_is_not_tried_again(value: object) -> None:
    outcome = run(lambda: value)

    assert isinstance(outcome, Discarded)
    assert outcome.error.type == "InvalidResult"
    assert "the task ran to its end, but its return value cannot be stored" in outcome.reason


def test_a_result_that_contains_itself_cannot_be_stored() -> None:
    endless: list[Any] = []
    endless.append(endless)

    assert isinstance(run(lambda: endless), Discarded)


def test_the_payload_arrives_as_arguments() -> None:
    def task(n: int, when: datetime, size: int = 5) -> list[Any]:
        return [n + size, when.year]

    assert run(task, '{"n": 1, "when": "2026-01-02T00:00:00Z"}') == Completed("[6,2026]")


# Failure ---------------------------------------------------------------------------------------------------


class Sulking(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class Rude(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


@each_kind
@pytest.mark.parametrize(
    "error",
    [ValueError("boom"), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), BaseException("base"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_is_raised_ends_the_attempt_and_nothing_else(error: BaseException, kind: str) -> None:
    outcome = run(raising(error, kind))

    assert isinstance(outcome, Failed)
    assert outcome.error.type == type(error).__name__
    assert "raise error" in outcome.error.traceback


@each_kind
@pytest.mark.parametrize("error", [Sulking(), Rude()], ids=lambda error: type(error).__name__)
def test_an_exception_whose_own_code_fails_is_recorded_all_the_same(error: Exception, kind: str) -> None:
    outcome = run(raising(error, kind))

    assert isinstance(outcome, Failed)
    assert outcome.error.type.endswith(type(error).__qualname__)
    assert outcome.error.message == "(its message could not be made)"


def test_a_huge_message_keeps_its_beginning_and_its_end() -> None:
    outcome = run(raising(ValueError("begin" + "x" * 10_000_000 + "end"), "def"))

    assert isinstance(outcome, Failed)
    message = outcome.error.message
    assert len(message) < MESSAGE_CHARACTERS_MAX + 100
    assert message.startswith("begin")
    assert message.endswith("end")
    assert "characters left out" in message
    assert len(outcome.error.traceback) < TRACEBACK_CHARACTERS_MAX + 100


def test_a_deep_chain_of_causes_stays_short_enough_to_store() -> None:
    error: Exception = ValueError("first")
    for number in range(500):
        following = ValueError(f"{number}" * 50)
        following.__cause__ = error
        error = following

    assert len(describe(error).traceback) < TRACEBACK_CHARACTERS_MAX + 100


def test_nul_characters_and_lone_surrogates_are_replaced() -> None:
    outcome = run(raising(ValueError("a\0b\ud800c"), "def"))

    assert isinstance(outcome, Failed)
    assert outcome.error.message == "a\N{SYMBOL FOR NULL}b?c"
    outcome.error.traceback.encode()
    assert "\0" not in outcome.error.traceback


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 1000])
def test_cleaning_never_lengthens_a_short_text_and_cuts_only_a_long_one(length: int) -> None:
    text = "x" * length

    assert (clean(text, 10) == text) is (length <= 10)


# Signals ---------------------------------------------------------------------------------------------------


@each_kind
def test_snooze_discard_and_cancel_say_how_the_attempt_ends(kind: str) -> None:
    assert run(raising(Snooze(5), kind)) == Snoozed(5.0, "snoozed by the task")
    assert run(raising(Snooze(timedelta(minutes=1), "wait"), kind)) == Snoozed(60.0, "wait")
    assert run(raising(Cancel("unwanted"), kind)) == Cancelled("unwanted")
    discarded = run(raising(Discard("hopeless"), kind))
    assert isinstance(discarded, Discarded)
    assert discarded.reason == "hopeless"


@pytest.mark.parametrize(
    "delay",
    [-1, float("nan"), float("inf"), 1e12, 10**400, 10**5000, timedelta.max, "soon", None],
    ids=["negative", "nan", "infinity", "too-long", "no-float", "no-text", "timedelta", "text", "none"],
)
def test_a_snooze_with_an_impossible_delay_is_a_failure_that_says_so(delay: Any) -> None:
    outcome = run(raising(Snooze(delay), "def"))

    assert isinstance(outcome, Failed)
    assert "Snooze needs a delay between 0 and 3162240000 seconds" in outcome.error.message


@each_kind
@pytest.mark.parametrize(
    "reason", [None, ValueError("boom"), Sulking(), 10**5000], ids=["none", "error", "sulking", "number"]
)
def test_a_reason_that_is_no_text_ends_the_attempt_as_well(reason: Any, kind: str) -> None:
    for signal, expected in ((Snooze(1, reason), Snoozed), (Discard(reason), Discarded), (Cancel(reason), Cancelled)):
        outcome = run(raising(signal, kind))

        assert isinstance(outcome, expected)
        assert isinstance(outcome.reason, str)


def test_reasons_are_cleaned_too() -> None:
    assert run(raising(Cancel("a\0b"), "def")) == Cancelled("a\N{SYMBOL FOR NULL}b")


# Payloads --------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(
    "payload_json",
    ["{", "[]", "null", '{"n": "many"}', "{}", '{"n": 1, "extra": 2}', '{"n": ' + "9" * 5000 + "}"],
    ids=["broken", "array", "null", "wrong-type", "missing", "unknown", "5000-digits"],
)
def test_a_payload_that_does_not_fit_makes_the_job_dead_without_running_it(payload_json: str, kind: str) -> None:
    ran = []

    def task(n: int) -> None:
        ran.append(n)

    async def async_task(n: int) -> None:
        ran.append(n)

    outcome = run(task if kind == "def" else async_task, payload_json)

    assert isinstance(outcome, Discarded)
    assert outcome.reason == "the payload cannot be used"
    assert ran == []


@each_kind
def test_an_invalid_payload_that_the_task_itself_raised_is_a_failure_like_any_other(kind: str) -> None:
    outcome = run(raising(InvalidPayload("of another task"), kind))

    assert isinstance(outcome, Failed)


# current_job -----------------------------------------------------------------------------------------------


def test_the_running_job_is_known_inside_of_a_task_and_only_there() -> None:
    assert run(lambda: current_job().id) == Completed("7")

    with pytest.raises(RuntimeError, match="outside of a running task"):
        current_job()


def test_each_coroutine_knows_its_own_job_also_under_a_timeout() -> None:
    async def task() -> bool:
        before = current_job()
        await asyncio.sleep(0)
        return current_job() is before

    definition = TaskDefinition(name="t", function=task, timeout=5.0)

    async def main() -> list[Outcome]:
        return await asyncio.gather(*(execute_async(definition, claimed()) for _ in range(20)))

    assert asyncio.run(main()) == [Completed("true")] * 20


def test_a_thread_without_a_job_has_none() -> None:
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            current_job()
        except RuntimeError as error:
            errors.append(error)

    def task() -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    run(task)

    assert len(errors) == 1


# Timeouts and cancellation ---------------------------------------------------------------------------------


def test_an_async_task_that_takes_too_long_is_cancelled_and_has_failed() -> None:
    cancelled = []

    async def task() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    outcome = run(task, timeout=0.05)

    assert isinstance(outcome, Failed)
    assert outcome.error.type == "TimeoutError"
    assert outcome.error.message == "the attempt took longer than its timeout of 0.05 s"
    assert cancelled == [True]


def test_an_async_task_that_ends_in_time_is_not_disturbed_by_its_timeout() -> None:
    async def task() -> int:
        await asyncio.sleep(0)
        return 1

    assert run(task, timeout=60) == Completed("1")


def test_an_async_task_that_swallows_its_cancellation_has_failed_all_the_same() -> None:
    async def task() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "done nevertheless"

    outcome = run(task, timeout=0.05)

    assert isinstance(outcome, Failed)
    assert outcome.error.type == "TimeoutError"


def test_an_async_task_that_refuses_to_end_is_left_behind_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(executor, "CANCEL_GRACE_SECONDS", 0.05)
    released = threading.Event()

    async def task() -> None:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    definition = TaskDefinition(name="t", function=task, timeout=0.05)

    async def main() -> Outcome:
        outcome = await execute_async(definition, claimed())
        released.set()
        return outcome

    outcome = asyncio.run(main())

    assert isinstance(outcome, Failed)
    assert "goes on although its timeout of 0.05 s is over" in caplog.text


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_cancelling_from_outside_reaches_the_task_and_is_passed_on(timeout: float | None) -> None:
    cancelled = []

    async def main() -> None:
        began = asyncio.Event()

        async def task() -> None:
            began.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        definition = TaskDefinition(name="t", function=task, timeout=timeout)
        running = asyncio.create_task(execute_async(definition, claimed()))
        await began.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())

    assert cancelled == [True]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_an_async_task_that_raises_cancelled_error_itself_has_failed(timeout: float | None) -> None:
    outcome = run(raising(asyncio.CancelledError(), "async def"), timeout=timeout)

    assert isinstance(outcome, Failed)
    assert outcome.error.message == "the task cancelled itself"


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_an_exit_under_a_timeout_does_not_end_the_event_loop(error: BaseException) -> None:
    outcome = run(raising(error, "async def"), timeout=60.0)

    assert isinstance(outcome, Failed)
    assert outcome.error.type == type(error).__name__


def test_the_outcome_of_a_task_is_not_logged_by_the_executor(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="pgqueue"):
        run(raising(ValueError("boom"), "def"))

    assert caplog.records == []
