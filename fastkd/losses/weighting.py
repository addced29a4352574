"""What the losses are multiplied with: schedules, running ratios, learned variances."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.recipe.weights import Schedule


def factor(schedule: Schedule | None, progress: float) -> float:
    """A factor on the weight of one loss that changes over the run.

    With s the share of the run that is done, and x = (s - begin) / (end - begin) held to [0, 1]:

        linear  first + (last - first) x
        cosine  first + (last - first) (1 - cos(pi x)) / 2
        step    first where s < begin, else last

    Args:
        schedule: section of a term; 1 throughout where there is none.
        progress: share of the run that is done, in [0, 1].
    """
    if schedule is None:
        return 1.0
    first, last = schedule.first, schedule.last
    if schedule.kind == "step":
        return first if progress < schedule.begin else last
    moved = (progress - schedule.begin) / (schedule.end - schedule.begin)
    moved = min(max(moved, 0.0), 1.0)
    if schedule.kind == "cosine":
        moved = (1 - math.cos(math.pi * moved)) / 2
    return first + (last - first) * moved


class Ratio:
    """Every term scaled to the running size of a reference term, by detached values.

        scale = mean of the reference / mean of the term,    mean = decay mean + (1 - decay) size

    A term then weighs as its `weight` says, whatever its size; the first step looks at its own
    batch before it trains on it. A term that is 0 there, such as a student's embeddings that are
    its teacher's, is not scaled before it has a size, with which its mean then begins.

    The means live outside the module's parameters and buffers: an engine in bf16 would round them.
    """

    def __init__(self, terms: tuple[str, ...], reference: str | None, decay: float) -> None:
        self.terms = terms
        self.reference = terms.index(reference) if reference else 0
        self.decay = decay
        self.means: Tensor | None = None

    def observe(self, sizes: Tensor) -> None:
        """Take in the terms [terms] of a step, over all ranks; the first ones count whole.

        Raises:
            UserError: the reference is 0 at the first of them.
        """
        old = self.means
        if old is None:
            self._check_reference(sizes)
            self.means = sizes
        else:
            # from a mean of 0 it would take 1 / (1 - decay) steps to come near
            moved = self.decay * old + (1 - self.decay) * sizes
            self.means = torch.where(old == 0, sizes, moved)

    def scales(self) -> Tensor | None:
        """Running mean of the reference over that of each term, [terms]; `None` before a step."""
        if self.means is None:
            return None
        # a term that was zero throughout has nothing to scale
        return torch.where(self.means > 0, self.means[self.reference] / self.means, 1.0)

    def _check_reference(self, sizes: Tensor) -> None:
        """See that there is something to scale to; reads the device, once a run."""
        found = sizes.tolist()
        if found[self.reference] != 0:
            return
        others = [term for term, size in zip(self.terms, found, strict=True) if size > 0]
        use = f"name another reference, such as {others[0]}" if others else "leave balance out"
        raise UserError(
            f"losses.balance scales all terms to {self.terms[self.reference]}, which is 0 before "
            f"the first step, so all would be; {use}"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"means": None if self.means is None else self.means.tolist()}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from `state`."""
        if state["means"] is not None:
            self.means = torch.tensor(state["means"], dtype=torch.float64, device=device)


class Uncertainty(nn.Module):
    """Weights that are learned, as log-variances s of the terms (Kendall et al., arXiv 1705.07115,
    eq. 7).

        total = sum over terms of exp(-s) L / 2 + s / 2,    s = limit tanh(parameter / limit)

    Their form for classification, exp(-s) L + s / 2, is the same with s shifted by log 2. A hard
    clamp would leave a variance that once reaches the limit without a gradient. A term that is
    switched off, by its weight or its schedule, is left out of the sum: its variance would shrink
    to the limit, and weigh that much when it is switched on.
    """

    def __init__(self, terms: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        # one dimension, so that the optimiser puts no weight decay on them
        self.log_variances = nn.Parameter(torch.zeros(terms))

    def forward(self, sizes: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
        """The total of the weighted terms [terms], of which some are on, bool [terms]: a scalar;
        and their scales [terms]."""
        clamped = self.limit * torch.tanh(self.log_variances.to(sizes.dtype) / self.limit)
        clamped = clamped.masked_fill(~on, 0.0)
        scales = (-clamped).exp() / 2
        return (scales * sizes).sum() + clamped.sum() / 2, scales.detach()
