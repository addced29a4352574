"""Attention divergence of all layer pairs of two models, to look at before a map is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from fastkd_kernels import AttentionState, attention_divergence, relation_divergence
from torch import Tensor

from fastkd.losses.base import ModelPair
from fastkd.losses.comparable import DivergenceKind


@torch.no_grad()
def attention_divergences(
    student: Mapping[int, AttentionState],
    teacher: Mapping[int, AttentionState],
    pair: ModelPair,
    *,
    kind: DivergenceKind,
    relation_heads: int | None,
    mask: Tensor | None,
) -> Tensor:
    """Mean divergence of the attention probabilities of every layer pair.

    Args:
        student, teacher: captured blocks, by number from 1.
        pair: whose `causal` and `windows` say what a query sees.
        kind: the divergence.
        relation_heads: cut queries and keys into so many heads on both sides first (MiniLMv2, arXiv
            2012.15828, with the relation of queries and keys); `None` compares head by head.
        mask: bool [batch, tokens], `None` where nothing is padded.

    Returns:
        [student blocks, teacher blocks] on the states' device; NaN where one block attends locally
        and the other doesn't, or not as far, or one alone has attention sinks.
    """
    rows = []
    for own, state in sorted(student.items()):
        window = pair.windows[0].get(own)
        # relations of vectors know no sinks
        sinks = own in pair.sinks[0] and relation_heads is None
        same = [
            layer
            for layer in sorted(teacher)
            if pair.windows[1].get(layer) == window
            and (layer in pair.sinks[1] and relation_heads is None) == sinks
        ]
        row = state.query.new_full((len(teacher),), torch.nan, dtype=torch.float32)
        if same:
            compare = (
                attention_divergence
                if relation_heads is None
                else partial(relation_divergence, relation="qk", relation_heads=relation_heads)
            )
            found = compare(
                [state] * len(same),
                [teacher[layer] for layer in same],
                kind=kind,
                key_mask=mask,
                query_mask=mask,
                causal=pair.causal,
                window=window,
            )
            places = torch.tensor([sorted(teacher).index(layer) for layer in same])
            row[places.to(row.device)] = found.float()
        rows.append(row)
    return torch.stack(rows)
