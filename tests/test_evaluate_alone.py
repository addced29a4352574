"""A run is scored on data of its own without that which it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_text
from tiny_rows import random_rows, row_recipe, write_rows
from tiny_runs import make_recipe
from tiny_training import save_classifier, write_recipe, write_task

import fastkd

LEAN: dict[str, Any] = {"quiet": True, "run.lean": True, "train.steps": 2, "train.warmup_steps": 0}


def _scored(run: fastkd.RunResult, **given: Any) -> dict[str, float]:
    return fastkd.evaluate(run, quiet=True, **given).losses


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_text(streaming: bool, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    heldout = str(write_text(tmp_path / "other.txt", documents=20, seed=9))
    given = {"data.heldout": heldout, "data.streaming": streaming}
    run = fastkd.distill(recipe, **LEAN, **given)
    (tmp_path / "corpus.txt").unlink()
    assert _scored(run) == pytest.approx(run.losses_after, rel=1e-5)
    (tmp_path / "few.txt").write_text("w5 w6\n")
    with pytest.raises(fastkd.UserError, match=r"data(\.heldout)?: .*less than one block of"):
        _scored(run, **{"data.heldout": str(tmp_path / "few.txt")})


def test_rows(tmp_path: Path) -> None:
    heldout = str(write_rows(tmp_path / "other.jsonl", random_rows(20, seed=3)))
    run = fastkd.distill(row_recipe(tmp_path), **LEAN, **{"data.heldout": heldout})
    # the rows that it was trained on are rows to be scored on as well
    again = _scored(run, **{"data.heldout": str(tmp_path / "rows.jsonl")})
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    assert _scored(run) == pytest.approx(run.losses_after, rel=1e-5)
    assert _scored(run, **{"data.heldout": str(tmp_path / "moved.jsonl")}) == again


@pytest.mark.parametrize("weights", [[1, 3], "balanced"])
def test_tasks(weights: Any, tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    lines = (tmp_path / "task" / "train.tsv").read_text().splitlines(keepends=True)
    # classes that are not balanced, unlike those of `dev`
    (tmp_path / "task" / "train.tsv").write_text("".join([*lines[:20], *lines[21:61:2]]))
    save_classifier(tmp_path / "classifier")
    recipe = write_recipe(tmp_path, "run", losses={"hidden": {}, "labels": {}})
    run = fastkd.distill(recipe, **LEAN, **{"task.class_weights": weights})
    if weights == "balanced":
        assert _scored(run) == pytest.approx(run.losses_after, rel=1e-5)
    (tmp_path / "task" / "train.tsv").unlink()
    if weights == "balanced":
        # the weights are those of what is trained on
        with pytest.raises(fastkd.UserError, match=r"no train\.tsv of tiny"):
            _scored(run)
    else:
        assert _scored(run) == pytest.approx(run.losses_after, rel=1e-5)
