"""Who does something, and why, as it is written down."""

from __future__ import annotations

import functools
import getpass

from pgqueue.errors import ConfigurationError
from pgqueue.executor import MESSAGE_CHARACTERS_MAX, clean


def who(actor: str | None) -> str:
    _require_text("actor", actor)
    return clean(actor, MESSAGE_CHARACTERS_MAX) if actor else default_actor()


def why(reason: str | None) -> str | None:
    _require_text("reason", reason)
    return None if reason is None else clean(reason, MESSAGE_CHARACTERS_MAX)


def _require_text(name: str, value: object) -> None:
    """Whatever it contains is made fit to be stored."""
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"{name} must be a string, got {type(value).__name__}")


@functools.cache
def default_actor() -> str:
    """Who acts when nobody is named: the operating system's user."""
    try:
        return f"user:{getpass.getuser()}"
    except (KeyError, OSError):
        return "user:unknown"
