"""Terms, mappings and weights that change over a run: the same however it is cut, sharded, killed.

One recipe holds them all: a language model's head (tied to the embeddings), masked inputs, a random
and a transported mapping, weights that follow the losses or are learned.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_config
from tiny_runs import (
    assert_same_run,
    keys,
    make_recipe,
    read_losses,
    read_weights,
    run_script,
    run_variants,
)

SHARDED = {
    "train.zero_stage": 3,
    "deepspeed.zero_optimization": {"stage3_param_persistence_threshold": 0},
}
LEARNED = {"losses.balance": "uncertainty"}
KILLED = {"train.checkpoint_every": 2}
LOSSES: dict[str, Any] = {
    # a softmax does not see key biases: Adam would make noise of their gradient
    "attention": {"kind": "score_mse", "layer_map": "emd"},
    "relations": {"relations": ["vv"], "relation_heads": 4, "layer_map": "mean_loss"},
    "hidden": {
        "kind": "normalized_mse",
        "weight": 2.0,
        "layer_map": {"kind": "random", "redraw": "step"},
    },
    "embedding": {"kind": "cosine", "schedule": {"kind": "linear"}},
    "logits": {"kind": "js", "temperature": 2.0},
    "mlm": {"probability": 0.3},
    "balance": "ratio",
}
# a run killed after step 3 is one of those that are continued
PROCESSES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one rank": (
        1,
        {
            "ratio": {},
            "ratio, 4 micro-batches, stage 0": {
                "train.micro_batch_size": 2,
                "train.zero_stage": 0,
            },
            "ratio, killed": KILLED,
            "uncertainty": LEARNED,
        },
    ),
    "one rank, ZeRO-3": (1, {"uncertainty, stage 3": {**LEARNED, **SHARDED}}),
    "two ranks, ZeRO-3": (
        2,
        {"ratio, 2 ranks, stage 3, sharded teacher": {"teacher.placement": "shard", **SHARDED}},
    ),
}
BASELINES = ("ratio", "uncertainty")
VARIANTS = [name for _, runs in PROCESSES.values() for name in runs if name not in BASELINES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folder of every variant."""
    folder = tmp_path_factory.mktemp("objectives")
    student = {"layers": 2, "hidden_size": 24, "intermediate_size": 48, "head": "masked_lm"}
    recipe = make_recipe(folder, student=student, losses=LOSSES)
    torch.manual_seed(0)
    teacher = transformers.AutoModelForMaskedLM.from_config(tiny_config("bert"))
    assert teacher.config.tie_word_embeddings
    teacher.save_pretrained(folder / "teacher")
    found = {
        name: folder / name.replace(" ", "-").replace(",", "")
        for _, variants in PROCESSES.values()
        for name in variants
    }
    arguments = keys({"run.output": str(found["ratio, killed"]), **KILLED})
    killed = run_script("disturbed_run.py", "between two checkpoints", "0", str(recipe), *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    for ranks, variants in PROCESSES.values():
        batches = [keys({"run.output": str(found[n]), **v}) for n, v in variants.items()]
        output = run_variants(recipe, batches, ranks=ranks)
        if "ratio, killed" in variants:
            assert f"continuing from {found['ratio, killed']}" in output
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_equals_its_baseline(runs: dict[str, Path], name: str) -> None:
    baseline = runs[name.split(",")[0]]
    assert_same_run(runs[name], baseline, losses=1e-5, weights=2e-5)


def test_killed_and_resumed_is_bit_identical(runs: dict[str, Path]) -> None:
    mine, theirs = (read_weights(runs[name]) for name in ("ratio, killed", "ratio"))
    assert all(weight.equal(theirs[name]) for name, weight in mine.items())
    assert read_losses(runs["ratio, killed"]) == read_losses(runs["ratio"])


def test_every_loss_of_every_link_is_logged(runs: dict[str, Path]) -> None:
    labels = {
        *(f"attention/{s}-{t}" for s in (1, 2) for t in (1, 2, 3, 4)),
        *(f"relations.vv/{pair}" for pair in ("1-1", "1-2", "2-3", "2-4")),
        *("hidden/1-*", "hidden/2-*", "embedding/0-0", "logits", "mlm"),
    }
    for step in read_losses(runs["uncertainty"]):
        assert step.keys() == labels
    assert not any("log_variances" in name for name in read_weights(runs["uncertainty"]))
