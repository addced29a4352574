"""Definition of the mean squared error of attention scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import AttentionState, Reduction, TeacherLayers, TeacherWeights


def attention_scores(state: AttentionState) -> Tensor:
    """`scale * query @ key^T` of shape `[batch, heads, tokens, tokens]`, GQA keys repeated."""
    repeat = state.query.shape[1] // state.key.shape[1]
    key = state.key.repeat_interleave(repeat, dim=1)
    return state.scale * (state.query @ key.mT)


def weighted_scores(layers: TeacherLayers, weights: Sequence[float] | None) -> Tensor:
    """Weighted sum of the scores of one layer or several; None is their even average."""
    states = [layers] if isinstance(layers, AttentionState) else list(layers)
    factors = [1 / len(states)] * len(states) if weights is None else weights
    scores = [attention_scores(state) * w for state, w in zip(states, factors, strict=True)]
    return torch.stack(scores).sum(0)


def attention_score_mse(
    student: Sequence[AttentionState],
    teacher: Sequence[TeacherLayers],
    *,
    teacher_weights: TeacherWeights | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    reduction: Reduction = "valid",
) -> Tensor:
    """Mean squared difference of attention scores (arXiv 1909.10351, eq. 7), one value a pair."""
    batch, _, tokens, _ = student[0].query.shape
    device = student[0].query.device
    # of one head
    entries = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device=device)
    if key_mask is not None:
        entries = entries & key_mask[:, None, None, :]
    if query_mask is not None and reduction == "valid":
        entries = entries & query_mask[:, None, :, None]
    if causal:
        entries = entries.tril()
    count = entries.sum() if reduction == "valid" else torch.tensor(entries.numel(), device=device)
    losses = []
    weights = teacher_weights or [None] * len(student)
    for student_state, teacher_state, given in zip(student, teacher, weights, strict=True):
        difference = attention_scores(student_state) - weighted_scores(teacher_state, given)
        dtype = torch.promote_types(difference.dtype, torch.float32)
        squares = difference.masked_fill(~entries, 0.0).square().sum(dtype=dtype)
        heads = student_state.query.shape[1]
        losses.append(squares / (heads * count).clamp(min=1).to(dtype))
    return torch.stack(losses)
