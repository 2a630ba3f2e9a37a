"""Claims, for consumers that are not tasks: claim, ack, nack and extend."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from pgqueue import expiry, operations, retention, store, within_limits
from pgqueue.arguments import checked_limit, checked_tasks, delay_seconds, is_unicode, lease_seconds
from pgqueue.config import DEFAULT_QUEUE
from pgqueue.engine import LockNotWon
from pgqueue.errors import ClaimLost, ConfigurationError, WrongSession
from pgqueue.events import events_of
from pgqueue.executor import MESSAGE_CHARACTERS_MAX, clean, describe
from pgqueue.job import ClaimedJob, Completed, Discarded, ErrorInfo, EventType, Failed, Outcome, Released
from pgqueue.limiting import Limiter
from pgqueue.retry import Retry, decide
from pgqueue.steps import Steps, change, look
from pgqueue.task import checked_name, encode_json
from pgqueue.transaction import AsyncTransaction, SyncTransaction, tell_after_commit

#: How many expired claims a low-level `claim` takes from dead workers before it looks for due jobs.
SWEEP_BEFORE_CLAIM = 100

#: How long a low-level `claim` leaves it at that no expired job is claimed, before it lets expired ones be dead.
EXPIRE_SECONDS = 1.0

#: How often one `claim` goes on, each time in another transaction, while the jobs that it looks at have to wait.
CLAIM_ROUNDS_MAX = 50

#: The policy behind a `nack` with an error: what a task without settings of its own has.
_DEFAULT_RETRY = Retry()


class Consumer(Limiter):
    """Calls that claim jobs, and end or prolong the claims."""

    _look_for_expired_at = 0.0  # monotonic; `claim` does it now and then

    def __init__(self, database: str | sa.URL | sa.Engine | AsyncEngine | None, schema: str | None) -> None:
        super().__init__(database, schema)
        self._limited: set[str] = set()  # queues whose last claim had limits to keep

    def claim(
        self,
        worker: str,
        *,
        queue: str = DEFAULT_QUEUE,
        tasks: Sequence[str] | None = None,
        limit: int = 1,
        lease: float | timedelta = 30.0,
    ) -> list[ClaimedJob]:
        """Claim up to `limit` due jobs of a queue for `lease` seconds; an empty list when there are none.

        `tasks`: only jobs of the tasks of these names.
        First takes back claims that have expired, so that what a dead consumer held is among the result.
        """
        with suppress(LockNotWon):  # others under the same limits take their time, or one of them is frozen
            return self._take(self._claim(worker, queue, tasks, limit, lease))
        return []

    async def claim_async(
        self,
        worker: str,
        *,
        queue: str = DEFAULT_QUEUE,
        tasks: Sequence[str] | None = None,
        limit: int = 1,
        lease: float | timedelta = 30.0,
    ) -> list[ClaimedJob]:
        """As `claim`, without blocking the event loop."""
        with suppress(LockNotWon):
            return await self._take_async(self._claim(worker, queue, tasks, limit, lease))
        return []

    def _claim(
        self, worker: str, queue: str, tasks: Sequence[str] | None, limit: int, lease: float | timedelta
    ) -> Steps[list[ClaimedJob]]:
        checked_name("queue", queue)
        if not isinstance(worker, str) or not worker or "\0" in worker or not is_unicode(worker):
            raise ConfigurationError(
                f"worker must be a name that is not empty, without NUL characters and lone surrogates, got {worker!r}"
            )
        names = None if tasks is None else checked_tasks(tasks)
        checked_limit(limit)
        seconds = lease_seconds(lease)
        if not self._limits_declared and (self.declared_limits or self._keeps_dead):
            yield from self._declare_limits(None)
        claim = functools.partial(self._claim_on, worker=worker, queue=queue, tasks=names, limit=limit, lease=seconds)
        sweeps = True
        for _ in range(CLAIM_ROUNDS_MAX):
            found = yield from change(functools.partial(claim, sweeps=sweeps))
            if found is not None and (found.jobs or not found.again):
                return found.jobs
            sweeps = False
        return []

    def _claim_on(
        self,
        connection: sa.Connection,
        worker: str,
        queue: str,
        tasks: Sequence[str] | None,
        limit: int,
        lease: float,
        *,
        sweeps: bool,
    ) -> within_limits.LimitedClaim | None:
        """None: something was swept, which is to be committed first. A claim under limits waits for others, and must
        not keep what it swept locked meanwhile."""
        if sweeps and self._sweep_on(connection, worker):
            return None
        found = within_limits.claim_as_needed(
            connection,
            self.tables,
            expect_limits=queue in self._limited,
            queue=queue,
            worker=worker,
            token=uuid.uuid4(),
            limit=limit,
            lease=lease,
            tasks=tasks,
        )
        if found.kept:
            self._limited.add(queue)
        else:
            self._limited.discard(queue)
        return found

    def _sweep_on(self, connection: sa.Connection, worker: str) -> bool:
        """Take back what expired, claims and jobs; whether there was something."""
        swept = store.sweep(connection, self.tables, limit=SWEEP_BEFORE_CLAIM, actor=worker).count
        if time.monotonic() >= self._look_for_expired_at:
            expired = len(expiry.expire(connection, self.tables, limit=SWEEP_BEFORE_CLAIM, actor=worker))
            swept += expired
            if expired < SWEEP_BEFORE_CLAIM:
                self._look_for_expired_at = time.monotonic() + EXPIRE_SECONDS
        return swept > 0

    def get_claim(self, job_id: int, token: uuid.UUID) -> ClaimedJob:
        """The job as the holder of this claim token has it: for a consumer that kept only the two, such as one behind
        a web service. Raises ClaimLost when the token is not, or no longer, that of the job; JobNotFound."""
        return self._take(self._get_claim(job_id, token))

    async def get_claim_async(self, job_id: int, token: uuid.UUID) -> ClaimedJob:
        """As `get_claim`, without blocking the event loop."""
        return await self._take_async(self._get_claim(job_id, token))

    def _get_claim(self, job_id: int, token: uuid.UUID) -> Steps[ClaimedJob]:
        return look(lambda connection: operations.get_claim(connection, self.tables, job_id, token))

    def ack(
        self,
        jobs: ClaimedJob | Iterable[ClaimedJob],
        *,
        result: Any = None,
        session: SyncTransaction | None = None,
    ) -> None:
        """The jobs are done: completed, with `result` (anything JSON can carry) stored in each.

        Commits by itself, or with `session` in your transaction: then your rows and the completion commit
        together. Raises ClaimLost when a claim was lost, naming the jobs; the others are completed all the same,
        unless you roll your session back.
        """
        self._take_in(session, "ack", self._ack(jobs, result))

    async def ack_async(
        self,
        jobs: ClaimedJob | Iterable[ClaimedJob],
        *,
        result: Any = None,
        session: AsyncTransaction | None = None,
    ) -> None:
        """As `ack`, without blocking the event loop; `session` is an AsyncSession or AsyncConnection."""
        await self._take_in_async(session, "ack_async", self._ack(jobs, result))

    def _ack(self, jobs: ClaimedJob | Iterable[ClaimedJob], result: Any) -> Steps[None]:
        result_json = None if result is None else encode_json(result, "result")
        return self._finish(jobs, lambda job: Completed(result_json))

    def nack(
        self,
        jobs: ClaimedJob | Iterable[ClaimedJob],
        *,
        delay: float | timedelta | None = None,
        error: str | BaseException | None = None,
        dead: bool = False,
        session: SyncTransaction | None = None,
    ) -> None:
        """Give the jobs back.

        Without `error`: pending again at once, or after `delay`, and no retry is charged.
        With `error`: the attempt failed. A retry is charged and waits `delay`, or the default backoff; without a
        retry left the job is dead. With `dead=True` it is dead now.
        Raises ClaimLost as `ack` does.
        """
        self._take_in(session, "nack", self._finish(jobs, _nack_outcome(delay, error, dead), delay))

    async def nack_async(
        self,
        jobs: ClaimedJob | Iterable[ClaimedJob],
        *,
        delay: float | timedelta | None = None,
        error: str | BaseException | None = None,
        dead: bool = False,
        session: AsyncTransaction | None = None,
    ) -> None:
        """As `nack`, without blocking the event loop; `session` is an AsyncSession or AsyncConnection."""
        finish = self._finish(jobs, _nack_outcome(delay, error, dead), delay)
        await self._take_in_async(session, "nack_async", finish)

    def extend(self, jobs: ClaimedJob | Iterable[ClaimedJob], *, lease: float | timedelta = 30.0) -> None:
        """Hold the jobs for `lease` more seconds from now. Raises ClaimLost, naming those that are held no more.

        Then `job.cancel_requested` says whether somebody asked the job to stop: an `ack` still completes it, a `nack`
        of any kind makes it cancelled.
        """
        self._take(self._extend(jobs, lease))

    async def extend_async(self, jobs: ClaimedJob | Iterable[ClaimedJob], *, lease: float | timedelta = 30.0) -> None:
        """As `extend`, without blocking the event loop."""
        await self._take_async(self._extend(jobs, lease))

    def _extend(self, jobs: ClaimedJob | Iterable[ClaimedJob], lease: float | timedelta) -> Steps[None]:
        chosen, seconds = _as_list(jobs), lease_seconds(lease)
        claims = [(job.id, job.claim_token) for job in chosen]
        held = yield from change(lambda connection: store.extend(connection, self.tables, claims, lease=seconds))
        for job in chosen:
            job.cancel_requested = held.get(job.id, job.cancel_requested)
        _require_written(chosen, held)

    def _finish(
        self,
        jobs: ClaimedJob | Iterable[ClaimedJob],
        outcome: Callable[[ClaimedJob], Outcome],
        delay: float | timedelta | None = None,
    ) -> Steps[None]:
        chosen = _as_list(jobs)
        written = yield from change(lambda connection: self._write(connection, chosen, outcome, delay))
        _require_written(chosen, written)

    def _write(
        self,
        connection: sa.Connection,
        jobs: Sequence[ClaimedJob],
        outcome: Callable[[ClaimedJob], Outcome],
        delay: float | timedelta | None,
    ) -> set[int]:
        transitions = []
        for job in jobs:
            transition = decide(job, outcome(job), _DEFAULT_RETRY, random=1.0)
            if delay is not None and transition.event is EventType.RETRY:
                transition = replace(transition, delay_seconds=delay_seconds(delay))
            known = self.tasks.get(job.task)
            if known is not None:
                transition.keep_seconds = known.definition.keep_seconds(transition.status)
            transitions.append(transition)
        actor = jobs[0].claimed_by if jobs else ""
        written = retention.finish(connection, self._tables_of(connection), transitions, actor=actor)
        if self._listeners.wanted:
            ends = [event for job, end in zip(jobs, transitions, strict=True) for event in events_of(end, job, None)]
            tell_after_commit(connection, lambda: self._listeners.tell(end for end in ends if end.job_id in written))
        return written


def _nack_outcome(
    delay: float | timedelta | None, error: str | BaseException | None, dead: bool
) -> Callable[[ClaimedJob], Outcome]:
    seconds = None if delay is None else delay_seconds(delay)
    if error is not None and not isinstance(error, str | BaseException):
        raise ConfigurationError(f"error must be a string or an exception, got {type(error).__name__}")
    if not isinstance(dead, bool):
        raise ConfigurationError(f"dead must be True or False, got {dead!r}")
    if isinstance(error, BaseException):
        info = describe(error)
    else:
        info = ErrorInfo("Nack", clean(error or "", MESSAGE_CHARACTERS_MAX))
    if dead:
        if seconds is not None:
            raise ConfigurationError("give either delay or dead=True, not both: a dead job does not run again")
        return lambda job: Discarded(info.message or "given up by its consumer", info)
    if error is None:
        return lambda job: Released("given back by its consumer", seconds)
    return lambda job: Failed(info)


def _as_list(jobs: ClaimedJob | Iterable[ClaimedJob]) -> list[ClaimedJob]:
    chosen: list[Any] = [jobs] if not isinstance(jobs, Iterable) else list(jobs)
    for job in chosen:
        if not isinstance(job, ClaimedJob):
            raise WrongSession(f"expected jobs as claim() returned them, got {type(job).__name__}")
    return chosen


def _require_written(jobs: Sequence[ClaimedJob], written: Collection[int]) -> None:
    lost = [job.id for job in jobs if job.id not in written]
    if lost:
        raise ClaimLost(
            f"the claim on job{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))} was lost: its lease ran out "
            "and it was claimed again, or it was finished or cancelled; nothing was written for it"
        )
