"""Rows of texts in batches of similar length, and how near two models are on held-out ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastkd.data.batching import BatchPlan
from fastkd.data.datamodule import EvalBatch, Evaluator
from fastkd.data.rows.evaluators import EmbeddingEvaluator, OutputEvaluator
from fastkd.data.rows.tokenized import EncodedRows, RowSets
from fastkd.data.sampler import BucketedMicroBatches, ExampleStream, evaluation_parts
from fastkd.data.sequences import PAD_MULTIPLE, Sequences, padded_length
from fastkd.data.tasks.metrics import Judged
from fastkd.distributed import Ranks
from fastkd.types import ROWS, Inputs, Reading


@dataclass(frozen=True)
class RowDataModule:
    """A `DataModule`: rows of texts."""

    encoded: RowSets
    most_heldout: int
    """Rows that an evaluation reads, at most: spread over those that are held out."""
    outputs: int | None = None
    """Outputs of the models' classification heads; `None` where they have none, so that embeddings
    are compared."""
    counts_padding: bool = False
    """Whether losses are means over padding as well: then all of a step is padded alike."""

    @property
    def reads(self) -> Reading:
        return "embeddings" if self.outputs is None else "predictions"

    @property
    def compares(self) -> bool:
        return True

    @property
    def sets(self) -> list[Sequences]:
        """All sequences that are read, those of a teacher's own tokenizer left out."""
        return self.encoded.sequences

    @property
    def pad_id(self) -> int:
        """What sequences are padded with."""
        return self.encoded.train.sequences.pad_id

    @property
    def teacher_pad_id(self) -> int | None:
        """What a teacher's own sequences are padded with, where it has a tokenizer of its own."""
        own = self.encoded.train.teacher
        return None if own is None else own.pad_id

    @property
    def rows(self) -> int | None:
        return len(self.encoded.train)

    @property
    def counted(self) -> tuple[str, int]:
        return "rows", 1

    @property
    def headlines(self) -> tuple[str, ...]:
        if self.outputs is None:
            return ("sentence_cosine",)
        return ("spearman",) if self.outputs == 1 else ("same_class",)

    def micro_batches(
        self, batch_size: int, seed: int, plan: BatchPlan, rank: int
    ) -> BucketedMicroBatches:
        train = self.encoded.train

        def read(rows: Sequence[int], multiple: int) -> Inputs:
            numbers = torch.from_numpy(train.numbers(rows))
            return {**train.batch(rows, multiple), ROWS: numbers}

        def tokens(multiple: int, row: int) -> int:
            longest = int(train.lengths[row])
            return train.each * padded_length(longest, multiple, train.sequences.max_length)

        stream = ExampleStream(train, batch_size, seed)
        longest = self._longest if self.counts_padding else None
        return BucketedMicroBatches(stream, read, plan, rank, longest=longest, tokens=tokens)

    def heldout(self, size: int, ranks: Ranks, together: int = 1) -> Iterator[EvalBatch]:
        rows, chosen = self.encoded.heldout, self._chosen
        multiple = rows.sequences.max_length if self.counts_padding else PAD_MULTIPLE
        parts = evaluation_parts(
            rows.lengths[chosen],
            size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            together=together,
        )
        for counted, part, begins in parts:
            yield EvalBatch(rows.batch(chosen[part].tolist(), multiple), counted, begins)

    def evaluator(self, ranks: Ranks, whose: Judged = "student") -> Evaluator:
        count, each = len(self._chosen), self.encoded.heldout.each
        if self.outputs is None:
            return EmbeddingEvaluator(count, each, ranks.device)
        return OutputEvaluator(count, each, self.outputs, ranks.device)

    def totals(self, rows: int) -> dict[str, Any]:
        return {"train_rows": rows, "data_rows": len(self.encoded.train)}

    @property
    def stores_heldout(self) -> bool:
        return False

    def stored_rows(self, *, heldout: bool) -> npt.NDArray[np.int64]:
        # of each sequence apart, as the teacher reads it
        train = self.encoded.train
        return np.asarray((train.teacher or train.sequences).offsets)

    def cache_identity(self, *, heldout: bool) -> dict[str, Any]:
        return {"data": self.encoded.train.fingerprint}

    @property
    def digests(self) -> dict[str, str]:
        train, heldout = self.encoded
        return {"train": train.fingerprint, "heldout": heldout.fingerprint}

    def introduction(self, batch_size: int) -> tuple[str, str]:
        train, each = self.encoded.train, self.encoded.train.each
        of = "1 sequence" if each == 1 else f"{each} sequences"
        there = (
            f"rows: {len(train):,} to train on, {len(self._chosen):,} held out, {of} in each, "
            f"{train.sequences.lengths.mean():.0f} tokens in the mean"
        )
        return there, f"{batch_size} rows"

    @property
    def _chosen(self) -> npt.NDArray[np.int64]:
        """Numbers of the held-out rows that are read."""
        count = len(self.encoded.heldout)
        return np.linspace(0, count - 1, min(count, self.most_heldout)).astype(np.int64)

    def _longest(self, rows: Sequence[int]) -> int:
        train: EncodedRows = self.encoded.train
        longest = int(train.lengths[rows[-1]])
        return padded_length(longest, PAD_MULTIPLE, train.sequences.max_length)
