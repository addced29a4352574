"""The run: its stages, its steps, and the step itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkd.data.datamodule import MicroBatches
from fastkd.distributed import Ranks
from fastkd.layer_map import Progress
from fastkd.models import note_models, noted_models
from fastkd.recipe import AnyRecipe, Recipe, dump_recipe, stage_recipes
from fastkd.reporting.console import Reporter
from fastkd.training.bookkeeping import SILENT, Bookkeeper, Callbacks, stop_asked
from fastkd.training.card import write_card
from fastkd.training.cost import Cost
from fastkd.training.deepspeed_config import check_packages
from fastkd.training.engine import engines_ended
from fastkd.training.export import export_student
from fastkd.training.hold import hold_run
from fastkd.training.introduction import introduce
from fastkd.training.precision import products_of, settle_precision
from fastkd.training.rehearsal import try_losses
from fastkd.training.run_folder import RunFolder
from fastkd.training.same_recipe import check_recipes
from fastkd.training.setup import Run, set_up
from fastkd.training.stages import Stage, check_later, finish_stages, stage_folders
from fastkd.training.steering import check_metrics
from fastkd.training.summary import disk_bytes, summarise
from fastkd.training.teacher_cache.forecast import describe
from fastkd.training.teacher_cache.plan import plan_for_run
from fastkd.training.window import Window
from fastkd.types import Inputs


def run_recipe(
    recipe: AnyRecipe,
    ranks: Ranks,
    *,
    resume: bool,
    reporter: Reporter,
    report: Callable[[RunFolder], None] | None = None,
    callbacks: Callbacks = SILENT,
) -> dict[str, Any]:
    """Run a recipe of either kind from start to end, or continue it, and return its summary.

    A run in stages is one run after the other, each from the student that the last one left. Its
    folder holds the folder of each stage, and what the last one left as its own: its `student/`,
    and a summary with the `after` of the last and the `before` of the first.

    Args:
        recipe: what to do; with one of a fine-tuning run hard labels take the teacher's place.
        ranks: from `start_ranks`; every rank calls this.
        resume: continue the run in `run.output` where there is one, in the stage that was
            interrupted; a finished one is left alone.
        reporter: what the user sees; silent on ranks other than 0.
        report: called on rank 0 with each folder that is finished, while it is still held.
        callbacks: called on rank 0.

    Raises:
        UserError: anything that the user can mend.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    # what the folder is to hold
    dump_recipe(recipe)
    command = "distill" if isinstance(recipe, Recipe) else "finetune"
    check_recipes(command, recipe, ranks, resume=resume)
    # before a run in stages makes its folder
    check_packages(recipe)
    folder = RunFolder(recipe.run.output)
    recipe = settle_precision(recipe, ranks, folder if resume else None)
    with hold_run(folder, recipe, ranks, resume=resume, reporter=reporter) as summary:
        if summary is None and isinstance(recipe, Recipe) and recipe.stages:
            summary = _run_stages(recipe, ranks, resume, reporter, callbacks)
        elif summary is None:
            with products_of(recipe, ranks.device):
                summary = train(recipe, ranks, reporter, callbacks)
        if report is not None and not recipe.run.lean:
            for finished in stage_folders(recipe):
                ranks.from_main(partial(report, finished))
    return summary


def _run_stages(
    recipe: Recipe, ranks: Ranks, resume: bool, reporter: Reporter, callbacks: Callbacks
) -> dict[str, Any]:
    whole, stages = RunFolder(recipe.run.output), stage_recipes(recipe)
    check_later(stages, ranks, reporter)
    summaries: list[dict[str, Any]] = []
    for number, given in enumerate(stages, start=1):
        reporter.say(f"stage {number} of {len(stages)}")
        folder = RunFolder(given.run.output)
        stage = settle_precision(given, ranks, folder if resume else None)
        with hold_run(folder, stage, ranks, resume=resume, reporter=reporter) as summary:
            if summary is None:
                place = Stage(whole, recipe, number, summaries)
                with products_of(stage, ranks.device):
                    summary = train(stage, ranks, reporter, callbacks, place)
        summaries.append(summary)
    return finish_stages(recipe, summaries, ranks)


@engines_ended()
def train(
    recipe: AnyRecipe,
    ranks: Ranks,
    reporter: Reporter,
    callbacks: Callbacks = SILENT,
    stage: Stage | None = None,
) -> dict[str, Any]:
    """As `run_recipe`, of one run whose folder is held and that is not finished.

    `stage` says which one of another run it is, if it is one.
    """
    folder = RunFolder(recipe.run.output)
    cost = Cost(ranks)
    run = set_up(recipe, ranks, progress=not reporter.console.quiet)
    check_metrics(run)
    try_losses(run)
    cache = plan_for_run(run)
    ranks.from_main(lambda: _claim(folder, recipe, run, stage))
    introduce(run, reporter)
    if cache is not None:
        describe(run, cache, reporter)
        cache.use(run, progress=not reporter.console.quiet)
    books = Bookkeeper(run, folder, reporter, callbacks, cost)
    steps = run.recipe.train.steps
    step = books.restore(recipe, stage)
    if step == 0 and not recipe.run.lean:
        books.evaluate(step)
    with (
        stop_asked() as stop,
        reporter.steps(step, steps),
        closing(books.micro_batches) as micro_batches,
        closing(books),
    ):
        window = Window(run, micro_batches, step)
        while step < steps and not books.steering.is_over:
            with run.profile.step():
                window.add(train_step(run, read_step(run, micro_batches, step)))
            step += 1
            books.close_step(step, window, stop)
    books.steering.describe(step, reporter)
    summary = summarise(run, folder, cost, step, books.steering)
    _export(run, folder, books.steering.weights)
    summary["disk_bytes"] = ranks.from_main(partial(disk_bytes, run, folder))
    # a launcher ends all ranks when one fails at its exit, so none leaves while the first writes
    ranks.from_main(partial(_finish, folder, run.recipe, summary))
    return summary


def _export(run: Run, folder: RunFolder, weights: Mapping[str, Tensor] | None) -> None:
    """Write the student as it is now, or with weights of an earlier step."""
    export_student(
        run.engine,
        source=run.source,
        config_values=run.handed_on,
        tokenizer=run.exported_tokenizer,
        run=folder,
        ranks=run.ranks,
        prompts=run.prompts,
        start=run.start,
        weights=weights,
    )


def read_step(run: Run, micro_batches: MicroBatches, step: int) -> Sequence[Inputs]:
    """Let the objective stand at a step, and take what is trained on in it."""
    run.objective.at(Progress(step, micro_batches.epoch))
    with run.profile.phase("data"):
        return micro_batches.next_step(step)


def train_step(run: Run, step_batches: Sequence[Inputs]) -> Tensor:
    """One optimiser step over all micro-batches of this rank.

    Args:
        run: whose objective stands at this step.
        step_batches: this rank's micro-batches.

    Returns:
        fp32 [2, labels] on the device: this rank's part of the step's raw and weighted losses; the
        sum over ranks is the mean over the global batch.
    """
    student, engine = run.student, run.engine
    objective, ranks, phase = run.objective, run.ranks, run.profile.phase
    micro_batches = [run.move(batch) for batch in step_batches]
    loss_scales = run.loss_scales(micro_batches)
    if objective.weights.needs_look:
        _look(run, micro_batches, loss_scales)
    totals = torch.zeros(2, len(objective.labels), device=ranks.device)
    gathers = run.gathers(micro_batches, loss_scales)
    teacher_states = run.teacher_states(micro_batches)
    together = zip(micro_batches, loss_scales, gathers, strict=True)
    for number, (batch, scale, gather) in enumerate(together, start=1):
        if run.plan.tokens is not None:
            engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        if run.graphed is not None:
            parts = run.graphed(batch, scale)
            engine.take_gradients()
        else:
            with phase("teacher"):
                states = next(teacher_states)
            with phase("student"):
                loss, parts = student(batch, states, scale, gather)
                # autograd has what the backward reads of them
                del states
            with phase("backward"):
                engine.backward(loss)
        with phase("optimiser"):
            engine.step()
        totals += parts / run.plan.pieces
    if objective.weights.adapts:
        objective.weights.observe(ranks.sum(totals[0].clone()))
    return totals


def _look(run: Run, micro_batches: Sequence[Inputs], loss_scales: Tensor) -> None:
    """Observe the losses of a step that is not made: weights that follow losses start from it."""
    run.engine.eval()
    with torch.no_grad():
        gathers = run.gathers(micro_batches, loss_scales)
        found = [
            run.student(batch, run.teacher(batch), scale, gather)[1]
            for batch, scale, gather in zip(micro_batches, loss_scales, gathers, strict=True)
        ]
    run.engine.train()
    run.objective.weights.observe(run.ranks.sum(torch.stack(found).sum(dim=0)[0] / run.plan.pieces))


def _finish(folder: RunFolder, recipe: AnyRecipe, summary: dict[str, Any]) -> None:
    if not recipe.run.lean:
        write_card(folder, recipe, summary, noted_models(folder.path))
    # last, because it is what makes the run finished
    folder.write_summary(summary)


def _claim(folder: RunFolder, recipe: AnyRecipe, run: Run, stage: Stage | None) -> None:
    """Let the folder be that of the run, once all is checked, before anything else is written."""
    if stage is not None:
        stage.claim(run)
    folder.create(recipe)
    note_models(folder.path, recipe, None if stage is None else stage.first_folder)
