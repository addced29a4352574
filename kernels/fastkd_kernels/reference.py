"""The definition of every op in plain PyTorch: what the fast paths are tested and timed against.

Nothing here saves memory. Every function works in the precision of its inputs, fp64 included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .types import AttentionState, Reduction


def attention_scores(state: AttentionState) -> Tensor:
    """`scale * query @ key^T` of shape `[batch, heads, tokens, tokens]`, GQA keys repeated."""
    repeat = state.query.shape[1] // state.key.shape[1]
    key = state.key.repeat_interleave(repeat, dim=1)
    return state.scale * (state.query @ key.mT)


def attention_score_mse(
    student: Sequence[AttentionState],
    teacher: Sequence[AttentionState],
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    reduction: Reduction = "valid",
) -> Tensor:
    """Mean squared difference of attention scores (arXiv 1909.10351, eq. 7), one value a pair."""
    batch, heads, tokens, _ = student[0].query.shape
    device = student[0].query.device
    entries = torch.ones(batch, heads, tokens, tokens, dtype=torch.bool, device=device)
    if key_mask is not None:
        entries = entries & key_mask[:, None, None, :]
    if query_mask is not None and reduction == "valid":
        entries = entries & query_mask[:, None, :, None]
    if causal:
        entries = entries.tril()
    count = entries.sum() if reduction == "valid" else entries.numel()
    losses = []
    for own, target in zip(student, teacher, strict=True):
        difference = attention_scores(own) - attention_scores(target)
        losses.append(_mean_square(difference.masked_fill(~entries, 0.0), count))
    return torch.stack(losses)


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
        losses.append(_mean_square(difference, count))
    return torch.stack(losses)


def _mean_square(difference: Tensor, count: Tensor | int) -> Tensor:
    """Sum of squares over `count` in at least fp32; 0 where nothing is counted."""
    dtype = torch.promote_types(difference.dtype, torch.float32)
    divisor = torch.as_tensor(count, device=difference.device).clamp(min=1).to(dtype)
    return difference.square().sum(dtype=dtype) / divisor
