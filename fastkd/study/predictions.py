"""What the runs of a study predicted, beside their scores: the same scores of resampled examples.

A score of a task is read between two ends, what the best one answer to everything scores (its
floor) and what the run's teacher does: `(score - floor) / (teacher - floor)` is the share of the
teacher that a student keeps once chance is taken out. All three are of the same examples, also of
resampled ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from fastkd.data.factory import task_of
from fastkd.data.tasks import Task
from fastkd.data.tasks.metrics import measure, predictions_of, task_score
from fastkd.errors import UserError, one_line
from fastkd.study.metric import follow
from fastkd.study.plan import Plan, Run
from fastkd.study.resampling import Array, draw_weights, drawn_scores, mean_over_sets
from fastkd.study.spec import SCORE
from fastkd.training.run_folder import RunFolder

AnyArray = npt.NDArray[Any]
_LABELS = "/labels"


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


@dataclass(frozen=True)
class Evidence:
    """What is known of one run."""

    student: Number
    floor: Number | None
    """The best one answer to everything; `None` of a metric that isn't a task's score."""
    teacher: Number | None

    @property
    def kept(self) -> Number | None:
        """Share of the teacher without chance; `None` where it knows no more than one answer."""
        if self.floor is None or self.teacher is None or not _is_above(self.teacher, self.floor):
            return None
        return self.student.between(self.floor, self.teacher)


class Predictions:
    """The predictions of a study's runs, as far as they were kept."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._task = cache(self._read_task)
        self._judges: dict[bytes, _Judge] = {}

    def of(self, run: Run, value: float) -> Evidence:
        """What a finished run left beside its score.

        Args:
            run: of the study.
            value: of the study's metric.
        """
        if self._plan.spec.metric.path != SCORE:
            return Evidence(Number(value), None, None)
        folder = RunFolder(self._plan.place(run).run)
        if folder.predictions.is_file():
            try:
                with np.load(folder.predictions, allow_pickle=False) as arrays:
                    return self._judged(self._task(run.task), dict(arrays), value)
            except (BadZipFile, ValueError, KeyError, EOFError) as error:
                raise UserError(
                    f"{folder.predictions} can't be read ({one_line(error, None)}); remove the "
                    "run's folder and try it again with --retry-failed, or remove the file to do "
                    "without it"
                ) from error
        summary = folder.read_summary()
        ends = [follow(summary, path) for path in ("after.baseline.score", "teacher.score")]
        floor, teacher = (None if end is None else Number(float(end)) for end in ends)
        return Evidence(Number(value), floor, teacher)

    def _judged(self, task: Task, arrays: Mapping[str, AnyArray], value: float) -> Evidence:
        sets = [name.removesuffix(_LABELS) for name in arrays if name.endswith(_LABELS)]
        labels = {name: arrays[name + _LABELS] for name in sets}
        key = b"".join([task.name.encode(), *(right.tobytes() for right in labels.values())])
        judge = self._judges.setdefault(key, _Judge(task, labels))
        taught = all(f"{name}/teacher" in arrays for name in sets)
        student = judge.of_outputs({name: arrays[f"{name}/outputs"] for name in sets})
        teacher = judge.of_teacher({n: arrays[f"{n}/teacher"] for n in sets}) if taught else None
        return Evidence(Number(value, student.drawn), judge.floor, teacher)

    def _read_task(self, name: str | None) -> Task:
        plan = self._plan
        section = plan.recipe(Run(plan.baseline, name, plan.spec.seeds[0])).task
        assert section is not None, "a run that keeps predictions has a task"
        return task_of(section)


class _Judge:
    """Scores predictions of the evaluation sets of a task."""

    def __init__(self, task: Task, labels: Mapping[str, AnyArray]) -> None:
        self._task, self._labels = task, labels
        self._teachers: dict[bytes, Number] = {}

    @cached_property
    def floor(self) -> Number:
        """Of the best one answer to everything."""
        answers = (
            self._number(
                {name: np.full(len(right), answer) for name, right in self._labels.items()}
            )
            for answer in range(self._task.outputs)
        )
        return max(answers, key=lambda number: number.value)

    def of_outputs(self, outputs: Mapping[str, AnyArray]) -> Number:
        """Of what a model gives every example, [examples, outputs] of each set."""
        scores = self._task.regression
        return self._number({n: predictions_of(o, regression=scores) for n, o in outputs.items()})

    def of_teacher(self, outputs: Mapping[str, AnyArray]) -> Number:
        """The same of outputs that many runs have, computed once."""
        key = b"".join(array.tobytes() for array in outputs.values())
        if key not in self._teachers:
            self._teachers[key] = self.of_outputs(outputs)
        return self._teachers[key]

    @cached_property
    def _weights(self) -> dict[str, Array]:
        return {name: draw_weights(len(right)) for name, right in self._labels.items()}

    def _number(self, predicted: Mapping[str, AnyArray]) -> Number:
        metrics, labels = self._task.metrics, self._labels
        scores = {n: measure(metrics, found, labels[n]) for n, found in predicted.items()}
        drawn = [
            drawn_scores(metrics, found, labels[n], self._weights[n])
            for n, found in predicted.items()
        ]
        return Number(task_score(scores), mean_over_sets(drawn))


def _is_above(one: Number, other: Number) -> bool:
    """By two standard errors, as far as they are known."""
    error = 0.0
    if one.drawn is not None and other.drawn is not None:
        error = float(np.std(one.drawn - other.drawn, ddof=1))
    return one.value - other.value > 2 * error
