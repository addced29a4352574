"""Bytes of the student that move in a step: between ranks, and to the memory of the machine.

They follow from what DeepSpeed does at each stage. Stages 0 to 2 reduce gradients so that every
rank receives all of them; stage 2, which keeps a piece of them, does so for every micro-batch, the
others once a step. Stage 3 scatters them for every micro-batch, and gathers weights before a
forward and a backward pass where stages 1 and 2 gather them once, after the update.
"""

from __future__ import annotations

from typing import Any

import torch

from fastkd.data.batching import BatchPlan
from fastkd.recipe import Recipe
from fastkd.training.memory import parts_on_cpu


def link_bytes(
    recipe: Recipe, config: Any, plan: BatchPlan, trained: int, frozen: int, forwards: int
) -> float:
    """What a rank receives of the others in a step, where collectives run in a ring.

    A reduction is received once while it is made and once as its result, a gathering or a
    scattering once: each time all but the share that the rank has itself. Of weights that stage 3
    keeps whole, as they are small, as much is counted as of others.

    Args:
        recipe: stage and precision.
        config: what DeepSpeed reads of its section, see `check_config`.
        plan: how the step is cut.
        trained: parameters of the student and the projections.
        frozen: further parameters of the student.
        forwards: passes over each micro-batch.
    """
    train, micro_batches = recipe.train, plan.accumulation
    gradients = trained * reduced_bytes(config)
    weights = trained * train.number_bytes
    if train.zero_stage == 3:
        gathered = gathered_bytes(recipe, trained, frozen)
        received = micro_batches * (gradients + (forwards + 1) * gathered)
    else:
        times = micro_batches if train.zero_stage == 2 else 1
        received = 2 * gradients * times + weights * (train.zero_stage > 0)
    return received * (plan.world_size - 1) / plan.world_size


def host_bytes(recipe: Recipe, plan: BatchPlan, trained: int, frozen: int, forwards: int) -> float:
    """What a GPU reads from the memory of its machine and writes there in a step.

    Args:
        recipe: what of the student is offloaded.
        plan: how the step is cut.
        trained: parameters of the student and the projections.
        frozen: further parameters of the student.
        forwards: passes over each micro-batch.
    """
    away, moved = parts_on_cpu(recipe), 0
    if "student weights" in away:
        passes = plan.accumulation * (forwards + 1)
        moved += passes * gathered_bytes(recipe, trained, frozen)
    elif "optimiser" in away:
        # the optimiser's new ones
        moved += trained * recipe.train.number_bytes
    if "optimiser" in away:
        moved += 4 * trained * _gradient_trips(recipe, plan)
    return moved / plan.world_size


def gathered_bytes(recipe: Recipe, trained: int, frozen: int) -> int:
    """All weights of the student, as it computes with them."""
    return (trained + frozen) * recipe.train.number_bytes


def reduced_bytes(config: Any) -> int:
    """Bytes of a number of a gradient on its way between ranks."""
    dtype: torch.dtype = config.communication_data_type or torch.float32
    return dtype.itemsize


def _gradient_trips(recipe: Recipe, plan: BatchPlan) -> int:
    """How often gradients in fp32 pass between a GPU and an offloaded optimiser in a step."""
    stage, micro_batches = recipe.train.zero_stage, plan.accumulation
    if stage == 3:
        # the sum is kept there and read for each addition; at the end it is copied once more
        return 2 * micro_batches + 1
    if stage == 1 or recipe.train.precision == "bf16" or micro_batches == 1:
        return 1
    # stage 2 in fp32 keeps the sum there
    return 2 * micro_batches
