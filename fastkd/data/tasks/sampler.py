"""Batches of examples of similar length, to train on in random order or to evaluate on.

A batch to train on is the global batch of one optimiser step, the same on every rank; `cut` says
which of its rows are a rank's, and those alone are read and padded. The road not taken: a sampler
for each rank, whose order would depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.data.batching import BatchPlan
from fastkd.data.tasks.tokenized import PAD_MULTIPLE, Batch, EncodedExamples
from fastkd.data.text.stream import epoch_seed, require_same

POOL = 50
"""Batches whose examples are sorted by length together, at most."""
POOLS = 4
"""Pools in an epoch, at least, where it has so many batches: who shares a batch shall change."""


class ExampleStream:
    """Every example once an epoch, in batches of similar length, without end.

    A batch may reach into the next epoch. Its rows are sorted by length, so that micro-batches need
    little padding.
    """

    def __init__(self, examples: EncodedExamples, batch_size: int, seed: int) -> None:
        """Start at the beginning of the order of `seed`.

        Args:
            examples: to train on.
            batch_size: examples of an optimiser step, over all ranks and micro-batches.
            seed: of the order.
        """
        self._examples = examples
        self._batch_size = batch_size
        self._identity = {
            "fingerprint": examples.fingerprint,
            "seed": seed,
            # batches are made of neighbours in length, so another size makes another order
            "batch_size": batch_size,
        }
        self._seed = seed
        self._position = 0
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    @property
    def epoch(self) -> int:
        """Passes over the examples that are done."""
        return self._position // len(self._examples)

    def next_rows(self) -> list[int]:
        """Numbers of the examples of the next batch, sorted by length."""
        rows: list[int] = []
        while len(rows) < self._batch_size:
            epoch, start = divmod(self._position, len(self._examples))
            if epoch != self._epoch:
                self._order = _order(self._examples.lengths, self._batch_size, self._seed, epoch)
                self._epoch = epoch
            taken = self._order[start : start + self._batch_size - len(rows)].tolist()
            rows += taken
            self._position += len(taken)
        lengths = self._examples.lengths[rows]
        return [rows[place] for place in np.argsort(lengths, kind="stable")]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in plain values."""
        return {**self._identity, "examples": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the saved stream stood, whatever this one has read.

        Raises:
            UserError: that stream had other examples, another seed or another batch size.
        """
        require_same(state, self._identity)
        self._position = state["examples"]


def cut(rows: Sequence[int], plan: BatchPlan, rank: int) -> list[Sequence[int]]:
    """The micro-batches of one rank, as numbers of examples.

    Rows that follow each other go to the ranks in turn: at any time all of them work on similar
    lengths.

    Args:
        rows: of a global batch, sorted by length.
        plan: how it is cut.
        rank: whose part.
    """
    size, world_size = plan.micro_batch_size, plan.world_size
    starts = [(number * world_size + rank) * size for number in range(plan.accumulation)]
    return [rows[start : start + size] for start in starts]


def evaluation_batches(
    examples: EncodedExamples,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    multiple: int = PAD_MULTIPLE,
    packed: bool = False,
) -> Iterator[tuple[Tensor, Batch]]:
    """A rank's share of all examples, longest first, as many batches on every rank.

    Args:
        examples: to evaluate on.
        batch_size: examples of one forward pass of one rank.
        rank: whose share.
        world_size: number of ranks; a forward pass may be collective, so a rank without a batch of
            its own gets one that doesn't count.
        multiple: as in `EncodedExamples.batch`.
        packed: whether examples follow each other in one row, in place of being padded.

    Yields:
        Numbers of the examples, int64 [counted], and the batch; its first `counted` rows are these
        examples, and all others don't count.
    """
    order = np.argsort(-examples.lengths, kind="stable")
    starts = range(0, len(order), batch_size)
    for number in range(rank, -(-len(starts) // world_size) * world_size, world_size):
        start = starts[min(number, len(starts) - 1)]
        rows = order[start : start + batch_size]
        counted = rows if number < len(starts) else rows[:0]
        chosen = rows.tolist()
        batch = examples.packed(chosen) if packed else examples.batch(chosen, multiple)
        yield torch.from_numpy(counted.copy()), batch


def _order(
    lengths: npt.NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Numbers of all examples in the order of an epoch.

        rest of the epoch before | batch | batch | ... | batch | start of the epoch after

    Only whole batches are made of similar lengths: the ends share a batch with another epoch.
    """
    count = len(lengths)
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    drawn = torch.randperm(count, generator=generator).numpy()
    head = min(-epoch * count % batch_size, count)
    batches = (count - head) // batch_size
    end = head + batches * batch_size
    pool = max(1, min(POOL, batches // POOLS)) * batch_size
    for start in range(head, end, pool):
        part = drawn[start : min(start + pool, end)]
        drawn[start : start + len(part)] = part[np.argsort(lengths[part], kind="stable")]
    shuffled = torch.randperm(batches, generator=generator).numpy()
    body = drawn[head:end].reshape(batches, batch_size)[shuffled]
    return np.concatenate([drawn[:head], body.reshape(-1), drawn[end:]])
