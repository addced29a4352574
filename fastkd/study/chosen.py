"""What a study takes over from another one that chose on examples which are not reported."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.study.plan import Chosen, Condition, Plan
from fastkd.study.spec import StudySpec, load_study
from fastkd.study.storage import Record, Store


def read_chosen(spec: StudySpec, path: Path) -> Chosen:
    """The overrides of the best condition of the other study, for each condition of the axis that
    both have and each task; empty where a study takes nothing over.

    Best is the mean over all of its seeds; axes beside the one that both have are what was chosen.

    Args:
        spec: of the study that takes over.
        path: its file; the other one is named from its folder.

    Raises:
        UserError: the other study is not finished, has nothing to choose from, or chose by examples
            that are reported.
    """
    if spec.chosen is None:
        return {}
    file, axis = path.parent / spec.chosen.study, spec.chosen.axis
    given = f"{path}: chosen.study {spec.chosen.study}"
    other = Plan(load_study(file), file)
    _check(other, axis, given)
    if not (other.output / "study.db").is_file():
        raise UserError(f"{given}: {other.output} holds no study yet; run it first")
    records = Store(other).records()
    done = [record for record in records if record.value is not None]
    if len(done) < len(records):
        raise UserError(
            f"{given}: {len(done)} of its {len(records)} runs are finished; run it to its end first"
        )
    found: dict[tuple[str, str | None], Mapping[str, Any]] = {}
    for level in other.axes[axis]:
        for task in other.tasks:
            best = _best(other, done, axis, str(level), task)
            sources = [source for name, source in best.sources if name != axis]
            found[str(level), task] = {k: v for source in sources for k, v in source.items()}
    return found


def _check(other: Plan, axis: str, given: str) -> None:
    if other.spec.search is not None or axis not in other.axes or len(other.axes) < 2:
        raise UserError(
            f"{given}: expected a grid of the axis {axis} and at least one more to choose from"
        )
    if not other.selects:
        raise UserError(
            f"{given}: it is scored on what is reported in the end; set task.selection there, with "
            "a share of the training examples"
        )


def _best(plan: Plan, records: list[Record], axis: str, level: str, task: str | None) -> Condition:
    values: dict[str, list[float]] = {}
    conditions: dict[str, Condition] = {}
    for record in records:
        condition = record.run.condition
        if str(condition.levels.get(axis)) == level and record.run.task == task:
            assert record.value is not None, "they are finished"
            values.setdefault(condition.name, []).append(record.value)
            conditions[condition.name] = condition
    sign = 1 if plan.spec.metric.direction == "maximize" else -1
    name = max(values, key=lambda name: sign * statistics.fmean(values[name]))
    return conditions[name]
