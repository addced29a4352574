"""What a student keeps of its teacher on a task, and the same of resampled examples.

A score is read between two ends, what the best one answer to everything scores (its floor) and what
the teacher does: `(score - floor) / (teacher - floor)` is the share of the teacher that a student
keeps once chance is taken out. All three are of the same examples, also of resampled ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from fastkd.data.tasks.metrics import measure, predictions_of, task_score
from fastkd.data.tasks.resampling import Array, Draws, drawn_scores, mean_over_sets
from fastkd.data.tasks.task import Task

AnyArray = npt.NDArray[Any]
# scores that differ by less were added up in another order
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Number:
    """A score, and the same of resampled examples."""

    value: float
    drawn: Array | None = None
    """[draws]; `None` where no predictions were kept."""

    def between(self, floor: Number, teacher: Number) -> Number:
        """The share that is kept of the way from one to the other.

        That of draws is to first order around it (the delta method): where the ends are not far
        apart, ratios of draws have no variance.
        """
        way = teacher.value - floor.value
        value = (self.value - floor.value) / way
        if self.drawn is None or floor.drawn is None or teacher.drawn is None:
            return Number(value)
        own = self.drawn - self.value
        ends = (1 - value) * (floor.drawn - floor.value) + value * (teacher.drawn - teacher.value)
        drawn: Array = value + (own - ends) / way
        return Number(value, drawn)

    def is_above(self, other: Number) -> bool:
        """Whether it is above another one by two standard errors, as far as they are known."""
        error = 0.0
        if self.drawn is not None and other.drawn is not None:
            error = float(np.std(self.drawn - other.drawn, ddof=1))
        return self.value - other.value > max(2 * error, _ROUNDING)

    def interval(self) -> tuple[float, float]:
        """The ends of 95 % over the examples, of which it must know the draws; those of a score
        are taken for normal."""
        assert self.drawn is not None, "predictions are at hand"
        half = NormalDist().inv_cdf(0.975) * float(np.std(self.drawn, ddof=1))
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Evidence:
    """What is known of one student."""

    student: Number
    floor: Number | None
    """The best one answer to everything; `None` of a metric that isn't a task's score."""
    teacher: Number | None

    @property
    def kept(self) -> Number | None:
        """Share of the teacher without chance; `None` where it knows no more than one answer."""
        if self.floor is None or self.teacher is None or not self.teacher.is_above(self.floor):
            return None
        return self.student.between(self.floor, self.teacher)


class Judge:
    """Scores predictions of the evaluation sets of a task.

    Args:
        task: with a class or a score an example.
        labels: [examples] of each set, by its name.
    """

    def __init__(self, task: Task, labels: Mapping[str, AnyArray]) -> None:
        self._task, self._labels = task, labels
        self._teachers: dict[bytes, Number] = {}

    @cached_property
    def floor(self) -> Number:
        """Score of the best one answer to everything."""
        best = max(range(self._task.outputs), key=lambda answer: self._score(self._same(answer)))
        return self._number(self._same(best))

    def of_outputs(self, outputs: Mapping[str, AnyArray]) -> Number:
        """Score of what a model gives every example, [examples, outputs] of each set."""
        return self._number(self._predicted(outputs))

    def draws_of(self, outputs: Mapping[str, AnyArray]) -> Array:
        """Scores on resampled examples alone, where the score itself is known, [draws]."""
        return self._drawn(self._predicted(outputs))

    def of_teacher(self, outputs: Mapping[str, AnyArray]) -> Number:
        """Score of outputs that many runs have, computed once."""
        key = b"".join(array.tobytes() for array in outputs.values())
        if key not in self._teachers:
            self._teachers[key] = self.of_outputs(outputs)
        return self._teachers[key]

    def _predicted(self, outputs: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        scores = self._task.regression
        return {name: predictions_of(o, regression=scores) for name, o in outputs.items()}

    def _same(self, answer: int) -> dict[str, AnyArray]:
        """One answer to everything."""
        return {name: np.full(len(right), answer) for name, right in self._labels.items()}

    def _score(self, predicted: Mapping[str, AnyArray]) -> float:
        metrics, labels = self._task.metrics, self._labels
        return task_score({n: measure(metrics, p, labels[n]) for n, p in predicted.items()})

    @cached_property
    def _draws(self) -> dict[str, Draws]:
        return {name: Draws(len(right)) for name, right in self._labels.items()}

    def _number(self, predicted: Mapping[str, AnyArray]) -> Number:
        return Number(self._score(predicted), self._drawn(predicted))

    def _drawn(self, predicted: Mapping[str, AnyArray]) -> Array:
        drawn = []
        for name, found in predicted.items():
            given = self._task.metrics, found, self._labels[name]
            drawn.append(np.concatenate([drawn_scores(*given, w) for w in self._draws[name]]))
        return mean_over_sets(drawn)
