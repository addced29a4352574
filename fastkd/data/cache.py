"""Folders of packed blocks, one a key: whole or absent, never half-made.

A folder is written under a temporary name and renamed when complete. Two processes that build the
same key both succeed: the second rename finds the folder there and the copy is thrown away.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from fastkd.data.packing import IntArray
from fastkd.errors import UserError

TOKENS = "input_ids"
"""Column of a block."""
FORMAT = 1
"""Raised when the same settings would give other blocks or other files."""
STALE_SECONDS = 24 * 3600
"""Age at which the temporary folder of a killed build is removed."""
_META = "meta.json"


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
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether a build of the folder was finished."""
    return (folder / _META).is_file()


@contextmanager
def new_folder(folder: Path, field: str = "data.cache") -> Iterator[Path]:
    """A temporary folder that takes the name `folder` if the block ends without an error; `field`
    of the recipe says where it is."""
    root = folder.parent
    temporary: Path | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
        yield temporary
        _rename(temporary, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            streamed = ", or set data.streaming to true" if field == "data.cache" else ""
            raise UserError(
                f"{field}: no space left under {root} while storing tokens; free some or name "
                f"another folder{streamed}"
            ) from error
        raise UserError(f"{field}: cannot write under {root}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_meta(folder: Path, meta: Mapping[str, int]) -> None:
    """Note the counts; `is_complete` looks for this file."""
    (folder / _META).write_text(json.dumps(meta, indent=1) + "\n")


def read_meta(folder: Path, field: str = "data.cache") -> dict[str, int]:
    """The counts of a complete folder; `field` of the recipe says where it is."""
    try:
        meta: dict[str, int] = json.loads((folder / _META).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{field}: {folder} is damaged; delete it and run again ({error})"
        ) from error
    return meta


def open_blocks(folder: Path, name: str, expected: int) -> Dataset:
    """Blocks of a complete folder, memory-mapped."""
    remedy = f"data.cache: {folder} is damaged; delete it and run again"
    try:
        blocks = Dataset.from_file(str(folder / name))
    except (OSError, ValueError) as error:
        raise UserError(f"{remedy} ({error})") from error
    if len(blocks) != expected:
        raise UserError(f"{remedy} ({name} has {len(blocks)} blocks, expected {expected})")
    return blocks


def _rename(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not is_complete(folder):
            raise


def _remove_stale(root: Path) -> None:
    for leftover in root.glob(".building-*"):
        newest = max(
            (path.stat().st_mtime for path in [leftover, *leftover.iterdir()]),
            default=time.time(),
        )
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
