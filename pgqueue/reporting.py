"""How far a running task has come: what it reports, until its worker has written it."""

from __future__ import annotations

import json
import logging
import sys
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pgqueue.errors import ConfigurationError
from pgqueue.executor import clean, current_job
from pgqueue.job import ClaimedJob
from pgqueue.shield import shielded

logger = logging.getLogger(__name__)

#: What is kept of a note.
NOTE_CHARACTERS_MAX = 500

#: How often a report is tried to be written, before it is given up.
TRIES_MAX = 3

#: Where a report goes, by the worker that holds the claim. A process that runs a task for a worker puts its own here.
reporters: dict[str, Callable[[ClaimedJob, dict[str, Any]], None]] = {}


def progress(done: float, total: float | None = None, note: str | None = None) -> None:
    """Say how far the running task has come: `progress(3, 10, "images")`.

    Written at once, and then at most once a second, outside of the task's transaction; the last report is written
    before the job ends. Costs the task next to nothing, and cannot fail it unless the arguments are wrong.
    RuntimeError outside of a task.
    """
    report(current_job(), done, total, note)


def report(job: ClaimedJob, done: Any, total: Any, note: Any) -> None:
    """Likewise, of a job that this process may not be running itself. Raises ConfigurationError alone."""
    for name, number in (("done", done), ("total", total)):
        if number is None and name == "total":
            continue
        if not isinstance(number, int | float) or isinstance(number, bool) or not abs(number) <= sys.float_info.max:
            raise ConfigurationError(f"{name} of progress() must be a finite number, got {number!r}")
    if note is not None and not isinstance(note, str):
        raise ConfigurationError(f"note of progress() must be a string, got {type(note).__name__}")
    tell = reporters.get(job.claimed_by)
    if tell is not None:
        kept = None if note is None else clean(note, NOTE_CHARACTERS_MAX)
        with shielded():
            try:
                tell(job, {"done": done, "total": total, "note": kept})
            except Exception:  # the job matters more than what it says of itself
                logger.exception("what job %d reported of its progress is lost", job.id)


@dataclass(slots=True, eq=False)
class Report:
    """The latest one of a job."""

    job_id: int
    claim_token: uuid.UUID
    document: str  #: JSON
    tries: int = 0


class Reports:
    """The latest report of each job that was not written yet. From any thread."""

    def __init__(self, wake: Callable[[], None]) -> None:
        #: Read without a lock, so that a worker whose tasks report nothing pays nothing.
        self.latest: dict[int, Report] = {}
        self._wake = wake  # called when there is a report after there was none
        self._lock = threading.Lock()
        self._idle = True

    def put(self, job: ClaimedJob, document: dict[str, Any]) -> None:
        report = Report(job.id, job.claim_token, json.dumps(document))
        with self._lock:
            self.latest[job.id] = report
            was_idle, self._idle = self._idle, False
        if was_idle:
            self._wake()

    def waiting(self) -> list[Report]:
        """What is to be written now; after an empty list the next report wakes."""
        with self._lock:
            self._idle = not self.latest
            return sorted(self.latest.values(), key=lambda report: report.job_id)

    def of(self, claims: Iterable[tuple[int, uuid.UUID]]) -> list[Report]:
        """The reports of these claims."""
        with self._lock:
            found = [(self.latest.get(job_id), token) for job_id, token in claims]
        return sorted(
            (report for report, token in found if report is not None and report.claim_token == token),
            key=lambda report: report.job_id,
        )

    def tried(self, reports: Iterable[Report], written: set[int]) -> None:
        """Forget what was written, and what cannot be."""
        with self._lock:
            for report in reports:
                report.tries += 1
                over = report.job_id in written or report.tries >= TRIES_MAX
                if over and self.latest.get(report.job_id) is report:
                    del self.latest[report.job_id]
