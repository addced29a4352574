"""What is forecast to move in a step, held to what two ranks receive and keep in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import make_recipe, run_script

from fastkd.data.batching import plan_batches
from fastkd.recipe import load_recipe
from fastkd.training.deepspeed_config import deepspeed_of_student
from fastkd.training.engine import check_config
from fastkd.training.memory import apart, memory_parts
from fastkd.training.moving import host_bytes, link_bytes

# two micro-batches of a rank; tiny weights would otherwise stay whole on every rank
TWICE = ["train.micro_batch_size=2"]
WHOLE = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
OFFLOAD = "deepspeed.zero_optimization.offload_optimizer={device: cpu}"
BF16, FP32 = "train.precision=bf16", "train.precision=fp32"
# bytes of a parameter that arrive, of a whole copy each: reductions two copies, gatherings one
VARIANTS = {
    "stage 0": (["train.zero_stage=0", FP32, *TWICE], 2 * 4),
    "stage 1": (["train.zero_stage=1", BF16, *TWICE], 2 * 4 + 2),
    "stage 2": (["train.zero_stage=2", BF16, *TWICE], 2 * 2 * 4 + 2),
    "stage 2 in bf16": (
        ["train.zero_stage=2", BF16, *TWICE, "deepspeed.communication_data_type=bf16"],
        2 * 2 * 2 + 2,
    ),
    "stage 1, offloaded": (["train.zero_stage=1", FP32, *TWICE, OFFLOAD], 2 * 4 + 4),
    "stage 2, offloaded": (["train.zero_stage=2", FP32, *TWICE, OFFLOAD], 2 * 2 * 4 + 4),
    "stage 2 in bf16, offloaded": (["train.zero_stage=2", BF16, *TWICE, OFFLOAD], 2 * 2 * 4 + 2),
    # changes the process, so the last ones
    "stage 3": (["train.zero_stage=3", BF16, *TWICE, WHOLE], 2 * (4 + 2 + 2)),
    "stage 3, offloaded": (["train.zero_stage=3", FP32, *TWICE, WHOLE, OFFLOAD], 2 * (4 + 4 + 4)),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("moving"), train={"steps": 2, "warmup_steps": 0})


@pytest.fixture(scope="module")
def counted(path: Path) -> dict[str, dict[str, float]]:
    """By variant what a step was counted to take."""
    variants = json.dumps([["teacher.dtype=float32", *given] for given, _ in VARIANTS.values()])
    done = run_script("counted_steps.py", str(path), variants, ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return dict(zip(VARIANTS, json.loads(done.stdout.strip().splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_receive_what_is_forecast(
    path: Path, counted: dict[str, dict[str, float]], name: str
) -> None:
    given, each = VARIANTS[name]
    recipe, found = load_recipe(path, given), counted[name]
    plan = plan_batches(recipe, 2)
    config = check_config(deepspeed_of_student(recipe, plan))
    forecast = link_bytes(recipe, config, plan, int(found["trained"]), 0, 1)
    assert forecast == each * found["trained"] / 2
    # pieces are filled up to whole ones
    assert found["received"] == pytest.approx(forecast, rel=0.03)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "offloaded" in name])
def test_an_offloaded_optimiser_has_its_gradients_beside_it(
    path: Path, counted: dict[str, dict[str, float]], name: str
) -> None:
    recipe, found = load_recipe(path, VARIANTS[name][0]), counted[name]
    parts = memory_parts(recipe, 0, int(found["trained"]), 2)
    _, machine = apart(recipe, parts, plan_batches(recipe, 2))
    assert found["beside"] == pytest.approx(machine["gradients"], rel=0.05)


@pytest.mark.parametrize(
    ("given", "each"),
    [
        # gradients in fp32 once, weights in bf16 back
        (["train.zero_stage=1", BF16], 4 + 2),
        (["train.zero_stage=2", BF16, *TWICE], 4 + 2),
        (["train.zero_stage=2", FP32], 4 + 4),
        # the sum goes there, comes back for the second micro-batch, goes, and is copied
        (["train.zero_stage=2", FP32, *TWICE], 4 * 4 + 4),
        # there and back for each, and copied
        (["train.zero_stage=3", BF16, *TWICE], 5 * 4 + 2),
    ],
)
def test_what_an_offloaded_optimiser_reads_and_writes(
    path: Path, given: list[str], each: int
) -> None:
    recipe = load_recipe(path, [*given, OFFLOAD])
    assert host_bytes(recipe, plan_batches(recipe, 2), 1000, 0, 1) == each * 1000 / 2
    without = load_recipe(path, given)
    assert host_bytes(without, plan_batches(without, 2), 1000, 0, 1) == 0


def test_what_the_gpu_keeps_of_offloaded_gradients(path: Path) -> None:
    numbers = {}
    for stage in (1, 2, 3):
        for precision in (FP32, BF16):
            given = [f"train.zero_stage={stage}", precision, *TWICE, OFFLOAD]
            recipe = load_recipe(path, given)
            parts = memory_parts(recipe, 0, 1000, 2)
            device, machine = apart(recipe, parts, plan_batches(recipe, 2))
            numbers[stage, precision] = device["gradients"], machine["gradients"]
    # whole ones until the end of a step, then a shard in fp32 for the optimiser
    assert numbers[1, FP32] == (4000, 2000) and numbers[1, BF16] == (6000, 2000)
    # the sum of the micro-batches is in the machine's memory, or in bf16 on the GPU
    assert numbers[2, FP32] == (0, 4000) and numbers[2, BF16] == (2000, 2000)
    assert numbers[3, FP32] == numbers[3, BF16] == (0, 4000)
