"""What the loop needs of the data, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastkd.data.batching import BatchPlan
from fastkd.data.sequences import Sequences
from fastkd.data.tasks.metrics import Judged
from fastkd.distributed import Ranks
from fastkd.types import Inputs, Reading


class MicroBatches(Protocol):
    """One rank's micro-batches, step by step, without end."""

    @property
    def epoch(self) -> int:
        """Passes over the data that are done."""

    def next_step(self, step: int) -> Sequence[Inputs]:
        """The micro-batches of the next optimiser step; `step` is its number."""

    def state_dict(self) -> dict[str, Any]:
        """Where the feed stands: plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the saved feed stood."""

    def close(self) -> None:
        """End what works for the feed; it gives no more steps."""


@dataclass(frozen=True)
class EvalBatch:
    """Held-out data of one forward pass."""

    inputs: Inputs
    """On the CPU."""
    rows: Tensor
    """Numbers of its blocks or examples among all, int64 [counted]; empty if it doesn't count,
    because this rank repeats it while others work."""
    begins: bool = True
    """Whether it is the first of a group whose rows losses may compare with each other."""


class Evaluator(Protocol):
    """Gathers what an evaluation says besides the losses."""

    def add(self, rows: Tensor, student: Tensor, teacher: Tensor | None) -> None:
        """Take in what `DataModule.reads` of both models came to on a part; its rows are first."""

    def results(self, ranks: Ranks) -> dict[str, Any]:
        """What was found on all parts of all ranks: numbers, and sections of numbers."""


class DataModule(Protocol):
    """Data to train on and held-out data to evaluate on."""

    @property
    def rows(self) -> int | None:
        """Blocks or examples in one pass; `None` where they are not counted."""

    @property
    def pad_id(self) -> int | None:
        """What sequences are padded with; `None` where all are of one length."""

    @property
    def sets(self) -> Sequence[Sequences]:
        """All sequences that are read, of the models' own tokenizer; none of text in blocks."""

    @property
    def counted(self) -> tuple[str, int]:
        """What throughput is counted in, and how many of those a row is."""

    @property
    def reads(self) -> Reading:
        """What an evaluator is given of a model."""

    @property
    def compares(self) -> bool:
        """Whether an evaluator is given that of student and teacher, to compare them; else of one
        of them, so that a teacher has a score of its own."""

    @property
    def headlines(self) -> tuple[str, ...]:
        """Numbers of its evaluators that steps can be compared by, the larger the better."""

    def micro_batches(self, batch_size: int, seed: int, plan: BatchPlan, rank: int) -> MicroBatches:
        """A rank's micro-batches from the start of the order of `seed`; every rank calls this."""

    def heldout(self, size: int, ranks: Ranks, together: int = 1) -> Iterator[EvalBatch]:
        """A rank's held-out parts of up to `size` rows, as many on every rank; `together` of them
        are a group, which one rank reads."""

    def evaluator(self, ranks: Ranks, whose: Judged = "student") -> Evaluator:
        """A new one, of the outputs of the student or of the teacher."""

    def totals(self, rows: int) -> dict[str, Any]:
        """For the summary: what `rows` rows that were trained on come to, and what there is."""

    @property
    def stores_heldout(self) -> bool:
        """Whether states of a teacher may be stored of held-out rows too: not where these are
        judged by more than the losses read."""

    def stored_rows(self, *, heldout: bool) -> npt.NDArray[np.int64]:
        """[rows + 1] where each row of which a teacher's states are stored begins, in tokens; held
        out ones, where they are asked for, stand behind those to train on."""

    def cache_identity(self, *, heldout: bool) -> dict[str, Any]:
        """What of these rows the name of a folder of a teacher's states is made of."""

    @property
    def digests(self) -> dict[str, str]:
        """By part of the data, the digest of what was read."""

    def introduction(self, batch_size: int) -> tuple[str, str]:
        """For the user: what there is, and what a step reads."""
