"""One queue in one worker: a buffer of claimed jobs, and a fixed number of slots that run them.

A slot runs one job at a time, a `def` task in a thread or an `async def` task on the event loop. A slot that is
done takes the next job from the buffer by itself; nothing in between but a lock.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from pgqueue.budget import Budget
from pgqueue.job import ClaimedJob

#: A claim brings about this much work per slot: short jobs come by the hundred, long ones one by one.
PREFETCH_SECONDS = 0.1

#: The most jobs in one claim,
CLAIM_JOBS_MAX = 2_000

#: and ahead of the slots: twice that, so that half of them are left to run while more are claimed.
AHEAD_JOBS_MAX = 2 * CLAIM_JOBS_MAX

#: How much the newest run time counts in the running average.
RUN_TIME_WEIGHT = 0.05

#: A job that has waited in the buffer for so long, and is not about to start, is better off with another worker.
#: The buffer is looked at so often.
OVERDUE_SECONDS = 0.04

#: What will start within this time stays.
SOON_SECONDS = 0.1

#: Asking whether others may be free takes this share of the time at most, judged by the quickest of so many answers.
ASK_SHARE = 0.05
ASKS_JUDGED = 3


class JobRunner(Protocol):
    """What slots need of their worker. Nothing here may raise: a slot would be lost."""

    def is_async(self, job: ClaimedJob) -> bool: ...

    def may_start(self, job: ClaimedJob) -> bool:
        """Whether the claim surely still holds. If not, the runner has given the job back, or lost it."""

    def run_sync(self, job: ClaimedJob) -> None:
        """Run the job and hand over its outcome."""

    async def run_async(self, job: ClaimedJob) -> None:
        """Likewise, on the event loop."""

    def call_in_loop(self, slots: Slots, job: ClaimedJob) -> None:
        """Have the event loop run `slots.run_in_loop(job)` as a task of its own."""

    def room_again(self) -> None:
        """The buffer runs low."""

    def slot_freed(self) -> None:
        """A slot has nothing to do."""


class Slots:
    """The buffer and the slots of one queue."""

    def __init__(self, worker: JobRunner, name: str, count: int, prefetch: int | None) -> None:
        self.name = name
        self.looks_empty_until = 0.0  #: monotonic; the last claim found fewer jobs than asked for
        self.found_all_at = 0.0  #: monotonic; when a claim last found as many jobs as it asked for
        self.started = 0  #: jobs taken in so far, and not given back unstarted
        self._worker = worker
        self._count = count
        self._prefetch = prefetch
        self._lock = threading.Lock()
        self._buffer: deque[ClaimedJob] = deque()
        self._free = count
        self._threads = 0
        self._inbox: queue.SimpleQueue[ClaimedJob | None] = queue.SimpleQueue()
        self._run_seconds: float | None = None
        self._run_seconds_max = math.inf  # those that ended between the last two claims cannot have taken longer
        self._ended = 0  # jobs that ran here; threads may overwrite each other's counts, as it is for estimates
        self._filled = (0, 0.0)  # how many had ended when jobs last came, and when that was (monotonic)
        self._dry: tuple[int, float] | None = None  # likewise, when a slot first found no more of them
        self._low = 0  # with so few jobs left in the buffer, more are asked for
        self._asked = False  # for more jobs, since the last ones came
        self._last_began = 0.0  # monotonic; when a slot last began a job
        self._asks = Budget(ASK_SHARE, ASKS_JUDGED)  # whether other workers may be free
        self._looked: tuple[float, int, int] | None = None  # when, how many had left the buffer, how many were in it
        self._closed = False

    @property
    def running(self) -> int:
        return self._count - self._free

    def wanted(self) -> int:
        """How many jobs to claim now; 0 while the buffer is full enough."""
        with self._lock:
            # Nothing ahead of slots that all have been busy with long jobs since, whatever was measured before.
            stuck = self._free == 0 and time.monotonic() - self._last_began >= PREFETCH_SECONDS
            ahead = 0 if stuck and self._prefetch is None else self._ahead()
            if self._closed or (self._free == 0 and len(self._buffer) > ahead // 2):
                self._low, self._asked = ahead // 2, False
                return 0
            return max(0, min(self._free + ahead - len(self._buffer), CLAIM_JOBS_MAX))

    def add(self, jobs: Sequence[ClaimedJob]) -> bool:
        """Take in claimed jobs and start as many as there are slots; False, and nothing taken, after `close`."""
        with self._lock:
            if self._closed:
                return False
            if jobs:
                self._judge_pace()
            self.started += len(jobs)
            self._buffer.extend(jobs)
            self._low = self._ahead() // 2
            self._asked = False
            starting: list[ClaimedJob] = []
            while len(starting) < self._free and (job := self._take()) is not None:
                starting.append(job)
            if starting:
                self._free -= len(starting)
                self._last_began = time.monotonic()
                self._start(starting)
            if jobs:
                self._begin_window()
            if self._looked is None:
                self._look()
            return True

    def _judge_pace(self) -> None:
        """How long those that ended since others last came can have taken on average, at most. The running average
        alone is led astray by a few that waited for the interpreter's lock."""
        ended_before, began = self._filled
        ended, until = self._dry or (self._ended, time.monotonic())
        whole = ended - ended_before - self._count  # each slot may have been in the middle of one
        self._run_seconds_max = self._count * (until - began) / whole if whole > 0 else math.inf

    def _begin_window(self) -> None:
        self._filled, self._dry = (self._ended, time.monotonic()), None

    @property
    def waiting(self) -> int:
        """How many jobs wait in the buffer."""
        return len(self._buffer)

    @property
    def holds_ahead(self) -> bool:
        """Whether jobs wait in the buffer, which `overdue` watches."""
        return bool(self._buffer) and self._prefetch is None

    def overdue(self) -> int:
        """How many jobs have waited in the buffer for long, and will go on waiting at the pace of the last moments.

        For one thread, every OVERDUE_SECONDS; 0 when called sooner. The pace is what left the buffer in between, which
        knows of long jobs that have not ended, and of slots that share one processor.
        """
        if self._looked is None or not self.holds_ahead:
            self._looked = None
            return 0
        looked_at, left_then, waiting_then = self._looked
        seconds = time.monotonic() - looked_at
        if seconds < OVERDUE_SECONDS:
            return 0
        left, waiting = self._look()
        if left - left_then >= waiting_then:
            return 0  # all that waited then have left
        soon = (left - left_then) * SOON_SECONDS / seconds
        return max(0, waiting - round(soon))

    def _look(self) -> tuple[int, int]:
        """How many have left the buffer, and how many are in it; to be compared with at the next look."""
        waiting = len(self._buffer)
        left = self.started - waiting
        self._looked = time.monotonic(), left, waiting
        return left, waiting

    def may_ask_others(self) -> bool:
        """Whether to find out if other workers may be free. They are not where a claim just found all it asked for."""
        return self._asks.allows() and time.monotonic() >= self.found_all_at + OVERDUE_SECONDS

    def asked_others(self, *, free: bool, began: float) -> None:
        """The answer to what was asked then (monotonic)."""
        self._asks.spent(began, time.monotonic())
        if free:
            self._asks.allow()

    def take_back(self, count: int) -> list[ClaimedJob]:
        """Up to so many jobs out of the buffer, those that would start last; fewer are held ahead from now on."""
        with self._lock:
            taken: list[ClaimedJob] = []
            while len(taken) < count and self._buffer:
                with contextlib.suppress(IndexError):  # a slot was quicker
                    taken.append(self._buffer.pop())
            self.started -= len(taken)
            if taken:
                kept = max(1, len(self._buffer))
                pace = min(self._count * PREFETCH_SECONDS / kept, PREFETCH_SECONDS)
                self._run_seconds, self._run_seconds_max = max(self._run_seconds or 0.0, pace), math.inf
                self._begin_window()  # what was short before says nothing any more
                self._low = self._ahead() // 2
            return taken

    def take_back_all(self) -> list[ClaimedJob]:
        """All jobs out of the buffer."""
        with self._lock:
            taken = self._empty()
            self.started -= len(taken)
            return taken

    def close(self) -> list[ClaimedJob]:
        """Start nothing more; the jobs that were not started."""
        with self._lock:
            self._closed = True
            for _ in range(self._threads):
                self._inbox.put(None)
            return self._empty()

    def _empty(self) -> list[ClaimedJob]:
        taken = []
        while (job := self._take()) is not None:
            taken.append(job)
        return taken

    def _ahead(self) -> int:
        """How many jobs to hold ahead of the slots."""
        if self._prefetch is not None:
            return self._prefetch
        if self._run_seconds is None:
            return 0
        seconds = max(min(self._run_seconds, self._run_seconds_max), 1e-6)
        return 0 if seconds >= PREFETCH_SECONDS else min(AHEAD_JOBS_MAX, int(self._count * PREFETCH_SECONDS / seconds))

    def _start(self, jobs: Sequence[ClaimedJob]) -> None:
        """Run jobs in slots that are already taken for them. Called with the lock held."""
        in_loop: list[ClaimedJob] = []
        in_threads: list[ClaimedJob] = []
        for job in jobs:
            (in_loop if self._worker.is_async(job) else in_threads).append(job)
        # All threads before any job: while jobs run, a new thread waits long for the interpreter's lock, and this one
        # for the new thread.
        try:
            for _ in in_threads:
                if self._threads < self.running:
                    threading.Thread(target=self._run_thread, name=f"pgqueue-{self.name}", daemon=True).start()
                    self._threads += 1
        finally:  # should the system allow no more threads, there are those that it allowed before
            for job in in_threads:
                self._inbox.put(job)
            for job in in_loop:
                self._worker.call_in_loop(self, job)

    def _run_thread(self) -> None:
        while (taken := self._inbox.get()) is not None:
            following: ClaimedJob | None = taken
            while following is not None:
                began = time.monotonic() if self._worker.may_start(following) else None
                if began is not None:
                    self._last_began = began
                    self._worker.run_sync(following)
                following = self._next(began, in_loop=False)

    async def run_in_loop(self, job: ClaimedJob) -> None:
        """A slot on the event loop: run this job, then start the one that follows it.

        Each job has an asyncio task of its own, so that nothing of one, least of all a cancellation, reaches the
        next.
        """
        began = time.monotonic() if self._worker.may_start(job) else None
        if began is not None:
            self._last_began = began
            await self._worker.run_async(job)
        following = self._next(began, in_loop=True)
        if following is not None:
            self._worker.call_in_loop(self, following)

    def _next(self, began: float | None, *, in_loop: bool) -> ClaimedJob | None:
        """After a job, or one that was not begun (None): the next one for the same slot; None when the slot is free,
        or went to the other kind."""
        if began is not None:
            took, average = time.monotonic() - began, self._run_seconds
            # Two threads may overwrite each other's here: it is an estimate.
            self._run_seconds = took if average is None else average + (took - average) * RUN_TIME_WEIGHT
            self._ended += 1
        following = self._take()
        if following is None:
            with self._lock:  # `add` fills the buffer and counts free slots in one go
                following = self._take()
                if following is None:
                    self._free += 1
                    if self._dry is None:
                        self._dry = self._ended, time.monotonic()
        if following is not None and self._worker.is_async(following) is not in_loop:
            with self._lock:
                self._start([following])
            following = None
        if following is None or (not self._asked and len(self._buffer) <= self._low):
            self._asked = True
            self._worker.room_again()
        if following is None:
            self._worker.slot_freed()
        return following

    def _take(self) -> ClaimedJob | None:
        try:
            return self._buffer.popleft()  # atomic, so the way from job to job needs no lock
        except IndexError:
            return None
