"""A study file: what it works out to, and what it refuses before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from study_files import MAPPINGS, RECIPE, TUNING, WEIGHTS, run, study_tree, write_study

from fastkd.errors import UserError
from fastkd.recipe import each_stage
from fastkd.study import load_study
from fastkd.study.plan import Plan, Run
from fastkd.study.spec import Space, parse_study


def _plan(folder: Path, **changes: Any) -> Plan:
    path = write_study(folder, **changes)
    return Plan(load_study(path), path)


def _asked(**changes: Any) -> dict[str, Any]:
    """A hypothesis of the mapping, with something else in it."""
    return {"hypotheses": [{"axis": "mapping", "level": "last", **changes}]}


def _axes(**axes: Any) -> dict[str, Any]:
    return {"axes": {"mapping": MAPPINGS, **axes}}


SEARCH = {"trials": 4}
STEPS = {"train.evaluate_every": 2}
REPORTED = {"task.selection": None}
OTHERS = {"one": {"train.steps": 3}, "two": {}}
STEP = {"command": "finetune", "recipe": TUNING}
BEST = {"train.evaluate_every": 2, "run.keep_best": "score"}
KEPT, REPORTING = {"share": 0.5}, {"share": 0.5, "scored": False}
STOPS = {"metric": "score", "patience": 1}


def _recipe(**changes: Any) -> dict[str, Any]:
    return {"recipe": {**RECIPE, **changes}}


def _stages(**last: Any) -> list[dict[str, Any]]:
    return [{"train": {"steps": 3}}, {"train": {"steps": 3}, **last}]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"metrics": {}}, "metrics: unknown key; did you mean 'metric'?"),
    "unknown key inside": (
        {"metric": {"path": "a", "direction": "maximize", "held_out": "b"}},
        "metric.held_out: unknown key; did you mean 'heldout'?",
    ),
    "unknown key of a space": (
        {"spaces": {"weight": {**WEIGHTS, "point": 3}}},
        "spaces.weight.point: unknown key; did you mean 'points'?",
    ),
    "unknown field of the recipe": (
        _axes(loss={"one": {"losses.hidden.wieght": 1}, "two": {}}),
        "mapping=uniform,loss=one/seed-0: losses.hidden.wieght: unknown key; did you mean 'weight'",
    ),
    "a value that the recipe refuses": (
        _axes(size={"small": {"student.layers": 2}, "none": {"student.layers": 0}}),
        "mapping=uniform,size=none/seed-0: student.layers: input should be greater than 0",
    ),
    "unknown field in a search's corner": (
        {"search": SEARCH, "spaces": {"x": {**WEIGHTS, "field": "losses.hidden.w"}}},
        "losses.hidden.w: unknown key",
    ),
    "a search's end that the recipe refuses": (
        {
            "search": SEARCH,
            "spaces": {"x": {"field": "student.layers", "low": 0, "high": 2, "integer": True}},
        },
        "student.layers: input should be greater than 0",
    ),
    "unknown field in a task": ({"tasks": {"a": {"tusk.name": "x"}}}, "did you mean 'task'?"),
    "unknown field of a control": ({"controls": {"alone": {"loses": 1}}}, "alone/"),
    "a control named as a row": ({"controls": {"teacher": {}}}, "controls.teacher: the name is"),
    "a control named as a candidate": (
        {"search": SEARCH, "spaces": {"w": WEIGHTS}, "controls": {"trial-0000": {}}},
        "controls.trial-0000: a search calls its candidates so; give it another name",
    ),
    "a task named as a candidate": (
        {"search": SEARCH, "spaces": {"w": WEIGHTS}, "tasks": {"trial-12345": {}}},
        "tasks.trial-12345: a search calls its candidates so",
    ),
    "seeds in a control": ({"controls": {"a": {"train.seed": 1}}}, "controls.a: train.seed is set"),
    "a hypothesis of no axis": (_asked(axis="map"), "hypotheses.0: no axis 'map'; expected one of"),
    "a hypothesis of no condition": (
        _asked(level="top"),
        "hypotheses.0.level: no condition 'top'; expected one of uniform, last",
    ),
    "a hypothesis against nothing": (
        _asked(against="alone"),
        "hypotheses.0.against: no condition 'alone'; expected one of uniform, last",
    ),
    "hypotheses that no p could answer": (
        {**_asked(), "seeds": 5},
        "hypotheses: the smallest corrected p that 5 seeds can give to those that ask for a "
        "difference (1) is 0.062, so none could be answered; give seeds: 6 or more, or leave",
    ),
    "a hypothesis of one": (_asked(level="uniform"), "compares uniform with itself"),
    "a margin of nothing": (_asked(margin=0), "hypotheses.0.margin: input should be greater"),
    "seeds of maps in an axis": (
        _axes(x={"a": {"layer_map.seed": 1}, "b": {}}),
        "layer_map.seed is set by seeds; leave it out",
    ),
    "a seed of maps in a level": (
        _axes(x={"a": {"layer_map": {"kind": "random", "seed": 1}}, "b": {}}, mapping=OTHERS),
        "layer_map.seed is set by seeds; leave it out of the recipe",
    ),
    "a teacher of each seed for one student": (
        {
            "shared": {
                "teacher": {**STEP, "per_seed": True},
                "student": {**STEP, "overrides": {"model.name": "{shared.teacher}"}},
            }
        },
        "{shared.teacher} is one a seed; set per_seed to true here as well",
    ),
    "a choice by what is reported": (
        {"search": {**SEARCH}, "spaces": {"w": WEIGHTS}, "overrides": REPORTED},
        "search chooses by the examples that the study reports; set task.selection",
    ),
    "stopping by what is reported": (
        {"overrides": {**STEPS, "train.early_stopping": {"metric": "score", "patience": 2}}},
        "train.early_stopping chooses by the examples",
    ),
    "the best by what is reported": (
        {"overrides": {**STEPS, "run.keep_best": "score"}},
        "run.keep_best chooses by the examples",
    ),
    "the best of a shared step by what is reported": (
        {"shared": {"teacher": {**STEP, "overrides": BEST}}},
        "shared.teacher: run.keep_best chooses by the examples that scores are reported of; set",
    ),
    "the best of a start by what is reported": (
        {"shared": {"start": {"command": "distill", "recipe": RECIPE, "overrides": BEST}}},
        "shared.start: run.keep_best chooses by the examples",
    ),
    "a stage that stops by what is reported": (
        _recipe(stages=_stages(train={"steps": 3, "evaluate_every": 1, "early_stopping": STOPS})),
        "stages.2.train.early_stopping chooses by the examples that the study reports",
    ),
    "a search whose last stage is scored on what is reported": (
        {
            **_recipe(stages=_stages(task={"selection": REPORTING})),
            "search": SEARCH,
            "spaces": {"w": WEIGHTS},
        },
        "search chooses by the examples that the study reports",
    ),
    "one seed, and a last stage that is scored on what is reported": (
        {
            **_recipe(
                task={**RECIPE["task"], "selection": KEPT},
                stages=_stages(task={"selection": REPORTING}),
            ),
            "seeds": 1,
        },
        "seeds: expected at least 2",
    ),
    "a condition that is scored on other examples": (
        {
            **_axes(mapping=OTHERS, scored={"a": {}, "b": {"task.selection.scored": False}}),
            "overrides": {"task.selection": KEPT},
        },
        "mapping=one,scored=b/seed-0: task.selection.scored makes it scored on other examples than "
        "mapping=one,scored=a/seed-0, so they can't be compared; give both the same",
    ),
    "a seed of the order in the recipe": (
        _recipe(train={"steps": 5, "order_seed": 7}),
        "train.order_seed is set by seeds; leave it out of the recipe, and order out of vary",
    ),
    "a seed of dropout inside an override": (
        {"overrides": {"train": {"steps": 5, "dropout_seed": 7}}},
        "train.dropout_seed is set by seeds",
    ),
    "a seed of a stage": (
        _recipe(stages=_stages(train={"steps": 3, "seed": 9})),
        "stages.2.train.seed is set by seeds; leave it out of the recipe, and weights out of vary",
    ),
    "a seed of a term's map": (
        _recipe(losses={"hidden": {"layer_map": {"kind": "random", "seed": 3}}}),
        "losses.hidden.layer_map.seed is set by seeds",
    ),
    "a seed of a map of a stage": (
        _recipe(stages=_stages(layer_map={"kind": "random", "seed": 3})),
        "stages.2.layer_map.seed is set by seeds; leave it out of the recipe, and maps out of vary",
    ),
    "a seed of a step of each seed": (
        {"shared": {"teacher": {**STEP, "per_seed": True, "overrides": {"train.order_seed": 1}}}},
        "shared.teacher (seed 0): train.order_seed is set by seeds",
    ),
    "an axis that is not there": (
        {"chosen": {"study": "other.yaml", "axis": "map"}},
        "other.yaml: not a readable study",
    ),
    "choices along two axes": (
        {"chosen": [{"study": "a.yaml", "axis": "map"}, {"study": "b.yaml", "axis": "loss"}]},
        "chosen names the axes map and loss; expected one for all",
    ),
    "hypotheses of a search": (
        {"search": SEARCH, **_asked()},
        "hypotheses: a search chooses by the numbers that it shows",
    ),
    "unknown field of a shared step": (
        {"shared": {"teacher": {**STEP, "overrides": {"train.stepz": 1}}}},
        "shared.teacher: train.stepz: unknown key",
    ),
    "one seed": (
        {"seeds": 1},
        "seeds: expected at least 2, because one run is no result (given [0]); one is enough where "
        "task.selection scores all runs",
    ),
    "no seed": ({"seeds": 0}, "seeds: expected at least 1 (given 0)"),
    "the same seed": ({"seeds": [3, 4, 3]}, "seeds holds a seed twice"),
    "nothing to compare": ({"axes": {}}, "nothing to compare; give axes or spaces"),
    "one condition": ({"axes": {"mapping": {"a": {}}}}, "at least 2 items"),
    "a name that is no file name": (_axes(loss={"a/b": {}, "c": {}}), "string should match"),
    "an axis named as a space": ({"spaces": {"mapping": WEIGHTS}}, "mapping: the name is taken"),
    "an axis named seed": (_axes(seed={"a": {}, "b": {}}), "seed: the name is taken"),
    "a grid and a search": ({"grid": "full", "search": SEARCH}, "give grid or search, not both"),
    "unknown baseline": ({"baseline": {"mapping": "top"}}, "baseline.mapping: no condition 'top'"),
    "baseline of no axis": ({"baseline": {"map": "last"}}, "baseline: no axis 'map'"),
    "baseline off the grid": (
        {"spaces": {"weight": {**WEIGHTS, "points": 4}}, "baseline": {"weight": 3}},
        "baseline.weight: no value 3; expected one of 0.1, 1, 10, 100",
    ),
    "baseline skipped": ({"skip": [{"mapping": "uniform"}]}, "skip leaves out the baseline"),
    "seeds in an override": ({"overrides": {"train.seed": 3}}, "train.seed is set by seeds"),
    "output in an axis": (_axes(x={"a": {"run.output": "r"}, "b": {}}), "run.output is set by"),
    "space without ends": ({"spaces": {"w": {"field": "a"}}}, "expected low and high, or values"),
    "space with both": ({"spaces": {"w": {**WEIGHTS, "values": [1, 2]}}}, "not both"),
    "space upside down": (
        {"spaces": {"w": {"field": "a", "low": 2, "high": 1}}},
        "low is 2, expected less than high (1)",
    ),
    "log of nothing": (
        {"spaces": {"w": {"field": "a", "low": 0, "high": 1, "log": True}}},
        "low is 0, expected more than 0",
    ),
    "space without points": ({"spaces": {"w": WEIGHTS}}, "a grid needs values, or points"),
    "search without trials": ({"search": {"sampler": "tpe"}}, "give trials with tpe"),
    "grid sampler with trials": ({"search": {"sampler": "grid", "trials": 3}}, "none with grid"),
    "pruner without its values": (
        {
            "search": {**SEARCH, "pruner": "median"},
            "metric": {"path": "after.score", "direction": "maximize"},
        },
        "search.pruner needs metric.heldout",
    ),
    "cmaes of choices": ({"search": {**SEARCH, "sampler": "cmaes"}}, "use tpe"),
    "metric that the study changes": (
        {
            "spaces": {"w": {**WEIGHTS, "points": 3}},
            "metric": {"path": "after.total", "direction": "minimize"},
        },
        "after.total is the weighted sum of the losses that the study varies",
    ),
    "two axes on one field": (
        _axes(again={"a": {"layer_map": "first"}, "b": {"layer_map": "skip"}}),
        "mapping sets layer_map and again sets layer_map",
    ),
    "a weight of a term that is off": (
        {
            **_axes(loss={"none": {"losses.hidden": None}, "mse": {}}),
            "spaces": {"w": {**WEIGHTS, "points": 2}},
        },
        "loss sets losses.hidden and w sets losses.hidden.weight; let only one of them do it",
    ),
    "unknown shared step": (
        {"overrides": {"teacher.model": "{shared.techer}"}, "shared": {"teacher": STEP}},
        "overrides: no shared step 'techer'; expected one of teacher",
    ),
    "a shared step before its own": (
        {"shared": {"a": {**STEP, "overrides": {"model.name": "{shared.b}"}}, "b": STEP}},
        "shared.a: no shared step 'b'; expected none",
    ),
    "a task of a step that is not there": (
        {"shared": {"teacher": {**STEP, "tasks": {"c": {}}}}, "tasks": {"a": {}}},
        "shared.teacher.tasks: no task 'c'; expected one of a",
    ),
    "one a task without tasks": (
        {"shared": {"teacher": {**STEP, "per_task": True}}},
        "shared.teacher: per_task, but the study has no tasks",
    ),
    "missing recipe": ({"recipe": "nowhere.yaml"}, "nowhere.yaml: not a readable recipe"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_study_is_refused_in_one_line_before_anything_is_run(name: str, tmp_path: Path) -> None:
    changes, expected = BAD[name]
    path = write_study(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        run(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [None, "a: [", "- list\n"])
def test_unreadable_study(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"study\.yaml"):
        load_study(path)


LOSSES = {"one": {"losses.hidden.weight": 1}, "two": {"losses.hidden.weight": 2}, "three": {}}


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (
            "full",
            [("uniform", n) for n in LOSSES] + [("last", n) for n in LOSSES],
        ),
        (
            "one_axis_at_a_time",
            [("uniform", "two"), ("last", "two"), ("uniform", "one"), ("uniform", "three")],
        ),
        ("ends", [("uniform", "two"), ("last", "two"), ("uniform", "one"), ("uniform", "three")]),
    ],
)
def test_conditions_of_a_grid(grid: str, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    plan = _plan(tmp_path, **_axes(loss=LOSSES), grid=grid, baseline={"loss": "two"})
    assert [tuple(c.levels.values()) for c in plan.conditions] == expected
    assert plan.baseline.name == "mapping=uniform,loss=two"


def test_ends_leave_out_the_middle(tmp_path: Path) -> None:
    plan = _plan(tmp_path, **_axes(loss=LOSSES), grid="ends")
    assert [c.levels["loss"] for c in plan.conditions] == ["one", "one", "three"]


def test_combinations_can_be_skipped(tmp_path: Path) -> None:
    changes = {**_axes(loss=LOSSES), "skip": [{"mapping": "last", "loss": "one"}]}
    names = [c.name for c in _plan(tmp_path, **changes).conditions]
    assert len(names) == 5
    assert "mapping=last,loss=one" not in names


def test_a_run_is_the_recipe_with_everything_laid_over_it(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path,
        overrides={"train.steps": 7, "train.batch_size": 4},
        tasks={
            "a": {"task.name": "x"},
            "b": {"task.name": "y", "train.steps": 8, "losses.hidden.weight": 5},
        },
        controls={"alone": {"losses.hidden.weight": 0.5}},
        seeds=[5, 9],
    )
    off, _, last = plan.conditions
    recipe = plan.recipe(Run(last, "b", 9))
    assert (recipe.layer_map, recipe.task.name, recipe.train.steps) == ("last", "y", 8)
    assert (recipe.train.batch_size, recipe.train.seed) == (4, 9)
    assert recipe.run.output == str(tmp_path / "out" / "runs" / "b" / "mapping=last" / "seed-9/run")
    assert recipe.losses.terms["hidden"].weight == 5
    # also where a task says otherwise
    without = plan.recipe(Run(off, "b", 5))
    assert without.losses.terms["hidden"].weight == 0.5
    assert [run.key for run in plan.runs(off)] == [
        f"{task}/alone/seed-{seed}" for task in "ab" for seed in (5, 9)
    ]
    # the base is not touched on the way
    assert plan.spec.recipe == RECIPE


def test_seeds_drive_what_the_study_varies(tmp_path: Path) -> None:
    maps = {"drawn": {"layer_map": {"kind": "random", "redraw": "step"}}, "last": MAPPINGS["last"]}
    drawn = {"axes": {"mapping": maps}, "seeds": [5, 9]}

    def seeds(vary: list[str] | None, level: int = 0) -> tuple[int, int, int, int | None]:
        plan = _plan(tmp_path, **drawn, vary=vary)
        recipe = plan.recipe(Run(plan.conditions[level], None, 9))
        train, mapped = recipe.train, recipe.layer_map
        return train.seed, train.order, train.dropping, getattr(mapped, "seed", None)

    # a map that is drawn follows train.seed
    assert seeds(None) == (9, 9, 9, None)
    assert seeds(["order"]) == (5, 9, 5, None)
    assert seeds(["weights", "dropout"]) == (9, 5, 9, 5)
    assert seeds(["maps"]) == (5, 5, 5, 9)
    # one that is not has no seed
    assert seeds(["maps"], 1) == (5, 5, 5, None)
    digests = set()
    for vary in (None, ["order"], ["maps"]):
        plan = _plan(tmp_path, **drawn, vary=vary)
        digests.add(plan.digest(Run(plan.conditions[0], None, 9)))
    assert len(digests) == 3


def test_every_map_that_is_drawn_has_the_seed_of_maps(tmp_path: Path) -> None:
    drawn = {"hidden": {"layer_map": {"kind": "random"}}, "attention": {"layer_map": "random"}}
    plan = _plan(
        tmp_path,
        **_recipe(losses=drawn, stages=[{"losses": drawn, "layer_map": "random"}]),
        axes={"size": {"small": {}, "large": {"train.batch_size": 8}}},
        seeds=[5, 9],
        vary=["weights", "order"],
    )
    recipe = plan.recipe(Run(plan.conditions[0], None, 9))
    (stage,) = each_stage(recipe)
    for made in (recipe, stage):
        assert [term.layer_map.seed for term in made.losses.terms.values()] == [5, 5]
    assert stage.layer_map.seed == 5 and recipe.train.seed == 9
    # a preset's too
    rail = {key: value for key, value in RECIPE.items() if key != "losses"}
    plan = _plan(
        tmp_path,
        recipe={**rail, "preset": "rail-kd"},
        axes={"size": {"small": {}, "large": {"train.batch_size": 8}}},
        seeds=[5, 9],
        vary=["weights"],
    )
    recipe = plan.recipe(Run(plan.conditions[0], None, 9))
    assert recipe.layer_map.seed == 5 and recipe.train.seed == 9


def test_what_stages_are_scored_on_last_decides_whether_a_study_selects(tmp_path: Path) -> None:
    task = {**RECIPE["task"], "selection": REPORTING}
    recipe = _recipe(task=task, stages=_stages(task={"selection": {"scored": True}}))
    assert _plan(tmp_path, **recipe, seeds=1).selects
    assert not _plan(tmp_path, **_recipe(task=task)).selects


def test_a_shared_step_of_each_seed_is_its_runs_own(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path,
        tasks={"a": {"task.name": "x"}, "b": {"task.name": "y"}},
        shared={"teacher": {**STEP, "per_task": True, "per_seed": True}},
        overrides={"teacher.model": "{shared.teacher}/student"},
        seeds=[5, 9],
    )
    out = tmp_path / "out" / "shared" / "teacher"
    places = {(step.task, step.seed): step for step in plan.shared}
    assert places.keys() == {(task, seed) for task in "ab" for seed in (5, 9)}
    step = places["b", 9]
    assert (step.place.folder, step.label) == (out / "b" / "seed-9", "shared.teacher (b, seed 9)")
    assert plan.shared_recipe(step).train.seed == 9
    recipe = plan.recipe(Run(plan.conditions[0], "b", 9))
    assert recipe.teacher.model == str(out / "b" / "seed-9" / "run" / "student")


def test_runs_of_which_scores_stay_are_lean(tmp_path: Path) -> None:
    def is_lean(**changes: Any) -> bool:
        plan = _plan(tmp_path, **changes)
        return plan.recipe(Run(plan.conditions[0], None, 0)).run.lean

    assert is_lean(keep="scores") and not is_lean() and not is_lean(keep="all")
    before = {"path": "before.score", "direction": "maximize"}
    assert not is_lean(keep="scores", metric=before)


def test_predictions_are_kept_where_examples_have_any(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    assert plan.recipe(Run(plan.conditions[0], None, 0)).run.predictions
    words = {"name": "w", "source": "x", "kind": "token_classification", "labels": ["O", "B-x"]}
    plan = _plan(tmp_path, recipe={**RECIPE, "task": words})
    assert not plan.recipe(Run(plan.conditions[0], None, 0)).run.predictions
    one = {"path": "after.scores.dev.f1", "direction": "maximize"}
    plan = _plan(tmp_path, metric=one)
    assert plan.recipe(Run(plan.conditions[0], None, 0)).run.predictions
    other = {"path": "after.total", "direction": "minimize"}
    plan = _plan(tmp_path, metric=other)
    assert not plan.recipe(Run(plan.conditions[0], None, 0)).run.predictions


def test_the_files_of_the_page_on_studies_are_studies() -> None:
    page = (Path(__file__).parents[1] / "fastkd" / "study" / "README.md").read_text()
    first, more = (yaml.safe_load(part.split("```")[0]) for part in page.split("```yaml\n")[1:])
    spec = parse_study(first)
    assert [h.margin for h in spec.hypotheses] == [None, 0.02, None] and spec.seeds == (*range(10),)
    reports = {key: value for key, value in first.items() if key != "shared"}
    assert parse_study({**reports, **more}).borrowed == {"teacher": "weights.yaml"}


def test_all_conditions_have_a_seed_before_any_has_the_next(tmp_path: Path) -> None:
    plan = _plan(tmp_path, tasks={"a": {}, "b": {"train.steps": 8}}, seeds=[9, 5])
    names = [condition.name for condition in plan.conditions]
    assert [run.key for run in plan.all_runs()] == [
        f"{task}/{name}/seed-{seed}" for seed in (9, 5) for task in "ab" for name in names
    ]


def test_shared_steps_are_named_by_their_folder(tmp_path: Path) -> None:
    out = tmp_path / "out" / "shared"
    plan = _plan(
        tmp_path,
        tasks={"a": {"task.name": "x"}, "b": {"task.name": "y", "losses.hidden.weight": 5}},
        shared={
            "general": {"command": "distill", "recipe": RECIPE},
            "teacher": {
                **STEP,
                "per_task": True,
                "recipe": {**TUNING, "model": {}},
                "overrides": {"model.name": "{shared.general}/student"},
                "tasks": {"b": {"train.steps": 77}},
            },
        },
        overrides={"teacher.model": "{shared.teacher}/student"},
    )
    general, on_a, on_b = plan.shared
    assert general.needs == ()
    assert [place.run for place in on_b.needs] == [general.place.run] == [out / "general" / "run"]
    recipe = plan.shared_recipe(on_b)
    assert recipe.model.name == str(out / "general" / "run" / "student")
    # what a task says of students is not for a fine-tuning run
    assert recipe.task.name == "y" and recipe.train.steps == 77
    assert plan.shared_recipe(on_a).train.steps != 77
    assert recipe.run.output == str(on_b.place.run) == str(out / "teacher" / "b" / "run")
    found = plan.recipe(Run(plan.conditions[0], "a", 0))
    assert found.teacher.model == str(on_a.place.run / "student")


def test_recipe_paths_start_at_the_study_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(RECIPE))
    plan = _plan(tmp_path, recipe="base.yaml")
    assert plan.recipe(Run(plan.baseline, None, 1)).train.seed == 1


def test_digest_knows_what_decides_a_run_and_nothing_else(tmp_path: Path) -> None:
    def of(**changes: Any) -> str:
        plan = _plan(tmp_path, **changes)
        return plan.digest(Run(plan.baseline, None, 0))

    first = of()
    assert of(output=str(tmp_path / "elsewhere"), seeds=5) == first
    assert of(overrides={"train.steps": 6}) != first
    assert of(recipe={**RECIPE, "task": {**RECIPE["task"], "name": "hard"}}) != first


def test_points_of_a_space() -> None:
    def points(**values: Any) -> list[Any]:
        return list(Space(field="a", **values).grid())

    assert points(low=0.1, high=10, log=True, points=3) == [0.1, 1, 10]
    assert points(low=0, high=1, points=3) == [0, 0.5, 1]
    assert points(low=1, high=4, points=9, integer=True) == [1, 2, 3, 4]
    assert points(values=["a", 2]) == ["a", 2]
    # rounded to what a name shows, and never beyond the ends
    assert points(low=1 / 3, high=2 / 3, points=2) == [1 / 3, 2 / 3]


def test_study_tree_is_a_study(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    assert load_study(path).model_dump(mode="json")["axes"] == study_tree(tmp_path)["axes"]


SHIPPED = sorted((Path(__file__).parents[1] / "recipes").glob("study-*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_whole(path: Path) -> None:
    plan = Plan(load_study(path), path)
    assert plan.output == Path("runs") / path.stem


def test_studies_are_shipped() -> None:
    assert len(SHIPPED) >= 2
