"""A teacher's forward on the CPU in fp32, bf16 and eight bits, in turn; as JSON.

`OMP_NUM_THREADS=1 python -m benchmarks.teacher_dtypes [--output FILE]`. BERT-base with random
weights, whose states of every third layer are captured as a run does. `int8` is
`teacher.dtype=int8`; `dynamic int8` is torch's own `quantize_dynamic`, with one scale a tensor of
activations. How far the last state is from that in fp32 stands beside the times. Then the same rows
in one pass and in several: what a teacher would win that reads all micro-batches of a step at once.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel

from benchmarks.machine import machine, report
from benchmarks.training_step import bert_config, make_inputs
from fastkd.capture import Capture, CompiledCapture, capture, route_attention
from fastkd.models.quantised import replace_linear

# rows and tokens of a micro-batch
SHAPES = ((8, 128), (2, 512))
# rows of 8 x 128 that are read at a time
CUTS = (1, 2, 4)
SIZES = (12, 768, 3072)
WANTED = {"attention": (3, 6, 9, 12), "hidden": (0, 3, 6, 9, 12)}
ROUNDS = 5
WORDS = 1024

Pass = Callable[[dict[str, Tensor]], Capture]


def models() -> dict[str, nn.Module]:
    """The same teacher in every precision."""
    torch.manual_seed(0)
    config = bert_config(SIZES, 12, WORDS)
    plain = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    route_attention(plain, "sdpa")
    rounded = copy.deepcopy(plain)
    replace_linear(rounded, "int8")
    with warnings.catch_warnings():
        # torch points to another package
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    half = copy.deepcopy(plain).to(torch.bfloat16)
    return {"fp32": plain, "bf16": half, "int8": rounded, "dynamic int8": dynamic}


def passes() -> dict[str, Pass]:
    """What reads a micro-batch, eager and, of two precisions, compiled."""

    def eager(model: nn.Module) -> Pass:
        def run(inputs: dict[str, Tensor]) -> Capture:
            with capture(model, **WANTED) as states:
                model(**inputs)
            return states

        return run

    made = models()
    found = {name: eager(model) for name, model in made.items()}
    for name in ("fp32", "int8"):
        # stays open: the process ends with the measurement
        found[f"{name}, compiled"] = CompiledCapture(copy.deepcopy(made[name]), WANTED).open()
    return found


def in_turn(functions: dict[str, Callable[[], Any]], against: str, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds of the processor, which other work on the machine moves least, and
    how many times as long one of them takes as each other."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(1 + rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    # the first round warms caches and heap
    kept = {name: values[1:] for name, values in times.items()}
    found: dict[str, Any] = {
        "milliseconds of the processor": {
            name: 1e3 * statistics.median(values) for name, values in kept.items()
        }
    }
    for name in functions:
        if name != against:
            ratios = [a / b for a, b in zip(kept[against], kept[name], strict=True)]
            found[f"{against} / {name}, median of pairs"] = statistics.median(ratios)
            found[f"{against} / {name}, quartiles"] = statistics.quantiles(ratios, n=4)[::2]
            found[f"{against} / {name}, lowest and highest"] = [min(ratios), max(ratios)]
    return found


def precisions(run: dict[str, Pass], shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    inputs = make_inputs(*shape, "cpu", words=WORDS)
    last = {name: one(inputs).hidden[12].float() for name, one in run.items()}
    moved = {
        name: float((state - last["fp32"]).norm() / last["fp32"].norm())
        for name, state in last.items()
    }
    reading = {name: lambda one=one: one(inputs) for name, one in run.items()}
    found = in_turn(reading, "fp32", rounds)
    return {**found, "last state moves by": moved}


def cuts(run: Pass, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """One pass over all rows against passes over a few at a time."""
    inputs = make_inputs(*shape, "cpu", words=WORDS)

    def read(rows: int) -> list[Capture]:
        pieces = zip(*(tensor.split(rows) for tensor in inputs.values()), strict=True)
        return [run(dict(zip(inputs, piece, strict=True))) for piece in pieces]

    sizes = (*CUTS, shape[0])
    return in_turn(
        {f"{rows} rows at a time": lambda rows=rows: read(rows) for rows in sizes},
        f"{shape[0]} rows at a time",
        rounds,
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    run, rounds = passes(), given.rounds
    precise = {f"{rows} x {t}": precisions(run, (rows, t), rounds) for rows, t in SHAPES}
    found = {
        "what": "forward of a BERT-base-shaped teacher, every third layer captured",
        **machine(),
        "rounds": rounds,
        "rows x tokens": precise,
        "8 x 128, fp32": cuts(run["fp32"], SHAPES[0], rounds),
    }
    report(found, given.output)


if __name__ == "__main__":
    main()
