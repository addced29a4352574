"""Runs on a task without padding: the same as padded ones, however a step is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_run, keys, read_losses, run_variants
from tiny_training import run_whole, save_classifier, save_encoder, summary_of, write_recipe
from tiny_training import write_task as write_tiny_task

from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.distributed import joined_ranks
from fastkd.errors import UserError
from fastkd.models.quantised import multiplies_int8
from fastkd.recipe import load_recipe
from fastkd.training.setup import set_up

MODULES = {
    "student_module": "bert.encoder.layer.1.output",
    "teacher_module": "bert.encoder.layer.3.output",
}
LOSSES: dict[str, Any] = {
    "attention": {},
    "divergence": {"loss": "attention", "kind": "kl"},
    "sequences": {"loss": "attention", "kind": "js", "mean_over": "sequences"},
    "relations": {},
    "hidden": {},
    "first": {"loss": "hidden", "tokens": "cls"},
    "mean": {"loss": "hidden", "tokens": "mean", "kind": "cosine"},
    "modules": {"loss": "hidden", **MODULES},
    "first_of_modules": {"loss": "hidden", "tokens": "cls", **MODULES},
    "embedding": {},
    "logits": {"kind": "kl"},
    "labels": {},
    "embedding_output": {"pooling": "last"},
    "fsp": {},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier")
    return tmp_path


def variant(folder: Path, name: str, **changes: Any) -> list[str]:
    return keys({"run.output": str(folder / name), **changes})


def test_losses_are_those_of_padded_batches(folder: Path) -> None:
    recipe = write_recipe(folder, "run", losses=LOSSES, train={"steps": 3})
    cut = {"task.padding": "none", "train.micro_batch_size": 2}
    stored = {**cut, "teacher.cache": "exact", "teacher.cache_folder": str(folder / "states")}
    variants = {
        "padded": {},
        "cut": cut,
        "recomputed": {**cut, "student.gradient_checkpointing": True},
        "stored": stored,
        "remade": {**stored, "teacher.cache_attention": "recomputed"},
    }
    run_variants(recipe, [variant(folder, name, **given) for name, given in variants.items()])
    padded = summary_of(folder / "padded")["after"]
    for name in variants.keys() - {"padded"}:
        assert_same_run(folder / name, folder / "padded", losses=2e-5, weights=2e-5)
        after = summary_of(folder / name)["after"]
        assert after["score"] == padded["score"]
        assert after["losses"] == pytest.approx(padded["losses"], rel=2e-5)
    labels = set(read_losses(folder / "padded")[0])
    assert labels > {"attention/1-2", "fsp/1-2..2-4", "embedding_output"}


def test_ranks_change_nothing(folder: Path) -> None:
    """Under ZeRO-3 also the teacher is in shards, and blocks are gathered one by one."""
    recipe = write_recipe(folder, "run", losses=LOSSES, train={"steps": 2})
    run_variants(recipe, [variant(folder, "padded")])
    given = {"task.padding": "none", "train.micro_batch_size": 2}
    sharded = {**given, "train.zero_stage": 3, "teacher.placement": "shard"}
    run_variants(recipe, [variant(folder, "1", **given), variant(folder, "3", **sharded)], ranks=2)
    for name in ("1", "3"):
        assert_same_run(folder / name, folder / "padded", losses=2e-5, weights=2e-5)


def test_fine_tuning_is_that_of_padded_batches(folder: Path) -> None:
    save_encoder(folder / "encoder")
    recipe = write_recipe(folder, "tuned", model={"name": str(folder / "encoder"), "dropout": 0.0})
    for name, padding in (("padded", "buckets"), ("packed", "none")):
        run_whole("finetune", recipe, *variant(folder, name, **{"task.padding": padding}))
    ours, theirs = (read_losses(folder / name) for name in ("packed", "padded"))
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert summary_of(folder / "packed")["after"]["score"] > 0


def test_a_run_goes_on_without_padding(folder: Path) -> None:
    train = {"steps": 4, "checkpoint_every": 2, "schedule": "constant"}
    recipe = write_recipe(folder, "run", train=train)
    none = {"task.padding": "none"}
    run_variants(recipe, [variant(folder, "whole"), variant(folder, "half", **{"train.steps": 2})])
    run_whole("distill", recipe, *variant(folder, "half", **none), "--resume")
    assert_same_run(folder / "half", folder / "whole", losses=2e-5, weights=2e-5)


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param(
            "int8",
            marks=pytest.mark.skipif(not multiplies_int8(), reason="int8 overflows without VNNI"),
        ),
    ],
)
def test_models_compute_no_padding(folder: Path, dtype: str) -> None:
    path = write_recipe(folder, "run", task={"padding": "none"})
    recipe = load_recipe(path, [f"teacher.dtype={dtype}"])
    with joined_ranks() as ranks:
        run = set_up(recipe, ranks, progress=False)
        assert isinstance(run.datamodule, TaskDataModule)
        read: list[tuple[int, ...]] = []
        for model in (run.module.student, run.teacher_model):
            assert model is not None
            block = model.bert.encoder.layer[0]
            block.register_forward_hook(lambda _m, _a, output: read.append(tuple(output.shape)))
        inputs = run.move(run.micro_batches().next_step(0)[0])
        total, _ = run.module(inputs, run.teacher(inputs), torch.ones(5))
        assert bool(total.isfinite())
        tokens = int(inputs["lengths"].sum())
        assert len(inputs["lengths"]) == 8 and read == [(1, tokens, 32)] * 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"compile": True}}, "another shape in every step, and train.compile keeps"),
        ({"train": {"cuda_graph": True}}, "in every step, and train.cuda_graph keeps a graph"),
        ({"student": {"layers": 2, "attention": "eager"}}, "but student.attention is eager"),
        (
            {"losses": {"attention": {}, "reduction": "tinybert"}},
            "losses.reduction is tinybert, which counts padding, but task.padding is none",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    recipe = write_recipe(folder, "run", task={"padding": "none"}, **changes)
    with pytest.raises(UserError, match=said):
        load_recipe(recipe, [])
