"""A study takes the teachers that another one made, and none that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study_files import TASKS, TUNING, journal, run, write_study

from fastkd.errors import UserError
from fastkd.study import load_study
from fastkd.study.plan import Plan, Run

TEACHER = {"command": "finetune", "recipe": TUNING, "per_task": True, "per_seed": True}
ONCE = {**TEACHER, "per_seed": False, "overrides": {"model.name": "{shared.teacher}"}}
TAUGHT = {"teacher.model": "{shared.teacher}/student"}


def study(folder: Path, name: str, **changes: Any) -> Path:
    (folder / name).mkdir(exist_ok=True)
    return write_study(folder / name, **{"tasks": TASKS, "overrides": TAUGHT, **changes})


def test_what_is_borrowed_is_made_once_and_read_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "journal"
    monkeypatch.setenv("FAKE_JOURNAL", str(notes))
    lends = study(tmp_path, "lends", shared={"teacher": TEACHER})
    path = study(tmp_path, "borrows", borrowed={"teacher": "../lends/study.yaml"}, seeds=[1, 0])
    with pytest.raises(UserError, match=r"borrowed\.teacher: .* is not finished; run the study"):
        run(path)
    assert not (tmp_path / "borrows" / "out" / "runs").exists()
    run(lends, workers=2)
    run(path, workers=2)
    ended = [name for word, name in journal(notes) if word == "end"]
    teachers = {name for name in ended if name.startswith("shared/")}
    assert teachers == {f"shared/teacher/{task}/seed-{seed}" for task in TASKS for seed in (0, 1)}
    assert len([name for name in ended if name.startswith("shared/")]) == 4
    plan = Plan(load_study(path), path)
    recipe = plan.recipe(Run(plan.conditions[0], "hard", 1))
    made = tmp_path / "lends" / "out" / "shared" / "teacher" / "hard" / "seed-1" / "run"
    assert recipe.teacher.model == str(made / "student")


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
