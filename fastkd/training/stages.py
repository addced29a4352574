"""A recipe with stages: one run after the other, each from the student that the last one left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.files.disk import (
    disk_errors,
    replace_folder,
    settle,
    temporary_of,
)
from fastkd.recipe import AnyRecipe, Recipe, stage_recipes
from fastkd.reporting.console import Reporter
from fastkd.training.deepspeed_config import check_packages
from fastkd.training.loop import (
    distill,
    distill_held,
    hold_run,
)
from fastkd.training.rehearsal import check_recipe
from fastkd.training.run_folder import RunFolder

_ADDED_UP = ("steps", "seconds", "train_examples", "train_tokens")


def run_recipe(
    recipe: AnyRecipe,
    ranks: Ranks,
    *,
    resume: bool,
    reporter: Reporter,
    report: Callable[[RunFolder], None] | None = None,
) -> dict[str, Any]:
    """Run a recipe of either kind, in stages where it has some, and return its summary.

    A run in stages holds the folder of each stage, and what the last one left as its own: its
    `student/`, and a summary with the `after` of the last and the `before` of the first.

    Args:
        recipe: what to do.
        ranks: from `start_ranks`; every rank calls this.
        resume: continue in the stage that was interrupted.
        reporter: what the user sees.
        report: called on rank 0 with each folder that is finished, while it is still held.

    Raises:
        UserError: anything that the user can mend.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    # before a run in stages makes its folder
    check_packages(recipe)
    stages = stage_recipes(recipe) if isinstance(recipe, Recipe) else []
    run = RunFolder(recipe.run.output)
    with hold_run(run, recipe, ranks, resume=resume, reporter=reporter) as summary:
        if summary is None and stages:
            summary = _run_stages(recipe, stages, ranks, resume=resume, reporter=reporter)
        elif summary is None:
            summary = distill_held(recipe, ranks, reporter)
        if report is not None and ranks.is_main:
            for folder in stage_folders(recipe):
                report(folder)
    return summary


def _run_stages(
    recipe: AnyRecipe, stages: list[Recipe], ranks: Ranks, *, resume: bool, reporter: Reporter
) -> dict[str, Any]:
    run = RunFolder(recipe.run.output)
    _check_later(stages, ranks, reporter)
    summaries = []
    for number, stage in enumerate(stages, start=1):
        reporter.say(f"stage {number} of {len(stages)}")
        claimed = partial(run.create, recipe)
        found = distill(stage, ranks, resume=resume, reporter=reporter, claimed=claimed)
        summaries.append(found)
    summary = _joined(run, summaries)
    if ranks.is_main:
        run.take_over(recipe)
        _take_student(run, stage_folders(recipe)[-1])
        # last, because it is what makes the run finished
        run.write_summary(summary)
    ranks.barrier()
    return summary


def _check_later(stages: list[Recipe], ranks: Ranks, reporter: Reporter) -> None:
    """See that the stages after the one that is next can run, before that one takes its time.

    Each starts from a student that isn't there yet: one of the same shape, as the first stage
    starts with, stands in for it.
    """

    def find() -> list[int]:
        done = [RunFolder(stage.run.output).summary.is_file() for stage in stages]
        return [number for number, is_done in enumerate(done) if not is_done][1:]

    for number in ranks.from_main(find):
        reporter.say(f"checking stage {number + 1} of {len(stages)}")
        stage = stages[number].model_copy(update={"student": stages[0].student})
        try:
            check_recipe(stage, ranks, progress=not reporter.console.quiet)
        except UserError as error:
            raise UserError(f"stages.{number + 1}: {error}") from error


def stage_folders(recipe: AnyRecipe) -> list[RunFolder]:
    """The folders of all stages of a recipe; its own where it has none."""
    stages: list[AnyRecipe] = list(stage_recipes(recipe)) if isinstance(recipe, Recipe) else []
    return [RunFolder(stage.run.output) for stage in stages or [recipe]]


def _joined(run: RunFolder, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(s[key] for s in summaries) for key in _ADDED_UP if key in summaries[0]}
    return {
        **summaries[-1],
        **sums,
        "run": str(run.path),
        "before": summaries[0]["before"],
        # losses of different stages don't compare, so each is held against itself
        "worse": [
            f"stage {number}: {said}"
            for number, stage in enumerate(summaries, start=1)
            for said in stage.get("worse", [])
        ],
        "stages": summaries,
    }


def _take_student(run: RunFolder, last: RunFolder) -> None:
    folder = temporary_of(run.student)
    with disk_errors(run.path):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(last.student, folder)
        settle(folder)
        replace_folder(folder, run.student)
