"""The supervisor of several worker processes, with processes that are no workers: they do as the test wants."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import wait_for

from pgqueue import supervisor
from pgqueue.supervisor import Supervisor


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(supervisor, "RESTART_SECONDS_MIN", 0.01)
    monkeypatch.setattr(supervisor, "RESTART_SECONDS_MAX", 0.04)
    monkeypatch.setattr(supervisor, "ABORT_SECONDS", 0.1)
    caplog.set_level(logging.INFO)


@pytest.fixture(autouse=True)
def no_signal_ends_the_tests() -> Iterator[None]:
    """Should one come when the supervisor has ended."""
    before = {number: signal.signal(number, lambda *_: None) for number in supervisor.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Children:
    """What the processes wrote: each its pid."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "pids"
        self.file.touch()

    def shell(self, script: str) -> list[str]:
        """A command that notes its pid and then runs the script."""
        return ["/bin/sh", "-c", f'echo $$ >> "{self.file}"; {script}']

    def pids(self) -> list[int]:
        return [int(line) for line in self.file.read_text().split()]


@pytest.fixture
def children(tmp_path: Path) -> Children:
    return Children(tmp_path)


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread, for the supervisor needs the main one: that gets the signals."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)
            stop()
            stop()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


def supervise(command: list[str], processes: int = 1, *, drain: bool = False) -> Supervisor:
    return Supervisor(command, processes, environ=os.environ, drain=drain)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_the_system_gives_to_another_thread_stops_the_processes_too(children: Children) -> None:
    def stop_from_here() -> None:
        wait_for(lambda: children.pids(), "a process")
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    with meanwhile(stop_from_here):
        code = supervise(children.shell("exec sleep 1000")).run()

    assert code == 0


def test_a_process_that_is_killed_is_replaced(children: Children, caplog: pytest.LogCaptureFixture) -> None:
    def kill_one() -> None:
        pids = wait_for(lambda: pids if len(pids := children.pids()) == 2 else None, "two processes")
        os.kill(pids[0], signal.SIGKILL)
        wait_for(lambda: len(children.pids()) >= 3, "another process")
        stop()

    with meanwhile(kill_one):
        code = supervise(children.shell("exec sleep 1000"), 2).run()

    assert code == 0
    assert "was killed by SIGKILL unexpectedly; starting another in 0.01 s" in caplog.text
    assert [pid for pid in children.pids() if is_alive(pid)] == []


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_that_dies_again_and_again_is_replaced_less_and_less_often(
    children: Children, caplog: pytest.LogCaptureFixture
) -> None:
    def watch() -> None:
        wait_for(lambda: len(children.pids()) >= 5, "five processes")
        stop()

    with meanwhile(watch):
        supervise(children.shell("exit 1")).run()

    assert waits(caplog)[:4] == ["0.01", "0.02", "0.04", "0.04"]


def test_one_that_was_well_for_long_is_replaced_soon(
    children: Children, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "WELL_SECONDS", 0.0)

    def watch() -> None:
        wait_for(lambda: len(children.pids()) >= 4, "four processes")
        stop()

    with meanwhile(watch):
        supervise(children.shell("exit 1")).run()

    assert set(waits(caplog)) == {"0.01"}


def waits(caplog: pytest.LogCaptureFixture) -> list[str]:
    """How long it was until each process was to be replaced, in seconds."""
    return re.findall(r"ended with exit code 1 unexpectedly; starting another in (\S+) s", caplog.text)


def test_one_that_has_run_its_jobs_makes_way_for_a_fresh_one(
    children: Children, caplog: pytest.LogCaptureFixture
) -> None:
    def watch() -> None:
        wait_for(lambda: len(children.pids()) >= 3, "three processes")
        stop()

    with meanwhile(watch):
        code = supervise(children.shell("exit 0")).run()

    assert code == 0
    assert "is done; starting another" in caplog.text
    assert "unexpectedly" not in caplog.text


def test_nothing_is_started_once_a_signal_came(
    children: Children, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_SECONDS_MIN", 1000.0)
    monkeypatch.setattr(supervisor, "RESTART_SECONDS_MAX", 1000.0)

    def watch() -> None:
        wait_for(lambda: waits(caplog), "the process to end")
        stop()

    with meanwhile(watch):
        code = supervise(children.shell("exit 1")).run()

    assert code == 0
    assert len(children.pids()) == 1


@pytest.mark.parametrize(
    ("script", "expected"),
    [("exit 0", 0), ("exit 8", 8), ("exit 5", 1), ("kill -KILL $$", 1)],
    ids=["all well", "dead jobs", "failed", "killed"],
)
def test_a_drain_replaces_no_process_and_ends_with_the_worst_of_their_codes(
    children: Children, script: str, expected: int
) -> None:
    first_only = f'if [ $(head -n 1 "{children.file}") = $$ ]; then {script}; fi'

    code = supervise(children.shell(first_only), 3, drain=True).run()

    assert code == expected
    assert len(children.pids()) == 3


@pytest.mark.parametrize(("second", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_processes_that_do_not_heed_the_second_signal_are_killed(
    children: Children, second: signal.Signals, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    def signal_twice() -> None:
        wait_for(lambda: len(children.pids()) == 2, "two processes")
        stop()
        wait_for(lambda: "SIGTERM: stopping 2 worker processes" in caplog.text, "the first signal to be heeded")
        os.kill(os.getpid(), second)

    deaf = children.shell("while :; do sleep 0.01; done")
    deaf[2] = f"trap '' TERM INT; {deaf[2]}"
    with meanwhile(signal_twice):
        code = supervise(deaf, 2).run()

    assert code == expected
    assert f"{second.name} again: stopping the worker processes at once" in caplog.text
    assert [pid for pid in children.pids() if is_alive(pid)] == []


def test_a_program_that_cannot_be_started_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    code = supervise(["/there/is/no/such/program"], 2, drain=True).run()

    assert code == 1
    assert caplog.text.count("cannot be started: [Errno 2] No such file or directory") == 2


def test_signals_do_what_they_did_before_once_it_has_ended(children: Children) -> None:
    before = [signal.getsignal(number) for number in supervisor.SIGNALS]

    supervise(children.shell("exit 0"), drain=True).run()

    assert [signal.getsignal(number) for number in supervisor.SIGNALS] == before
