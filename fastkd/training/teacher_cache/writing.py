"""Where a rank writes its rows: into the files that all share, or into files of its own.

Rows of several ranks lie in one page of a file. A machine that writes to a disk of the network
writes whole pages, with what it last saw of its neighbours' rows. So the files are written by one
machine alone: ranks of others write their rows behind each other, and rank 0 takes these over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastkd.files.flat import append, flat_file
from fastkd.training.teacher_cache.layout import Field
from fastkd.training.teacher_cache.rows import Rows

_NUMBERS = "rows"


class RowWriter:
    """The rows of one rank on their way to the disk; all are there once the context is left."""

    def __init__(
        self, folder: Path, fields: Sequence[Field], rows: Rows, own: int | None = None
    ) -> None:
        """Open the files.

        Args:
            folder: where they are, or are made.
            fields: what is stored.
            rows: where each stands.
            own: number of the rank, which writes to files of its own; into those of all where not
                given.

        Raises:
            OSError: they can't be written.
        """
        self._rows, self._own, self._stack = rows, own, ExitStack()
        self._files = {
            field.name: self._stack.enter_context(
                flat_file(folder, field.name).open("r+b")
                if own is None
                else _part(folder, own, field.name).open("wb")
            )
            for field in fields
        }
        self._numbers = (
            None
            if own is None
            else self._stack.enter_context(_part(folder, own, _NUMBERS).open("wb"))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._stack.close()

    def begin(self, rows: Sequence[int]) -> None:
        """Say which rows come next, of every field in this order."""
        if self._numbers is not None:
            append(self._numbers, rows, np.int64)

    def write(self, field: Field, rows: Sequence[int], entries: Iterable[Any]) -> None:
        """Write the entries of some rows, each of which may have more behind its own."""
        file = self._files[field.name]
        for row, bits in zip(rows, entries, strict=True):
            first, end = self._rows.span(field, row)
            if self._own is None:
                file.seek(first * field.entry_bytes)
            file.write(bits[: end - first].data)


def take_over(folder: Path, fields: Sequence[Field], rows: Rows, rank: int) -> None:
    """Move the rows that a rank wrote to files of its own into those of all.

    Args:
        folder: where both are.
        fields: what is stored.
        rows: where each stands.
        rank: that has closed its files.

    Raises:
        OSError: they can't be read, or the others not be written.
    """
    listed = _part(folder, rank, _NUMBERS)
    numbers = np.fromfile(listed, dtype=np.int64).tolist()
    for field in fields:
        path = _part(folder, rank, field.name)
        with path.open("rb") as part, flat_file(folder, field.name).open("r+b") as file:
            for row in numbers:
                first, end = rows.span(field, row)
                entries = part.read((end - first) * field.entry_bytes)
                if len(entries) < (end - first) * field.entry_bytes:
                    raise OSError(f"{path} ends before row {row}")
                file.seek(first * field.entry_bytes)
                file.write(entries)
        path.unlink()
    listed.unlink()


def _part(folder: Path, rank: int, name: str) -> Path:
    return flat_file(folder, f"rank-{rank}-{name}")
