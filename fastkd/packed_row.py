"""Sequences that follow each other in one row, without padding between them.

    input_ids     a a a a b b c c c      [1, total]
    position_ids  0 1 2 3 0 1 0 1 2      [1, total]
    cu_seq_lens   0       4   6     9    int32 [sequences + 1]

What works on tokens reads the row as it is; what works on sequences reads `padded` views, which
are made of it by a copy. Lengths are known on the host, so that nothing here waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from fastkd.errors import UserError
from fastkd.types import LENGTHS, STARTS, Inputs


@dataclass(frozen=True)
class PackedRow:
    """Where the sequences of a micro-batch stand in its one row."""

    lengths: tuple[int, ...]
    """Tokens of each."""
    starts: Tensor
    """int32 [sequences + 1], where each begins, and the end of the last; on the inputs' device."""

    @classmethod
    def of(cls, inputs: Inputs) -> Self | None:
        """The row of a micro-batch; `None` of one that is padded."""
        if LENGTHS not in inputs:
            return None
        return cls(tuple(inputs[LENGTHS].tolist()), inputs[STARTS])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def total(self) -> int:
        """Tokens of all."""
        return sum(self.lengths)

    @property
    def _even(self) -> bool:
        return len(set(self.lengths)) == 1

    @cached_property
    def mask(self) -> Tensor | None:
        """Bool [sequences, longest], true where a padded view holds a token; `None` where all of it
        does."""
        if self._even:
            return None
        positions = torch.arange(self.longest, device=self.starts.device)
        return positions < self.starts.diff()[:, None]

    @cached_property
    def _places(self) -> Tensor:
        """Place of each token of the row in a padded view: int64 [total]."""
        starts = self.starts.long()
        shifts = torch.arange(len(self.lengths), device=starts.device) * self.longest - starts[:-1]
        # of a known size, which spares a wait for the device
        shift = torch.repeat_interleave(shifts, starts.diff(), output_size=self.total)
        return torch.arange(self.total, device=starts.device) + shift

    def padded(self, states: Tensor, dim: int = 1, fill: int = 0) -> Tensor:
        """States of the row as those of padded sequences; gradients flow back into the row.

        Args:
            states: [1, ..., total, ...].
            dim: the dimension of tokens, at least 1.
            fill: what stands where there is no token.

        Returns:
            [sequences, ..., longest, ...].
        """
        shape = len(self.lengths), self.longest
        tokens = states[0].movedim(dim - 1, 0)
        if not self._even:
            room = tokens.new_full((shape[0] * shape[1], *tokens.shape[1:]), fill)
            tokens = room.index_copy_(0, self._places, tokens)
        return tokens.reshape(*shape, *tokens.shape[1:]).movedim(1, dim)

    def padded_module(self, given: Tensor) -> Tensor:
        """What any module gives as of padded sequences; above the blocks it is that already.

        Raises:
            UserError: it is neither of the row, [1, total, ...], nor of sequences.
        """
        if given.ndim > 1 and given.shape[:2] == (1, self.total):
            return self.padded(given)
        if given.ndim and given.shape[0] == len(self.lengths):
            return given
        raise UserError(
            f"a module that a loss reads gives {list(given.shape)} of {len(self.lengths)} packed "
            f"sequences with {self.total} tokens, expected [1, tokens, ...] or [sequences, ...]; "
            "set task.padding=buckets"
        )


def valid_tokens(inputs: Inputs) -> Tensor | None:
    """Bool [sequences, tokens], true where a micro-batch, or the padded view of a packed one, holds
    a token; `None` where all of it does."""
    row, mask = PackedRow.of(inputs), inputs.get("attention_mask")
    if row is not None:
        return row.mask
    return None if mask is None else mask.bool()
