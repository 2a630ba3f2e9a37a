"""The command line: reads arguments, calls the services, prints.

`program` is the frame around every command: global options, errors, exit codes. `opening` decides which queue in
which database a command works on. The other modules have the commands.
"""

from pgqueue.cli import config, db, enqueue, limits, operate, schedules, serve, work
from pgqueue.cli.program import EXIT_CODES, FAILURE, INTERRUPTED, app, main
from pgqueue.supervisor import DRAINED_WITH_DEAD

__all__ = [
    "DRAINED_WITH_DEAD",
    "EXIT_CODES",
    "FAILURE",
    "INTERRUPTED",
    "app",
    "config",
    "db",
    "enqueue",
    "limits",
    "main",
    "operate",
    "schedules",
    "serve",
    "work",
]
