"""Statements whose answers are waited for in one call of libpq, which leaves the interpreter to other threads.

psycopg's own way reads an answer bit by bit as it comes, and asks for the interpreter's lock each time. A thread that
computes gives it up only every few milliseconds: beside one such thread an answer of 2,000 rows took 130 ms instead of
30, beside ten of them more than a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping, Sequence
from typing import Any

import psycopg
from psycopg import pq
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result


def execute(
    connection: psycopg.Connection[Any], text: str, values: Sequence[Any], prepared: MutableMapping[str, bytes] | None
) -> Sequence[tuple[Any, ...]]:
    """The rows of a statement whose parameters are `$1`, `$2`, … and say their types. It commits when it is the only
    one.

    prepared: the names under which the server keeps statements of this connection; this one is added when it is not
    among them. None: nothing is kept. Raises what psycopg raises.
    """
    transformer = Transformer(connection)
    parameters: Any = transformer.dump_sequence(values, [PyFormat.TEXT] * len(values))
    if prepared is None:
        result = connection.pgconn.exec_params(text.encode(connection.info.encoding), parameters)
    else:
        if text not in prepared:
            name = _name(text)
            _checked(connection, connection.pgconn.prepare(name, text.encode(connection.info.encoding)))
            prepared[text] = name
        result = connection.pgconn.exec_prepared(prepared[text], parameters)
    _checked(connection, result)
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, tuple)


def _name(text: str) -> bytes:
    """The same for the same text only: should two clients of a pooler come to share a session after all, neither runs
    what the other prepared."""
    return b"pgqueue_" + hashlib.sha256(text.encode()).hexdigest()[:16].encode()


def _checked(connection: psycopg.Connection[Any], result: Any) -> None:
    if result.status in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK):
        return
    error = error_from_result(result, connection.info.encoding)
    if error.sqlstate is None and connection.closed:
        # The result tells no more than that it is closed, the connection also what the server said before it did that.
        raise psycopg.OperationalError(connection.pgconn.get_error_message(connection.info.encoding)) from error
    raise error
