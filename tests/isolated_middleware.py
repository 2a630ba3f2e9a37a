"""Middleware around the isolated tasks of tests, in a module that theirs knows nothing of."""

from __future__ import annotations

import os
from collections.abc import Iterator

from isolated_tasks import pgq

from pgqueue import ClaimedJob


@pgq.middleware("run")
def outer(job: ClaimedJob) -> Iterator[None]:
    os.environ["AROUND"] = "outer"
    yield


@pgq.middleware("run")
def inner(job: ClaimedJob) -> Iterator[None]:
    os.environ["AROUND"] += " inner"
    yield
