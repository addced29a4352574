"""The tables of a study: one an axis, one of all conditions, and what a search found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastkd.study.naming import Level, shown
from fastkd.study.plan import BASELINE, NO_DISTILLATION
from fastkd.study.results import BEST, Results, Row
from fastkd.study.statistics import (
    Mean,
    Test,
    decimals,
    mean_over_seeds,
    of_all_tasks,
)

Tasks = Sequence[str | None]
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


def make_tables(results: Results, importances: Mapping[str, Mapping[str, float]]) -> list[Table]:
    """The tables of a study.

    Args:
        results: its runs.
        importances: of a search's axes and spaces, by evaluator; empty for a grid.
    """
    tables = []
    tasks = results.plan.tasks
    if results.plan.spec.search is None:
        for axis in results.plan.axes:
            base = str(results.plan.baseline_levels[axis])
            # differences of tasks have scales of their own, and one task's may say what all don't
            for task in (None, *tasks) if len(tasks) > 1 else (None,):
                alone = tasks if task is None else (task,)
                of_task = "" if task is None else f"-{task}"
                tables.append(
                    _table(
                        results,
                        f"axis-{axis}{of_task}",
                        f"axis: {axis}" + (f", {task} alone" if task else ""),
                        axis,
                        results.axis(axis, task),
                        base,
                        (_axis_note(results, axis, alone), *_test_notes(results, alone)),
                        alone,
                    )
                )
    notes = _test_notes(results, tasks)
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
            tasks,
        )
    )
    if importances:
        tables.append(_importance_table(importances))
    tables.append(_run_table(results))
    return tables


def _axis_note(results: Results, axis: str, tasks: Tasks) -> str:
    others = [name for name in results.plan.axes if name != axis]
    if not others:
        average = ", of the average of the tasks" if len(tasks) > 1 else ""
        return f"Means and standard deviations are over seeds{average}."
    how = (
        f"averaged over {', '.join(others)}"
        if results.full
        else "with " + ", ".join(f"{n}={results.plan.baseline_levels[n]}" for n in others)
    )
    return f"Means and standard deviations over seeds, {how}."


def _test_notes(results: Results, tasks: Tasks) -> tuple[str, ...]:
    metric = results.plan.spec.metric
    several = len(tasks) > 1
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
    tasks: Tasks,
) -> Table:
    named = [task for task in tasks if task is not None]
    against = [n for n in (NO_DISTILLATION, BASELINE) if any(n in row.differences for row in rows)]
    columns = [
        first,
        *(named if len(named) > 1 else ()),
        "all" if len(named) > 1 else "mean",
        "seeds",
    ]
    columns += ["of the teacher"] if results.teacher else []
    for other in against:
        columns += [f"less {other.replace('_', ' ')}", "p"]
    # what a terminal shows: the condition, its mean, seeds, differences
    last = 2 + bool(results.teacher) + 2 * len(against)
    brief = [0, *range(len(columns) - last, len(columns))]
    if results.plan.spec.search is not None:
        # what was searched needs the room of p
        brief = [index for index in brief if columns[index] != "p"]
    if len(tasks) < len(results.plan.tasks):
        brief = []
    cells_of, numbers = [], []
    for row in rows:
        overall = mean_over_seeds(of_all_tasks(row.scores, tasks))
        by_task = {t: mean_over_seeds([s for s in row.scores if s.task == t]) for t in named}
        cells = [_label(row, baseline, results)]
        cells += [str(mean) for mean in by_task.values()] if len(named) > 1 else []
        cells += [str(overall), str(overall.seeds)]
        kept = results.kept(row, tasks)
        cells += ["" if kept is None else f"{kept:.1%}"] if results.teacher else []
        for other in against:
            cells += _difference_cells(row, other)
        if row.runs[0] < row.runs[1]:
            cells[0] += f" ({row.runs[0]} of {row.runs[1]} runs)"
        cells_of.append(tuple(cells))
        numbers.append(_numbers(first, row, overall, by_task) | {"kept": kept})
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
    places = decimals((found.high - found.low) / 2)
    form = "+.4g" if places is None else f"+.{places}f"
    interval = f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"
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
