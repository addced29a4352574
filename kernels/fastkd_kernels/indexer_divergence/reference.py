"""Definition of the loss of a lightning indexer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention_divergence.reference import log_probabilities, visible_keys
from ..common.reference import row_divergence
from ..types import AttentionState, IndexerState


def indexer_divergence(
    student: Sequence[IndexerState],
    teacher: Sequence[AttentionState],
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Mean KL of the indexer from attention summed over heads, over rows that see a key.

    One value a pair.
    """
    # [batch, 1, tokens, tokens]
    visible = visible_keys(teacher[0].query, key_mask, causal, None)
    rows = visible.any(-1).squeeze(1)
    if query_mask is not None:
        rows = rows & query_mask
    # a row that sees nothing is not counted, but its softmax must be one
    seen = visible | ~visible.any(-1, keepdim=True)
    losses = []
    for indexer, state in zip(student, teacher, strict=True):
        log_t = log_target(state, seen)
        scores = index_scores(indexer).masked_fill(~seen.squeeze(1), -torch.inf)
        values = row_divergence(scores.log_softmax(-1), log_t, "kl")
        dtype = torch.promote_types(values.dtype, torch.float32)
        losses.append(values.masked_fill(~rows, 0.0).sum(dtype=dtype) / rows.sum().clamp(min=1))
    return torch.stack(losses)


def log_target(state: AttentionState, seen: Tensor) -> Tensor:
    """Log `[batch, tokens, tokens]` of the attention probabilities, summed over heads and then
    divided by their sum over the keys (DeepSeek-V3.2, arXiv 2512.02556, section 2.1)."""
    tokens = state.query.shape[2]
    # a head's probabilities add up to less than 1 where its sink takes a share
    of_heads = log_probabilities(state, seen, 1.0)[..., :tokens]
    return of_heads.logsumexp(1).log_softmax(-1)


def index_scores(state: IndexerState) -> Tensor:
    """`I[t, s] = sum_h w[t, h] relu(q[h, t] . k[s])` `[batch, tokens, tokens]` (equation 1)."""
    key = state.key if state.key.ndim == 4 else state.key[:, None]
    # [batch, tokens, index_heads, tokens]
    positive = (state.query @ key.mT).relu().transpose(1, 2)
    dtype = torch.promote_types(positive.dtype, state.weights.dtype)
    return (state.weights[:, :, None].to(dtype) @ positive.to(dtype)).squeeze(2)
