"""Rows of runs beside each other: shares of the teacher, differences, and answers to hypotheses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fastkd.data.tasks.retention import Evidence
from fastkd.study.naming import Level
from fastkd.study.plan import Asked, Plan
from fastkd.study.statistics import (
    Estimate,
    Sample,
    Score,
    estimate,
    holm,
    improvement,
    paired_samples,
    sampled,
)
from fastkd.study.storage import Record


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


@dataclass(frozen=True)
class Comparison:
    """What rows of a study's runs are compared by."""

    plan: Plan
    evidence: Mapping[str, Evidence]
    """What every finished run left, by its key."""
    comparable: tuple[str | None, ...]
    """Tasks of which shares of the teacher mean something."""
    teachers: Mapping[tuple[str, str | None], str]
    """Which teacher a condition, by its name, has on a task."""

    def fill_in(self, rows: list[Row], baseline: str, task: str | None = None) -> None:
        """Fill in what all rows keep of the teacher, and their differences to the baseline."""
        base = next((row for row in rows if row.level == baseline and not row.is_control), None)
        tasks = self.comparable if task is None else (task,)
        for row in rows:
            runs = [record.run for record in row.records]
            row.teachers = frozenset(
                (r.task, self.teachers[r.condition.name, r.task]) for r in runs
            )
        own = differ(rows)
        for row in rows:
            if tasks and set(tasks) <= set(self.comparable):
                row.kept = estimate(sampled(self._shares(row.scores), tasks))
            if base is not None and row is not base:
                pairs = self._pairs(row, base, task, own=own)
                row.difference = estimate([ours - theirs for ours, theirs in pairs])

    def answers(self, rows: Mapping[str, Sequence[Row]]) -> list[Answer]:
        """What the runs say of the study's hypotheses, of rows by axis; p corrected over all."""
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


def differ(rows: Sequence[Row]) -> bool:
    """Whether rows have different teachers: a share of one is no share of the other."""
    return len({row.teachers for row in rows if row.teachers}) > 1
