"""Python of README and documentation runs as it stands there, each page from top to bottom, and
so do the commands of the quick start."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from own_registries import registries_apart
from pages import all_blocks, blocks_of, commands_of
from tiny_models import save_teacher, write_text
from tiny_runs import make_recipe
from tiny_training import fastkd as run_fastkd
from transformers import AutoModel

import fastkd

Names = dict[str, Any]
# pages of a folder of its own, whose commands are run too, stand in test_docs_extend.py
BLOCKS = [
    block
    for block in all_blocks("python")
    if not block.notes.keys() & {"not run", "ranks"} and not block.page.startswith("docs/extend/")
]


def a_run(names: Names, said: str) -> None:
    result = names["result"]
    assert isinstance(result, fastkd.RunResult) and result.summary["steps"] == 100
    before, after = (
        found["attention/1-2"] for found in (result.losses_before, result.losses_after)
    )
    assert after < before and "{'attention/1-2': " in said


def a_run_and_its_evaluation(names: Names, said: str) -> None:
    a_run(names, said)
    assert "{'attention/1-2': " in said


def a_run_and_a_loop(names: Names, said: str) -> None:
    a_run(names, said)
    assert names["parts"]["attention/1-2"] > 0
    gradients = [weight.grad for weight in names["student"].parameters()]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert all(weight.grad is None for weight in names["teacher"].parameters())


def a_loop(names: Names, said: str) -> None:
    kept = AutoModel.from_pretrained("student").state_dict()
    assert all(
        torch.equal(kept[key], value) for key, value in names["student"].state_dict().items()
    )
    # what the trainer goes on from
    names["_before"] = kept


def a_trainer(names: Names, said: str) -> None:
    before, after = names["_before"], AutoModel.from_pretrained("student").state_dict()
    key = "encoder.layer.0.output.dense.weight"
    assert after.keys() == before.keys() and not torch.equal(after[key], before[key])


def a_loss(names: Names, said: str) -> None:
    result = names["result"]
    assert isinstance(result, fastkd.RunResult)
    assert 0 < result.losses_after["lengths"] < result.losses_before["lengths"]


def gradients_of_the_kernel(names: Names, said: str) -> None:
    last = names["student"].encoder.layer[2]
    assert last.attention.self.query.weight.grad.abs().max() > 0
    assert last.output.dense.weight.grad is None


def a_path(names: Names, said: str) -> None:
    a_run(names, said)
    assert str(Path("runs/first/student")) in said
    AutoModel.from_pretrained("runs/first/student")


# what a block left, by its page and heading
LEFT: dict[tuple[str, str], Callable[[Names, str], None]] = {
    ("README.md", "Ten lines of Python"): a_run_and_a_loop,
    ("docs/quick-start.md", "A first model that is yours"): a_path,
    ("docs/quick-start.md", "A loss of your own"): a_loss,
    ("docs/guide/loop.md", "A run"): a_run_and_its_evaluation,
    ("docs/guide/loop.md", "Your own loop"): a_loop,
    ("docs/guide/loop.md", "transformers' Trainer"): a_trainer,
    ("docs/guide/loop.md", "The kernels alone"): gradients_of_the_kernel,
}


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}))
def test_python_of_a_page(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_recipe(tmp_path)
    write_text(tmp_path / "other.txt", documents=40, words=30, seed=3)
    monkeypatch.chdir(tmp_path)
    names: Names = {"__name__": "__main__"}
    with registries_apart(monkeypatch, tmp_path):
        for block in (block for block in BLOCKS if block.page == page):
            if block.title is not None:
                Path(block.title).write_text(block.text, encoding="utf-8")
                continue
            if (needed := block.notes.get("needs")) and importlib.util.find_spec(needed) is None:
                pytest.skip(f"the rest of {page} from line {block.line} needs {needed}")
            exec(compile(block.text, block.place, "exec"), names)
            if (left := LEFT.get((page, block.heading))) is not None:
                left(names, capsys.readouterr().out)


def test_what_is_checked_is_there() -> None:
    there = {(block.page, block.heading) for block in BLOCKS if block.title is None}
    assert LEFT.keys() <= there


def test_commands_of_the_quick_start_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (
        block
        for block in blocks_of("docs/quick-start.md")
        if block.language == "sh" and block.heading == "Your own teacher and text"
        if "fastkd init" in block.text
    )
    save_teacher(tmp_path / "TEACHER")
    write_text(tmp_path / "text.txt", documents=200, words=60)
    write_text(tmp_path / "other.txt", documents=40, words=30, seed=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for program, *arguments in commands_of(block):
        assert program == ".venv/bin/fastkd"
        if arguments[0] in ("distill", "doctor"):
            # a few of the recipe's steps
            has_steps = any(word.startswith("train.steps=") for word in arguments)
            arguments += ["train.batch_size=4", *([] if has_steps else ["train.steps=8"])]
        if arguments[0] == "evaluate":
            arguments[1] = yaml.safe_load(Path("recipe.yaml").read_text())["run"]["output"]
        code = run_fastkd(*arguments, monkeypatch=monkeypatch)
        assert code == 0, (arguments, capsys.readouterr().err)
    assert Path("runs/try/student/config.json").is_file()
