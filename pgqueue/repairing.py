"""What operators do about jobs that ended badly: edit them, replay them, purge them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timedelta
from typing import Any, overload

import sqlalchemy as sa

from pgqueue import dead_letter, offers, operations
from pgqueue.actor import who, why
from pgqueue.arguments import checked_id, checked_limit, decoded, require_mapping
from pgqueue.dead_letter import Batch
from pgqueue.engine import savepoint
from pgqueue.errors import ConfigurationError
from pgqueue.executor import MESSAGE_CHARACTERS_MAX, clean
from pgqueue.inspecting import job_filter
from pgqueue.job import JobStatus, ReplayResult
from pgqueue.operations import JobFilter
from pgqueue.registry import Registry
from pgqueue.retry import checked_max_retries
from pgqueue.steps import Steps, change, look
from pgqueue.task import LimitKeys, TaskDefinition, checked_priority, encode_json
from pgqueue.transaction import AsyncTransaction, SyncTransaction
from pgqueue.unique import COMPUTED

#: Jobs that one transaction replays or purges.
BATCH_JOBS = 500


class Repairer(Registry):
    """Calls that change jobs that are dead or cancelled, or are to run otherwise."""

    @overload
    def replay(
        self,
        ids: int,
        *,
        payload: Mapping[str, Any] | None = None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None: ...

    @overload
    def replay(
        self,
        ids: Iterable[int],
        *,
        payload: None = None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> ReplayResult: ...

    def replay(
        self,
        ids: int | Iterable[int],
        *,
        payload: Mapping[str, Any] | None = None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> ReplayResult | None:
        """Put dead or cancelled jobs back to pending, due now, with all their retries. Their history stays.

        One id: raises JobNotFound, IllegalTransition, or DuplicateJob when an open job has its unique key meanwhile.
        `payload` replaces its payload in the same transaction, as `edit` does.
        Several ids: a result that names those that were replayed and those that were not, with the reason.
        session: do it in your transaction instead of one of its own.
        """
        return self._take_in(session, "replay", self._replay(ids, payload, reason, actor))

    @overload
    async def replay_async(
        self,
        ids: int,
        *,
        payload: Mapping[str, Any] | None = None,
        session: AsyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None: ...

    @overload
    async def replay_async(
        self,
        ids: Iterable[int],
        *,
        payload: None = None,
        session: AsyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> ReplayResult: ...

    async def replay_async(
        self,
        ids: int | Iterable[int],
        *,
        payload: Mapping[str, Any] | None = None,
        session: AsyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> ReplayResult | None:
        """As `replay`, without blocking the event loop; `session` is an AsyncSession or AsyncConnection."""
        return await self._take_in_async(session, "replay_async", self._replay(ids, payload, reason, actor))

    def _replay(
        self, ids: int | Iterable[int], payload: Mapping[str, Any] | None, reason: str | None, actor: str | None
    ) -> Steps[ReplayResult | None]:
        by, because = who(actor), why(reason)
        if not isinstance(ids, Iterable):
            yield from self._replay_one(checked_id(ids), payload, by, because)
            return None
        if payload is not None:
            raise ConfigurationError("a payload belongs to one job: give replay() one id, not several")
        if isinstance(ids, str | bytes):
            raise ConfigurationError(f"replay() takes an id or several, got {type(ids).__name__}")
        chosen = sorted({checked_id(job_id) for job_id in ids})

        def replay(some: Sequence[int], connection: sa.Connection) -> Batch:
            return dead_letter.replay_ids(connection, self._tables_of(connection), some, actor=by, reason=because)

        done: list[int] = []
        skipped: dict[int, str] = {}
        for start in range(0, len(chosen), BATCH_JOBS):
            some = chosen[start : start + BATCH_JOBS]
            batch = yield from change(functools.partial(replay, some), wakes=_queues_of)
            done += batch.done
            skipped |= batch.skipped
        return ReplayResult(done, skipped)

    def _replay_one(self, job_id: int, payload: Mapping[str, Any] | None, actor: str, reason: str | None) -> Steps[str]:
        def replay(connection: sa.Connection) -> str:
            tables = self._tables_of(connection)
            with savepoint(connection) if payload is not None else nullcontext():
                if payload is not None:
                    self._edit_on(connection, job_id, {"payload": payload}, actor, reason)
                return dead_letter.replay_job(connection, tables, job_id, actor=actor, reason=reason)

        return change(replay, wakes=lambda queue: [queue])

    def replay_where(
        self,
        *,
        task: str | None = None,
        queue: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        limit: int | None = None,
        dry_run: bool = False,
        replayed: Callable[[int], None] = lambda count: None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> ReplayResult:
        """Replay all dead jobs that fit the filters (see `list_jobs`; since and until: when they died), oldest first.

        limit: at most so many. dry_run: change nothing, and say which they would be.
        Works in short transactions, one for each batch of 500: what was replayed stays so when it is interrupted, and
        the same call goes on with the rest. `replayed` is told the size of each batch. With `session` all of it
        happens in your transaction instead.
        A job that cannot be replayed, because an open job has its unique key, is left out and named in the result.
        Jobs that another transaction is changing at this moment are left alone.
        """
        wanted = job_filter(JobStatus.DEAD, queue, task, error_type, since, until, tags)
        steps = self._replay_where(wanted, limit, dry_run, replayed, reason, actor)
        return self._take_in(session, "replay_where", steps)

    async def replay_where_async(
        self,
        *,
        task: str | None = None,
        queue: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        limit: int | None = None,
        dry_run: bool = False,
        replayed: Callable[[int], None] = lambda count: None,
        session: AsyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> ReplayResult:
        """As `replay_where`, without blocking the event loop; `session` is an AsyncSession or AsyncConnection."""
        wanted = job_filter(JobStatus.DEAD, queue, task, error_type, since, until, tags)
        steps = self._replay_where(wanted, limit, dry_run, replayed, reason, actor)
        return await self._take_in_async(session, "replay_where_async", steps)

    def _replay_where(
        self,
        wanted: JobFilter,
        limit: int | None,
        dry_run: bool,
        replayed: Callable[[int], None],
        reason: str | None,
        actor: str | None,
    ) -> Steps[ReplayResult]:
        by, because = who(actor), why(reason)
        done: list[int] = []
        skipped: dict[int, str] = {}

        def replay(after_id: int, size: int, connection: sa.Connection) -> Batch:
            tables = self._tables_of(connection)
            if dry_run:
                return dead_letter.would_replay(connection, tables, wanted, after_id=after_id, limit=size)
            return dead_letter.replay_dead(
                connection, tables, wanted, after_id=after_id, limit=size, actor=by, reason=because
            )

        def note(batch: Batch) -> None:
            done.extend(batch.done)
            skipped.update(batch.skipped)
            replayed(len(batch.done))

        yield from _in_batches(replay, limit, note)
        return ReplayResult(done, skipped)

    def purge(
        self,
        *,
        task: str | None = None,
        queue: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        limit: int | None = None,
        dry_run: bool = False,
        purged: Callable[[int], None] = lambda count: None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> int:
        """Delete all dead jobs that fit the filters, as `replay_where` goes about it; how many.

        Their events go with them, but for one each that says who deleted it, when and why.
        """
        wanted = job_filter(JobStatus.DEAD, queue, task, error_type, since, until, tags)
        return self._take_in(session, "purge", self._purge(wanted, limit, dry_run, purged, reason, actor))

    async def purge_async(
        self,
        *,
        task: str | None = None,
        queue: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        limit: int | None = None,
        dry_run: bool = False,
        purged: Callable[[int], None] = lambda count: None,
        session: AsyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> int:
        """As `purge`, without blocking the event loop; `session` is an AsyncSession or AsyncConnection."""
        wanted = job_filter(JobStatus.DEAD, queue, task, error_type, since, until, tags)
        steps = self._purge(wanted, limit, dry_run, purged, reason, actor)
        return await self._take_in_async(session, "purge_async", steps)

    def _purge(
        self,
        wanted: JobFilter,
        limit: int | None,
        dry_run: bool,
        purged: Callable[[int], None],
        reason: str | None,
        actor: str | None,
    ) -> Steps[int]:
        by, because = who(actor), why(reason)
        if dry_run:
            if limit is not None:
                checked_limit(limit)
            return (
                yield from look(
                    lambda connection: dead_letter.count_dead(
                        connection, self._tables_of(connection), wanted, limit=limit
                    )
                )
            )
        total = 0

        def purge(after_id: int, size: int, connection: sa.Connection) -> Batch:
            return dead_letter.purge_dead(
                connection, self._tables_of(connection), wanted, after_id=after_id, limit=size, actor=by, reason=because
            )

        def note(batch: Batch) -> None:
            nonlocal total
            total += len(batch.done)
            purged(len(batch.done))

        yield from _in_batches(purge, limit, note)
        return total

    def edit(
        self,
        job_id: int,
        *,
        payload: Mapping[str, Any] | None = None,
        priority: int | None = None,
        max_retries: int | None = None,
        session: SyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None:
        """Change a job that is pending, dead or cancelled. `payload` replaces the whole payload.

        The payload is checked against the task's signature where the task is registered here; otherwise it may be
        anything JSON can carry. What changed is recorded by name, without the values.
        Raises JobNotFound; IllegalTransition for a running or completed job; InvalidPayload; DuplicateJob when the new
        payload gives the job a unique key that an open job has.
        """
        self._take_in(session, "edit", self._edit(job_id, payload, priority, max_retries, reason, actor))

    async def edit_async(
        self,
        job_id: int,
        *,
        payload: Mapping[str, Any] | None = None,
        priority: int | None = None,
        max_retries: int | None = None,
        session: AsyncTransaction | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None:
        """As `edit`, without blocking the event loop; `session` is an AsyncSession or AsyncConnection."""
        steps = self._edit(job_id, payload, priority, max_retries, reason, actor)
        await self._take_in_async(session, "edit_async", steps)

    def _edit(
        self,
        job_id: int,
        payload: Mapping[str, Any] | None,
        priority: int | None,
        max_retries: int | None,
        reason: str | None,
        actor: str | None,
    ) -> Steps[None]:
        if payload is None and priority is None and max_retries is None:
            raise ConfigurationError("edit() needs something to change: payload, priority or max_retries")
        if priority is not None:
            checked_priority(priority)
        if max_retries is not None:
            checked_max_retries(max_retries)
        changes: dict[str, Any] = {"payload": payload, "priority": priority, "max_retries": max_retries}
        by, because = who(actor), why(reason)
        checked_id(job_id)
        return change(lambda connection: self._edit_on(connection, job_id, changes, by, because))

    def _edit_on(
        self, connection: sa.Connection, job_id: int, changes: Mapping[str, Any], actor: str, reason: str | None
    ) -> None:
        tables = self._tables_of(connection)
        values = {name: value for name, value in changes.items() if value is not None}
        changed = sorted(values.keys() - {"payload"})
        if "payload" not in values:
            job = dead_letter.lock_for_edit(connection, tables, job_id)
            dead_letter.edit_job(connection, tables, job, values, actor=actor, reason=_edit_reason(changed, reason))
            return
        with offers.passing_on(connection, tables, operations.bounded(job_id)):
            job = dead_letter.lock_for_edit(connection, tables, job_id)
            values |= self._edited_payload(job, values["payload"])
            changed += _changed_keys(job.payload_json, values["payload"])
            dead_letter.edit_job(connection, tables, job, values, actor=actor, reason=_edit_reason(changed, reason))

    def _edited_payload(self, job: dead_letter.Editable, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that belong to a payload: itself, and the keys that the task takes from it."""
        require_mapping(payload, job.task)
        task = self.tasks.get(job.task)
        if task is None:
            return {"payload": encode_json(dict(payload), f"payload of task {job.task!r}")}
        definition = task.definition
        values: dict[str, Any] = {"payload": definition.encode(payload)}
        if definition.unique is not None and job.unique_key is not None and job.unique_key.startswith(COMPUTED):
            values["unique_key"] = definition.unique_key(payload, values["payload"])
        if definition.has_keys:
            taken = _keys_of(definition, job.payload_json)._asdict()
            new = definition.keys_of(values["payload"])._asdict()
            # A key that was given by hand stays.
            moved = {name: key for name, key in new.items() if job.limit_keys[name] == taken[name] != key}
            if moved:
                values |= {**moved, "waits_for": None, "slot": None, "leads_order": False}
        return values


def _in_batches(
    work: Callable[[int, int, sa.Connection], Batch], limit: int | None, note: Callable[[Batch], None]
) -> Steps[None]:
    """Do the work, from an id on and for so many jobs, until nothing is left to do or `limit` jobs are done."""
    if limit is not None:
        checked_limit(limit)
    left, after_id = limit, 0
    while left is None or left > 0:
        size = BATCH_JOBS if left is None else min(BATCH_JOBS, left)
        batch = yield from change(functools.partial(work, after_id, size), wakes=_queues_of)
        note(batch)
        if batch.after_id is None:
            return
        after_id = batch.after_id
        left = None if left is None else left - len(batch.done)


def _queues_of(batch: Batch) -> Iterable[str]:
    return batch.queues


def _edit_reason(changed: Sequence[str], reason: str | None) -> str:
    what = "changed " + (", ".join(changed) or "nothing")
    return clean(what if reason is None else f"{reason} ({what})", MESSAGE_CHARACTERS_MAX)


def _keys_of(definition: TaskDefinition, payload_json: str) -> LimitKeys:
    """The keys that the task takes from a payload, which may be one that it cannot read."""
    try:
        return definition.keys_of(payload_json)
    except (ValueError, TypeError, RecursionError):
        return LimitKeys()


def _changed_keys(before_json: str, after_json: str) -> list[str]:
    """Which keys of a payload were added, removed or changed; never their values."""
    after = decoded(after_json)
    try:
        before = decoded(before_json)
    except (ValueError, RecursionError):
        return ["payload"]
    absent = object()
    keys = sorted(before.keys() | after.keys())
    return [f"payload.{key}" for key in keys if before.get(key, absent) != after.get(key, absent)]
