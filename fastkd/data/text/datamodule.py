"""Text in blocks of equal length, masked where a term needs that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.data.batching import BatchPlan
from fastkd.data.datamodule import EvalBatch
from fastkd.data.sampler import shared_parts
from fastkd.data.sequences import Sequences
from fastkd.data.tasks.metrics import Judged
from fastkd.data.text import BlockStream, Corpus
from fastkd.data.text.mlm import Masking
from fastkd.distributed import Ranks
from fastkd.types import ROWS, Inputs, Reading


@dataclass(frozen=True)
class TextDataModule:
    """A `DataModule`: blocks of a corpus."""

    corpus: Corpus
    block_size: int
    masking: Masking | None = None
    ranks: Ranks | None = None
    """Which take their micro-batches together, and share the work; each alone where not given."""
    reads: Reading = field(default="embeddings", init=False)

    @property
    def compares(self) -> bool:
        return True

    @property
    def rows(self) -> int | None:
        return self.corpus.train_blocks

    @property
    def pad_id(self) -> int | None:
        return None

    @property
    def sets(self) -> Sequence[Sequences]:
        return ()

    @property
    def counted(self) -> tuple[str, int]:
        return "tokens", self.block_size

    @property
    def headlines(self) -> tuple[str, ...]:
        return ("sentence_cosine",)

    def micro_batches(
        self, batch_size: int, seed: int, plan: BatchPlan, rank: int
    ) -> BlockMicroBatches:
        stream = self.corpus.stream(batch_size, seed, self.ranks)
        return BlockMicroBatches(stream, self.masking, plan, rank)

    def heldout(self, size: int, ranks: Ranks, together: int = 1) -> Iterator[EvalBatch]:
        numbers, world = torch.arange(len(self.corpus.heldout)), ranks.world_size
        for rows, counts, begins in shared_parts(
            len(numbers), size, rank=ranks.rank, world_size=world, together=together
        ):
            counted = numbers[rows] if counts else numbers[:0]
            inputs = as_inputs(self.corpus.heldout[rows], self.masking, "heldout", rows.start)
            yield EvalBatch(inputs, counted, begins)

    def evaluator(self, ranks: Ranks, whose: Judged = "student") -> CosineEvaluator:
        return CosineEvaluator(self.corpus.heldout, ranks.device)

    def totals(self, rows: int) -> dict[str, Any]:
        return {
            "train_tokens": rows * self.block_size,
            "corpus_tokens": self.corpus.train_tokens,
        }

    @property
    def stores_heldout(self) -> bool:
        return False

    def stored_rows(self, *, heldout: bool) -> npt.NDArray[np.int64]:
        assert self.rows is not None, "a stream is refused before"
        return np.arange(self.rows + 1, dtype=np.int64) * self.block_size

    def cache_identity(self, *, heldout: bool) -> dict[str, Any]:
        return {"data": self.corpus.fingerprint}

    @property
    def digests(self) -> dict[str, str]:
        return self.corpus.digests

    def introduction(self, batch_size: int) -> tuple[str, str]:
        known = self.corpus.train_tokens
        tokens = "streamed" if known is None else f"{known:,} tokens"
        there = f"text: {tokens} to train on, {len(self.corpus.heldout)} blocks held out"
        return there, f"{batch_size} blocks of {self.block_size} tokens"


class BlockMicroBatches:
    """A `MicroBatches` of blocks: a rank's rows of the global batch, which alone are made."""

    def __init__(
        self, stream: BlockStream, masking: Masking | None, plan: BatchPlan, rank: int
    ) -> None:
        self._stream = stream
        self._masking = masking
        self._rows = plan.rows(rank)
        self._size = plan.micro_batch_size

    @property
    def epoch(self) -> int:
        return self._stream.epoch

    def next_step(self, step: int) -> Sequence[Inputs]:
        ids = self._stream.next_batch(self._rows)
        inputs = as_inputs(ids, self._masking, step, self._rows.start)
        if self._stream.numbers is not None:
            inputs = {**inputs, ROWS: self._stream.numbers}
        cuts = [slice(at, at + self._size) for at in range(0, len(ids), self._size)]
        return [{name: value[rows] for name, value in inputs.items()} for rows in cuts]

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)

    def close(self) -> None:
        self._stream.close()


class CosineEvaluator:
    """An `Evaluator` of embeddings: cosines of the student's and the teacher's."""

    def __init__(self, blocks: Tensor, device: torch.device) -> None:
        self._blocks = blocks
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        # of models whose embeddings aren't known nothing is added
        self._comparable = False

    def add(self, rows: Tensor, student: Tensor, teacher: Tensor | None) -> None:
        assert teacher is not None, "text is read by two models"
        self._comparable = student.shape[-1] == teacher.shape[-1]
        if self._comparable:
            pair = student.double(), teacher.double()
            cosines = torch.nn.functional.cosine_similarity(*pair, dim=-1)
            self._sum += cosines[: len(rows)].sum()

    def results(self, ranks: Ranks) -> dict[str, Any]:
        """`sentence_cosine` (`None` where nothing could be compared), `blocks`, `tokens`."""
        total = ranks.sum(self._sum).item()
        blocks = len(self._blocks)
        return {
            "sentence_cosine": total / blocks if self._comparable else None,
            "blocks": blocks,
            "tokens": self._blocks.numel(),
        }


def as_inputs(ids: Tensor, masking: Masking | None, draw: int | str, first: int) -> Inputs:
    """What both models read of blocks [blocks, tokens], masked where a term needs that; `first` is
    the number of the first of them among all."""
    return {"input_ids": ids} if masking is None else masking(ids, draw, first)
