"""The README's section on Python runs as it stands there, from the first block to the last."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import write_text
from tiny_runs import make_recipe
from transformers import AutoModel

import fastkd

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("\n## From Python\n")[1].split("\n## ")[0]
DISTIL, LOOP, TRAINER, LOSS, WITH_IT = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)

Names = dict[str, object]


def execute(block: str, names: Names) -> None:
    exec(compile(block, "README.md", "exec"), names)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Names]:
    """What the blocks leave: each goes on from the one before, in a folder with what they name."""
    folder, before = tmp_path_factory.mktemp("readme"), Path.cwd()
    make_recipe(folder)
    write_text(folder / "other.txt", documents=40, words=30, seed=3)
    os.chdir(folder)
    try:
        yield {}
    finally:
        os.chdir(before)


def test_a_run(names: Names, capsys: pytest.CaptureFixture[str]) -> None:
    execute(DISTIL, names)
    result = names["result"]
    assert isinstance(result, fastkd.RunResult) and result.summary["steps"] == 100
    before, after = (
        found["attention/1-2"] for found in (result.losses_before, result.losses_after)
    )
    assert after < before
    said = capsys.readouterr().out
    assert f"{before} {after}\n" in said and "{'attention/1-2': " in said


def test_a_loop(names: Names) -> None:
    execute(LOOP, names)
    student, saved = names["student"], AutoModel.from_pretrained("student")
    assert isinstance(student, torch.nn.Module)
    kept = saved.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in student.state_dict().items())


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="transformers' Trainer needs accelerate",
)
def test_a_trainer(names: Names) -> None:
    before = AutoModel.from_pretrained("student").state_dict()
    execute(TRAINER, names)
    after = AutoModel.from_pretrained("student").state_dict()
    key = "encoder.layer.0.output.dense.weight"
    assert after.keys() == before.keys() and not torch.equal(after[key], before[key])


def test_a_loss_of_ones_own(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("lengths.py").write_text(LOSS, encoding="utf-8")
    monkeypatch.syspath_prepend(Path.cwd())
    execute(WITH_IT, names)
    result = names["result"]
    assert isinstance(result, fastkd.RunResult)
    assert 0 < result.losses_after["lengths"] < result.losses_before["lengths"]
