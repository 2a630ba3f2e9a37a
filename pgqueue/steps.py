"""What a call does in the database, apart from who does it: a thread, an event loop, or a caller's transaction.

A call is written once, as a generator that yields its steps, one transaction each, and gets their results. What it
does between two steps, it does after the commit of the first. `database.Database` takes the steps.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step(Generic[T]):
    """What happens in one transaction."""

    work: Callable[[Session | sa.Connection, sa.Connection], T]
    #: gets what the transaction was opened with, and its connection
    only_reads: bool
    wakes: Callable[[T], Iterable[str]]  #: from the work's result: queues whose workers to wake after the commit


#: The steps of a call that returns a T.
Steps = Generator[Step[Any], Any, T]


def look(work: Callable[[sa.Connection], T]) -> Steps[T]:
    """The step of a call that only reads; its result."""
    result: T = yield Step(lambda _, connection: work(connection), only_reads=True, wakes=_nobody)
    return result


def change(work: Callable[[sa.Connection], T], wakes: Callable[[T], Iterable[str]] | None = None) -> Steps[T]:
    """The step of a call that writes; its result."""
    wakes = _nobody if wakes is None else wakes
    result: T = yield Step(lambda _, connection: work(connection), only_reads=False, wakes=wakes)
    return result


def insert(work: Callable[[Session | sa.Connection, sa.Connection], T]) -> Steps[T]:
    """The step of a call that stores jobs, which wakes workers by itself; its result."""
    result: T = yield Step(work, only_reads=False, wakes=_nobody)
    return result


def _nobody(result: object) -> Iterable[str]:
    return ()


def take(steps: Steps[T], take_one: Callable[[Step[Any]], Any]) -> T:
    """Take the steps one after another; what their call returns."""
    taken: Any = None
    while True:
        try:
            step = steps.send(taken)
        except StopIteration as end:
            result: T = end.value
            return result
        taken = take_one(step)


async def take_async(steps: Steps[T], take_one: Callable[[Step[Any]], Awaitable[Any]]) -> T:
    taken: Any = None
    while True:
        try:
            step = steps.send(taken)
        except StopIteration as end:
            result: T = end.value
            return result
        taken = await take_one(step)
