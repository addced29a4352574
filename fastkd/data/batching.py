"""The one rule by which an optimiser step is cut into ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from fastkd.errors import UserError
from fastkd.recipe import AnyRecipe, Recipe


@dataclass(frozen=True)
class BatchPlan:
    """How the blocks or examples of an optimiser step are cut."""

    micro_batch_size: int
    """Rows of a micro-batch; where `tokens` says how large one is, what surely fits."""
    accumulation: int
    """Micro-batches of a rank in a step; where `tokens` says how large one is, by how many the
    engine divides, whatever there are."""
    world_size: int
    tokens: int | None = None
    """Tokens of a micro-batch at most, padding included, so that its rows and the number of
    micro-batches differ from step to step; `None` where both are fixed."""

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
    budget, row = _row_budget(recipe)
    share, rest = divmod(batch, world_size)
    if rest or not share:
        raise UserError(
            f"train.batch_size is {batch}, expected a multiple of the {world_size} ranks; "
            f"try {max(1, round(batch / world_size)) * world_size}"
        )
    if budget and budget < share * row:
        # some number of them, as the rows of steps are the same
        count = next(n for n in range(2, share + 1) if not share % n and share // n * row <= budget)
        return BatchPlan(share // count, count, world_size, tokens=budget)
    micro = micro or share
    if share % micro:
        raise UserError(
            f"train.micro_batch_size is {micro}, expected a divisor of the {share} rows that "
            f"each of {world_size} ranks has of train.batch_size {batch}"
        )
    return BatchPlan(micro, share // micro, world_size)


def _row_budget(recipe: AnyRecipe) -> tuple[int, int]:
    """Tokens of a micro-batch, 0 where rows are counted, and of a row at most."""
    if not isinstance(recipe, Recipe) or recipe.data is None:
        return 0, 0
    return recipe.data.batch_tokens or 0, recipe.row_tokens or 0
