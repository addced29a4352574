"""What an extra installs is not needed without it, and its absence is one line before anything."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from study_files import write_study
from tiny_runs import make_recipe, run_script
from tiny_training import save_classifier, write_recipe, write_task
from without_extras import ABSENT

from fastkd.errors import UserError
from fastkd.extras import PACKAGES, is_installed, need

ROOT = Path(__file__).parents[1]


def test_pyproject_and_what_is_asked_for_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert extras["all"] == [f"fastkd[{','.join(sorted(PACKAGES))}]"]
    for extra, packages in PACKAGES.items():
        named = {re.split(r"[^A-Za-z0-9._-]", line)[0] for line in extras[extra]}
        assert named == set(packages.values()), extra
        assert not any(line.startswith(name) for line in project["dependencies"] for name in named)
    assert {name for packages in PACKAGES.values() for name in packages} == ABSENT


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    need("a task", "tasks")
    monkeypatch.setitem(
        PACKAGES, "study", {"json": "json", "absent_one": "one", "absent_two": "two"}
    )
    with pytest.raises(UserError) as refused:
        need("fastkd study", "study")
    assert str(refused.value) == "fastkd study needs one and two; pip install 'fastkd[study]'"
    need("a picture", "study", "json")


def test_a_trainer_without_accelerate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.extras.is_installed", lambda package: package != "accelerate")
    with pytest.raises(UserError) as refused:
        from fastkd.integrations import DistillationTrainer  # noqa: F401
    assert str(refused.value) == (
        "fastkd.integrations.DistillationTrainer needs accelerate; pip install 'fastkd[trainer]'"
    )


def test_a_folder_without_code_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leftover_of_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("leftover_of_a_tracker") and is_installed("json")


@pytest.mark.slow
def test_a_run_needs_no_extra_and_what_does_says_so(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, train={"steps": 1, "warmup_steps": 0})
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier")
    task = write_recipe(tmp_path, "tasked")
    teacher = str(tmp_path / "teacher")
    commands = {
        "distill": ["distill", str(recipe)],
        "evaluate": ["evaluate", str(tmp_path / "run")],
        "study": ["study", str(write_study(tmp_path))],
        "fields": ["fields", "--of", "study"],
        "export": ["export", str(tmp_path / "run"), "--onnx"],
        "inspect": ["inspect", teacher, teacher, "--data", "none", "--output", "pictures"],
        "task": ["distill", str(task)],
        "monitor": ["distill", str(recipe), "run.monitor=wandb", "run.output=other"],
    }
    done = run_script("without_extras.py", json.dumps(list(commands.values())), fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    codes, imported = json.loads(done.stdout.splitlines()[-1])
    assert dict(zip(commands, codes, strict=True)) == {
        **dict.fromkeys(("distill", "evaluate"), 0),
        **dict.fromkeys(("study", "fields", "export", "inspect", "task", "monitor"), 2),
    }
    assert imported == []
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    assert [line for line in done.stderr.splitlines() if line.startswith("fastkd: ")] == [
        "fastkd: fastkd study needs optuna and cmaes and matplotlib; pip install 'fastkd[study]'",
        "fastkd: fastkd fields --of study needs optuna and cmaes and matplotlib; pip install "
        "'fastkd[study]'",
        "fastkd: fastkd export --onnx needs onnx and onnxruntime and onnxscript; pip install "
        "'fastkd[onnx]'",
        "fastkd: fastkd inspect --output needs matplotlib; pip install 'fastkd[study]'",
        "fastkd: a task needs scikit-learn; pip install 'fastkd[tasks]'",
        "fastkd: run.monitor=wandb needs wandb; pip install 'fastkd[wandb]', or run.monitor=none",
    ]
    for left in ("out", "tasked", "other"):
        assert not (tmp_path / left).exists()
