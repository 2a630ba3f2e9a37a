"""Writing how attempts ended, in batches, fenced by the claim token."""

from __future__ import annotations

import logging
import queue
import random
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from pgqueue import retention, store
from pgqueue.assignment import Assignment
from pgqueue.engine import is_refusal, straight
from pgqueue.events import EventName, event_of, events_of
from pgqueue.holds import Hold, Holds
from pgqueue.job import ClaimedJob, ErrorInfo, EventType, JobStatus, Outcome, Transition
from pgqueue.loop import DatabaseLoop, LoopEnded
from pgqueue.progressing import Progress
from pgqueue.retry import decide

logger = logging.getLogger(__name__)

#: The most jobs whose ends are written in one transaction.
FINISH_JOBS_MAX = 2_000

#: Of these, about so many characters of results and errors: beyond a gigabyte the server hangs up.
FINISH_CHARACTERS_MAX = 8 * 1024 * 1024

OUTCOME_REFUSED = "it was taken from this worker; the outcome of the attempt was refused"


class Finisher(DatabaseLoop):
    """The thread that writes ends. Until it has, the jobs stay held."""

    def __init__(
        self,
        assignment: Assignment,
        holds: Holds,
        progress: Progress,
        limited: set[str],
        settled: Callable[[set[str], set[str]], None],
    ) -> None:
        """limited: queues whose claims have to keep limits.
        settled: told after each write which of those had jobs in it, and to which queues jobs were given back.
        """
        super().__init__(
            "finish", assignment.engine, self._write_next, assignment.outage, assignment.config.lease, keeps_plans=True
        )
        self._worker_id = assignment.worker_id
        self._tables = assignment.tables
        self._definitions = assignment.definitions
        self._retains = assignment.retains
        self._listeners = assignment.listeners
        self._holds = holds
        self._begin_end = holds.begin_end
        self._progress = progress
        self._reports = progress.reports
        self._limited = limited
        self._settled = settled
        self._ended: queue.SimpleQueue[Transition | None] = queue.SimpleQueue()
        self._unwritten: list[Transition] = []

    def end_when_written(self) -> None:
        """Unlike `stop`: the thread ends by itself, when it has written everything up to here."""
        self._ended.put(None)

    def finish(self, job: ClaimedJob, outcome: Outcome) -> None:
        """Hand over how an attempt ended, unless it ended otherwise before."""
        if not self._begin_end(job):
            return
        policy = self._definitions[job.task].retry
        transition = decide(job, outcome, policy, random.random())  # noqa: S311 — jitter
        if self._retains:
            self.retained(transition, job)
        if transition.event is not None:
            _log(job, transition)
        self._ended.put(transition)

    def _write_next(self, connection: sa.Connection) -> float:
        """Write what has ended since the last time, in one transaction. Keeps it when that fails."""
        batch = self._unwritten
        tried_before = bool(batch)
        if not batch:
            first = self._ended.get()
            if first is None:
                raise LoopEnded
            batch.append(first)
        characters = sum(map(_characters, batch))
        while len(batch) < FINISH_JOBS_MAX and characters < FINISH_CHARACTERS_MAX:
            try:
                more = self._ended.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self._ended.put(None)  # it ends the loop, once all before it is written
                break
            batch.append(more)
            characters += _characters(more)
        if self._reports.latest:
            self._progress.write_last(connection, batch)
        written = self._write(connection, batch)
        refused = [transition for transition in batch if transition.job_id not in written]
        if refused and tried_before:
            # The first try may have been committed although its answer was lost.
            with connection.begin():
                written |= retention.already_written(connection, self._tables, refused, actor=self._worker_id)
        self.settle(batch, written)
        self._unwritten = []
        return 0.0

    def _write(self, connection: sa.Connection, batch: list[Transition]) -> set[int]:
        try:
            # Each completion stands for itself; an event has to be written together with its job.
            alone = all(transition.event is None for transition in batch)
            if self._retains and any(transition.attempt > 1 for transition in batch):
                alone = False  # a job may be deleted, with its events
            with straight(connection) if alone else connection.begin():
                return self.finish_in(connection, batch)
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
                return self.finish_in(connection, [transition])
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
            return self.finish_in(connection, [plain])

    def retained(self, transition: Transition, job: ClaimedJob) -> Transition:
        transition.keep_seconds = self._definitions[job.task].keep_seconds(transition.status)
        return transition

    def finish_in(self, connection: sa.Connection, transitions: Sequence[Transition]) -> set[int]:
        finish = retention.finish if self._retains else store.finish
        return finish(connection, self._tables, transitions, actor=self._worker_id)

    def settle(self, transitions: Sequence[Transition], written: set[int]) -> None:
        """Let go of jobs whose end was written or refused."""
        # Of two ends of one job the first has lost its claim, or there would not be a second.
        last = {transition.job_id: transition for transition in transitions}
        queues: set[str] = set()
        released: set[str] = set()
        listening = bool(self._listeners.wanted)
        told: list[tuple[Transition, Hold, bool]] = []
        held, report = self._holds.by_id, self._holds.report
        completed = 0
        with self._holds.lock:
            for transition in transitions:
                is_written = transition.job_id in written and transition is last[transition.job_id]
                if is_written and transition.event is None:
                    completed += 1
                elif is_written:
                    report.count(transition)
                else:
                    report.lost += 1
                    logger.warning(
                        "claim lost: job %d was taken from this worker (its lease ran out, or it was cancelled or "
                        "finished already); the outcome of its attempt %d changes nothing",
                        transition.job_id,
                        transition.attempt,
                    )
                hold = held.get(transition.job_id)
                if hold is not None and hold.job.claim_token is transition.claim_token:
                    del held[transition.job_id]
                    if self._limited:
                        queues.add(hold.job.queue)
                    if transition.event is EventType.RELEASE and is_written:
                        released.add(hold.job.queue)
                if listening and hold is not None:
                    told.append((transition, hold, is_written))
            report.completed += completed
        if told:
            self._tell_ends(told)
        self._settled(queues & self._limited, released)

    def _tell_ends(self, ends: Sequence[tuple[Transition, Hold, bool]]) -> None:
        """Tell listeners of ends that were written, or refused."""
        for transition, hold, is_written in ends:
            if not is_written:
                lost = event_of(EventName.LOST, hold.job, attempt=transition.attempt, reason=OUTCOME_REFUSED)
                self._listeners.tell([lost])
            else:  # of an older attempt, when the job was claimed again meanwhile
                seconds = hold.ran_seconds if hold.job.attempt == transition.attempt else None
                self._listeners.tell(events_of(transition, hold.job, seconds))


def _log(job: ClaimedJob, transition: Transition) -> None:
    """Say that an attempt failed, or was not begun in time."""
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


def _characters(transition: Transition) -> int:
    """About how much text goes to the database for this end."""
    error = transition.error
    return len(transition.result_json or "") + (len(error.message) + len(error.traceback) if error else 0)
