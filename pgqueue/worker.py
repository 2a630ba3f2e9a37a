"""A worker: threads around a synchronous core.

    claimer ──▶ slots (of each queue: a buffer, threads, the event loop) ──▶ finisher
    heartbeat: extends the leases of all jobs held        sweeper: takes back what dead workers held
    scheduler: enqueues what schedules say

The claimer fills buffers, slots run jobs, the finisher writes how they ended, in batches. The three overlap. The
heartbeat has a thread and a connection of its own, so neither a blocked task nor a blocked event loop stops it.

A job is *held* from its claim until its end is written. The heartbeat extends exactly the jobs held, so a job
that this process has forgotten lapses and is swept. An attempt ends once: whoever marks its hold as ending first,
be it the task's outcome or the worker giving the job back, is the one who writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import queue
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from pgqueue import expiry, limits, migration, reporting, results, retention, sharing, store, uniqueness
from pgqueue.client import PgQueue
from pgqueue.config import WorkerConfig
from pgqueue.deadlines import Deadlines
from pgqueue.dialect import POSTGRESQL
from pgqueue.engine import (
    committing_each,
    describe_url,
    end_if_frozen,
    is_in_memory,
    is_refusal,
    is_transient,
    looking,
    make_async_engine,
    parse_url,
)
from pgqueue.errors import ConfigurationError, IllegalTransition
from pgqueue.events import DELIVER_SECONDS, EventName, event_of, events_of, events_of_expired, events_of_swept
from pgqueue.executor import cancelled_itself, execute, execute_async, outcome_of, timed_out
from pgqueue.isolation import Processes, reference_of
from pgqueue.job import (
    ASKED_TO_STOP,
    Cancelled,
    ClaimedJob,
    Completed,
    ErrorInfo,
    EventType,
    Expired,
    JobStatus,
    Outcome,
    Released,
    SweepResult,
    Transition,
)
from pgqueue.lanes import Lanes
from pgqueue.loop import DatabaseLoop, LoopEnded, Outage, TaskLoop
from pgqueue.middleware import wrapped
from pgqueue.notifier import STOP, WakeListener
from pgqueue.retry import Retry, decide
from pgqueue.scheduler import Scheduler
from pgqueue.slots import OVERDUE_SECONDS, Slots
from pgqueue.task import TaskDefinition
from pgqueue.version import VERSION

logger = logging.getLogger(__name__)

#: The most jobs whose ends are written in one transaction.
FINISH_JOBS_MAX = 1_000

#: Of these, about so many characters of results and errors: beyond a gigabyte the server hangs up.
FINISH_CHARACTERS_MAX = 8 * 1024 * 1024

#: The most expired claims taken back in one statement.
SWEEP_JOBS_MAX = 500

#: How often a worker that holds jobs looks whether somebody wants one of them stopped, should no notification say so.
LOOK_SECONDS = 1.0

#: Between two writes of progress.
PROGRESS_SECONDS = 1.0

#: How long the end of a job waits for a write of progress that is under way.
PROGRESS_WAIT_SECONDS = 1.0

#: For ever.
IDLE_SECONDS = 3_600.0

#: The row of a worker that gave no sign of life for so long is dropped.
SILENT_WORKER_SECONDS = 3600.0

#: That is looked for so often.
FORGET_SECONDS = 300.0

#: Periods of uniqueness that are over, deleted by one step of the sweep at most.
PERIODS_MAX = 5_000

#: The system may deliver a signal to any thread, but Python handles it in the main thread, once that one moves. So
#: the main thread never waits longer than this.
SIGNAL_SECONDS = 0.5

#: How long a stopping worker tries to write how its last jobs ended.
FINISH_SECONDS = 10.0

#: How long `abort` tries to give jobs back before the process goes.
ABORT_SECONDS = 2.0

#: Another worker that gave no sign of life for so many of this one's leases is not there.
SILENT_LEASES = 2

#: The first wait of a draining worker for due jobs that it could not claim; it doubles up to the poll interval.
DRAIN_SECONDS_MIN = 0.01

STOPPED_UNSTARTED = Released("the worker stopped before it started the job")
OVERDUE = Released("it waited behind long jobs while another worker may have been free")
STOPPED_RUNNING = Released("the worker stopped while the job was running")
STOPPED_ON_REQUEST = Cancelled(ASKED_TO_STOP)
UNSTARTED_ON_REQUEST = Cancelled("it was asked to stop before it was started")
EXPIRED = Expired()
STALE = Released("its lease may have run out before it was started")
TAKEN = "it was taken from this worker before its attempt ended"
OUTCOME_REFUSED = "it was taken from this worker; the outcome of the attempt was refused"
NOT_BEGUN = Released("the database could not be reached to begin the task's transaction", delay_seconds=1.0)


@dataclass(slots=True)
class WorkerReport:
    """What a worker did, in attempts."""

    completed: int = 0
    retried: int = 0
    dead: int = 0  #: attempts and sweeps after which a job was dead
    cancelled: int = 0  #: attempts and sweeps after which a job was cancelled
    snoozed: int = 0
    released: int = 0
    lost: int = 0  #: claims that were lost: their outcome was refused
    swept: int = 0  #: claims of other workers taken back

    def count(self, transition: Transition) -> None:
        name = COUNTED[transition.event]
        setattr(self, name, getattr(self, name) + 1)

    def __str__(self) -> str:
        counts = asdict(self).items()
        return ", ".join(f"{count} {name}" for name, count in counts if count) or "nothing done"


#: The field of a report that counts attempts with this event.
COUNTED: dict[EventType | None, str] = {
    None: "completed",
    EventType.RETRY: "retried",
    EventType.DEAD: "dead",
    EventType.EXPIRE: "dead",
    EventType.CANCEL: "cancelled",
    EventType.SNOOZE: "snoozed",
    EventType.RELEASE: "released",
}


@dataclass(slots=True, eq=False)
class _Hold:
    """One claim of this worker, from when it was made until its end is written."""

    expires: ClassVar[float] = math.inf
    ran_seconds: ClassVar[float | None] = None

    job: ClaimedJob
    sure_until: float  #: monotonic; its lease lasts at least so long
    #: Locked when how it ends is decided and being written. A lock because exactly one of many threads gets it.
    _ending: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ending(self) -> bool:
        return self._ending.locked()

    def begin(self) -> None:
        """Its task is about to run."""

    def begin_end(self) -> bool:
        """Whether the caller is the one to write how it ends."""
        return self._ending.acquire(blocking=False)

    def take_back_end(self) -> None:
        self._ending.release()


class _TimedHold(_Hold):
    """One whose job expires, or of which listeners are told how long it ran. Most need to know neither."""

    __slots__ = ("_began", "expires", "ran_seconds")

    def __init__(self, job: ClaimedJob, sure_until: float, expires: float) -> None:
        super().__init__(job, sure_until)
        self.expires = expires  # type: ignore[misc]  # monotonic; not to be started from then on
        self._began: float | None = None
        self.ran_seconds = None  # type: ignore[misc]

    def begin(self) -> None:
        self._began = time.monotonic()

    def begin_end(self) -> bool:
        first = super().begin_end()
        if first and self._began is not None:
            self.ran_seconds = time.monotonic() - self._began  # type: ignore[misc]
        return first


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
        self._definitions = {
            name: with_middleware(task.definition, pgq) for name, task in pgq.tasks.items() if not task.external
        }
        self._listeners = pgq._listeners
        self._task_names = sorted(self._definitions)
        self._retains = any(definition.retains for definition in self._definitions.values())
        if not self._definitions:
            raise ConfigurationError("this worker knows no tasks; register some with @pgq.task before it starts")
        self._reports = reporting.Reports(self._report_waits)
        self._progress_loop: DatabaseLoop | None = None  # started with the first report
        self._reports_ended = False
        self._writing_progress = threading.Lock()
        self._lock = threading.Lock()  # guards changes of the holds, and the report
        self._held: dict[int, _Hold] = {}
        self._finished: queue.SimpleQueue[Transition | None] = queue.SimpleQueue()
        self._unwritten: list[Transition] = []
        self._unsure_claims: list[uuid.UUID] = []
        self._stop_requested = False
        self._abort_requested = False
        # What the running thread waits on. A SimpleQueue, because its put() is the one wake-up that a signal handler
        # may use while the same thread is waiting; an Event or Condition could deadlock.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._last_beat = time.monotonic()
        self._forget_at = time.monotonic()
        self._next_beat = 0.0
        self._drain_wait = DRAIN_SECONDS_MIN
        self._async_jobs: dict[ClaimedJob, asyncio.Task[Any]] = {}
        self._async_stopped: dict[ClaimedJob, Outcome] = {}  # of those, the ones that this worker cancelled, and why
        self._deadlines = Deadlines()
        self._processes = Processes()
        self._isolated = {
            name: reference_of(pgq.tasks[name], pgq.tasks[name].definition)
            for name, definition in self._definitions.items()
            if definition.isolation is not None
        }
        self._task_loop: TaskLoop | None = None
        self._async_engine: AsyncEngine | None = None
        self._slots = {
            name: Slots(self, name, count, self.config.prefetch) for name, count in self.config.queues.items()
        }
        self._on_postgresql = pgq.engine.dialect.name == POSTGRESQL
        self._limited: set[str] = set()  # queues whose claims have to keep limits
        self._lanes = {name: Lanes() for name in self.config.queues if self._on_postgresql}
        self._ran = False
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    # Life

    def run(self) -> WorkerReport:
        """Work until stopped (or, when draining, until the queues are empty). Raises when it cannot start."""
        if self._ran:
            raise RuntimeError(f"worker {self.id} has run already; a worker runs once, make a new one")
        self._ran = True
        self._require_database()
        if any(definition.is_async and definition.transactional for definition in self._definitions.values()):
            # Of this worker's event loop alone: connections cannot be shared with the application's own loop.
            self._async_engine = make_async_engine(parse_url(self.pgq.url), pool_size=0)
        logger.info(
            "worker %s starts on %s: queues %s, tasks %s",
            self.id,
            describe_url(self.pgq.url),
            ", ".join(f"{name}={slots}" for name, slots in self.config.queues.items()),
            ", ".join(self._task_names),
        )
        self._last_beat = time.monotonic()
        engine = self.pgq.engine
        outage, frozen_after = Outage(self.pgq.url), self.config.lease
        self._claimer = DatabaseLoop("claim", engine, self._claim_step, outage, frozen_after)
        self._finisher = DatabaseLoop("finish", engine, self._finish_step, outage, frozen_after)
        self._heartbeat = DatabaseLoop("heartbeat", engine, self._heartbeat_step, outage, frozen_after)
        self._sweeper = DatabaseLoop("sweep", engine, self._sweep_step, outage, frozen_after)
        self._outage = outage
        reporting.reporters[self.id] = self._report_progress
        self._scheduler: DatabaseLoop | None = None
        if self.config.schedules and not self.config.drain:
            scheduler = Scheduler(
                self.pgq.tables,
                self.pgq.tasks,
                list(self.pgq.declared_schedules.values()),
                actor=self.id,
                enqueued=self._enqueued,
            )
            self._scheduler = DatabaseLoop("schedule", engine, scheduler.step, outage, frozen_after)
        self._listener: WakeListener | None = None
        if self.config.listen and engine.dialect.name == POSTGRESQL:
            self._listener = WakeListener(engine, self.pgq.schema, self._woken)
        if any(definition.runs_in_loop for definition in self._definitions.values()):
            self._task_loop = TaskLoop(at_end=self._dispose_async_engine)
        duties = (
            self._task_loop,
            self._heartbeat,
            self._finisher,
            self._sweeper,
            self._claimer,
            self._scheduler,
            self._listener,
        )
        for thread in duties:
            if thread is not None:
                thread.start()
        try:
            while not self._stop_requested:
                self._wait_for_news(SIGNAL_SECONDS)
        finally:
            self._shut_down()
            self._listeners.deliver(ABORT_SECONDS if self._abort_requested else DELIVER_SECONDS)
        logger.info("worker %s stopped: %s", self.id, self.report)
        return self.report

    def start(self) -> Worker:
        """Run in a thread of its own; for workers inside an application."""

        def run() -> None:
            try:
                self.run()
            except BaseException as error:  # noqa: BLE001 — handed to join()
                logger.error("worker %s cannot run: %s: %s", self.id, type(error).__name__, error)
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

    def _require_database(self) -> None:
        if is_in_memory(self.pgq.url):
            raise ConfigurationError(
                "a worker cannot use a SQLite database in memory: its threads need connections, and transactions, of "
                "their own. Use a file, such as sqlite:///jobs.db"
            )
        with self.pgq.reading() as connection:
            warning = migration.require_current(connection, self.pgq.schema)
        if warning:
            logger.warning("%s", warning)
        self.pgq.declare_limits(self._task_names)

    def _shut_down(self) -> None:
        """Stop claiming, keep the leases alive, wait for running jobs, give back the rest, write it all down."""
        self._claimer.stop()
        for helper in (self._scheduler, self._listener):
            if helper is not None:
                helper.stop()
        self._claimer.join(ABORT_SECONDS)
        for slots in self._slots.values():
            for job in slots.close():
                self._finish(job, STOPPED_UNSTARTED)
        if self._running():
            logger.info("waiting up to %g s for running jobs", self.config.shutdown_timeout)
        self._wait_while(lambda: self._running() and not self._abort_requested, self.config.shutdown_timeout)
        self._stop_async_jobs()
        self._stop_isolated_jobs()
        interrupted = [hold.job for hold in list(self._held.values()) if not hold.ending]
        for job in interrupted:
            self._finish(job, STOPPED_RUNNING)
        if interrupted:
            logger.warning("gave back %d jobs that did not end in time", len(interrupted))
        # Not stop(): the finisher ends by itself, when it has written everything up to here.
        self._finished.put(None)
        self._finisher.join(ABORT_SECONDS if self._abort_requested else FINISH_SECONDS)
        written = not self._finisher.is_alive()
        if not written:
            self._finisher.stop()
            logger.error("the database cannot be reached: %d jobs stay claimed until their lease ends", len(self._held))
        reporting.reporters.pop(self.id, None)
        with self._lock:
            self._reports_ended = True
        others = (self._progress_loop, self._heartbeat, self._sweeper, self._task_loop, self._scheduler, self._listener)
        ending = [thread for thread in others if thread]
        for thread in ending:
            thread.stop()
        for thread in ending:
            thread.join(ABORT_SECONDS)
        self._deadlines.stop()
        self._processes.close()
        if written:
            self._leave()

    def _running(self) -> bool:
        return any(slots.running for slots in self._slots.values())

    def _wait_while(self, busy: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while busy() and (left := deadline - time.monotonic()) > 0:
            self._wait_for_news(min(left, SIGNAL_SECONDS))

    def _wait_for_news(self, seconds: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._news.get(timeout=seconds)

    def _stop_async_jobs(self) -> None:
        """Cancel the `async def` tasks, and give them a moment to end."""
        if self._task_loop is not None:
            for job in list(self._async_jobs):
                self._task_loop.call(self._cancel_async_job, job, STOPPED_RUNNING)
            self._wait_while(lambda: bool(self._async_jobs), ABORT_SECONDS)

    def _stop_isolated_jobs(self) -> None:
        """Kill the processes of isolated tasks before their jobs are given back; their slots give them back."""
        jobs = self._processes.busy
        for job in jobs:
            self._processes.stop(job, STOPPED_RUNNING)
        self._wait_while(
            lambda: any((hold := self._hold_of(job)) is not None and not hold.ending for job in jobs), ABORT_SECONDS
        )

    def _leave(self) -> None:
        """Give back what may have been claimed unseen, and strike this worker off the list."""
        try:
            with self.pgq.engine.connect() as connection:
                if not self._claimer.is_alive():
                    self._release_unsure(connection)
                with connection.begin():
                    store.forget_worker(connection, self.pgq.tables, self.id)
        except Exception as error:  # noqa: BLE001 — everything that matters is written
            logger.info("worker %s could not be struck off the list: %s", self.id, type(error).__name__)

    # Claiming

    def _claim_step(self, connection: sa.Connection) -> float:
        """Fill the buffers. Returns how long there is nothing to do."""
        self._release_unsure(connection)
        wait = self.config.poll_interval
        for slots in self._slots.values():
            if self.stopping:
                return wait
            self._give_back_overdue(connection, slots)
            if self._wanted(slots) > 0:
                if time.monotonic() >= slots.looks_empty_until:
                    self._fill(connection, slots)
                wait = min(wait, slots.looks_empty_until - time.monotonic())
            if slots.holds_ahead:
                wait = min(wait, OVERDUE_SECONDS)
        if self.config.drain and wait > 0 and not self._held:
            return self._drain_step(connection)
        return max(wait, 0.0)

    def _give_back_overdue(self, connection: sa.Connection, slots: Slots) -> None:
        """Give back what waits in the buffer behind long jobs, should another worker be free to run it."""
        overdue = slots.overdue()
        if not overdue or not slots.may_ask_others():
            return
        began = time.monotonic()
        with looking(connection):
            free = sharing.others_may_be_free(
                connection,
                self.pgq.tables,
                queue=slots.name,
                worker=self.id,
                tasks=self._task_names,
                seconds=self.config.lease * SILENT_LEASES,
            )
        slots.asked_others(free=free, seconds=time.monotonic() - began)
        given_back = slots.take_back(overdue) if free else []
        for job in given_back:
            self._finish(job, OVERDUE)
        if given_back:
            logger.info("queue %s: gave back %d jobs that waited behind long ones", slots.name, len(given_back))

    def _wanted(self, slots: Slots) -> int:
        wanted = slots.wanted()
        if self.config.max_jobs is not None:
            started = sum(other.started for other in self._slots.values())
            left = self.config.max_jobs - started
            if left <= 0 and not self._held:
                self.stop()
            wanted = max(0, min(wanted, left))
        return wanted

    def _fill(self, connection: sa.Connection, slots: Slots) -> None:
        """Claim what the slots of a queue want, and say when to try again."""
        told = slots.looks_empty_until == 0.0
        # Said before asking: a wake-up that comes while the claim is under way must not be overwritten after it.
        slots.looks_empty_until = time.monotonic() + self.config.poll_interval
        if slots.name not in self._limited:
            self._fill_plainly(connection, slots, told)
        if slots.name in self._limited:
            self._fill_within_limits(connection, slots)

    def _fill_plainly(self, connection: sa.Connection, slots: Slots, told: bool) -> None:
        lanes = self._lanes.get(slots.name)
        if lanes is None:
            before = slots.started
            found_all = self._claim(connection, slots)
            if slots.started == before and self._are_limited(connection, slots):
                self._limited.add(slots.name)
        else:
            # What a worker is told of lies behind the marks, as a rule.
            goes_on = lanes.known and (told or not lanes.may_look())
            found_all = goes_on and self._claim(connection, slots, lanes)
            if lanes.may_look() and (not found_all or lanes.should_look()):
                pending = self._look(connection, slots, lanes)
                found_all = found_all or (pending and self._claim(connection, slots, lanes))
            elif not found_all:
                slots.looks_empty_until = min(slots.looks_empty_until, lanes.look_allowed_at)
        if found_all:
            slots.looks_empty_until = 0.0

    def _fill_within_limits(self, connection: sa.Connection, slots: Slots) -> None:
        found = limits.LimitedClaim()

        def claim(**asked: Any) -> list[ClaimedJob]:
            nonlocal found
            with connection.begin():
                found = limits.claim(connection, self.pgq.tables, **asked)
            return found.jobs

        found_all = self._claim_with(connection, slots, claim)
        if not found.kept:
            self._limited.discard(slots.name)
        if found_all or found.again or not found.kept:
            slots.looks_empty_until = 0.0
        elif found.next_token_seconds is not None:
            slots.looks_empty_until = min(slots.looks_empty_until, time.monotonic() + found.next_token_seconds)

    def _are_limited(self, connection: sa.Connection, slots: Slots) -> bool:
        with connection.begin():
            return limits.are_kept(connection, self.pgq.tables, queue=slots.name, tasks=self._task_names)

    def _look(self, connection: sa.Connection, slots: Slots, lanes: Lanes) -> bool:
        """Let the next claim begin at the front of each lane; False when nothing is pending."""
        began = time.monotonic()
        with committing_each(connection):
            pending, limited = store.lanes(connection, self.pgq.tables, queue=slots.name, tasks=self._task_names)
        if limited:
            self._limited.add(slots.name)
        lanes.looked(pending, began, time.monotonic())
        return bool(pending)

    def _claim(self, connection: sa.Connection, slots: Slots, lanes: Lanes | None = None) -> bool:
        """Claim as many jobs of a queue as its slots want, and put them there; whether there were so many."""

        def claim(**asked: Any) -> list[ClaimedJob]:
            marks = lanes.marks() if lanes is not None else None
            with committing_each(connection):
                claimed = store.claim(connection, self.pgq.tables, marks=marks, **asked)
            if lanes is not None:
                lanes.claimed(claimed)
            return claimed

        return self._claim_with(connection, slots, claim)

    def _claim_with(self, connection: sa.Connection, slots: Slots, claim: Callable[..., list[ClaimedJob]]) -> bool:
        limit = self._wanted(slots)
        if limit == 0:
            return True
        token = uuid.uuid4()
        asked_at = time.monotonic()
        try:
            claimed = claim(
                queue=slots.name,
                worker=self.id,
                token=token,
                limit=limit,
                lease=self.config.lease,
                tasks=self._task_names,
                flush=False,
            )
        except BaseException:
            # The claim may have been committed although its answer did not arrive.
            self._unsure_claims.append(token)
            slots.looks_empty_until = 0.0
            raise
        if claimed:
            self._drain_wait = DRAIN_SECONDS_MIN
        self._hold(claimed, asked_at)
        if not slots.add(claimed):  # the claim took so long that the worker stopped meanwhile
            self._unsure_claims.append(token)
            self._release_unsure(connection)
        if len(claimed) == limit:
            slots.found_all_at = time.monotonic()
            return True
        return False

    def _hold(self, claimed: Sequence[ClaimedJob], asked_at: float) -> None:
        """Count these jobs as held; the claim was asked for at that moment of the monotonic clock."""
        sure_until = asked_at + self.config.lease
        listening = bool(self._listeners.wanted)
        older = []
        with self._lock:
            for job in claimed:
                if job.id in self._held:
                    older.append(self._held[job.id])
                if job.expires_in is None and not listening:
                    self._held[job.id] = _Hold(job, sure_until)
                else:
                    expires = math.inf if job.expires_in is None else asked_at + job.expires_in
                    self._held[job.id] = _TimedHold(job, sure_until, expires)
        for hold in older:
            # A job that was given back may be claimed again before its end is settled here; nothing is lost then.
            if hold.begin_end():
                self._report_lost(hold.job)

    def _release_unsure(self, connection: sa.Connection) -> None:
        while self._unsure_claims:
            with connection.begin():
                released = store.release_claim(connection, self.pgq.tables, self._unsure_claims[0], actor=self.id)
            self._unsure_claims.pop(0)
            if released:
                logger.info("gave back jobs %s, claimed just when the connection broke", released)

    def _drain_step(self, connection: sa.Connection) -> float:
        """When draining: stop if nothing is left to wait for; otherwise how long to wait."""
        self._expire(connection)
        with connection.begin():
            left = store.open_jobs(connection, self.pgq.tables, list(self.config.queues), sorted(self._definitions))
        if left.due == 0 and left.running == 0 and not self._held:
            self.stop()
            return self.config.poll_interval
        for slots in self._slots.values():
            slots.looks_empty_until = time.monotonic()
        wait = self.config.poll_interval
        if left.next_run_seconds is not None:
            # Jobs may be due and yet out of reach (a paused queue, a locked row): look for them less and less often.
            wait = min(wait, max(left.next_run_seconds, self._drain_wait))
            self._drain_wait = min(self._drain_wait * 2, self.config.poll_interval)
        return wait

    def _woken(self, told: str | None) -> None:
        if told is not None and told.startswith(STOP):
            self._told_to_stop(told.removeprefix(STOP))
            return
        for slots in self._slots.values():
            if told is None or slots.name == told:
                slots.looks_empty_until = 0.0
                self._claimer.wake()

    def _enqueued(self, queues: set[str]) -> None:
        """Jobs were enqueued by this worker itself, and committed."""
        for name in queues:
            self._woken(name)
        if self.pgq.engine.dialect.name == POSTGRESQL:
            self.pgq._wake_sender(queues, True)

    def _told_to_stop(self, job_id: str) -> None:
        """Only a hint: the heartbeat finds out whether the job is to be stopped, or is this worker's no more."""
        if job_id.isdecimal() and int(job_id) in self._held:
            self._next_beat = 0.0
            self._heartbeat.wake()

    def room_again(self) -> None:
        self._claimer.wake()

    def slot_freed(self) -> None:
        if self.stopping:
            self._news.put(None)

    # Running

    def is_async(self, job: ClaimedJob) -> bool:
        return self._definitions[job.task].runs_in_loop

    def may_start(self, job: ClaimedJob) -> bool:
        """Whether the claim surely holds: not when this process was frozen, or no heartbeat got through."""
        hold = self._hold_of(job)
        if hold is None:
            return False
        if job.cancel_requested:
            self._finish(job, UNSTARTED_ON_REQUEST)
            return False
        present = time.monotonic()
        if present < hold.sure_until and present < hold.expires:
            if self._listeners.wanted:
                hold.begin()
                self._listeners.tell([event_of(EventName.STARTED, job)])
            return True
        self._finish(job, EXPIRED if present >= hold.expires else STALE)
        return False

    def run_sync(self, job: ClaimedJob) -> None:
        """Run a `def` task in this thread, to its end in the finisher's hands."""
        definition = self._definitions[job.task]
        outcome: Outcome | None
        if definition.isolation is not None:
            outcome = self._processes.run(job, definition, self._isolated[job.task])
        elif definition.transactional:
            outcome = self._run_transactional(definition, job)
        else:
            outcome = self._execute(definition, job)
        if outcome is not None:
            self._finish(job, outcome)

    def _execute(self, definition: TaskDefinition, job: ClaimedJob, *leading: Any) -> Outcome | None:
        """Run the function of a `def` task. None when its time was over before: then its end is written already."""
        if definition.timeout is None:
            return execute(definition, job, *leading)
        late = timed_out(definition.retry, definition.timeout)
        return self._deadlines.run(
            job,
            definition.timeout,
            lambda: execute(definition, job, *leading),
            expired=lambda: self._finish(job, late),
        )

    async def run_async(self, job: ClaimedJob) -> None:
        """Likewise an `async def` task, in this asyncio task."""
        definition = self._definitions[job.task]
        running = asyncio.current_task()
        assert running is not None
        self._async_jobs[job] = running
        outcome: Outcome | None
        try:
            if definition.transactional:
                outcome = await self._run_transactional_async(definition, job)
            else:
                outcome = await execute_async(definition, job)
        except asyncio.CancelledError:
            outcome = self._async_stopped.get(job) or cancelled_itself(definition.retry)
        finally:
            del self._async_jobs[job]
            self._async_stopped.pop(job, None)
        if outcome is not None:
            self._finish(job, outcome)

    def call_in_loop(self, slots: Slots, job: ClaimedJob) -> None:
        assert self._task_loop is not None
        self._task_loop.spawn(slots.run_in_loop, job)

    def _cancel_async_job(self, job: ClaimedJob, outcome: Outcome) -> None:
        """Stop an `async def` task, in its event loop; not when it is committing its end."""
        running, hold = self._async_jobs.get(job), self._hold_of(job)
        if running is not None and not (hold is not None and hold.ending):
            self._async_stopped[job] = outcome
            running.cancel()

    def _run_transactional(self, definition: TaskDefinition, job: ClaimedJob) -> Outcome | None:
        """Run a task in the transaction that writes its completion. None when that was committed or refused."""
        try:
            connection = self.pgq.engine.connect()
        except Exception as error:  # noqa: BLE001 — the task did not begin
            return NOT_BEGUN if is_transient(error) else outcome_of(error, definition.retry)
        outcome: Outcome | None = None
        ending = False
        try:
            with connection, Session(connection, expire_on_commit=False) as session:
                guard = CommitGuard(session, connection, definition)
                outcome = self._execute(definition, job, session)
                if outcome is None:
                    connection.invalidate()  # the timeout may have struck anywhere in the driver
                    return None
                if not isinstance(outcome, Completed):
                    session.rollback()
                    return outcome
                session.flush()
                ending = self._begin_end(job)
                if not ending:
                    session.rollback()
                    return None
                guard.open = self._complete_in(session.connection(), definition, job, outcome)
                if guard.open:
                    session.commit()
                else:
                    session.rollback()
        except BaseException as error:  # noqa: BLE001 — the task's rows, or the commit, were refused
            if ending:
                self._take_back_end(job)
            return _outcome_of_broken(outcome, error, definition.retry)
        self._settle([decide(job, outcome, definition.retry, random=0.0)], {job.id} if guard.open else set())
        return None

    async def _run_transactional_async(self, definition: TaskDefinition, job: ClaimedJob) -> Outcome | None:
        assert self._async_engine is not None
        outcome: Outcome | None = None
        ending = False
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    connection = await stack.enter_async_context(self._async_engine.connect())
                except Exception as error:  # noqa: BLE001 — the task did not begin
                    return NOT_BEGUN if is_transient(error) else outcome_of(error, definition.retry)
                # It begins its transaction when the task first uses it: on SQLite that keeps all others from writing.
                session = await stack.enter_async_context(AsyncSession(connection, expire_on_commit=False))
                sync_connection = connection.sync_connection
                assert sync_connection is not None
                guard = CommitGuard(session.sync_session, sync_connection, definition)
                outcome = await execute_async(definition, job, session)
                if not isinstance(outcome, Completed):
                    await session.rollback()
                    return outcome
                await session.flush()
                ending = self._begin_end(job)
                if not ending:
                    await session.rollback()
                    return None
                completed = outcome
                guard.open = await session.run_sync(
                    lambda sync: self._complete_in(sync.connection(), definition, job, completed)
                )
                if guard.open:
                    await session.commit()
                else:
                    await session.rollback()
        except asyncio.CancelledError:
            if ending:
                self._take_back_end(job)
            raise
        except BaseException as error:  # noqa: BLE001 — as above
            if ending:
                self._take_back_end(job)
            return _outcome_of_broken(outcome, error, definition.retry)
        self._settle([decide(job, outcome, definition.retry, random=0.0)], {job.id} if guard.open else set())
        return None

    def _complete_in(
        self, connection: sa.Connection, definition: TaskDefinition, job: ClaimedJob, outcome: Completed
    ) -> bool:
        """Complete the job in the task's own transaction; False when its claim was lost."""
        transition = self._retained(decide(job, outcome, definition.retry, random=0.0), job)
        if transition.keep_seconds is None and not self._reports.latest:
            frozen_after = self.config.lease
            return store.complete_in_transaction(connection, self.pgq.tables, transition, frozen_after=frozen_after)
        end_if_frozen(connection, self.config.lease)  # from here to the commit the job's row is locked
        if self._reports.latest:
            self._write_last_progress(connection, [transition])
        return bool(self._finish_in(connection, [transition]))

    # Finishing

    def _hold_of(self, job: ClaimedJob) -> _Hold | None:
        """The hold on this very claim; None when it was lost, or is over."""
        hold = self._held.get(job.id)
        return hold if hold is not None and hold.job is job else None

    def _begin_end(self, job: ClaimedJob) -> bool:
        """Mark the hold as ending; False when there is none or it is ending already: then nothing is to be written."""
        hold = self._hold_of(job)
        if hold is not None and hold.begin_end():
            return True
        logger.warning(
            "job %d was given back or taken from this worker meanwhile; the outcome of its attempt %d changes nothing",
            job.id,
            job.attempt,
        )
        return False

    def _take_back_end(self, job: ClaimedJob) -> None:
        hold = self._hold_of(job)
        if hold is not None and hold.ending:
            hold.take_back_end()

    def _finish(self, job: ClaimedJob, outcome: Outcome) -> None:
        """Hand over how an attempt ended, unless it ended otherwise before."""
        if not self._begin_end(job):
            return
        policy = self._definitions[job.task].retry
        transition = decide(job, outcome, policy, random.random())  # noqa: S311 — jitter
        if self._retains:
            self._retained(transition, job)
        if transition.event in (EventType.RETRY, EventType.DEAD):
            logger.log(
                logging.WARNING if transition.event is EventType.RETRY else logging.ERROR,
                "task %s, job %d, attempt %d failed with %s; %s",
                job.task,
                job.id,
                job.attempt,
                transition.error.type if transition.error else "no error",
                transition.reason,
            )
        elif transition.event is EventType.EXPIRE:
            logger.warning("task %s, job %d expired before it was started; it is dead", job.task, job.id)
        self._finished.put(transition)

    def _finish_step(self, connection: sa.Connection) -> float:
        """Write what has ended since the last time, in one transaction. Keeps it when that fails."""
        batch = self._unwritten
        tried_before = bool(batch)
        if not batch:
            first = self._finished.get()
            if first is None:
                raise LoopEnded
            batch.append(first)
        characters = sum(map(_characters, batch))
        while len(batch) < FINISH_JOBS_MAX and characters < FINISH_CHARACTERS_MAX:
            try:
                more = self._finished.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self._finished.put(None)  # it ends the loop, once all before it is written
                break
            batch.append(more)
            characters += _characters(more)
        if self._reports.latest:
            self._write_last_progress(connection, batch)
        written = self._write(connection, batch)
        refused = [transition for transition in batch if transition.job_id not in written]
        if refused and tried_before:
            # The first try may have been committed although its answer was lost.
            with connection.begin():
                written |= retention.already_written(connection, self.pgq.tables, refused, actor=self.id)
        self._settle(batch, written)
        self._unwritten = []
        return 0.0

    def _write(self, connection: sa.Connection, batch: list[Transition]) -> set[int]:
        try:
            # Each completion stands for itself; an event has to be written together with its job.
            alone = all(transition.event is None for transition in batch)
            if self._retains and any(transition.attempt > 1 for transition in batch):
                alone = False  # a job may be deleted, with its events
            with committing_each(connection) if alone else connection.begin():
                return self._finish_in(connection, batch)
        except Exception as error:
            if not is_refusal(error):
                raise
            logger.error(
                "the ends of %d jobs could not be written together (%s); writing them one by one",
                len(batch),
                type(error).__name__,
            )
        return {job_id for index in range(len(batch)) for job_id in self._write_singly(connection, batch, index)}

    def _write_singly(self, connection: sa.Connection, batch: list[Transition], index: int) -> set[int]:
        """Write one end; when the database refuses what it carries, put a plain one that it cannot refuse in its
        place, and write that."""
        transition = batch[index]
        try:
            with connection.begin():
                return self._finish_in(connection, [transition])
        except Exception as error:
            if not is_refusal(error):
                raise
            logger.error("the database refused how job %d ended: %s", transition.job_id, type(error).__name__)
            refused = ErrorInfo(
                "Refused", f"the database refused to store how the attempt ended: {type(error).__name__}"
            )
        batch[index] = plain = Transition(
            transition.job_id,
            transition.claim_token,
            transition.attempt,
            JobStatus.DEAD,
            EventType.DEAD,
            error=refused,
            reason="the attempt's result or error could not be stored",
        )
        with connection.begin():
            return self._finish_in(connection, [plain])

    def _retained(self, transition: Transition, job: ClaimedJob) -> Transition:
        transition.keep_seconds = self._definitions[job.task].keep_seconds(transition.status)
        return transition

    def _finish_in(self, connection: sa.Connection, transitions: Sequence[Transition]) -> set[int]:
        finish = retention.finish if self._retains else store.finish
        return finish(connection, self.pgq.tables, transitions, actor=self.id)

    def _settle(self, transitions: Sequence[Transition], written: set[int]) -> None:
        """Let go of jobs whose end was written or refused."""
        # Of two ends of one job the first has lost its claim, or there would not be a second.
        last = {transition.job_id: transition for transition in transitions}
        queues: set[str] = set()
        released: set[str] = set()
        listening = bool(self._listeners.wanted)
        told: list[tuple[Transition, _Hold, bool]] = []
        with self._lock:
            for transition in transitions:
                is_written = transition.job_id in written and transition is last[transition.job_id]
                if is_written:
                    self.report.count(transition)
                else:
                    self.report.lost += 1
                    logger.warning(
                        "claim lost: job %d was taken from this worker (its lease ran out, or it was cancelled or "
                        "finished already); the outcome of its attempt %d changes nothing",
                        transition.job_id,
                        transition.attempt,
                    )
                hold = self._held.get(transition.job_id)
                if hold is not None and hold.job.claim_token == transition.claim_token:
                    del self._held[transition.job_id]
                    if self._limited:
                        queues.add(hold.job.queue)
                    if transition.event is EventType.RELEASE and is_written:
                        released.add(hold.job.queue)
                if listening and hold is not None:
                    told.append((transition, hold, is_written))
        if told:
            self._tell_ends(told)
        if released and self._on_postgresql:
            self.pgq._wake_sender(released, True)
        for name in queues & self._limited:
            self._woken(name)  # what ended may be what others wait for
        if self.config.max_jobs is not None or self.config.drain:
            self._claimer.wake()

    def _tell_ends(self, ends: Sequence[tuple[Transition, _Hold, bool]]) -> None:
        """Tell listeners of ends that were written, or refused."""
        for transition, hold, is_written in ends:
            if not is_written:
                lost = event_of(EventName.LOST, hold.job, attempt=transition.attempt, reason=OUTCOME_REFUSED)
                self._listeners.tell([lost])
            else:  # of an older attempt, when the job was claimed again meanwhile
                seconds = hold.ran_seconds if hold.job.attempt == transition.attempt else None
                self._listeners.tell(events_of(transition, hold.job, seconds))

    # Progress

    def _report_progress(self, job: ClaimedJob, document: dict[str, Any]) -> None:
        self._reports.put(job, document)
        if self._listeners.wanted:
            self._listeners.tell_progress(job, document)

    def _report_waits(self) -> None:
        with self._lock:
            if self._progress_loop is None and not self._reports_ended:
                self._progress_loop = DatabaseLoop(
                    "progress", self.pgq.engine, self._progress_step, self._outage, self.config.lease
                )
                self._progress_loop.start()
            loop = self._progress_loop
        if loop is not None:
            loop.wake()

    def _progress_step(self, connection: sa.Connection) -> float:
        """Write what was reported since the last time, in one statement. A report that cannot be written is lost."""
        reports = self._reports.waiting()
        if not reports:
            return IDLE_SECONDS
        written: set[int] = set()
        try:
            with self._writing_progress, committing_each(connection):
                written = results.write_progress(connection, self.pgq.tables, reports, skip_locked=True)
        finally:
            self._reports.tried(reports, written)
        return PROGRESS_SECONDS

    def _write_last_progress(self, connection: sa.Connection, transitions: Sequence[Transition]) -> None:
        """Write what jobs reported last, before their end is written. Whatever happens here does not concern that."""
        reports = self._reports.of((transition.job_id, transition.claim_token) for transition in transitions)
        if not reports:
            return
        # An older report that is on its way must not come after this one; but nothing waits for it for long.
        turn = self._writing_progress.acquire(timeout=PROGRESS_WAIT_SECONDS)
        try:
            with connection.begin_nested() if connection.in_transaction() else connection.begin():
                self._reports.tried(reports, results.write_progress(connection, self.pgq.tables, reports))
        except Exception as error:  # noqa: BLE001 — the end of the job is what counts
            logger.info("the last progress of %d jobs could not be written: %s", len(reports), type(error).__name__)
        finally:
            if turn:
                self._writing_progress.release()

    # Heartbeat and sweep

    def _heartbeat_step(self, connection: sa.Connection) -> float:
        """Beat when it is time; in between, look for jobs that are to be stopped."""
        if time.monotonic() >= self._next_beat:
            self._beat(connection)
        elif self._held:
            with looking(connection):
                asked = store.asked_to_stop(connection, self.pgq.tables, worker=self.id)
            for job_id, token in asked:
                hold = self._held.get(job_id)
                if hold is not None and hold.job.claim_token == token:
                    self._ask_to_stop(hold)
        return min(max(self._next_beat - time.monotonic(), 0.0), LOOK_SECONDS)

    def _beat(self, connection: sa.Connection) -> None:
        """Extend the leases of all jobs held, and let go of those that were lost."""
        asked_at = time.monotonic()
        # Set before it is done: the next one may be wanted at once meanwhile.
        self._next_beat = asked_at + self.config.heartbeat_seconds
        holds = list(self._held.values())
        claims = [(hold.job.id, hold.job.claim_token) for hold in holds]
        try:
            # With nothing to extend it is one statement, and that an idle worker often sends.
            with connection.begin() if claims else committing_each(connection):
                kept = store.extend(connection, self.pgq.tables, claims, lease=self.config.lease) if claims else {}
                store.beat(connection, self.pgq.tables, self._row())
        except BaseException:
            self._next_beat = 0.0
            raise
        self._last_beat = asked_at
        for hold in holds:
            if hold.job.id in kept:
                hold.sure_until = asked_at + self.config.lease
                if kept[hold.job.id]:
                    self._ask_to_stop(hold)
            else:
                self._lose(hold)

    def _ask_to_stop(self, hold: _Hold) -> None:
        """Stop an attempt as far as its kind allows: from now on only a completion keeps its job from being cancelled.

        A job that is not started yet is not started any more; a `def` task in a thread can only look.
        """
        job = hold.job
        if job.cancel_requested:
            return
        job.cancel_requested = True
        if hold.ending:
            return
        logger.info("job %d (task %s) is asked to stop in its attempt %d", job.id, job.task, job.attempt)
        if self._task_loop is not None:
            self._task_loop.call(self._cancel_async_job, job, STOPPED_ON_REQUEST)
        self._processes.stop(job, STOPPED_ON_REQUEST)

    def _lose(self, hold: _Hold) -> None:
        """Let go of a job that is no longer this worker's, unless its end is just being written: that will tell."""
        with self._lock:
            if self._held.get(hold.job.id) is not hold or not hold.begin_end():
                return
            del self._held[hold.job.id]
        self._report_lost(hold.job)

    def _report_lost(self, job: ClaimedJob) -> None:
        with self._lock:
            self.report.lost += 1
        logger.warning(
            "claim lost: job %d (task %s) was taken from this worker before its attempt %d ended; "
            "it is not started, or stopped if it can be",
            job.id,
            job.task,
            job.attempt,
        )
        if EventName.LOST in self._listeners.wanted:
            self._listeners.tell([event_of(EventName.LOST, job, reason=TAKEN)])
        if self._task_loop is not None:
            self._task_loop.call(self._cancel_async_job, job, STOPPED_RUNNING)
        self._processes.stop(job, STOPPED_RUNNING)
        if self.config.max_jobs is not None or self.config.drain:
            self._claimer.wake()

    def _row(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": VERSION,
            "queues": dict(self.config.queues),
            "tasks": self._task_names,
        }

    def _sweep_step(self, connection: sa.Connection) -> float:
        """Take back the jobs of dead workers, and delete jobs that are not to be kept any longer."""
        sure_until = self._last_beat + self.config.lease
        if time.monotonic() > sure_until:
            # This process was frozen or cut off. Let the heartbeat come first, or it takes back its own jobs.
            return self.config.heartbeat_seconds
        with committing_each(connection):
            if time.monotonic() >= self._forget_at:
                store.forget_silent_workers(connection, self.pgq.tables, seconds=SILENT_WORKER_SECONDS)
                if uniqueness.forget_periods(connection, self.pgq.tables, limit=PERIODS_MAX) < PERIODS_MAX:
                    self._forget_at = time.monotonic() + FORGET_SECONDS
            # Nearly always there is nothing to do, and to see that takes one statement instead of eight.
            lapsed, expired, prunable = store.upkeep(connection, self.pgq.tables)
        swept = gone = pruned = 0
        if lapsed:
            with connection.begin() as transaction:
                found = store.sweep(connection, self.pgq.tables, limit=SWEEP_JOBS_MAX, actor=self.id)
                if time.monotonic() > sure_until:  # it was frozen on the way to the database
                    transaction.rollback()
                    return self.config.heartbeat_seconds
                jobs = self.pgq._stored(
                    connection,
                    [*found.returned, *found.dead, *found.cancelled],
                    EventName.FAILED,
                    EventName.RETRIED,
                    EventName.DEAD,
                    EventName.CANCELLED,
                )
            self._listeners.tell(told for job in jobs for told in events_of_swept(job))
            swept = found.count
            self._report_swept(found)
        if expired:
            gone = self._expire(connection)
        if prunable:
            with connection.begin():
                pruned = retention.prune_due(connection, self.pgq.tables)
        found_all = swept == SWEEP_JOBS_MAX or gone == expiry.EXPIRE_JOBS_MAX or pruned == retention.PRUNE_JOBS_MAX
        return 0.0 if found_all else self.config.sweep_interval

    def _expire(self, connection: sa.Connection) -> int:
        """Let jobs that expired before anybody started them be dead; how many."""
        with connection.begin():
            expired = expiry.expire(connection, self.pgq.tables, actor=self.id)
            jobs = self.pgq._stored(connection, expired, EventName.EXPIRED, EventName.DEAD)
        self._listeners.tell(told for job in jobs for told in events_of_expired(job))
        if expired:
            with self._lock:
                self.report.dead += len(expired)
            logger.warning("%d jobs expired before they were started; they are dead", len(expired))
        return len(expired)

    def _report_swept(self, swept: SweepResult) -> None:
        if not swept.count:
            return
        with self._lock:
            self.report.swept += swept.count
            self.report.dead += len(swept.dead)
            self.report.cancelled += len(swept.cancelled)
        logger.warning(
            "took back %d jobs whose lease had run out: %d pending again, %d dead, %d cancelled",
            swept.count,
            len(swept.returned),
            len(swept.dead),
            len(swept.cancelled),
        )
        self._woken(None)

    async def _dispose_async_engine(self) -> None:
        if self._async_engine is not None:
            await self._async_engine.dispose()


def with_middleware(definition: TaskDefinition, pgq: PgQueue) -> TaskDefinition:
    """The task with the queue's middleware around its function."""
    if not pgq._run_middleware:
        return definition
    function = wrapped(definition.function, pgq._run_middleware, is_async=definition.is_async)
    return definition.around(function)


def _characters(transition: Transition) -> int:
    """About how much text goes to the database for this end."""
    error = transition.error
    return len(transition.result_json or "") + (len(error.message) + len(error.traceback) if error else 0)


def _outcome_of_broken(outcome: Outcome | None, error: BaseException, policy: Retry) -> Outcome:
    """The outcome of a transactional attempt whose transaction broke.

    After a commit whose answer was lost this may be a completed job: then its claim is over, and the fence refuses
    what the finisher is about to write. A task that had already said how its attempt ends is heard.
    """
    return outcome_of(error, policy) if outcome is None or isinstance(outcome, Completed) else outcome


class CommitGuard:
    """Keeps a transactional task from committing its session or connection itself, which would part its rows from its
    completion."""

    def __init__(self, session: Session, connection: sa.Connection | None, definition: TaskDefinition) -> None:
        """connection: of this attempt alone; None: one that goes on afterwards."""
        self.open = False
        self._name = definition.name
        event.listen(session, "before_commit", self._before_commit)
        if connection is not None:
            event.listen(connection, "commit", self._refuse)

    def _before_commit(self, session: Session) -> None:
        if not session.in_nested_transaction():
            self._refuse()

    def _refuse(self, *_: object) -> None:
        if not self.open:
            raise IllegalTransition(
                f"the transactional task {self._name!r} committed its session; leave that to the worker, which commits "
                "it together with the job's completion"
            )
