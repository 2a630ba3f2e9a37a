"""Jobs of one ordering key run one after another, in the order of their ids."""

from __future__ import annotations

import pytest
from jobs import expire, make_due
from limited import claim, ids, put, waiting
from sqlalchemy.orm import Session

from pgqueue import PgQueue


def test_only_the_first_job_of_a_key_is_claimed_and_jobs_of_other_keys_pass(pgq: PgQueue) -> None:
    task = pgq.external_task("work")
    of_a = put(pgq, task, 3, ordering_key="a")
    of_b = put(pgq, task, 2, ordering_key="b")
    free = put(pgq, task, 1)

    claimed = claim(pgq)

    assert ids(claimed) == [of_a[0], of_b[0], *free]
    assert waiting(pgq) == dict.fromkeys([*of_a[1:], *of_b[1:]], "order")


def test_the_next_one_starts_when_the_one_before_has_ended(pgq: PgQueue) -> None:
    jobs = put(pgq, pgq.external_task("work"), 4, ordering_key="a")

    order = []
    while claimed := claim(pgq):
        assert len(claimed) == 1
        order.append(claimed[0].id)
        pgq.ack(claimed)

    assert order == jobs


def test_a_higher_priority_does_not_jump_the_queue_of_its_key(pgq: PgQueue) -> None:
    task = pgq.external_task("work")
    (first,) = put(pgq, task, ordering_key="a")
    put(pgq, task, ordering_key="a", priority=9)

    assert ids(claim(pgq)) == [first]


def test_a_job_that_waits_for_its_retry_keeps_those_behind_it_waiting(pgq: PgQueue) -> None:
    jobs = put(pgq, pgq.external_task("work"), 2, ordering_key="a")
    (job,) = claim(pgq)
    pgq.nack(job, error="no", delay=3600)

    assert claim(pgq) == []

    make_due(pgq)
    (again,) = claim(pgq)
    assert again.id == jobs[0]
    pgq.ack(again)
    assert ids(claim(pgq)) == [jobs[1]]


@pytest.mark.parametrize("end", ["dead", "cancel", "delete"])
def test_a_first_job_that_will_not_run_holds_nobody_up(pgq: PgQueue, end: str) -> None:
    task = pgq.external_task("work")
    jobs = put(pgq, task, 2, ordering_key="a")
    if end == "dead":
        pgq.nack(claim(pgq), dead=True, error="no")
    else:
        (job,) = claim(pgq)
        pgq.nack(job, delay=3600)
        assert claim(pgq) == [], "the second one waits behind the first"
        getattr(pgq, end)(jobs[0])

    assert ids(claim(pgq)) == [jobs[1]]


def test_a_dead_worker_keeps_the_order(pgq: PgQueue) -> None:
    jobs = put(pgq, pgq.external_task("work"), 2, ordering_key="a")
    (lost,) = claim(pgq)
    assert claim(pgq) == []

    expire(pgq, [lost.id])

    assert ids(claim(pgq)) == [jobs[0]]


def test_a_replayed_job_waits_for_the_one_that_runs(pgq: PgQueue) -> None:
    jobs = put(pgq, pgq.external_task("work"), 3, ordering_key="a")
    pgq.nack(claim(pgq), dead=True, error="no")
    (second,) = claim(pgq)

    pgq.replay(jobs[0])

    assert claim(pgq) == []
    pgq.ack(second)
    (replayed,) = claim(pgq)
    assert replayed.id == jobs[0]
    assert claim(pgq) == []
    pgq.ack(replayed)
    assert ids(claim(pgq)) == [jobs[2]]


def test_the_key_comes_from_the_payload(pgq: PgQueue) -> None:
    @pgq.task(ordered_by="document")
    def index(document: str) -> None: ...

    with pgq.begin() as connection:
        jobs = index.enqueue_many(connection, [{"document": "x"}, {"document": "x"}, {"document": "y"}])
        one = index.enqueue(connection, document="y").id

    assert ids(claim(pgq)) == [jobs[0], jobs[2]]
    assert {job.id: job.ordering_key for job in pgq.list_jobs()}[one] == "y"


def test_jobs_that_a_session_adds_as_objects_keep_their_order_too(pgq: PgQueue) -> None:
    @pgq.task(ordered_by="document")
    def index(document: str) -> None: ...

    with Session(pgq.engine) as session, session.begin():
        session.add_all([index.new(document="x"), index.new(document="x"), pgq.Job(task="index", ordering_key="x")])

    assert len(claim(pgq)) == 1
    assert claim(pgq) == []


def test_a_leader_whose_row_is_locked_does_not_lose_those_behind_it(pg: PgQueue) -> None:
    jobs = put(pg, pg.external_task("work"), 2, ordering_key="a")
    (leader,) = claim(pg)

    with pg.engine.connect() as connection:
        pg.ack(leader, session=connection)
        assert claim(pg) == []
        connection.commit()

    assert ids(claim(pg)) == [jobs[1]]


@pytest.mark.parametrize("until", ["the transaction", "a savepoint"])
def test_order_is_kept_after_an_enqueue_that_was_rolled_back(pgq: PgQueue, until: str) -> None:
    task = pgq.external_task("work").using(ordering_key="a")
    with pgq.engine.connect() as connection:
        nested = connection.begin_nested() if until == "a savepoint" else None
        task.enqueue(connection)
        task.enqueue(connection)
        (nested or connection).rollback()
        connection.commit()

    (first, _) = put(pgq, task, 2)

    assert ids(claim(pgq)) == [first]
