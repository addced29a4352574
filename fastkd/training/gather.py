"""Gathering the parts of a run, of distillation and fine-tuning alike.

Training, evaluating, trying and estimating a run start here. They differ in where the student comes
from: a run that trains builds it, an evaluation reads what a run exported.
"""

from __future__ import annotations

from functools import partial

from fastkd.data.batching import BatchPlan
from fastkd.distributed import Ranks
from fastkd.models import check_saved
from fastkd.recipe import AnyRecipe, Recipe
from fastkd.training.parts import Parts, gather_distillation
from fastkd.training.parts_finetune import gather_finetuning
from fastkd.training.precision import settle_precision
from fastkd.training.run_folder import RunFolder


def gather(
    recipe: AnyRecipe,
    plan: BatchPlan,
    ranks: Ranks,
    *,
    progress: bool,
    made: RunFolder | None = None,
) -> Parts:
    """Load, build and check the parts of a run; collective over the ranks.

    Args:
        recipe: of either kind; where a run has made the student, with its number of steps.
        plan: how a step is cut.
        ranks: this process among all.
        progress: whether reading data shows bars.
        made: a finished run, whose student and projections are read in place of new ones.

    Raises:
        UserError: anything about the recipe that does not work on this machine.
    """
    recipe = settle_precision(recipe, ranks)
    if isinstance(recipe, Recipe):
        found = gather_distillation(recipe, plan, ranks, progress, made)
    else:
        found = gather_finetuning(recipe, plan, ranks, progress, made)
    if made is None:
        config = found.module.student.config
        given = f"model {(found.start or found.source).name}"
        ranks.from_main(partial(check_saved, found.exported_tokenizer, config, given))
    return found
