"""What the runs of a study predicted, beside their scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from zipfile import BadZipFile

import numpy as np

from fastkd.data.tasks import Task
from fastkd.data.tasks.prepare import task_of
from fastkd.data.tasks.retention import AnyArray, Evidence, Judge, Number
from fastkd.errors import UserError, one_line
from fastkd.study.metric import follow
from fastkd.study.plan import Plan, Run
from fastkd.study.spec import SCORE, SCORES
from fastkd.training.run_folder import RunFolder

_LABELS = "/labels"


class Predictions:
    """The predictions of a study's runs, as far as they were kept."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._task = cache(self._read_task)
        self._judges: dict[bytes, Judge] = {}

    def of(self, run: Run, value: float) -> Evidence:
        """What a finished run left beside its score.

        Args:
            run: of the study.
            value: of the study's metric.
        """
        metric, folder = self._plan.spec.metric, RunFolder(self._plan.place(run).run)
        if metric.is_of_examples and folder.predictions.is_file():
            try:
                with np.load(folder.predictions, allow_pickle=False) as arrays:
                    return self._judged(self._task(run.task), dict(arrays), value)
            except (BadZipFile, ValueError, KeyError, EOFError) as error:
                raise UserError(
                    f"{folder.predictions} can't be read ({one_line(error, None)}); remove the "
                    "run's folder and try it again with --retry-failed, or remove the file to do "
                    "without it"
                ) from error
        if metric.path != SCORE:
            # a summary has the answer that is best by the task's score
            return Evidence(Number(value), None, None)
        summary = folder.read_summary()
        ends = [follow(summary, path) for path in ("after.baseline.score", "teacher.score")]
        floor, teacher = (None if end is None else Number(float(end)) for end in ends)
        return Evidence(Number(value), floor, teacher)

    def _judged(self, task: Task, arrays: Mapping[str, AnyArray], value: float) -> Evidence:
        sets = [name.removesuffix(_LABELS) for name in arrays if name.endswith(_LABELS)]
        path = self._plan.spec.metric.path
        if path != SCORE:
            scored, _, metric = path.removeprefix(SCORES).rpartition(".")
            sets = [name for name in sets if name == scored]
            task = replace(task, metrics=tuple(m for m in task.metrics if m == metric))
        labels = {name: arrays[name + _LABELS] for name in sets}
        key = b"".join([task.name.encode(), *(right.tobytes() for right in labels.values())])
        judge = self._judges.setdefault(key, Judge(task, labels))
        taught = all(f"{name}/teacher" in arrays for name in sets)
        drawn = judge.draws_of({name: arrays[f"{name}/outputs"] for name in sets})
        teacher = judge.of_teacher({n: arrays[f"{n}/teacher"] for n in sets}) if taught else None
        return Evidence(Number(value, drawn), judge.floor, teacher)

    def _read_task(self, name: str | None) -> Task:
        plan = self._plan
        section = plan.recipe(Run(plan.baseline, name, plan.spec.seeds[0])).task
        assert section is not None, "a run that keeps predictions has a task"
        return task_of(section)
