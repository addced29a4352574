"""Before a run: what this machine has, and what a recipe will need on it.

Memory by part follows from the parameters, the ZeRO stage and the precision; what activations and
libraries add is the measured peak of a few real steps less those parts. Nothing is written but the
tokenised corpus, which the run needs anyway.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing
from pathlib import Path

import psutil
import torch

from fastkd.data.prefetch import Prefetched
from fastkd.distributed import Ranks
from fastkd.recipe import AnyRecipe, Recipe, stage_recipes
from fastkd.reporting.console import Reporter
from fastkd.training.engine import NoTeacher
from fastkd.training.environment import environment
from fastkd.training.evaluate import peak_memory
from fastkd.training.loop import train_step
from fastkd.training.setup import Run, set_up

_TIMED_STEPS = 3
_GIB = 2**30


def describe_machine(reporter: Reporter) -> None:
    """Print hardware and versions."""
    found = environment()
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    rows = [("Python", str(found["python"]))]
    rows += [(name, str(version)) for name, version in found["packages"].items()]
    rows += [
        ("CPU cores", str(os.cpu_count())),
        ("memory", f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} GiB free"),
        ("disk here", f"{disk.free / _GIB:.1f} GiB free"),
    ]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        rows.append((f"GPU {index}", f"{name}, {total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free"))
    gpu = torch.cuda.is_available()
    if not gpu:
        rows.append(("GPU", "none"))
    rows.append(("kernels", "Triton" if gpu else "PyTorch, linear memory (no GPU)"))
    rows.append(("ranks talk by", "nccl" if gpu else "gloo"))
    reporter.table("this machine", ("", "found"), rows)


def estimate_run(recipe: AnyRecipe, ranks: Ranks, reporter: Reporter) -> None:
    """Set a run up, make a few steps of it, and print what the whole will need.

    Stages are estimated one by one, each on a student as the first one starts from.

    Raises:
        UserError: whatever would stop the run itself.
    """
    if not isinstance(recipe, Recipe) or not recipe.stages:
        _estimate(recipe, ranks, reporter)
        return
    for number, stage in enumerate(stage_recipes(recipe), start=1):
        reporter.say(f"stage {number} of {len(recipe.stages)}")
        _estimate(stage.model_copy(update={"student": recipe.student}), ranks, reporter)


def _estimate(recipe: AnyRecipe, ranks: Ranks, reporter: Reporter) -> None:
    run = set_up(recipe, ranks, progress=not reporter.console.quiet)
    with closing(Prefetched(run.micro_batches(), ranks.device)) as micro_batches:
        train_step(run, micro_batches.next_step(0))
        start = time.perf_counter()
        for step in range(1, 1 + _TIMED_STEPS):
            # reading the sum waits for the device
            train_step(run, micro_batches.next_step(step)).sum().item()
        seconds = (time.perf_counter() - start) / _TIMED_STEPS
    train = run.recipe.train
    counted, each = run.datamodule.counted
    step = train.batch_size * each
    trained = run.initialisation.total + _projection_numbers(run)
    reporter.table(
        "this recipe",
        ("", "needed"),
        [
            *_parameters(run, trained),
            (f"{counted} to train on", f"{train.steps * step:,}"),
            (f"{counted} in the corpus", _passes(run)),
            ("a step", f"{seconds:.3g} s, {step / seconds:,.0f} {counted}/s"),
            ("training", _duration(seconds * train.steps)),
        ],
    )
    parts = memory_parts(recipe, run.teacher_parameters, trained, ranks.world_size)
    rest = max(0, peak_memory(ranks) - sum(parts.values()))
    kind = "GPU" if ranks.device.type == "cuda" else "process"
    rows = [(name, f"{size / 2**20:,.0f} MiB") for name, size in parts.items()]
    rows.append(("activations and libraries, measured", f"{rest / 2**20:,.0f} MiB"))
    rows.append(("peak", f"{peak_memory(ranks) / 2**20:,.0f} MiB"))
    reporter.table(f"memory of each {kind}", ("", "size"), rows)


def memory_parts(recipe: AnyRecipe, teacher: int, trained: int, world_size: int) -> dict[str, int]:
    """Bytes that one rank holds for weights, gradients and optimiser, by ZeRO stage.

    Args:
        recipe: precision, stage and placement.
        teacher: parameters of the teacher; a fine-tuning run has none.
        trained: parameters of the student and the projections.
        world_size: ranks that shards are spread over.
    """
    bf16, stage = recipe.train.precision == "bf16", recipe.train.zero_stage
    shard = [1, world_size]
    parts = {}
    if isinstance(recipe, Recipe):
        size = teacher * (4 if recipe.teacher.dtype == "float32" else 2)
        parts["teacher weights"] = size // shard[recipe.teacher.placement != "replicate"]
    # bf16 keeps fp32 master weights beside Adam's two moments
    optimiser = trained * (12 if bf16 else 8)
    trained_weights = "student weights" if parts else "model weights"
    return {
        **parts,
        trained_weights: trained * (2 if bf16 else 4) // shard[stage >= 3],
        "gradients": trained * 4 // shard[stage >= 2],
        "optimiser": optimiser // shard[stage >= 1],
    }


def _projection_numbers(run: Run) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in run.objective.parameters())


def _parameters(run: Run, trained: int) -> list[tuple[str, str]]:
    own = run.initialisation.total
    if isinstance(run.teacher, NoTeacher):
        return [("model parameters", f"{own:,}")]
    return [
        ("teacher parameters", f"{run.teacher_parameters:,}"),
        ("student parameters", f"{own:,}"),
        ("projection parameters", f"{trained - own:,}"),
    ]


def _passes(run: Run) -> str:
    rows = run.datamodule.rows
    if rows is None:
        return "unknown, streamed"
    train = run.recipe.train
    known = rows * run.datamodule.counted[1]
    return f"{known:,}, read {train.steps * train.batch_size / rows:.2f} times"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
