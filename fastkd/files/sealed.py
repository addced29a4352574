"""Files with digests: what was written, and JSON that holds the digest of itself.

Digests find damage: bytes that a disk, a copy or a hand has changed. They are no signature: who can
write the files can write the digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.files.disk import not_allowed

# more than a list of all files of ten thousand ranks
_LIMIT = 1 << 26
# a change shows in a file's times, on the coarsest of disks, where the last one is as old
_SETTLED_SECONDS = 2.0
# digests that this process has made, by what its file looked like then, wherever that lay
_known: dict[tuple[int, ...], str] = {}


class Forbidden(UserError):
    """Something that this user may not read, which says nothing of what it holds."""


class Damaged(ValueError):
    """Something that is not what was written; says how."""


@dataclass(frozen=True)
class Written:
    """What a file must be, to be the one that was written."""

    size: int
    sha256: str


def file_sha256(path: Path) -> str:
    """Digest of a file's bytes, in hexadecimal; a process reads a file once, unless it changes.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        seen = _seen(status)
        if seen in _known:
            return _known[seen]
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        settled = time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_SECONDS
        same = _seen(os.fstat(file.fileno())) == seen
        if settled and same and stat.S_ISREG(status.st_mode):
            _known[seen] = digest
        return digest


def _seen(status: os.stat_result) -> tuple[int, ...]:
    """What tells one file from another, and from what it was; a time can't be put back in both."""
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times


def look_at(path: Path) -> Written:
    """A file as it is now."""
    return Written(path.stat().st_size, file_sha256(path))


def check_size(path: Path, written: Written) -> None:
    """See that there is a file of the size that was written, without reading it.

    Raises:
        Damaged: there isn't.
        Forbidden: it can't be told.
    """
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise Damaged(f"{path.name} is missing") from error
    except PermissionError as error:
        raise Forbidden(not_allowed(path, error)) from error
    except OSError as error:
        raise Damaged(f"{path.name} can't be looked at ({error.strerror})") from error
    # a link, a folder, a device, a pipe that would never end
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path.name} is no file")
    if status.st_size != written.size:
        raise Damaged(f"{path.name} has {status.st_size:,} bytes, expected {written.size:,}")


def check_bytes(path: Path, written: Written) -> None:
    """See that a file is the one that was written, every byte of it.

    Raises:
        Damaged: it isn't.
        Forbidden: it can't be told.
    """
    check_size(path, written)
    try:
        if file_sha256(path) != written.sha256:
            raise Damaged(f"{path.name} is not what was written: its sha256 differs")
    except PermissionError as error:
        raise Forbidden(not_allowed(path, error)) from error
    except OSError as error:
        raise Damaged(f"{path.name} can't be read ({error.strerror})") from error


def sealed(body: Mapping[str, Any]) -> str:
    """JSON with its own digest."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=2, sort_keys=True) + "\n"


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        Damaged: it is no file, or holds no JSON.
        Forbidden: it may not be read.
    """
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LIMIT:
            raise Damaged(f"{path.name} is another file")
        return json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise Forbidden(not_allowed(path, error)) from error
    except (OSError, RecursionError) as error:
        raise Damaged(f"{path.name} can't be read") from error
    except Damaged:
        raise
    except ValueError as error:
        raise Damaged(f"{path.name} holds no JSON") from error


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed` was given.

    Raises:
        Damaged: a byte of the file is another, or it can't be read.
        Forbidden: it may not be read.
    """
    tree = read_json(path)
    if not isinstance(tree, dict) or "sha256" not in tree:
        raise Damaged(f"{path.name} holds no digest of itself")
    body = {key: value for key, value in tree.items() if key != "sha256"}
    # all of it: a byte that changes nothing else is a changed byte
    if sealed(body) != path.read_text(encoding="utf-8"):
        raise Damaged(f"{path.name} is not what was written")
    return body
