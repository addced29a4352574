"""Who works on what: a locked file a claim, so that nothing is done twice.

The lock is `flock`, which the kernel gives back when the last process that holds it ends, however
it ends. A child inherits its worker's claim: where the worker is killed and the child runs on, the
claim stands until the child is done. The road not taken: a heartbeat in the storage, which needs a
clock, a grace period, and guesses while that passes. `flock` works where SQLite does: on local
disks, and on network file systems that have locks.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastkd.errors import UserError
from fastkd.files.disk import make_folder
from fastkd.files.lock import NO_LOCKS


class Claim:
    """A claim on a piece of work, held until `release` or the end of all that hold it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        """File descriptor for `pass_fds` of the child that does the work."""

    @classmethod
    def take(cls, path: Path) -> Claim | None:
        """The claim at `path`, or `None` where someone else holds it."""
        handle = _open(path)
        try:
            _lock(handle, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        return cls(handle)

    @staticmethod
    def taken_elsewhere(path: Path) -> str | None:
        """Number of the process that took the claim at `path` last, unless it is this one."""
        said = path.read_text().strip() if path.exists() else ""
        return said if said not in ("", str(os.getpid())) else None

    def release(self) -> None:
        """Give the claim up, unless a child still holds it."""
        os.close(self.handle)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other thread or process is inside a block of the same path."""
    handle = _open(path)
    try:
        _lock(handle, path, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: Path, how: int) -> None:
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"{path} can't be locked ({error.strerror}), which keeps runs from being made twice; "
            "give the study an output on a file system that has locks (flock)"
        ) from error


def _open(path: Path) -> int:
    make_folder(path.parent)
    # the file stays: removing one that another process has open would give two claims
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
