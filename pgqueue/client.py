"""PgQueue: what an application holds. Each base class has one duty and a module of its own."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from pgqueue.consuming import Consumer
from pgqueue.enqueueing import Task
from pgqueue.inspecting import Inspector
from pgqueue.operating import Operator
from pgqueue.options import EnqueueOptions
from pgqueue.repairing import Repairer
from pgqueue.scheduling import Schedules

__all__ = ["EnqueueOptions", "PgQueue", "Task"]


class PgQueue(Consumer, Inspector, Operator, Repairer):
    """A job queue in a database.

    Made from a URL, an Engine or an AsyncEngine; without one, the URL is taken from PGQUEUE_DATABASE_URL,
    DATABASE_URL or pgqueue.toml when it is first needed. `schema` names the PostgreSQL schema with the tables (on
    SQLite: the prefix of their names); without it, PGQUEUE_SCHEMA, pgqueue.toml or "pgqueue" does. Making one
    connects to nothing.
    """

    def __init__(
        self, database: str | sa.URL | sa.Engine | AsyncEngine | None = None, *, schema: str | None = None
    ) -> None:
        super().__init__(database, schema)

    def __repr__(self) -> str:
        return f"PgQueue(schema={self.schema!r}, tasks={sorted(self.tasks)!r})"

    @property
    def schedules(self) -> Schedules:
        """The schedules in the database: make, list, enable, disable, run and delete them."""
        return Schedules(self)
