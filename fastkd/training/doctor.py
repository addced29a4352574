"""Before a run: what this machine has, and what a recipe will need on it.

Weights, gradients and moments follow from the parameters, the ZeRO stage and the precision; what
activations take, and where the time goes, is measured in a few real steps, as a run measures it
under `train.profile`. Nothing is written but the tokenised corpus, which the run needs anyway.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from fastkd.data.batching import plan_batches
from fastkd.data.datamodule import MicroBatches
from fastkd.data.prefetch import Prefetched
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.files.disk import check_place
from fastkd.files.home import at_home
from fastkd.files.lock import LOCK
from fastkd.limits import cores, memory
from fastkd.recipe import AnyRecipe, Recipe, dump_recipe, each_stage
from fastkd.reporting.console import Reporter
from fastkd.reporting.numbers import fixed, gib
from fastkd.reporting.profile import memory_rows, time_columns, time_rows
from fastkd.training.chips import Chip
from fastkd.training.cost import peak_memory, reset_peak
from fastkd.training.engine import engines_ended
from fastkd.training.environment import environment
from fastkd.training.forecast import (
    EFFICIENCY,
    LIBRARIES,
    NETWORK,
    NODE,
    Passes,
    forecast,
    layouts,
    run_dry,
)
from fastkd.training.loop import read_step, train_step
from fastkd.training.precision import precision_on_gpus, products_of, settle_precision
from fastkd.training.profile import NoProfile
from fastkd.training.rehearsal import try_losses
from fastkd.training.same_recipe import check_recipes
from fastkd.training.setup import Run, check_layout, make_profile, set_up
from fastkd.training.sharded import whole_numbers
from fastkd.training.steering import check_metrics
from fastkd.training.summary import profile_of
from fastkd.training.teacher import NoTeacher
from fastkd.training.teacher_cache.fill import FIELD
from fastkd.training.teacher_cache.forecast import describe
from fastkd.training.teacher_cache.plan import Form, plan_cache, plan_for_run
from fastkd.training.window import Window

# as many steps as take so long, within these
_TIMED_SECONDS = 1.0
_FEWEST_STEPS, _MOST_STEPS = 3, 30


def describe_machine(reporter: Reporter) -> None:
    """Print hardware and versions."""
    found = environment()
    room = memory()
    limit = f" ({room.limit})" if room.limit else ""
    disk = shutil.disk_usage(Path.cwd())
    rows = [("Python", str(found["python"]))]
    rows += [(name, str(version)) for name, version in found["packages"].items()]
    rows += [
        ("CPU cores", str(cores())),
        ("memory", f"{gib(room.total)}{limit}, {gib(room.free)} free"),
        ("disk here", f"{gib(disk.free)} free"),
    ]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        rows.append((f"GPU {index}", f"{name}, {gib(total)}, {gib(free)} free"))
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
    check_recipes("doctor", recipe, ranks)
    ranks.from_main(lambda: _check_output(Path(recipe.run.output)))
    for stage in _stages(recipe, reporter):
        settled = settle_precision(stage, ranks)
        with products_of(settled, ranks.device):
            _estimate(settled, ranks, reporter)


def _check_output(output: Path) -> None:
    # a folder that is there is written into, another one is made
    place = output / LOCK if os.path.isdir(output) else output
    check_place(place, "run.output", above=True)


def forecast_run(recipe: AnyRecipe, chip: Chip, ranks: int, reporter: Reporter) -> None:
    """Print what a recipe will need on GPUs that are not here, and how fast they can be.

    Stages are forecast one by one, likewise.

    Args:
        recipe: of a distillation; of its teacher the configuration alone is read.
        chip: one of the GPUs.
        ranks: how many.
        reporter: what the user sees.

    Raises:
        UserError: a recipe or a model that can't be forecast.
    """
    for stage in _stages(recipe, reporter):
        if not isinstance(stage, Recipe):
            raise UserError(
                "--gpu is given with a recipe of fine-tuning, expected one of distillation; leave "
                "--gpu out, which makes a few real steps"
            )
        _forecast(precision_on_gpus(stage), chip, ranks, reporter)


def _stages(recipe: AnyRecipe, reporter: Reporter) -> Iterator[AnyRecipe]:
    """What a run does one after the other, each said by its number where there are stages."""
    # as a run does before it makes its folder
    dump_recipe(recipe)
    stages = each_stage(recipe)
    for number, stage in enumerate(stages, start=1):
        if isinstance(recipe, Recipe) and recipe.stages:
            reporter.say(f"stage {number} of {len(stages)}")
            # what a later one starts from isn't there yet
            stage = stage.model_copy(update={"student": recipe.student})
        yield stage


def _forecast(recipe: Recipe, chip: Chip, ranks: int, reporter: Reporter) -> None:
    plan = plan_batches(recipe, ranks)
    check_layout(recipe, plan, torch.device("cuda"))
    passes = run_dry(recipe, plan.micro_batch_size)
    found = forecast(recipe, passes, chip, ranks)
    room = int(chip.memory)
    rows = [(name, gib(size, 2)) for name, size in found.parts.items()]
    rows += [("in all", gib(found.total, 2)), (f"{chip.label} has", gib(room, 2))]
    rows.append(("in the machine's memory, each rank", gib(found.machine, 2)))
    rows.append(("there, each rank, while the teacher is loaded", gib(found.loading, 2)))
    reporter.table(
        f"memory of each of {ranks} GPUs" if ranks > 1 else "memory of the GPU",
        ("", "forecast"),
        rows,
    )
    slower = "moving" if found.moving > found.computing else "computing"
    reporter.table(
        "speed of all, at most",
        ("", "forecast"),
        [
            ("teacher, student parameters", _models(passes)),
            ("a step", f"{found.tokens:,} tokens, micro-batches of {plan.micro_batch_size} rows"),
            (f"computing, {EFFICIENCY:.0%} of the chip's rate", f"{found.computing:.3g} s"),
            ("moving weights and gradients", f"{found.moving:.3g} s"),
            ("tokens a second", f"{fixed(found.speed)}, bound by {slower}"),
        ],
    )
    reporter.say(
        f"chip: {chip.source}. Assumed: {EFFICIENCY:.0%} of its rate, {NODE} GPUs a machine, "
        f"{NETWORK / 1e9:.0f} GB/s for each between machines, "
        f"{gib(LIBRARIES, 2)} of CUDA and NCCL. Losses and the optimiser are not counted."
    )
    if found.total > room:
        reporter.say(does_not_fit(recipe, passes, chip, ranks))


def does_not_fit(recipe: Recipe, passes: Passes, chip: Chip, ranks: int) -> str:
    """What is too large on a chip, and the nearest layout that isn't, in one line."""
    found = forecast(recipe, passes, chip, ranks)
    room = int(chip.memory)
    most = max(found.parts, key=lambda name: found.parts[name])
    said = (
        f"does not fit: {gib(found.total, 2)} of {gib(room, 2)}, most of it {most} "
        f"({gib(found.parts[most], 2)}); "
    )
    for overrides, changed in layouts(recipe, ranks):
        total = forecast(changed, passes, chip, ranks).total
        if total <= room:
            return f"{said}give {overrides} ({gib(total, 2)}{_moved_more(recipe, changed, ranks)})"
    more = (
        "" if recipe.student.gradient_checkpointing else ", or student.gradient_checkpointing=true"
    )
    return f"{said}give more or larger GPUs{more}"


def _moved_more(recipe: Recipe, changed: Recipe, ranks: int) -> str:
    """What a layout costs that reduces gradients more than once a step."""
    times = plan_batches(changed, ranks).accumulation
    if recipe.train.zero_stage >= 2 or changed.train.zero_stage < 2 or times == 1:
        return ""
    return f", reduces gradients {times} times a step"


def _models(passes: Passes) -> str:
    frozen = f", {passes.frozen_numbers:,} frozen" if passes.frozen_numbers else ""
    return f"{passes.teacher_numbers:,}, {passes.trained_numbers:,} with projections{frozen}"


@engines_ended()
def _estimate(recipe: AnyRecipe, ranks: Ranks, reporter: Reporter) -> None:
    reset_peak(ranks)
    run = set_up(recipe, ranks, progress=not reporter.console.quiet)
    check_metrics(run)
    try_losses(run)
    profile = measure_steps(run)
    # what follows takes memory, too
    peak = peak_memory(ranks)
    train = run.recipe.train
    counted, each = run.datamodule.counted
    step = train.batch_size * each
    seconds = profile["milliseconds"] / 1e3
    reporter.table(
        "this recipe",
        ("", "needed"),
        [
            *_parameters(run),
            (f"{counted} to train on", f"{train.steps * step:,}"),
            (f"{counted} in the corpus", _passes(run)),
            ("a step", f"{seconds:.3g} s, {fixed(step / seconds)} {counted}/s"),
            ("training", _duration(seconds * train.steps)),
        ],
    )
    if run.graphed is None:
        reporter.table("time of a step", time_columns(profile), time_rows(profile))
    kind = "GPU" if ranks.device.type == "cuda" else "process"
    rows = memory_rows(profile["memory_bytes"], peak, kind)
    reporter.table(f"memory of each {kind}", ("", "size"), rows)
    _describe_cache(run, reporter)


def measure_steps(run: Run) -> dict[str, Any]:
    """What the profile of a run will say, from a few steps of it; collective over the ranks.

    Weights, gradients and moments are computed, as nothing of them has to be measured.

    Args:
        run: that has made no step; afterwards it has.

    Raises:
        UserError: a loss or a gradient is not finite.
    """
    if isinstance(run.profile, NoProfile):
        run.profile = make_profile(run)
    with closing(Prefetched(run.micro_batches(), run.ranks.device)) as micro_batches:
        window = Window(run, micro_batches, 0)
        start = time.perf_counter()
        _make_steps(run, micro_batches, window, range(1))
        first = time.perf_counter() - start
        count = run.ranks.from_main(lambda: _timed_steps(first))
        _make_steps(run, micro_batches, window, range(1, 1 + count))
    found = profile_of(run)
    assert found is not None, "steps were collected"
    counted = found.get("memory_bytes", {})
    return {**found, "memory_bytes": {**counted, **run.computed_parts()}}


def _make_steps(run: Run, micro_batches: MicroBatches, window: Window, steps: range) -> None:
    for step in steps:
        with run.profile.step():
            window.add(train_step(run, read_step(run, micro_batches, step)))
    window.close(stop=False)


def _timed_steps(seconds: float) -> int:
    """How many to time, of steps of which the first took so long."""
    return max(_FEWEST_STEPS, min(_MOST_STEPS, round(_TIMED_SECONDS / seconds)))


def _describe_cache(run: Run, reporter: Reporter) -> None:
    """What a cache of the teacher's states takes and saves, where there can be one."""
    if not isinstance(run.recipe, Recipe) or run.recipe.teacher.placement != "replicate":
        return
    if run.recipe.why_not_cached() is not None:
        return
    plan = plan_for_run(run)
    if plan is None:
        try:
            at_home(run.recipe.teacher.cache_folder, FIELD)
        except UserError as error:
            # no field of a run without it
            reporter.say(f"teacher.cache is none; {error}")
            return
        plan = plan_cache(run, Form("exact"))
        reporter.say("teacher.cache is none; with teacher.cache=exact:")
    else:
        reporter.say(
            "these steps ran the teacher; those of the run take what is stored of it, which is "
            "read with their data"
        )
    describe(run, plan, reporter)


def _parameters(run: Run) -> list[tuple[str, str]]:
    own = run.initialisation.total
    if isinstance(run.teacher, NoTeacher):
        return [("model parameters", f"{own:,}")]
    projections = whole_numbers(run.objective.parameters())
    return [
        ("teacher parameters", f"{run.teacher_parameters:,}"),
        ("student parameters", f"{own:,}"),
        ("projection parameters", f"{projections:,}"),
    ]


def _passes(run: Run) -> str:
    rows = run.datamodule.rows
    if rows is None:
        return "unknown, streamed"
    train = run.recipe.train
    known = rows * run.datamodule.counted[1]
    return f"{known:,}, read {fixed(train.steps * train.batch_size / rows, 2)} times"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{fixed(seconds, 1)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
