"""What is worth doing again and again, as long as it takes a small share of the time."""

from __future__ import annotations

import math
import time
from collections import deque


class Budget:
    """When to do something again, so that it takes this share of the time at most."""

    def __init__(self, share: float, judged: int, rest_max: float = math.inf) -> None:
        """judged: how many times are compared; the quickest counts, because one may be slow for reasons of its own.
        rest_max: after so many seconds it may be done again in any case.
        """
        self.allowed_at = 0.0  #: monotonic
        self._share = share
        self._rest_max = rest_max
        self._took = deque([0.0], maxlen=judged)  # seconds

    def allows(self) -> bool:
        return time.monotonic() >= self.allowed_at

    def spent(self, began: float, ended: float) -> float:
        """It was done, in this time. Returns for how many seconds it is not to be done again."""
        self._took.append(ended - began)
        rest = min(min(self._took) / self._share, self._rest_max)
        self.allowed_at = ended + rest
        return rest

    def allow(self) -> None:
        """Let it be done at once, whatever was spent."""
        self.allowed_at = 0.0
