"""Processes that call a function: results, errors, kills, and nothing left behind."""

import contextlib
import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import psutil
import pytest

from fastkd.data.workers import Workers
from fastkd.errors import UserError


def double(number: int) -> tuple[int, int]:
    if number == 7:
        raise ValueError("seven")
    if number == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number, os.getpid()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_every_call_gets_its_own_result() -> None:
    before = children()
    with closing(Workers(double, 2, "lost", "refused")) as workers:
        started = children() - before
        assert len(started) == 2
        futures = [workers.submit(100 + number) for number in range(40)]
        found = [future.result() for future in futures]
        assert [result for result, _ in found] == [2 * (100 + number) for number in range(40)]
        assert {pid for _, pid in found} <= started
    assert children() == before


def test_large_arguments_and_results_pass_at_once() -> None:
    with closing(Workers(bytes.upper, 2, "lost", "refused")) as workers:
        futures = [workers.submit(b"a" * (1 << 21)) for _ in range(6)]
        assert all(future.result() == b"A" * (1 << 21) for future in futures)


def test_a_process_that_may_have_no_children_does_the_work_itself() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        (found,) = pool.map(in_a_pool, [3])
    assert found == (6, "seven", True)


def in_a_pool(number: int) -> tuple[int, str, bool]:
    """Twice the number, what 7 comes to, and whether both were worked out here."""
    with closing(Workers(double, 2, "lost", "refused")) as workers:
        done, failed = workers.submit(number), workers.submit(7)
    doubled, pid = done.result()
    return doubled, str(failed.exception()), pid == os.getpid()


def test_an_error_of_the_function_is_raised_where_its_result_is_asked_for() -> None:
    with closing(Workers(double, 1, "lost", "refused")) as workers:
        wrong, right = workers.submit(7), workers.submit(8)
        assert right.result()[0] == 16
        with pytest.raises(ValueError, match="seven"):
            wrong.result()


def test_a_killed_process_is_told_and_the_others_end() -> None:
    before = children()
    workers = Workers(double, 2, "one of 2 was killed", "refused")
    with closing(workers), pytest.raises(UserError, match=r"^one of 2 was killed$"):
        workers.submit(9).result()
    assert children() == before


@pytest.mark.parametrize("what", ["process", "thread"])
def test_what_the_system_does_not_start_is_told_and_the_others_end(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, fork, started = children(), os.fork, []

    def limited() -> int:
        started.append(1)
        if len(started) > 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    if what == "process":
        monkeypatch.setattr(os, "fork", limited)
    else:
        monkeypatch.setattr(threading.Thread, "start", refuse)
    said = r"^set it lower \((Resource temp|can't start new thread)"
    with (
        pytest.raises(UserError, match=said),
        closing(Workers(double, 3, "lost", "set it lower")) as w,
    ):
        w.submit(1)
    assert children() == before


def test_signals_that_ask_the_run_for_an_end_leave_them_alone() -> None:
    with closing(Workers(double, 1, "lost", "refused")) as workers:
        (_, pid) = workers.submit(1).result()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert workers.submit(2).result() == (4, pid)


def test_forgotten_ones_end() -> None:
    before = children()
    workers = Workers(double, 2, "lost", "refused")
    workers.submit(1).result()
    del workers
    assert children() == before


def test_forgotten_ones_wait_for_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before, joined = children(), []
    workers = Workers(double, 1, "lost", "refused")
    workers.submit(1).result()
    # in a cycle, so that the collector finds it: within a lock of threading's, if it likes
    cycle = [workers]
    cycle.append(cycle)  # type: ignore[arg-type]
    monkeypatch.setattr(threading.Thread, "join", lambda thread, *_: joined.append(thread))
    del workers, cycle
    gc.collect()
    assert children() == before and not joined


_ENDS = """
import os, signal, sys, time
from fastkd.data.workers import Workers
first, second = Workers(abs, 2, "lost", "refused"), Workers(abs, 2, "lost", "refused")
assert first.submit(-1).result() == second.submit(-1).result() == 1
import psutil
print(*(child.pid for child in psutil.Process().children()), flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_they_end_with_their_process(end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ENDS, end], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    deadline = time.monotonic() + 10
    while any(map(_lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_lives, pids))
    assert done.stderr == ""


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
