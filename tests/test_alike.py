"""Ranks that are given another recipe than rank 0, or read other data or another teacher, are told
so before the first step; who reads nothing says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import save_teacher, write_text
from tiny_runs import make_recipe, run_script
from transformers import PreTrainedModel

from fastkd.models import load_teacher
from fastkd.training.alike import model_digest
from fastkd.types import ModelSource


def apart(folder: Path, *, streaming: bool = True) -> Path:
    """A recipe that names its teacher and its text by where it is run, and both for two ranks."""
    recipe = make_recipe(folder)
    tree = yaml.safe_load(recipe.read_text())
    tree["teacher"] = {"model": "teacher"}
    tree["data"] |= {"train": "corpus.txt"}
    if streaming:
        tree["data"] |= {"streaming": True, "shuffle_buffer": 5}
    tree["train"]["steps"] = 3
    recipe.write_text(yaml.safe_dump(tree))
    for rank in ("0", "1"):
        (folder / rank).mkdir()
        shutil.copytree(folder / "teacher", folder / rank / "teacher")
        shutil.copy(folder / "corpus.txt", folder / rank)
    return recipe


def said(folder: Path, recipe: Path, *overrides: str) -> list[str]:
    done = run_script("run_apart.py", str(folder), "distill", str(recipe), *overrides, ranks=2)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return [line for line in done.stderr.splitlines() if line.startswith("fastkd: ")]


def test_ranks_that_read_the_same_train(tmp_path: Path) -> None:
    assert said(tmp_path, apart(tmp_path)) == []
    assert (tmp_path / "run" / "student").is_dir()


@pytest.mark.parametrize("what", ["text", "teacher", "tokenizer"])
def test_a_rank_that_reads_something_else_is_named(tmp_path: Path, what: str) -> None:
    recipe, second = apart(tmp_path), tmp_path / "1"
    if what == "text":
        write_text(second / "corpus.txt", documents=59, words=60)
    elif what == "teacher":
        save_teacher(second / "teacher", seed=1)
    else:
        file = second / "teacher" / "tokenizer.json"
        tree = json.loads(file.read_text())
        tree["model"]["vocab"] |= {"w10": 11, "w11": 10}
        file.write_text(json.dumps(tree))
    named = {"text": "data (train)", "teacher": "teacher.model", "tokenizer": "tokenizer"}[what]
    lines = said(tmp_path, recipe)
    assert lines and all(line.startswith(f"fastkd: {named}: rank 1 (") for line in lines), lines
    assert "another than rank 0; let every machine see the same" in lines[0]
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        ("teacher", "teacher.model teacher: "),
        ("corpus.txt", "data: no file or folder 'corpus.txt'"),
        ("cache", "data.cache: cache/"),
    ],
)
def test_a_rank_that_reads_nothing_says_so(tmp_path: Path, missing: str, why: str) -> None:
    recipe = apart(tmp_path, streaming=False)
    given = ["data.cache=cache"] if missing == "cache" else []
    if missing == "teacher":
        shutil.rmtree(tmp_path / "1" / missing)
    elif missing == "corpus.txt":
        (tmp_path / "1" / missing).unlink()
    lines = said(tmp_path, recipe, *given)
    alone = [line for line in lines if line.startswith("fastkd: rank 1: ")]
    assert len(alone) == 1 and why in alone[0], lines
    others = [line for line in lines if line not in alone]
    assert len(others) <= 1 and all("if it says why itself, mend that" in x for x in others), lines


def test_what_no_rank_can_read_is_said_once(tmp_path: Path) -> None:
    recipe = apart(tmp_path)
    for rank in ("0", "1"):
        shutil.rmtree(tmp_path / rank / "teacher")
    (line,) = said(tmp_path, recipe)
    assert line.startswith("fastkd: teacher.model teacher: ")


def test_ranks_are_asked_for_the_same(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, train={"steps": 1, "warmup_steps": 0})
    (tmp_path / "there").symlink_to(tmp_path)
    one = ["distill", "run.output=" + str(tmp_path / "other")]
    whole = ["distill"]
    cases: dict[str, tuple[list[str], list[str]]] = {
        "": (whole, [*whole, "data.workers=1", f"data.train={tmp_path / 'there/corpus.txt'}"]),
        "train.learning_rate: {} was given 0.01, rank 0 0.001; give all ranks the same recipe": (
            one,
            [*one, "train.learning_rate=0.01"],
        ),
        "losses.hidden.weight: {} was given 3.0, rank 0 2.0;": (
            one,
            [*one, "losses.hidden.weight=3"],
        ),
        'layer_map: {} was given "last", rank 0 "uniform";': (one, [*one, "layer_map=last"]),
        "train.order_seed: {} was given 5, rank 0 null;": (one, [*one, "train.order_seed=5"]),
        "run.output: {} was given ": (one, whole),
        "resume: {} was given true, rank 0 false;": (one, ["resume", *one[1:]]),
        'command: {} was given "doctor", rank 0 "distill";': (one, ["doctor", *one[1:]]),
        "train.batch_size: {} was given 4, rank 0 8;": (
            ["doctor"],
            ["doctor", "train.batch_size=4"],
        ),
        "data.block_size: {} was given 8, rank 0 16;": (
            ["evaluate"],
            ["evaluate", "data.block_size=8"],
        ),
    }
    done = run_script("asked_apart.py", str(recipe), json.dumps(list(cases.values())), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first == second and len(first) == len(cases)
    for line, expected in zip(first, cases, strict=True):
        start, _, end = expected.partition("{}")
        assert line.startswith(start) and end in line and ("rank 1 (" in line) == bool(line), line
        assert bool(line) == bool(expected), line
    # nothing is begun
    assert not (tmp_path / "other").exists()


def test_the_digest_of_a_model_is_of_its_weights_and_settings(tmp_path: Path) -> None:
    def read(name: str) -> PreTrainedModel:
        return load_teacher(ModelSource(str(tmp_path / name)))

    save_teacher(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    first, second = read("one"), read("other")
    digest = model_digest(first)
    assert model_digest(second) == digest
    with torch.no_grad():
        weight = next(p for p in second.parameters() if p.ndim > 1)
        weight[-1, -2] = torch.nextafter(weight[-1, -2], weight.new_tensor(9.0))
    assert model_digest(second) != digest
    with torch.no_grad():
        weight.copy_(next(p for p in first.parameters() if p.ndim > 1))
    assert model_digest(second) == digest
    second.config.layer_norm_eps *= 2
    assert model_digest(second) != digest
