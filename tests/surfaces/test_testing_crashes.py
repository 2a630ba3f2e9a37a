"""pgqueue.testing.crash: what a task makes of the death of its worker, on PostgreSQL and on SQLite."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support import execute, scalar

from pgqueue import ConfigurationError, Job, PgQueue, Unique
from pgqueue.testing import CRASH_POINTS, crash, crash_matrix

ADD = sa.text("UPDATE account SET balance = balance + 1 WHERE id = :account")


@pytest.fixture(autouse=True)
def account(pgq: PgQueue) -> None:
    execute(pgq.engine, "CREATE TABLE account (id integer PRIMARY KEY, balance integer NOT NULL)")


class Accounts:
    """An account for every crash."""

    def __init__(self, pgq: PgQueue) -> None:
        self.pgq = pgq
        self.number = 0

    def new(self) -> dict[str, Any]:
        self.number += 1
        execute(self.pgq.engine, "INSERT INTO account VALUES (:account, 0)", account=self.number)
        return {"account": self.number}

    def check(self, job: Job) -> None:
        balance = scalar(self.pgq.engine, "SELECT balance FROM account WHERE id = :account", **job.payload)
        assert balance == 1, f"paid {balance} times"
        assert job.status == "completed"


def test_a_transactional_task_happens_once_at_every_point(pgq: PgQueue) -> None:
    @pgq.task(transactional=True)
    def pay(session: Session, account: int) -> None:
        session.execute(ADD, {"account": account})

    accounts = Accounts(pgq)
    crash_matrix(pay, accounts.new, check=accounts.check)

    assert accounts.number == len(CRASH_POINTS)


def test_so_does_an_asynchronous_one(pgq: PgQueue) -> None:
    @pgq.task(transactional=True)
    async def pay(session: AsyncSession, account: int) -> None:
        await session.execute(ADD, {"account": account})

    accounts = Accounts(pgq)
    crash_matrix(pay, accounts.new, check=accounts.check)


def test_a_plain_task_that_is_not_idempotent_is_found_out(pgq: PgQueue) -> None:
    @pgq.task
    def pay(account: int) -> None:
        with pgq.engine.begin() as connection:
            connection.execute(ADD, {"account": account})

    accounts = Accounts(pgq)

    with pytest.raises(AssertionError, match=r"task 'pay' does not survive .* at before_commit:\n.*paid 2 times"):
        crash_matrix(pay, accounts.new, check=accounts.check)


def test_an_idempotent_plain_task_passes(pgq: PgQueue) -> None:
    @pgq.task
    async def pay(account: int) -> None:
        execute(pgq.engine, "UPDATE account SET balance = 1 WHERE id = :account", account=account)

    accounts = Accounts(pgq)
    crash_matrix(pay, accounts.new, check=accounts.check)


@pytest.mark.parametrize(("at", "attempts"), [("before_start", 2), ("before_commit", 2), ("after_commit", 1)])
def test_only_what_was_committed_is_not_run_again(pgq: PgQueue, at: Any, attempts: int) -> None:
    @pgq.task
    def once() -> None: ...

    job = crash(once, {}, at=at)

    assert (job.status, job.attempt) == ("completed", attempts)


def test_a_task_that_fails_by_itself_does_not_come_to_the_crash(pgq: PgQueue) -> None:
    @pgq.task(transactional=True)
    def fail(session: Session) -> None:
        raise LookupError("by itself")

    with pytest.raises(LookupError, match="by itself"):
        crash(fail, {}, at="before_commit")


def test_crashes_that_cannot_be_are_refused(pgq: PgQueue) -> None:
    @pgq.task(unique=Unique(period=3600))
    def once() -> None: ...

    with pytest.raises(ConfigurationError, match="at must be one of before_start, before_commit, after_commit, got"):
        crash(once, {}, at="never")  # type: ignore[arg-type]
    crash(once, {}, at="after_commit")
    with pytest.raises(ConfigurationError, match="'once' has a job with this unique key already"):
        crash(once, {}, at="after_commit")


def test_a_database_in_memory_does_not_outlive_a_crash() -> None:
    pgq = PgQueue("sqlite://")

    @pgq.task
    def once() -> None: ...

    with pytest.raises(ConfigurationError, match="a crash needs a database that outlives its connection"):
        crash(once, {}, at="after_commit")
