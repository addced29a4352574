"""How fast the models of a run are where it ran: one sequence at a time, and 32 of them.

What is timed is a forward pass to the last hidden state of copies of one held-out sequence without
padding, so that two runs on the same text compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from fastkd.distributed import Ranks
from fastkd.limits import memory
from fastkd.training.setup import Run
from fastkd.training.teacher import NoTeacher
from fastkd.types import LENGTHS, STARTS, Inputs, teacher_inputs

BATCHES = (1, 32)
"""Sequences of a pass."""
_PASSES = 5
# seconds that the passes of one model at one size should take, and that one pass may
_BUDGET = 0.5
_LONGEST = 5.0


def measure_speed(run: Run) -> dict[str, Any]:
    """Latency and throughput of a run's models on the device of each rank; collective.

    Each number is the median of up to five passes after one to warm up, of fewer where they take
    more than half a second together. A batch that would take longer than five seconds, or half of
    the memory that is free, is not run and has no numbers.

    Args:
        run: its models in eval mode.

    Returns:
        `tokens` of each model's sequence, `threads` on a CPU, and in `batches`, by number of
        sequences as text, of each model `milliseconds` of a pass and `tokens_per_second`.
    """
    ranks = run.ranks
    part = next(iter(run.datamodule.heldout(run.plan.micro_batch_size, ranks)))
    models: dict[str, tuple[Callable[[Inputs], object], PreTrainedConfig, Inputs]] = {
        "student": (run.student, run.module.student.config, part.inputs)
    }
    if not isinstance(run.teacher, NoTeacher):
        own = teacher_inputs(part.inputs)
        models["teacher"] = run.teacher.embed, run.teacher.model.config, own
    lengths: dict[str, int] = {}
    found: dict[str, dict[str, Any]] = {str(batch): {} for batch in BATCHES}
    for name, (model, config, inputs) in models.items():
        sequence = run.move(longest_sequence(inputs))
        tokens = lengths[name] = sequence["input_ids"].shape[1]
        alone = 0.0
        for batch in BATCHES:
            needed = pass_bytes(config, batch, tokens)
            # one sequence is what every evaluation reads; the first rank decides for all, as it
            # may have others held out and passes may be collective
            decide = partial(_is_bounded, batch * alone, needed, ranks)
            if batch > 1 and not ranks.from_main(decide):
                continue
            seconds = time_passes(model, repeated(sequence, batch), ranks)
            alone = alone or seconds
            found[str(batch)][name] = {
                "milliseconds": seconds * 1e3,
                "tokens_per_second": batch * tokens / seconds,
            }
    on_cpu = ranks.device.type == "cpu"
    threads = {"threads": torch.get_num_threads()} if on_cpu else {}
    return {"tokens": lengths, **threads, "batches": found}


def _is_bounded(seconds: float, needed: int, ranks: Ranks) -> bool:
    return seconds <= _LONGEST and needed <= free_memory(ranks) / 2


def longest_sequence(inputs: Inputs) -> Inputs:
    """The longest sequence of a micro-batch, without its padding, [1, tokens]; of a packed one a
    packed row again, as its models may read nothing else."""
    names = [name for name in ("input_ids", "token_type_ids") if name in inputs]
    if LENGTHS in inputs:
        lengths = inputs[LENGTHS]
        last = int(lengths.argmax())
        start, size = int(lengths[:last].sum()), int(lengths[last])
        names += ["position_ids"]
        found = {name: inputs[name][:, start : start + size] for name in names}
        starts = torch.tensor([0, size], dtype=torch.int32)
        return {**found, STARTS: starts, LENGTHS: lengths[[last]]}
    mask = inputs.get("attention_mask")
    if mask is None:
        return {name: inputs[name][:1] for name in names}
    row = int(mask.sum(dim=1).argmax())
    kept = mask[row].bool()
    found = {name: inputs[name][row : row + 1, kept] for name in names}
    return {**found, "attention_mask": mask[row : row + 1, kept]}


def repeated(sequence: Inputs, batch: int) -> Inputs:
    """A batch of copies, [batch, tokens], or one packed row of them."""
    if LENGTHS in sequence:
        starts = sequence[STARTS]
        row = {n: t.repeat(1, batch) for n, t in sequence.items() if n not in (LENGTHS, STARTS)}
        steps = torch.arange(batch + 1, dtype=starts.dtype, device=starts.device)
        return {**row, STARTS: steps * starts[-1], LENGTHS: sequence[LENGTHS].repeat(batch)}
    return {name: tensor.repeat(batch, 1) for name, tensor in sequence.items()}


def time_passes(run: Callable[[Inputs], object], inputs: Inputs, ranks: Ranks) -> float:
    """Seconds of a forward pass: the median of a few after a warm-up, as many on every rank."""
    with torch.no_grad():
        first = _timed(run, inputs, ranks)
        passes = ranks.from_main(lambda: max(1, min(_PASSES, int(_BUDGET / first))))
        times = sorted(_timed(run, inputs, ranks) for _ in range(passes))
    return times[len(times) // 2]


def pass_bytes(config: PreTrainedConfig, batch: int, tokens: int) -> int:
    """About what a forward pass to the last hidden state holds at once, in fp32, without weights.

    Args:
        config: of the model.
        batch: sequences.
        tokens: of one.
    """
    text = config.get_text_config()
    width = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * width)
    maps = 0
    if getattr(text, "_attn_implementation", None) == "eager":
        maps = 2 * int(text.num_attention_heads) * tokens
    return 4 * batch * tokens * (8 * width + 3 * inner + maps)


def free_memory(ranks: Ranks) -> int:
    """Bytes that a GPU has free, or the machine, shared by the ranks on it."""
    if ranks.device.type == "cuda":
        return int(torch.cuda.mem_get_info(ranks.device)[0])
    return memory().free // max(1, ranks.here)


def _timed(run: Callable[[Inputs], object], inputs: Inputs, ranks: Ranks) -> float:
    _synchronise(ranks)
    start = time.perf_counter()
    run(inputs)
    _synchronise(ranks)
    return time.perf_counter() - start


def _synchronise(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
