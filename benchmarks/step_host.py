"""What a training step asks of the host, in the engine of one process and in DeepSpeed's; as JSON.

`python -m benchmarks.step_host [--output FILE]`, without TRITON_INTERPRET. BERT-base to TinyBERT-4
in layers and heads, but so narrow and short that the host is all that counts: ops that a GPU would
be given, views, numbers that are read, and milliseconds of processor time, by bursts of steps that
take turns; beside them the same models in plain loops, with a trivial loss and with attention maps,
and a step whose forward and backward are recorded: a stand-in for the CUDA graph does nothing, so
that what is left is what the host does between two replays. Losses run their PyTorch path, which
starts more than their kernels do. Then one process and the loops once more with the losses' kernels
on a stand-in for a GPU (`stand_in.py`); ops are without the launches of kernels, which are counted
apart. An engine's step makes its inputs itself, for which a GPU has a thread.
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
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.engine_step import ZERO, engine_step
from benchmarks.machine import machine, report
from benchmarks.stand_in import Launcher, ops_by_triton, stand_in_gpu
from benchmarks.training_step import Size, Step, make_inputs, make_steps
from fastkd.training.graphs import Replay

NARROW = Size(teacher=(12, 24, 48), student=(4, 12, 24), heads=12)
BATCH, TOKENS, WORDS = 2, 8, 300
ROUNDS, BURST, WARM_UP = 20, 5, 5


def nothing_replayed(function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Run a function once, and never again."""
    return lambda: None, function()


# of each kind of step what `engine_step` takes
STEPS: dict[str, dict[str, Any]] = {
    "one process": {},
    "one process, between graph replays": {"record": nothing_replayed},
    "DeepSpeed, ZeRO-1": {"deepspeed": ZERO},
}
LOOPS = ("trivial loss", "output_attentions")
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


def measure(given: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Counts of each kind of step, and the median of its milliseconds."""
    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(engine_step(BATCH, TOKENS, size=NARROW, words=WORDS, **more))
            for name, more in given.items()
        }
        loops = make_steps(make_inputs(BATCH, TOKENS, "cpu", words=WORDS), NARROW)
        steps |= {f"{name}, plain loop": loops[name] for name in LOOPS}
        found: dict[str, dict[str, float]] = {}
        for name, step in steps.items():
            for _ in range(WARM_UP):
                step()
            before = Launcher.launches
            found[name] = {**counted(step), "launches of kernels": Launcher.launches - before}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter has no launcher")
    torch.set_num_threads(1)
    found = {**machine(), "a step": measure(STEPS)}
    with stand_in_gpu(), ops_by_triton():
        found["a step, losses by their kernels"] = measure({"one process": {}})
    report(found, output)


if __name__ == "__main__":
    main()
