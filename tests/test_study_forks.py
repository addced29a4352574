"""Runs of a study are forks: their exit code and log, their claim, and whose files they import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastkd.study.forks import Fork
from fastkd.study.locks import Claim
from fastkd.study.worker import _kill_group

# without a guard: a child that imports it would start a child
CALLER = """
from pathlib import Path
from fastkd.study.forks import Fork
from fastkd.study.locks import Claim

claim = Claim.take(Path("claim"))
child = Fork(["evaluate", "nowhere"], Path("log.txt"), {"OMP_NUM_THREADS": "1"}, claim.handle)
child.wait(100)
print("ended with", child.returncode, flush=True)
"""


def started(folder: Path, *arguments: str) -> tuple[Fork, Claim]:
    claim = Claim.take(folder / "claim")
    assert claim is not None
    return Fork(arguments, folder / "log.txt", {}, claim.handle), claim


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


def test_a_fork_imports_neither_its_callers_script_nor_the_working_folder(tmp_path: Path) -> None:
    place = tmp_path / "work"
    place.mkdir()
    for name in ("sklearn", "typer", "yaml"):
        (place / f"{name}.py").write_text("raise SystemExit('from the working folder')\n")
    script = tmp_path / "caller.py"
    script.write_text(CALLER)
    command = [sys.executable, str(script)]
    made = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
    assert (made.stdout, made.returncode) == ("ended with 2\n", 0), made.stderr
    (said,) = (place / "log.txt").read_text().splitlines()
    assert said.startswith("fastkd: nowhere")


# a driver that was asked anything in the server answers no more in its forks
LOOKING = """
import sys
import torch

def asked(*given, **named):
    raise SystemExit("a GPU was asked for")

for name in ("is_available", "device_count", "init", "_lazy_init", "current_device"):
    setattr(torch.cuda, name, asked)
from importlib import import_module
from fastkd.study.forks import IMPORTED
list(map(import_module, IMPORTED))
print(sorted({"deepspeed"} & set(sys.modules)), flush=True)
"""


def test_the_server_asks_no_gpu() -> None:
    command = [sys.executable, "-c", LOOKING]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (made.stdout, made.returncode) == ("[]\n", 0), made.stderr
