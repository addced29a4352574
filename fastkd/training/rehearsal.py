"""A run's losses, computed once before it is claimed: an op says only then what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastkd.capture import Capture, capture, no_cache
from fastkd.data.batching import plan_batches
from fastkd.data.datamodule import DataModule
from fastkd.distributed import Ranks
from fastkd.errors import UserError, one_line
from fastkd.layer_map import Progress
from fastkd.losses import Objective, model_inputs
from fastkd.recipe import Recipe
from fastkd.training.deepspeed_config import student_config
from fastkd.training.engine import check_config
from fastkd.training.memory import check_micro_batch
from fastkd.training.setup import Assembly, gather
from fastkd.types import Inputs


def check_recipe(recipe: Recipe, ranks: Ranks, *, progress: bool = True) -> None:
    """See that a run could be assembled and that its losses can be computed, and keep nothing of
    it; collective over the ranks.

    Raises:
        UserError: as `assemble` and `try_losses`.
    """
    plan = plan_batches(recipe, ranks.world_size)
    check_config(student_config(recipe, plan))
    check_micro_batch(recipe, plan.micro_batch_size, ranks.device)
    torch.manual_seed(recipe.train.seed)
    parts = gather(recipe, plan, ranks, progress=progress)
    # a sharded teacher may not fit on one device: both are tried where they were loaded
    device = ranks.device if recipe.teacher.placement == "replicate" else torch.device("cpu")
    module, teacher = parts.module.to(device), parts.teacher.to(device)
    objective = module.objective

    def look(inputs: Inputs) -> Capture:
        with torch.no_grad(), capture(teacher, **objective.layers("teacher")) as states:
            teacher(**model_inputs(inputs), **no_cache(teacher))
        return states

    module.eval()
    _try(module, objective, look, parts.datamodule, ranks, device)


def try_losses(assembly: Assembly) -> None:
    """See that the losses of a run can be computed on its data; collective over the ranks.

    Raises:
        UserError: what an op refuses, and why.
    """
    engine, objective, ranks = assembly.engine, assembly.objective, assembly.ranks
    engine.eval()
    _try(engine, objective, assembly.teacher.capture, assembly.datamodule, ranks, ranks.device)
    engine.train()


def _try(
    student: Callable[..., object],
    objective: Objective,
    look: Callable[[Inputs], Capture],
    datamodule: DataModule,
    ranks: Ranks,
    device: torch.device,
) -> None:
    part = next(iter(datamodule.heldout(1, ranks)))
    inputs = {name: tensor.to(device) for name, tensor in part.inputs.items()}
    shares = objective.divisors(inputs).clamp(min=1).reciprocal().float()
    objective.at(Progress())
    try:
        with torch.no_grad():
            student(inputs, look(inputs), shares)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"losses: {one_line(error, None)}") from error
