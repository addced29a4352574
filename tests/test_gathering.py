"""Losses that compare rows read all of a step, however it is cut into micro-batches and ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import assert_same_run, keys, make_recipe, run_script

import fastkd

SHARDED = {
    "train.zero_stage": 3,
    "deepspeed.zero_optimization": {"stage3_param_persistence_threshold": 0},
}
CUT = {"train.micro_batch_size": 2}
DEEPSPEED = {"deepspeed.wall_clock_breakdown": False}
# by number of ranks; ZeRO-3 changes the process that it runs in
PROCESSES: list[tuple[int, dict[str, dict[str, Any]]]] = [
    (
        1,
        {
            "one micro-batch": {},
            "8 micro-batches": CUT,
            "8 micro-batches, recomputed": {**CUT, "student.gradient_checkpointing": True},
            "8 micro-batches, stage 0": {**CUT, **DEEPSPEED, "train.zero_stage": 0},
        },
    ),
    (
        2,
        {
            "2 ranks, stage 1": {"train.zero_stage": 1},
            "2 ranks, 4 micro-batches, stage 0": {**CUT, "train.zero_stage": 0},
            "2 ranks, 4 micro-batches, stage 2": {**CUT, "train.zero_stage": 2},
        },
    ),
    (
        2,
        {
            "2 ranks, stage 3": SHARDED,
            "2 ranks, 4 micro-batches, stage 3": {**CUT, **SHARDED},
        },
    ),
]
VARIANTS = [name for _, variants in PROCESSES for name in variants]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Loss and norm of the gradient of every variant, then what they should be."""
    folder = tmp_path_factory.mktemp("gathering")
    losses: dict[str, Any] = {"attention": None, "hidden": None, "embedding": None, "rkd": {}}
    recipe = make_recipe(folder, student={"dropout": 0.3}, losses=losses, train={"batch_size": 16})
    found: dict[str, list[float]] = {}
    for ranks, variants in PROCESSES:
        batches = json.dumps([keys(values) for values in variants.values()])
        done = run_script("gathered_step.py", str(recipe), batches, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
        found |= dict(zip(variants, map(json.loads, lines), strict=True))
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_is_that_of_the_whole_batch(steps: dict[str, list[float]], name: str) -> None:
    loss, norm, expected_loss, expected_norm = steps[name]
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_weights_that_follow_the_losses_see_all_rows_too(tmp_path: Path) -> None:
    """The first step of `ratio` is looked at before it is made, and evaluations stand between."""
    recipe = make_recipe(tmp_path, losses={"rkd": {}, "balance": "ratio"}, train={"steps": 3})
    for name, size in (("whole", None), ("cut", 2)):
        overrides = {"run.output": str(tmp_path / name), "train.micro_batch_size": size}
        fastkd.distill(str(recipe), {**overrides, "train.evaluate_every": 1})
    assert_same_run(tmp_path / "cut", tmp_path / "whole", losses=1e-5, weights=2e-5)
