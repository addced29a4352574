"""Causal attention-score MSE in linear time on the CPU: chunked linear attention."""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention_score_mse_tiles import Sources, tile_sweep
from .gram import (
    Blocks,
    gram_blocks,
    key_factors,
    key_form,
    query_factors,
    query_form,
    squared_norm,
)
from .head_groups import Pair

# tokens of one chunk, and of the blocks of query rows on its diagonal
CHUNK = 128
DIAGONAL_ROWS = 64


class _Kept(NamedTuple):
    """What the way back needs of one chunk: `(R_0, R_1)` and the Gram of `P`."""

    chunk: slice
    right: tuple[Tensor, Tensor]
    left_blocks: Blocks


def causal_gram_sweep(pair: Pair, sources: Sources, outs: tuple[Tensor, Tensor] | None) -> Tensor:
    """Squares of one group under the causal mask: diagonal blocks directly, the rest by Grams.

    The prefix of `R^T R` serves the loss and the query gradient, the suffix of `P^T P` the key
    gradient, as in chunked linear attention.
    """
    tokens = sources.query.shape[2]
    scales = (pair.scale, pair.target_scale, pair.difference)
    squares = sources.query.new_zeros(())
    kept: list[_Kept] = []
    prefix: Blocks | None = None
    for start in range(0, tokens, CHUNK):
        chunk = slice(start, min(start + CHUNK, tokens))
        part = _cut(sources, chunk)
        query_out = torch.empty_like(part.query)
        diagonal = None if outs is None else (query_out, outs[1][:, chunk])
        squares += tile_sweep(pair, part, True, diagonal, DIAGONAL_ROWS)
        left = query_form(part.query.flatten(1, 2), part.target_query.flatten(1, 2), pair)
        right = key_form(part.key, part.target_key, pair)
        left_blocks = gram_blocks(*left)
        if prefix is not None:
            squares += squared_norm(left_blocks, prefix, *scales).sum()
        if outs is not None:
            if prefix is not None:
                first, second = query_factors(prefix, *scales)
                query_out.flatten(1, 2).baddbmm_(left[0], first).baddbmm_(left[1], second)
            outs[0][:, :, chunk] = query_out
            kept.append(_Kept(chunk, right, left_blocks))
        if chunk.stop < tokens:
            prefix = _add(prefix, gram_blocks(*right))
    suffix: Blocks | None = None
    for chunk, right, left_blocks in reversed(kept):
        if suffix is not None and outs is not None:
            first, second = key_factors(suffix, *scales)
            outs[1][:, chunk].baddbmm_(right[0], first).baddbmm_(right[1], second)
        suffix = _add(suffix, left_blocks)
    return squares


def _cut(sources: Sources, chunk: slice) -> Sources:
    return Sources(
        sources.query[:, :, chunk].contiguous(),
        sources.key[:, chunk],
        sources.target_query[:, :, chunk].contiguous(),
        sources.target_key[:, chunk],
    )


def _add(total: Blocks | None, part: Blocks) -> Blocks:
    return part if total is None else Blocks(*(a.add_(b) for a, b in zip(total, part, strict=True)))
