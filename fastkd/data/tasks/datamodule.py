"""Labelled examples of a task: batches of similar length, and official scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.data.batching import BatchPlan
from fastkd.data.datamodule import EvalBatch, Evaluator
from fastkd.data.sampler import BucketedMicroBatches, ExampleStream, evaluation_parts
from fastkd.data.sequences import PAD_MULTIPLE, padded_length
from fastkd.data.tasks import EncodedExamples, Task
from fastkd.data.tasks.answers import AnswerEvaluator
from fastkd.data.tasks.entities import WordEvaluator
from fastkd.data.tasks.metrics import (
    Judged,
    Scores,
    constant_scores,
    f1_by_class,
    measure,
    predictions_of,
    task_score,
)
from fastkd.distributed import Ranks
from fastkd.head_spec import Labels
from fastkd.types import LABEL_WEIGHTS, ROWS, Inputs, Reading


@dataclass(frozen=True)
class TaskDataModule:
    """A `DataModule`: examples of a task, and the sets that it is scored on."""

    task: Task
    train: EncodedExamples
    evaluations: dict[str, EncodedExamples]
    """By the split's name."""
    counts_padding: bool = False
    """Whether losses are means over padding as well: then all of a step is padded alike, so that
    how it is cut still changes nothing."""
    packed: bool = False
    """Whether the examples of a micro-batch follow each other in one row, in place of being
    padded."""
    class_weights: npt.NDArray[np.float64] | None = None
    """[classes] what the label of an example counts, at least 1; `None`: all alike."""
    reads: Reading = field(default="predictions", init=False)

    @property
    def compares(self) -> bool:
        return False

    @property
    def pad_id(self) -> int:
        """What examples are padded with."""
        return self.train.pad_id

    @property
    def sets(self) -> list[EncodedExamples]:
        """All examples that are read."""
        return [self.train, *self.evaluations.values()]

    @property
    def rows(self) -> int | None:
        return len(self.train)

    @property
    def counted(self) -> tuple[str, int]:
        return "examples", 1

    @property
    def headlines(self) -> tuple[str, ...]:
        return ("score",)

    def micro_batches(
        self, batch_size: int, seed: int, plan: BatchPlan, rank: int
    ) -> BucketedMicroBatches:
        stream = ExampleStream(self.train, batch_size, seed)

        def read(rows: Sequence[int], multiple: int) -> Inputs:
            return {**self._batch(self.train, rows, multiple), ROWS: torch.tensor(rows)}

        longest = self._longest if self.counts_padding else None
        return BucketedMicroBatches(stream, read, plan, rank, longest=longest)

    def heldout(self, size: int, ranks: Ranks, together: int = 1) -> Iterator[EvalBatch]:
        first = 0
        for examples in self.evaluations.values():
            multiple = examples.max_length if self.counts_padding else PAD_MULTIPLE
            parts = evaluation_parts(
                examples.lengths,
                size,
                rank=ranks.rank,
                world_size=ranks.world_size,
                together=together,
            )
            for counted, rows, begins in parts:
                # those of all that is read: examples to train on stand before them
                numbers = torch.tensor(rows) + len(self.train) + first
                batch = {**self._batch(examples, rows, multiple), ROWS: numbers}
                yield EvalBatch(batch, counted + first, begins)
            first += len(examples)

    def _batch(self, examples: EncodedExamples, rows: Sequence[int], multiple: int) -> Inputs:
        batch = examples.packed(rows) if self.packed else examples.batch(rows, multiple)
        if self.class_weights is None:
            return batch
        weights = self.class_weights[examples.labels[list(rows)]]
        return {**batch, LABEL_WEIGHTS: torch.from_numpy(weights)}

    def _longest(self, rows: Sequence[int]) -> int:
        longest = int(self.train.lengths[rows[-1]])
        return padded_length(longest, PAD_MULTIPLE, self.train.max_length)

    def evaluator(self, ranks: Ranks, whose: Judged = "student") -> Evaluator:
        kind = _EVALUATORS[self.task.labels_of]
        evaluator: Evaluator = kind(self.task, self.evaluations, ranks.device, whose)
        return evaluator

    def totals(self, rows: int) -> dict[str, Any]:
        return {"train_examples": rows, "task_examples": len(self.train)}

    @property
    def stores_heldout(self) -> bool:
        return True

    def stored_rows(self, *, heldout: bool) -> npt.NDArray[np.int64]:
        sets = self.sets if heldout else [self.train]
        lengths = np.concatenate([np.diff(one.offsets) for one in sets])
        return np.concatenate([[0], np.cumsum(lengths)])

    def cache_identity(self, *, heldout: bool) -> dict[str, Any]:
        sets = self.sets if heldout else [self.train]
        # outputs of the teacher stand in the order of the task's labels
        return {"data": [one.fingerprint for one in sets], "task": repr(self.task)}

    @property
    def digests(self) -> dict[str, str]:
        sets = {"train": self.train, **self.evaluations}
        return {name: examples.fingerprint for name, examples in sets.items()}

    def introduction(self, batch_size: int) -> tuple[str, str]:
        held_out = ", ".join(
            f"{len(found):,} in {name}" for name, found in self.evaluations.items()
        )
        there = f"task {self.task.name}: {len(self.train):,} examples to train on, {held_out}"
        return there, f"{batch_size} examples"


class ScoreEvaluator:
    """A `Evaluator` of predictions: the task's metrics on each of its sets."""

    def __init__(
        self,
        task: Task,
        evaluations: dict[str, EncodedExamples],
        device: torch.device,
        whose: Judged = "student",
    ) -> None:
        self._whose = whose
        self._task = task
        self._evaluations = evaluations
        count = sum(len(examples) for examples in evaluations.values())
        self._outputs = torch.zeros(count, task.outputs, dtype=torch.float64, device=device)
        self.outputs: dict[str, npt.NDArray[np.float32]] = {}
        """[examples, outputs] of each set, in its order, once there are results."""

    def add(self, rows: Tensor, student: Tensor, teacher: Tensor | None) -> None:
        self._outputs[rows.to(student.device)] = student[: len(rows)].to(self._outputs)

    def results(self, ranks: Ranks) -> dict[str, Any]:
        """`score` of the task, `scores` of each set by metric, what one answer to everything would
        score (`baseline`), `examples`; of classes also `class_f1` of each set, and `one_class`, the
        class that is predicted for all of a set."""
        # every row was written by one rank
        outputs, task = ranks.sum(self._outputs).cpu().numpy(), self._task
        scores: dict[str, Scores] = {}
        class_f1: dict[str, Scores] = {}
        one_class, first = {}, 0
        for name, examples in self._evaluations.items():
            part = outputs[first : first + len(examples)]
            self.outputs[name] = part.astype(np.float32)
            predictions = predictions_of(part, regression=task.regression, whose=self._whose)
            scores[name] = measure(task.metrics, predictions, examples.labels)
            if not task.regression:
                class_f1[name] = f1_by_class(predictions, examples.labels, task.labels)
                if (predictions == predictions[0]).all():
                    one_class[name] = task.labels[int(predictions[0])]
            first += len(examples)
        found = {"score": task_score(scores), "scores": scores, "examples": first}
        found["baseline"] = self._baseline()
        return found if task.regression else found | {"class_f1": class_f1, "one_class": one_class}

    def _baseline(self) -> dict[str, Any]:
        labels = {name: examples.labels for name, examples in self._evaluations.items()}
        scores = constant_scores(self._task.metrics, labels, self._task.outputs)
        return {"score": task_score(scores), "scores": scores}


_EVALUATORS: dict[Labels | None, Any] = {
    "example": ScoreEvaluator,
    "token": WordEvaluator,
    "span": AnswerEvaluator,
}
"""By what a label is of."""
