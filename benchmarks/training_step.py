"""Whole training steps of one teacher and student under three losses.

fastkd's; one with a trivial loss and no capture, the floor; and the usual one, which asks both
models for their attention maps. Run in turn, a busy machine slows all alike.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import BertConfig, BertModel

from benchmarks.timing import device_events
from fastkd.capture import capture, route_attention
from fastkd.layer_map import make_layer_map
from fastkd.losses import DIVISORS, ModelPair
from fastkd.losses.objective import DistilledStudent, Objective
from fastkd.recipe import Losses

Step = Callable[[], Tensor]
Inputs = dict[str, Tensor]
Ends = list[float]
# what a profiled step is marked with
MARK = "whole step"
TOP_KERNELS = 8
# calls of the host that return once the device is done
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Layers, width and inner width of both models, and their heads."""

    teacher: tuple[int, int, int] = (12, 768, 3072)
    student: tuple[int, int, int] = (4, 312, 1200)
    heads: int = 12


BERT_BASE = Size()
TINY = Size(teacher=(4, 32, 64), student=(2, 24, 48), heads=4)


def make_inputs(
    batch: int, tokens: int, device: str, *, padded: bool = False, words: int = 30000
) -> Inputs:
    """Random ids; if `padded`, right padding of lengths from an eighth of the tokens to all; a row
    alone lacks an eighth."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(words // 30, words, (batch, tokens), generator=generator)
    if not padded:
        return {"input_ids": ids.to(device)}
    shortest = tokens // 8 if batch > 1 else tokens - tokens // 8
    lengths = torch.linspace(shortest, tokens, batch).long()
    mask = torch.arange(tokens)[None, :] < lengths[:, None]
    return {
        "input_ids": ids.masked_fill(~mask, 0).to(device),
        "attention_mask": mask.long().to(device),
    }


def make_steps(inputs: Inputs, size: Size = BERT_BASE) -> dict[str, Step]:
    """A step of each kind, with models of its own."""
    return {
        "fastkd": fastkd_step(inputs, size),
        "trivial loss": _trivial(inputs, size),
        "output_attentions": _attention_maps(inputs, size),
    }


def dtype_on(device: str) -> torch.dtype:
    """Of the models: fp32 on the CPU, bf16 on a GPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def bert_config(
    shape: tuple[int, int, int], heads: int, words: int = 30522, positions: int = 512
) -> BertConfig:
    """Of layers, width and inner width; without dropout."""
    layers, width, inner = shape
    return BertConfig(
        vocab_size=words,
        max_position_embeddings=positions,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=inner,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _bert(shape: tuple[int, int, int], heads: int, attention: str, device: str) -> BertModel:
    config = bert_config(shape, heads)
    config._attn_implementation = "eager" if attention == "eager" else "sdpa"
    # a GPU draws weights in no time
    with torch.device(device):
        model = BertModel(config, add_pooling_layer=False)
    if attention == "captured":
        route_attention(model, "sdpa")
    return model.to(dtype_on(device))


def _models(size: Size, attention: str, device: str) -> tuple[BertModel, BertModel, Objective]:
    torch.manual_seed(0)
    teacher = _bert(size.teacher, size.heads, attention, device).eval().requires_grad_(False)
    student = _bert(size.student, size.heads, attention, device)
    losses = Losses.model_validate({"attention": {}, "hidden": {}, "embedding": {}})
    layers = make_layer_map("uniform", size.student[0], size.teacher[0])
    pair = ModelPair((size.student[1], size.teacher[1]))
    return teacher, student, Objective(losses, layers, pair)


def _device_of(inputs: Inputs) -> str:
    return inputs["input_ids"].device.type


def fastkd_step(inputs: Inputs, size: Size = BERT_BASE) -> Step:
    """Losses of attention, hidden states and embeddings, and an update."""
    device = _device_of(inputs)
    teacher, student, objective = _models(size, "captured", device)
    module = DistilledStudent(student, objective).to(device, dtype_on(device))
    shares = torch.ones(len(DIVISORS), device=device)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)

    def step() -> Tensor:
        with torch.no_grad(), capture(teacher, **objective.layers("teacher")) as states:
            teacher(**inputs)
        total, _ = module(inputs, states, shares)
        return update(total, optimizer)

    return step


def _trivial(inputs: Inputs, size: Size) -> Step:
    teacher, student, _ = _models(size, "plain", _device_of(inputs))
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)

    def step() -> Tensor:
        with torch.no_grad():
            teacher(**inputs)
        return update(student(**inputs).last_hidden_state.square().mean(), optimizer)

    return step


def _attention_maps(inputs: Inputs, size: Size) -> Step:
    device = _device_of(inputs)
    teacher, student, objective = _models(size, "eager", device)
    pairs = objective.maps["attention"].pairs
    widths = (size.student[1], size.teacher[1])
    projection = torch.nn.Linear(*widths, device=device, dtype=dtype_on(device))
    optimizer = torch.optim.AdamW([*student.parameters(), *projection.parameters()], fused=True)
    asked = {"output_attentions": True, "output_hidden_states": True}
    mean = _mean_of(inputs.get("attention_mask"))

    def step() -> Tensor:
        with torch.no_grad():
            taught = teacher(**inputs, **asked)
        made = student(**inputs, **asked)
        total = inputs["input_ids"].new_zeros((), dtype=torch.float32)
        for s, t in pairs:
            total = total + mean((made.attentions[s - 1] - taught.attentions[t - 1]).square(), 2)
        for s, t in (*pairs, (0, 0)):
            difference = projection(made.hidden_states[s]) - taught.hidden_states[t]
            total = total + mean(difference.square(), 1)
        return update(total, optimizer)

    return step


def _mean_of(mask: Tensor | None) -> Callable[[Tensor, int], Tensor]:
    """Mean over what counts: all, or the tokens (at dimension `axis`) of a mask."""
    if mask is None:
        return lambda values, axis: values.mean()
    rows = mask.bool()

    def mean(values: Tensor, axis: int) -> Tensor:
        counted = rows[:, None, :, None] if axis == 2 else rows[:, :, None]
        return torch.where(counted, values, 0).sum() / counted.expand_as(values).sum()

    return mean


def update(total: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Backward and a step of the optimiser; the loss."""
    total.backward()
    optimizer.step()
    optimizer.zero_grad()
    return total.detach()


def step_seconds(step: Step, device: str) -> float:
    """One step by the clock, its work done."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def seconds_in_turn(steps: dict[str, Step], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in rounds that make one of every kind."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step_seconds(step, device))
    return times


def paired_ratios(times: dict[str, list[float]], base: str) -> dict[str, list[float]]:
    """Of every round, how many times the seconds of `base` each took."""
    return {
        name: [own / of_base for own, of_base in zip(values, times[base], strict=True)]
        for name, values in times.items()
    }


def ends_of(ratios: dict[str, list[float]]) -> tuple[dict[str, Ends], dict[str, Ends]]:
    """Quartiles of each, and its lowest and highest."""
    quartiles = {name: np.quantile(of, (0.25, 0.75)).tolist() for name, of in ratios.items()}
    return quartiles, {name: [min(of), max(of)] for name, of in ratios.items()}


def timed_in_turn(steps: dict[str, Step], device: str, rounds: int) -> dict[str, Any]:
    """Median seconds of each, and how many times those of the trivial step, by paired rounds.

    The first step of each, which compiles, is not timed.

    Raises:
        AssertionError: a loss is not finite.
    """
    for name, step in steps.items():
        assert torch.isfinite(step()), f"the loss of {name} is not finite"
    times = seconds_in_turn(steps, device, rounds)
    ratios = paired_ratios(times, "trivial loss")
    quartiles, ranges = ends_of(ratios)
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "times the trivial step, median of paired rounds": {
            name: statistics.median(values) for name, values in ratios.items()
        },
        "quartiles of the rounds": quartiles,
        "lowest and highest of the rounds": ranges,
    }


def on_the_device(step: Step) -> dict[str, Any]:
    """What a GPU does in one step, and how often the host waits for it; see `counted`."""
    torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        with record_function(MARK):
            step()
        torch.cuda.synchronize()
    peak = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return {**counted(recorded.events()), "peak megabytes": peak}


def counted(events: Sequence[Any]) -> dict[str, Any]:
    """Of a profile of one marked step: milliseconds of the device's work, kernels and copies, waits
    that the step itself asks for, and the kernels that take longest, in microseconds."""
    (whole,) = (e.time_range for e in events if e.name == MARK and e.device_type == DeviceType.CPU)
    inside = [
        event.name
        for event in events
        if event.device_type == DeviceType.CPU
        and whole.start <= event.time_range.start <= whole.end
    ]
    work = device_events(events)
    taken: dict[str, float] = defaultdict(float)
    for event in work:
        taken[event.name[:100]] += event.device_time
    longest = sorted(taken.items(), key=lambda item: -item[1])[:TOP_KERNELS]
    return {
        "busy milliseconds": round(sum(taken.values()) / 1e3, 3),
        "launches": len(work),
        "synchronisations": sum(name in WAITS for name in inside),
        "copies to the host": sum("DtoH" in event.name for event in work),
        "kernels": {name: round(value, 1) for name, value in longest},
    }
