"""The claims that a worker holds, and the count of how they ended.

A job is *held* from its claim until its end is written. The heartbeat extends exactly the jobs held, so a job that this
process has forgotten lapses and is swept. An attempt ends once: whoever marks its hold as ending first, be it the
task's outcome or the worker giving the job back, is the one who writes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from pgqueue.assignment import Assignment
from pgqueue.job import ClaimedJob, EventType, Transition

logger = logging.getLogger(__name__)


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
class Hold:
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


class TimedHold(Hold):
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


class Holds:
    """All claims of one worker."""

    def __init__(self, assignment: Assignment) -> None:
        self.report = WorkerReport()
        self.by_id: dict[int, Hold] = {}
        self.lock = threading.Lock()  #: guards changes of `by_id`, and the report
        self._lease = assignment.config.lease
        self._listeners = assignment.listeners

    def add(self, claimed: Sequence[ClaimedJob], asked_at: float) -> list[ClaimedJob]:
        """Count these jobs as held; the claim was asked for at that moment of the monotonic clock. Returns what was
        held of the same jobs, and is lost."""
        sure_until = asked_at + self._lease
        listening = bool(self._listeners.wanted)
        older = []
        with self.lock:
            for job in claimed:
                if job.id in self.by_id:
                    older.append(self.by_id[job.id])
                if job.expires_in is None and not listening:
                    self.by_id[job.id] = Hold(job, sure_until)
                else:
                    expires = math.inf if job.expires_in is None else asked_at + job.expires_in
                    self.by_id[job.id] = TimedHold(job, sure_until, expires)
        # A job that was given back may be claimed again before its end is settled here; nothing is lost then.
        return [hold.job for hold in older if hold.begin_end()]

    def of(self, job: ClaimedJob) -> Hold | None:
        """The hold on this very claim; None when it was lost, or is over."""
        hold = self.by_id.get(job.id)
        return hold if hold is not None and hold.job is job else None

    def begin_end(self, job: ClaimedJob) -> bool:
        """Mark the hold as ending; False when there is none or it is ending already: then nothing is to be written."""
        hold = self.of(job)
        if hold is not None and hold.begin_end():
            return True
        logger.warning(
            "job %d was given back or taken from this worker meanwhile; the outcome of its attempt %d changes nothing",
            job.id,
            job.attempt,
        )
        return False

    def take_back_end(self, job: ClaimedJob) -> None:
        """Undo `begin_end`: the end could not be written that way."""
        hold = self.of(job)
        if hold is not None and hold.ending:
            hold.take_back_end()

    def drop(self, hold: Hold) -> bool:
        """Let go of a job that is no longer this worker's; False when its end is just being written: that will tell."""
        with self.lock:
            if self.by_id.get(hold.job.id) is not hold or not hold.begin_end():
                return False
            del self.by_id[hold.job.id]
            return True
