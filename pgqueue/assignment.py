"""What one worker works on, as all its duties know it: the queue, the tasks, the settings and its name."""

from __future__ import annotations

import os
import socket
import uuid

from pgqueue.client import PgQueue
from pgqueue.config import WorkerConfig
from pgqueue.dialect import POSTGRESQL
from pgqueue.errors import ConfigurationError
from pgqueue.loop import Outage
from pgqueue.middleware import wrapped
from pgqueue.task import TaskDefinition


class Assignment:
    """Made with the worker; nothing in it changes."""

    def __init__(self, pgq: PgQueue, config: WorkerConfig) -> None:
        self.pgq = pgq
        self.config = config
        self.worker_id = f"{config.name or socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.definitions = {
            name: with_middleware(task.definition, pgq) for name, task in pgq.tasks.items() if not task.external
        }
        if not self.definitions:
            raise ConfigurationError("this worker knows no tasks; register some with @pgq.task before it starts")
        self.task_names = sorted(self.definitions)
        self.retains = any(definition.retains for definition in self.definitions.values())  #: some jobs not for ever
        self.listeners = pgq._listeners
        self.engine = pgq.engine
        self.tables = pgq.tables
        self.on_postgresql = pgq.engine.dialect.name == POSTGRESQL
        self.outage = Outage(pgq.url)

    @property
    def ends_by_itself(self) -> bool:
        """Whether the worker stops once there is nothing more to do."""
        return self.config.drain or self.config.max_jobs is not None


def with_middleware(definition: TaskDefinition, pgq: PgQueue) -> TaskDefinition:
    """The task with the queue's middleware around its function."""
    if not pgq._run_middleware:
        return definition
    function = wrapped(definition.function, pgq._run_middleware, is_async=definition.is_async)
    return definition.around(function)
