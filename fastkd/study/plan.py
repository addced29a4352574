"""What a study runs: its conditions, the runs of each, and the recipe of every run."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.head_spec import TASK_HEAD
from fastkd.recipe import (
    AnyRecipe,
    Recipe,
    each_stage,
    parse_finetune_recipe,
    parse_recipe,
    read_tree,
    replace_value,
)
from fastkd.study.choosing import check_alike, check_choice, scores_selection
from fastkd.study.naming import Level, folder_name, same_level, shown
from fastkd.study.seeding import check_free, set_seeds
from fastkd.study.shared import Place, SharedRun, SharedSteps
from fastkd.study.spec import (
    BASELINE,
    MOST_RUNS,
    OUTPUT,
    SEED,
    SEEDS,
    Command,
    Hypothesis,
    StudySpec,
    load_study,
)
from fastkd.study.statistics import LEVEL, least_p

# of a summary, what lean runs have not
_NOT_LEAN = {"before", "worse", "speed"}


@dataclass(frozen=True)
class Condition:
    """What is compared: a combination of levels, and the overrides that make it."""

    name: str
    levels: Mapping[str, Level]
    """Level of each axis; none where a condition stands outside the axes."""
    sources: tuple[tuple[str, Mapping[str, Any]], ...]
    """Overrides by the axis that they come from."""

    def at(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Its levels of some axes, as they are called."""
        return tuple(str(self.levels[axis]) for axis in axes)


@dataclass(frozen=True)
class Asked:
    """A hypothesis, worked out."""

    axis: str
    level: str
    against: str
    """Another level of the axis, or a control."""
    is_control: bool
    """Whether the other one stands outside the axes."""
    margin: float | None
    """Below which they are taken to be alike; `None` asks whether they differ."""


@dataclass(frozen=True)
class Run:
    """One condition on one task with one seed."""

    condition: Condition
    task: str | None
    seed: int

    @property
    def key(self) -> str:
        """Name of the run, also its folder."""
        task = "" if self.task is None else f"{self.task}/"
        return f"{task}{folder_name(self.condition.name)}/seed-{self.seed}"


Chosen = Mapping[tuple[str, str | None], Mapping[str, Any]]
"""What is taken over from another study, by condition of an axis, or control, and task."""


class Plan:
    """A study file, worked out.

    Args:
        spec: the study.
        path: its file; recipes are named from its folder.
        chosen: from `read_chosen`.

    Raises:
        UserError: a recipe that can't be read, or any combination that is not a recipe.
    """

    def __init__(self, spec: StudySpec, path: Path, chosen: Chosen | None = None) -> None:
        self.spec = spec
        self.chosen = chosen or {}
        self.path = path
        self.output = Path(spec.output)
        self.tasks: tuple[str | None, ...] = tuple(spec.tasks) or (None,)
        self._read = cache(read_tree)
        self.steps = SharedSteps(spec, path)
        self._base = self._tree(spec.recipe)
        self.axes = self._axes()
        for takeover in spec.chosen:
            if takeover.axis not in self.axes:
                known = ", ".join(self.axes)
                raise UserError(
                    f"{path}: chosen.axis: no axis {takeover.axis!r}; expected one of {known}"
                )
        self.baseline_levels = self._baseline_levels()
        self.conditions = tuple(self._conditions())
        self.baseline = self._baseline()
        self.asked = tuple(self._asked(n, h) for n, h in enumerate(spec.hypotheses))
        self.shared = tuple(self.steps.runs())
        self._teachers: dict[tuple[str, str | None], str | None] = {}
        self.selects = True
        """Whether all runs are scored on examples that are kept to choose by."""
        self._check()

    def runs(self, condition: Condition) -> list[Run]:
        """The runs of a condition: every task with every seed."""
        return [Run(condition, task, seed) for task in self.tasks for seed in self.spec.seeds]

    def all_runs(self) -> list[Run]:
        """The runs of all conditions that are known beforehand, one seed after the other: what is
        done when a study is stopped compares them all."""
        seeds = {seed: place for place, seed in enumerate(self.spec.seeds)}
        runs = [run for condition in self.conditions for run in self.runs(condition)]
        return sorted(runs, key=lambda run: (seeds[run.seed], self.tasks.index(run.task)))

    def place(self, run: Run) -> Place:
        """Where a run works."""
        return Place(self.output / "runs" / run.key)

    def candidate(self, name: str, params: Mapping[str, Level]) -> Condition:
        """The condition of a search's trial."""
        return Condition(name, dict(params), self._sources(params))

    def recipe(self, run: Run) -> AnyRecipe:
        """The recipe of a run.

        Raises:
            UserError: naming the condition, if its overrides make no recipe.
        """
        return self._parse(self.spec.command, self._run_tree(run), self._place_name(run))

    def teacher(self, condition: Condition, task: str | None) -> str | None:
        """What says which teacher a condition has on a task; `None` where there is none."""
        key = condition.name, task
        if key not in self._teachers:
            self._teachers[key] = None
            # values of a candidate may not go together
            with suppress(UserError):
                recipe = self.recipe(Run(condition, task, self.spec.seeds[0]))
                self._teachers[key] = _teacher_of(recipe)
        return self._teachers[key]

    def shared_recipe(self, run: SharedRun) -> AnyRecipe:
        """The recipe of a shared step."""
        sources = self.steps.sources(run.step, run.task)
        where = f"{self.path}: {run.label}"
        tree = self._apply(self._tree(run.step.recipe), sources, run.task, run.seed, where)
        replace_value(tree, OUTPUT, str(run.place.run))
        if run.seed is not None:
            check_free(tree, where)
            replace_value(tree, SEED, run.seed)
        return self._parse(run.step.command, tree, where)

    def all_shared(self, borrowers: tuple[Path, ...] = ()) -> list[tuple[Plan, SharedRun]]:
        """The shared steps of this study and those that it borrows, each after what it needs, with
        the study that says what it is.

        Args:
            borrowers: files of the studies that borrow from this one.

        Raises:
            UserError: a study that can't be read, or that borrows from one that borrows from it.
        """
        path = self.path.resolve()
        if path in borrowers:
            raise UserError(
                f"{self.path}: borrowed: a study that it borrows from borrows from it; make the "
                "steps in one of them"
            )
        lent: dict[Place, tuple[Plan, SharedRun]] = {}
        for file in dict.fromkeys(self.spec.borrowed.values()):
            lender = Plan(load_study(self.path.parent / file), self.path.parent / file)
            lent |= {step.place: (p, step) for p, step in lender.all_shared((*borrowers, path))}
        wanted = set(self.steps.borrowed())
        for place, (_, step) in reversed(lent.items()):
            if place in wanted:
                wanted.update(step.needs)
        own = [(self, step) for step in self.shared]
        return [given for place, given in lent.items() if place in wanted] + own

    def digest(self, run: Run) -> str:
        """Digest of what the study file says about a run; where its folders lie is left out."""
        said: list[object] = [
            self.spec.command,
            self._base,
            self.spec.overrides,
            self._task(run.task),
            run.condition.sources,
            self._taken(run),
            self.spec.vary,
            run.seed,
        ]
        if not set(SEEDS) <= set(self.spec.vary):
            # what does not vary has it
            said.append(self.spec.seeds[0])
        return digest(said)

    def shared_digest(self, run: SharedRun) -> str:
        """Digest of what the study file says about a shared step."""
        sources = self.steps.sources(run.step, run.task)
        return digest([run.step.command, self._tree(run.step.recipe), sources, run.seed])

    def check_shared(self) -> None:
        """See that shared steps, borrowed ones too, are made as the study file says.

        One that was made before digests were kept is taken as it is.

        Raises:
            UserError: a step was made with another recipe.
        """
        for owner, step in self.all_shared():
            noted = step.place.digest
            if noted.is_file() and noted.read_text(encoding="utf-8") != owner.shared_digest(step):
                raise UserError(
                    f"{owner.path}: {step.label} was made with another recipe before; put that "
                    "back, or give the study another output"
                )

    def _tree(self, recipe: str | dict[str, Any]) -> dict[str, Any]:
        return self._read(self.path.parent / recipe) if isinstance(recipe, str) else recipe

    def _task(self, task: str | None) -> Mapping[str, Any]:
        return {} if task is None else self.spec.tasks[task]

    def _axes(self) -> dict[str, dict[Level, Mapping[str, Any]]]:
        axes: dict[str, dict[Level, Mapping[str, Any]]] = {
            name: {level: overrides for level, overrides in levels.items()}
            for name, levels in self.spec.axes.items()
        }
        if self.spec.search is None:
            for name, space in self.spec.spaces.items():
                axes[name] = {shown(value): {space.field: value} for value in space.grid()}
        return axes

    def _baseline_levels(self) -> dict[str, Level]:
        given = self.spec.baseline
        levels: dict[str, Level] = {}
        for axis, known in self.axes.items():
            level = given.get(axis, next(iter(known)))
            levels[axis] = self._named(axis, level, f"baseline.{axis}") if axis in given else level
        return levels | {axis: level for axis, level in given.items() if axis not in levels}

    def _named(self, axis: str, level: Level, where: str) -> Level:
        """What a level that the study file gives is called on its axis."""
        if axis in self.spec.axes:
            return level
        for value in self.spec.spaces[axis].grid():
            if same_level(value, level):
                return shown(value)
        raise UserError(
            f"{self.path}: {where}: no value {shown(level)}; expected one of "
            + ", ".join(map(str, self.axes[axis]))
        )

    def _conditions(self) -> Iterator[Condition]:
        """The conditions known beforehand: a grid's, or what a search is compared with."""
        for name, overrides in self.spec.controls.items():
            yield Condition(name, {}, ((name, overrides),))
        if self.spec.search is not None:
            yield Condition(BASELINE, {}, self._sources(self.baseline_levels))
            return
        skipped = [
            {
                axis: self._named(axis, level, f"skip.{index}.{axis}")
                for axis, level in levels.items()
            }
            for index, levels in enumerate(self.spec.skip)
        ]
        for levels in self._combinations():
            if any(skip.items() <= levels.items() for skip in skipped):
                continue
            name = ",".join(f"{axis}={level}" for axis, level in levels.items())
            yield Condition(name, levels, self._sources(levels))

    def _asked(self, index: int, hypothesis: Hypothesis) -> Asked:
        where = f"hypotheses.{index}"
        axis = hypothesis.axis
        if axis not in self.axes:
            known = ", ".join(self.axes)
            raise UserError(f"{self.path}: {where}: no axis {axis!r}; expected one of {known}")
        level = self._level(axis, hypothesis.level, f"{where}.level")
        against: Level = self.baseline_levels[axis]
        is_control = hypothesis.against in self.spec.controls
        if hypothesis.against is not None:
            given = hypothesis.against
            against = given if is_control else self._level(axis, given, f"{where}.against")
        if not is_control and same_level(level, against):
            raise UserError(
                f"{self.path}: {where} compares {shown(level)} with itself; give another against"
            )
        return Asked(axis, str(level), str(against), is_control, hypothesis.margin)

    def _level(self, axis: str, level: Level, where: str) -> Level:
        if axis in self.spec.axes and level not in self.axes[axis]:
            known = ", ".join(map(str, [*self.axes[axis], *self.spec.controls]))
            raise UserError(
                f"{self.path}: {where}: no condition {level!r}; expected one of {known}"
            )
        return self._named(axis, level, where)

    def _baseline(self) -> Condition:
        for condition in self.conditions:
            if condition.name == BASELINE or dict(condition.levels) == self.baseline_levels:
                return condition
        raise UserError(
            f"{self.path}: skip leaves out the baseline ({self.baseline_levels}); name another "
            "baseline"
        )

    def combinations(self) -> list[dict[str, Level]]:
        """Every combination of levels, the last axis fastest; with a search also of its spaces."""
        levels: dict[str, Sequence[Level]] = {
            axis: list(known) for axis, known in self.axes.items()
        }
        for name, space in self.spec.spaces.items():
            levels.setdefault(name, space.grid())
        count = math.prod(map(len, levels.values())) * len(self.tasks) * len(self.spec.seeds)
        if count > MOST_RUNS:
            raise UserError(
                f"{self.path}: all combinations are {count:,} runs, expected at most "
                f"{MOST_RUNS:,}; take a search with a number of trials, or fewer values"
            )
        return [
            dict(zip(levels, combination, strict=True))
            for combination in itertools.product(*levels.values())
        ]

    def _combinations(self) -> list[dict[str, Level]]:
        if self.spec.grid in (None, "full"):
            return self.combinations()
        found = [self.baseline_levels]
        for axis, known in self.axes.items():
            levels = list(known)
            chosen = levels if self.spec.grid == "one_axis_at_a_time" else [levels[0], levels[-1]]
            found += [{**self.baseline_levels, axis: level} for level in chosen]
        return list({tuple(levels.values()): levels for levels in found}.values())

    def _sources(self, levels: Mapping[str, Level]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        def overrides(axis: str, level: Level) -> Mapping[str, Any]:
            if axis in self.axes:
                return self.axes[axis][level]
            return {self.spec.spaces[axis].field: level}

        return tuple((axis, overrides(axis, level)) for axis, level in levels.items())

    def _place_name(self, run: Run) -> str:
        return f"{self.path}: {run.key}"

    def _run_tree(self, run: Run) -> dict[str, Any]:
        sources = [("overrides", self.spec.overrides), ("task", self._task(run.task))]
        sources += [("chosen", self._taken(run)), *run.condition.sources]
        if run.condition.levels:
            _check_apart(sources[1:], self._place_name(run))
        tree = self._apply(self._base, sources, run.task, run.seed, self._place_name(run))
        check_free(tree, self._place_name(run))
        set_seeds(tree, self._seeds(run))
        replace_value(tree, OUTPUT, str(self.place(run).run))
        if self.spec.keep == "scores" and self.spec.metric.path.split(".")[0] not in _NOT_LEAN:
            replace_value(tree, "run.lean", True)
        task = tree.get("task")
        if (
            self.spec.metric.is_of_examples
            and isinstance(task, dict)
            and task.get("kind", TASK_HEAD) == TASK_HEAD
        ):
            replace_value(tree, "run.predictions", True)
        return tree

    def _taken(self, run: Run) -> Mapping[str, Any]:
        """What a run takes over from another study."""
        if not self.spec.chosen:
            return {}
        levels = run.condition.levels
        if run.condition.name == BASELINE:
            # a search's stands outside the axes, and is held against what lies on them
            levels = self.baseline_levels
        name = str(levels[self.spec.chosen[0].axis]) if levels else run.condition.name
        return self.chosen.get((name, run.task), {})

    def _seeds(self, run: Run) -> dict[str, int]:
        """The run's seed for what the study varies, and the first one for the rest."""
        first, vary = self.spec.seeds[0], self.spec.vary
        return {what: run.seed if what in vary else first for what in SEEDS}

    def _apply(
        self,
        base: dict[str, Any],
        sources: Sequence[tuple[str, Mapping[str, Any]]],
        task: str | None,
        seed: int | None,
        where: str,
    ) -> dict[str, Any]:
        tree = copy.deepcopy(base)
        for source, overrides in sources:
            for key, value in overrides.items():
                try:
                    replace_value(
                        tree, key, self.steps.fill(value, task, seed, f"{where}: {source}")
                    )
                except UserError as error:
                    if str(error).startswith(where):
                        raise
                    raise UserError(f"{where}: {source}: {error}") from error
        return tree

    def _parse(self, command: Command, tree: Mapping[str, Any], where: str) -> AnyRecipe:
        return (parse_finetune_recipe if command == "finetune" else parse_recipe)(tree, where)

    def _check(self) -> None:
        """See that everything the study may run is a recipe, before anything is run."""
        keys: set[str] = set()
        for shared in self.shared:
            recipe = self.shared_recipe(shared)
            check_choice(recipe, f"{self.path}: {shared.label}", "scores are reported of")
        # seeds differ in nothing that could be wrong
        first = {t: Run(self.baseline, t, self.spec.seeds[0]) for t in self.tasks}
        against = {task: self.recipe(run) for task, run in first.items()}
        searched = self.spec.search is not None
        for condition in [*self.conditions, *self._corners()]:
            for task in self.tasks:
                run = Run(condition, task, self.spec.seeds[0])
                recipe, where = self.recipe(run), self._place_name(run)
                check_choice(recipe, where, "the study reports", search=searched)
                check_alike(recipe, against[task], where, first[task].key)
                self.selects &= scores_selection(recipe)
                self._teachers[condition.name, task] = _teacher_of(recipe)
                if run.key in keys:
                    raise UserError(f"{self.path}: two conditions share the name {condition.name}")
                keys.add(run.key)
        self._check_seeds()

    def _check_seeds(self) -> None:
        if len(self.spec.seeds) < 2 and not self.selects:
            raise UserError(
                f"{self.path}: seeds: expected at least 2, because one run is no result (given "
                f"{list(self.spec.seeds)}); one is enough where task.selection scores all runs"
            )
        seeds = len(self.spec.seeds)
        differences = sum(asked.margin is None for asked in self.asked)
        if (least := least_p(seeds, differences)) > LEVEL:
            wanted = next(n for n in itertools.count(seeds) if least_p(n, differences) <= LEVEL)
            raise UserError(
                f"{self.path}: hypotheses: the smallest corrected p that {seeds} seeds can give to "
                f"those that ask for a difference ({differences}) is {least:.2g}, so none could be "
                f"answered; give seeds: {wanted} or more, or leave hypotheses out: intervals stand "
                "without them"
            )

    def _corners(self) -> Iterator[Condition]:
        """Every level of a search's axes and both ends of its spaces, the rest at the baseline."""
        if self.spec.search is None:
            return
        ends: dict[str, list[Level]] = {axis: list(levels) for axis, levels in self.axes.items()}
        for name, space in self.spec.spaces.items():
            if name not in ends:
                bounds = (space.low or 0.0, space.high or 0.0)
                whole: list[Level] = [round(b) if space.integer else b for b in bounds]
                ends[name] = list(space.values) if space.values else whole
        for axis, levels in ends.items():
            for level in levels:
                yield self.candidate(f"{axis}={level}", {**self.baseline_levels, axis: level})


def _teacher_of(recipe: AnyRecipe) -> str | None:
    # the last stage's is what the student is scored beside
    last = each_stage(recipe)[-1]
    if not isinstance(last, Recipe):
        return None
    # what decides its answers; the rest is how it runs
    named = {"model", "revision", "others", "combine", "dtype"}
    said = [last.teacher.model_dump(mode="json", include=named)]
    if last.task is not None:
        # as it reads an example, and what its outputs are taken for
        read = {"columns", "max_length", "stride", "labels", "meanings", "bounds"}
        said.append(last.task.model_dump(mode="json", include=read))
    return json.dumps(said, sort_keys=True)


def digest(said: object) -> str:
    """sha256 of a value made of JSON's types and tuples."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _check_apart(sources: Sequence[tuple[str, Mapping[str, Any]]], where: str) -> None:
    """Refuse two sources that set the same key, or one inside a section that the other sets."""
    for (one, left), (two, right) in itertools.combinations(sources, 2):
        for a, b in itertools.product(left, right):
            if f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}."):
                raise UserError(
                    f"{where}: {one} sets {a} and {two} sets {b}; let only one of them do it, or "
                    "leave the combination out with skip"
                )
