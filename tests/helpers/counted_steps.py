"""Bytes that a rank receives in a step of a recipe, and those of gradients beside its optimiser.

Used as `python counted_steps.py recipe.yaml '[["train.zero_stage=2", ...], ...]'` under torchrun:
each list of overrides is a run, and the collectives of its last step are counted as a ring makes
them. The last line is one of JSON, an object for each list: `received`, `beside` and `trained`, the
parameters that train.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkd.distributed import start_ranks, stop_ranks
from fastkd.recipe import load_recipe
from fastkd.reporting.console import Reporter
from fastkd.training import loop
from fastkd.training.loop import train_step
from fastkd.training.setup import Run
from fastkd.training.sharded import whole_numbers

# how often a rank receives the largest tensor, but for its own share
TIMES = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "broadcast_": 1}


class Counter(TorchDispatchMode):
    """Counts what collectives bring, whoever calls them."""

    received = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d" and func.__name__ != "barrier.default":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            share = (dist.get_world_size() - 1) / dist.get_world_size()
            self.received += TIMES[func.__name__.partition(".")[0]] * share * size
        return func(*args, **(kwargs or {}))


def beside(optimizer: Any) -> int:
    """Bytes of gradients that ZeRO keeps where the states of its optimiser are."""
    numbers = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    numbers = numbers or getattr(optimizer, "single_partition_of_fp32_groups", [])
    kept = [number.grad for number in numbers]
    kept += [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    kept += getattr(optimizer, "accumulated_grads_in_cpu", {}).values()
    return sum(t.numel() * t.element_size() for t in kept if t is not None)


def counted(run: Run, inputs: Any) -> Any:
    """Make a step, and note what it takes."""
    optimizer, update = run.engine.optimizer, run.engine.optimizer.step
    held = []

    def looked(*given: Any, **named: Any) -> Any:
        # an update lets gradients go
        held.append(beside(optimizer))
        return update(*given, **named)

    optimizer.step = looked
    with Counter() as counter:
        made = train_step(run, inputs)
    optimizer.step = update
    trained = whole_numbers(p for p in run.module.parameters() if p.requires_grad)
    found.append({"received": counter.received, "beside": held[0], "trained": trained})
    return made


if __name__ == "__main__":
    ranks = start_ranks()
    loop.train_step = counted
    last = []
    for number, overrides in enumerate(json.loads(sys.argv[2])):
        recipe = load_recipe(sys.argv[1], overrides)
        output = f"{recipe.run.output}-{number}"
        recipe = load_recipe(sys.argv[1], [*overrides, f"run.output={output}"])
        found: list[dict[str, float]] = []
        loop.run_recipe(recipe, ranks, resume=False, reporter=Reporter(silent=True))
        last.append(found[-1])
    stop_ranks()
    if ranks.is_main:
        print(json.dumps(last))
