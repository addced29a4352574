"""The tables of a study: one an axis, one of all conditions, and what a search found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastkd.study.compare import (
    Difference,
    Mean,
    Score,
    Test,
    compare,
    holm,
    mean_over_seeds,
    paired_values,
)
from fastkd.study.plan import BASELINE, NO_DISTILLATION, Level, Plan, shown
from fastkd.study.store import Record

# how many of a search's candidates are shown
BEST = 10
_SIGN: dict[Test, str] = {"paired t-test": "t", "Wilcoxon signed-rank": "W"}


@dataclass(frozen=True)
class Table:
    """A table for people, and the same with all its numbers for programs."""

    name: str
    """File name of its CSV, without the ending."""
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numbers: list[dict[str, Any]]
    notes: tuple[str, ...] = ()
    brief: tuple[int, ...] = ()
    """The columns that a terminal has room for; none where the table is not for one."""


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
        self.full = plan.spec.search is None and plan.spec.grid in (None, "full")
        self.reference = self._scores(
            [r for r in records if r.run.condition.name == NO_DISTILLATION], NO_DISTILLATION, ()
        )

    def levels(self, axis: str) -> list[str]:
        """The levels of an axis, in the order of the study file."""
        return [str(level) for level in self.plan.axes[axis]]

    def axis(self, axis: str) -> list[Row]:
        """One row a level of an axis of a grid.

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


def make_tables(results: Results, importances: Mapping[str, Mapping[str, float]]) -> list[Table]:
    """The tables of a study.

    Args:
        results: its runs.
        importances: of a search's axes and spaces, by evaluator; empty for a grid.
    """
    tables = []
    if results.plan.spec.search is None:
        for axis in results.plan.axes:
            base = str(results.plan.baseline_levels[axis])
            notes = (_axis_note(results, axis), *_test_notes(results))
            tables.append(
                _table(
                    results, f"axis-{axis}", f"axis: {axis}", axis, results.axis(axis), base, notes
                )
            )
    notes = _test_notes(results)
    if results.plan.spec.search is not None:
        notes = (
            f"The best {BEST} candidates are chosen by the numbers that are shown, so these are "
            "optimistic, and p takes no account of the choice; run the best again with other seeds "
            "before you rely on it.",
            *notes,
        )
    tables.append(
        _table(
            results,
            "conditions",
            "conditions",
            "condition",
            results.conditions(),
            results.baseline,
            notes,
        )
    )
    if importances:
        tables.append(_importance_table(importances))
    tables.append(_run_table(results))
    return tables


def _axis_note(results: Results, axis: str) -> str:
    others = [name for name in results.plan.axes if name != axis]
    if not others:
        return "Means and standard deviations are over seeds; with several tasks, of their average."
    how = (
        f"averaged over {', '.join(others)}"
        if results.full
        else "with " + ", ".join(f"{n}={results.plan.baseline_levels[n]}" for n in others)
    )
    return f"Means and standard deviations over seeds, {how}."


def _test_notes(results: Results) -> tuple[str, ...]:
    metric = results.plan.spec.metric
    several = len(results.plan.tasks) > 1
    better = "higher" if metric.direction == "maximize" else "lower"
    pairs = "task and seed" if several else "seed"
    note = (
        f"{metric.path}, {better} is better. Differences are paired by {pairs}, with the 95 % "
        "interval of their mean by the t distribution and a two-sided p, corrected by Holm's "
        "procedure over the rows of the table: p of the paired t-test (t)"
    )
    if several:
        note += (
            ", or of Wilcoxon's signed-rank test (W) where there are enough pairs for it to give a "
            "corrected p below 0.05 at all"
        )
    note += ". The CSV has both tests and the uncorrected values."
    if several:
        note += " p speaks for these tasks, not for tasks in general."
    return (note,)


def _table(
    results: Results,
    name: str,
    title: str,
    first: str,
    rows: Sequence[Row],
    baseline: str,
    notes: tuple[str, ...],
) -> Table:
    tasks = [task for task in results.plan.tasks if task is not None]
    against = [n for n in (NO_DISTILLATION, BASELINE) if any(n in row.differences for row in rows)]
    columns = [
        first,
        *(tasks if len(tasks) > 1 else ()),
        "all" if len(tasks) > 1 else "mean",
        "seeds",
    ]
    for other in against:
        columns += [f"less {other.replace('_', ' ')}", "p"]
    # what a terminal shows: the condition, its mean, seeds, differences
    brief = [0, *range(len(columns) - 2 - 2 * len(against), len(columns))]
    if results.plan.spec.search is not None:
        # what was searched needs the room of p
        brief = [index for index in brief if columns[index] != "p"]
    cells_of, numbers = [], []
    for row in rows:
        overall = mean_over_seeds(row.scores)
        by_task = {t: mean_over_seeds([s for s in row.scores if s.task == t]) for t in tasks}
        cells = [_label(row, baseline, results)]
        cells += [str(mean) for mean in by_task.values()] if len(tasks) > 1 else []
        cells += [str(overall), str(overall.seeds)]
        for other in against:
            cells += _difference_cells(row, other)
        if row.runs[0] < row.runs[1]:
            cells[0] += f" ({row.runs[0]} of {row.runs[1]} runs)"
        cells_of.append(tuple(cells))
        numbers.append(_numbers(first, row, overall, by_task))
    return Table(name, title, tuple(columns), cells_of, numbers, notes, tuple(brief))


def _label(row: Row, baseline: str, results: Results) -> str:
    if row.levels and results.plan.spec.search is not None:
        return " ".join([row.level, *(f"{n}={_rounded(v)}" for n, v in row.levels.items())])
    return row.level + (" (baseline)" if row.level == baseline != BASELINE else "")


def _rounded(level: Level) -> str:
    return f"{level:.3g}" if isinstance(level, float) else shown(level)


def _difference_cells(row: Row, other: str) -> list[str]:
    found = row.differences.get(other)
    if found is None:
        return ["", ""]
    if found.mean is None or found.low is None or found.high is None:
        return [f"{found.pairs} pair" + ("" if found.pairs == 1 else "s"), ""]
    p = row.corrected[other]
    interval = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
    return [interval, "" if p is None else f"{p:.2g} ({_SIGN[found.test]}, n={found.pairs})"]


def _numbers(first: str, row: Row, overall: Mean, by_task: Mapping[str, Mean]) -> dict[str, Any]:
    found: dict[str, Any] = {first: row.level, **row.levels}
    found |= {"runs": row.runs[0], "planned": row.runs[1]}
    for name, mean in {"all": overall, **by_task}.items():
        found[f"{name} seeds"], found[f"{name} mean"] = mean.seeds, mean.mean
        found[f"{name} deviation"] = mean.deviation
    for other in (NO_DISTILLATION, BASELINE):
        difference = row.differences.get(other)
        if difference is not None:
            found |= {
                f"{other} pairs": difference.pairs,
                f"{other} difference": difference.mean,
                f"{other} low": difference.low,
                f"{other} high": difference.high,
                f"{other} t p": difference.t_p,
                f"{other} wilcoxon p": difference.wilcoxon_p,
                f"{other} test": difference.test,
                f"{other} p corrected": row.corrected[other],
            }
    return found


def _importance_table(importances: Mapping[str, Mapping[str, float]]) -> Table:
    names = sorted(
        {name for values in importances.values() for name in values},
        key=lambda name: -statistics.fmean(v.get(name, 0.0) for v in importances.values()),
    )
    rows = [
        (name, *(f"{values.get(name, 0.0):.3f}" for values in importances.values()))
        for name in names
    ]
    numbers = [
        {"searched": name, **{e: values.get(name) for e, values in importances.items()}}
        for name in names
    ]
    note = (
        "How much of the metric's variance each searched value explains (fANOVA), and how much it "
        "decides who is among the best tenth (PED-ANOVA); each column adds up to 1."
    )
    return Table(
        "importance",
        "importance",
        ("searched", *importances),
        rows,
        numbers,
        (note,),
        tuple(range(len(importances) + 1)),
    )


def _run_table(results: Results) -> Table:
    """Every run; people see those that are not finished."""
    numbers = [
        {
            **dict.fromkeys((*results.plan.axes, *results.plan.spec.spaces), None),
            **record.run.condition.levels,
            "condition": record.run.condition.name,
            "task": record.run.task,
            "seed": record.run.seed,
            "state": record.state,
            "value": record.value,
            "seconds": record.seconds,
            "message": record.message,
            "folder": str(results.plan.place(record.run).folder),
        }
        for record in results.records
    ]
    rows: list[tuple[str, ...]] = [
        (record.run.key, record.state, record.message)
        for record in results.records
        if record.state != "finished"
    ]
    title = "runs that are not finished" if rows else "all runs are finished"
    return Table("runs", title, ("run", "state", "message"), rows, numbers, (), (0, 1, 2))
