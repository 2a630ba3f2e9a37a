"""Who does something, and why, as it is written down."""

from __future__ import annotations

import functools
import getpass

from pgqueue.executor import MESSAGE_CHARACTERS_MAX, clean


def who(actor: str | None) -> str:
    return clean(actor, MESSAGE_CHARACTERS_MAX) if actor else default_actor()


def why(reason: str | None) -> str | None:
    return None if reason is None else clean(reason, MESSAGE_CHARACTERS_MAX)


@functools.cache
def default_actor() -> str:
    """Who acts when nobody is named: the operating system's user."""
    try:
        return f"user:{getpass.getuser()}"
    except (KeyError, OSError):
        return "user:unknown"
