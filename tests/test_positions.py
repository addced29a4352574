"""Models that count positions from the padding on have fewer than they say: refused in time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import POSITIONS, save_teacher, tiny_config, tiny_tokenizer
from tiny_runs import make_recipe
from tiny_training import fastkd, write_recipe, write_task
from transformers import AutoModelForSequenceClassification

SAYS = POSITIONS + 1
"""Positions in the tiny RoBERTa's configuration; the first belongs to the padding."""


def tuning(folder: Path) -> tuple[str, Path, str]:
    write_task(folder / "task")
    save_teacher(folder / "encoder", "roberta")
    return "finetune", write_recipe(folder, "tuned", task={"max_length": SAYS}), "task.max_length"


def task(folder: Path) -> tuple[str, Path, str]:
    write_task(folder / "task")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config("roberta"))
    model.save_pretrained(folder / "classifier")
    tiny_tokenizer().save_pretrained(folder / "classifier")
    return "distill", write_recipe(folder, "run", task={"max_length": SAYS}), "task.max_length"


def text(folder: Path) -> tuple[str, Path, str]:
    recipe = make_recipe(folder, "roberta", data={"block_size": SAYS})
    return "distill", recipe, "data.block_size"


@pytest.mark.parametrize("kind", [tuning, task, text])
def test_as_many_tokens_as_positions_are_too_many_for_roberta(
    kind: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert callable(kind)
    command, recipe, field = kind(tmp_path)
    capfd.readouterr()
    assert fastkd(command, str(recipe), monkeypatch=monkeypatch) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert field in lines[-1] and sum("fastkd: " in line for line in lines) == 1
    assert not (tmp_path / "tuned").exists() and not (tmp_path / "run").exists()
