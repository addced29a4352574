"""What a study takes over from another one that chose on examples which are not reported."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.study.opening import StorageErrors
from fastkd.study.plan import Chosen, Condition, Plan
from fastkd.study.spec import StudySpec, Takeover, load_study
from fastkd.study.storage import Record, Store


def read_chosen(spec: StudySpec, path: Path) -> Chosen:
    """The overrides of the best condition of the other study, for each condition of the axis that
    both have and each task; of all studies that are named, empty where none is.

    Best is the mean over all of its seeds; axes beside the one that both have are what was chosen.

    Args:
        spec: of the study that takes over.
        path: its file; the other ones are named from its folder.

    Raises:
        UserError: another study is not finished, has nothing to choose from, lacks a task, or chose
            by examples that are reported; or two chose for the same condition.
    """
    found: dict[tuple[str, str | None], Mapping[str, Any]] = {}
    for takeover in spec.chosen:
        given = f"{path}: chosen.study {takeover.study}"
        made = _read(takeover, path, given)
        lacking = [task for task in spec.tasks or (None,) if not any(t == task for _, t in made)]
        if lacking:
            raise UserError(f"{given}: it has chosen nothing for the task {lacking[0]}")
        if twice := sorted({level for level, _ in made} & {level for level, _ in found}):
            raise UserError(
                f"{given}: another one has chosen for {takeover.axis} {twice[0]} as well; leave "
                "the condition out of one of them"
            )
        found |= made
    return found


def _read(
    takeover: Takeover, path: Path, given: str
) -> dict[tuple[str, str | None], Mapping[str, Any]]:
    file, axis = path.parent / takeover.study, takeover.axis
    other = Plan(load_study(file), file)
    _check(other, axis, given)
    if not (other.output / "study.db").is_file():
        raise UserError(f"{given}: {other.output} holds no study yet; run it first")
    other.check_shared()
    with StorageErrors(other.output / "study.db"):
        store = Store(other)
        store.check_recipes()
        records = store.records()
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
    if other.spec.grid not in (None, "full"):
        raise UserError(
            f"{given}: grid {other.spec.grid} tries other axes at the baseline alone, which leaves "
            "nothing to choose from; expected a full grid"
        )
    tried = {str(condition.levels[axis]) for condition in other.conditions if condition.levels}
    if untried := [level for level in other.axes[axis] if str(level) not in tried]:
        raise UserError(
            f"{given}: skip leaves out every condition of {axis} {untried[0]}, so there is nothing "
            "to choose from; leave it out of the axis as well"
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
