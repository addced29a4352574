"""The tables of a study: one an axis, its hypotheses, all conditions, and what a search found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastkd.study.comparing import Answer, Row, differ
from fastkd.study.naming import Level, axis_table, shown
from fastkd.study.results import BEST, Results
from fastkd.study.spec import BASELINE, CONSTANT, TEACHER
from fastkd.study.statistics import (
    LEVEL,
    Estimate,
    Mean,
    decimals,
    mean_over_seeds,
    of_all_tasks,
)

Tasks = Sequence[str | None]
# conditions that a row of their teacher names
_NAMED = 4
# seeds of which intervals are as long as they say (`tests/test_study_coverage.py`)
_ENOUGH = 5


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
    tasks, search = results.plan.tasks, results.plan.spec.search
    if search is None:
        for axis in results.plan.axes:
            # differences of tasks have scales of their own, and one task's may say what all don't
            for task in (None, *tasks) if len(tasks) > 1 else (None,):
                tables.append(_axis_table(results, axis, task))
    if results.plan.asked:
        tables.append(_hypothesis_table(results))
    rows, baseline = results.conditions(), results.baseline
    notes = _notes(results, tasks, rows)
    if search is not None:
        notes = (
            f"The best {BEST} candidates are chosen by the numbers that are shown, so these are "
            "optimistic, and no interval takes account of the choice; run the best again with "
            "other seeds, on data that chose nothing, before you rely on it.",
            *notes,
        )
    name = "conditions"
    tables.append(_table(results, name, name, "condition", rows, baseline, notes, tasks))
    if importances:
        tables.append(_importance_table(importances))
    tables.append(_run_table(results))
    return tables


def _axis_table(results: Results, axis: str, task: str | None) -> Table:
    tasks = results.plan.tasks if task is None else (task,)
    rows = results.axis(axis, task)
    return _table(
        results,
        axis_table(axis, task),
        f"axis: {axis}" + ("" if task is None else f", {task} alone"),
        axis,
        rows,
        str(results.plan.baseline_levels[axis]),
        (
            _axis_note(results, axis, task),
            *_notes(results, tasks, rows),
            *_power_note(results, rows),
        ),
        tasks,
    )


def _power_note(results: Results, rows: Sequence[Row]) -> tuple[str, ...]:
    """How large a difference must be to be seen, and while seeds are open, with all of them."""
    found = [row.difference for row in rows if row.difference is not None]
    if not found:
        return ()
    now = statistics.median(one.detectable() for one in found)
    if not now:
        return (
            "Half of these rows or more differ from the baseline by the same with every seed, so "
            "nothing can be said of how large a difference would be seen.",
        )
    said = (
        "Four of five studies with as many seeds and examples would see a difference of "
        f"{now:.2g} (median of the rows)"
    )
    planned = len(results.plan.spec.seeds)
    if min(len(one.by_seed) for one in found) < planned:
        then = statistics.median(one.detectable(planned) for one in found)
        said += f"; with all {planned} seeds, if their spread stays, {then:.2g}"
    return (f"{said}.",)


def _axis_note(results: Results, axis: str, task: str | None) -> str:
    others = results.others(axis, task=task)
    if not others.names:
        return "Means and standard deviations are over seeds."
    if results.full:
        how = f"averaged over {', '.join(others.names)}"
        if not others.shared:
            how += ", differently for each level: these means are of different things"
        elif not others.finished:
            how += ", of which no combination is finished at every level, so there are none"
        elif not others.is_whole:
            some = f"{len(others.finished)} of {len(others.planned)}"
            how += f", of the {some} combinations that every level has finished"
        elif others.shared != others.found:
            how += ", of combinations that every level has"
    else:
        base = results.plan.baseline_levels
        how = "with " + ", ".join(f"{name}={base[name]}" for name in others.names)
    return f"Means and standard deviations over seeds, {how}."


def _notes(results: Results, tasks: Tasks, rows: Sequence[Row]) -> tuple[str, ...]:
    metric, several = results.plan.spec.metric, len(tasks) > 1
    better = "higher" if metric.direction == "maximize" else "lower"
    shares = any(task in results.comparable for task in tasks)
    own = shares and differ(rows)
    notes = [f"{metric.path}, {better} is better."]
    if shares:
        notes.append(
            "Of the teacher: (score - floor) / (teacher - floor), where the floor is the best one "
            "answer to everything" + (", averaged over the tasks." if several else ".")
        )
    if several and (own or not shares):
        notes.append("All is the average of the tasks.")
    if own:
        notes.append(
            "Teachers differ between these rows, so each share is one of its own teacher, and "
            "differences are in the score."
        )
    in_shares = " in that share" if shares and several and not own else ""
    notes.append(
        f"Differences{in_shares} are paired by seed. Brackets are 95 % intervals over seeds and, "
        "where predictions are kept, over evaluation examples. What is tested stands under "
        "hypotheses alone."
    )
    known = [one for row in rows for one in (row.kept, row.difference) if one is not None]
    if any(len(one.by_seed) < _ENOUGH for one in known):
        notes.append(
            "Intervals hold the truth in 95 of 100 from five seeds on; of three in about 92, of "
            "two in about 88."
        )
    left_out = [str(task) for task in tasks if task not in results.comparable]
    if shares and left_out:
        notes.append(
            f"{', '.join(left_out)}: the teacher is not above one answer to everything by two "
            "standard errors, so shares"
            f"{'' if own else ' and differences'} leave this out."
        )
    return (" ".join(notes),)


def _hypothesis_table(results: Results) -> Table:
    answers = results.answers()
    planned = len(results.plan.spec.seeds)
    rows: list[tuple[str, ...]] = [
        (
            f"{a.asked.axis}: {a.asked.level}",
            a.asked.against,
            "differ" if a.asked.margin is None else f"by less than {a.asked.margin:g}",
            _interval(a.difference),
            "" if a.improvement is None else f"{a.improvement:.0%}",
            "" if a.corrected is None else f"{a.corrected:.2g}",
            _verdict(a, planned),
        )
        for a in answers
    ]
    numbers = [
        {
            **vars(a.asked),
            **_estimate_numbers("difference ", a.difference),
            "improvement": a.improvement,
            "p": a.p,
            "p corrected": a.corrected,
        }
        for a in answers
    ]
    note = (
        "Written down before the study was run. p of a difference is the larger one of that of its "
        "interval and that of flipping signs with the seed as the unit; of a margin that of two "
        "one-sided tests. All are corrected together by Holm's procedure. Wins is how often a run "
        "of the one is better than one of the other."
    )
    notes = [note]
    if planned > 1 and any(answer.p is None for answer in answers):
        notes.append(
            f"Not yet: what is asked is tested once, with all {planned} seeds of both conditions "
            "and every run of these finished. Differences that stand here before say nothing of it."
        )
    if own := [axis for axis in {a.asked.axis: None for a in answers} if results.is_own(axis)]:
        notes.append(
            f"{', '.join(own)}: teachers differ between conditions, so differences and margins are "
            "in the score, not in shares of the teacher."
        )
    columns = ("condition", "against", "asked", "difference", "wins", "p", "answer")
    return Table("hypotheses", "hypotheses", columns, rows, numbers, tuple(notes), tuple(range(7)))


def _verdict(answer: Answer, planned: int) -> str:
    """What a hypothesis has come to, of so many seeds."""
    if answer.corrected is None:
        return "not yet" if planned > 1 else "too few seeds"
    return "yes" if answer.corrected <= LEVEL else "open"


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
    several, keeps = len(named) > 1, any(row.kept is not None for row in rows)
    # of scores of several kinds an average says less than one of shares
    averages = [] if several and keeps and not differ(rows) else ["all" if several else "mean"]
    summed = [*averages, *(["of the teacher"] if keeps else []), "seeds", "less baseline"]
    columns = [first, *(named if several else ()), *summed]
    brief = [0, *range(len(columns) - len(summed), len(columns))]
    if len(tasks) < len(results.plan.tasks):
        brief = []
    cells_of, numbers = _ends(results, rows, tasks, columns)
    for row in rows:
        overall = mean_over_seeds(of_all_tasks(row.scores, tasks))
        by_task = {t: mean_over_seeds([s for s in row.scores if s.task == t]) for t in named}
        cells = [_label(row, baseline, results)]
        cells += [str(mean) for mean in by_task.values()] if several else []
        cells += [str(overall)] if averages else []
        cells += [_interval(row.kept, share=True)] if keeps else []
        cells += [str(overall.seeds), _interval(row.difference)]
        if not row.is_whole:
            cells[0] += f" ({row.runs[0]} of {row.runs[1]} runs)"
        cells_of.append(tuple(cells))
        numbers.append(_numbers(first, row, overall, by_task))
    return Table(name, title, tuple(columns), cells_of, numbers, notes, tuple(brief))


def _ends(
    results: Results, rows: Sequence[Row], tasks: Tasks, columns: Sequence[str]
) -> tuple[list[tuple[str, ...]], list[dict[str, Any]]]:
    """Rows of what scores are read between, where it is known: one answer to everything, and the
    teacher, or the teachers of rows that have different ones."""
    by_teacher: dict[object, list[Row]] = {}
    for row in rows:
        if row.teachers:
            by_teacher.setdefault(row.teachers, []).append(row)
    found = [(CONSTANT, {task: results.floor(task) for task in tasks})]
    for group in by_teacher.values():
        name = TEACHER if len(by_teacher) == 1 else f"{TEACHER} of {_some(group)}"
        found.append((name, {task: results.teacher(group, task) for task in tasks}))
    cells_of, numbers = [], []
    levels = {row.level for row in rows}
    for name, means in found:
        if not any(mean.seeds for mean in means.values()):
            continue
        # a student may begin as its teacher, and its level be called so
        label = f"the {name}" if name in levels else name
        cells = [label, *map(_plain, means.values())]
        cells_of.append(tuple(cells + [""] * (len(columns) - len(cells))))
        keyed = {f"{task or 'all'} mean": mean.mean for task, mean in means.items()}
        numbers.append({columns[0]: label, **keyed})
    return cells_of, numbers


def _some(rows: Sequence[Row]) -> str:
    """The names of rows, of many the first ones."""
    names = [row.level for row in rows]
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _plain(mean: Mean) -> str:
    """A number that seeds change or don't."""
    return f"{mean.mean:.3f}" if mean.mean is not None and not mean.deviation else str(mean)


def _label(row: Row, baseline: str, results: Results) -> str:
    if row.is_control:
        return f"{row.level} (control)"
    if row.levels and results.plan.spec.search is not None:
        return " ".join([row.level, *(f"{n}={_rounded(v)}" for n, v in row.levels.items())])
    return row.level + (" (baseline)" if row.level == baseline != BASELINE else "")


def _rounded(level: Level) -> str:
    return f"{level:.3g}" if isinstance(level, float) else shown(level)


def _interval(found: Estimate | None, *, share: bool = False) -> str:
    """A difference or a share with its ends, to two digits of half of what is between them."""
    if found is None:
        return ""
    scale, unit, sign = (100.0, "%", "") if share else (1.0, "", "+")
    low, high = found.interval()
    places = decimals(scale * (high - low) / 2)
    # z: what rounds to 0 has no sign of its own
    form = f"{sign}z.4g" if places is None else f"{sign}z.{places}f"
    mean, least, most = (f"{scale * value:{form}}" for value in (found.mean, low, high))
    return f"{mean}{unit} [{least}, {most}]"


def _numbers(first: str, row: Row, overall: Mean, by_task: Mapping[str, Mean]) -> dict[str, Any]:
    found: dict[str, Any] = {first: row.level, **row.levels}
    found |= {"runs": row.runs[0], "planned": row.runs[1]}
    for name, mean in {"all": overall, **by_task}.items():
        found[f"{name} seeds"], found[f"{name} mean"] = mean.seeds, mean.mean
        found[f"{name} deviation"] = mean.deviation
    found |= _estimate_numbers("kept ", row.kept)
    return found | _estimate_numbers("difference ", row.difference)


def _estimate_numbers(prefix: str, found: Estimate | None) -> dict[str, Any]:
    if found is None:
        return {}
    low, high = found.interval()
    return {
        f"{prefix}mean": found.mean,
        f"{prefix}detectable": found.detectable(),
        f"{prefix}low": low,
        f"{prefix}high": high,
        f"{prefix}error": found.error,
        f"{prefix}freedom": found.freedom,
        f"{prefix}seeds": len(found.by_seed),
    }


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
    """Every run; people see those that are begun and not finished."""
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
    waiting = sum(record.state == "waiting" for record in results.records)
    rows: list[tuple[str, ...]] = [
        (record.run.key, record.state, record.message)
        for record in results.records
        if record.state not in ("finished", "waiting")
    ]
    title = "runs that are not finished" if rows or waiting else "all runs are finished"
    notes = (f"{waiting} runs have not begun.",) if waiting else ()
    return Table("runs", title, ("run", "state", "message"), rows, numbers, notes, (0, 1, 2))
