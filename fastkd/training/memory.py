"""Memory: what a run and its micro-batch need, and what is said where there is not enough."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastkd.data.batching import BatchPlan
from fastkd.errors import RankError, UserError
from fastkd.limits import memory
from fastkd.recipe import AnyRecipe, Recipe
from fastkd.reporting.numbers import gib
from fastkd.training.deepspeed_config import uses_deepspeed

# from which stage on DeepSpeed heeds it, and what of
_OFFLOADED = {
    "offload_optimizer": (1, {"optimiser"}),
    "offload_param": (3, {"student weights", "model weights"}),
}
# torch says it in words only, where there is no GPU
_CPU_REFUSAL = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


def check_micro_batch(
    recipe: AnyRecipe, rows: int, device: torch.device, width: int = 1, layers: int = 1
) -> None:
    """See that one micro-batch could fit on a device that had nothing else to hold.

    Counted is what no setting does without: the ids, and the states that enter each block, which
    the backward pass starts from also with gradient checkpointing. What fits may still need more.

    Args:
        recipe: of the run.
        rows: blocks or examples of a micro-batch.
        device: of this rank.
        width: of the model that trains, 1 before it is known.
        layers: its blocks, likewise.

    Raises:
        UserError: it could not.
    """
    # examples are as long as their texts, and may be short
    text = recipe.data if isinstance(recipe, Recipe) and recipe.row_form is None else None
    tokens = text.block_size if text else 1
    needed = rows * tokens * (8 + recipe.train.number_bytes * width * layers)
    if needed > memory_of(device):
        raise UserError(
            f"train.micro_batch_size: {rows:,} rows of {tokens} tokens need {gib(needed)} for "
            f"ids and hidden states alone, but {_described(device)}; give a smaller "
            "train.micro_batch_size"
        )


@contextmanager
def memory_errors(recipe: AnyRecipe, device: torch.device) -> Iterator[None]:
    """Turn a failed allocation into a `RankError` that says what was asked and what there is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        refused = _CPU_REFUSAL.search(str(error))
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and refused is None:
            raise
        asked = f" ({gib(int(refused[1]))} asked at once)" if refused else ""
        if isinstance(error, torch.OutOfMemoryError):
            tried = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
            asked = f" ({tried[1]} asked at once)" if tried else ""
        train = recipe.train
        size = f"{train.micro_batch_size or train.batch_size:,} rows"
        field = "train.micro_batch_size"
        if isinstance(recipe, Recipe) and recipe.data and recipe.data.batch_tokens:
            size, field = f"up to {recipe.data.batch_tokens:,} tokens", "data.batch_tokens"
        raise RankError(
            f"out of memory{asked}: {_described(device)}, and "
            f"micro-batches are {size}; give a smaller {field}, or set gradient_checkpointing"
        ) from error


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine, as far as this process may have them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory().total


def memory_parts(
    recipe: AnyRecipe,
    teacher: int,
    trained: int,
    world_size: int,
    matrices: int = 0,
    frozen: int = 0,
) -> dict[str, int]:
    """Bytes that one rank holds for weights, gradients and optimiser, by ZeRO stage.

    Args:
        recipe: precision, stage and placement.
        teacher: bytes of the teacher's weights; a fine-tuning run has none.
        trained: parameters of the student and the projections.
        world_size: ranks that shards are spread over.
        matrices: parameters that Muon updates, among those.
        frozen: further parameters of the student, which stay as they are.
    """
    stage = recipe.train.zero_stage
    shard = [1, world_size]
    parts = {}
    if isinstance(recipe, Recipe):
        parts["teacher weights"] = teacher // shard[recipe.teacher.placement != "replicate"]
    # bf16 keeps fp32 master weights beside Adam's two moments, and so does ZeRO of fp32 ones; Muon
    # has one moment
    zero = stage > 0 and uses_deepspeed(recipe, world_size)
    optimiser = trained * (12 if recipe.train.precision == "bf16" or zero else 8) - 4 * matrices
    trained_weights = "student weights" if parts else "model weights"
    return {
        **parts,
        trained_weights: (trained + frozen) * recipe.train.number_bytes // shard[stage >= 3],
        "gradients": trained * 4 // shard[stage >= 2],
        "optimiser": optimiser // shard[stage >= 1],
    }


def parts_on_cpu(recipe: AnyRecipe) -> set[str]:
    """Which of the `memory_parts` lie in the memory of the machine where the work is a GPU's."""
    found = set()
    if isinstance(recipe, Recipe) and recipe.teacher.placement == "offload":
        found.add("teacher weights")
    zero = recipe.deepspeed.get("zero_optimization")
    for key, (stage, names) in _OFFLOADED.items():
        section = zero.get(key) if isinstance(zero, dict) else None
        given = isinstance(section, dict) and section.get("device") == "cpu"
        if given and recipe.train.zero_stage >= stage:
            found |= names
    return found


def is_offloaded(recipe: AnyRecipe) -> bool:
    """Whether the optimiser is in the memory of the machine where the work is a GPU's."""
    return "optimiser" in parts_on_cpu(recipe)


def apart(
    recipe: AnyRecipe, parts: dict[str, int], plan: BatchPlan
) -> tuple[dict[str, int], dict[str, int]]:
    """The bytes of `memory_parts` where the work is a GPU's: those on it, and those in the memory
    of the machine.

    An offloaded optimiser has its gradients beside it, whatever the GPU keeps of them.
    """
    away = parts_on_cpu(recipe)
    device = {name: size for name, size in parts.items() if name not in away}
    machine = {name: size for name, size in parts.items() if name in away}
    if is_offloaded(recipe):
        device["gradients"], machine["gradients"] = _gradients(recipe, parts["gradients"], plan)
    return device, machine


def _gradients(recipe: AnyRecipe, kept: int, plan: BatchPlan) -> tuple[int, int]:
    """Bytes of gradients on the GPU and beside an offloaded optimiser, of those kept without it."""
    stage, bf16 = recipe.train.zero_stage, recipe.train.precision == "bf16"
    shard = kept if stage > 1 else kept // plan.world_size
    if stage == 3:
        # the sum of the micro-batches, and what the optimiser reads
        return 0, 2 * shard
    # micro-batches add up on the GPU, at stage 1 whole; in bf16 there is a sum of what is reduced
    device = kept * (stage == 1) + shard * bf16
    # at stage 2 in fp32 they do so there
    sums = stage == 2 and not bf16 and plan.accumulation > 1
    return device, shard * (1 + sums)


def _described(device: torch.device) -> str:
    there = gib(memory_of(device))
    if device.type == "cuda":
        return f"this GPU has {there}"
    limit = memory().limit
    return f"{limit} allows {there}" if limit else f"this machine has {there}"
