"""The steps of a call: one transaction each, taken by whoever makes the call."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pgqueue.steps import Step, Steps, change, look, take, take_async

CONNECTION: Any = object()  # the steps below do nothing with it


def call(log: list[str]) -> Steps[str]:
    """Looks, then changes something, and notes what it does in between."""
    found = yield from look(lambda connection: "a job")
    log.append(f"looked: {found}")
    done = yield from change(lambda connection: f"changed {found}", wakes=lambda done: [done])
    log.append("changed")
    return done


def test_a_call_goes_on_with_what_each_step_returned() -> None:
    log: list[str] = []

    def take_one(step: Step[Any]) -> Any:
        result = step.work(CONNECTION, CONNECTION)
        log.append(f"committed, only read: {step.only_reads}, wakes: {list(step.wakes(result))}")
        return result

    assert take(call(log), take_one) == "changed a job"
    assert log == [
        "committed, only read: True, wakes: []",
        "looked: a job",
        "committed, only read: False, wakes: ['changed a job']",
        "changed",
    ]


def test_an_event_loop_takes_the_same_steps() -> None:
    log: list[str] = []

    async def take_one(step: Step[Any]) -> Any:
        await asyncio.sleep(0)
        return step.work(CONNECTION, CONNECTION)

    assert asyncio.run(take_async(call(log), take_one)) == "changed a job"
    assert log == ["looked: a job", "changed"]


def test_a_step_that_fails_ends_the_call() -> None:
    log: list[str] = []

    def take_one(step: Step[Any]) -> Any:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        take(call(log), take_one)

    assert log == []
