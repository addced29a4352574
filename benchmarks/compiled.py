"""Whole training steps, eager and with both models compiled, in turn; as JSON.

`python -m benchmarks.compiled [--device cuda] [--output FILE]`. A teacher of 6 x 384 and a student
of 3 x 384 with few words, whose update would take the time of a small step; TinyBERT's losses, and
an update; fp32 on the CPU, bf16 on a GPU. The losses of both are compared before anything is timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertModel

import fastkd
from benchmarks.machine import machine, report
from benchmarks.training_step import (
    bert_config,
    dtype_on,
    make_inputs,
    paired_ratios,
    seconds_in_turn,
    update,
)

# rows and tokens of a batch
SHAPES = ((2, 16), (8, 128))
LOSSES = {"attention": {}, "hidden": {}, "embedding": {}}
WORDS = 1024
ROUNDS = 15


def model(layers: int, device: str) -> BertModel:
    torch.manual_seed(layers)
    config = bert_config((layers, 384, 1536), 12, WORDS)
    return BertModel(config, add_pooling_layer=False).to(device, dtype_on(device))


def make_step(shape: tuple[int, int], device: str, compiles: bool) -> Callable[[], torch.Tensor]:
    """Forward of both models, losses, backward and an update; the loss."""
    teacher = model(6, device).eval().requires_grad_(False)
    distiller = fastkd.Distiller(model(3, device), teacher, LOSSES, compile=compiles)
    optimizer = torch.optim.AdamW(distiller.parameters(), fused=True)
    inputs = make_inputs(*shape, device, words=WORDS)
    # stays open: the process ends with the measurement
    distiller.__enter__()

    return lambda: update(distiller(inputs)[0], optimizer)


def measured(shape: tuple[int, int], device: str, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds, and how many times as long the eager step takes.

    Raises:
        AssertionError: the compiled step has another loss.
    """
    steps = {name: make_step(shape, device, name == "compiled") for name in ("eager", "compiled")}
    start = time.perf_counter()
    first = {name: float(step()) for name, step in reversed(steps.items())}
    compiling = time.perf_counter() - start
    tolerance = 1e-4 if device == "cpu" else 1e-2
    assert abs(first["compiled"] / first["eager"] - 1) < tolerance, first
    # the first rounds warm caches and heap
    seconds_in_turn(steps, device, 2)
    kept = seconds_in_turn(steps, device, rounds)
    ratios = paired_ratios(kept, "compiled")["eager"]
    return {
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in kept.items()},
        "eager step / compiled step, median of pairs": statistics.median(ratios),
        "quartiles of it": statistics.quantiles(ratios, n=4)[::2],
        "lowest and highest of pairs": [min(ratios), max(ratios)],
        "seconds until the first step of both is done": compiling,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found = {
        "what": "training step, 6 x 384 teacher, 3 x 384 student",
        **machine(),
        "rounds": given.rounds,
        "rows x tokens": {},
    }
    if given.device == "cuda":
        found["processor"] = torch.cuda.get_device_name()
    for rows, tokens in SHAPES:
        found["rows x tokens"] |= {
            f"{rows} x {tokens}": measured((rows, tokens), given.device, given.rounds)
        }
        torch._dynamo.reset()
    report(found, given.output)


if __name__ == "__main__":
    main()
