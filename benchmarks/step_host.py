"""What a training step asks of the host, in the engine of one process and in DeepSpeed's; as JSON.

`python -m benchmarks.step_host [--output FILE]`. BERT-base to TinyBERT-4 in layers and heads, but
so narrow and short that the host is all that counts: ops that a GPU would be given, views, numbers
that are read, and milliseconds of processor time, by bursts of steps that take turns; beside them
the same models with a trivial loss, and a step whose forward and backward are recorded: a stand-in
for the CUDA graph does nothing, so that what is left is what the host does between two replays.
Losses run their PyTorch path, which starts more than their kernels do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.engine_step import ZERO, engine_step
from benchmarks.machine import machine, report
from benchmarks.training_step import Size, Step, make_inputs, make_steps
from fastkd.training.graphs import Replay

NARROW = Size(teacher=(12, 24, 48), student=(4, 12, 24), heads=12)
BATCH, TOKENS, WORDS = 2, 8, 300
ROUNDS, BURST, WARM_UP = 20, 5, 5


def nothing_replayed(function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Run a function once, and never again."""
    return lambda: None, function()


STEPS: dict[str, dict[str, Any]] = {
    "one process": {},
    "one process, between graph replays": {"record": nothing_replayed},
    "DeepSpeed, ZeRO-1": {"deepspeed": ZERO},
}
VIEWS = {
    "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


class Ops(TorchDispatchMode):
    """Counts ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(step: Step) -> dict[str, int]:
    """Of one step."""
    with Ops() as ops:
        step()
    views = sum(count for name, count in ops.calls.items() if name in VIEWS)
    return {
        "ops": sum(ops.calls.values()) - views,
        "views": views,
        "reads": ops.calls["_local_scalar_dense"],
    }


def measure() -> dict[str, dict[str, float]]:
    """Counts of each kind of step, and the median of its milliseconds."""
    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(engine_step(BATCH, TOKENS, size=NARROW, words=WORDS, **given))
            for name, given in STEPS.items()
        }
        inputs = make_inputs(BATCH, TOKENS, "cpu", words=WORDS)
        steps["trivial loss, plain loop"] = make_steps(inputs, NARROW)["trivial loss"]
        for step in steps.values():
            for _ in range(WARM_UP):
                step()
        found: dict[str, dict[str, float]] = {n: {**counted(s)} for n, s in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                # finds the caches as the others left them, which the steps of a run never do
                step()
                for _ in range(BURST):
                    start = time.thread_time()
                    step()
                    times[name].append(time.thread_time() - start)
    for name, taken in times.items():
        found[name]["milliseconds"] = round(1e3 * statistics.median(taken), 2)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    report({**machine(), "a step": measure()}, output)
