"""Losses that compare rows with each other, over all rows of an optimiser step.

Such a loss L is no sum over micro-batches: every row meets all others. `Batch.gather` makes of what
one micro-batch holds the same of the whole step, in which the rows of this micro-batch alone carry
gradient. Each micro-batch then computes L whole and hands over its part of dL, and the parts add up
to dL, as every row is live in one micro-batch and has the same value in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Gather: TypeAlias = Callable[[Tensor], Tensor]
"""Makes of the rows [n, ...] of a micro-batch those of the step, [N, ...]."""


def alone(rows: Tensor) -> Tensor:
    """The `Gather` of a micro-batch that is the whole batch."""
    return rows


def undeclared(rows: Tensor) -> Tensor:
    """The `Gather` of losses that say they need none."""
    raise ValueError(
        "calls batch.gather, but does not say that it compares rows; give its class least_rows = 2"
    )


class Notes:
    """The `Gather` of a pass that is made to know the rows of a step, and whose losses nobody
    reads: takes down what is gathered."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.rows.append(rows.detach())
        return rows


def gathered_value(loss: Tensor, own: int, whole: int) -> Tensor:
    """What a micro-batch returns of a loss of the whole step.

    A value counts by its micro-batch's share of the step, n / N. Of the value that is right as it
    is; the gradient of n rows is theirs alone already, and is divided by that share here:

        sum n/N L = L        sum n/N (N/n dL_n) = dL

    Args:
        loss: scalar, computed from gathered rows.
        own: n, how many of these are of this micro-batch.
        whole: N, how many there are.
    """
    fixed = loss.detach()
    return fixed + (loss - fixed) * (whole / own)
