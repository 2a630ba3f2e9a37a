"""How many jobs run at once: of a queue, of a task, of a key; and whose turn it is when one ends."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
from jobs import expire, make_due
from limited import claim, ids, put, waiting
from support import wait_for

from pgqueue import PerKey, PgQueue, store, within_limits

# Queue, task, key ------------------------------------------------------------------------------------------


def test_no_more_jobs_of_a_queue_run_at_once_than_its_limit(pgq: PgQueue) -> None:
    pgq.queue("default", concurrency=3)
    jobs = put(pgq, pgq.external_task("work"), 10)

    first, second = claim(pgq), claim(pgq)

    assert ids(first) == jobs[:3]
    assert second == []


def test_a_queues_limit_counts_the_jobs_of_all_its_tasks(pgq: PgQueue) -> None:
    pgq.queue("default", concurrency=3)
    put(pgq, pgq.external_task("one"), 2)
    put(pgq, pgq.external_task("other"), 2)

    assert len(claim(pgq)) == 3


def test_a_slot_comes_free_whatever_ends_the_attempt(pgq: PgQueue) -> None:
    pgq.queue("default", concurrency=1)
    task = pgq.external_task("work", max_retries=0)
    jobs = put(pgq, task, 6)

    (first,) = claim(pgq)
    pgq.ack(first)
    (second,) = claim(pgq)
    pgq.nack(second, delay=3600)
    (third,) = claim(pgq)
    pgq.nack(third, dead=True, error="no")
    (fourth,) = claim(pgq)
    pgq.cancel(fourth.id, force=True)
    (fifth,) = claim(pgq)
    expire(pgq, [fifth.id])
    (sixth,) = claim(pgq)

    assert ids([first, second, third, fourth, fifth, sixth]) == jobs


def test_no_more_jobs_of_a_task_run_at_once_than_its_limit_and_those_of_others_pass_them(pgq: PgQueue) -> None:
    few = put(pgq, pgq.external_task("few", concurrency=2), 5)
    free = put(pgq, pgq.external_task("free"), 3)

    claimed = claim(pgq)

    assert ids(claimed) == [*few[:2], *free]
    assert waiting(pgq) == dict.fromkeys(few[2:], "task")


def test_claims_meet_limits_that_come_and_go_in_between(pgq: PgQueue) -> None:
    jobs = put(pgq, pgq.external_task("work"), 9)

    free = claim(pgq, limit=2)
    pgq.set_limits(queue="default", concurrency=4)
    limited = [claim(pgq), claim(pgq)]
    pgq.set_limits(queue="default", concurrency=None)
    free_again = [claim(pgq, limit=2), claim(pgq)]

    assert ids(free) == jobs[:2]
    assert [ids(claimed) for claimed in limited] == [jobs[2:4], []]
    assert [ids(claimed) for claimed in free_again] == [jobs[4:6], jobs[6:]]


def test_a_claim_from_a_queue_that_is_known_to_have_limits_tries_no_plain_one(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Mock(wraps=store.claim)
    monkeypatch.setattr(store, "claim", plain)
    put(pgq, pgq.external_task("few", concurrency=100), 3)

    claimed = [claim(pgq, limit=1) for _ in range(3)]

    assert list(map(len, claimed)) == [1, 1, 1]
    assert plain.call_count == 1


def test_a_tasks_limit_counts_across_queues(pgq: PgQueue) -> None:
    task = pgq.external_task("few", concurrency=2)
    put(pgq, task, 2)
    put(pgq, task, 2, queue="other")

    assert len(claim(pgq)) == 2
    assert claim(pgq, queue="other") == []


def test_a_slot_that_comes_free_in_one_queue_goes_to_a_job_that_waits_in_another(pgq: PgQueue) -> None:
    task = pgq.external_task("few", concurrency=1)
    put(pgq, task)
    (waits,) = put(pgq, task, queue="other")
    (holder,) = claim(pgq)
    assert claim(pgq, queue="other") == []

    pgq.ack(holder)

    assert ids(claim(pgq, queue="other")) == [waits]


def test_jobs_of_each_key_have_a_limit_of_their_own(pgq: PgQueue) -> None:
    pgq.set_limits(task="work", key_concurrency=2)
    task = pgq.external_task("work")
    of_a = put(pgq, task, 4, concurrency_key="a")
    of_b = put(pgq, task, 1, concurrency_key="b")
    without = put(pgq, task, 3)

    claimed = claim(pgq)

    assert ids(claimed) == [*of_a[:2], *of_b, *without]
    assert waiting(pgq) == dict.fromkeys(of_a[2:], "key:a")


def test_when_a_job_of_a_key_ends_the_next_of_that_key_may_start_and_no_other(pgq: PgQueue) -> None:
    pgq.set_limits(task="work", key_concurrency=1)
    task = pgq.external_task("work")
    of_a = put(pgq, task, 3, concurrency_key="a")
    put(pgq, task, 3, concurrency_key="b")
    first = claim(pgq)

    pgq.ack([job for job in first if job.id in of_a])

    assert ids(claim(pgq)) == [of_a[1]]


def test_the_key_comes_from_the_payload(pgq: PgQueue) -> None:
    @pgq.task(concurrency=PerKey("tenant", 1))
    def work(tenant: int, n: int = 0) -> None: ...

    with pgq.begin() as connection:
        first = [work.enqueue(connection, tenant=tenant).id for tenant in (1, 1, 2)]
        second = work.enqueue_many(connection, [{"tenant": 1}, {"tenant": 3}])

    assert {job.id: job.concurrency_key for job in pgq.list_jobs()} == dict(
        zip([*first, *second], ["1", "1", "2", "1", "3"], strict=True)
    )
    assert ids(claim(pgq)) == [first[0], first[2], second[1]]


def test_the_waiting_job_of_the_highest_priority_is_next(pgq: PgQueue) -> None:
    task = pgq.external_task("few", concurrency=1)
    put(pgq, task)
    (holder,) = claim(pgq)
    put(pgq, task, priority=1)
    (urgent,) = put(pgq, task, priority=9)
    assert claim(pgq) == []

    pgq.ack(holder)

    assert ids(claim(pgq)) == [urgent]


def test_a_backlog_of_one_key_does_not_keep_others_waiting(pgq: PgQueue) -> None:
    pgq.set_limits(task="work", key_concurrency=1)
    task = pgq.external_task("work")
    put(pgq, task, 500, concurrency_key="a")
    (last,) = put(pgq, task, concurrency_key="b")

    claimed = [job for _ in range(3) for job in claim(pgq, 2)]

    assert last in ids(claimed)
    assert len(claimed) == 2


# Nobody waits for ever -------------------------------------------------------------------------------------


@pytest.mark.parametrize("withdraw", ["cancel", "delete"])
def test_a_job_that_was_offered_a_slot_and_is_withdrawn_passes_it_on(pgq: PgQueue, withdraw: str) -> None:
    task = pgq.external_task("few", concurrency=1)
    jobs = put(pgq, task, 3)
    (holder,) = claim(pgq)
    pgq.ack(holder)
    pgq.queue("default", concurrency=1)
    put(pgq, pgq.external_task("urgent"), priority=9)
    pgq.set_limits(queue="default", concurrency=1)
    assert len(claim(pgq)) == 1, "the urgent one: the slot of `few` is offered, and not taken"

    getattr(pgq, withdraw)(jobs[1])
    pgq.set_limits(queue="default", concurrency=None)

    assert ids(claim(pgq)) == [jobs[2]]


def test_a_job_that_waits_for_a_slot_can_be_cancelled(pgq: PgQueue) -> None:
    task = pgq.external_task("few", concurrency=1)
    jobs = put(pgq, task, 3)
    (holder,) = claim(pgq)
    pgq.cancel(jobs[1])

    pgq.ack(holder)

    assert ids(claim(pgq)) == [jobs[2]]


def test_a_job_that_ended_is_not_pruned_before_its_slot_was_found_free(pgq: PgQueue) -> None:
    task = pgq.external_task("few", concurrency=1)
    jobs = put(pgq, task, 2)
    (holder,) = claim(pgq)
    assert claim(pgq) == []
    pgq.ack(holder)

    pgq.prune(older_than=0)

    assert ids(claim(pgq)) == [jobs[1]]
    assert pgq.prune(older_than=0) == 1


def test_a_waiting_job_whose_place_was_taken_by_a_more_urgent_one_gets_the_next(pgq: PgQueue) -> None:
    task = pgq.external_task("few", concurrency=1)
    (_, waits) = put(pgq, task, 2)
    (holder,) = claim(pgq)
    assert claim(pgq) == []
    (urgent,) = put(pgq, task, priority=9)
    pgq.ack(holder)
    (second,) = claim(pgq)
    assert second.id == urgent

    pgq.ack(second)

    assert ids(claim(pgq)) == [waits]


def test_a_waiting_job_that_is_replaced_with_another_key_waits_no_more(pgq: PgQueue) -> None:
    pgq.set_limits(task="work", key_concurrency=1)
    task = pgq.external_task("work")
    put(pgq, task, concurrency_key="a")
    replaced = task.using(unique_key="u", on_conflict="replace")
    with pgq.begin() as connection:
        job = replaced.using(concurrency_key="a").enqueue(connection)
    assert len(claim(pgq)) == 1

    with pgq.begin() as connection:
        replaced.using(concurrency_key="b").enqueue(connection)

    assert ids(claim(pgq)) == [job.id]


def test_a_job_that_leads_its_key_keeps_it_when_it_is_replaced(pgq: PgQueue) -> None:
    task = pgq.external_task("work")
    leading = task.using(unique_key="u", on_conflict="replace")
    with pgq.begin() as connection:
        leader = leading.using(ordering_key="a", delay=3600).enqueue(connection)
    (behind,) = put(pgq, task, ordering_key="a")
    assert claim(pgq) == [], "the second waits behind the first"

    with pgq.begin() as connection:
        leading.using(ordering_key="b").enqueue(connection)

    (first,) = claim(pgq)
    assert first.id == leader.id
    pgq.ack(first)
    assert ids(claim(pgq)) == [behind]


def test_a_slot_offered_to_a_job_that_has_to_wait_for_its_turn_goes_on_to_the_next(pgq: PgQueue) -> None:
    task = pgq.external_task("few", concurrency=1)
    (first,) = put(pgq, task, ordering_key="x")
    pgq.nack(claim(pgq), dead=True, error="no")
    put(pgq, task)
    (holder,) = claim(pgq)
    (later,) = put(pgq, task, ordering_key="x", priority=9)
    assert claim(pgq) == [], "the later one waits for the slot"
    pgq.replay(first)
    assert claim(pgq) == [], "and so does the first, whose turn it is now"

    pgq.ack(holder)

    (turn,) = claim(pgq)
    assert turn.id == first
    pgq.ack(turn)
    assert ids(claim(pgq)) == [later]


def test_a_backlog_of_one_key_that_waits_for_the_task_does_not_keep_slots_from_others(pgq: PgQueue) -> None:
    pgq.set_limits(task="work", concurrency=3, key_concurrency=1)
    task = pgq.external_task("work")
    for key in "xyz":
        put(pgq, task, concurrency_key=key)
    holders = claim(pgq)
    assert len(holders) == 3
    put(pgq, task, 20, concurrency_key="a")
    others = [put(pgq, task, concurrency_key=key)[0] for key in "bc"]
    assert claim(pgq) == [], "all wait for a slot of the task"

    pgq.ack(holders)

    started = ids([job for _ in range(5) for job in claim(pgq)])
    assert len(started) == 3
    assert set(others) < set(started)


def test_a_slot_offered_to_a_job_of_a_paused_queue_does_not_keep_other_queues_waiting(pgq: PgQueue) -> None:
    task = pgq.external_task("few", concurrency=1)
    put(pgq, task)
    (holder,) = claim(pgq)
    (held_back,) = put(pgq, task, queue="paused")
    (waits,) = put(pgq, task, queue="other")
    assert claim(pgq, queue="paused") == []
    assert claim(pgq, queue="other") == []
    pgq.pause("paused")

    pgq.ack(holder)

    (second,) = claim(pgq, queue="other") + claim(pgq, queue="other")
    assert second.id == waits
    pgq.resume("paused")
    assert claim(pgq, queue="paused") == []
    pgq.ack(second)
    assert ids(claim(pgq, queue="paused")) == [held_back]


def test_a_job_that_was_offered_a_slot_and_is_put_off_keeps_nobody_waiting(
    pgq: PgQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One claim in some takes what was offered and not claimed for lost, however new the offer is.
    monkeypatch.setattr(within_limits, "LOOK_AROUND_EVERY", 2**128)
    task = pgq.external_task("few", concurrency=1)
    put(pgq, task)
    (holder,) = claim(pgq)
    replaced = task.using(unique_key="u", on_conflict="replace", queue="other")
    with pgq.begin() as connection:
        replaced.enqueue(connection)
    (waits,) = put(pgq, task)
    assert claim(pgq, queue="other") == []
    assert claim(pgq) == []
    pgq.ack(holder)
    assert claim(pgq) == [], "the slot is offered to the job in the other queue"

    with pgq.begin() as connection:
        replaced.using(delay=3600).enqueue(connection)

    assert ids(claim(pgq)) == [waits]


# Changes while jobs run ------------------------------------------------------------------------------------


def test_a_raised_limit_lets_waiting_jobs_start(pgq: PgQueue) -> None:
    jobs = put(pgq, pgq.external_task("few", concurrency=1), 5)
    claim(pgq)

    pgq.set_limits(task="few", concurrency=3)

    assert ids(claim(pgq)) == jobs[1:3]


def test_a_lifted_limit_lets_all_waiting_jobs_go(pgq: PgQueue) -> None:
    jobs = put(pgq, pgq.external_task("few", concurrency=1), 5)
    claim(pgq)

    pgq.set_limits(task="few", concurrency=None)

    assert ids(claim(pgq)) == jobs[1:]


def test_a_lifted_limit_of_a_task_keeps_its_limit_per_key(pgq: PgQueue) -> None:
    pgq.set_limits(task="work", key_concurrency=1, concurrency=2)
    task = pgq.external_task("work")
    jobs = [put(pgq, task, 2, concurrency_key=key) for key in "abc"]
    assert len(claim(pgq)) == 2

    pgq.set_limits(task="work", concurrency=None)

    assert ids(claim(pgq)) == [jobs[2][0]]


def test_a_lowered_limit_counts_the_jobs_that_run(pgq: PgQueue) -> None:
    put(pgq, pgq.external_task("few", concurrency=3), 5)
    first = claim(pgq)
    assert len(first) == 3

    pgq.set_limits(task="few", concurrency=2)

    pgq.ack(first[:1])
    assert claim(pgq) == []
    pgq.ack(first[1:2])
    assert len(claim(pgq)) == 1


def test_a_new_limit_counts_the_jobs_that_run_already(pgq: PgQueue) -> None:
    put(pgq, pgq.external_task("work"), 5)
    running = claim(pgq, 2)

    pgq.set_limits(task="work", concurrency=2)

    assert claim(pgq) == []
    pgq.ack(running)
    assert len(claim(pgq)) == 2


def test_what_was_set_by_hand_outlasts_what_the_code_declares(pgq: PgQueue) -> None:
    pgq.external_task("work", concurrency=1)
    pgq.declare_limits()

    pgq.set_limits(task="work", concurrency=7, actor="ann")
    pgq.declare_limits()

    (row,) = pgq.list_limits()
    assert (row.limits.concurrency, row.declared_by) == (7, "ann")
    assert pgq.reset_limits(task="work").concurrency == 1
    (row,) = pgq.list_limits()
    assert (row.limits.concurrency, row.declared_by) == (1, "code")


def test_a_queue_may_be_declared_again_and_again_by_whoever_uses_it(pgq: PgQueue, url: str) -> None:
    consumer = PgQueue(url)

    for program in (pgq, consumer, pgq):
        for _ in range(2):
            program.queue("default", concurrency=3)
            program.declare_limits()

    (row,) = pgq.list_limits()
    assert (row.limits.concurrency, row.declared_by) == (3, "code")
    jobs = put(pgq, pgq.external_task("work"), 5)
    assert ids(claim(consumer)) == jobs[:3]
    consumer.dispose()


def test_a_limit_that_the_code_no_longer_declares_is_lifted(pgq: PgQueue) -> None:
    pgq.external_task("work", concurrency=1)
    pgq.declare_limits()

    pgq.external_task("work")
    pgq.declare_limits()

    assert pgq.list_limits() == []


# Never exceeded --------------------------------------------------------------------------------------------


def test_sixteen_claimers_never_exceed_a_limit_not_even_by_one(pg: PgQueue) -> None:
    pg.set_limits(queue="default", concurrency=9)
    pg.set_limits(task="few", concurrency=5)
    pg.set_limits(task="keyed", key_concurrency=2)
    few, keyed = pg.external_task("few"), pg.external_task("keyed")
    put(pg, few, 150)
    for key in "abc":
        put(pg, keyed, 60, concurrency_key=key)
    lock, running, peaks, done = threading.Lock(), Counter[str](), Counter[str](), Counter[str]()

    def count(name: str, by: int) -> None:
        running[name] += by
        peaks[name] = max(peaks[name], running[name])

    def consume(worker: int) -> None:
        while done["all"] < 330:
            for job in pg.claim(f"worker-{worker}", limit=1 + worker % 4):
                with lock:
                    names = ["all", job.task, *([f"keyed {keys[job.id]}"] if job.task == "keyed" else [])]
                    for name in names:
                        count(name, 1)
                with lock:
                    for name in names:
                        count(name, -1)
                        done[name] += 1
                pg.ack(job)

    keys = {job.id: job.concurrency_key for job in pg.list_jobs(task="keyed", limit=1000)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(consume, range(16)))

    assert done["all"] == 330
    assert peaks["all"] <= 9
    assert peaks["few"] <= 5
    assert {name: peak for name, peak in peaks.items() if name.startswith("keyed ") and peak > 2} == {}
    wait_for(lambda: pg.list_jobs(status="pending") == [], "nothing to be left")
    make_due(pg)
    assert claim(pg) == []
