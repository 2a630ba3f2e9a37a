"""pgqueue: a job queue in the database that holds the application's rows.

The path of a job through the modules:

1. `enqueueing`: `task.enqueue(session, …)` checks the payload against the task's signature (`task`); `inserting`
   stores the job in the caller's transaction (`transaction`, `store`). After the commit `notifier` wakes a worker.
2. `claiming`: a worker claims due jobs in batches (`store.claim`) into the buffers of `slots`, and commits.
3. `running`: slots run them; `executor` calls the task's function and says how the attempt ended: an outcome.
4. `retry.decide` turns outcome and policy into a transition: what is to be written.
5. `finishing` writes transitions in batches, fenced by the claim token (`store.finish`).
6. Meanwhile `heartbeat` extends the leases of what is held (`holds`), and `sweeping` takes back the jobs of dead
   workers. `worker` puts these duties together.

`client.PgQueue` joins what applications and people do, a module for each duty: `registry` (declare tasks and more),
`consuming`, `inspecting`, `operating`, `repairing`, `limiting`; their statements are in `operations`, `dead_letter` and
`limits`. `handle` is what an enqueue returns: it waits for the job's end, through `results`.

Where a queue or a task has limits, claims are made by `within_limits.claim` instead, and `admission.admit` decides.

`schema` has the tables, `dialect` every difference between PostgreSQL and SQLite, `migration` runs Alembic, `cli`
is the command line. Imports point downwards only; see `[tool.importlinter]` in pyproject.toml.
"""

# The queue and its tasks
from pgqueue.admission import Limits, PerKey, Rate
from pgqueue.client import EnqueueOptions, PgQueue, Task
from pgqueue.config import WorkerConfig
from pgqueue.cron import Catchup, Schedule

# Errors
from pgqueue.errors import (
    Cancel,
    ClaimLost,
    ConfigurationError,
    DatabaseUnreachable,
    Discard,
    DuplicateJob,
    ErrorInfo,
    IllegalTransition,
    InvalidPayload,
    InvalidTask,
    JobCancelled,
    JobFailed,
    JobNotFound,
    NotAwaited,
    PgqueueError,
    ProcessDied,
    QueueFull,
    ResultTimeout,
    RetryAfter,
    ScheduleNotFound,
    SchemaMissing,
    SchemaOutdated,
    Snooze,
    TaskNotFound,
    WrongSession,
)

# Events
from pgqueue.events import EventName, JobEvent, Subscription

# Inside a task
from pgqueue.executor import current_job

# Jobs
from pgqueue.handle import JobHandle
from pgqueue.job import ClaimedJob, Job, JobStatus, OnConflict, ReplayResult
from pgqueue.middleware import EnqueueRequest
from pgqueue.reporting import progress
from pgqueue.retry import Retry
from pgqueue.unique import Unique
from pgqueue.version import VERSION as __version__

# Working
from pgqueue.worker import Worker, WorkerReport

__all__ = [
    "Cancel",
    "Catchup",
    "ClaimLost",
    "ClaimedJob",
    "ConfigurationError",
    "DatabaseUnreachable",
    "Discard",
    "DuplicateJob",
    "EnqueueOptions",
    "EnqueueRequest",
    "ErrorInfo",
    "EventName",
    "IllegalTransition",
    "InvalidPayload",
    "InvalidTask",
    "Job",
    "JobCancelled",
    "JobEvent",
    "JobFailed",
    "JobHandle",
    "JobNotFound",
    "JobStatus",
    "Limits",
    "NotAwaited",
    "OnConflict",
    "PerKey",
    "PgQueue",
    "PgqueueError",
    "ProcessDied",
    "QueueFull",
    "Rate",
    "ReplayResult",
    "ResultTimeout",
    "Retry",
    "RetryAfter",
    "Schedule",
    "ScheduleNotFound",
    "SchemaMissing",
    "SchemaOutdated",
    "Snooze",
    "Subscription",
    "Task",
    "TaskNotFound",
    "Unique",
    "Worker",
    "WorkerConfig",
    "WorkerReport",
    "WrongSession",
    "__version__",
    "current_job",
    "progress",
]
