"""Running the tasks of jobs: in threads, in processes of their own, or on the event loop; and stopping them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from pgqueue.assignment import Assignment
from pgqueue.deadlines import Deadlines
from pgqueue.engine import make_async_engine, parse_url
from pgqueue.events import EventName, event_of
from pgqueue.executor import cancelled_itself, describe, execute, execute_async, timed_out
from pgqueue.finishing import Finisher
from pgqueue.holds import Holds
from pgqueue.isolation import Processes, reference_of
from pgqueue.job import Cancelled, ClaimedJob, Expired, Failed, Outcome, Released
from pgqueue.loop import TaskLoop
from pgqueue.progressing import Progress
from pgqueue.slots import Slots
from pgqueue.task import TaskDefinition
from pgqueue.transactional import Transactional

logger = logging.getLogger(__name__)

STOPPED_RUNNING = Released("the worker stopped while the job was running")
UNSTARTED_ON_REQUEST = Cancelled("it was asked to stop before it was started")
EXPIRED = Expired()
STALE = Released("its lease may have run out before it was started")
TAKEN = "it was taken from this worker before its attempt ended"


class Runner:
    """Runs jobs for slots, and hands their outcomes to the finisher."""

    def __init__(
        self,
        assignment: Assignment,
        holds: Holds,
        progress: Progress,
        finisher: Finisher,
        *,
        room_again: Callable[[], None],
        slot_freed: Callable[[], None],
    ) -> None:
        self.room_again = room_again
        self.slot_freed = slot_freed
        self._pgq = assignment.pgq
        self._definitions = assignment.definitions
        self._listeners = assignment.listeners
        self._holds = holds
        self._hold_of = holds.of
        self._finish = finisher.finish
        self._transactional = Transactional(assignment, holds, progress, finisher, self._execute)
        self._run_transactional = self._transactional.run
        self._run_transactional_async = self._transactional.run_async
        self._async_jobs: dict[ClaimedJob, asyncio.Task[Any]] = {}
        self._async_stopped: dict[ClaimedJob, Outcome] = {}  # of those, the ones that this worker cancelled, and why
        self._deadlines = Deadlines()
        self._processes = Processes()
        self._isolated = {
            name: reference_of(self._pgq.tasks[name], self._pgq.tasks[name].definition)
            for name, definition in self._definitions.items()
            if definition.isolation is not None
        }
        self.task_loop: TaskLoop | None = None  #: stopped by the worker

    # Life

    def start(self) -> None:
        """Start the event loop, if there are tasks for it."""
        if any(definition.is_async and definition.transactional for definition in self._definitions.values()):
            # Of this worker's event loop alone: connections cannot be shared with the application's own loop.
            self._transactional.async_engine = make_async_engine(parse_url(self._pgq.url), pool_size=0)
        if any(definition.runs_in_loop for definition in self._definitions.values()):
            self.task_loop = TaskLoop(at_end=self._dispose_async_engine)
            self.task_loop.start()

    def close(self) -> None:
        """Stop what watches over jobs, once the event loop has ended."""
        self._deadlines.stop()
        self._processes.close()

    async def _dispose_async_engine(self) -> None:
        if self._transactional.async_engine is not None:
            await self._transactional.async_engine.dispose()

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
        try:
            if definition.isolation is not None:
                outcome = self._processes.run(job, definition, self._isolated[job.task])
            elif definition.transactional:
                outcome = self._run_transactional(definition, job)
            else:
                outcome = self._execute(definition, job)
        except Exception as error:  # noqa: BLE001 — a defect of ours must cost neither the slot nor the job's end
            outcome = _outcome_of_defect(error, job)
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
        except Exception as error:  # noqa: BLE001 — likewise
            outcome = _outcome_of_defect(error, job)
        finally:
            del self._async_jobs[job]
            self._async_stopped.pop(job, None)
        if outcome is not None:
            self._finish(job, outcome)

    def call_in_loop(self, slots: Slots, job: ClaimedJob) -> None:
        assert self.task_loop is not None
        self.task_loop.spawn(slots.run_in_loop, job)

    def _cancel(self, job: ClaimedJob, outcome: Outcome) -> None:
        """Stop an `async def` task, in its event loop; not when it is committing its end."""
        running, hold = self._async_jobs.get(job), self._hold_of(job)
        if running is not None and not (hold is not None and hold.ending):
            self._async_stopped[job] = outcome
            running.cancel()

    # Stopping

    def stop(self, job: ClaimedJob, outcome: Outcome) -> None:
        """Stop an attempt that can be stopped, with this outcome. A `def` task in a thread cannot."""
        if self.task_loop is not None:
            self.task_loop.call(self._cancel, job, outcome)
        self._processes.stop(job, outcome)

    def stop_async_jobs(self) -> None:
        """Cancel the `async def` tasks; `has_async_jobs` says when they have ended."""
        if self.task_loop is not None:
            for job in list(self._async_jobs):
                self.task_loop.call(self._cancel, job, STOPPED_RUNNING)

    @property
    def has_async_jobs(self) -> bool:
        return bool(self._async_jobs)

    def stop_isolated_jobs(self) -> list[ClaimedJob]:
        """Kill the processes of isolated tasks; their slots give these jobs back."""
        jobs = self._processes.busy
        for job in jobs:
            self._processes.stop(job, STOPPED_RUNNING)
        return jobs

    def lost(self, job: ClaimedJob) -> None:
        """A job is no longer this worker's: say so, and stop its attempt if that can be stopped."""
        with self._holds.lock:
            self._holds.report.lost += 1
        logger.warning(
            "claim lost: job %d (task %s) was taken from this worker before its attempt %d ended; "
            "it is not started, or stopped if it can be",
            job.id,
            job.task,
            job.attempt,
        )
        if EventName.LOST in self._listeners.wanted:
            self._listeners.tell([event_of(EventName.LOST, job, reason=TAKEN)])
        self.stop(job, STOPPED_RUNNING)


def _outcome_of_defect(error: Exception, job: ClaimedJob) -> Outcome:
    """How an attempt ended that something else than its task broke: as a failure of the task, which the job tells."""
    logger.error("task %s, job %d: running it failed in pgqueue itself: %s", job.task, job.id, type(error).__name__)
    return Failed(describe(error))
