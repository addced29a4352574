"""A recipe with stages: one run after the other, each from the student that the last one left."""

from __future__ import annotations

import shutil
from typing import Any

from fastkd.console import Reporter
from fastkd.deepspeed_config import check_monitor
from fastkd.engine import Ranks
from fastkd.recipe import AnyRecipe, Recipe, stage_recipes
from fastkd.run_folder import RunFolder
from fastkd.train import distill

_ADDED_UP = ("steps", "seconds", "train_examples", "train_tokens")


def run_recipe(
    recipe: AnyRecipe, ranks: Ranks, *, resume: bool, reporter: Reporter
) -> dict[str, Any]:
    """Run a recipe of either kind, in stages where it has some, and return its summary.

    A run in stages holds the folder of each stage, and what the last one left as its own: its
    `student/`, and a summary with the `after` of the last and the `before` of the first.

    Args:
        recipe: what to do.
        ranks: from `start_ranks`; every rank calls this.
        resume: continue in the stage that was interrupted.
        reporter: what the user sees.

    Raises:
        UserError: anything that the user can mend.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    # before a run in stages makes its folder
    check_monitor(recipe)
    stages = stage_recipes(recipe) if isinstance(recipe, Recipe) else []
    if not stages:
        return distill(recipe, ranks, resume=resume, reporter=reporter)
    run = RunFolder(recipe.run.output)
    finished = ranks.from_main(lambda: run.begin(recipe, resume=resume))
    if finished is not None:
        reporter.say(f"{run.path} is finished; remove it to run again")
        return finished
    summaries = []
    for number, stage in enumerate(stages, start=1):
        reporter.say(f"stage {number} of {len(stages)}")
        summaries.append(distill(stage, ranks, resume=resume, reporter=reporter))
    summary = _joined(run, summaries)
    if ranks.is_main:
        _take_student(run, stage_folders(recipe)[-1])
        # last, because it is what makes the run finished
        run.write_summary(summary)
    ranks.barrier()
    return summary


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
    folder = run.path / ".student"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(last.student, folder)
    shutil.rmtree(run.student, ignore_errors=True)
    folder.rename(run.student)
