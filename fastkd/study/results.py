"""The runs of a study by condition: their scores, and what these are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from fastkd.data.tasks.retention import Evidence, Number
from fastkd.study.naming import Level
from fastkd.study.plan import Asked, Plan
from fastkd.study.predictions import Predictions
from fastkd.study.statistics import (
    Estimate,
    Mean,
    Sample,
    Score,
    estimate,
    holm,
    improvement,
    mean_over_seeds,
    paired_samples,
    sampled,
)
from fastkd.study.storage import Record

# how many of a search's candidates are shown
BEST = 10
Tasks = Sequence[str | None]


@dataclass
class Row:
    """A level of an axis, a condition or a control, with what it is compared with."""

    level: str
    scores: list[Score]
    runs: tuple[int, int]
    """Runs finished, and all of them."""
    levels: Mapping[str, Level] = field(default_factory=dict)
    """Level of each axis, where a row is one condition."""
    is_control: bool = False
    kept: Estimate | None = None
    """Share of the teacher that is kept once chance is taken out."""
    difference: Estimate | None = None
    """To the baseline: of one task in its score, of several in that share where it is known and the
    rows that are compared have the same teachers."""
    records: Sequence[Record] = ()
    """The runs that its scores are of, once they are finished: not those of combinations of other
    axes that some level has not finished."""
    teachers: frozenset[tuple[str | None, str]] = frozenset()
    """Teachers of its runs, once it is compared: task, and which one it is."""

    @property
    def is_whole(self) -> bool:
        """Whether all of its runs are finished."""
        return self.runs[0] == self.runs[1]


@dataclass(frozen=True)
class Answer:
    """A hypothesis and what the runs say of it."""

    asked: Asked
    difference: Estimate | None
    """`None` while there are fewer than two seeds."""
    improvement: float | None
    """How often a run of the one is better than one of the other."""
    p: float | None
    """`None` while runs of either are open: who looks on the way finds more than there is."""
    corrected: float | None = None
    """By Holm's procedure over all hypotheses."""


class Others(NamedTuple):
    """The other axes, beside the levels of some."""

    names: list[str]
    shared: set[tuple[str, ...]]
    """Combinations of their levels that stand beside each; the baseline's in a grid that is not
    full."""
    found: set[tuple[str, ...]]
    """All that stand beside any."""
    finished: set[tuple[str, ...]]
    """What is averaged over: of those that are planned what is finished, of some seed, at every
    level and on every task of which anything is. Of different ones averages could not be
    compared."""

    @property
    def planned(self) -> set[tuple[str, ...]]:
        """What is averaged over once all runs are finished."""
        return self.shared or self.found

    @property
    def is_whole(self) -> bool:
        """Whether no combination is left out."""
        return self.finished == self.planned


class Results:
    """The finished runs of a study, by condition."""

    def __init__(self, plan: Plan, records: Sequence[Record]) -> None:
        self.plan = plan
        self.records = records
        self.baseline = plan.baseline.name
        self.full = plan.spec.search is None and plan.spec.grid in (None, "full")

    @cached_property
    def evidence(self) -> dict[str, Evidence]:
        """What every finished run left, by its key."""
        read = Predictions(self.plan)
        return {r.run.key: read.of(r.run, r.value) for r in self.records if r.value is not None}

    @cached_property
    def comparable(self) -> tuple[str | None, ...]:
        """Tasks whose teacher knows more than one answer to everything: of these shares of it mean
        something."""
        lacking = {r.run.task for r in self.records if not self._has_share(r)}
        return tuple(task for task in self.plan.tasks if task not in lacking)

    def controls(self, task: str | None = None) -> list[Row]:
        """One row a control, in the order of the study file, of all tasks or of one."""
        rows = []
        for name in self.plan.spec.controls:
            records = [
                r
                for r in self.records
                if r.run.condition.name == name and task in (None, r.run.task)
            ]
            rows.append(self._row(name, records, is_control=True))
        return rows

    def levels(self, axis: str) -> list[str]:
        """The levels of an axis, in the order of the study file."""
        return [str(level) for level in self.plan.axes[axis]]

    def others(self, *axes: str, task: str | None = None) -> Others:
        """What stands beside the levels of some axes of a grid, on all tasks or on one."""
        names = [name for name in self.plan.axes if name not in axes]
        if not self.full:
            base = {tuple(str(self.plan.baseline_levels[name]) for name in names)}
            return Others(names, base, base, base)
        beside: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for condition in self.plan.conditions:
            if condition.levels:
                beside.setdefault(condition.at(axes), set()).add(condition.at(names))
        shared, found = set.intersection(*beside.values()), set.union(*beside.values())
        finished: dict[object, set[tuple[str, ...]]] = {}
        for record in self.records:
            condition = record.run.condition
            if record.value is not None and condition.levels and task in (None, record.run.task):
                place = condition.at(axes), record.run.task
                finished.setdefault(place, set()).add(condition.at(names))
        # where levels share nothing by plan, each has an average of its own
        by_level = finished.values() if shared else ()
        return Others(names, shared, found, (shared or found).intersection(*by_level))

    def axis(self, axis: str, task: str | None = None) -> list[Row]:
        """The controls, and one row a level of an axis of a grid, of all tasks or of one.

        Other axes are averaged over in a full grid, where some combinations are skipped, failed or
        are open over those that every level has; in other grids they stand at the baseline.
        """
        return self._axis(axis, task, self.others(axis, task=task))

    def _axis(self, axis: str, task: str | None, others: Others) -> list[Row]:
        rows = self.controls(task)
        for level in self.levels(axis):
            records = [
                r
                for r in self.records
                if str(r.run.condition.levels.get(axis)) == level
                and task in (None, r.run.task)
                and r.run.condition.at(others.names) in others.planned
            ]
            rows.append(self._row(level, records, others))
        self._compare(rows, str(self.plan.baseline_levels[axis]), task)
        return rows

    def _asked_rows(self, axis: str) -> list[Row]:
        """Those of `axis` for pairs: what two have finished is compared, whatever a third has."""
        others = self.others(axis)
        return self._axis(axis, None, others._replace(finished=others.planned))

    def conditions(self) -> list[Row]:
        """One row a condition; a search's candidates best first."""
        rows = self._all_conditions()
        if self.plan.spec.search is not None:
            rows = self._ranked(rows)
        self._compare(rows, self.baseline)
        return rows

    def candidates(self) -> list[Row]:
        """One row a candidate of a search, in the order they were drawn."""
        return [row for row in self._all_conditions() if row.levels]

    def cells(self, one: str, two: str, task: str | None) -> dict[tuple[str, ...], list[Score]]:
        """The runs of a task by the levels of two axes of a full grid, averaged as in `axis`."""
        others = self.others(one, two, task=task)
        found: dict[tuple[str, ...], list[Record]] = {}
        for record in self.records:
            condition = record.run.condition
            if not condition.levels or record.run.task != task:
                continue
            if condition.at(others.names) in others.finished:
                found.setdefault(condition.at((one, two)), []).append(record)
        return {key: self._scores(records, "", others.names) for key, records in found.items()}

    def floor(self, task: str | None) -> Mean:
        """What one answer to everything scores on a task, over the runs."""
        by_seed = {}
        for record in self.records:
            if record.run.task == task and record.value is not None:
                floor = self.evidence[record.run.key].floor
                if floor is not None:
                    by_seed[record.run.seed] = floor.value
        return mean_over_seeds(Score("", (), task, seed, v) for seed, v in by_seed.items())

    def teacher(self, rows: Iterable[Row], task: str | None) -> Mean:
        """What the teachers of some rows score on a task, over the runs."""
        wanted = {teacher for row in rows for teacher in row.teachers}
        cells = {}
        for record in self.records:
            if record.run.task == task and record.value is not None:
                teacher = self.evidence[record.run.key].teacher
                which = self._teachers[record.run.condition.name, task]
                if teacher is not None and (task, which) in wanted:
                    cells[record.run.seed, which] = teacher.value
        return mean_over_seeds(
            Score("", (which,), task, seed, value) for (seed, which), value in cells.items()
        )

    def answers(self) -> list[Answer]:
        """What the runs say of the study's hypotheses, p corrected over all of them."""
        rows = {axis: self._asked_rows(axis) for axis in {a.axis for a in self.plan.asked}}
        found = []
        for asked in self.plan.asked:
            one, other = (
                next(r for r in rows[asked.axis] if (r.level, r.is_control) == place)
                for place in ((asked.level, False), (asked.against, asked.is_control))
            )
            pairs = self._pairs(one, other, None, own=differ(rows[asked.axis]))
            made = estimate([ours - theirs for ours, theirs in pairs])
            better, p = None, None
            if made is not None:
                better = improvement(
                    [ours for ours, _ in pairs],
                    [theirs for _, theirs in pairs],
                    self.plan.spec.metric.direction,
                )
                if one.is_whole and other.is_whole:
                    p = made.p_equivalence(asked.margin) if asked.margin else made.p_difference
            found.append(Answer(asked, made, better, p))
        corrected = holm([answer.p for answer in found])
        return [replace(a, corrected=p) for a, p in zip(found, corrected, strict=True)]

    def is_own(self, axis: str) -> bool:
        """Whether hypotheses of an axis are of scores over several tasks, because its rows have
        teachers of their own."""
        several = len(self.plan.tasks) > 1 and bool(self.comparable)
        return several and differ(self._asked_rows(axis))

    def best(self) -> tuple[str, Mean] | None:
        """The condition that leads, of those that are finished."""
        rows = self._ordered(self._all_conditions())
        return (rows[0].level, mean_over_seeds(rows[0].scores)) if rows else None

    @cached_property
    def _teachers(self) -> dict[tuple[str, str | None], str]:
        """Which teacher a condition, by its name, has on a task: another one where the recipe says
        so, and where one scores otherwise with some seed."""
        by_condition: dict[tuple[str, str | None], dict[int, Number]] = {}
        said = {}
        for record in self.records:
            place = record.run.condition.name, record.run.task
            said[place] = str(self.plan.teacher(record.run.condition, record.run.task))
            scores = by_condition.setdefault(place, {})
            if record.value is not None:
                teacher = self.evidence[record.run.key].teacher
                if teacher is not None:
                    scores[record.run.seed] = teacher
        found: dict[tuple[str, str | None], str] = {}
        known: dict[tuple[str | None, str], list[dict[int, Number]]] = {}
        for place, scores in by_condition.items():
            alike = known.setdefault((place[1], said[place]), [])
            number = next((n for n, one in enumerate(alike) if _agree(one, scores)), len(alike))
            if number == len(alike):
                alike.append({})
            alike[number] |= scores
            found[place] = f"{said[place]} {number}"
        return found

    def _all_conditions(self) -> list[Row]:
        groups: dict[str, list[Record]] = {}
        for record in self.records:
            groups.setdefault(record.run.condition.name, []).append(record)
        rows = []
        for name, records in groups.items():
            row = self._row(name, records, is_control=name in self.plan.spec.controls)
            row.levels = records[0].run.condition.levels
            rows.append(row)
        return rows

    def _ranked(self, rows: list[Row]) -> list[Row]:
        fixed = [row for row in rows if not row.levels]
        return fixed + self._ordered([row for row in rows if row.levels])[:BEST]

    def _ordered(self, rows: list[Row]) -> list[Row]:
        """Best first; rows that are not finished are left out."""
        sign = -1 if self.plan.spec.metric.direction == "maximize" else 1
        whole = [row for row in rows if row.is_whole]
        known = [(mean_over_seeds(row.scores).mean, row) for row in whole]
        found = [(sign * mean, row) for mean, row in known if mean is not None]
        return [row for _, row in sorted(found, key=lambda item: item[0])]

    def _row(
        self,
        level: str,
        records: Sequence[Record],
        others: Others | None = None,
        *,
        is_control: bool = False,
    ) -> Row:
        names = [] if others is None else others.names
        finished = sum(record.value is not None for record in records), len(records)
        if others is not None:
            records = [r for r in records if r.run.condition.at(names) in others.finished]
        scores = self._scores(records, level, names)
        return Row(level, scores, finished, records=records, is_control=is_control)

    def _scores(self, records: Sequence[Record], level: str, names: Sequence[str]) -> list[Score]:
        return [
            Score(
                level,
                r.run.condition.at(names),
                r.run.task,
                r.run.seed,
                r.value,
                r.run.key,
            )
            for r in records
            if r.value is not None
        ]

    def _compare(self, rows: list[Row], baseline: str, task: str | None = None) -> None:
        """Fill in what all rows keep of the teacher, and their differences to the baseline."""
        base = next((row for row in rows if row.level == baseline and not row.is_control), None)
        tasks = self.comparable if task is None else (task,)
        for row in rows:
            runs = [record.run for record in row.records]
            row.teachers = frozenset(
                (r.task, self._teachers[r.condition.name, r.task]) for r in runs
            )
        own = differ(rows)
        for row in rows:
            if tasks and set(tasks) <= set(self.comparable):
                row.kept = estimate(sampled(self._shares(row.scores), tasks))
            if base is not None and row is not base:
                pairs = self._pairs(row, base, task, own=own)
                row.difference = estimate([ours - theirs for ours, theirs in pairs])

    def _pairs(
        self, row: Row, other: Row, task: str | None, *, own: bool
    ) -> list[tuple[Sample, Sample]]:
        """Both rows' numbers of every task that is compared, as `Row.difference` has them; of
        scores where rows have teachers of their `own`."""
        several = task is None and len(self.plan.tasks) > 1
        shared = several and bool(self.comparable) and not own
        made = self._shares if shared else self._drawn
        tasks = self.plan.tasks if task is None else (task,)
        tasks = self.comparable if shared else tasks
        # a control has no levels that could match
        apart = row.is_control or other.is_control
        return paired_samples(made(row.scores), made(other.scores), tasks, match_others=not apart)

    def _drawn(self, scores: Iterable[Score]) -> list[Score]:
        """Scores, with those of resampled examples."""
        return [replace(s, drawn=self.evidence[s.run].student.drawn) for s in scores]

    def _shares(self, scores: Iterable[Score]) -> list[Score]:
        """Shares of the teacher in place of scores, where they are known."""
        found = []
        for score in scores:
            kept = self.evidence[score.run].kept
            if kept is not None:
                found.append(replace(score, value=kept.value, drawn=kept.drawn))
        return found

    def _has_share(self, record: Record) -> bool:
        return record.value is None or self.evidence[record.run.key].kept is not None


def _agree(one: Mapping[int, Number], other: Mapping[int, Number]) -> bool:
    """Whether two teachers score alike with every seed that both have."""
    both = [(one[seed], other[seed]) for seed in one.keys() & other.keys()]
    return not any(a.is_above(b) or b.is_above(a) for a, b in both)


def differ(rows: Sequence[Row]) -> bool:
    """Whether rows have different teachers: a share of one is no share of the other."""
    return len({row.teachers for row in rows if row.teachers}) > 1
