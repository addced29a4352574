"""A study: one YAML file that says which recipes are run and compared, read into frozen models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError, model_validator

from fastkd.errors import UserError
from fastkd.recipe import Section, complain, read_tree
from fastkd.section import Place, Seed
from fastkd.study.naming import axes_map, axis_table, is_candidate_name, shown

FileName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$", max_length=100)
]
Number = (
    Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | Annotated[float, Field(strict=True)]
)
Value = Annotated[str, Field(strict=True)] | Number
Overrides = dict[str, Any]
Conditions = Annotated[dict[FileName, Overrides], Field(min_length=2)]
Command = Literal["distill", "finetune"]
Levels = dict[str, Value]
Varied = Literal["weights", "order", "dropout", "maps"]

SEED = "train.seed"
SEEDS = {
    "weights": SEED,
    "order": "train.order_seed",
    "dropout": "train.dropout_seed",
    "maps": "layer_map.seed",
}
"""Where a recipe has the seed of what a study varies."""
OUTPUT = "run.output"
SCORE = "after.score"
"""Where a summary has the score of a task."""
SCORES = "after.scores."
"""Where it has those of its sets, by metric."""
BASELINE, CONSTANT, TEACHER = "baseline", "one answer", "teacher"
"""What rows of the report are called that stand beside conditions."""
_TAKEN = {BASELINE, CONSTANT, TEACHER}
# columns of the report's CSV files, which has one of each axis beside them
_COLUMNS = {
    *("condition", "task", "seed", "state", "value", "seconds", "message", "folder"),
    *("runs", "planned"),
}
# what has columns beside those of the tasks
_SUMS = {"all", "seeds", "kept", "difference"}
# more runs than a storage, or anyone's time, takes
MOST_SEEDS = 1000
MOST_RUNS = 100_000


def _count_to_seeds(value: object) -> object:
    if type(value) is int and value > MOST_SEEDS:
        raise ValueError(f"expected at most {MOST_SEEDS} (given {value})")
    seeds = list(range(value)) if type(value) is int else value
    if seeds == []:
        raise ValueError(f"expected at least 1 (given {value})")
    return seeds


def _one_to_some(value: object) -> object:
    return [value] if isinstance(value, Mapping) else value


Seeds = Annotated[
    tuple[Seed, ...],
    BeforeValidator(_count_to_seeds),
]


class Space(Section):
    """One field of the recipe and the values that it may take."""

    field: Annotated[str, Field(min_length=1)]
    """Dotted key, as in `losses.attention.weight`."""
    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value, itself included."""
    log: bool = False
    """Even in the logarithm."""
    integer: bool = False
    """Whole numbers only."""
    points: int | None = Field(default=None, ge=2, le=1000)
    """How many values a grid takes from `low` to `high`."""
    values: tuple[Value, ...] | None = Field(default=None, min_length=2)
    """The values themselves, in place of `low` and `high`."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        bounds = self.low is not None, self.high is not None
        if self.values is not None:
            if any(bounds) or self.points or self.log or self.integer:
                raise ValueError("give either values or low and high, not both")
            if len(set(self.values)) < len(self.values):
                raise ValueError(f"values holds a value twice (given {list(self.values)})")
            return self
        if self.low is None or self.high is None:
            raise ValueError("expected low and high, or values")
        if not self.low < self.high:
            raise ValueError(f"low is {self.low:g}, expected less than high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}, expected more than 0 where log is true")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("expected whole numbers for low and high where integer is true")
        return self

    def grid(self) -> tuple[str | int | float, ...]:
        """The values of a grid.

        Raises:
            UserError: neither `values` nor `points` is given.
        """
        if self.values is not None:
            return self.values
        assert self.low is not None and self.high is not None
        if self.points is None:
            raise UserError(f"{self.field}: a grid needs values, or points beside low and high")
        steps = [index / (self.points - 1) for index in range(self.points)]
        # neither the ratio nor the difference of the ends: both may be beyond a double
        if self.log:
            numbers = [self.low ** (1.0 - step) * self.high**step for step in steps]
        else:
            numbers = [self.low * (1.0 - step) + self.high * step for step in steps]
        # what a name shows is what is run
        shown = [min(max(float(f"{n:.6g}"), self.low), self.high) for n in numbers]
        return tuple(dict.fromkeys(round(n) if self.integer else n for n in shown))


class Metric(Section):
    """The number by which runs are compared."""

    path: Annotated[str, Field(min_length=1)]
    """Dotted path in a run's summary.json, as in `after.sentence_cosine`; of `after.score` of a
    task, and `after.scores.SET.METRIC`, the report has shares of the teacher."""
    direction: Literal["maximize", "minimize"]
    """Which way is better."""
    heldout: str | None = None
    """Dotted path of the same number in an evaluation, as in `sentence_cosine`, for a pruner."""

    @property
    def is_of_examples(self) -> bool:
        """Whether it is a task's score, or one metric of one of its sets: of resampled examples and
        of the teacher the same can be said."""
        return self.path == SCORE or self.path.startswith(SCORES)


class Search(Section):
    """A search in place of a grid."""

    sampler: Literal["tpe", "random", "cmaes", "grid"] = "tpe"
    """Optuna's samplers; `grid` tries every combination once."""
    trials: int | None = Field(default=None, ge=2)
    """Candidates in all; each is run on every task with every seed. None with `grid`."""
    pruner: Literal["none", "median"] = "none"
    """Stop a candidate whose best held-out value so far is below the median of the others at the
    same step of the same task and seed."""
    startup_trials: int = Field(default=5, ge=1)
    """Finished candidates before the pruner starts."""
    seed: Seed = 0
    """Seed of the sampler."""

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if (self.sampler == "grid") == (self.trials is not None):
            raise ValueError("give trials with tpe, random and cmaes, and none with grid")
        return self


class Step(Section):
    """A run that the others build on, done once: a fine-tuned teacher, a general student."""

    command: Command
    """`distill` or `finetune`."""
    recipe: Place | dict[str, Any]
    """Path of the recipe, from the study file's folder, or the recipe itself."""
    overrides: Overrides = Field(default_factory=dict)
    """Dotted keys and values that replace the recipe's."""
    per_task: bool = False
    """One a task, with the task's overrides in force; a fine-tuning run, which has no student,
    takes those of the section `task` alone."""
    per_seed: bool = False
    """One a seed of the study, as `train.seed`: what it makes is then drawn as the runs are."""
    tasks: dict[FileName, Overrides] = Field(default_factory=dict)
    """Further overrides of the step on some of the tasks."""


class Hypothesis(Section):
    """What a study asks of two conditions, written down before it is run."""

    axis: Annotated[str, Field(min_length=1)]
    """On which the conditions lie; other axes are as in its table."""
    level: Value
    """Condition of the axis."""
    against: Value | None = None
    """Another one, or a control; the axis's baseline where not given."""
    margin: float | None = Field(default=None, gt=0)
    """Asks whether they differ by less than this, in place of whether they differ: over several
    tasks of conditions with the same teacher in shares of what it is above one answer to
    everything, else of the metric."""


class Takeover(Section):
    """What another study found best, which was scored on examples that this one doesn't report."""

    study: Place
    """Its file, from the study file's folder: a full grid with `task.selection`, run to its end."""
    axis: Annotated[str, Field(min_length=1)]
    """Axis that both studies have, the same for all that are named. A condition of this study takes
    over what was best with its own condition of the axis, on its own task; a control what was best
    with the condition named as it is."""


class StudySpec(Section):
    """Everything about a study."""

    name: FileName
    """Name of the study, kept in its storage."""
    output: Place
    """Folder of the study, with its storage, its runs and its report."""
    command: Command = "distill"
    """What a run is."""
    recipe: Place | dict[str, Any]
    """Path of the recipe that all runs start from, from the study file's folder, or the recipe."""
    overrides: Overrides = Field(default_factory=dict)
    """Dotted keys and values that all runs share."""
    tasks: dict[FileName, Overrides] = Field(default_factory=dict)
    """Named sets of overrides over which conditions are compared and averaged."""
    axes: dict[FileName, Conditions] = Field(default_factory=dict)
    """What is compared: named axes, each of named conditions, each a set of overrides."""
    spaces: dict[FileName, Space] = Field(default_factory=dict)
    """Axes of one field each: numbers to search, or points of a grid."""
    baseline: Levels = Field(default_factory=dict)
    """The condition of each axis that others are compared with; its first where not given. With a
    search, a space that is not named keeps the recipe's value."""
    controls: dict[FileName, Overrides] = Field(default_factory=dict)
    """Named conditions outside the axes, each a set of overrides, that results are held against: a
    student that learns from labels alone, one that makes a single step."""
    hypotheses: tuple[Hypothesis, ...] = ()
    """Comparisons that are tested, all corrected together; whatever else the report compares has an
    interval and no p."""
    skip: tuple[Levels, ...] = ()
    """Combinations that make no sense and are left out, as in `{loss: none, weight: 10}`."""
    seeds: Seeds = (0, 1, 2)
    """The seeds, or how many: at least 2, because one run is no result, but where all are scored on
    `task.selection`, whose choice another study tests."""
    vary: Annotated[tuple[Varied, ...], Field(min_length=1)] = get_args(Varied)
    """What the seeds drive: weights that are drawn, the order of the data, dropout, layer maps that
    are drawn. The rest has the first seed in every run. Shared steps say `per_seed` themselves."""
    grid: Literal["full", "one_axis_at_a_time", "ends"] | None = None
    """All combinations (the default), the baseline and every other condition alone, or the
    baseline and the first and last condition of every axis."""
    search: Search | None = None
    """A search, in place of a grid. Of a task it is scored on the selection part."""
    chosen: Annotated[tuple[Takeover, ...], BeforeValidator(_one_to_some)] = ()
    """What is taken over from a study that chose weights or learning rates, or from several of
    them, each of which chose for conditions of its own."""
    metric: Metric
    """What is measured."""
    shared: dict[FileName, Step] = Field(default_factory=dict)
    """Runs done once before the others; `{shared.NAME}` in an override is the run's folder."""
    borrowed: dict[FileName, Place] = Field(default_factory=dict)
    """Shared steps of other studies that this one takes as they are, by their names there: the
    other study's file, from the study file's folder. What is not made yet is made there."""
    keep: Literal["scores", "students", "all"] = "students"
    """What stays of a finished run besides its numbers: nothing, so that runs are lean, the
    student, or the checkpoints as well."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.grid and self.search:
            raise ValueError("give grid or search, not both")
        if len(axes := dict.fromkeys(takeover.axis for takeover in self.chosen)) > 1:
            raise ValueError(f"chosen names the axes {' and '.join(axes)}; expected one for all")
        if not self.axes and not self.spaces:
            raise ValueError("nothing to compare; give axes or spaces")
        self._check_names()
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds holds a seed twice (given {list(self.seeds)})")
        if twice := self.shared.keys() & self.borrowed.keys():
            raise ValueError(f"{sorted(twice)[0]} is shared and borrowed; leave one of them out")
        for name, step in self.shared.items():
            if strange := step.tasks.keys() - self.tasks.keys():
                raise ValueError(
                    f"shared.{name}.tasks: no task {sorted(strange)[0]!r}; expected one of "
                    f"{', '.join(self.tasks) or 'none, for there are none'}"
                )
        self._check_fields()
        self._check_levels()
        self._check_search()
        return self

    def _check_names(self) -> None:
        """Refuse two things of one name where the report would show one in the other's place."""
        axes = [*self.axes, *self.spaces]
        if taken := self.axes.keys() & self.spaces.keys() or _COLUMNS & set(axes):
            raise ValueError(f"{sorted(taken)[0]}: the name is taken; give the axis another")
        for where, names, known in (
            ("tasks", self.tasks, _SUMS),
            ("controls", self.controls, _TAKEN),
        ):
            if taken := known & names.keys():
                raise ValueError(f"{where}.{sorted(taken)[0]}: the name is taken; give it another")
        if self.search is not None:
            return
        levels = {axis: set(known) for axis, known in self.axes.items()}
        levels |= {name: set(map(shown, space.values or ())) for name, space in self.spaces.items()}
        for axis, known in levels.items():
            if taken := known & self.controls.keys():
                raise ValueError(
                    f"controls.{sorted(taken)[0]}: axis {axis} has a condition of that name; give "
                    "the control another"
                )
        held: dict[str, str] = {}
        for file, what in self._files(axes):
            if file in held:
                raise ValueError(
                    f"{held[file]} and {what} would both be {file} in the report; give an axis or "
                    "a task another name"
                )
            held[file] = what

    def _files(self, axes: Sequence[str]) -> Iterator[tuple[str, str]]:
        """What the report of a grid has of axes, by file, and what each shows."""
        for axis in axes:
            yield axis_table(axis), f"axis {axis}"
            for task in self.tasks if len(self.tasks) > 1 else ():
                yield axis_table(axis, task), f"axis {axis} of task {task}"
        if self.grid in (None, "full"):
            for one, two in itertools.combinations(axes, 2):
                yield axes_map(one, two), f"axes {one} and {two}"

    def _check_fields(self) -> None:
        for where, overrides in self._sets():
            for key, instead in (*((seed, "seeds") for seed in SEEDS.values()), (OUTPUT, "output")):
                if key in overrides:
                    raise ValueError(f"{where}: {key} is set by {instead}; leave it out")
        varied = {key for axis in self.axes.values() for level in axis.values() for key in level}
        varied |= {space.field for space in self.spaces.values()}
        if self.metric.path.split(".")[-1] == "total" and any(
            key.startswith("losses") for key in varied
        ):
            raise ValueError(
                f"metric.path: {self.metric.path} is the weighted sum of the losses that the "
                "study varies, so it can't compare them; give one that means the same in all runs"
            )

    def _sets(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        yield "overrides", self.overrides
        for control, overrides in self.controls.items():
            yield f"controls.{control}", overrides
        for task, overrides in self.tasks.items():
            yield f"tasks.{task}", overrides
        for axis, levels in self.axes.items():
            for level, overrides in levels.items():
                yield f"axes.{axis}.{level}", overrides
        for name, space in self.spaces.items():
            yield f"spaces.{name}", {space.field: None}
        for name, step in self.shared.items():
            yield f"shared.{name}", {k: v for k, v in step.overrides.items() if k == OUTPUT}

    def _check_levels(self) -> None:
        names = [("baseline", self.baseline), *((f"skip.{i}", s) for i, s in enumerate(self.skip))]
        for where, levels in names:
            for axis, level in levels.items():
                if axis not in self.axes and axis not in self.spaces:
                    known = ", ".join([*self.axes, *self.spaces])
                    raise ValueError(f"{where}: no axis {axis!r}; expected one of {known}")
                if axis in self.axes and level not in self.axes[axis]:
                    known = ", ".join(self.axes[axis])
                    raise ValueError(
                        f"{where}.{axis}: no condition {level!r}; expected one of {known}"
                    )
        if self.search and self.skip:
            raise ValueError("skip: a search takes any combination; leave skip out")
        if self.search and self.hypotheses:
            raise ValueError(
                "hypotheses: a search chooses by the numbers that it shows, so they can't test "
                "anything; leave hypotheses out, and test its best in a study with other seeds"
            )

    def _check_search(self) -> None:
        search = self.search
        if search is None:
            return
        for where, names in (("controls", self.controls), ("tasks", self.tasks)):
            if taken := [name for name in names if is_candidate_name(name)]:
                raise ValueError(
                    f"{where}.{taken[0]}: a search calls its candidates so; give it another name"
                )
        if search.pruner != "none" and self.metric.heldout is None:
            raise ValueError(
                "search.pruner needs metric.heldout, the metric's path in an evaluation"
            )
        chosen = self.axes or any(space.values is not None for space in self.spaces.values())
        if search.sampler == "cmaes" and (chosen or len(self.spaces) < 2):
            raise ValueError(
                "search.sampler: cmaes searches two or more spaces with low and high and no axes; "
                "use tpe"
            )


def load_study(path: str | Path) -> StudySpec:
    """Read a study file.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is not what a study takes.
    """
    return parse_study(read_tree(path, "study"), str(path))


def parse_study(tree: Mapping[str, Any], path: str = "study") -> StudySpec:
    """Validate a mapping as a study; `path` stands before every complaint.

    Raises:
        UserError: with the field, what was given and what was expected.
    """
    try:
        return StudySpec.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {complain(error, StudySpec)}") from error
