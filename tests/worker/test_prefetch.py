"""How many jobs the slots of one queue want, hold ahead and run at once. No database: a fake runner runs the jobs."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import wait_for

from pgqueue.job import ClaimedJob
from pgqueue.slots import CLAIM_JOBS_MAX, OVERDUE_SECONDS, PREFETCH_SECONDS, SOON_SECONDS, Slots

NOW = datetime.now(UTC)


def make_jobs(count: int, task: str = "sync") -> list[ClaimedJob]:
    return [ClaimedJob(n, "q", task, "{}", 0, NOW, 1, 0, 3, "w", uuid.uuid4(), NOW, "{}") for n in range(count)]


class Runner:
    """Runs jobs for so many seconds each, or until the test ends them one by one."""

    def __init__(self, seconds: float | None = 0.0) -> None:
        self.seconds = seconds
        self.began: list[int] = []
        self.ended: list[int] = []
        self.stale: set[int] = set()
        self.room_calls = 0
        self.inside_max = 0
        self._lock = threading.Lock()
        self._end_one: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def end_one(self) -> None:
        self._end_one.put(None)

    @property
    def inside(self) -> int:
        return len(self.began) - len(self.ended)

    def is_async(self, job: ClaimedJob) -> bool:
        return job.task == "async"

    def may_start(self, job: ClaimedJob) -> bool:
        return job.id not in self.stale

    def run_sync(self, job: ClaimedJob) -> None:
        self._begin(job)
        if self.seconds is None:
            self._end_one.get(timeout=30)
        else:
            time.sleep(self.seconds)
        self._end(job)

    async def run_async(self, job: ClaimedJob) -> None:
        self._begin(job)
        await asyncio.sleep(self.seconds or 0)
        self._end(job)

    def call_in_loop(self, slots: Slots, job: ClaimedJob) -> None:
        def create() -> None:
            task = self.loop.create_task(slots.run_in_loop(job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self.loop.call_soon_threadsafe(create)

    def room_again(self) -> None:
        self.room_calls += 1

    def slot_freed(self) -> None: ...

    def _begin(self, job: ClaimedJob) -> None:
        with self._lock:
            self.began.append(job.id)
            self.inside_max = max(self.inside_max, self.inside)

    def _end(self, job: ClaimedJob) -> None:
        with self._lock:
            self.ended.append(job.id)


@pytest.fixture
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.present = 0.0

    def monotonic(self) -> float:
        return self.present


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("pgqueue.slots.time", clock)
    return clock


def wait_until_idle(slots: Slots) -> None:
    wait_for(lambda: slots.running == 0, "the slots to be free")


# How many are wanted ---------------------------------------------------------------------------------------


def test_before_anything_is_known_a_claim_fills_the_slots_and_no_more(runner: Runner) -> None:
    slots = Slots(runner, "q", 4, None)

    assert slots.wanted() == 4


def test_long_jobs_are_claimed_one_by_one_as_slots_become_free(runner: Runner) -> None:
    runner.seconds = PREFETCH_SECONDS * 1.1
    slots = Slots(runner, "q", 2, None)
    slots.add(make_jobs(2))
    wait_until_idle(slots)

    runner.seconds = None
    slots.add(make_jobs(2))

    assert slots.wanted() == 0
    runner.end_one()
    wait_for(lambda: slots.running == 1, "one slot to be free")
    assert slots.wanted() == 1
    runner.end_one()
    wait_until_idle(slots)
    slots.close()


def test_short_jobs_are_claimed_in_batches(runner: Runner) -> None:
    slots = Slots(runner, "q", 2, None)
    slots.add(make_jobs(50))

    wait_until_idle(slots)

    assert slots.wanted() > 50
    assert slots.wanted() <= CLAIM_JOBS_MAX
    slots.close()


def test_a_batch_holds_about_the_prefetch_time_of_work(runner: Runner) -> None:
    runner.seconds = 0.01
    slots = Slots(runner, "q", 2, None)
    slots.add(make_jobs(2))

    wait_until_idle(slots)

    # Two slots and ten jobs of 10 ms for each; a sleep may take longer, never shorter.
    assert 2 < slots.wanted() <= 2 + 20
    slots.close()


def test_a_fixed_prefetch_is_kept_whatever_the_run_time(runner: Runner) -> None:
    slots = Slots(runner, "q", 3, 5)
    assert slots.wanted() == 8

    slots.add(make_jobs(8))
    wait_until_idle(slots)

    assert slots.wanted() == 8
    slots.close()


def test_no_prefetch_means_one_job_for_each_free_slot(runner: Runner) -> None:
    slots = Slots(runner, "q", 3, 0)
    slots.add(make_jobs(3))
    wait_until_idle(slots)

    assert slots.wanted() == 3
    slots.close()


def test_a_buffer_is_filled_again_when_half_of_it_is_used(runner: Runner) -> None:
    runner.seconds = None
    slots = Slots(runner, "q", 1, 10)
    slots.add(make_jobs(11))
    assert slots.wanted() == 0

    for ended in range(1, 5):
        runner.end_one()
        wait_for(lambda ended=ended: len(runner.ended) == ended, "the job to end")
        assert (slots.wanted(), runner.room_calls) == (0, 0)
    runner.end_one()
    wait_for(lambda: runner.room_calls == 1, "the call for more")

    assert slots.wanted() == 5
    slots.close()
    runner.end_one()
    wait_until_idle(slots)


def test_more_is_asked_for_once_until_something_comes(runner: Runner) -> None:
    runner.seconds = None
    slots = Slots(runner, "q", 1, 4)
    slots.add(make_jobs(5))

    for _ in range(4):
        runner.end_one()
    wait_for(lambda: len(runner.ended) == 4, "four jobs to end")

    assert runner.room_calls == 1
    slots.close()
    runner.end_one()
    wait_until_idle(slots)


class TimedRunner(Runner):
    """Each job takes as much of the clock's time as the test says."""

    def __init__(self, clock: Clock, seconds: Callable[[int], float]) -> None:
        super().__init__()
        self.clock = clock
        self.seconds_of = seconds
        self.held: int | None = None  # this job waits until it is told to end

    def run_sync(self, job: ClaimedJob) -> None:
        if job.id == self.held:
            self._begin(job)
            self._end_one.get(timeout=30)
        self.clock.present += self.seconds_of(job.id)


def test_one_job_that_took_long_does_not_make_claims_small(clock: Clock) -> None:
    runner = TimedRunner(clock, lambda job_id: 0.5 if job_id == 99 else 0.001)
    slots = Slots(runner, "q", 1, None)
    slots.add(make_jobs(100))
    wait_until_idle(slots)
    clock.present += 10  # the slots had nothing to do, which says nothing of the jobs
    slots.add([])  # nor does a claim that found nothing

    slots.add(make_jobs(1))
    wait_until_idle(slots)

    # 100 jobs took 0.6 s, which is 6 ms each. By the running average it would be 25.
    assert 1 + 14 <= slots.wanted() <= 1 + 17
    slots.close()


def test_jobs_are_held_to_be_long_once_many_are_although_none_were_before(clock: Clock) -> None:
    long = False
    runner = TimedRunner(clock, lambda _: PREFETCH_SECONDS * 2 if long else 0.001)
    slots = Slots(runner, "q", 1, None)
    slots.add(make_jobs(100))
    wait_until_idle(slots)
    assert slots.wanted() > 50

    long = True
    for _ in range(2):
        slots.add(make_jobs(50))
        wait_until_idle(slots)

    assert slots.wanted() == 1
    slots.close()


def test_what_was_short_before_jobs_were_given_back_makes_no_claim_large_after_it(clock: Clock) -> None:
    runner = TimedRunner(clock, lambda _: 0.001)
    runner.held = 60
    slots = Slots(runner, "q", 1, None)
    slots.add(make_jobs(110))
    wait_for(lambda: runner.began == [60], "the long job to run")
    clock.present += 1

    assert len(slots.take_back(49)) == 49
    runner.end_one()
    wait_until_idle(slots)
    slots.add(make_jobs(1))
    wait_until_idle(slots)

    assert slots.wanted() == 1
    slots.close()


def test_a_single_short_job_among_long_ones_does_not_make_claims_large(clock: Clock) -> None:
    runner = TimedRunner(clock, lambda job_id: 0.0 if job_id == 1 else 1.0)
    slots = Slots(runner, "q", 1, None)
    for job in make_jobs(3):
        slots.add([job])
        wait_until_idle(slots)

    assert slots.wanted() == 1
    slots.close()


# Running ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["sync", "async"])
def test_every_job_taken_in_runs_once_in_order(runner: Runner, task: str) -> None:
    slots = Slots(runner, "q", 1, None)

    slots.add(make_jobs(200, task))
    wait_until_idle(slots)

    assert runner.ended == list(range(200))
    assert runner.inside_max == 1
    slots.close()


def test_a_job_whose_claim_is_in_doubt_is_passed_over(runner: Runner) -> None:
    runner.stale = {1, 2, 5}
    slots = Slots(runner, "q", 1, None)
    jobs = make_jobs(8)
    jobs[5:] = [ClaimedJob(n, "q", "async", "{}", 0, NOW, 1, 0, 3, "w", uuid.uuid4(), NOW, "{}") for n in (5, 6, 7)]

    slots.add(jobs)
    wait_until_idle(slots)

    assert runner.ended == [0, 3, 4, 6, 7]
    slots.close()


def test_jobs_passed_over_do_not_count_as_short_ones(runner: Runner) -> None:
    runner.stale = set(range(100))
    slots = Slots(runner, "q", 2, None)

    slots.add(make_jobs(100))
    wait_until_idle(slots)

    assert slots.wanted() == 2
    slots.close()


# What is overdue -------------------------------------------------------------------------------------------


def stuck(runner: Runner, waiting: int, prefetch: int | None = None) -> Slots:
    """Two slots in the midst of jobs, and so many jobs in the buffer."""
    runner.seconds = None
    slots = Slots(runner, "q", 2, prefetch)
    slots.add(make_jobs(2 + waiting))
    wait_for(lambda: runner.inside == 2, "two jobs to run")
    return slots


def end(runner: Runner, slots: Slots, count: int) -> None:
    """Let so many jobs end, and the next ones begin."""
    for _ in range(count):
        began = len(runner.began)
        runner.end_one()
        wait_for(lambda: len(runner.began) > began or not slots.holds_ahead, "the next job to begin")  # noqa: B023


def finish_all(runner: Runner, slots: Slots) -> None:
    slots.close()
    while runner.inside:
        runner.end_one()
        wait_for(lambda: runner.inside == slots.running, "a job to end")


def test_jobs_are_overdue_when_the_buffer_did_not_move_between_two_looks(runner: Runner, clock: Clock) -> None:
    slots = stuck(runner, 5)

    clock.present += OVERDUE_SECONDS * 0.9
    looks = [slots.overdue()]
    clock.present += OVERDUE_SECONDS * 0.2
    looks.append(slots.overdue())

    assert looks == [0, 5]
    finish_all(runner, slots)


def test_jobs_that_came_just_now_are_not_overdue_in_a_buffer_that_moves(runner: Runner, clock: Clock) -> None:
    slots = stuck(runner, 3)
    end(runner, slots, 3)
    slots.add(make_jobs(50))

    clock.present += OVERDUE_SECONDS

    assert slots.overdue() == 0
    finish_all(runner, slots)


def test_a_buffer_that_moves_slowly_keeps_what_will_start_soon(runner: Runner, clock: Clock) -> None:
    slots = stuck(runner, 20)
    end(runner, slots, 3)

    clock.present += OVERDUE_SECONDS

    assert slots.overdue() == 20 - 3 - round(3 * SOON_SECONDS / OVERDUE_SECONDS)
    finish_all(runner, slots)


def test_what_is_taken_back_would_have_started_last_and_less_is_held_ahead_from_then_on(
    runner: Runner, clock: Clock
) -> None:
    slots = stuck(runner, 6)

    taken = slots.take_back(4)

    assert [job.id for job in taken] == [7, 6, 5, 4]
    assert slots.started == 4
    assert slots.wanted() <= 2
    assert [job.id for job in slots.take_back(9)] == [3, 2]
    assert slots.wanted() == 0
    assert slots.take_back(1) == []
    finish_all(runner, slots)


def test_a_fixed_prefetch_is_never_overdue(runner: Runner, clock: Clock) -> None:
    slots = stuck(runner, 5, prefetch=5)

    clock.present += 100

    assert slots.overdue() == 0
    finish_all(runner, slots)


def test_nothing_is_claimed_ahead_of_slots_that_have_been_busy_for_long(runner: Runner, clock: Clock) -> None:
    slots = Slots(runner, "q", 2, None)
    slots.add(make_jobs(100))
    wait_until_idle(slots)
    runner.seconds = None
    slots.add(make_jobs(2))
    wait_for(lambda: runner.inside == 2, "two jobs to run")
    assert slots.wanted() > 100

    clock.present += PREFETCH_SECONDS

    assert slots.wanted() == 0
    finish_all(runner, slots)


def test_closing_gives_back_what_was_not_started_and_takes_nothing_more(runner: Runner) -> None:
    runner.seconds = None
    slots = Slots(runner, "q", 2, 10)
    slots.add(make_jobs(6))
    wait_for(lambda: runner.inside == 2, "two jobs to run")

    unstarted = slots.close()

    assert [job.id for job in unstarted] == [2, 3, 4, 5]
    assert slots.wanted() == 0
    assert slots.add(make_jobs(1)) is False
    runner.end_one()
    runner.end_one()
    wait_until_idle(slots)
    assert sorted(runner.ended) == [0, 1]


def test_all_threads_are_there_before_a_job_runs_that_would_keep_them_from_starting(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    start = threading.Thread.start

    def note(thread: threading.Thread) -> None:
        order.append("thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note)
    slots = Slots(runner, "q", 3, prefetch=None)
    monkeypatch.setattr(runner, "run_sync", lambda job: order.append("job"))

    slots.add(make_jobs(3))
    wait_until_idle(slots)

    assert order == ["thread"] * 3 + ["job"] * 3


def test_jobs_run_in_the_threads_that_the_system_allows(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    slots = Slots(runner, "q", 3, prefetch=None)

    def one_more(thread: threading.Thread) -> None:
        if slots._threads:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", one_more)

    with pytest.raises(RuntimeError, match="can't start new thread"):
        slots.add(make_jobs(3))
    wait_until_idle(slots)

    assert runner.ended == [0, 1, 2]


def test_a_coroutine_starts_although_the_system_allows_no_thread_for_the_job_before_it(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    slots = Slots(runner, "q", 2, prefetch=None)
    (asynchronous,) = make_jobs(1, "async")
    _, synchronous = make_jobs(2)

    with pytest.raises(RuntimeError, match="can't start new thread"):
        slots.add([synchronous, asynchronous])
    wait_for(lambda: runner.ended == [asynchronous.id], "the coroutine to end")


def test_threads_are_started_as_they_are_needed_and_end_when_the_slots_are_closed(runner: Runner) -> None:
    def threads() -> int:
        return sum(thread.name == "pgqueue-counted" for thread in threading.enumerate())

    slots = Slots(runner, "counted", 8, None)
    slots.add(make_jobs(20, "async"))
    wait_until_idle(slots)
    assert threads() == 0

    runner.seconds = None
    slots.add(make_jobs(3))
    wait_for(lambda: runner.inside == 3, "three jobs to run")
    assert threads() == 3
    for _ in range(3):
        runner.end_one()
    wait_until_idle(slots)

    slots.close()
    wait_for(lambda: threads() == 0, "the threads to end")


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 4),
    prefetch=st.none() | st.integers(0, 6),
    batches=st.lists(st.lists(st.sampled_from(["sync", "async"]), max_size=12), max_size=5),
    doubtful=st.sets(st.integers(0, 60), max_size=5),
)
def test_whatever_comes_runs_once_and_never_more_at_a_time_than_there_are_slots(
    count: int, prefetch: int | None, batches: list[list[str]], doubtful: set[int]
) -> None:
    runner = Runner()
    runner.stale = doubtful
    slots = Slots(runner, "q", count, prefetch)
    numbers = iter(range(1000))
    expected = []
    try:
        for batch in batches:
            jobs = [
                ClaimedJob(next(numbers), "q", task, "{}", 0, NOW, 1, 0, 3, "w", uuid.uuid4(), NOW, "{}")
                for task in batch
            ]
            expected += [job.id for job in jobs if job.id not in doubtful]
            assert slots.add(jobs)
            assert 0 <= slots.wanted() <= CLAIM_JOBS_MAX
        wait_until_idle(slots)
    finally:
        assert slots.close() == []
        runner.close()

    assert sorted(runner.ended) == expected
    assert runner.inside_max <= count
    assert slots.started == sum(map(len, batches))
