"""Values of a study are told apart by value and type, and none leaves the study's folder."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_files import MAPPINGS, journal, run, study_tree, write_study

from fastkd.errors import UserError
from fastkd.study import StudySpec, load_study
from fastkd.study.naming import folder_name, shown
from fastkd.study.plan import Plan
from fastkd.study.spec import Space

TEXT = "task.columns.label"
HOSTILE = [
    *("/../../../../tmp/evil", "b", "..", ".", "a/seed-0", "a", "a\0b", "x" * 300, "~", "-rf"),
    *(
        "a\\b",
        "a\nb",
        "\u202egpj.exe",
        "\x1b[31m",
        "[/x]",
        "$x$",
        "<script>",
        "'1'",
        '"',
        " a",
        "a ",
    ),
    *("a,b=c", "é", "e\u0301", "nan", "1e3", "1", "0x1", "{a}", "\U0001f600"),
]


def planned(folder: Path, **changes: Any) -> Plan:
    return Plan(StudySpec.model_validate(study_tree(folder, **changes)), folder / "study.yaml")


def of_values(folder: Path, *values: Any, field: str = TEXT) -> Plan:
    spaces = {"x": {"field": field, "values": list(values)}}
    return planned(folder, axes=None, spaces=spaces)


def folders(plan: Plan) -> list[Path]:
    return [plan.place(run).run for c in plan.conditions for run in plan.runs(c)]


def test_hostile_values_stay_inside_and_apart(tmp_path: Path) -> None:
    plan = of_values(tmp_path, *HOSTILE)
    found = folders(plan)
    assert len({condition.name for condition in plan.conditions}) == len(HOSTILE)
    assert len(set(found)) == 2 * len(HOSTILE)
    for path in found:
        assert Path(os.path.normpath(path)) == path
        assert path.relative_to(tmp_path / "out" / "runs").parts[1:] in (
            ("seed-0", "run"),
            ("seed-1", "run"),
        )
        assert all(len(part.encode()) <= 255 for part in path.parts)
    # what a value is, the recipe is given unchanged
    given = [plan.recipe(plan.runs(c)[0]) for c in plan.conditions]
    assert [recipe.task.columns.label for recipe in given] == HOSTILE  # type: ignore[union-attr]
    assert all(condition.name.isprintable() for condition in plan.conditions)


def test_a_study_of_hostile_values_runs_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_JOURNAL", str(tmp_path / "journal"))
    values = ["/../../../../evil", "a", "a/seed-0", "x" * 300, "<script>$x$</script>[/x]", "a\x1bb"]
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    path = write_study(inner, axes=None, spaces={"x": {"field": TEXT, "values": values}})
    page = run(path)
    assert len([word for word, _ in journal(tmp_path / "journal") if word == "end"]) == 12
    outside = [p for p in tmp_path.rglob("*") if not p.is_relative_to(inner)]
    assert sorted(outside) == [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "journal"]
    assert {p.name for p in inner.iterdir()} == {"out", "study.yaml"}
    assert "<script>" not in page.read_text()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ([1, "1"], TEXT),
        ([0.1234567, 0.12345671, 0.1234568], "losses.hidden.weight"),
        ([1.0, 1.0000001], "losses.hidden.weight"),
        ([1000000, 1000000.5], "losses.hidden.weight"),
        ([5e-324, 1e-323], "losses.hidden.weight"),
    ],
)
def test_values_that_look_alike_are_conditions_of_their_own(
    tmp_path: Path, values: list[Any], field: str
) -> None:
    if field == TEXT:
        # a number is no column, and that is said of the right condition
        with pytest.raises(UserError, match=r"x=1/seed-0: task\.columns\.label: .*\(given 1\)"):
            of_values(tmp_path, *values)
        names = [shown(value) for value in values]
        assert names == ["1", "'1'"] and folder_name(names[1]) != folder_name(names[0])
        return
    plan = of_values(tmp_path, *values, field=field)
    assert [c.levels["x"] for c in plan.conditions] == [shown(value) for value in values]
    given = [plan.recipe(plan.runs(c)[0]) for c in plan.conditions]
    assert [r.losses.terms["hidden"].weight for r in given] == values  # type: ignore[union-attr]
    assert len(set(folders(plan))) == 2 * len(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 1.0], "values holds a value twice"),
        (["a", "a"], "values holds a value twice"),
        ([True, False], "values.0"),
        ([None, 1], "values.0"),
        ([2**63 - 1, 2**63 - 1], "values holds a value twice"),
        ([float("nan"), 1.0], "values.0"),
    ],
)
def test_values_that_are_none_or_the_same_are_refused(
    tmp_path: Path, values: list[Any], expected: str
) -> None:
    path = write_study(tmp_path, axes=None, spaces={"x": {"field": TEXT, "values": values}})
    with pytest.raises(UserError, match=expected) as refused:
        load_study(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mapping=uniform", "mapping=uniform"),
        ("mapping=uniform,weight=0.1", "mapping=uniform,weight=0.1"),
        ("x=-1e+06", "x=-1e+06"),
        ("x=two words", "x=two words"),
        ("labels_alone", "labels_alone"),
        ("trial-0003", "trial-0003"),
    ],
)
def test_ordinary_names_are_their_folders(name: str, expected: str) -> None:
    assert folder_name(name) == expected


LEVELS = st.one_of(st.text(), st.integers(), st.floats(allow_nan=False, allow_infinity=False))


@settings(max_examples=200, deadline=None)
@given(st.lists(LEVELS, min_size=2, max_size=8, unique_by=lambda v: (isinstance(v, str), v)))
def test_any_two_levels_have_two_names_and_two_folders(levels: list[Any]) -> None:
    names = [f"x={shown(level)}" for level in levels]
    parts = [folder_name(name) for name in names]
    for one, two in itertools.combinations(range(len(levels)), 2):
        # zeros of both signs are one number
        assert names[one] != names[two] and parts[one] != parts[two]
    for part in parts:
        assert part.isascii() and part.isprintable() and not {"/", "\\", "\0"} & set(part)
        assert part not in (".", "..", "") and len(part) <= 200


def test_levels_are_named_by_their_value(tmp_path: Path) -> None:
    space = {"field": "losses.hidden.weight", "values": [1000000, 2.5, "a"]}
    changes: dict[str, Any] = {"axes": None, "spaces": {"x": {**space, "values": [1e6, 2.5]}}}
    plan = planned(tmp_path, **changes, baseline={"x": 1000000})
    assert plan.baseline_levels == {"x": "1e+06"}
    with pytest.raises(UserError, match=r"skip\.0\.x: no value 3; expected one of 1e\+06, 2\.5"):
        planned(tmp_path, **changes, skip=[{"x": 3}])
    with pytest.raises(UserError, match=r"baseline\.x: no value '2\.5'; expected one of"):
        planned(tmp_path, **changes, baseline={"x": "2.5"})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seeds": 10**18}, "seeds: expected at most 1000 (given 1000000000000000000)"),
        ({"seeds": 1e18}, "seeds:"),
        ({"seeds": [0, -1]}, "seeds.1:"),
        ({"spaces": {"x": {"field": "a", "low": 0, "high": 1, "points": 10**9}}}, "points:"),
        ({"tasks": {"t" * 101: {}}}, "tasks."),
        ({"name": "a\n"}, "name:"),
        ({"output": "a\0b"}, "output:"),
        ({"output": "x" * 300}, "output:"),
        ({"recipe": "a\0b"}, "recipe"),
    ],
)
def test_what_no_storage_takes_is_refused(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    path = write_study(tmp_path, **changes)
    with pytest.raises(UserError) as refused:
        Plan(load_study(path), path)
    assert expected in str(refused.value) and "\n" not in str(refused.value)


LENGTHS = {"short": {"train.steps": 3}, "long": {"train.steps": 4}}
COLUMNS = ("condition", "state", "value", "seconds", "message", "folder", "runs", "planned")
RTE = {"rte": {"task.name": "rte"}, "mrpc": {"task.name": "mrpc"}}
WEIGHT = {"field": "losses.hidden.weight", "values": [5, 10]}
CLASHES: list[tuple[dict[str, Any], str]] = [
    *(
        ({"axes": {name: MAPPINGS}}, f"{name}: the name is taken; give the axis")
        for name in COLUMNS
    ),
    ({"spaces": {"value": WEIGHT}}, "value: the name is taken"),
    *(
        ({"tasks": {name: {}, **RTE}}, f"tasks.{name}: the name is taken; give it another")
        for name in ("all", "seeds", "kept", "difference")
    ),
    (
        {"controls": {"last": {"train.steps": 9}}},
        "controls.last: axis mapping has a condition of that name; give the control another",
    ),
    (
        {"spaces": {"weight": WEIGHT}, "controls": {"10": {"train.steps": 9}}},
        "controls.10: axis weight has a condition of that name",
    ),
    (
        {"axes": {"map": MAPPINGS, "map-rte": LENGTHS}, "tasks": RTE},
        "axis map of task rte and axis map-rte would both be axis-map-rte in the report; give an",
    ),
    (
        {"axes": {name: LENGTHS for name in ("a", "a-b", "b-c", "c")}},
        "axes a and b-c and axes a-b and c would both be map-a-b-c in the report",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), CLASHES)
def test_names_that_would_stand_for_two_things_in_the_report_are_refused(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as refused:
        load_study(write_study(tmp_path, **changes))
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_names_that_only_look_like_it_are_taken(tmp_path: Path) -> None:
    """One task has no tables of its own, other grids no maps, and a search neither."""
    for changes in (
        {"axes": {"map": MAPPINGS, "map-rte": LENGTHS}, "tasks": {"rte": {"task.name": "rte"}}},
        {"axes": {n: LENGTHS for n in ("a", "a-b", "b-c", "c")}, "grid": "one_axis_at_a_time"},
        {"axes": {"map": MAPPINGS, "map-rte": LENGTHS}, "tasks": RTE, "search": {"trials": 2}},
    ):
        load_study(write_study(tmp_path, **changes))


def test_more_combinations_than_anyone_runs_are_refused(tmp_path: Path) -> None:
    space = {"field": "losses.hidden.weight", "low": 0, "high": 1, "points": 1000}
    fields = ("losses.hidden.weight", "train.learning_rate", "train.weight_decay")
    spaces = {f"x{n}": {**space, "field": field} for n, field in enumerate(fields)}
    with pytest.raises(UserError, match=r"all combinations are 4,000,000,000 runs, expected at m"):
        planned(tmp_path, spaces=spaces)


@pytest.mark.parametrize("log", [False, True])
def test_points_between_ends_that_are_far_apart(log: bool) -> None:
    low = 1e-300 if log else -1.7e308
    found = Space(field="a", low=low, high=1.7e308, points=3, log=log).grid()
    assert found[0] == low and found[2] == 1.7e308
    assert found[1] == (pytest.approx(1.30384e4, rel=1e-5) if log else 0.0)
