"""Whether a cache of teacher states pays: measured before the first step, for every form of it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fastkd.capture import RecomputedAttention, try_recomputing
from fastkd.errors import UserError
from fastkd.files.flat import flat_file
from fastkd.reporting.console import Reporter
from fastkd.reporting.numbers import fixed, size_of
from fastkd.training.setup import Run
from fastkd.training.teacher import TeacherRunner
from fastkd.training.teacher_cache.plan import (
    CachePlan,
    Form,
    existing,
    first_batches,
)
from fastkd.types import Inputs, teacher_inputs

_TIMED_BATCHES = 3
_PROBE_BYTES = 1 << 25


@dataclass(frozen=True)
class Costs:
    """What was measured, in seconds of a token that is no padding."""

    teacher: float
    """Seconds of a pass of the teacher."""
    recomputing: float | None
    """Seconds of recomputing attention from the hidden states below it; `None` where it can't be
    made so."""
    rate: float | None
    """Bytes a second that the disk reads for each rank of this machine; `None` where that can't be
    measured."""


def describe(run: Run, plan: CachePlan, reporter: Reporter) -> None:
    """Say what a cache takes in each of its forms, and measure whether it pays, but for a lean run;
    collective."""
    when = "is there" if plan.filled else "is filled before the first step"
    reporter.say(
        f"teacher cache: {plan.form}, {_each(plan, plan.form):,.0f} bytes a token, "
        f"{size_of(plan.size)}; {plan.folder} {when}"
    )
    if run.recipe.run.lean:
        return
    costs = run.ranks.from_main(lambda: _measured(run, plan))
    train = run.recipe.train
    rows = run.datamodule.rows
    assert rows is not None, "a stream is refused before"
    times = train.steps * train.batch_size / rows
    here = run.ranks.here
    shared = f" for each of {here} ranks" if here > 1 else ""
    disk = "a disk whose speed can't be measured, as nothing may be written there"
    if costs.rate is not None:
        disk = f"a disk of {costs.rate / 1e9:.3g} GB/s{shared}"
    reporter.say(
        f"teacher cache: 1,000 tokens take {1e6 * costs.teacher:.3g} ms of the teacher; the data "
        f"is read {fixed(times, 2)} times, ahead of the steps, by {disk}"
    )
    reporter.table(
        "teacher cache, 1,000 tokens",
        ("form", "bytes a token", "on disk", "read", "recomputed", "pays"),
        [_row(plan, form, costs, times) for form in plan.sizes],
    )


def verdict(costs: Costs, form: Form, each: float, times: float, *, filled: bool) -> str:
    """Whether a form pays.

    A step waits for the longer of reading, which goes on beside it, and recomputing, at most: what
    the student takes meanwhile is not counted.

    Args:
        costs: of this teacher and this disk.
        form: of the states.
        each: bytes a token.
        times: how often the data is read.
        filled: whether the states are there, which otherwise take a pass of the teacher.
    """
    if form.attention == "recomputed" and costs.recomputing is None:
        return "can't be made"
    if costs.rate is None:
        return "unknown"
    made = costs.recomputing or 0.0 if form.attention == "recomputed" else 0.0
    waits = max(each / costs.rate, made)
    cached, passes = times * waits + (0 if filled else costs.teacher), times * costs.teacher
    if cached < passes:
        return "yes"
    return "if shared by runs" if not filled and waits < costs.teacher else "no"


def disk_rate(plan: CachePlan) -> float | None:
    """Bytes a second that are read where the states are or will be, of a file that is not in
    memory; `None` where there is none to read. No figure is worth the end of a run."""
    stored = [flat_file(plan.folder, field.name) for field in plan.layout.fields]
    try:
        for path in stored if plan.filled else ():
            if path.stat().st_size >= _PROBE_BYTES:
                with path.open("rb", buffering=0) as file:
                    return _rate_of(file)
        # of files that are shorter, a read takes as long as to begin it
        with tempfile.TemporaryFile(dir=existing(plan.folder.parent)) as file:
            # what can't be compressed, and changes no generator of the run
            file.write(np.random.default_rng(0).bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            return _rate_of(file)
    except OSError:
        return None


def _rate_of(file: IO[bytes]) -> float:
    """Bytes a second of a file that is open at its beginning."""
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    return len(file.read(_PROBE_BYTES)) / (time.perf_counter() - start)


def _row(plan: CachePlan, form: Form, costs: Costs, times: float) -> tuple[str, ...]:
    each, made = _each(plan, form), costs.recomputing
    stored = plan.sizes[form._replace(attention="stored")]
    said = verdict(costs, form, each, times, filled=plan.filled and form == plan.form)
    if form.attention == "recomputed" and plan.sizes[form] >= stored:
        said += ", no smaller"
    return (
        str(form),
        f"{each:,.0f}",
        size_of(plan.sizes[form]),
        "" if costs.rate is None else f"{1e6 * each / costs.rate:.3g} ms",
        f"{1e6 * made:.3g} ms" if form.attention == "recomputed" and made is not None else "",
        said,
    )


def _each(plan: CachePlan, form: Form) -> float:
    """Bytes a token."""
    return plan.sizes[form] / plan.rows_of[form].tokens


def _measured(run: Run, plan: CachePlan) -> Costs:
    teacher = run.teacher
    assert isinstance(teacher, TeacherRunner), "a plan is made for a teacher"
    batches = first_batches(run, 1 + _TIMED_BATCHES)
    layers = sorted(plan.layout.template.attention)
    recorded = plan.layout.recorded
    # one pass gives both its time and what attention is recomputed from
    wanted = {**recorded, "hidden": recorded["hidden"] | {layer - 1 for layer in layers}}
    hidden: list[Mapping[int, Tensor]] = []

    def run_teacher(number: int) -> None:
        hidden.append(teacher.record(batches[number], wanted).hidden)

    passes = _seconds(run, batches, run_teacher)
    recomputed = _recomputed(teacher, plan, batches[0], layers)
    making = None
    if recomputed is not None:
        making = _seconds(run, batches, lambda n: recomputed(batches[n], hidden[n], layers))
    rate = disk_rate(plan)
    # ranks of a machine read at the same time
    return Costs(passes, making, None if rate is None else rate / run.ranks.here)


def _recomputed(
    teacher: TeacherRunner, plan: CachePlan, inputs: Inputs, layers: list[int]
) -> RecomputedAttention | None:
    """What recomputes the attention of the teacher, if it can be."""
    if plan.layout.recomputed is not None or not layers:
        return plan.layout.recomputed
    try:
        return try_recomputing(teacher.model, inputs, layers)
    except UserError:
        return None


def _seconds(run: Run, batches: list[Inputs], work: Callable[[int], object]) -> float:
    """Seconds of a token that is no padding, in the fastest batch after the first, which warms up:
    whatever else a machine does only adds."""
    work(0)
    _wait(run)
    each = []
    for number, inputs in enumerate(batches[1:], start=1):
        start = time.perf_counter()
        work(number)
        _wait(run)
        each.append((time.perf_counter() - start) / _tokens(inputs))
    return min(each)


def _wait(run: Run) -> None:
    if run.ranks.device.type == "cuda":
        torch.cuda.synchronize(run.ranks.device)


def _tokens(inputs: Inputs) -> int:
    read = teacher_inputs(inputs)
    mask = read.get("attention_mask")
    return read["input_ids"].numel() if mask is None else int(mask.sum())
