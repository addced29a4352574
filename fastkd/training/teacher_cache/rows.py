"""Rows of a folder of stored states: where each stands in its files, and reading it from a disk."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.errors import DiskError
from fastkd.files.disk import not_allowed
from fastkd.files.flat import flat_file
from fastkd.training.teacher_cache.layout import BITS, Field


@dataclass(frozen=True)
class Rows:
    """Where each row's entries stand in the files."""

    offsets: npt.NDArray[np.int64]
    """[rows + 1], in tokens of all rows."""
    heldout: bool = False
    """Whether held-out rows stand behind those to train on."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.offsets[-1])

    def entries(self, field: Field) -> int:
        """Entries of a field in its whole file."""
        return len(self) if field.token_dim is None else self.tokens

    def span(self, field: Field, row: int) -> tuple[int, int]:
        """The first entry of a row, and the one after its last."""
        if field.token_dim is None:
            return row, row + 1
        return int(self.offsets[row]), int(self.offsets[row + 1])


class StoredRows:
    """The files of a whole folder, open.

    They are read, not mapped: a row is one request to the disk, whatever the size of a page, and a
    disk that fails is an error, where a map would end the process by a signal.
    """

    def __init__(self, folder: Path, fields: Sequence[Field], rows: Rows) -> None:
        """Open them.

        Args:
            folder: filled by `fill`, and checked.
            fields: what it holds.
            rows: where each stands.

        Raises:
            DiskError: a file that isn't as long as it should be.
        """
        self._folder = folder
        self._rows = rows
        self._fields = {field.name: field for field in fields}
        self._files = {field.name: self._open(field) for field in fields}

    def read(
        self, names: Collection[str], rows: Sequence[int], width: int | None
    ) -> dict[str, Tensor]:
        """The entries of some rows, 0 behind the last of each.

        Args:
            names: of fields.
            rows: numbers of the rows.
            width: tokens that each is padded to; `None` to let them follow each other.

        Returns:
            By field [rows, width, numbers] or [1, tokens of all, numbers], [rows, 1, numbers] of
            fields with one entry a row; on the CPU, in the precision of the disk.

        Raises:
            DiskError: the disk fails.
        """
        fields = [self._fields[name] for name in names]
        for field in fields:
            spans = {self._rows.span(field, row) for row in rows}
            with self._errors_of(field):
                # all requests at once, so that the disk works on many; of no bytes means to the end
                for first, end in spans:
                    at, size = first * field.entry_bytes, (end - first) * field.entry_bytes
                    if size:
                        os.posix_fadvise(self._files[field.name], at, size, os.POSIX_FADV_WILLNEED)
        return {field.name: self._read(field, rows, width) for field in fields}

    def _read(self, field: Field, rows: Sequence[int], width: int | None) -> Tensor:
        spans = [self._rows.span(field, row) for row in rows]
        sizes = [end - first for first, end in spans]
        places = 1 if field.token_dim is None else sum(sizes) if width is None else width
        in_a_row = field.token_dim is not None and width is None
        shape = 1 if in_a_row else len(rows), places, field.stored_numbers
        bits = torch.zeros(shape, dtype=BITS[field.stored.itemsize])
        # entries of all rows after each other, of which each begins at a place of its own
        entries, start = bits.numpy().reshape(-1, field.stored_numbers), 0
        for (first, _), size in zip(spans, sizes, strict=True):
            self._fill(entries[start : start + size], field, first)
            start += size if in_a_row else places
        return bits.view(field.stored)

    def _fill(self, entries: npt.NDArray[np.signedinteger], field: Field, first: int) -> None:
        """Read from an entry of a field on."""
        left, at = entries.reshape(-1).view(np.uint8).data, first * field.entry_bytes
        while left:
            with self._errors_of(field):
                count = os.preadv(self._files[field.name], [left], at)
            if not count:
                raise self._unreadable(field, f"it ends at byte {at}")
            left, at = left[count:], at + count

    def _open(self, field: Field) -> int:
        path = flat_file(self._folder, field.name)
        expected = self._rows.entries(field) * field.entry_bytes
        with self._errors_of(field):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, file)
            size = os.fstat(file).st_size
        if size != expected:
            raise self._unreadable(field, f"{size} bytes, expected {expected}")
        return file

    @contextmanager
    def _errors_of(self, field: Field) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            path = flat_file(self._folder, field.name)
            raise DiskError(f"teacher.cache_folder: {not_allowed(path, error)}") from error
        except OSError as error:
            raise self._unreadable(field, str(error)) from error

    def _unreadable(self, field: Field, why: str) -> DiskError:
        path = flat_file(self._folder, field.name)
        return DiskError(
            f"teacher.cache_folder: {path} can't be read ({why}); remove {self._folder} and run "
            "again"
        )
