"""A teacher's stored states, read by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.capture import Capture
from fastkd.errors import UserError
from fastkd.files.flat import flat_file
from fastkd.packed_row import PackedRow
from fastkd.training.teacher_cache.layout import BITS, Field, rebuilt
from fastkd.types import ROWS, Inputs


@dataclass(frozen=True)
class Rows:
    """Where each row's entries stand in the files."""

    offsets: npt.NDArray[np.int64]
    """[rows + 1], in tokens of all rows."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return int(self.offsets[-1])

    def entries(self, field: Field) -> int:
        """Of a field, in its whole file."""
        return len(self) if field.token_dim is None else self.tokens

    def span(self, field: Field, row: int) -> tuple[int, int]:
        """The first entry of a row, and the one after its last."""
        if field.token_dim is None:
            return row, row + 1
        return int(self.offsets[row]), int(self.offsets[row + 1])


class TeacherStates:
    """What a teacher left on each row, in the place of a teacher that runs."""

    def __init__(
        self, folder: Path, fields: Sequence[Field], rows: Rows, template: Capture
    ) -> None:
        """Open a whole folder.

        Args:
            folder: filled by `fill`, and checked.
            fields: what it holds.
            rows: where each stands.
            template: a capture of this teacher.

        Raises:
            UserError: a file that isn't as long as it should be.
        """
        self._fields = {field.name: field for field in fields}
        self._rows = rows
        self._template = template
        self._stored = {f.name: _open(folder, f, rows.entries(f)) for f in fields}

    def __call__(self, inputs: Inputs, wanted: Mapping[str, Any]) -> Capture:
        """What `capture` would have recorded of the teacher on a micro-batch.

        Args:
            inputs: with the numbers of its rows; padded on the right, or packed.
            wanted: keyword arguments of `capture`; layers beyond these are left on the disk.

        Returns:
            States in the teacher's precision on the inputs' device, 0 where there is padding.
        """
        kept = {f"query-{layer}" for layer in wanted["attention"]}
        kept |= {f"hidden-{layer}" for layer in wanted["hidden"]}
        rows, ids, row = inputs[ROWS].tolist(), inputs["input_ids"], PackedRow.of(inputs)
        width = ids.shape[1] if row is None else row.longest

        def read(name: str) -> Tensor:
            field = self._fields[name]
            # what stands above the blocks is padded in any case
            if row is None or field.token_dim is None or name == "outputs":
                return self._read(field, rows, width, ids.device)
            return self._read_packed(field, rows, ids.device)

        return rebuilt(self._template, kept, read)

    def _read(self, field: Field, rows: list[int], width: int, device: torch.device) -> Tensor:
        stored = self._stored[field.name]
        places = 1 if field.token_dim is None else width
        bits = np.zeros((len(rows), places, field.numbers), dtype=stored.dtype)
        for place, row in enumerate(rows):
            first, end = self._rows.span(field, row)
            bits[place, : end - first] = stored[first:end]
        entries = _entries(field, bits, device)
        return entries[:, 0] if field.token_dim is None else entries.movedim(1, field.token_dim)

    def _read_packed(self, field: Field, rows: list[int], device: torch.device) -> Tensor:
        """One row after another, [1, ..., tokens of all, ...]."""
        stored = self._stored[field.name]
        bits = np.concatenate([stored[slice(*self._rows.span(field, row))] for row in rows])
        assert field.token_dim is not None, "what has tokens is packed"
        return _entries(field, bits[None], device).movedim(1, field.token_dim)


def _entries(field: Field, bits: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Numbers of bits [batch, places, numbers of an entry]: [batch, places, *entry]."""
    numbers = torch.from_numpy(bits).view(field.stored).to(device, non_blocking=True)
    return numbers.to(field.dtype).reshape(*bits.shape[:2], *field.shape)


def _open(folder: Path, field: Field, entries: int) -> npt.NDArray[Any]:
    path = flat_file(folder, field.name)
    bits = torch.empty(0, dtype=BITS[field.stored.itemsize]).numpy().dtype
    try:
        return np.memmap(path, dtype=bits, mode="r", shape=(entries, field.numbers))
    except (OSError, ValueError) as error:
        raise UserError(
            f"teacher.cache_folder: {path} can't be read ({error}); remove {folder} and run again"
        ) from error
