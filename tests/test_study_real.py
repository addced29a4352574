"""A study of real runs, small: the command line in child processes, a shared step, a report."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import make_recipe

from fastkd.cli import main
from fastkd.recipe import load_recipe


def test_study_of_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_recipe(
        tmp_path,
        student={"layers": 1, "hidden_size": 32, "init": "random"},
        train={"steps": 3, "evaluate_every": 1, "learning_rate": 0.01},
    )
    study = {
        "name": "real",
        "output": str(tmp_path / "study"),
        "recipe": "recipe.yaml",
        "overrides": {"teacher.model": "{shared.assistant}/student"},
        "shared": {
            "assistant": {
                "command": "distill",
                "recipe": "recipe.yaml",
                "overrides": {"student.layers": 2, "student.init": "teacher"},
            }
        },
        "axes": {"mapping": {"last": {"layer_map": "last"}, "first": {"layer_map": "first"}}},
        "seeds": 2,
        "metric": {
            "path": "after.sentence_cosine",
            "direction": "maximize",
            "heldout": "sentence_cosine",
        },
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    monkeypatch.setattr(sys, "argv", ["fastkd", "study", str(path), "--workers", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    report = tmp_path / "study" / "report"
    assistant = tmp_path / "study" / "shared" / "assistant" / "run"
    assert json.loads((assistant / "summary.json").read_text())["layer_map"] == [[1, 2], [2, 4]]
    with (report / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and {row["state"] for row in rows} == {"finished"}
    for row in rows:
        run = Path(row["folder"]) / "run"
        recipe, summary = (
            load_recipe(run / "recipe.yaml"),
            json.loads((run / "summary.json").read_text()),
        )
        assert recipe.teacher.model == str(assistant / "student")
        assert (recipe.layer_map, recipe.train.seed) == (row["mapping"], int(row["seed"]))
        assert summary["layer_map"] == [[1, 2 if row["mapping"] == "last" else 1]]
        assert float(row["value"]) == summary["after"]["sentence_cosine"]
        # the student stays, the checkpoints don't
        assert (run / "student" / "model.safetensors").is_file()
        assert not (run / "checkpoints").exists()
    assert len({row["value"] for row in rows}) == 4
    assert "first" in (report / "report.html").read_text()
