"""A teacher's stored states on the way to a step: read with its inputs, used for a teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastkd.capture import Capture
from fastkd.data.datamodule import MicroBatches
from fastkd.layer_map import Progress
from fastkd.packed_row import PackedRow
from fastkd.training.teacher_cache.layout import Layout, is_of_block
from fastkd.training.teacher_cache.rows import Rows, StoredRows
from fastkd.types import ROWS, STORED, Inputs, teacher_inputs

WantedAt = Callable[[Progress], Mapping[str, Any]]
"""Keyword arguments of `capture` at a moment of the run."""


class TeacherStates:
    """What a teacher left on each row, in the place of a teacher that runs."""

    def __init__(self, folder: Path, layout: Layout, rows: Rows) -> None:
        """Open a whole folder.

        Args:
            folder: filled by `fill`, and checked.
            layout: of what it holds.
            rows: where each stands.

        Raises:
            DiskError: a file that isn't as long as it should be.
        """
        self.heldout = rows.heldout
        self.has_scores = isinstance(layout.template.logits, Tensor)
        self._layout = layout
        self._fields = {field.name: field for field in layout.fields}
        self._rows = StoredRows(folder, layout.fields, rows)

    def reading(self, micro_batches: MicroBatches, wanted_at: WantedAt) -> MicroBatches:
        """Micro-batches that also hold what is stored of their rows, in the precision of the disk.

        Args:
            micro_batches: with numbers of rows.
            wanted_at: what is wanted at a moment of the run; is called by whatever thread asks for
                a step.
        """
        return _WithStates(micro_batches, self, wanted_at)

    def beside(self, inputs: Inputs, wanted: Mapping[str, Any]) -> Inputs:
        """A micro-batch that also holds what is stored of its rows, in the precision of the disk.

        Args:
            inputs: with numbers of rows, on the CPU.
            wanted: keyword arguments of `capture`.
        """
        rows, names = inputs[ROWS].tolist(), self._layout.names(wanted)
        if (row := PackedRow.of(inputs)) is None:
            found = self._rows.read(names, rows, teacher_inputs(inputs)["input_ids"].shape[1])
        else:
            # as a pass leaves them: padded are those above the blocks
            of_blocks = [name for name in names if is_of_block(name)]
            above = [name for name in names if not is_of_block(name)]
            found = self._rows.read(of_blocks, rows, None)
            found |= self._rows.read(above, rows, row.longest)
        return {**inputs, **{STORED + name: numbers for name, numbers in found.items()}}

    def __call__(self, inputs: Inputs, wanted: Mapping[str, Any]) -> Capture:
        """What `capture` would have recorded of the teacher on a micro-batch of `beside`.

        Args:
            inputs: on the teacher's device, but for what is stored; padding is on the right, or
                sequences follow each other in one row.
            wanted: keyword arguments of `capture`.

        Returns:
            States in the teacher's precision; where there is padding they are 0, or, of queries,
            keys and values that are made again, what the blocks make of 0.
        """
        device = inputs["input_ids"].device

        def read(name: str) -> Tensor:
            field = self._fields[name]
            numbers = field.decoded(inputs[STORED + name].to(device, non_blocking=True))
            entries = numbers.reshape(*numbers.shape[:2], *field.shape)
            return entries[:, 0] if field.token_dim is None else entries.movedim(1, field.token_dim)

        return self._layout.rebuilt(inputs, wanted, read)


class _WithStates:
    """`MicroBatches` with what is stored of their rows."""

    def __init__(
        self, micro_batches: MicroBatches, states: TeacherStates, wanted_at: WantedAt
    ) -> None:
        self._micro_batches = micro_batches
        self._states = states
        self._wanted_at = wanted_at

    @property
    def epoch(self) -> int:
        return self._micro_batches.epoch

    def next_step(self, step: int) -> Sequence[Inputs]:
        # the epoch that a step belongs to is that before it was read
        wanted = self._wanted_at(Progress(step, self._micro_batches.epoch))
        return [self._states.beside(part, wanted) for part in self._micro_batches.next_step(step)]

    def state_dict(self) -> dict[str, Any]:
        return self._micro_batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._micro_batches.load_state_dict(state)

    def close(self) -> None:
        self._micro_batches.close()
