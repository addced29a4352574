"""A run's losses, computed once before it is claimed: an op says only then what it refuses."""

from __future__ import annotations

import torch

from fastkd.distributed import Ranks
from fastkd.errors import UserError, one_line
from fastkd.layer_map import Progress
from fastkd.recipe import Recipe
from fastkd.training.setup import Run, set_up_trial
from fastkd.training.steering import check_metrics


def check_recipe(recipe: Recipe, ranks: Ranks, *, progress: bool = True) -> None:
    """See that a run could be set up and that its losses can be computed, and keep nothing of it;
    collective over the ranks.

    Raises:
        UserError: as `set_up`, `check_metrics` and `try_losses`.
    """
    run = set_up_trial(recipe, ranks, progress=progress)
    check_metrics(run)
    try_losses(run)


def try_losses(run: Run) -> None:
    """See that the losses of a run can be computed on its data; collective over the ranks.

    Raises:
        UserError: what an op refuses, and why.
    """
    # of one example alone, a loss that forgets its mean has the right shape
    size = min(2, run.plan.micro_batch_size)
    inputs = run.move(next(iter(run.datamodule.heldout(size, run.ranks))).inputs)
    loss_scales = run.objective.divisors(inputs).clamp(min=1).reciprocal().float()
    run.objective.at(Progress())
    run.engine.eval()
    try:
        with torch.no_grad():
            run.student(inputs, run.teacher(inputs), loss_scales)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"losses: {one_line(error, None)}") from error
    run.engine.train()
