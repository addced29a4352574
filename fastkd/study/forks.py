"""Processes that make a run each and don't wait for their imports.

A server imports what runs need and nothing else: no threads, no GPU. Every run is a fork of it, so
it has a process of its own, as DeepSpeed and the process group want, and starts at once.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastkd.errors import UserError, one_line
from fastkd.launcher import without_launcher
from fastkd.variables import variable

_SERVER = multiprocessing.get_context("forkserver")
IMPORTED = ["fastkd.study.forks", "fastkd.cli", "fastkd.api", "sklearn.metrics", "scipy.stats"]
"""What the server imports: what every run does, whatever its models are."""
# multiprocessing looks after all children whenever it starts one, and an exit code is read once: a
# thread that waits for its child must not look at the same time
_LOCK = threading.Lock()


class Fork:
    """A `fastkd` command in a process of its own, as `subprocess` would have it.

    Args:
        arguments: of the command.
        log: file that all it says is added to.
        environment: variables that it has beside ours.
        claim: file descriptor that it holds for as long as it lives.

    Raises:
        UserError: the server has ended.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str], claim: int
    ) -> None:
        shown = {**without_launcher(os.environ), **environment}
        with _LOCK:
            _SERVER.set_forkserver_preload(IMPORTED)
            # the server imports nothing from the working folder
            with variable("PYTHONSAFEPATH", "1"):
                forkserver.ensure_running()
            given = list(arguments), str(log), shown, _Held(claim)
            self._process = _SERVER.Process(target=_run, args=given)
            try:
                with _without_main():
                    self._process.start()
            except (EOFError, ConnectionError) as error:
                raise UserError(
                    f"the process that starts the runs has ended ({one_line(error)}); run the "
                    "study again to go on"
                ) from error
        assert self._process.pid is not None, "it was started"
        self.pid = self._process.pid
        self.returncode: int | None = None
        """Exit code, or a signal's number below 0; `None` until `wait` has seen its end."""

    def wait(self, timeout: float) -> None:
        """Wait for its end.

        Raises:
            TimeoutExpired: it lives on after so many seconds.
        """
        if not connection.wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired("fastkd", timeout)
        with _LOCK:
            self._process.join()
            self.returncode = self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is there still."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


class _Held:
    """A file descriptor on its way to a child."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __getstate__(self) -> Any:
        return {"handle": DupFd(self.handle)}

    def __setstate__(self, state: Any) -> None:
        self.handle = state["handle"].detach()


def _run(arguments: list[str], log: str, environment: dict[str, str], claim: _Held) -> None:
    # Ctrl-C is for the study, which passes it on
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    said = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(source, target)
    # OpenMP read its own variable when it was imported
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    sys.argv = ["fastkd", *arguments]
    runpy.run_module("fastkd", run_name="__main__", alter_sys=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """Or every child would import the caller's script, which may start a study."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
