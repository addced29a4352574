"""What one study chose on examples that another one doesn't report is taken over by that one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from study_files import MAPPINGS, TASKS, run, write_study

from fastkd.errors import UserError
from fastkd.study import load_study
from fastkd.study.chosen import _best, read_chosen
from fastkd.study.plan import Plan, Run
from fastkd.study.storage import Store

pytestmark = pytest.mark.usefixtures("undrawn")

WEIGHTS = {"field": "losses.hidden.weight", "values": [0.1, 1, 10]}
SELECTED = {"task.selection": {"share": 0.5}}
CHOSEN = {"study": "../first/study.yaml", "axis": "mapping"}


def first(folder: Path, **changes: Any) -> Path:
    """A study that tries weights for each mapping, and for one that is a control in the other."""
    (folder / "first").mkdir(exist_ok=True)
    axes = {"mapping": {**MAPPINGS, "alone": {"layer_map": "first"}}}
    options = {"axes": axes, "spaces": {"weight": WEIGHTS}, "overrides": SELECTED, "tasks": TASKS}
    return write_study(folder / "first", **{**options, **changes})


def second(folder: Path, **changes: Any) -> Path:
    (folder / "second").mkdir(exist_ok=True)
    controls = {"alone": {"layer_map": "first"}}
    options = {"controls": controls, "tasks": TASKS, "chosen": CHOSEN, **changes}
    return write_study(folder / "second", **options)


def plan_of(path: Path) -> Plan:
    spec = load_study(path)
    return Plan(spec, path, read_chosen(spec, path))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first study, run to its end."""
    folder = tmp_path_factory.mktemp("chosen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_JOURNAL", str(folder / "journal"))
        run(first(folder), workers=2)
    return folder


def test_each_condition_takes_over_what_was_best_for_it(done: Path) -> None:
    plan = plan_of(second(done))
    # the fake is best at a weight of 10, whatever the mapping and the task
    for condition in plan.conditions:
        recipe = plan.recipe(Run(condition, "hard", 1))
        assert recipe.losses.terms["hidden"].weight == 10
        # the reported study has its own examples
        assert recipe.task is not None and recipe.task.selection is None
    plain = plan_of(second(done, chosen=[]))
    key = Run(plan.conditions[0], "hard", 1)
    assert plan.digest(key) != plain.digest(key)


def test_best_is_best_on_each_task(done: Path) -> None:
    plan = plan_of(first(done))
    chosen = read_chosen(load_study(second(done)), second(done))
    assert chosen.keys() == {(m, t) for m in ("uniform", "last", "alone") for t in TASKS}
    assert all(taken == {"losses.hidden.weight": 10} for taken in chosen.values())
    assert plan.selects


@pytest.mark.parametrize(("direction", "weight"), [("maximize", 10), ("minimize", 0.1)])
def test_best_is_lowest_where_lower_is_better(done: Path, direction: str, weight: float) -> None:
    plan = plan_of(first(done))
    metric: Any = SimpleNamespace(spec=SimpleNamespace(metric=SimpleNamespace(direction=direction)))
    best = _best(metric, Store(plan).records(), "mapping", "uniform", "hard")
    assert dict(best.sources)["weight"] == {"losses.hidden.weight": weight}


def test_what_a_search_is_compared_with_takes_over_as_its_candidates_do(tmp_path: Path) -> None:
    rates = {"field": "train.learning_rate", "low": 1e-4, "high": 1e-2, "log": True}
    options = {"search": {"trials": 2}, "spaces": {"rate": rates}, "baseline": {"mapping": "last"}}
    path = second(tmp_path, **options)
    best = {"uniform": 2, "last": 3, "alone": 4}
    chosen = {(m, t): {"losses.hidden.weight": w} for m, w in best.items() for t in TASKS}
    plan = Plan(load_study(path), path, chosen)
    candidate = plan.candidate("trial-0000", {"mapping": "uniform", "rate": 3e-4})
    for condition, weight in ((candidate, 2), (plan.baseline, 3), (plan.conditions[0], 4)):
        recipe = plan.recipe(Run(condition, "hard", 0))
        assert recipe.losses.terms["hidden"].weight == weight


def test_several_studies_choose_for_conditions_of_their_own(done: Path, tmp_path: Path) -> None:
    (tmp_path / "rates").mkdir()
    rates = write_study(
        tmp_path / "rates",
        tasks=TASKS,
        axes={"mapping": {"labels": {"layer_map": "first"}, "logits": {"layer_map": "skip"}}},
        spaces={"rate": {"field": "train.learning_rate", "values": [1e-4, 1e-3]}},
        overrides=SELECTED,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_JOURNAL", str(tmp_path / "journal"))
        run(rates, workers=2)
    both = [{**CHOSEN, "study": str(done / "first" / "study.yaml")}]
    both += [{**CHOSEN, "study": str(rates)}]
    path = second(tmp_path, chosen=both, controls={"labels": {"layer_map": "first"}})
    chosen = read_chosen(load_study(path), path)
    assert {level for level, _ in chosen} == {"uniform", "last", "alone", "labels", "logits"}
    assert chosen["last", "hard"] == {"losses.hidden.weight": 10}
    assert chosen["labels", "hard"].keys() == {"train.learning_rate"}
    labels, *_ = plan_of(path).conditions
    taken = plan_of(path).recipe(Run(labels, "hard", 1))
    assert taken.train.learning_rate == chosen["labels", "hard"]["train.learning_rate"]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "not run": ({"output": "nowhere"}, {}, "nowhere holds no study yet; run it first"),
    "scored on what is reported": (
        {"overrides": {"train.steps": 5}},
        {},
        "it is scored on what is reported in the end; set task.selection there",
    ),
    "nothing to choose": (
        {"spaces": {}},
        {},
        "expected a grid of the axis mapping and at least one more",
    ),
    "one condition of most levels": (
        {"grid": "one_axis_at_a_time"},
        {},
        "grid one_axis_at_a_time tries other axes at the baseline alone, .* expected a full grid",
    ),
    "no condition of some levels": ({"grid": "ends"}, {}, "grid ends tries other axes"),
    "all conditions of a level skipped": (
        {"skip": [{"mapping": "last"}]},
        {},
        "skip leaves out every condition of mapping last, so there is nothing to choose from",
    ),
    "no such task": (
        {"tasks": {"hard": TASKS["hard"]}},
        {},
        "it has chosen nothing for the task easy",
    ),
    "made with another recipe": (
        {"overrides": {**SELECTED, "train.steps": 9}},
        {},
        "mapping=uniform,weight=0.1/seed-0 was run with another recipe before",
    ),
    "two for one condition": (
        {},
        {"chosen": [CHOSEN, CHOSEN]},
        "another one has chosen for mapping alone as well; leave the condition out of one of them",
    ),
    "no such axis here": (
        {},
        {"chosen": {**CHOSEN, "axis": "weight"}},
        "chosen.axis: no axis 'weight'; expected one of mapping",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_taken_over_is_refused(name: str, done: Path, tmp_path: Path) -> None:
    theirs, ours, expected = REFUSED[name]
    output = {"output": str(done / "first" / "out")}
    first(tmp_path, **{**output, **theirs})
    with pytest.raises(UserError, match=expected) as refused:
        plan_of(second(tmp_path, **ours))
    assert "\n" not in str(refused.value)


def test_a_study_that_is_not_finished_has_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setenv("FAKE_FAIL", "mapping=last,weight=10/seed-1")
    with pytest.raises(UserError, match="2 of 36 runs failed"):
        run(first(tmp_path), workers=2)
    with pytest.raises(UserError, match="34 of its 36 runs are finished; run it to its end first"):
        plan_of(second(tmp_path))
