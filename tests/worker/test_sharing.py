"""Jobs that wait behind long ones in a worker's buffer go back when another worker may be free, and only then."""

from __future__ import annotations

from typing import Any

import pytest
from support import execute, wait_for
from working import Gate, enqueue, enqueue_many, events, statuses, table, wait_for_status, working

from pgqueue import PgQueue, Task, Worker, sharing, store

QUICK_JOBS = 12


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def shared(pgq: PgQueue, gate: Gate) -> PgQueue:
    @pgq.task
    def quick() -> None:
        pass

    @pgq.task
    def long() -> None:
        gate.pass_through()

    return pgq


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What workers were answered that asked whether others may be free."""
    answers: list[bool] = []
    ask = sharing.others_may_be_free

    def note(*arguments: Any, **named: Any) -> bool:
        answers.append(ask(*arguments, **named))
        return answers[-1]

    monkeypatch.setattr(sharing, "others_may_be_free", note)
    return answers


def learn_that_jobs_are_quick(pgq: PgQueue, worker: Worker) -> None:
    """So that it claims them by the dozen."""
    jobs = enqueue_many(pgq.get_task("quick"), 100)
    wait_for_status(pgq, jobs[-1], "completed")
    wait_for(lambda: not worker._holds.by_id, "the worker to be idle")


def get_stuck(pgq: PgQueue, worker: Worker) -> tuple[int, list[int]]:
    """A long job, which comes first, and quick ones behind it, all held by this worker of one slot."""
    learn_that_jobs_are_quick(pgq, worker)
    with pgq.engine.begin() as connection:
        long = pgq.get_task("long").enqueue(connection).id
        quick = pgq.get_task("quick").enqueue_many(connection, [{}] * QUICK_JOBS)
    wait_for(lambda: statuses(pgq).get("running") == 1 + QUICK_JOBS, "the worker to hold all of them")
    wait_for(lambda: worker._slots["default"].wanted() == 0, "the worker to want no more")
    return long, quick


def appear(pgq: PgQueue, **row: Any) -> None:
    """As a worker that shows a sign of life, and claims nothing."""
    with pgq.engine.begin() as connection:
        described = {"id": "other", "host": "h", "pid": 1, "version": "1", "queues": {"default": 1}, "tasks": []}
        store.beat(connection, pgq.tables, {**described, **row})


def ask(pgq: PgQueue, **what: Any) -> bool:
    with pgq.reading() as connection:
        return sharing.others_may_be_free(
            connection,
            pgq.tables,
            **{"queue": "default", "worker": "one", "tasks": ["quick", "long"], "seconds": 60, **what},
        )


def test_jobs_behind_a_long_one_are_given_back_for_an_idle_worker(shared: PgQueue, gate: Gate) -> None:
    with working(shared, queues={"default": 1}) as busy:
        long, quick = get_stuck(shared, busy)

        with working(shared, queues={"default": 1}) as idle:
            for job in quick:
                wait_for_status(shared, job, "completed")
            assert shared.get_job(long).status == "running"
        gate.open()
        wait_for_status(shared, long, "completed")

    assert idle.report.completed == QUICK_JOBS
    assert busy.report.released == QUICK_JOBS
    assert events(shared, long) == []
    assert {tuple(events(shared, job)) for job in quick} == {("release",)}
    assert {shared.get_job(job).retries for job in quick} == {0}


def test_a_worker_that_is_alone_keeps_its_jobs(shared: PgQueue, gate: Gate, answers: list[bool]) -> None:
    with working(shared, queues={"default": 1}) as worker:
        _, quick = get_stuck(shared, worker)

        wait_for(lambda: len(answers) >= 3, "the worker to have asked for others")
        gate.open()
        wait_for_status(shared, quick[-1], "completed")

    assert not any(answers)
    assert worker.report.released == 0


def test_nothing_is_given_back_while_other_workers_have_jobs_to_claim(
    shared: PgQueue, gate: Gate, answers: list[bool]
) -> None:
    with working(shared, queues={"default": 1}) as worker:
        get_stuck(shared, worker)
        waiting = enqueue(shared.get_task("quick"))
        answers.clear()
        appear(shared)
        wait_for(lambda: len(answers) >= 3, "the worker to have asked for others")
        assert not any(answers)
        assert worker.report.released == 0

        shared.cancel(waiting)
        wait_for(lambda: statuses(shared)["running"] == 1, "the jobs to be given back")
        gate.open()

    assert worker.report.released == QUICK_JOBS


def test_jobs_do_not_go_to_and_fro_between_workers_that_are_all_stuck(shared: PgQueue, gate: Gate) -> None:
    with working(shared, queues={"default": 1}) as one:
        long, quick = get_stuck(shared, one)
        another_long = enqueue(shared.get_task("long"))
        with working(shared, queues={"default": 1}) as other:
            wait_for_status(shared, another_long, "running")
            wait_for(lambda: statuses(shared).get("running") == 2, "the jobs to be given back")
            gate.open()
            for job in (long, another_long, *quick):
                wait_for_status(shared, job, "completed")

    assert one.report.released + other.report.released == QUICK_JOBS
    assert {tuple(events(shared, job)) for job in quick} == {("release",)}


def test_jobs_given_back_do_not_count_as_run(shared: PgQueue, gate: Gate) -> None:
    with working(shared, queues={"default": 1}, max_jobs=100 + 1 + QUICK_JOBS) as busy:
        get_stuck(shared, busy)
        appear(shared)
        wait_for(lambda: busy.report.released, "the jobs to be given back")
        gate.open()
        busy.join(30)

    assert (busy.report.released, busy.report.completed) == (QUICK_JOBS, 100 + 1 + QUICK_JOBS)


# What is asked of the database ----------------------------------------------------------------------------


def test_others_may_be_free_when_another_worker_of_the_queue_lives(shared: PgQueue) -> None:
    assert ask(shared) is False

    appear(shared, id="one")
    assert ask(shared) is False
    appear(shared, id="elsewhere", queues={"mail": 1, "default.old": 4})
    assert ask(shared) is False

    appear(shared, id="other", queues={"mail": 1, "default": 1})
    assert ask(shared) is True
    assert ask(shared, worker="other") is True
    assert ask(shared, queue="mail") is True
    assert ask(shared, queue="reports") is False


def test_a_worker_that_is_silent_is_not_there(shared: PgQueue) -> None:
    appear(shared)

    execute(
        shared.engine, f"UPDATE {table(shared, 'workers')} SET heartbeat_at = :then", then="2001-01-01 00:00:00.000"
    )

    assert ask(shared) is False


def test_nobody_may_be_free_while_a_job_could_be_claimed(shared: PgQueue) -> None:
    appear(shared)
    quick = shared.get_task("quick")

    with shared.engine.begin() as connection:
        quick.using(queue="mail").enqueue(connection)
        quick.using(delay=3600).enqueue(connection)
        quick.using(delay=3600, priority=9).enqueue(connection)
    assert ask(shared) is True

    enqueue(shared.get_task("long"))
    assert ask(shared, tasks=["quick"]) is True
    assert ask(shared) is False


def test_what_was_claimed_ahead_is_not_started_once_its_queue_is_paused(pgq: PgQueue, gate: Gate) -> None:
    started = []

    @pgq.task
    def work(n: int) -> None:
        started.append(n)
        gate.pass_through()

    first, *others = enqueue_each(work, 6)

    with working(pgq, queues={"default": 1}, prefetch=10, poll_interval=30.0) as worker:
        wait_for(lambda: statuses(pgq) == {"running": 6}, "the worker to hold all of them")
        pgq.pause("default")
        wait_for(lambda: statuses(pgq) == {"running": 1, "pending": 5}, "what was not started to be given back")
        gate.open()
        wait_for_status(pgq, first, "completed")
        assert started == [0]

        pgq.resume("default")
        worker._claimer.look_again("default")
        wait_for_status(pgq, others[-1], "completed")

    assert started == [0, 1, 2, 3, 4, 5]
    assert {events(pgq, job_id)[0] for job_id in others} == {"release"}
    assert all(pgq.get_job(job_id).retries == 0 for job_id in others)


def enqueue_each(task: Task[..., Any], count: int) -> list[int]:
    return [enqueue(task, n=n) for n in range(count)]


def test_nothing_is_given_back_to_a_paused_queue(shared: PgQueue) -> None:
    appear(shared)

    shared.pause("default")

    assert ask(shared) is False
