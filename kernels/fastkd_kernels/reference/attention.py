"""Definitions of the ops on queries and keys."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import AttentionState, Reduction
from .mean import mean_square


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
        losses.append(mean_square(difference.masked_fill(~entries, 0.0), count))
    return torch.stack(losses)
