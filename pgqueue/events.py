"""Events: what happens to jobs in this process, told to functions of the application.

An end is told after it was written, never before: nobody hears of a completion that was refused. A listener has a
thread and a bounded queue of its own. Whatever it does, be slow, raise or block for ever, reaches neither a job, nor
the worker, nor another listener; what it cannot keep up with is dropped and counted.
"""

from __future__ import annotations

import asyncio
import atexit
import difflib
import inspect
import json
import logging
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import PurePath
from typing import Any

from pgqueue.errors import ConfigurationError
from pgqueue.job import ClaimedJob, ErrorInfo, EventType, Job, JobStatus, Transition

logger = logging.getLogger(__name__)

#: What may wait for one listener: so many events, or fewer with large payloads.
BACKLOG_MAX = 10_000

#: So many characters of payload, result, error and so on count as one event more.
CHARACTERS_PER_EVENT = 4_096

#: How long the end of a worker, or of the process, waits for listeners.
DELIVER_SECONDS = 2.0

#: Between two events about the progress of one attempt, except for the last step.
PROGRESS_SECONDS = 1.0

#: Attempts whose progress is remembered for that.
PROGRESS_JOBS_MAX = 10_000


class EventName(StrEnum):
    """What can be listened to; `job:*` is all of it."""

    ENQUEUED = "job:enqueued"  #: stored, and committed
    STARTED = "job:started"  #: an attempt begins
    COMPLETED = "job:completed"
    FAILED = "job:failed"  #: an attempt failed; what became of the job is told next
    RETRIED = "job:retried"  #: pending again after a failed attempt
    DEAD = "job:dead"  #: will not run again by itself
    EXPIRED = "job:expired"  #: was not started before it expired; that it is dead is told next
    CANCELLED = "job:cancelled"
    SNOOZED = "job:snoozed"  #: the task asked to run later
    RELEASED = "job:released"  #: given back by its worker, unstarted or interrupted
    LOST = "job:lost"  #: the claim was lost; another worker has the job, or it was cancelled
    PROGRESS = "job:progress"


ALL_EVENTS = "job:*"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something that happened to a job. Its repr shows neither payload nor result nor error."""

    name: EventName
    job_id: int
    task: str
    queue: str
    attempt: int  #: 0 before the first
    worker: str | None  #: who runs, or ran, that attempt
    at: datetime  #: in UTC, by the clock of this process
    duration: float | None = None  #: seconds that the attempt ran, when this process ran it
    reason: str | None = field(default=None, repr=False)  #: in words, of every end but a completion
    delay: float | None = None  #: seconds until it may run again, of a retry, snooze or release
    error: ErrorInfo | None = field(default=None, repr=False)  #: type, message and traceback
    progress: dict[str, Any] | None = field(default=None, repr=False)
    result_json: str | None = field(default=None, repr=False)
    payload_json: str = field(default="{}", repr=False)
    metadata_json: str = field(default="{}", repr=False)

    @property
    def payload(self) -> dict[str, Any]:
        """The payload, decoded; ValueError when somebody stored what Python's JSON cannot read."""
        return _decoded(self.payload_json)

    @property
    def metadata(self) -> dict[str, Any]:
        return _decoded(self.metadata_json)

    @property
    def result(self) -> Any:
        """What the task returned."""
        return None if self.result_json is None else json.loads(self.result_json)


def _decoded(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(text)
    return value


Listener = Callable[[JobEvent], object]


class Listeners:
    """The listeners of one queue in this process."""

    def __init__(self) -> None:
        #: The events that anybody listens to. Read without a lock, so that nothing costs anything while it is empty.
        self.wanted: frozenset[EventName] = frozenset()
        self._lock = threading.Lock()
        self._subscriptions: tuple[Subscription, ...] = ()
        self._progress_told: dict[tuple[int, uuid.UUID], float] = {}  # of each attempt
        self._delivers_at_exit = False

    def add(self, name: str, function: Listener, *, task: str | None, queue: str | None) -> Subscription:
        subscription = Subscription(self, checked_event(name), function, task, queue)
        with self._lock:
            self._set((*self._subscriptions, subscription))
            if not self._delivers_at_exit:
                self._delivers_at_exit = True
                atexit.register(self.deliver)
        return subscription

    def remove(self, subscription: Subscription) -> None:
        with self._lock:
            self._set(tuple(other for other in self._subscriptions if other is not subscription))

    def _set(self, subscriptions: tuple[Subscription, ...]) -> None:
        self._subscriptions = subscriptions
        self.wanted = frozenset(name for subscription in subscriptions for name in subscription.names)

    def tell(self, events: Iterable[JobEvent]) -> None:
        """Hand events over to those who listen. Never waits for any of them."""
        chosen = [event for event in events if event.name in self.wanted]
        if chosen:
            for subscription in self._subscriptions:
                subscription._offer(chosen)

    def tell_progress(self, job: ClaimedJob, progress: dict[str, Any]) -> None:
        """Tell how far a job has come, unless that was done just before."""
        if EventName.PROGRESS not in self.wanted:
            return
        now = time.monotonic()
        is_last = progress.get("total") is not None and progress.get("done") == progress.get("total")
        attempt = job.id, job.claim_token
        told_at = self._progress_told.get(attempt)
        if told_at is not None and now - told_at < PROGRESS_SECONDS and not is_last:
            return
        if len(self._progress_told) >= PROGRESS_JOBS_MAX:
            self._progress_told.clear()
        self._progress_told[attempt] = now
        self.tell([event_of(EventName.PROGRESS, job, progress=progress)])

    def deliver(self, seconds: float = DELIVER_SECONDS) -> bool:
        """Wait until all that was told is delivered, but no longer; whether it was."""
        deadline = time.monotonic() + seconds
        delivered = [subscription._wait_until_idle(deadline) for subscription in self._subscriptions]
        return all(delivered)

    def close(self) -> None:
        """Deliver what was told, and let the threads end once they have; they start again when there is more."""
        self.deliver()
        for subscription in self._subscriptions:
            subscription._rest()

    def start_anew_after_fork(self) -> None:
        """A forked child has none of the threads, and locks that may be held: what waited is the parent's to tell."""
        self._lock = threading.Lock()
        for subscription in self._subscriptions:
            subscription._reset()


class Subscription:
    """One listener, as `pgq.on` returns it. Calling it, or leaving its `with` block, ends the subscription."""

    def __init__(
        self, listeners: Listeners, names: frozenset[EventName], function: Listener, task: str | None, queue: str | None
    ) -> None:
        self.names = names
        self.dropped = 0  #: events that the listener was too slow for
        self._listeners = listeners
        self._function = function
        self._task = task
        self._queue = queue
        self._errors_reported: set[type[BaseException]] = set()
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[JobEvent] = deque()
        self._weight = 0
        self._busy = False
        self._ended = False
        self._resting = False
        self._start_failed = False
        self._thread: threading.Thread | None = None

    def __call__(self) -> None:
        """Listen no more. What was not delivered yet is thrown away."""
        self._listeners.remove(self)
        with self._changed:
            self._ended = True
            self._waiting.clear()
            self._changed.notify_all()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self()

    def __repr__(self) -> str:
        return f"<listener {_name_of(self._function)} to {', '.join(sorted(self.names))}>"

    def _wants(self, event: JobEvent) -> bool:
        return (
            event.name in self.names
            and (self._task is None or event.task == self._task)
            and (self._queue is None or event.queue == self._queue)
        )

    def _offer(self, events: Sequence[JobEvent]) -> None:
        chosen = [event for event in events if self._wants(event)]
        if not chosen:
            return
        dropped_before = self.dropped
        with self._changed:
            if self._ended:
                return
            self._resting = False
            for event in chosen:
                weight = _weight(event)
                if self._waiting and self._weight + weight > BACKLOG_MAX:
                    self.dropped += 1
                else:
                    self._weight += weight
                    self._waiting.append(event)
            if self._thread is None:
                self._start()
            self._changed.notify_all()
        if self.dropped and not dropped_before:
            logger.warning(
                "the listener %s is too slow: events are dropped, now and whenever %d wait for it; they are counted in "
                "the `dropped` of what pgq.on(…) returned, and not logged again",
                _name_of(self._function),
                BACKLOG_MAX,
            )

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"pgqueue-listener-{_name_of(self._function)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is ending; it is tried again at the next event
            if not self._start_failed:
                self._start_failed = True
                logger.warning("the listener %s gets no thread, so it hears nothing now", _name_of(self._function))
        else:
            self._thread = thread

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            while (event := self._next()) is not None:
                try:
                    answer = self._function(event)
                    if inspect.isawaitable(answer):
                        runner.run(_awaited(answer))
                except BaseException as error:  # noqa: BLE001 — a listener harms nobody but itself
                    self._report(event, error)
                del event

    def _next(self) -> JobEvent | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            while not self._waiting:
                if self._ended or self._resting:
                    self._thread = None
                    return None
                self._changed.wait()
            event = self._waiting.popleft()
            self._weight -= _weight(event)
            self._busy = True
            return event

    def _rest(self) -> None:
        with self._changed:
            self._resting = True
            self._changed.notify_all()

    def _report(self, event: JobEvent, error: BaseException) -> None:
        """Once for each kind of error, with the place and without the message, which may hold what is secret."""
        if type(error) in self._errors_reported:
            return
        self._errors_reported.add(type(error))
        frames = traceback.extract_tb(error.__traceback__)
        place = f" at {PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        logger.error(
            "the listener %s failed on %s of job %d with %s%s; more of these are not logged",
            _name_of(self._function),
            event.name,
            event.job_id,
            type(error).__name__,
            place,
        )

    def _wait_until_idle(self, deadline: float) -> bool:
        if threading.current_thread() is self._thread:
            return True  # a listener that ends what it listens to must not wait for itself
        with self._changed:
            while self._waiting or self._busy:
                left = deadline - time.monotonic()
                if left <= 0 or self._thread is None:
                    return False
                self._changed.wait(left)
        return True


async def _awaited(answer: Any) -> None:
    await answer


def _weight(event: JobEvent) -> int:
    characters = len(event.payload_json) + len(event.metadata_json) + len(event.result_json or "")
    if event.error is not None:
        characters += len(event.error.message) + len(event.error.traceback)
    if event.progress is not None:
        characters += len(event.progress.get("note") or "")
    return 1 + characters // CHARACTERS_PER_EVENT


def _name_of(function: object) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def checked_event(name: object) -> frozenset[EventName]:
    """The events that a name stands for. Raises ConfigurationError, naming the nearest one."""
    if name == ALL_EVENTS:
        return frozenset(EventName)
    with suppress(ValueError):
        return frozenset({EventName(name)})  # type: ignore[arg-type]  # whatever it is, it is looked up
    known = [ALL_EVENTS, *EventName]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {str(near[0])!r}?)" if near else ""
    raise ConfigurationError(f"there is no event {name!r}{hint}; events are: {', '.join(known)}")


# What is told ----------------------------------------------------------------------------------------------


def event_of(name: EventName, job: ClaimedJob, **what: Any) -> JobEvent:
    """An event about a claimed job."""
    return JobEvent(
        name=name,
        job_id=job.id,
        task=job.task,
        queue=job.queue,
        attempt=what.pop("attempt", job.attempt),
        worker=job.claimed_by,
        at=datetime.now(UTC),
        payload_json=job.payload_json,
        metadata_json=job.metadata_json,
        **what,
    )


def events_of(transition: Transition, job: ClaimedJob, duration: float | None) -> list[JobEvent]:
    """What is told of the end of an attempt: that it failed, if it did, and what became of the job."""
    what = {
        "attempt": transition.attempt,
        "duration": duration,
        "reason": transition.reason,
        "delay": transition.delay_seconds,
        "error": transition.error,
        "result_json": transition.result_json,
    }
    became = _BECAME[transition.event]
    failed = became is EventName.RETRIED or (became is EventName.DEAD and transition.error is not None)
    if became is EventName.EXPIRED:
        return [event_of(name, job, **what) for name in (became, EventName.DEAD)]
    return [event_of(name, job, **what) for name in ((EventName.FAILED, became) if failed else (became,))]


_BECAME: dict[EventType | None, EventName] = {
    None: EventName.COMPLETED,
    EventType.RETRY: EventName.RETRIED,
    EventType.DEAD: EventName.DEAD,
    EventType.EXPIRE: EventName.EXPIRED,
    EventType.CANCEL: EventName.CANCELLED,
    EventType.SNOOZE: EventName.SNOOZED,
    EventType.RELEASE: EventName.RELEASED,
}


def event_of_stored(name: EventName, job: Job, reason: str | None) -> JobEvent:
    """An event about a job that was read from its row."""
    error = job.error if name in (EventName.FAILED, EventName.RETRIED, EventName.DEAD) else None
    return JobEvent(
        name=name,
        job_id=job.id,
        task=job.task,
        queue=job.queue,
        attempt=job.attempt,
        worker=job.claimed_by,
        at=datetime.now(UTC),
        reason=reason,
        error=ErrorInfo(**error) if error is not None else None,
        payload_json=json.dumps(job.payload),
        metadata_json=json.dumps(job.metadata),
    )


def events_of_expired(job: Job) -> list[JobEvent]:
    """What is told of a job that expired before anybody started it."""
    return [event_of_stored(name, job, "expired") for name in (EventName.EXPIRED, EventName.DEAD)]


def events_of_swept(job: Job) -> list[JobEvent]:
    """What is told of a job that was taken back from a worker whose lease had run out."""
    reason = f"the lease of {job.claimed_by} ran out"
    if job.status == JobStatus.CANCELLED:
        return [event_of_stored(EventName.CANCELLED, job, reason)]
    became = EventName.DEAD if job.status == JobStatus.DEAD else EventName.RETRIED
    return [event_of_stored(name, job, reason) for name in (EventName.FAILED, became)]
