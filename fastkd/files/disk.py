"""Files that get onto a disk whole, and what a disk that fails is said to be in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from fastkd.errors import DiskError, UserError

# what a disk without room, or a limit of a file's size, says
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_LOST = {errno.EROFS, errno.EIO, errno.ESTALE}
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+")


def write_whole(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Replace a file in one step: readers see the old one or the new one, also after a crash; text
    may come in parts, which may be made from the old one."""
    parts = [content] if isinstance(content, str | bytes) else content
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def temporary_of(path: Path) -> Path:
    """Where a file or folder is made before it is renamed to its name; `sweep` knows these."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, where it is missing.

    Raises:
        OSError: it can't be made; of a link to nothing, as to a disk that isn't mounted, it says
            that.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        _check_links(path)
        raise


def _check_links(path: Path) -> None:
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            raise NotADirectoryError(errno.ENOTDIR, "a link to nothing", str(each))


def check_place(path: Path, field: str, *, above: bool = False) -> None:
    """See that a file or folder can be made, before what it is for; nothing is left of the trial.

    Args:
        path: where.
        field: that names it, for the message.
        above: whether folders above it are made where they are missing.

    Raises:
        UserError: it can't.
    """
    place = path
    try:
        while above and not os.path.lexists(place.parent):
            place = place.parent
        _check_links(place)
        trial = temporary_of(place)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(
            f"{field} {path} can't be made ({error.strerror}); give a place in a folder that is "
            "there and that you may write to"
        ) from error


def is_temporary(path: Path, *names: str) -> bool:
    """Whether a path is what a killed process left of one of the names, see `temporary_of`."""
    found = _TEMPORARY.fullmatch(path.name)
    return found is not None and found["name"] in names


def sweep(folder: Path, *names: str) -> None:
    """Remove what killed processes left of the names in a folder; for who alone writes there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(path, *names):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def replace_folder(folder: Path, place: Path) -> None:
    """Put a folder in the place of another one."""
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)
    sync_folder(place.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle(path: Path) -> None:
    """Give a file, or all files in a folder, the permissions of the umask, and see them on disk.

    Some libraries write through private temporary files, whose permissions stay.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    folders = [path] if path.is_dir() else []
    for found in (path, *path.rglob("*")):
        if found.is_dir():
            folders.append(found)
            continue
        found.chmod(0o666 & ~mask)
        with found.open("rb") as file:
            os.fsync(file.fileno())
    for folder in folders:
        sync_folder(folder)


def not_allowed(path: Path, error: PermissionError) -> str:
    """What may not be read and by whom it is owned, the beginning of a message."""
    # of what lies in a folder that may not be entered, nothing is known but the folder
    for place in (path, *path.parents, *path.absolute().parents):
        with suppress(OSError):
            status = place.stat()
            break
    try:
        owner = place.owner()
    except (KeyError, OSError):
        owner = str(status.st_uid)
    mode = stat.S_IMODE(status.st_mode)
    return (
        f"{path} may not be read ({error.strerror}): {place} is owned by {owner} and its mode is "
        f"{mode:o}; let its owner or an administrator grant you to read it"
    )


def disk_errors(
    path: Path | None, then: str = "continue with --resume"
) -> AbstractContextManager[None, None]:
    """Turn a disk that is full or lost, or a place that may not be used, into a `DiskError`.

    Args:
        path: what is written; errors of permission and kind count where they are of it, or below,
            and nowhere if it is `None`.
        then: what to do once the disk is mended.
    """
    return _DiskErrors(path, then)


@contextmanager
def place_errors(folder: Path, then: str) -> Iterator[None]:
    """Turn what keeps a folder from being made, or from being written to, before anything was,
    into a `DiskError`; a disk that is full or fails is said as `disk_errors` does.

    Args:
        folder: that is made, with those above it that are missing.
        then: what to do.
    """
    with disk_errors(folder, then):
        try:
            yield
        except OSError as error:
            if error.errno not in _UNUSABLE:
                raise
            raise DiskError(
                f"{folder} can't be used: writing {error.filename or folder} failed "
                f"({error.strerror}); {then}"
            ) from error


class _DiskErrors(AbstractContextManager[None, None]):
    """A class, because it looks at what passes and catches nothing else: tokenizers raises a bare
    `Exception` where it can't write, safetensors one of its own and torch a `RuntimeError`."""

    def __init__(self, path: Path | None, then: str) -> None:
        self.path = path
        self.then = then

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None or isinstance(error, UserError):
            return
        number = _number(error)
        named = getattr(error, "filename", None)
        inside = isinstance(named, str | os.PathLike) and self._holds(named)
        place = (self.path or "the disk") if inside or named is None else named
        reason = os.strerror(number) if number else "the file could not be written"
        if number in FULL or number == 0:
            bounded = number == errno.EFBIG
            remedy = (
                "raise the limit of a file's size (ulimit -f)" if bounded else "free some space"
            )
            raise DiskError(
                f"{place}: writing failed ({reason}); what was finished before is whole: {remedy} "
                f"and {self.then}"
            ) from error
        if number in _LOST:
            raise DiskError(
                f"{place}: the disk failed ({reason}); what was finished before is whole: see that "
                f"it can be written to again and {self.then}"
            ) from error
        if number is not None and inside:
            raise DiskError(
                f"{named} can't be used ({reason}); see that it is of the right kind and that you "
                f"may read and write it, then {self.then}"
            ) from error

    def _holds(self, name: str | os.PathLike[str]) -> bool:
        if self.path is None:
            return False
        return Path(os.path.abspath(name)).is_relative_to(os.path.abspath(self.path))


def _number(error: BaseException) -> int | None:
    """The operating system's number of an error, 0 for a write that failed without one, `None` for
    an error of another kind."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    # libraries in Rust, and shutil, which gathers errors of several files in one
    found = re.search(r"\(os error (\d+)\)", text) or (
        re.search(r"\[Errno (\d+)\]", text) if isinstance(error, OSError) else None
    )
    if found:
        return int(found[1])
    if isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in text or "inline_container" in text
    ):
        return 0
    return None if error.__cause__ is None else _number(error.__cause__)
