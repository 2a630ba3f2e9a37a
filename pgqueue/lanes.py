"""Where the claims of one queue go on: for each priority, a lane, a mark: that of the last job claimed.

A claimed job leaves an entry behind in the index that claims go by, which PostgreSQL cannot remove as long as anybody
holds a snapshot from before. Claims that always began at the front would step over all of them, and get slower by the
second. So they begin behind the mark. What comes to lie before it (a retry, a transaction that took long to commit, a
priority nobody used before) is found by looking again from the front, now and then: as often as that is cheap.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import datetime

from pgqueue.budget import Budget
from pgqueue.job import ClaimedJob

#: Looking from the front takes this share of the time at most,
LOOK_SHARE = 0.05

#: judged by the quickest of so many looks, because one may be slow for reasons of its own,
LOOKS_JUDGED = 3

#: and is done again after so many seconds at the latest, whatever it costs.
LOOK_SECONDS_MAX = 20.0

#: While claims find all they want, it is done again after so many seconds at the earliest.
LOOK_SECONDS_MIN = 0.1

#: Priority, due time and id; None: from the front.
Lane = tuple[int, datetime | None, int]


class Lanes:
    """The lanes of one queue, as one worker knows them."""

    def __init__(self) -> None:
        self.last_look_found_none = True
        self._looks = Budget(LOOK_SHARE, LOOKS_JUDGED, LOOK_SECONDS_MAX)
        self._look_wanted_at = 0.0
        self._marks: dict[int, tuple[datetime | None, int]] = {}

    @property
    def known(self) -> bool:
        """Whether there is a lane to claim from."""
        return bool(self._marks)

    @property
    def look_allowed_at(self) -> float:
        """Monotonic; to look from the front before would cost too much."""
        return self._looks.allowed_at

    def may_look(self) -> bool:
        return self._looks.allows()

    def should_look(self) -> bool:
        """Although claims find all they want."""
        return time.monotonic() >= self._look_wanted_at

    def looked(self, fronts: Iterable[Lane], began: float, ended: float) -> None:
        """Jobs are pending behind these marks, none before, and where a mark has no time none is due; to find that out
        took from `began` to `ended`."""
        self.last_look_found_none = True
        for priority, run_at, job_id in fronts:
            self.last_look_found_none = False
            if run_at is None:  # nothing is due: whatever was, lies before the mark and is claimed
                self._marks.setdefault(priority, (None, job_id))
            else:
                self._marks[priority] = (run_at, job_id)
        self._look_wanted_at = ended + max(self._looks.spent(began, ended), LOOK_SECONDS_MIN)

    def claimed(self, jobs: Sequence[ClaimedJob]) -> None:
        """These jobs were claimed, in the order of claims."""
        for job in jobs:
            self._marks[job.priority] = (job.run_at, job.id)

    def marks(self) -> list[Lane]:
        """Highest priority first."""
        return [(priority, *self._marks[priority]) for priority in sorted(self._marks, reverse=True)]
