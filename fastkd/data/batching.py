"""The one rule by which an optimiser step is cut into ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from fastkd.errors import UserError
from fastkd.recipe import AnyRecipe


@dataclass(frozen=True)
class BatchPlan:
    """How the blocks or examples of an optimiser step are cut."""

    micro_batch_size: int
    accumulation: int
    world_size: int

    @property
    def pieces(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.accumulation * self.world_size

    def rows(self, rank: int) -> slice:
        """The rows of the global batch that a rank reads: its micro-batches, one after another."""
        share = self.accumulation * self.micro_batch_size
        return slice(rank * share, (rank + 1) * share)


def plan_batches(recipe: AnyRecipe, world_size: int) -> BatchPlan:
    """Cut `train.batch_size` into ranks and micro-batches.

    Raises:
        UserError: it doesn't divide.
    """
    batch, micro = recipe.train.batch_size, recipe.train.micro_batch_size
    share, rest = divmod(batch, world_size)
    if rest or not share:
        raise UserError(
            f"train.batch_size is {batch}, expected a multiple of the {world_size} ranks; "
            f"try {max(1, round(batch / world_size)) * world_size}"
        )
    micro = micro or share
    if share % micro:
        raise UserError(
            f"train.micro_batch_size is {micro}, expected a divisor of the {share} rows that "
            f"each of {world_size} ranks has of train.batch_size {batch}"
        )
    return BatchPlan(micro, share // micro, world_size)
