"""Definitions of the ops on attention probabilities and relations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention_score_mse.reference import attention_scores
from ..common.reference import row_divergence
from ..types import AttentionDivergenceKind, AttentionReduction, AttentionState, Relation


def attention_divergence(
    student: Sequence[AttentionState],
    teacher: Sequence[AttentionState],
    *,
    kind: AttentionDivergenceKind = "kl",
    temperature: float = 1.0,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    reduction: AttentionReduction = "tokens",
) -> Tensor:
    """Mean divergence of attention probabilities over rows that see a key, one value a pair."""
    visible = visible_keys(student[0].query, key_mask, causal, window)
    rows = visible.any(-1)
    if query_mask is not None:
        rows = rows & query_mask[:, None, :]
    # a row that sees nothing is not counted, but its softmax must be one
    seen = visible | ~visible.any(-1, keepdim=True)
    losses = []
    for student_state, teacher_state in zip(student, teacher, strict=True):
        log_p, log_t = (
            log_probabilities(state, seen, temperature) for state in (student_state, teacher_state)
        )
        values = row_divergence(log_p, log_t, kind)
        dtype = torch.promote_types(values.dtype, torch.float32)
        # [batch, heads, tokens]
        values = values.masked_fill(~rows, 0.0)
        if reduction == "tokens":
            count = rows.sum().clamp(min=1) * values.shape[1]
            losses.append(values.sum(dtype=dtype) / count)
        else:
            counts = rows.sum((1, 2))
            of_sequences = values.sum((1, 2), dtype=dtype) / (counts.clamp(min=1) * values.shape[1])
            losses.append(of_sequences.sum() / (counts > 0).sum().clamp(min=1))
    return torch.stack(losses)


def log_probabilities(state: AttentionState, seen: Tensor, temperature: float) -> Tensor:
    """Log of the attention probabilities `[batch, heads, tokens, tokens]`, -inf at hidden keys.

    With sinks one column more, the last: the sink's.
    """
    scores = attention_scores(state)
    if state.softcap is not None:
        # Gemma 2, arXiv 2408.00118, section 2
        scores = state.softcap * torch.tanh(scores / state.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if state.sinks is not None:
        sinks = state.sinks.to(scores)[None, :, None, None]
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    return (scores / temperature).log_softmax(-1)


def visible_keys(
    query: Tensor, key_mask: Tensor | None, causal: bool, window: int | None
) -> Tensor:
    """Bool `[batch, 1, tokens, tokens]`: the keys that each query row attends to."""
    batch, _, tokens, _ = query.shape
    position = torch.arange(tokens, device=query.device)
    ahead = position[None, :] - position[:, None]
    visible = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        visible = ahead <= 0
    if window is not None:
        visible = visible & (ahead.abs() < window)
    visible = visible.expand(batch, 1, tokens, tokens)
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def relation_divergence(
    student: Sequence[AttentionState],
    teacher: Sequence[AttentionState],
    *,
    relation: Relation = "vv",
    relation_heads: int,
    kind: AttentionDivergenceKind = "kl",
    temperature: float = 1.0,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    reduction: AttentionReduction = "tokens",
) -> Tensor:
    """Divergence of self-attention relations (arXiv 2012.15828, section 3.1), one value a pair."""
    return attention_divergence(
        [relation_state(state, relation, relation_heads) for state in student],
        [relation_state(state, relation, relation_heads) for state in teacher],
        kind=kind,
        temperature=temperature,
        key_mask=key_mask,
        query_mask=query_mask,
        causal=causal,
        window=window,
        reduction=reduction,
    )


def relation_state(state: AttentionState, relation: str, heads: int) -> AttentionState:
    """Two of queries, keys and values, concatenated over heads and cut into relation heads."""
    parts = {"q": state.query, "k": state.key, "v": state.value}
    left, right = (parts[letter] for letter in relation)
    if left is None or right is None:
        raise ValueError(f"relation={relation!r} needs a state with values")
    if relation == "qk":
        right = right.repeat_interleave(left.shape[1] // right.shape[1], dim=1)
    joined = (torch.cat(list(part.unbind(1)), dim=-1) for part in (left, right))
    left, right = (torch.stack(part.chunk(heads, dim=-1), dim=1) for part in joined)
    return AttentionState(left, right, None, left.shape[-1] ** -0.5)
