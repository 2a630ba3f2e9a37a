"""How many jobs start in a time."""

from __future__ import annotations

from datetime import timedelta

import pytest
from limited import claim, ids, put, waiting
from support import execute, wait_for

from pgqueue import ConfigurationError, PgQueue, Rate
from pgqueue.retry import DELAY_SECONDS_MAX


def let_time_pass(pgq: PgQueue, seconds: float) -> None:
    """Move what the buckets remember back."""
    if pgq.engine.dialect.name == "postgresql":
        sql = (
            "UPDATE pgqueue.rate_buckets SET filled_at = filled_at - make_interval(secs => :s),"
            " ripe_at = ripe_at - make_interval(secs => :s)"
        )
    else:
        moved = "strftime('%Y-%m-%d %H:%M:%f', {}, printf('-%.3f seconds', :s))"
        sql = (
            f"UPDATE pgqueue_rate_buckets SET filled_at = {moved.format('filled_at')}, ripe_at = "
            f"{moved.format('ripe_at')}"
        )
    execute(pgq.engine, sql, s=seconds)


def test_as_many_jobs_start_at_once_as_the_burst_allows(pgq: PgQueue) -> None:
    jobs = put(pgq, pgq.external_task("rated", rate=Rate(1, per="hour", burst=3)), 5)
    free = put(pgq, pgq.external_task("free"), 1)

    claimed = claim(pgq)

    assert ids(claimed) == [*jobs[:3], *free]
    assert waiting(pgq) == dict.fromkeys(jobs[3:], "rate:")
    assert claim(pgq) == []


def test_a_token_that_came_lets_the_next_job_start(pgq: PgQueue) -> None:
    jobs = put(pgq, pgq.external_task("rated", rate=Rate(60, per="hour")), 5)
    assert ids(claim(pgq)) == jobs[:1]

    let_time_pass(pgq, 61)
    first = claim(pgq)
    let_time_pass(pgq, 59)
    second = claim(pgq)
    let_time_pass(pgq, 2)
    third = claim(pgq)

    assert (ids(first), ids(second), ids(third)) == ([jobs[1]], [], [jobs[2]])


def test_tokens_do_not_pile_up_beyond_the_burst(pgq: PgQueue) -> None:
    put(pgq, pgq.external_task("rated", rate=Rate(60, per="hour", burst=2)), 9)
    assert len(claim(pgq)) == 2

    let_time_pass(pgq, 86_400)

    assert len(claim(pgq)) == 2


def test_each_key_has_a_bucket_of_its_own(pgq: PgQueue) -> None:
    @pgq.task(rate=Rate(1, per="hour", key="tenant"))
    def rated(tenant: str) -> None: ...

    with pgq.begin() as connection:
        jobs = rated.enqueue_many(connection, [{"tenant": tenant} for tenant in "aabbc"])

    assert ids(claim(pgq)) == [jobs[0], jobs[2], jobs[4]]
    assert waiting(pgq) == {jobs[1]: "rate:a", jobs[3]: "rate:b"}
    let_time_pass(pgq, 3601)
    assert ids(claim(pgq)) == [jobs[1], jobs[3]]


def test_the_rate_of_a_queue_holds_for_all_its_jobs(pgq: PgQueue) -> None:
    pgq.queue("default", rate=Rate(60, per="hour", burst=2))
    jobs = [*put(pgq, pgq.external_task("one"), 2), *put(pgq, pgq.external_task("other"), 2)]

    assert ids(claim(pgq)) == jobs[:2]
    assert claim(pgq) == []
    let_time_pass(pgq, 61)
    assert ids(claim(pgq)) == jobs[2:3]


def test_a_lifted_rate_lets_all_waiting_jobs_go(pgq: PgQueue) -> None:
    jobs = put(pgq, pgq.external_task("rated", rate=Rate(1, per="hour")), 4)
    claim(pgq)

    pgq.set_limits(task="rated", rate=None, burst=None)

    assert ids(claim(pgq)) == jobs[1:]


def test_a_worker_waits_for_the_next_token_and_no_longer(pgq: PgQueue) -> None:
    from working import working

    started: list[int] = []

    @pgq.task(rate=Rate(20))
    def rated(n: int) -> None:
        started.append(n)

    put(pgq, rated, 5)
    with working(pgq, poll_interval=60.0):
        wait_for(lambda: len(started) == 5, "all to have run", timeout=30)


def test_the_slowest_rate_there_is_holds_no_other_queue_up(pgq: PgQueue) -> None:
    slow = pgq.external_task("slow", rate=Rate(1, per=DELAY_SECONDS_MAX))
    put(pgq, slow, 3)
    put(pgq, pgq.external_task("other"), 2)

    claimed = [job.task for job in claim(pgq)]

    assert sorted(claimed) == ["other", "other", "slow"]
    assert claim(pgq) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"count": 0}, "count of Rate"),
        ({"count": float("nan")}, "count of Rate"),
        ({"count": "5"}, "count of Rate"),
        ({"count": 1, "per": "fortnight"}, "second, minute, hour, day"),
        ({"count": 10**400}, "count of Rate"),
        ({"count": 1, "per": timedelta(0)}, "per of Rate must be more than 0"),
        ({"count": 1, "per": -1.0}, "per of Rate must be more than 0"),
        ({"count": 1, "per": 1e12}, "at most 3162240000 seconds"),
        ({"count": 1, "per": 10**400}, "per of Rate must be"),
        ({"count": 1e-9, "per": "day"}, "make the rate larger"),
        ({"count": 1, "per": "day", "burst": 2**31 - 1}, "or the burst smaller"),
        ({"count": 1, "burst": 0}, "burst of Rate"),
    ],
)
def test_a_rate_that_cannot_be_is_refused(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        Rate(**arguments)  # type: ignore[arg-type]


def test_where_more_may_run_at_once_than_may_start_the_rate_caps_a_burst_and_the_other_way_round(pgq: PgQueue) -> None:
    hurried = put(pgq, pgq.external_task("hurried", concurrency=10, rate=Rate(1, per="hour", burst=3)), 12)
    narrow = put(pgq, pgq.external_task("narrow", concurrency=2, rate=Rate(1, per="hour", burst=9)), 12)

    claimed = claim(pgq)

    assert ids(claimed) == [*hurried[:3], *narrow[:2]]
