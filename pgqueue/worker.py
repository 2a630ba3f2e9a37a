"""A worker: threads around a synchronous core.

    claimer ──▶ slots (of each queue: a buffer, threads, the event loop) ──▶ finisher
    heartbeat: extends the leases of all jobs held        sweeper: takes back what dead workers held

The claimer fills buffers, slots run jobs, the finisher writes how they ended, in batches. The three overlap. The
heartbeat has a thread and a connection of its own, so neither a blocked task nor a blocked event loop stops it.

A job is *held* from its claim until its end is written. The heartbeat extends exactly the jobs held, so a job
that this process has forgotten lapses and is swept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgqueue import migration, store
from pgqueue.client import PgQueue
from pgqueue.config import WorkerConfig
from pgqueue.dialect import POSTGRESQL
from pgqueue.engine import describe_url, errors_explained, is_transient
from pgqueue.errors import ConfigurationError, IllegalTransition
from pgqueue.executor import execute, execute_async, outcome_of
from pgqueue.job import (
    ClaimedJob,
    Completed,
    ErrorInfo,
    EventType,
    JobStatus,
    Outcome,
    Released,
    Transition,
)
from pgqueue.loop import DatabaseLoop, LoopEnded
from pgqueue.notifier import WakeListener
from pgqueue.retry import decide
from pgqueue.slots import Slots
from pgqueue.task import TaskDefinition
from pgqueue.version import VERSION

logger = logging.getLogger(__name__)

#: The most jobs whose ends are written in one transaction.
FINISH_JOBS_MAX = 1_000

#: The most expired claims taken back in one statement.
SWEEP_JOBS_MAX = 500

#: The row of a worker that gave no sign of life for so long is dropped.
SILENT_WORKER_SECONDS = 3600.0

#: How long `abort` tries to give jobs back before the process goes.
ABORT_SECONDS = 2.0


@dataclass(slots=True)
class WorkerReport:
    """What a worker did, in attempts."""

    completed: int = 0
    retried: int = 0
    dead: int = 0  #: attempts and sweeps after which a job was dead
    cancelled: int = 0
    snoozed: int = 0
    released: int = 0
    lost: int = 0  #: claims that were lost: their outcome was refused
    swept: int = 0  #: claims of other workers taken back

    def count(self, transition: Transition) -> None:
        name = {
            None: "completed",
            EventType.RETRY: "retried",
            EventType.DEAD: "dead",
            EventType.CANCEL: "cancelled",
            EventType.SNOOZE: "snoozed",
            EventType.RELEASE: "released",
        }[transition.event]
        setattr(self, name, getattr(self, name) + 1)


class Worker:
    """Claims and runs the jobs of some queues until stopped.

    `run()` works in the calling thread until `stop()` or `abort()` is called from another thread or a signal
    handler; `start()` does the same in a thread of its own. A worker runs once.
    """

    def __init__(self, pgq: PgQueue, config: WorkerConfig | None = None) -> None:
        self.pgq = pgq
        self.config = config if config is not None else WorkerConfig()
        self.id = f"{self.config.name or socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.report = WorkerReport()
        self._definitions = {name: task.definition for name, task in pgq.tasks.items() if not task.external}
        if not self._definitions:
            raise ConfigurationError("this worker knows no tasks; register some with @pgq.task before it starts")
        self._held: dict[int, ClaimedJob] = {}
        self._finishing: set[int] = set()
        self._finished: queue.SimpleQueue[Transition | None] = queue.SimpleQueue()
        self._unwritten: list[Transition] = []
        self._unsure_claims: list[uuid.UUID] = []
        self._stop_requested = False
        self._abort_requested = False
        # What the running thread waits on. A SimpleQueue, because its put() is the one wake-up that a signal handler
        # may use while the same thread is waiting; an Event or Condition could deadlock.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._last_beat = time.monotonic()
        self._async_tasks: dict[int, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_slots: set[asyncio.Task[None]] = set()
        self._slots = {
            name: Slots(self, name, count, self.config.prefetch) for name, count in self.config.queues.items()
        }
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    # Life

    def run(self) -> WorkerReport:
        """Work until stopped (or, when draining, until the queues are empty). Raises when it cannot start."""
        self._require_schema()
        logger.info(
            "worker %s starts on %s: queues %s, tasks %s",
            self.id,
            describe_url(self.pgq.url),
            ", ".join(f"{name}={slots}" for name, slots in self.config.queues.items()),
            ", ".join(sorted(self._definitions)),
        )
        self._last_beat = time.monotonic()
        engine = self.pgq.engine
        self._claimer = DatabaseLoop("claim", engine, self._claim_step)
        self._finisher = DatabaseLoop("finish", engine, self._finish_step)
        self._heartbeat = DatabaseLoop("heartbeat", engine, self._heartbeat_step)
        self._sweeper = DatabaseLoop("sweep", engine, self._sweep_step)
        self._listener: WakeListener | None = None
        if self.config.listen and engine.dialect.name == POSTGRESQL:
            self._listener = WakeListener(engine, self.pgq.schema, self._woken)
        if any(definition.is_async for definition in self._definitions.values()):
            self._start_event_loop()
        for thread in (self._heartbeat, self._finisher, self._sweeper, self._claimer, self._listener):
            if thread is not None:
                thread.start()
        try:
            while not self._stop_requested:
                self._news.get()
        finally:
            self._shut_down()
        logger.info("worker %s stopped: %s", self.id, self.report)
        return self.report

    def start(self) -> Worker:
        """Run in a thread of its own; for workers inside an application."""

        def run() -> None:
            try:
                self.run()
            except BaseException as error:  # noqa: BLE001 — handed to join()
                self._failure = error

        self._thread = threading.Thread(target=run, name="pgqueue-worker", daemon=True)
        self._thread.start()
        return self

    def join(self, timeout: float | None = None) -> WorkerReport:
        """Wait until a started worker has stopped. Raises what stopped it, or TimeoutError."""
        assert self._thread is not None, "join() before start()"
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"worker {self.id} is still running after {timeout} s")
        if self._failure is not None:
            raise self._failure
        return self.report

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.join()

    def stop(self) -> None:
        """Claim nothing more, let running jobs end, give back what does not end in time.

        Returns at once. May be called from any thread and from a signal handler.
        """
        self._stop_requested = True
        self._news.put(None)

    def abort(self) -> None:
        """Give everything back now; running tasks are left to end with the process. Returns at once."""
        self._abort_requested = True
        self.stop()

    @property
    def stopping(self) -> bool:
        return self._stop_requested

    def _require_schema(self) -> None:
        with errors_explained(self.pgq.url), self.pgq.engine.connect() as connection:
            warning = migration.require_current(connection, self.pgq.schema)
        if warning:
            logger.warning("%s", warning)

    def _shut_down(self) -> None:
        """Stop claiming, keep the leases alive, wait for running jobs, give back the rest, write it all down."""
        self._claimer.stop()
        if self._listener is not None:
            self._listener.stop()
        self._claimer.join(ABORT_SECONDS)
        for slots in self._slots.values():
            for job in slots.close():
                self._finish(job, Released("the worker stopped before it started the job"))
        running = sum(slots.running for slots in self._slots.values())
        if running and not self._abort_requested:
            logger.info("waiting up to %g s for %d running jobs", self.config.shutdown_timeout, running)
            deadline = time.monotonic() + self.config.shutdown_timeout
            while (
                not self._abort_requested
                and any(slots.running for slots in self._slots.values())
                and (left := deadline - time.monotonic()) > 0
            ):
                with contextlib.suppress(queue.Empty):
                    self._news.get(timeout=left)
        self._stop_async_tasks()
        interrupted = [job for job in list(self._held.values()) if job.id not in self._finishing]
        for job in interrupted:
            self._finish(job, Released("the worker stopped while the job was running"))
        if interrupted:
            logger.warning("gave back %d jobs that did not end in time", len(interrupted))
        self._finished.put(None)
        self._finisher.stop()
        self._finisher.join(ABORT_SECONDS if self._abort_requested else 10.0)
        if self._finisher.is_alive():
            logger.error("the database cannot be reached: %d jobs stay claimed until their lease ends", len(self._held))
        for loop in (self._heartbeat, self._sweeper):
            loop.stop()
        for loop in (self._heartbeat, self._sweeper):
            loop.join(ABORT_SECONDS)
        if self._listener is not None:
            self._listener.join(ABORT_SECONDS)
        self._stop_event_loop()
        with contextlib.suppress(Exception), self.pgq.engine.begin() as connection:
            store.forget_worker(connection, self.pgq.tables, self.id)

    # Claiming

    def _claim_step(self, connection: sa.Connection) -> float:
        """Fill the buffers. Returns how long there is nothing to do."""
        self._release_unsure(connection)
        wait = self.config.poll_interval
        for slots in self._slots.values():
            if self.stopping:
                return 0.0
            wanted = self._wanted(slots)
            if wanted == 0:
                continue
            if time.monotonic() < slots.looks_empty_until:
                wait = min(wait, slots.looks_empty_until - time.monotonic())
                continue
            claimed = self._claim(connection, slots, wanted)
            if len(claimed) < wanted:
                slots.looks_empty_until = time.monotonic() + self.config.poll_interval
            else:
                wait = 0.0
        if self.config.drain and wait > 0 and not self._held:
            return self._drain_step(connection)
        return max(wait, 0.0)

    def _wanted(self, slots: Slots) -> int:
        wanted = slots.wanted()
        if self.config.max_jobs is not None:
            started = sum(other.started for other in self._slots.values())
            left = self.config.max_jobs - started
            if left <= 0 and not self._held:
                self.stop()
            wanted = max(0, min(wanted, left))
        return wanted

    def _claim(self, connection: sa.Connection, slots: Slots, limit: int) -> list[ClaimedJob]:
        token = uuid.uuid4()
        asked_at = time.monotonic()
        try:
            with connection.begin():
                claimed = store.claim(
                    connection,
                    self.pgq.tables,
                    queue=slots.name,
                    worker=self.id,
                    token=token,
                    limit=limit,
                    lease=self.config.lease,
                    tasks=sorted(self._definitions),
                )
        except BaseException:
            # The claim may have been committed although its answer did not arrive.
            self._unsure_claims.append(token)
            raise
        for job in claimed:
            self._held[job.id] = job
        slots.add(claimed, asked_at)
        return claimed

    def _release_unsure(self, connection: sa.Connection) -> None:
        while self._unsure_claims:
            with connection.begin():
                released = store.release_claim(connection, self.pgq.tables, self._unsure_claims[0], actor=self.id)
            self._unsure_claims.pop(0)
            if released:
                logger.info("gave back jobs %s, claimed just when the connection broke", released)

    def _drain_step(self, connection: sa.Connection) -> float:
        """When draining: stop if nothing is left to wait for; otherwise how long to wait."""
        with connection.begin():
            left = store.open_jobs(connection, self.pgq.tables, list(self.config.queues), sorted(self._definitions))
        if left.due == 0 and left.running == 0 and not self._held:
            self.stop()
            return 0.0
        for slots in self._slots.values():
            slots.looks_empty_until = 0.0
        wait = self.config.poll_interval
        if left.next_run_seconds is not None:
            wait = min(wait, max(left.next_run_seconds, 0.01))
        return wait

    def _woken(self, queue_name: str | None) -> None:
        for slots in self._slots.values():
            if queue_name is None or slots.name == queue_name:
                slots.looks_empty_until = 0.0
                self._claimer.wake()

    def room_again(self) -> None:
        self._claimer.wake()

    # Running

    def run_sync(self, job: ClaimedJob) -> None:
        """Run a `def` task in this thread, to its end in the finisher's hands."""
        definition = self._definitions[job.task]
        if definition.transactional:
            outcome = self._run_transactional(definition, job)
            if outcome is None:
                return
        else:
            outcome = execute(definition, job)
        self._finish(job, outcome)

    async def run_async(self, job: ClaimedJob) -> None:
        definition = self._definitions[job.task]
        running = asyncio.current_task()
        assert running is not None
        self._async_tasks[job.id] = running
        try:
            if definition.transactional:
                outcome = await self._run_transactional_async(definition, job)
                if outcome is None:
                    return
            else:
                outcome = await execute_async(definition, job)
        except asyncio.CancelledError:
            # The claim was lost, or the worker stops and gives the job back: either way nothing is to be written.
            while running.uncancel():
                pass
            return
        finally:
            self._async_tasks.pop(job.id, None)
        self._finish(job, outcome)

    def _run_transactional(self, definition: TaskDefinition, job: ClaimedJob) -> Outcome | None:
        """Run a task in the transaction that writes its completion. None when that was committed or refused."""
        try:
            with (
                self.pgq.engine.connect() as connection,
                Session(connection, expire_on_commit=False) as session,
            ):
                guard = _CommitGuard(session, definition)
                outcome = execute(definition, job, session)
                if not isinstance(outcome, Completed):
                    session.rollback()
                    return outcome
                session.flush()
                self._finishing.add(job.id)
                written = self._complete_in(session.connection(), definition, job, outcome)
                guard.open = written
                if written:
                    session.commit()
                else:
                    session.rollback()
        except BaseException as error:  # noqa: BLE001 — the task's rows, or the commit, were refused
            # After a commit whose answer was lost this may be a completed job: then its claim is over, and the
            # fence refuses what the finisher is about to write.
            self._finishing.discard(job.id)
            return outcome_of(error)
        self._settle_transactional(job, definition, outcome, written)
        return None

    async def _run_transactional_async(self, definition: TaskDefinition, job: ClaimedJob) -> Outcome | None:
        try:
            async with AsyncSession(self.pgq.async_engine, expire_on_commit=False) as session:
                guard = _CommitGuard(session.sync_session, definition)
                outcome = await execute_async(definition, job, session)
                if not isinstance(outcome, Completed):
                    await session.rollback()
                    return outcome
                await session.flush()
                self._finishing.add(job.id)
                written = await session.run_sync(
                    lambda sync: self._complete_in(sync.connection(), definition, job, outcome)
                )
                guard.open = written
                if written:
                    await session.commit()
                else:
                    await session.rollback()
        except asyncio.CancelledError:
            self._finishing.discard(job.id)
            raise
        except BaseException as error:  # noqa: BLE001 — as above
            self._finishing.discard(job.id)
            return outcome_of(error)
        self._settle_transactional(job, definition, outcome, written)
        return None

    def _complete_in(
        self, connection: sa.Connection, definition: TaskDefinition, job: ClaimedJob, outcome: Completed
    ) -> bool:
        """Complete the job in the task's own transaction; False when its claim was lost."""
        if connection.dialect.name == POSTGRESQL:
            # From here to the commit the job's row is locked. Should this process freeze in between, the server
            # ends the transaction, so that the job can be swept.
            milliseconds = str(int(self.config.lease * 1000))
            connection.execute(
                sa.text("SELECT set_config('idle_in_transaction_session_timeout', :timeout, true)"),
                {"timeout": milliseconds},
            )
        transition = decide(job, outcome, definition.retry, random=0.0)
        return bool(store.finish(connection, self.pgq.tables, [transition], actor=self.id))

    def _settle_transactional(
        self, job: ClaimedJob, definition: TaskDefinition, outcome: Completed, written: bool
    ) -> None:
        transition = decide(job, outcome, definition.retry, random=0.0)
        self._settle([transition], {job.id} if written else set())

    # Finishing

    def _finish(self, job: ClaimedJob, outcome: Outcome) -> None:
        """Hand over how an attempt ended. The fence sees to it that of two ends only one is written."""
        policy = self._definitions[job.task].retry
        transition = decide(job, outcome, policy, random.random())  # noqa: S311 — jitter
        if transition.event in (EventType.RETRY, EventType.DEAD):
            logger.log(
                logging.WARNING if transition.event is EventType.RETRY else logging.ERROR,
                "task %s, job %d, attempt %d failed with %s: %s",
                job.task,
                job.id,
                job.attempt,
                transition.error.type if transition.error else "no error",
                transition.reason,
            )
        self._finishing.add(job.id)
        self._finished.put(transition)

    def _finish_step(self, connection: sa.Connection) -> float:
        """Write what has ended since the last time, in one transaction. Keeps it when that fails."""
        batch = self._unwritten
        if not batch:
            first = self._finished.get()
            if first is None:
                raise LoopEnded
            batch.append(first)
        while len(batch) < FINISH_JOBS_MAX:
            try:
                more = self._finished.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self._finished.put(None)  # it ends the loop, once all before it is written
                break
            batch.append(more)
        self._settle(batch, self._write(connection, batch))
        self._unwritten = []
        return 0.0

    def _write(self, connection: sa.Connection, batch: list[Transition]) -> set[int]:
        try:
            with connection.begin():
                return store.finish(connection, self.pgq.tables, batch, actor=self.id)
        except Exception as error:
            if is_transient(error):
                raise
            logger.error(
                "the ends of %d jobs could not be written together (%s); writing them one by one",
                len(batch),
                type(error).__name__,
            )
        return {job_id for transition in batch for job_id in self._write_singly(connection, transition)}

    def _write_singly(self, connection: sa.Connection, transition: Transition) -> set[int]:
        """Write one end; when the database refuses what it carries, a plain one that it cannot refuse."""
        try:
            with connection.begin():
                return store.finish(connection, self.pgq.tables, [transition], actor=self.id)
        except Exception as error:
            if is_transient(error):
                raise
            logger.error("the database refused how job %d ended: %s", transition.job_id, type(error).__name__)
            refused = ErrorInfo(
                "Refused", f"the database refused to store how the attempt ended: {type(error).__name__}"
            )
        plain = Transition(
            transition.job_id,
            transition.claim_token,
            transition.attempt,
            JobStatus.DEAD,
            EventType.DEAD,
            error=refused,
            reason="the attempt's result or error could not be stored",
        )
        with connection.begin():
            return store.finish(connection, self.pgq.tables, [plain], actor=self.id)

    def _settle(self, transitions: Iterable[Transition], written: set[int]) -> None:
        """Let go of jobs whose end was written or refused."""
        for transition in transitions:
            if transition.job_id in written:
                self.report.count(transition)
            else:
                self._count_lost(transition.job_id, transition.attempt)
            held = self._held.get(transition.job_id)
            if held is not None and held.claim_token == transition.claim_token:
                del self._held[transition.job_id]
            self._finishing.discard(transition.job_id)
        if self.config.max_jobs is not None or self.config.drain:
            self._claimer.wake()

    def _count_lost(self, job_id: int, attempt: int) -> None:
        self.report.lost += 1
        logger.warning(
            "claim lost: job %d was taken from this worker (lease over, cancelled, or already finished); the outcome "
            "of its attempt %d changes nothing",
            job_id,
            attempt,
        )

    def slot_freed(self) -> None:
        if self.stopping:
            self._news.put(None)

    def claim_is_stale(self, asked_at: float) -> bool:
        """Whether a claim made then may have run out: the process was frozen, or no heartbeat got through."""
        return time.monotonic() > max(asked_at, self._last_beat) + self.config.lease

    def drop_stale(self, job: ClaimedJob) -> None:
        self._finish(job, Released("its lease may have run out before it was started"))

    # Heartbeat and sweep

    def _heartbeat_step(self, connection: sa.Connection) -> float:
        """Extend the leases of all jobs held, and let go of those that were lost."""
        asked_at = time.monotonic()
        held = {job_id: job for job_id, job in list(self._held.items()) if job_id not in self._finishing}
        with connection.begin():
            kept = (
                store.extend(
                    connection,
                    self.pgq.tables,
                    [(job.id, job.claim_token) for job in held.values()],
                    lease=self.config.lease,
                )
                if held
                else set()
            )
            store.beat(connection, self.pgq.tables, self._row())
        self._last_beat = asked_at
        for job_id, job in held.items():
            if job_id not in kept and self._held.get(job_id) is job and job_id not in self._finishing:
                self._lose(job)
        return self.config.heartbeat_seconds

    def _lose(self, job: ClaimedJob) -> None:
        del self._held[job.id]
        logger.warning(
            "claim lost: job %d (task %s) was taken from this worker while it was running; it is stopped if it can be",
            job.id,
            job.task,
        )
        running = self._async_tasks.get(job.id)
        if running is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(running.cancel)

    def _row(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": VERSION,
            "queues": dict(self.config.queues),
            "tasks": sorted(self._definitions),
        }

    def _sweep_step(self, connection: sa.Connection) -> float:
        """Take back the jobs of dead workers."""
        with connection.begin():
            swept = store.sweep(connection, self.pgq.tables, limit=SWEEP_JOBS_MAX, actor=self.id)
            store.forget_silent_workers(connection, self.pgq.tables, seconds=SILENT_WORKER_SECONDS)
        if swept.count:
            self.report.swept += swept.count
            self.report.dead += len(swept.dead)
            logger.warning(
                "took back %d jobs whose lease had run out: %d pending again, %d dead",
                swept.count,
                len(swept.returned),
                len(swept.dead),
            )
            self._woken(None)
        return 0.0 if swept.count == SWEEP_JOBS_MAX else self.config.sweep_interval

    # The event loop for `async def` tasks

    def _start_event_loop(self) -> None:
        ready = threading.Event()

        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._loop_end = asyncio.Event()
            ready.set()
            await self._loop_end.wait()

        self._loop_thread = threading.Thread(target=asyncio.run, args=(main(),), name="pgqueue-async", daemon=True)
        self._loop_thread.start()
        ready.wait()

    def call_in_loop(self, slots: Slots, job: ClaimedJob, asked_at: float) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._create_slot, slots, job, asked_at)

    def _create_slot(self, slots: Slots, job: ClaimedJob, asked_at: float) -> None:
        assert self._loop is not None
        slot = self._loop.create_task(slots.run_in_loop(job, asked_at))
        self._loop_slots.add(slot)  # the loop itself keeps only a weak reference
        slot.add_done_callback(self._loop_slots.discard)

    def _stop_async_tasks(self) -> None:
        for running in list(self._async_tasks.values()):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(running.cancel)

    def _stop_event_loop(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop_end.set)
            self._loop_thread.join(ABORT_SECONDS)

    def is_async(self, job: ClaimedJob) -> bool:
        return self._definitions[job.task].is_async


class _CommitGuard:
    """Keeps a transactional task from committing its session itself, which would part its rows from its
    completion."""

    def __init__(self, session: Session, definition: TaskDefinition) -> None:
        self.open = False
        self._name = definition.name
        event.listen(session, "before_commit", self._before_commit)

    def _before_commit(self, session: Session) -> None:
        if not self.open and not session.in_nested_transaction():
            raise IllegalTransition(
                f"the transactional task {self._name!r} committed its session; leave that to the worker, which commits "
                "it together with the job's completion"
            )
