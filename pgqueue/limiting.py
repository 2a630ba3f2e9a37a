"""The limits of queues and tasks: those the code declares, and those that people set while workers run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import sqlalchemy as sa

from pgqueue import limits, retention
from pgqueue.actor import who, why
from pgqueue.admission import Limits, Rate
from pgqueue.arguments import duration_seconds
from pgqueue.config import DEFAULT_QUEUE
from pgqueue.errors import ConfigurationError
from pgqueue.limits import LimitsRow, Scope
from pgqueue.registry import Registry
from pgqueue.steps import Steps, change, look
from pgqueue.task import checked_name


class Limiter(Registry):
    """Calls about limits."""

    _limits_declared = False

    def declare_limits(self, tasks: Iterable[str] | None = None) -> None:
        """Make the limits known that the code declares, unless somebody changed them since, and how long dead jobs of
        its tasks are kept. Workers do so when they start, and consumers at their first `claim`.

        tasks: the names of those whose limits, if the code declares none, were lifted in it; all tasks unless given.
        """
        self._take(self._declare_limits(tasks))

    async def declare_limits_async(self, tasks: Iterable[str] | None = None) -> None:
        """As `declare_limits`, without blocking the event loop."""
        await self._take_async(self._declare_limits(tasks))

    def _declare_limits(self, tasks: Iterable[str] | None) -> Steps[None]:
        declared, names = self.declared_limits, list(self.tasks if tasks is None else tasks)
        keep_dead = {name: self.tasks[name].definition.keep_dead for name in names if name in self.tasks}
        outdated = yield from look(lambda connection: limits.outdated(connection, self.tables, declared, names))
        if outdated:
            yield from change(lambda connection: limits.declare(connection, self.tables, outdated))
        unknown = yield from look(lambda connection: retention.outdated(connection, self.tables, keep_dead))
        if unknown:
            yield from change(lambda connection: retention.declare(connection, self.tables, unknown))
        self._limits_declared = True

    @property
    def _keeps_dead(self) -> bool:
        """Whether a task says how long its dead jobs are kept."""
        return any(task.definition.keep_dead is not None for task in self.tasks.values())

    def list_limits(self) -> list[LimitsRow]:
        """The limits of queues and tasks that are kept now."""
        return self._take(self._list_limits())

    async def list_limits_async(self) -> list[LimitsRow]:
        """As `list_limits`, without blocking the event loop."""
        return await self._take_async(self._list_limits())

    def _list_limits(self) -> Steps[list[LimitsRow]]:
        return look(lambda connection: limits.list_limits(connection, self.tables))

    def set_limits(
        self,
        *,
        queue: str | None = None,
        task: str | None = None,
        reason: str | None = None,
        actor: str | None = None,
        **changes: Any,
    ) -> Limits:
        """Change limits of a queue or a task while workers run; what they are then.

        changes: fields of `Limits`; None lifts one, and what is not named stays as it is. `rate` takes a `Rate`, or
        jobs per second; `promote_after` takes seconds or a timedelta. What is changed here outlasts what the code
        declares, until `reset_limits`.
        """
        return self._take(self._set_limits(queue, task, reason, actor, changes))

    async def set_limits_async(
        self,
        *,
        queue: str | None = None,
        task: str | None = None,
        reason: str | None = None,
        actor: str | None = None,
        **changes: Any,
    ) -> Limits:
        """As `set_limits`, without blocking the event loop."""
        return await self._take_async(self._set_limits(queue, task, reason, actor, changes))

    def _set_limits(
        self, queue: str | None, task: str | None, reason: str | None, actor: str | None, changes: Mapping[str, Any]
    ) -> Steps[Limits]:
        by, because = who(actor), why(reason)
        scope, name = _limits_of_what(queue, task)
        known = {field.name for field in fields(Limits)}
        for field_name in changes:
            if field_name not in known:
                raise ConfigurationError(f"limits are {', '.join(sorted(known))}; got {field_name!r}")
        if not changes:
            raise ConfigurationError(f"name at least one limit to change: {', '.join(sorted(known))}")
        plain = _as_numbers(changes)

        def set_limits(connection: sa.Connection) -> Limits:
            before = limits.get_limits(connection, self.tables, scope, name, lock=True) or Limits()
            wanted = replace(before, **_with_partners(before, plain))
            _check_scope(scope, name, wanted)
            limits.put_limits(connection, self.tables, scope, name, wanted, declared_by=by, reason=because)
            return wanted

        return change(set_limits, wakes=lambda _: [self._queue_of(scope, name)])

    def reset_limits(
        self, *, queue: str | None = None, task: str | None = None, reason: str | None = None, actor: str | None = None
    ) -> Limits:
        """Give a queue or a task the limits back that this code declares for it; what they are then."""
        return self._take(self._reset_limits(queue, task, reason, actor))

    async def reset_limits_async(
        self, *, queue: str | None = None, task: str | None = None, reason: str | None = None, actor: str | None = None
    ) -> Limits:
        """As `reset_limits`, without blocking the event loop."""
        return await self._take_async(self._reset_limits(queue, task, reason, actor))

    def _reset_limits(
        self, queue: str | None, task: str | None, reason: str | None, actor: str | None
    ) -> Steps[Limits]:
        by, because = who(actor), why(reason)
        scope, name = _limits_of_what(queue, task)
        wanted = self.declared_limits.get((scope, name), Limits())
        yield from change(
            lambda connection: limits.put_limits(
                connection, self.tables, scope, name, wanted, declared_by=limits.CODE, actor=by, reason=because
            ),
            wakes=lambda _: [self._queue_of(scope, name)],
        )
        return wanted

    def _queue_of(self, scope: Scope, name: str) -> str:
        """Whose workers have to know of changed limits."""
        if scope == "queue":
            return name
        task = self.tasks.get(name)
        return task.definition.queue if task is not None else DEFAULT_QUEUE


def _as_numbers(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of limits as `Limits` has them."""
    plain = dict(changes)
    rate = plain.get("rate")
    if isinstance(rate, Rate):
        if rate.key is not None:
            raise ConfigurationError(
                "the key of a rate is declared with the task; give set_limits() a Rate without key"
            )
        if "burst" in plain:
            raise ConfigurationError("give burst either in the Rate or beside a rate in jobs per second, not in both")
        plain |= {"rate": rate.per_second, "burst": rate.burst}
    if plain.get("promote_after") is not None:
        plain["promote_after"] = duration_seconds("promote_after", plain["promote_after"])
    return plain


def _with_partners(before: Limits, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A rate has a burst and a depth something to be done beyond it: what is not named stays as it is, or is the
    default; a limit that is lifted takes its partner along."""
    wanted = dict(changes)
    for limit, partner, default in (("rate", "burst", 1), ("max_depth", "on_full", "error")):
        if limit in wanted and partner not in wanted:
            wanted[partner] = None if wanted[limit] is None else getattr(before, partner) or default
    return wanted


def _limits_of_what(queue: str | None, task: str | None) -> tuple[Scope, str]:
    if (queue is None) == (task is None):
        raise ConfigurationError("name either a queue or a task whose limits are meant")
    return ("queue", checked_name("queue", queue)) if queue is not None else ("task", checked_name("task", task))


def _check_scope(scope: Scope, name: str, wanted: Limits) -> None:
    of_queues = ("max_depth", "on_full", "promote_after")
    foreign = ("key_concurrency",) if scope == "queue" else of_queues
    for field_name in foreign:
        if getattr(wanted, field_name) is not None:
            raise ConfigurationError(
                f"{field_name} is a limit of {'tasks' if scope == 'queue' else 'queues'}, and {name!r} is a {scope}"
            )
