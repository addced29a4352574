"""One process at a time in a run's folder: a locked file, which says who holds it.

The lock is `flock`: the kernel gives it back when the process ends, however it ends. Over NFS Linux
makes a lock of the server of it, which other hosts see. The file is removed at the end; who opened
it meanwhile sees that it is no longer the one in the folder and takes the new one. The road not
taken: a file whose mere presence locks, which a killed process would leave locked for ever.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastkd.errors import UserError
from fastkd.files.disk import make_folder, place_errors

LOCK = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a file system without locks says."""

# of this process, by folder: the handle, and how many blocks it is held by
_held: dict[str, tuple[int, int]] = {}


@contextmanager
def held(folder: Path, elsewhere: str = "another run.output") -> Iterator[bool]:
    """Hold a folder for this process while the context is open; it is made where it is missing.

    A process may hold a folder several times. What was made and stayed empty is removed again.

    Args:
        folder: of a run.
        elsewhere: what to give in place of a folder that can't be held.

    Yields:
        Whether the file system has locks; without, nobody is kept out.

    Raises:
        UserError: another process holds it, or it can't be written to.
    """
    key = os.path.realpath(folder)
    handle, depth = _held.get(key, (-1, 0))
    made: list[Path] = []
    if not depth:
        with place_errors(folder, f"see that you may write there, or give {elsewhere}"):
            made = _missing(folder)
            handle = _take(folder, elsewhere)
    _held[key] = handle, depth + 1
    owner = os.getpid()
    try:
        yield handle >= 0
    finally:
        if os.getpid() == owner:
            _leave(key, folder, made)


def _take(folder: Path, elsewhere: str) -> int:
    """A locked handle; -1 where the file system has no locks."""
    path = folder / LOCK
    while True:
        make_folder(folder)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            # who held it has just removed the folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_there(handle, path):
                os.close(handle)
                continue
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        except BlockingIOError:
            said = os.pread(handle, 300, 0).decode(errors="replace").split()
            os.close(handle)
            raise UserError(_in_use(folder, said, elsewhere)) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in NO_LOCKS:
                raise
            return -1
        return handle


def _in_use(folder: Path, said: list[str], elsewhere: str) -> str:
    whose = f"process {said[0]} on {said[1]}" if len(said) == 2 else "another process"
    return f"{folder} is in use by {whose}; wait for it or stop it, or give {elsewhere}"


def _is_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _leave(key: str, folder: Path, made: list[Path]) -> None:
    if key not in _held:
        return
    handle, depth = _held[key]
    if depth > 1:
        _held[key] = handle, depth - 1
        return
    del _held[key]
    try:
        # first removed, then unlocked: the next one must not lock a file that is about to go
        (folder / LOCK).unlink(missing_ok=True)
        for path in made:
            path.rmdir()
    except OSError:
        # not empty, or a disk that failed, which was said: a file that nobody holds locks nobody
        pass
    finally:
        if handle >= 0:
            os.close(handle)


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that are not there, the deepest first."""
    found = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        found.append(path)
    return found


def _forget() -> None:
    """A forked child holds nothing: its copy of a handle would keep the lock when we are killed."""
    for handle, _ in _held.values():
        if handle >= 0:
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
