"""Starts the commands of a soak, kills them in time, and gathers what they said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from soak_child import VARIABLE, Orders
from tiny_runs import run_environment
from warm_server import MODULES

CHILD = Path(__file__).with_name("soak_child.py")
# many times what the slowest command takes
LIMIT_SECONDS = 300.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (-9 where it was killed) and what it said."""

    code: int
    printed: str
    said: str
    seconds: float
    hung: bool = False

    @property
    def lines(self) -> list[str]:
        """What fastkd said to the user."""
        return [line for line in self.said.splitlines() if line.startswith("fastkd: ")]


@dataclass
class Timer:
    """Kills a process, and those that its ranks noted, after some seconds."""

    seconds: float
    notes: Path
    name: str
    """The rank that is killed, or `all`."""
    group: bool

    def start(self, pid: int) -> threading.Timer:
        """Begin to wait."""
        timer = threading.Timer(self.seconds, self._kill, [pid])
        timer.daemon = True
        timer.start()
        return timer

    def _kill(self, pid: int) -> None:
        noted = [self.notes / f"{self.name}.pid"] if self.name != "all" else []
        pids = [int(path.read_text() or 0) for path in noted if path.is_file()]
        for victim in pids if pids and not self.group else [pid, *pids_of(self.notes)]:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)


def pids_of(notes: Path) -> list[int]:
    """The processes of a command that still live: a number alone may be another's by now."""
    found = []
    for path in notes.glob("*.pid"):
        environment = Path("/proc", path.read_text() or "0", "environ")
        with suppress(OSError):
            if str(notes).encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
    return found


class Launcher:
    """Starts commands, one at a time; those on one rank from a server that has made the imports.

    Args:
        modules: that the server imports, or all that a run does.
    """

    def __init__(self, *modules: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(CHILD), "--serve", *(modules or MODULES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=_environment(),
        )

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def run(
        self, arguments: list[str], orders: Orders, ranks: int = 1, timer: Timer | None = None
    ) -> Ended:
        """Run a command to its end."""
        notes = Path(orders.notes)
        notes.mkdir(exist_ok=True)
        start = self._torchrun if ranks > 1 else self._forked
        code, hung, seconds = start(arguments, orders, timer)
        said = "".join(path.read_text(errors="replace") for path in sorted(notes.glob("*.err")))
        if ranks > 1:
            # of torchrun's own words, the exit code of the rank that failed
            if code == 1 and "exitcode  : 2 " in (notes / "torchrun").read_text(errors="replace"):
                code = 2
            _wait_for_ranks(notes)
        return Ended(code, (notes / "printed").read_text(errors="replace"), said, seconds, hung)

    def _forked(
        self, arguments: list[str], orders: Orders, timer: Timer | None
    ) -> tuple[int, bool, float]:
        notes = Path(orders.notes)
        asked = {
            "arguments": arguments,
            "orders": json.dumps(asdict(orders)),
            "output": str(notes / "printed"),
            "errors": str(notes / "command.err"),
        }
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        pid = int(self._server.stdout.readline())
        # the imports are over
        began = time.monotonic()
        limit = Timer(LIMIT_SECONDS, notes, "all", group=True)
        timers = [limit.start(pid), *([timer.start(pid)] if timer else [])]
        code = int(self._server.stdout.readline())
        hung = timers[0].finished.is_set()
        for waiting in timers:
            waiting.cancel()
        return code, hung, time.monotonic() - began

    def _torchrun(
        self, arguments: list[str], orders: Orders, timer: Timer | None
    ) -> tuple[int, bool, float]:
        notes, began = Path(orders.notes), time.monotonic()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = {**_environment(), VARIABLE: json.dumps(asdict(orders))}
        command = [sys.executable, *launcher, str(CHILD), *arguments]
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment)
        waiting = timer.start(child.pid) if timer else None
        hung = False
        try:
            printed, said = child.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            hung = True
            for pid in (child.pid, *pids_of(notes)):
                os.kill(pid, signal.SIGKILL)
            printed, said = child.communicate()
        (notes / "printed").write_bytes(printed)
        (notes / "torchrun").write_bytes(said)
        if waiting:
            waiting.cancel()
        return child.returncode, hung, time.monotonic() - began


def _wait_for_ranks(notes: Path) -> None:
    """A rank whose launcher was killed goes on alone for a moment; a machine would be off."""
    deadline = time.monotonic() + 30
    while pids_of(notes) and time.monotonic() < deadline:
        time.sleep(0.1)
    end_all(notes)


def end_all(notes: Path) -> None:
    """Kill what a command left."""
    for pid in pids_of(notes):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests / "helpers"), *filter(None, sys.path)])
    return {**run_environment(), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
