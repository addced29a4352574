"""The runs of a study by condition: their scores, and what these are compared with."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastkd.study.metric import read_metric
from fastkd.study.naming import Level
from fastkd.study.plan import BASELINE, NO_DISTILLATION, Plan
from fastkd.study.statistics import (
    Difference,
    Mean,
    Score,
    compare,
    holm,
    mean_over_seeds,
    paired_values,
)
from fastkd.study.storage import Record
from fastkd.training.run_folder import RunFolder

# how many of a search's candidates are shown
BEST = 10


@dataclass
class Row:
    """A level of an axis, or a condition, with what it is compared with."""

    level: str
    scores: list[Score]
    runs: tuple[int, int]
    """Runs finished, and all of them."""
    levels: Mapping[str, Level] = field(default_factory=dict)
    """Level of each axis, where a row is one condition."""
    differences: dict[str, Difference] = field(default_factory=dict)
    """By what it is compared with."""
    corrected: dict[str, float | None] = field(default_factory=dict)


class Results:
    """The finished runs of a study, by condition."""

    def __init__(self, plan: Plan, records: Sequence[Record]) -> None:
        self.plan = plan
        self.records = records
        self.baseline = plan.baseline.name
        self.teacher = _teacher_scores(plan)
        self.full = plan.spec.search is None and plan.spec.grid in (None, "full")
        self.reference = self._scores(
            [r for r in records if r.run.condition.name == NO_DISTILLATION], NO_DISTILLATION, ()
        )

    def levels(self, axis: str) -> list[str]:
        """The levels of an axis, in the order of the study file."""
        return [str(level) for level in self.plan.axes[axis]]

    def axis(self, axis: str, task: str | None = None) -> list[Row]:
        """One row a level of an axis of a grid, of all tasks or of one.

        Other axes are averaged over in a full grid, and stand at the baseline in the others.
        """
        names = [name for name in self.plan.axes if name != axis]
        base = {name: self.plan.baseline_levels[name] for name in names}
        rows = []
        for level in self.levels(axis):
            records = [
                r
                for r in self.records
                if str(r.run.condition.levels.get(axis)) == level
                and task in (None, r.run.task)
                and (self.full or all(r.run.condition.levels[n] == base[n] for n in names))
            ]
            rows.append(self._row(level, records, names))
        self._compare(rows, str(self.plan.baseline_levels[axis]))
        return rows

    def conditions(self) -> list[Row]:
        """One row a condition; a search's candidates best first."""
        rows = self._all_conditions()
        self._compare(rows, self.baseline)
        if self.plan.spec.search is not None:
            rows = self._ranked(rows)
        return rows

    def candidates(self) -> list[Row]:
        """One row a candidate of a search, in the order they were drawn."""
        return [row for row in self._all_conditions() if row.levels]

    def cells(self, one: str, two: str, task: str | None) -> dict[tuple[str, str], list[Score]]:
        """The runs of a task by the levels of two axes of a full grid."""
        names = [name for name in self.plan.axes if name not in (one, two)]
        found: dict[tuple[str, str], list[Record]] = {}
        for record in self.records:
            levels = record.run.condition.levels
            if levels and record.run.task == task:
                found.setdefault((str(levels[one]), str(levels[two])), []).append(record)
        return {key: self._scores(records, "", names) for key, records in found.items()}

    def kept(self, row: Row, tasks: Sequence[str | None]) -> float | None:
        """Share of the teacher's score that a row keeps, averaged over tasks."""
        shares = []
        for task in tasks if self.teacher else ():
            mean = mean_over_seeds(s for s in row.scores if s.task == task).mean
            if mean is None:
                return None
            shares.append(mean / self.teacher[task])
        return statistics.fmean(shares) if shares else None

    def best(self) -> tuple[str, Mean] | None:
        """The condition that leads, of those that are finished."""
        rows = self._ordered(self._all_conditions())
        return (rows[0].level, mean_over_seeds(rows[0].scores)) if rows else None

    def _all_conditions(self) -> list[Row]:
        groups: dict[str, list[Record]] = {}
        for record in self.records:
            groups.setdefault(record.run.condition.name, []).append(record)
        rows = []
        for name, records in groups.items():
            row = self._row(name, records, ())
            row.levels = records[0].run.condition.levels
            rows.append(row)
        return rows

    def _ranked(self, rows: list[Row]) -> list[Row]:
        fixed = [row for row in rows if not row.levels]
        return fixed + self._ordered([row for row in rows if row.levels])[:BEST]

    def _ordered(self, rows: list[Row]) -> list[Row]:
        """Best first; rows that are not finished are left out."""
        sign = -1 if self.plan.spec.metric.direction == "maximize" else 1
        whole = [row for row in rows if row.runs[0] == row.runs[1]]
        known = [(mean_over_seeds(row.scores).mean, row) for row in whole]
        found = [(sign * mean, row) for mean, row in known if mean is not None]
        return [row for _, row in sorted(found, key=lambda item: item[0])]

    def _row(self, level: str, records: Sequence[Record], names: Sequence[str]) -> Row:
        scores = self._scores(records, level, names)
        return Row(level, scores, (len(scores), len(records)))

    def _scores(self, records: Sequence[Record], level: str, names: Sequence[str]) -> list[Score]:
        return [
            Score(
                level,
                tuple(str(r.run.condition.levels[n]) for n in names),
                r.run.task,
                r.run.seed,
                r.value,
            )
            for r in records
            if r.value is not None
        ]

    def _compare(self, rows: list[Row], baseline: str) -> None:
        """Fill in the differences of all rows, p values corrected over the rows."""
        base = next((row for row in rows if row.level == baseline), None)
        pairs = {
            BASELINE: [
                (row, paired_values(row.scores, base.scores))
                for row in rows
                if base is not None and row is not base
            ],
            NO_DISTILLATION: [
                (row, paired_values(row.scores, self.reference, match_others=False))
                for row in rows
                if self.reference and row.level != NO_DISTILLATION
            ],
        }
        for name, compared in pairs.items():
            for row, values in compared:
                row.differences[name] = compare(values, len(compared))
            corrected = holm([row.differences[name].p for row, _ in compared])
            for (row, _), p in zip(compared, corrected, strict=True):
                row.corrected[name] = p


def _teacher_scores(plan: Plan) -> dict[str | None, float]:
    """The score of the shared step that teaches, by task; empty where none is named or known."""
    found: dict[str | None, float] = {}
    for step in plan.shared:
        if step.name == plan.spec.teacher and RunFolder(step.place.run).summary.is_file():
            value = read_metric(step.place.run, plan.spec.metric.path)
            if isinstance(value, float):
                found[step.task] = value
    if None in found:
        return dict.fromkeys(plan.tasks, found[None])
    return found if found.keys() == set(plan.tasks) else {}
