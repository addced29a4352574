"""What a model says of every token of the evaluation sets, gathered over batches and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.data.tasks.metrics import Judged, Scores, refuse_broken
from fastkd.data.tasks.task import Task
from fastkd.data.tasks.tokenized import EncodedExamples
from fastkd.distributed import Ranks

E = TypeVar("E", bound=EncodedExamples)


class TokenOutputs(Generic[E]):
    """Numbers of the tokens of all sets, one set after another."""

    def __init__(
        self,
        evaluations: Mapping[str, E],
        device: torch.device,
        whose: Judged,
        *,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype,
    ) -> None:
        """Begin with none.

        Args:
            evaluations: sets by name.
            device: where models give their outputs.
            whose: outputs they are; what to do about broken ones depends on it.
            shape: of what is kept of a token.
            dtype: likewise.
        """
        self._evaluations, self._whose = evaluations, whose
        lengths = np.concatenate([examples.lengths for examples in evaluations.values()])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._lengths = torch.from_numpy(lengths).to(device)
        self._offsets = torch.from_numpy(offsets[:-1]).to(device)
        self._kept = torch.zeros(int(offsets[-1]), *shape, dtype=dtype, device=device)
        self._broken = torch.zeros(len(lengths), dtype=torch.int64, device=device)

    def add(self, rows: Tensor, logits: Tensor, kept: Tensor) -> None:
        """Keep what is said of some examples.

        Args:
            rows: their numbers among all sets, int64 [counted].
            logits: [examples, tokens, outputs], which must be finite; those that count are first.
            kept: [examples, tokens, ...] what is kept of each.
        """
        rows = rows.to(logits.device)
        logits, kept = logits[: len(rows)], kept[: len(rows)]
        places = torch.arange(logits.shape[1], device=logits.device)
        there = places < self._lengths[rows, None]
        self._broken[rows] = ((~logits.isfinite()).any(dim=-1) & there).any(dim=-1).long()
        self._kept[(self._offsets[rows, None] + places)[there]] = kept[there].to(self._kept.dtype)

    def sets(self, ranks: Ranks) -> Iterator[tuple[str, E, npt.NDArray[Any]]]:
        """Name and examples of every set, and what was kept of its tokens.

        Raises:
            UserError: outputs that are not finite.
        """
        # every row was written by one rank
        kept, broken = (ranks.sum(found).cpu().numpy() for found in (self._kept, self._broken))
        refuse_broken(int(broken.sum()), len(broken), self._whose)
        first = 0
        for name, examples in self._evaluations.items():
            end = first + len(examples.tokens)
            yield name, examples, kept[first:end]
            first = end


def judged(task: Task, scores: Mapping[str, Scores], examples: int) -> dict[str, Any]:
    """What an evaluator says: `score`, the mean over sets of the metric that is named first,
    `scores` of each set, `examples`."""
    return {"score": first_metric(task, scores), "scores": dict(scores), "examples": examples}


def first_metric(task: Task, scores: Mapping[str, Scores]) -> float:
    """One number for a task: the mean over its sets of the metric that is named first."""
    return fmean(found[task.metrics[0]] for found in scores.values())
