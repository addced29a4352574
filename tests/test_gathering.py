"""Losses that compare rows read all of a step, however it is cut into micro-batches and ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_rows import row_recipe
from tiny_runs import assert_same_run, keys, make_recipe, run_script

import fastkd
from fastkd.training.run_folder import RunFolder

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


def test_a_run_that_goes_on_with_smaller_micro_batches_keeps_the_same_best(tmp_path: Path) -> None:
    """An evaluation compares as many rows as a step has, whatever a micro-batch holds."""
    losses = {"rkd": {}, "similarity": {"weight": 30}}
    # the rate is so large that the best student is one in the middle
    train = {"learning_rate": 0.02, "schedule": "constant", "evaluate_every": 1}
    recipe = row_recipe(tmp_path, losses=losses, train=train, run={"keep_best": "rkd"})

    def run(name: str, size: int | None, **given: Any) -> dict[str, Any]:
        overrides = {"run.output": str(tmp_path / name), "train.steps": 6}
        overrides |= {"train.micro_batch_size": size, "train.checkpoint_every": 1}
        return fastkd.distill(str(recipe), overrides, quiet=True, **given).summary

    whole = run("whole", None)
    assert 0 < whole["exported_step"] < 6
    with pytest.raises(ZeroDivisionError):
        run("cut", 8, on_evaluate=lambda step, _: 1 // (3 - step))
    cut = run("cut", 1, resume=True)
    assert cut["exported_step"] == whole["exported_step"]
    lines = [RunFolder(tmp_path / name).read_metrics() for name in ("whole", "cut")]
    one, other = ([x for x in each if x["kind"] == "heldout"] for each in lines)
    assert len(one) == 7
    for expected, found in zip(one, other, strict=True):
        for label in ("rkd", "similarity"):
            key = f"heldout/losses/{label}"
            assert found[key] == pytest.approx(expected[key], rel=1e-4)
