"""A finished run, evaluated: what overrides it takes, and what has to be as it was."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.data.tasks.retention import Evidence, Judge
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.models import model_digests
from fastkd.models.digests import NOTE, model_sources, require_same_models
from fastkd.recipe import AnyRecipe, Recipe, TaskSelection, each_stage
from fastkd.training.deepspeed_config import check_packages
from fastkd.training.engine import engines_ended
from fastkd.training.evaluate import Evaluation, Kept, evaluate
from fastkd.training.precision import tf32_products
from fastkd.training.run_folder import RunFolder
from fastkd.training.same_data import READ_ALIKE, field_of, judged_by, require_same_data
from fastkd.training.same_recipe import check_recipes
from fastkd.training.setup import Run, set_up_evaluation

# what an evaluation may replace
_REPLACEABLE = (
    *("data", "task", "evaluate", "teacher", "train"),
    *("student.attention", "model.attention"),
)
# of `data`: where and by how many text is read, and how much of it is judged
_OF_READING = ("workers", "cache", "shuffle_buffer", "heldout_blocks")

logger = logging.getLogger(__name__)


@engines_ended()
def evaluate_run(folder: RunFolder, overrides: Sequence[str], ranks: Ranks) -> Evaluation:
    """Evaluate what a run exported, and its teacher, on its own held-out data or on another.

    Args:
        folder: of a finished run, of a distillation or a fine-tuning.
        overrides: dotted keys of `data`, `task`, `teacher` or `train` that replace the run's.
        ranks: from `start_ranks`.

    Raises:
        UserError: the run is not finished, an override does not fit, or the teacher or the data
            that no override names are not what they were.
    """
    check_overrides(overrides)
    summary = ranks.on_each(folder.read_finished)
    made, recipe = ranks.on_each(lambda: (folder.read_recipe(), folder.read_recipe(overrides)))
    check_recipes("evaluate", recipe, ranks, run=summary)
    check_packages(recipe)
    _check_selection(made, recipe)
    if isinstance(recipe, Recipe) and recipe.stages:
        made, recipe = each_stage(made)[-1], each_stage(recipe)[-1]
        summary = summary["stages"][-1]
        folder = RunFolder(folder.path / Path(recipe.run.output).name)
    # those that are counted in passes over the data came to so many
    train = recipe.train.model_copy(update={"steps": recipe.train.steps or summary["steps"]})
    changed: dict[str, Any] = {"train": train}
    if isinstance(recipe, Recipe) and recipe.data is not None and _reads_other_text(made, recipe):
        # a stream reads no more of the text than it needs
        changed["data"] = recipe.data.model_copy(update={"streaming": True})
        logger.warning(
            "held-out blocks are the first of this text; those of the run were spread over its own"
        )
    with tf32_products(ranks.device, train.tf32):
        run = set_up_evaluation(recipe.model_copy(update=changed), folder, ranks)
        ranks.from_main(lambda: _check_same(run, folder, summary, overrides))
        found = evaluate(run, judge_teacher=True)
    return replace(found, kept=_kept(run, found))


def _check_same(
    run: Run, folder: RunFolder, summary: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """See that a run is judged against the teacher and by the data that it was made with, where no
    override names others."""

    def is_given(field: str) -> bool:
        return any(f"{field}.".startswith(k) or k.startswith(f"{field}.") for k in keys)

    keys = [f"{override.partition('=')[0]}." for override in overrides]
    keys = [key for key in keys if not key.startswith(READ_ALIKE)]
    sources = model_sources(run.recipe)
    teachers = [f for f in sources if f.startswith("teacher.") and not is_given(f)]
    if (folder.path / NOTE).exists() and not is_given("teacher.revision"):
        found = {field: model_digests(sources[field]) for field in teachers}
        remedy = "put it back, or name the teacher to judge against, as teacher.model=FOLDER"
        require_same_models(folder.path, run.recipe, found, remedy)
    section, place = ("data", "train") if run.recipe.task is None else ("task", "source")
    if not is_given(section):
        noted = judged_by(summary["data_digests"])
        same = {part: d for part, d in noted.items() if not is_given(field_of(part) or section)}
        remedy = f"put it back, or name what to judge by, as {section}.{place}=FOLDER"
        require_same_data(same, run.data_digests, str(folder.path), remedy)


def _kept(run: Run, found: Evaluation) -> Kept | None:
    data = run.datamodule
    if not (isinstance(data, TaskDataModule) and found.outputs and found.teacher_outputs):
        return None
    judge = Judge(data.task, {name: one.labels for name, one in data.evaluations.items()})
    teacher, student = map(judge.of_outputs, (found.teacher_outputs, found.outputs))
    share = Evidence(student, judge.floor, teacher).kept
    if share is None:
        return Kept(None, None, None)
    return Kept(share.value, *share.interval())


def check_overrides(overrides: Sequence[str]) -> None:
    """See that overrides leave what a run made as it is.

    Raises:
        UserError: one that would describe another student than the run's.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not any(f"{key}.".startswith(f"{allowed}.") for allowed in _REPLACEABLE):
            raise UserError(
                f"override {override!r}: the run is made, so an evaluation takes values of "
                f"{', '.join(_REPLACEABLE)} alone"
            )


def _reads_other_text(made: AnyRecipe, now: Recipe) -> bool:
    """Whether `now` packs other text than a run that did not stream its own."""
    before = made.data if isinstance(made, Recipe) else None
    if now.data is None or now.data.by_rows or now.data.streaming:
        return False
    same = {} if before is None else {name: getattr(before, name) for name in _OF_READING}
    return now.data.model_copy(update=same) != before


def _check_selection(made: AnyRecipe, now: AnyRecipe) -> None:
    """Refuse to score a run on examples that it was trained on, as if it had not seen them."""
    kept, scored = ([_selection(stage) for stage in each_stage(recipe)] for recipe in (made, now))
    share, last = min(0.0 if one is None else one.share for one in kept), scored[-1]
    if last is not None and last.scored and last.share > share:
        raise UserError(
            f"task.selection.share is {last.share:g}, but the run kept {share:g} of its examples "
            "out of training, so some of the others would be scored too; give at most that, or set "
            "task.selection to null"
        )


def _selection(recipe: AnyRecipe) -> TaskSelection | None:
    return None if recipe.task is None else recipe.task.selection
