"""Runs of a study are forks: their exit code and log, their claim, and whose files they import."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import psutil
import pytest

from fastkd.signals import STOPPING
from fastkd.study import forks
from fastkd.study.forks import NOT_TOLD, Fork
from fastkd.study.locks import Claim
from fastkd.study.worker import _kill_group

# imported before and after all that the server imports: a driver that was asked anything in the
# server answers no more in its forks
TRAP = """
import torch

def asked(*given, **named):
    raise SystemExit("a GPU was asked for")

names = "is_available", "device_count", "init", "_lazy_init", "current_device"
kept = {name: getattr(torch.cuda, name) for name in names}
for name in names:
    setattr(torch.cuda, name, asked)
"""
TOLD = """
import sys
from pathlib import Path
import torch
import trap

for name, function in trap.kept.items():
    setattr(torch.cuda, name, function)
Path(__file__).with_name("imported").write_text(str(sorted({"deepspeed"} & set(sys.modules))))
"""


class First(NamedTuple):
    """The fork that a server was started for."""

    code: int | None
    said: list[str]
    imported: str
    """What its server has imported, of what it should not."""


def started(folder: Path, *arguments: str) -> tuple[Fork, Claim]:
    claim = Claim.take(folder / "claim")
    assert claim is not None
    return Fork(arguments, folder / "log.txt", {}, claim.handle), claim


def _signalled(start: Callable[[], None]) -> Callable[[], None]:
    """A server's start, at which its group is told to end, as by a terminal that closes: it is in
    the caller's for as long as it takes to start an interpreter."""

    def started_and_told() -> None:
        start()
        for number in STOPPING:
            os.kill(_server(), number)

    return started_and_told


def _server() -> int:
    """Its process."""
    pid: int = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


@pytest.mark.parametrize(
    ("given", "threads"), [("4,2", 4), ("3", 3), (" 2 ,1", 2), ("", None), ("0", None), ("x", None)]
)
def test_a_fork_has_the_threads_of_the_outermost_level(given: str, threads: int | None) -> None:
    assert forks._threads(given) == threads


@pytest.fixture(scope="module", autouse=True)
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    """A server of its own, started from a script without a guard, in a folder with files of the
    names that it imports."""
    work, modules = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("modules")
    for name in ("sklearn", "typer", "yaml"):
        (work / f"{name}.py").write_text("raise SystemExit('from the working folder')\n")
    (modules / "trap.py").write_text(TRAP)
    (modules / "told.py").write_text(TOLD)
    caller = ModuleType("__main__")
    caller.__file__ = str(work / "caller.py")
    Path(caller.__file__).write_text("raise SystemExit('from the script of the caller')\n")
    # one that an earlier test has left
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as changed:
        changed.setitem(sys.modules, "__main__", caller)
        changed.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
        changed.syspath_prepend(modules)
        changed.chdir(work)
        changed.setattr(forks, "IMPORTED", [forks.IMPORTED[0], "trap", *forks.IMPORTED[1:], "told"])
        changed.setattr(forkserver, "ensure_running", _signalled(forkserver.ensure_running))
        # too long for the path of a socket
        changed.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("x" * 100)))
        # and none made before
        changed.setitem(multiprocessing.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
        child, claim = started(work, "evaluate", "nowhere")
        child.wait(120)
    claim.release()
    said = (work / "log.txt").read_text().splitlines()
    return First(child.returncode, said, (modules / "imported").read_text())


def waiting(folder: Path) -> tuple[Fork, Claim]:
    """A command that waits for its recipe to be written."""
    os.mkfifo(folder / "recipe.yaml")
    child, claim = started(folder, "distill", str(folder / "recipe.yaml"))
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(1.0)
    return child, claim


def test_a_fork_ends_and_says_what_its_command_does(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("before\n")
    child, claim = started(tmp_path, "evaluate", "nowhere")
    child.wait(60)
    claim.release()
    assert child.returncode == 2
    before, *said = (tmp_path / "log.txt").read_text().splitlines()
    # added to what was there, and nothing else is in it
    assert before == "before" and len(said) == 1 and said[0].startswith("fastkd: nowhere")


def test_a_fork_holds_its_claim_and_stops_when_asked(tmp_path: Path) -> None:
    child, claim = waiting(tmp_path)
    claim.release()
    # as after the end of the study that started it
    assert Claim.take(tmp_path / "claim") is None
    child.send_signal(signal.SIGTERM)
    child.wait(60)
    assert child.returncode == 130
    again = Claim.take(tmp_path / "claim")
    assert again is not None
    again.release()
    # nobody is there to be signalled
    child.send_signal(signal.SIGTERM)


def test_signals_to_the_group_are_the_callers_alone(tmp_path: Path) -> None:
    child, claim = waiting(tmp_path)
    assert len({os.getpgid(pid) for pid in (0, _server(), child.pid)}) == 3
    # those of its own are not blocked
    child.send_signal(signal.SIGHUP)
    child.wait(60)
    claim.release()
    assert child.returncode == 130


def test_many_threads_wait_for_the_ends_of_their_own(tmp_path: Path) -> None:
    def made(number: int) -> list[int | None]:
        codes = []
        for turn in range(4):
            folder = tmp_path / f"{number}-{turn}"
            folder.mkdir()
            child, claim = started(folder, "evaluate", "nowhere")
            child.wait(120)
            claim.release()
            codes.append(child.returncode)
        return codes

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(made, range(4))) == [[2] * 4] * 4


def test_a_fork_is_killed_with_what_it_started(tmp_path: Path) -> None:
    child, claim = waiting(tmp_path)
    assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
    start = time.monotonic()
    _kill_group(child.pid)
    child.wait(60)
    claim.release()
    assert child.returncode == -signal.SIGKILL and time.monotonic() - start < 30
    _kill_group(child.pid)


def test_a_fork_imports_neither_its_callers_script_nor_the_working_folder(first: First) -> None:
    (said,) = first.said
    assert first.code == 2 and said.startswith("fastkd: nowhere")


def test_the_server_asks_no_gpu(first: First) -> None:
    assert first.imported == "[]"


def test_a_fork_whose_server_was_killed_is_waited_for(tmp_path: Path) -> None:
    child, claim = waiting(tmp_path)
    os.kill(_server(), signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
    assert psutil.pid_exists(child.pid)
    child.send_signal(signal.SIGTERM)
    while child.returncode is None:
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.2)
    claim.release()
    assert child.returncode == NOT_TOLD
