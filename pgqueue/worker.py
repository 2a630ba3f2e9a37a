"""A worker: threads around a synchronous core, each with one duty and a module of its own.

    claimer ──▶ slots (of each queue: a buffer, threads, the event loop) ──▶ finisher
    heartbeat: extends the leases of all jobs held        sweeper: takes back what dead workers held
    scheduler: enqueues what schedules say                progress: writes what tasks report

The claimer fills buffers, slots run jobs through the runner, the finisher writes how they ended, in batches. The three
overlap. What they share is what is held (`holds`). This module puts them together, starts them and stops them.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

from pgqueue import migration, pooler, store
from pgqueue.assignment import Assignment
from pgqueue.claiming import Claimer
from pgqueue.client import PgQueue
from pgqueue.config import WorkerConfig
from pgqueue.engine import describe_url, errors_explained, is_in_memory
from pgqueue.errors import ConfigurationError
from pgqueue.events import DELIVER_SECONDS
from pgqueue.finishing import Finisher
from pgqueue.heartbeat import Heartbeat
from pgqueue.holds import Holds, WorkerReport
from pgqueue.job import ClaimedJob, Released
from pgqueue.loop import DatabaseLoop
from pgqueue.notifier import STOP, WakeListener
from pgqueue.progressing import Progress
from pgqueue.running import STOPPED_RUNNING, Runner
from pgqueue.scheduler import Scheduler
from pgqueue.slots import Slots
from pgqueue.sweeping import Sweeper

__all__ = ["Worker", "WorkerReport"]

logger = logging.getLogger(__name__)

#: The system may deliver a signal to any thread, but Python handles it in the main thread, once that one moves. So
#: the main thread never waits longer than this.
SIGNAL_SECONDS = 1.0

#: How long a stopping worker tries to write how its last jobs ended.
FINISH_SECONDS = 10.0

#: How long `abort` tries to give jobs back before the process goes.
ABORT_SECONDS = 2.0

STOPPED_UNSTARTED = Released("the worker stopped before it started the job")


class Worker:
    """Claims and runs the jobs of some queues until stopped.

    `run()` works in the calling thread until `stop()` or `abort()` is called from another thread or a signal
    handler; `start()` does the same in a thread of its own. A worker runs once.
    """

    def __init__(self, pgq: PgQueue, config: WorkerConfig | None = None) -> None:
        self.pgq = pgq
        self.config = config if config is not None else WorkerConfig()
        self._assignment = assignment = Assignment(pgq, self.config)
        self.id = assignment.worker_id
        self._holds = holds = Holds(assignment)
        self.report = holds.report
        self._progress = Progress(assignment)
        limited: set[str] = set()  # queues whose claims have to keep limits
        self._finisher = Finisher(assignment, holds, self._progress, limited, settled=self._settled)
        self._runner = Runner(
            assignment,
            holds,
            self._progress,
            self._finisher,
            room_again=self._room_again,
            slot_freed=self._slot_freed,
        )
        self._slots = {
            name: Slots(self._runner, name, count, self.config.prefetch) for name, count in self.config.queues.items()
        }
        self._heartbeat = Heartbeat(assignment, holds, self._runner, listening=self._listens, lost=self._lost)
        self._sweeper = Sweeper(assignment, holds, self._heartbeat, took_back=lambda: self._woken(None))
        self._claimer = Claimer(
            assignment,
            holds,
            self._slots,
            limited,
            finish=self._finisher.finish,
            lost=self._lost,
            expire=self._sweeper.expire,
            stopping=lambda: self.stopping,
            stop_working=self.stop,
        )
        self._scheduler: DatabaseLoop | None = None
        self._listener: WakeListener | None = None
        self._sessions_mixed = False
        self._stop_requested = False
        self._abort_requested = False
        # What the running thread waits on. A SimpleQueue, because its put() is the one wake-up that a signal handler
        # may use while the same thread is waiting; an Event or Condition could deadlock.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
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
        self._scheduler = self._new_scheduler()
        self._runner.start()
        logger.info(
            "worker %s starts on %s: queues %s, tasks %s",
            self.id,
            describe_url(self.pgq.url),
            ", ".join(f"{name}={slots}" for name, slots in self.config.queues.items()),
            ", ".join(self._assignment.task_names),
        )
        if self.config.listen and self._assignment.on_postgresql and not self._sessions_mixed:
            self._listener = WakeListener(self._assignment.engine, self.pgq.schema, self._woken)
        self._progress.open()
        for thread in (
            self._heartbeat,
            self._finisher,
            self._sweeper,
            self._claimer,
            self._scheduler,
            self._listener,
        ):
            if thread is not None:
                thread.start()
        try:
            in_main_thread = threading.current_thread() is threading.main_thread()
            while not self._stop_requested:
                self._wait_for_news(SIGNAL_SECONDS if in_main_thread else None)
        finally:
            self._shut_down()
            self._assignment.listeners.deliver(ABORT_SECONDS if self._abort_requested else DELIVER_SECONDS)
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
        self._look_for_pooler()
        self.pgq.declare_limits(self._assignment.task_names)

    def _look_for_pooler(self) -> None:
        engine = self._assignment.engine
        with errors_explained(self.pgq.url):
            self._sessions_mixed = pooler.mixes_sessions(engine)
            prepares = self._sessions_mixed and pooler.prepares(engine)
        where = describe_url(self.pgq.url)
        if self._sessions_mixed and self.config.listen:
            logger.warning(
                "not listening for wake-ups: %s is a pooler that gives each transaction any of its sessions, in which "
                "LISTEN is lost. Jobs are picked up by polling, every %g s. Say --no-listen (listen=False), or let "
                "workers connect to PostgreSQL itself",
                where,
                self.config.poll_interval,
            )
        if prepares:
            logger.warning(
                "the engine prepares statements, and %s is a pooler that gives each transaction any of its sessions: "
                "unless it follows prepared statements (PgBouncer since 1.21, with max_prepared_statements), they fail "
                'or run in place of each other. Make the engine with connect_args={"prepare_threshold": None}',
                where,
            )

    def _shut_down(self) -> None:
        """Stop claiming, keep the leases alive, wait for running jobs, give back the rest, write it all down."""
        self._claimer.stop()
        for helper in (self._scheduler, self._listener):
            if helper is not None:
                helper.stop()
        self._claimer.join(ABORT_SECONDS)
        for slots in self._slots.values():
            for job in slots.close():
                self._finisher.finish(job, STOPPED_UNSTARTED)
        if self._running():
            logger.info("waiting up to %g s for running jobs", self.config.shutdown_timeout)
        self._wait_while(lambda: self._running() and not self._abort_requested, self.config.shutdown_timeout)
        self._runner.stop_async_jobs()
        self._wait_while(lambda: self._runner.has_async_jobs, ABORT_SECONDS)
        isolated = self._runner.stop_isolated_jobs()
        self._wait_while(lambda: any(self._is_held(job) for job in isolated), ABORT_SECONDS)
        interrupted = [hold.job for hold in list(self._holds.by_id.values()) if not hold.ending]
        for job in interrupted:
            self._finisher.finish(job, STOPPED_RUNNING)
        if interrupted:
            logger.warning("gave back %d jobs that did not end in time", len(interrupted))
        self._finisher.end_when_written()
        self._finisher.join(ABORT_SECONDS if self._abort_requested else FINISH_SECONDS)
        written = not self._finisher.is_alive()
        if not written:
            self._finisher.stop()
            logger.error(
                "the database cannot be reached: %d jobs stay claimed until their lease ends", len(self._holds.by_id)
            )
        others = (
            self._progress.close(),
            self._heartbeat,
            self._sweeper,
            self._runner.task_loop,
            self._scheduler,
            self._listener,
        )
        ending = [thread for thread in others if thread]
        for thread in ending:
            thread.stop()
        for thread in ending:
            thread.join(ABORT_SECONDS)
        self._runner.close()
        if written:
            self._leave()

    def _running(self) -> bool:
        return any(slots.running for slots in self._slots.values())

    def _wait_while(self, busy: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while busy() and (left := deadline - time.monotonic()) > 0:
            self._wait_for_news(min(left, SIGNAL_SECONDS))

    def _wait_for_news(self, seconds: float | None) -> None:
        with contextlib.suppress(queue.Empty):
            self._news.get(timeout=seconds)

    def _is_held(self, job: ClaimedJob) -> bool:
        """Whether its end is still to come."""
        hold = self._holds.of(job)
        return hold is not None and not hold.ending

    def _leave(self) -> None:
        """Give back what may have been claimed unseen, and strike this worker off the list."""
        try:
            with self.pgq.engine.connect() as connection:
                if not self._claimer.is_alive():
                    self._claimer.release_unsure(connection)
                with connection.begin():
                    store.forget_worker(connection, self.pgq.tables, self.id)
        except Exception as error:  # noqa: BLE001 — everything that matters is written
            logger.info("worker %s could not be struck off the list: %s", self.id, type(error).__name__)

    # What one duty has to tell others

    def _listens(self) -> bool:
        return self._listener is not None and self._listener.listening

    def _woken(self, told: str | None) -> None:
        """A queue has new jobs, or any may have (None); or a job is to be stopped."""
        if told is not None and told.startswith(STOP):
            self._heartbeat.told_to_stop(told.removeprefix(STOP))
        else:
            self._claimer.look_again(told)

    def _enqueued(self, queues: set[str]) -> None:
        """Jobs were enqueued by this worker itself, and committed."""
        for name in queues:
            self._claimer.look_again(name)
        if self._assignment.on_postgresql:
            self.pgq._wake_sender(queues, True)

    def _settled(self, limited: set[str], released: set[str]) -> None:
        """Ends were written. That may be what other jobs of limited queues wait for; and what was given back to a
        queue, other workers may run."""
        if released and self._assignment.on_postgresql:
            self.pgq._wake_sender(released, True)
        for name in limited:
            self._claimer.look_again(name)
        if self._assignment.ends_by_itself:
            self._claimer.wake()

    def _lost(self, job: ClaimedJob) -> None:
        self._runner.lost(job)
        if self._assignment.ends_by_itself:
            self._claimer.wake()

    def _room_again(self) -> None:
        self._claimer.wake()

    def _slot_freed(self) -> None:
        if self.stopping:
            self._news.put(None)

    def _new_scheduler(self) -> DatabaseLoop | None:
        if not self.config.schedules or self.config.drain:
            return None
        declared = list(self.pgq.declared_schedules.values())
        scheduler = Scheduler(self._assignment.tables, self.pgq.tasks, declared, actor=self.id, enqueued=self._enqueued)
        return DatabaseLoop(
            "schedule", self._assignment.engine, scheduler.step, self._assignment.outage, self.config.lease
        )
