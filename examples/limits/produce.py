"""Gives the workers of `app` something to do."""

from __future__ import annotations

from app import call_api, convert, pgq, quote

with pgq.begin() as connection:
    call_api.enqueue_many(connection, [{"path": f"/orders/{n}"} for n in range(6)])
    quote.enqueue(connection, stock="ACME")
    convert.enqueue_many(connection, [{"document": name} for name in ("letter", "bomb", "invoice")])
