"""Folders of packed blocks, one a key: whole or absent, never half-made.

A folder is written under a temporary name and renamed when complete. Two processes that build the
same key both succeed: the second rename finds the folder there and the copy is thrown away. Beside
the counts stand digests of all files, which a process checks before it first opens them; what is
damaged is built again, from the same text and so to the same blocks.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from fastkd.data.known_ids import known_rows
from fastkd.data.text.packing import IntArray
from fastkd.errors import UserError
from fastkd.files.disk import make_folder, not_allowed
from fastkd.files.sealed import (
    Damaged,
    Forbidden,
    Written,
    check_bytes,
    check_size,
    look_at,
    read_sealed,
    sealed,
)

logger = logging.getLogger(__name__)

TOKENS = "input_ids"
"""Column of a block."""
FORMAT = 1
"""Raised when the same settings would give other blocks or other files."""
STALE_SECONDS = 24 * 3600
"""Age at which the temporary folder of a build elsewhere is taken for that of a killed one."""
_META = "meta.json"
_BUILDING = ".building-"
_DAMAGED = ".damaged-"
# folders that this process has read through, with what their files looked like then
_checked: dict[Path, list[tuple[str, int, int, int]]] = {}


class BlockWriter:
    """Appends blocks to an Arrow file that is read back memory-mapped."""

    def __init__(self, path: Path, block_size: int, largest_id: int) -> None:
        self._dtype = np.uint16 if largest_id < 1 << 16 else np.int32
        features = Features({TOKENS: List(Value(self._dtype.__name__), length=block_size)})
        self._writer = ArrowWriter(path=str(path), features=features)
        self.blocks = 0

    def write(self, blocks: IntArray) -> None:
        """Append [n, block_size]."""
        if len(blocks):
            self._writer.write_batch({TOKENS: blocks.astype(self._dtype)})
            self.blocks += len(blocks)

    def close(self) -> None:
        """Write what is buffered; without this the file is not complete."""
        self._writer.finalize()


def cache_key(settings: Mapping[str, Any]) -> str:
    """sha256 of everything that decides the content of a folder."""
    text = json.dumps({"format": FORMAT, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Key of what the tokenizer does to text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # set by whoever called the tokenizer last, and not used here
        state["truncation"] = state["padding"] = None
    else:
        state = [type(tokenizer).__name__, tokenizer.get_vocab(), repr(tokenizer.init_kwargs)]
    text = json.dumps(state, sort_keys=True)
    # told at every call; as most have it, it is left out of the key
    for name, usual in (("truncation_side", "right"), ("split_special_tokens", False)):
        if (given := getattr(tokenizer, name, usual)) != usual:
            text += f" {name} {given}"
    if (rows := known_rows(tokenizer)) is not None:
        # what was made for a larger table may hold ids that another model doesn't embed
        text += f" rows {rows}"
    return hashlib.sha256(text.encode()).hexdigest()


def is_complete(folder: Path, field: str = "data.cache", *, build: bool = True) -> bool:
    """Whether a build of the folder was finished, and is still what was written then.

    The first time in a process every byte is read and compared with its digest, about a second for
    a gigabyte; later only names, sizes and times are looked at.

    Args:
        folder: of one key.
        field: of the recipe, which says where it is.
        build: whether this process builds what is missing; the others look at names and sizes, as
            it has read the bytes. It also removes what killed builds left behind.

    Raises:
        UserError: it may not be read, or is damaged and may not be replaced.
    """
    if build:
        _remove_stale(folder.parent)
    if not os.path.lexists(folder):
        return False
    try:
        _check(folder, content=build)
    except Forbidden as error:
        raise UserError(f"{field}: {error}, or give another folder") from error
    except Damaged as error:
        if build:
            if not _may_replace(folder):
                raise UserError(
                    f"{field}: {folder} is damaged ({error}), and you may not replace it; let who "
                    "may write there remove it, or give another folder"
                ) from error
            logger.warning("%s: %s is damaged (%s); it is built again", field, folder, error)
        return False
    return True


def needs_build(folder: Path, field: str = "data.cache", *, build: bool) -> bool:
    """Whether this process has to build a folder, which several ranks read.

    Args:
        folder: of one key.
        field: of the recipe, which says where it is.
        build: whether it builds what is missing, as the first rank does.

    Raises:
        UserError: it is missing, and another should have built it.
    """
    missing = not is_complete(folder, field, build=build)
    if missing and not build:
        raise UserError(
            f"{field}: {folder} is missing; rank 0 builds it first, so all ranks must see the same "
            "files and the same cache folder"
        )
    return missing


def _check(folder: Path, *, content: bool) -> None:
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged("it is no folder")
    files = _read_meta(folder)[1]
    for name, written in files.items():
        check_size(folder / name, written)
    if not content:
        return
    seen = [_look(folder / name) for name in (_META, *files)]
    if _checked.get(folder) != seen:
        for name, written in files.items():
            check_bytes(folder / name, written)
        _checked[folder] = seen


def _may_replace(folder: Path) -> bool:
    """Whether this user may move a folder away, which is known before another one is built."""
    above, own, user = folder.parent.stat(), folder.lstat(), os.geteuid()
    # a folder that moves into another one is written to itself
    writable = os.access(folder, os.W_OK) if stat.S_ISDIR(own.st_mode) else True
    ours = not above.st_mode & stat.S_ISVTX or user in (0, above.st_uid, own.st_uid)
    return writable and ours and os.access(folder.parent, os.W_OK | os.X_OK)


def _look(path: Path) -> tuple[str, int, int, int]:
    status = path.stat()
    return path.name, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def new_folder(folder: Path, field: str = "data.cache") -> Iterator[Path]:
    """A temporary folder that takes the name `folder` if the block ends without an error; `field`
    of the recipe says where it is."""
    root = folder.parent
    temporary: Path | None = None
    lock: int | None = None
    try:
        make_folder(root)
        temporary, lock = _own_folder(root, _BUILDING)
        yield temporary
        _rename(temporary, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            streamed = ", or set data.streaming to true" if field == "data.cache" else ""
            raise UserError(
                f"{field}: no space left under {root} while storing tokens; free some or name "
                f"another folder{streamed}"
            ) from error
        what = "can't be built" if _is_elsewhere(error, root) else f"cannot write under {root}"
        raise UserError(f"{field}: {what}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _is_elsewhere(error: OSError, root: Path) -> bool:
    """Whether an error names what is neither in a folder nor above it."""
    if not isinstance(error.filename, str):
        return False
    place, here = Path(os.path.abspath(error.filename)), Path(os.path.abspath(root))
    return not place.is_relative_to(here) and not here.is_relative_to(place)


def write_meta(folder: Path, meta: Mapping[str, int]) -> None:
    """Note the counts and what all files are, which must be closed; `is_complete` looks for it."""
    files = {path.name: asdict(look_at(path)) for path in sorted(folder.iterdir())}
    text = sealed({"counts": dict(meta), "files": files})
    (folder / _META).write_text(text, encoding="utf-8")


def read_meta(folder: Path, field: str = "data.cache") -> dict[str, int]:
    """The counts of a complete folder; `field` of the recipe says where it is."""
    try:
        return _read_meta(folder)[0]
    except Forbidden as error:
        raise UserError(f"{field}: {error}") from error
    except Damaged as error:
        raise UserError(f"{field}: {folder} is damaged ({error}); run again") from error


def _read_meta(folder: Path) -> tuple[dict[str, int], dict[str, Written]]:
    tree = read_sealed(folder / _META)
    try:
        return tree["counts"], {name: Written(**file) for name, file in tree["files"].items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{_META} holds no counts") from error


def open_blocks(folder: Path, name: str, expected: int) -> Dataset:
    """Blocks of a complete folder, memory-mapped."""
    remedy = f"data.cache: {folder} is damaged; delete it and run again"
    try:
        blocks = Dataset.from_file(str(folder / name))
    except PermissionError as error:
        raise UserError(f"data.cache: {not_allowed(folder / name, error)}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{remedy} ({error})") from error
    if len(blocks) != expected:
        raise UserError(f"{remedy} ({name} has {len(blocks)} blocks, expected {expected})")
    return blocks


def _rename(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        try:
            # another build was quicker
            _check(folder, content=True)
        except Damaged:
            _put_aside(folder)
            _rename(temporary, folder)


def _put_aside(folder: Path) -> None:
    """Make room for a folder in place of a damaged one; who has that open keeps it."""
    aside, lock = _own_folder(folder.parent, _DAMAGED)
    try:
        # another process may have been quicker
        with suppress(FileNotFoundError):
            os.rename(folder, aside / folder.name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # in a container a folder of the image can be removed, and not be moved
        shutil.rmtree(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _own_folder(root: Path, kind: str) -> tuple[Path, int | None]:
    """A new folder and a lock on it, which ends with this process; `None` where none can be had.

    Its permissions are those of the umask: `mkdtemp` makes one for this user alone.
    """
    while True:
        folder = root / f"{kind}{machine()}-{secrets.token_hex(6)}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            # taken for a leftover before it was locked
            continue
        except OSError:
            return folder, None
        if folder.is_dir():
            return folder, lock
        os.close(lock)


def machine() -> str:
    """A word for this machine since it was started: locks are sure to be seen here alone."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        started = platform.node()
    return hashlib.sha256(started.encode()).hexdigest()[:8]


def _lock(folder: Path) -> int:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove_stale(root: Path) -> None:
    """Remove what killed builds left: those of this machine at once, others when they are old."""
    # which is `False` where it may not be looked for, too
    if not os.path.isdir(root):
        return
    for leftover in [*root.glob(f"{_BUILDING}*"), *root.glob(f"{_DAMAGED}*")]:
        # gone meanwhile, or not ours to remove
        with suppress(OSError):
            _remove_leftover(leftover)


def _remove_leftover(folder: Path) -> None:
    lock = None
    if folder.name.startswith((f"{_BUILDING}{machine()}-", f"{_DAMAGED}{machine()}-")):
        try:
            lock = _lock(folder)
        except BlockingIOError:
            # somebody is at work
            return
        except OSError:
            # no locks on this disk
            lock = None
    if lock is not None or _is_old(folder):
        shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _is_old(folder: Path) -> bool:
    newest = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    return time.time() - newest > STALE_SECONDS
