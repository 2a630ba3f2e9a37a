"""Who may do what: migrating needs an owner, working needs only rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from support import execute, rows, scalar, wait_for

from pgqueue import ConfigurationError, PgQueue, Worker, WorkerConfig, migration
from pgqueue.engine import make_engine

#: As the docstring of pgqueue.migration says.
GRANTS = """
GRANT USAGE ON SCHEMA pgqueue TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA pgqueue TO {role};
"""


@pytest.fixture
def role(empty_pg: sa.Engine) -> Iterator[str]:
    """A role that may connect and nothing else. Roles belong to the whole server."""
    name = f"{empty_pg.url.database}_{empty_pg.url.port}_role"
    execute(empty_pg, f"CREATE ROLE {name} LOGIN NOSUPERUSER")
    yield name
    execute(empty_pg, f"DROP OWNED BY {name} CASCADE")
    execute(empty_pg, f"DROP ROLE {name}")


@pytest.fixture
def as_role(empty_pg: sa.Engine, role: str) -> Iterator[sa.Engine]:
    engine = make_engine(empty_pg.url.set(username=role))
    yield engine
    engine.dispose()


def grant(engine: sa.Engine, role: str) -> None:
    for statement in GRANTS.format(role=role).strip().splitlines():
        assert " ".join(statement.format(role="worker").split()[:2]) in (migration.__doc__ or "")
        execute(engine, statement)


def test_rights_on_rows_are_enough_to_enqueue_claim_finish_and_sweep(
    empty_pg: sa.Engine, as_role: sa.Engine, role: str
) -> None:
    migration.upgrade(empty_pg, "pgqueue")
    grant(empty_pg, role)
    pgq = PgQueue(as_role)

    @pgq.task(transactional=True)
    def follow(session: Session, n: int) -> int:
        if n:
            follow.enqueue(session, n=n - 1)
        return n

    @pgq.task
    def fail() -> None:
        raise ValueError("no")

    with Session(as_role) as session, session.begin():
        follow.enqueue(session, n=2)
        fail.using(max_retries=0).enqueue(session)
        session.execute(sa.text("SELECT pgqueue.enqueue('follow', '{\"n\": 0}')"))
        expiring = fail.using(queue="other").enqueue(session).id
    Worker(pgq, WorkerConfig(drain=True)).run()
    (claimed,) = pgq.claim("somebody", queue="other", lease=0.5)
    wait_for(lambda: pgq.claim("somebody else", queue="other") or None, "the expired claim to be swept")

    finished = "SELECT task, status, count(*) FROM pgqueue.jobs WHERE queue = 'default' GROUP BY 1, 2 ORDER BY 1"
    assert rows(empty_pg, finished) == [("fail", "dead", 1), ("follow", "completed", 4)]
    assert claimed.id == expiring
    assert "sweep" in {row.event for row in rows(empty_pg, "SELECT event FROM pgqueue.job_events")}


def test_rights_on_rows_are_enough_for_an_upgrade_with_nothing_to_do(
    empty_pg: sa.Engine, as_role: sa.Engine, role: str
) -> None:
    migration.upgrade(empty_pg, "pgqueue")
    grant(empty_pg, role)

    migration.upgrade(as_role, "pgqueue")

    with as_role.connect() as connection:
        assert migration.differences(connection, "pgqueue") == []


def test_an_upgrade_without_the_right_says_who_may(empty_pg: sa.Engine, as_role: sa.Engine, role: str) -> None:
    with pytest.raises(ConfigurationError, match=f"user '{role}' may not migrate schema 'pgqueue': .*CREATE on"):
        migration.upgrade(as_role, "pgqueue")

    assert not sa.inspect(empty_pg).has_schema("pgqueue")


def test_a_downgrade_without_the_right_changes_nothing(empty_pg: sa.Engine, as_role: sa.Engine, role: str) -> None:
    migration.upgrade(empty_pg, "pgqueue")
    grant(empty_pg, role)

    with pytest.raises(ConfigurationError, match="may not migrate schema 'pgqueue': must be owner"):
        migration.downgrade(as_role, "pgqueue", "base")

    assert scalar(empty_pg, "SELECT count(*) FROM pgqueue.jobs") == 0


def test_the_schemas_owner_needs_no_right_on_the_database(empty_pg: sa.Engine, as_role: sa.Engine, role: str) -> None:
    execute(empty_pg, f"CREATE SCHEMA pgqueue AUTHORIZATION {role}")

    migration.upgrade(as_role, "pgqueue")

    with as_role.connect() as connection:
        assert migration.require_current(connection, "pgqueue") is None
    migration.downgrade(as_role, "pgqueue", "base")


def test_a_worker_without_rights_says_which_it_lacks(empty_pg: sa.Engine, as_role: sa.Engine, role: str) -> None:
    migration.upgrade(empty_pg, "pgqueue")
    pgq = PgQueue(as_role)
    pgq.task(name="double")(lambda: None)

    for call in (Worker(pgq, WorkerConfig(drain=True)).run, lambda: pgq.claim("somebody")):
        with pytest.raises(ConfigurationError, match=f"user '{role}' lacks a right .*permission denied.*GRANT"):
            call()
