"""The runs of a study by condition: their scores, and what these are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from fastkd.data.tasks.retention import Evidence, Number
from fastkd.study.comparing import Answer, Comparison, Row, differ
from fastkd.study.plan import Plan, Run
from fastkd.study.predictions import Predictions
from fastkd.study.statistics import Mean, Score, mean_over_seeds
from fastkd.study.storage import Record

# how many of a search's candidates are shown
BEST = 10
Tasks = Sequence[str | None]


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
            records = [r for r in self._of(task) if r.run.condition.name == name]
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
        for record in self._of(task):
            condition = record.run.condition
            if record.value is not None and condition.levels:
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
                for r in self._of(task)
                if str(r.run.condition.levels.get(axis)) == level
                and r.run.condition.at(others.names) in others.planned
            ]
            rows.append(self._row(level, records, others))
        self._comparison.fill_in(rows, str(self.plan.baseline_levels[axis]), task)
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
        self._comparison.fill_in(rows, self.baseline)
        return rows

    def candidates(self) -> list[Row]:
        """One row a candidate of a search, in the order they were drawn."""
        return [row for row in self._all_conditions() if row.levels]

    def cells(self, one: str, two: str, task: str | None) -> dict[tuple[str, ...], list[Score]]:
        """The runs of a task by the levels of two axes of a full grid, averaged as in `axis`."""
        others = self.others(one, two, task=task)
        found: dict[tuple[str, ...], list[Record]] = {}
        for record in self._of(task):
            condition = record.run.condition
            if condition.levels and condition.at(others.names) in others.finished:
                found.setdefault(condition.at((one, two)), []).append(record)
        return {key: self._scores(records, "", others.names) for key, records in found.items()}

    def floor(self, task: str | None) -> Mean:
        """What one answer to everything scores on a task, over the runs."""
        by_seed = {}
        for run, evidence in self._evidence_of(task):
            if evidence.floor is not None:
                by_seed[run.seed] = evidence.floor.value
        return mean_over_seeds(Score("", (), task, seed, v) for seed, v in by_seed.items())

    def teacher(self, rows: Iterable[Row], task: str | None) -> Mean:
        """What the teachers of some rows score on a task, over the runs."""
        wanted = {teacher for row in rows for teacher in row.teachers}
        cells = {}
        for run, evidence in self._evidence_of(task):
            which = self._teachers[run.condition.name, task]
            if evidence.teacher is not None and (task, which) in wanted:
                cells[run.seed, which] = evidence.teacher.value
        return mean_over_seeds(
            Score("", (which,), task, seed, value) for (seed, which), value in cells.items()
        )

    def answers(self) -> list[Answer]:
        """What the runs say of the study's hypotheses, p corrected over all of them."""
        axes = {asked.axis for asked in self.plan.asked}
        return self._comparison.answers({axis: self._asked_rows(axis) for axis in axes})

    def is_own(self, axis: str) -> bool:
        """Whether hypotheses of an axis are of scores over several tasks, because its rows have
        teachers of their own."""
        several = len(self.plan.tasks) > 1 and bool(self.comparable)
        return several and differ(self._asked_rows(axis))

    def best(self) -> tuple[str, Mean] | None:
        """The condition that leads, of those that are finished."""
        rows = self._ordered(self._all_conditions())
        return (rows[0].level, mean_over_seeds(rows[0].scores)) if rows else None

    def _of(self, task: str | None) -> Iterator[Record]:
        """Records of one task, or of all."""
        return (record for record in self.records if task in (None, record.run.task))

    def _evidence_of(self, task: str | None) -> Iterator[tuple[Run, Evidence]]:
        """The finished runs of one task, or of all, and what each left."""
        for record in self._of(task):
            if record.value is not None:
                yield record.run, self.evidence[record.run.key]

    @cached_property
    def _comparison(self) -> Comparison:
        return Comparison(self.plan, self.evidence, self.comparable, self._teachers)

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

    def _has_share(self, record: Record) -> bool:
        return record.value is None or self.evidence[record.run.key].kept is not None


def _agree(one: Mapping[int, Number], other: Mapping[int, Number]) -> bool:
    """Whether two teachers score alike with every seed that both have."""
    both = [(one[seed], other[seed]) for seed in one.keys() & other.keys()]
    return not any(a.is_above(b) or b.is_above(a) for a, b in both)
