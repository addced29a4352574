"""Processes that make a run each and don't wait for their imports.

A server imports what runs need and nothing else: no threads, no GPU. Every run is a fork of it, so
it has a process of its own, as DeepSpeed and the process group want, and starts at once. Signals
that a terminal or timeout(1) sends to the whole group are for the study, which passes them on: the
server is in a session of its own, and ends once nobody is left who may ask it for a run.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch

from fastkd.errors import UserError, one_line
from fastkd.launcher import without_launcher
from fastkd.signals import STOPPING
from fastkd.variables import variable

_SERVER = multiprocessing.get_context("forkserver")
IMPORTED = [
    "fastkd.own_session",
    "fastkd.study.forks",
    "fastkd.cli",
    "fastkd.api",
    "sklearn.metrics",
    "scipy.stats",
]
"""What the server imports: what every run does, whatever its models are."""
NOT_TOLD = 255
"""Exit code of a run whose server ended before it, which alone could have told it."""
# a socket's path has 103 bytes on any system, and multiprocessing adds 32 to the folder's
_SOCKET_FOLDER = 70
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
        UserError: the server has ended, or has no place for its socket.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str], claim: int
    ) -> None:
        shown = {**without_launcher(os.environ), **environment}
        with _LOCK:
            _SERVER.set_forkserver_preload(IMPORTED)
            # the server imports nothing from the working folder
            with variable("PYTHONSAFEPATH", "1"), _stop_signals_blocked(), _short_folder():
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
        self._orphan: psutil.Process | None = None
        self.returncode: int | None = None
        """Exit code, or a signal's number below 0, or `NOT_TOLD`; `None` until `wait` has seen its
        end."""

    def wait(self, timeout: float) -> None:
        """Wait for its end.

        Raises:
            TimeoutExpired: it lives on after so many seconds.
        """
        if self._orphan is None and not connection.wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired("fastkd", timeout)
        with _LOCK:
            self._process.join()
        if self._process.exitcode == NOT_TOLD:
            self._wait_orphaned(timeout)
        self.returncode = self._process.exitcode

    def _wait_orphaned(self, timeout: float) -> None:
        """`wait` for one that may live on without its server."""
        try:
            self._orphan = self._orphan or psutil.Process(self.pid)
            # nobody may be there to bury it
            if self._orphan.is_running() and self._orphan.status() != psutil.STATUS_ZOMBIE:
                time.sleep(timeout)
                raise subprocess.TimeoutExpired("fastkd", timeout)
        except psutil.NoSuchProcess:
            pass

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
    os.setsid()
    # the server ignores Ctrl-C, and was started with all of them blocked
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    os.environ.clear()
    os.environ.update(environment)
    said = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(source, target)
    # OpenMP read its own variable when it was imported
    threads = _threads(environment.get("OMP_NUM_THREADS", ""))
    if threads is not None:
        torch.set_num_threads(threads)
    sys.argv = ["fastkd", *arguments]
    runpy.run_module("fastkd", run_name="__main__", alter_sys=True)


def _threads(given: str) -> int | None:
    """The threads that OpenMP would start; it has a number for each level of nesting, and ignores
    what is none."""
    first = given.partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


@contextmanager
def _short_folder() -> Iterator[None]:
    """Let the server's socket lie in /tmp where TMPDIR is too long for the path of one.

    Raises:
        UserError: no socket can be there.
    """
    given, before = tempfile.gettempdir(), tempfile.tempdir
    long = len(os.fsencode(given)) > _SOCKET_FOLDER
    try:
        tempfile.tempdir = "/tmp" if long else before
        yield
    except OSError as error:
        if not long:
            raise
        raise UserError(
            f"TMPDIR {given} is too long for a socket, and /tmp has no place for it "
            f"({one_line(error)}); give a TMPDIR of at most {_SOCKET_FOLDER} bytes"
        ) from error
    finally:
        tempfile.tempdir = before


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """For this thread and for the server that it starts, until that has a session of its own; other
    threads hear them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        # whoever starts this one unblocks two of them
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main() -> Iterator[None]:
    """Or every child would import the caller's script, which may start a study."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
