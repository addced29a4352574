"""One child process: a run of its own, watched, stopped when asked to, and what it came to.

A run gets a process of its own because DeepSpeed and the process group keep state in one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from fastkd.errors import DiskError, UserError
from fastkd.files.disk import FULL, disk_errors, write_whole
from fastkd.launcher import without_launcher
from fastkd.recipe import AnyRecipe, dump_recipe
from fastkd.study.forks import NOT_TOLD, Fork
from fastkd.study.locks import Claim
from fastkd.study.shared import Place
from fastkd.study.spec import Command
from fastkd.training.run_folder import RunFolder

# what of the end of a log is searched for a message
_TAIL_BYTES = 1 << 16
# less than this is no room for a run
_ROOM = 1 << 20
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Ending:
    """How a child ended: `stopped` and `pruned` at our own request."""

    kind: Literal["finished", "failed", "stopped", "pruned"]
    seconds: float
    message: str = ""


@dataclass
class Children:
    """Starts children and stops them all.

    Args:
        program: a command in place of ours, to which `distill RECIPE --resume` is added.
        environments: environment variables of each worker's children beside our own.
    """

    program: Sequence[str] | None
    environments: Sequence[dict[str, str]]
    stopping: threading.Event = field(default_factory=threading.Event)
    """Ask running children to write a checkpoint and end."""
    killing: threading.Event = field(default_factory=threading.Event)
    """End them at once."""

    def run(
        self,
        command: Command,
        recipe: AnyRecipe,
        place: Place,
        claim: Claim,
        worker: int,
        watch: Callable[[], bool] = lambda: False,
    ) -> Ending:
        """Run or continue one run to its end.

        Args:
            command: of `fastkd`.
            recipe: of the run, which writes to `place.run`.
            place: where the recipe and the log go.
            claim: kept by the child for as long as it lives.
            worker: index of its environment.
            watch: looked at now and then; whether the run should be pruned.

        Raises:
            UserError: the folder can't be written to, or the disk is full, which is no fault of the
                run and would end all that follow.
        """
        started = time.monotonic()
        if RunFolder(place.run).summary.is_file():
            return Ending("finished", 0.0)
        write_beside(place, place.recipe, dump_recipe(recipe))
        arguments = [command, str(place.recipe), "--resume"]
        environment = self.environments[worker]
        # earlier attempts have said theirs
        said_before = place.log.stat().st_size if place.log.exists() else 0
        child: _Child
        if self.program is None:
            child = Fork(arguments, place.log, environment, claim.handle)
        else:
            child = _command([*self.program, *arguments], place.log, environment, claim.handle)
        asked = self._attend(child, watch)
        assert child.returncode is not None, "it has ended"
        seconds = time.monotonic() - started
        ending = _ending(child.returncode, asked, place, said_before, seconds)
        if ending.kind == "failed":
            _check_room(place, ending.message)
        return ending

    def _attend(
        self, child: _Child, watch: Callable[[], bool]
    ) -> Literal["stopped", "pruned"] | None:
        asked: Literal["stopped", "pruned"] | None = None
        while True:
            try:
                child.wait(_POLL_SECONDS)
                # Ctrl-C may end one that was just started before we pass it on
                return asked or ("stopped" if self.stopping.is_set() else None)
            except subprocess.TimeoutExpired:
                pass
            if self.killing.is_set():
                _kill_group(child.pid)
            elif asked is None and (self.stopping.is_set() or watch()):
                asked = "stopped" if self.stopping.is_set() else "pruned"
                child.send_signal(signal.SIGTERM)


def _check_room(place: Place, message: str) -> None:
    """See that a child has not failed for want of room, which it may have had none to say."""
    then = "run the same command again; the run is not marked as failed"
    if any(os.strerror(number) in message for number in FULL):
        raise DiskError(f"{place.run}: {message}; free some space and {then}")
    with disk_errors(place.folder, then):
        tried = place.folder / ".room"
        write_whole(tried, bytes(_ROOM))
        tried.unlink()


def write_beside(place: Place, path: Path, text: str) -> None:
    """Write a file beside a run.

    Raises:
        UserError: the folder can't be written to.
    """
    try:
        with disk_errors(place.folder):
            place.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
    except PermissionError as error:
        raise UserError(
            f"{place.folder} can't be written to ({error.strerror}); give another output"
        ) from error


class _Child(Protocol):
    """A process as `subprocess` has it."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def wait(self, timeout: float) -> object: ...

    def send_signal(self, number: int) -> None: ...


def _command(
    words: Sequence[str], log: Path, environment: Mapping[str, str], claim: int
) -> subprocess.Popen[bytes]:
    with log.open("ab") as said:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**without_launcher(os.environ), **environment},
            pass_fds=(claim,),
            # Ctrl-C is for us; we pass it on
            start_new_session=True,
        )


def _kill_group(pid: int) -> None:
    """A child and what it started; itself alone where it is too young to lead a group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _ending(
    code: int,
    asked: Literal["stopped", "pruned"] | None,
    place: Place,
    said_before: int,
    seconds: float,
) -> Ending:
    if code in (0, NOT_TOLD) and RunFolder(place.run).summary.is_file():
        return Ending("finished", seconds)
    # 2 is a mistake, which stopping does not cause
    if asked and code != 2:
        return Ending(asked, seconds)
    said = _last_words(place.log, said_before)
    if code == 0:
        said = f"ended without {RunFolder(place.run).summary.name}; {said}"
    elif code < 0:
        said = f"ended by signal {-code} ({signal.Signals(-code).name}); {said}"
    elif code == NOT_TOLD:
        said = f"ended after the process that starts the runs; {said}"
    elif code != 2:
        said = f"exit code {code}; {said}"
    return Ending("failed", seconds, said)


def _last_words(log: Path, start: int) -> str:
    """The message that a command ended with which began to write at a byte of its log, or else its
    last line."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    said = [line for line in lines if line]
    messages = [line.removeprefix("fastkd: ") for line in said if line.startswith("fastkd: ")]
    return (messages or said or [f"it said nothing in {log}"])[-1][:500]
