"""Statements sent with one call of libpq, which waits for the whole answer and leaves the interpreter to other threads.

psycopg's own way reads an answer bit by bit as it comes, and asks for the interpreter's lock each time. A thread that
computes gives it up only every few milliseconds: beside one such thread a claim of 2,000 jobs took 130 ms instead of
20, beside ten of them more than a second.
"""

from __future__ import annotations

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
            name = b"pgqueue_%d" % len(prepared)
            _checked(connection, connection.pgconn.prepare(name, text.encode(connection.info.encoding)))
            prepared[text] = name
        result = connection.pgconn.exec_prepared(prepared[text], parameters)
    _checked(connection, result)
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, tuple)


def _checked(connection: psycopg.Connection[Any], result: Any) -> None:
    if result.status in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK):
        return
    encoding = connection.info.encoding
    error = error_from_result(result, encoding)
    if error.sqlstate is None and connection.closed:  # said by libpq, not by the server
        raise psycopg.OperationalError(str(error)) from error
    raise error
