"""A schema per tenant: one process may work with any number of them."""

from __future__ import annotations

from pgqueue.schema import tables_for


def test_the_tables_of_a_schema_stay_the_same_however_many_there_are() -> None:
    names = [f"tenant_{number}" for number in range(150)]
    first = [tables_for("postgresql", name) for name in names]

    again = [tables_for("postgresql", name) for name in names]

    assert all(one is other for one, other in zip(first, again, strict=True))
    assert len({tables.job_class for tables in first}) == len(names)
