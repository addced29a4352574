"""A study of real runs, small: the command line in child processes, a tuned teacher, a report."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_models import save_teacher

from fastkd.cli import main
from fastkd.recipe import load_recipe

MAPS = {"last": 4, "first": 1}


def _write_task(folder: Path) -> str:
    """Sentences whose class is told by the first word."""
    folder.mkdir()
    for name, count in (("train", 48), ("dev", 24)):
        rows = [{"text": f"w{5 + i % 2} w{7 + i % 13}", "label": str(i % 2)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def _write_study(folder: Path) -> Path:
    task = {
        "name": "tiny",
        "source": _write_task(folder / "task"),
        "columns": {"texts": "text", "label": "label"},
        "labels": ["0", "1"],
        "max_length": 8,
        "cache": str(folder / "cache"),
    }
    train = {"steps": 8, "batch_size": 8, "learning_rate": 1e-3, "log_every": 4}
    study = {
        "name": "real",
        "output": str(folder / "study"),
        "recipe": {
            "teacher": {"model": "the shared one"},
            "student": {"layers": 1},
            "losses": {"hidden": {"weight": 1.0}, "logits": {"weight": 1.0}},
            "task": task,
            "train": train,
            "run": {"output": "the study's"},
        },
        "overrides": {"teacher.model": "{shared.teacher}/student"},
        "shared": {
            "teacher": {
                "command": "finetune",
                "recipe": {
                    "model": str(save_teacher(folder / "teacher")),
                    "task": task,
                    "train": train,
                    "run": {"output": "the study's"},
                },
            }
        },
        "axes": {"mapping": {name: {"layer_map": name} for name in MAPS}},
        "seeds": 2,
        "metric": {"path": "after.score", "direction": "maximize", "heldout": "score"},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def check_by_hand(rows: list[dict[str, str]], last: dict[str, str]) -> None:
    """The table's numbers from the predictions that were kept, and nothing else."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        arrays = np.load(Path(row["folder"]) / "run" / "predictions.npz", allow_pickle=False)
        outputs, labels = arrays["dev/outputs"], arrays["dev/labels"]
        right = float((outputs.argmax(axis=1) == labels).mean())
        assert right == pytest.approx(float(row["value"]))
        scores.setdefault(row["mapping"], []).append(right)
        floor = np.bincount(labels).max() / len(labels)
        teacher = float((arrays["dev/teacher"].argmax(axis=1) == labels).mean())
    assert float(last["all mean"]) == pytest.approx(np.mean(scores["last"]))
    gaps = np.subtract(scores["last"], scores["first"])
    assert float(last["difference mean"]) == pytest.approx(gaps.mean())
    if last.get("kept mean"):
        share = (np.mean(scores["last"]) - floor) / (teacher - floor)
        assert float(last["kept mean"]) == pytest.approx(share)


def test_study_of_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write_study(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["fastkd", "study", str(path), "--workers", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    report = tmp_path / "study" / "report"
    teacher = tmp_path / "study" / "shared" / "teacher" / "run"
    with (report / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and {row["state"] for row in rows} == {"finished"}
    for row in rows:
        run = Path(row["folder"]) / "run"
        recipe = load_recipe(run / "recipe.yaml")
        summary = json.loads((run / "summary.json").read_text())
        assert recipe.teacher.model == str(teacher / "student")
        assert recipe.train.seed == int(row["seed"])
        assert summary["layer_map"] == [[1, MAPS[row["mapping"]]]]
        assert float(row["value"]) == summary["after"]["score"]
        # the student stays, the checkpoints don't
        assert (run / "student" / "model.safetensors").is_file()
        assert not (run / "checkpoints").exists()
    with (report / "axis-mapping.csv").open() as file:
        last = next(row for row in csv.DictReader(file) if row["mapping"] == "last")
    check_by_hand(rows, last)
