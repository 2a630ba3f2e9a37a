"""What `import pgqueue` promises."""

from __future__ import annotations

import subprocess
import sys

import pgqueue


def test_the_public_names_are_these() -> None:
    assert pgqueue.__all__ == [
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


def test_the_public_names_are_sorted_and_there() -> None:
    assert list(pgqueue.__all__) == sorted(pgqueue.__all__)
    for name in pgqueue.__all__:
        assert hasattr(pgqueue, name)


def test_every_error_of_the_package_is_public_and_has_one_base_class() -> None:
    errors = vars(pgqueue.errors).values()
    own = {error for error in errors if isinstance(error, type) and issubclass(error, pgqueue.PgqueueError)}

    assert {error.__name__ for error in own} <= set(pgqueue.__all__)


def test_what_a_task_raises_to_say_how_it_ends_is_no_error_of_the_package() -> None:
    for signal in (pgqueue.Snooze, pgqueue.Discard, pgqueue.Cancel):
        assert not issubclass(signal, pgqueue.PgqueueError)


def test_who_only_enqueues_loads_neither_alembic_nor_what_is_for_the_command_line() -> None:
    program = "import sys, pgqueue; pgqueue.PgQueue('sqlite://'); print(*sys.modules)"

    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()

    assert "pgqueue.worker" in loaded
    assert {"alembic", "mako", "rich", "starlette", "typer", "uvicorn"} & set(loaded) == set()
