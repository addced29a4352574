"""Rows of similar length in batches, to train on in random order or to evaluate on.

A row is an example of a task, or one of texts. A batch to train on is the global batch of one
optimiser step, the same on every rank; `cut` says which of its rows are a rank's, and those alone
are read and padded. The road not taken: a sampler for each rank, whose order would depend on the
number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.data.batching import BatchPlan
from fastkd.data.sequences import PAD_MULTIPLE
from fastkd.data.text.stream import require_same
from fastkd.seeds import derived_seed
from fastkd.types import Inputs

POOL = 50
"""Batches whose examples are sorted by length together, at most."""
POOLS = 4
"""Pools in an epoch, at least, where it has so many batches: who shares a batch shall change."""


class Measured(Protocol):
    """Rows of known lengths."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens that each takes a sequence, [rows]."""

    @property
    def fingerprint(self) -> str:
        """Key of the content."""


class ExampleStream:
    """Every example once an epoch, in batches of similar length, without end.

    A batch may reach into the next epoch. Its rows are sorted by length, so that micro-batches need
    little padding.
    """

    def __init__(self, examples: Measured, batch_size: int, seed: int) -> None:
        """Start at the beginning of the order of `seed`.

        Args:
            examples: to train on.
            batch_size: examples of an optimiser step, over all ranks and micro-batches.
            seed: of the order.
        """
        self._lengths = examples.lengths
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
        return self._position // len(self._lengths)

    def next_rows(self) -> list[int]:
        """Numbers of the examples of the next batch, sorted by length."""
        rows: list[int] = []
        while len(rows) < self._batch_size:
            epoch, start = divmod(self._position, len(self._lengths))
            if epoch != self._epoch:
                self._order = _order(self._lengths, self._batch_size, self._seed, epoch)
                self._epoch = epoch
            taken = self._order[start : start + self._batch_size - len(rows)].tolist()
            rows += taken
            self._position += len(taken)
        lengths = self._lengths[rows]
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


def cut(
    rows: Sequence[int],
    plan: BatchPlan,
    rank: int,
    tokens: Callable[[int], int] | None = None,
) -> list[Sequence[int]]:
    """The micro-batches of one rank, as numbers of rows.

    Rows that follow each other go to the ranks in turn: at any time all of them work on as many
    rows of similar lengths.

    Args:
        rows: of a global batch, sorted by length.
        plan: how it is cut.
        rank: whose part.
        tokens: that a row takes in a micro-batch of which it is the longest; where the plan has a
            budget of them.
    """
    parts, start = [], 0
    for count in _counts(rows, plan, tokens):
        first = start + rank * count
        parts.append(rows[first : first + count])
        start += count * plan.world_size
    return parts


def _counts(rows: Sequence[int], plan: BatchPlan, tokens: Callable[[int], int] | None) -> list[int]:
    """Rows of each micro-batch, the same on every rank."""
    if plan.tokens is None:
        return [plan.micro_batch_size] * plan.accumulation
    assert tokens is not None, "a plan with a budget is of rows whose tokens are known"
    counts, start, world = [], 0, plan.world_size
    while start < len(rows):
        count = 1
        # rows come sorted: the last one that is taken is the longest
        while (end := start + (count + 1) * world) <= len(rows):
            if (count + 1) * tokens(rows[end - 1]) > plan.tokens:
                break
            count += 1
        counts.append(count)
        start += count * world
    return counts


class BucketedMicroBatches:
    """A `MicroBatches` of rows of similar length: each micro-batch is as wide as its own longest
    row."""

    def __init__(
        self,
        stream: ExampleStream,
        read: Callable[[Sequence[int], int], Inputs],
        plan: BatchPlan,
        rank: int,
        *,
        longest: Callable[[Sequence[int]], int] | None = None,
        tokens: Callable[[int, int], int] | None = None,
    ) -> None:
        """Cut what a stream gives.

        Args:
            stream: of the numbers of rows.
            read: makes of such numbers, and of what lengths are rounded up to, what a model reads.
            plan: how a step is cut.
            rank: whose part.
            longest: says of the rows of a step how wide all of it is, where padding counts in the
                losses; each micro-batch by itself where not given.
            tokens: that a row takes where it is the longest of a micro-batch and lengths are
                rounded up so; where the plan has a budget of them.
        """
        self._stream = stream
        self._read = read
        self._plan = plan
        self._rank = rank
        self._longest = longest
        self._tokens = tokens

    @property
    def epoch(self) -> int:
        return self._stream.epoch

    def next_step(self, step: int) -> Sequence[Inputs]:
        rows = self._stream.next_rows()
        multiple = PAD_MULTIPLE if self._longest is None else self._longest(rows)
        tokens = None if self._tokens is None else partial(self._tokens, multiple)
        parts = cut(rows, self._plan, self._rank, tokens)
        return [self._read(part, multiple) for part in parts]

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)

    def close(self) -> None:
        """Nothing works for it."""


def evaluation_parts(
    lengths: npt.NDArray[np.int64],
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    together: int = 1,
) -> Iterator[tuple[Tensor, list[int], bool]]:
    """A rank's share of all rows, longest first, as many parts on every rank.

    Args:
        lengths: of the rows to evaluate on.
        batch_size: rows of one forward pass of one rank.
        rank: whose share.
        world_size: number of ranks, see `shared_parts`.
        together: parts of a group.

    Yields:
        Numbers of the rows that count, int64 [counted], and of all rows of the part, which begin
        with those; whether it begins a group.
    """
    order = np.argsort(-lengths, kind="stable")
    for places, counts, begins in shared_parts(
        len(order), batch_size, rank=rank, world_size=world_size, together=together
    ):
        rows = order[places]
        counted = rows if counts else rows[:0]
        yield torch.from_numpy(counted.copy()), rows.tolist(), begins


def shared_parts(
    rows: int, size: int, *, rank: int, world_size: int, together: int = 1
) -> Iterator[tuple[slice, bool, bool]]:
    """A rank's parts of rows that follow each other, in groups that are the same whatever the ranks
    are; as many parts on every rank.

    Args:
        rows: there are.
        size: of a part, at most.
        rank: whose parts.
        world_size: number of ranks; a forward pass may be collective, so a rank without a part of
            its own gets one that doesn't count.
        together: parts of a group.

    Yields:
        Places of a part's rows, whether it counts, and whether it begins a group.
    """
    starts = range(0, rows, size)
    for first in range(0, len(starts), world_size * together):
        # the first rank's group is never shorter than those of the others
        for place in range(min(together, len(starts) - first)):
            number = first + rank * together + place
            start = starts[min(number, len(starts) - 1)]
            yield slice(start, start + size), number < len(starts), place == 0


def _order(
    lengths: npt.NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Numbers of all examples in the order of an epoch.

        rest of the epoch before | batch | batch | ... | batch | start of the epoch after

    Only whole batches are made of similar lengths: the ends share a batch with another epoch.
    """
    count = len(lengths)
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
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
