"""A task that a tiny model can learn, its files, a model to tune, and runs in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import tiny_config, tiny_model, tiny_tokenizer
from tiny_runs import run_command
from transformers import AutoModelForSequenceClassification

from fastkd.cli import main

# every second word says the class
GOOD, BAD = "w5", "w6"


def write_task(folder: Path, count: int = 96, *, scores: bool = False, seed: int = 0) -> Path:
    """A separable task of two classes, or of a score, as `train.tsv` and `dev.tsv`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for split, size in (("train", count), ("dev", 40)):
        lines = ["text\tlabel"]
        for number in range(size):
            length = int(torch.randint(3, 20, (1,), generator=generator))
            words = [f"w{i}" for i in torch.randint(7, 64, (length,), generator=generator).tolist()]
            words[::2] = [GOOD if number % 2 else BAD] * len(words[::2])
            label = f"{4.0 * (number % 2) + 0.5}" if scores else ("no", "yes")[number % 2]
            lines.append(f"{' '.join(words)}\t{label}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def task_section(folder: Path, *, scores: bool = False) -> dict[str, Any]:
    """The task in a recipe."""
    kind: dict[str, Any] = {"bounds": [0, 5]} if scores else {"labels": ["no", "yes"]}
    return {
        "name": "tiny",
        "source": str(folder / "task"),
        "columns": {"texts": "text", "label": "label"},
        "max_length": 32,
        "cache": str(folder / "cache"),
        **kind,
    }


def save_classifier(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A tiny classifier with a random head, as a teacher's folder."""
    torch.manual_seed(seed)
    config = tiny_config("bert", **changes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    """A tiny model without a classification head, and its tokenizer."""
    tiny_model("bert").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_recipe(folder: Path, name: str, **sections: Any) -> Path:
    """A recipe of either kind on the task of the folder; it writes to `folder/name`."""
    kind = {"model": str(folder / "encoder")} if name.startswith("tuned") else distillation(folder)
    train = {"batch_size": 8, "learning_rate": 1e-3, "log_every": 1, "steps": 6}
    tree = {
        **kind,
        "task": task_section(folder),
        "train": train,
        "run": {"output": str(folder / name)},
    }
    for key, given in sections.items():
        both = isinstance(given, dict) and isinstance(tree.get(key), dict) and key != "losses"
        tree[key] = {**tree[key], **given} if both else given
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def distillation(folder: Path) -> dict[str, Any]:
    """Teacher, student and losses of a recipe."""
    return {
        "teacher": {"model": str(folder / "classifier")},
        "student": {"layers": 2},
        "losses": {"attention": {}, "hidden": {}, "logits": {"kind": "soft_ce"}, "labels": {}},
    }


def fastkd(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command line in this process, for what is refused before a step; its exit code."""
    monkeypatch.setattr(sys, "argv", ["fastkd", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    code = stopped.value.code
    return code if isinstance(code, int) else 0 if code is None else 1


def run_whole(command: str, target: Path, *arguments: str) -> str:
    """The command line in a process of its own, which must end well; what it said."""
    done = run_command(command, str(target), *arguments)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def summary_of(run: Path) -> dict[str, Any]:
    """What a finished run says."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found
