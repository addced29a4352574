"""Whole training steps: fastkd's, with a trivial loss, and with attention maps."""

from typing import Any, NamedTuple

import torch

from benchmarks.gpu.record import Record
from benchmarks.training_step import (
    BERT_BASE,
    TINY,
    Size,
    fastkd_step,
    make_inputs,
    make_steps,
    on_the_device,
    timed_in_turn,
)

ROUNDS = 11


class Shape(NamedTuple):
    """Of a batch; `padded` ones have right padding of all lengths."""

    batch: int
    tokens: int
    padded: bool = False

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.tokens}" + (", padded" if self.padded else "")


SHAPES = (Shape(32, 128), Shape(256, 128), Shape(16, 512), Shape(32, 128, padded=True))
DRY = (Shape(2, 16), Shape(2, 16, padded=True))


def run(record: Record) -> None:
    found = {}
    for shape in shapes_on(record.device):
        times = record.attempt(shape.name, lambda shape=shape: measured(shape, record.device))
        if times is not None:
            found[shape.name] = times
            record.note(steps=found)
        if record.device != "cpu":
            torch.cuda.empty_cache()


def shapes_on(device: str) -> tuple[Shape, ...]:
    return DRY if device == "cpu" else SHAPES


def size_on(device: str) -> Size:
    return TINY if device == "cpu" else BERT_BASE


def compile_kernels(shape: Shape, device: str) -> None:
    """One step of fastkd's, which compiles what it launches."""
    inputs = make_inputs(*shape[:2], device, padded=shape.padded)
    fastkd_step(inputs, size_on(device))()


def measured(shape: Shape, device: str) -> dict[str, dict[str, Any]]:
    """Of each kind of step, what the clock and the profiler say."""
    on_cpu = device == "cpu"
    inputs = make_inputs(*shape[:2], device, padded=shape.padded)
    steps = make_steps(inputs, size_on(device))
    times = timed_in_turn(steps, device, 1 if on_cpu else ROUNDS)
    made: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        made[name] = {
            "milliseconds": round(1e3 * times["seconds"][name], 3),
            "times the trivial step": round(
                times["times the trivial step, median of paired rounds"][name], 3
            ),
        }
        if not on_cpu:
            seen = on_the_device(step)
            share = seen["busy milliseconds"] / made[name]["milliseconds"]
            made[name] |= {"busy share": round(share, 3), **seen}
    return made
