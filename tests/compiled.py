"""Statements compiled once for all engines of this process.

Each test has engines of its own, and SQLAlchemy compiles a statement anew for each engine: that was a third of the
processor time of a test that asks the database a few things.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.util import LRUCache

#: Enough for every statement of pgqueue in both dialects, and those of the present tests.
CAPACITY = 2_000

#: What a dialect was told, or has found out about its server, that shows in statements or in what rows are read as.
WHAT_MATTERS = (
    "_has_native_hstore",
    "_json_deserializer",
    "_json_serializer",
    "_native_inet_types",
    "_user_defined_max_identifier_length",
    "compiler_linting",
    "default_schema_name",
    "label_length",
    "native_datetime",
    "paramstyle",
    "server_version_info",
)


class SharedCache(LRUCache[Any, Any]):
    """What SQLAlchemy keeps for an engine, kept for all engines whose dialects would compile and read alike."""

    __slots__ = ()

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_for_all_alike(key), default)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_for_all_alike(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_for_all_alike(key), value)


def _for_all_alike(key: Any) -> Any:
    dialect, *rest = key
    return (_configuration(dialect), *rest)


def _configuration(dialect: sa.Dialect) -> tuple[Any, ...]:
    return (type(dialect), *(getattr(dialect, name, None) for name in WHAT_MATTERS))


def share() -> None:
    """From now on."""
    cache = SharedCache(CAPACITY)
    sa.Engine._compiled_cache = property(lambda engine: cache, lambda engine, own: None)  # type: ignore[assignment]
