"""The asynchronous calls are the synchronous ones under another name."""

from __future__ import annotations

import inspect

import pytest

from pgqueue import JobHandle, PgQueue, Task
from pgqueue.scheduling import Schedules

#: Calls that touch no database, or that hand out a connection.
WITHOUT_TWIN = {
    "begin",
    "connect_to",
    "cron",
    "external_task",
    "get_task",
    "middleware",
    "new",
    "on",
    "queue",
    "read_async",
    "reading",
    "task",
    "use_schema",
    "using",
}


def calls_of(owner: type) -> dict[str, object]:
    return {
        name: function for name, function in inspect.getmembers(owner, inspect.isfunction) if not name.startswith("_")
    }


@pytest.mark.parametrize("owner", [PgQueue, Task, JobHandle, Schedules])
def test_every_call_that_uses_the_database_has_an_asynchronous_twin(owner: type) -> None:
    calls = calls_of(owner)

    missing = {name for name in calls if not name.endswith("_async") and f"{name}_async" not in calls}

    assert missing <= WITHOUT_TWIN


@pytest.mark.parametrize("owner", [PgQueue, Task, JobHandle, Schedules])
def test_twins_take_the_same_arguments_and_say_what_they_do(owner: type) -> None:
    calls = calls_of(owner)

    for name in calls.keys() - {"read_async"}:
        if not name.endswith("_async"):
            continue
        plain, twin = calls[name.removesuffix("_async")], calls[name]
        assert callable(plain)
        assert callable(twin)
        for ours, its in zip(
            inspect.signature(plain).parameters.values(), inspect.signature(twin).parameters.values(), strict=True
        ):
            assert (ours.name, ours.kind) == (its.name, its.kind), name
            assert ours.default is its.default or ours.default == its.default or callable(ours.default), name
            assert str(ours.annotation).replace("SyncTransaction", "AsyncTransaction") == str(its.annotation), name
        assert twin.__doc__, name
