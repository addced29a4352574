"""A study takes the teachers of another one, and makes there what is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study_files import TASKS, TUNING, ended, journal, run, write_study

from fastkd.errors import UserError
from fastkd.study import load_study
from fastkd.study.plan import Plan, Run

pytestmark = pytest.mark.usefixtures("undrawn")

TEACHER = {"command": "finetune", "recipe": TUNING, "per_task": True, "per_seed": True}
ONCE = {**TEACHER, "per_seed": False, "overrides": {"model.name": "{shared.teacher}"}}
TAUGHT = {"teacher.model": "{shared.teacher}/student"}


def study(folder: Path, name: str, **changes: Any) -> Path:
    (folder / name).mkdir(exist_ok=True)
    return write_study(folder / name, **{"tasks": TASKS, "overrides": TAUGHT, **changes})


def made(notes: Path) -> list[str]:
    """The shared steps that were made."""
    return [name for name in ended(notes) if name.startswith("shared/")]


@pytest.mark.parametrize("first", ["lends", "borrows"])
def test_what_is_borrowed_is_made_once_and_read_where_it_lies(
    tmp_path: Path, notes: Path, first: str
) -> None:
    lends = study(tmp_path, "lends", shared={"teacher": TEACHER})
    path = study(tmp_path, "borrows", borrowed={"teacher": "../lends/study.yaml"}, seeds=[1, 0])
    for each in (lends, path) if first == "lends" else (path, lends):
        run(each, workers=2)
    teachers = [f"shared/teacher/{task}/seed-{seed}" for task in TASKS for seed in (0, 1)]
    assert sorted(made(notes)) == sorted(teachers)
    assert not (tmp_path / "borrows" / "out" / "shared").exists()
    plan = Plan(load_study(path), path)
    recipe = plan.recipe(Run(plan.conditions[0], "hard", 1))
    lent = tmp_path / "lends" / "out" / "shared" / "teacher" / "hard" / "seed-1" / "run"
    assert recipe.teacher.model == str(lent / "student")


def test_what_a_borrowed_step_needs_is_made_as_well(tmp_path: Path, notes: Path) -> None:
    """And nothing else of the study that lends it, or of one that lends to that one."""
    needs = {"overrides": {"model": "{shared.general}/student"}}
    shared = {"teacher": {**TEACHER, **needs}, "unused": TEACHER}
    general = {"general": {**ONCE, "overrides": {}}, "unused": TEACHER}
    study(tmp_path, "first", shared=general, overrides={})
    lent = {"general": "../first/study.yaml"}
    study(tmp_path, "lends", shared=shared, borrowed=lent, seeds=3)
    borrowed = {"teacher": "../lends/study.yaml"}
    path = study(
        tmp_path, "borrows", borrowed=borrowed, tasks={"easy": TASKS["easy"]}, seeds=[1, 2]
    )
    run(path)
    assert made(notes) == [
        "shared/general/easy",
        "shared/teacher/easy/seed-1",
        "shared/teacher/easy/seed-2",
    ]


@pytest.mark.parametrize("whose", ["lends", "borrows"])
def test_a_step_that_was_made_with_another_recipe_is_not_taken(
    tmp_path: Path, notes: Path, whose: str
) -> None:
    lends = study(tmp_path, "lends", shared={"teacher": TEACHER})
    path = study(tmp_path, "borrows", borrowed={"teacher": "../lends/study.yaml"})
    for each in (lends, path):
        run(each)
    done = ended(notes)
    changed = {**TEACHER, "overrides": {"train.steps": 9}}
    study(tmp_path, "lends", shared={"teacher": changed})
    for report_only in (False, True):
        with pytest.raises(UserError) as refused:
            run(tmp_path / whose / "study.yaml", report_only=report_only)
        said = "shared.teacher (easy, seed 0) was made with another recipe before; put that back"
        assert said in str(refused.value) and "\n" not in str(refused.value)
    # one that was made before this was noted is taken as it is
    for noted in (tmp_path / "lends" / "out").rglob("digest.txt"):
        noted.unlink()
    run(tmp_path / whose / "study.yaml")
    assert ended(notes) == done


def test_a_step_that_failed_may_get_another_recipe(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = study(tmp_path, "one", shared={"teacher": ONCE | {"overrides": {}}})
    monkeypatch.setenv("FAKE_FAIL", "shared/teacher/hard")
    with pytest.raises(UserError, match=r"shared\.teacher \(hard\) failed"):
        run(path)
    monkeypatch.delenv("FAKE_FAIL")
    mended = {**ONCE, "overrides": {}, "tasks": {"hard": {"train.steps": 9}}}
    run(study(tmp_path, "one", shared={"teacher": mended}))
    assert made(notes) == ["shared/teacher/easy", "shared/teacher/hard"]


def test_studies_that_borrow_from_each_other_are_refused(tmp_path: Path, notes: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        shared = {f"of_{name}": TEACHER}
        borrowed = {f"of_{other}": f"../{other}/study.yaml"}
        path = study(tmp_path, name, shared=shared, borrowed=borrowed, overrides={})
    with pytest.raises(UserError, match="a study that it borrows from borrows from it"):
        run(path)
    assert journal(notes) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"borrowed": {"general": "../lends/study.yaml"}}, "has no shared step 'general'; it has"),
        ({"tasks": {**TASKS, "other": {}}}, "makes it for other tasks or seeds, not other"),
        ({"seeds": [0, 7]}, "makes it for other tasks or seeds, not seed 7"),
        ({"shared": {"teacher": TEACHER}}, "teacher is shared and borrowed; leave one of them out"),
        ({"borrowed": {"teacher": "nowhere.yaml"}}, "nowhere.yaml: not a readable study"),
        ({"shared": {"two": ONCE}}, "is one a seed; set per_seed to true here as well"),
    ],
)
def test_what_can_not_be_borrowed_is_refused(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    study(tmp_path, "lends", shared={"teacher": TEACHER})
    path = study(tmp_path, "borrows", **{"borrowed": {"teacher": "../lends/study.yaml"}, **changes})
    with pytest.raises(UserError, match=expected) as refused:
        Plan(load_study(path), path)
    assert "\n" not in str(refused.value)
