"""`student.freeze_word_embeddings`: the vocabulary stays under every engine, all else trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_run, keys, make_recipe, read_weights, run_variants
from tiny_training import summary_of
from transformers import AutoModel

from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.models import build_student, load_teacher
from fastkd.recipe import load_recipe, parse_recipe
from fastkd.training.memory import memory_parts

SHARDED = {"stage3_param_persistence_threshold": 0}
FROZEN = {"student.freeze_word_embeddings": True}
TABLE = "embeddings.word_embeddings.weight"
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "bf16": (1, {"train.precision": "bf16"}),
    "muon": (1, {"train.optimizer": "muon"}),
    "2 ranks, stage 1": (2, {"train.zero_stage": 1}),
    "2 ranks, stage 3": (2, {"train.zero_stage": 3, "deepspeed.zero_optimization": SHARDED}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("frozen")
    train = {"schedule": "constant", "warmup_steps": 1, "checkpoint_every": 3, "profile": True}
    recipe = make_recipe(folder, student={"hidden_size": 32}, train=train)
    found = {"recipe": recipe, "free": folder / "free", "whole": folder / "whole"}
    free = {"run.output": str(found["free"])}
    whole = {"run.output": str(found["whole"]), **FROZEN}
    run_variants(recipe, [keys(free), keys(whole)])
    for name, (ranks, changes) in VARIANTS.items():
        found[name] = folder / name.replace(" ", "-")
        given = {"run.output": str(found[name]), **FROZEN, **changes}
        run_variants(recipe, [keys(given)], ranks=ranks)
    return found


@pytest.mark.parametrize("name", ["whole", *VARIANTS])
def test_the_vocabulary_stays_and_all_else_trains(runs: dict[str, Path], name: str) -> None:
    teacher = AutoModel.from_pretrained(runs["recipe"].parent / "teacher").state_dict()
    student = read_weights(runs[name])
    (table,) = (key for key in student if key.endswith(TABLE))
    there = teacher[TABLE].to(torch.bfloat16) if name == "bf16" else teacher[TABLE]
    assert torch.equal(student[table].float(), there.float())
    begun = read_weights(runs["free"])
    assert not torch.equal(begun[table], teacher[TABLE])
    moved = [key for key in teacher if key.startswith("embeddings") and key != TABLE]
    assert moved and all(not torch.equal(student[key], teacher[key]) for key in moved)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "ranks" in name])
def test_it_is_the_same_run_on_ranks_and_stages(runs: dict[str, Path], name: str) -> None:
    assert_same_run(runs[name], runs["whole"], losses=1e-6, weights=1e-5)


def test_it_goes_on_with_other_ranks_and_stages(runs: dict[str, Path]) -> None:
    run = runs["recipe"].parent / "resumed"
    half = {"run.output": str(run), "train.steps": 3, **FROZEN}
    run_variants(runs["recipe"], [keys(half)])
    rest = {**half, "train.steps": 6, **VARIANTS["2 ranks, stage 3"][1]}
    run_variants(runs["recipe"], [keys(rest)], ranks=2)
    assert_same_run(run, runs["whole"], losses=1e-6, weights=1e-5)


def test_what_stays_needs_no_gradient_and_no_moments(runs: dict[str, Path]) -> None:
    recipe = load_recipe(runs["whole"] / "recipe.yaml")
    teacher = 4 * summary_of(runs["whole"])["parameters"]["teacher"]
    all_trained = memory_parts(recipe, teacher, 1000, 1)
    parts = memory_parts(recipe, teacher, 600, 1, frozen=400)
    assert parts["student weights"] == all_trained["student weights"]
    assert parts["gradients"] == 4 * 600 and parts["optimiser"] == 8 * 600
    counted = summary_of(runs["whole"])["profile"]["memory_bytes"]
    free = summary_of(runs["free"])["profile"]["memory_bytes"]
    table = AutoModel.from_pretrained(runs["recipe"].parent / "teacher").get_input_embeddings()
    assert free["gradients"] - counted["gradients"] == 4 * table.weight.numel()
    assert free["student weights"] == counted["student weights"]


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({"init": "random"}, "freeze_word_embeddings is on, but init is random"),
        (
            {"hidden_size": 24},
            "student.freeze_word_embeddings is on, but the teacher's have 32 numbers each and the "
            "student's 24",
        ),
    ],
)
def test_a_vocabulary_that_is_drawn_is_not_left_so(
    tmp_path: Path, student: dict[str, Any], expected: str
) -> None:
    given = {"layers": 2, "freeze_word_embeddings": True, **student}
    path = make_recipe(tmp_path, student={"hidden_size": 32})
    recipe = load_recipe(path).model_dump(mode="json")
    with pytest.raises(UserError, match=re.escape(expected)):
        read = parse_recipe({**recipe, "student": given})
        build_student(
            load_teacher(read.teacher.source), read.student, make_layer_map("uniform", 2, 4)
        )
