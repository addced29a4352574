"""Definitions of the ops on hidden states and embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Reduction
from .mean import mean_square


def hidden_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "valid",
) -> Tensor:
    """Mean squared error of projected hidden states (arXiv 1909.10351, eq. 8), one value a pair."""
    losses = []
    for pair, (own, target) in enumerate(zip(student, teacher, strict=True)):
        matrix = weight if weight is None or isinstance(weight, Tensor) else weight[pair]
        offset = bias if bias is None or isinstance(bias, Tensor) else bias[pair]
        projected = own if matrix is None else own @ matrix.mT
        difference = (projected if offset is None else projected + offset) - target
        count: Tensor | int = difference.numel()
        if mask is not None and reduction == "valid":
            difference = difference.masked_fill(~mask[..., None], 0.0)
            count = mask.sum() * target.shape[-1]
        losses.append(mean_square(difference, count))
    return torch.stack(losses)
