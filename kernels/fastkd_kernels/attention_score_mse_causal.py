"""Causal attention-score MSE in linear time on the CPU: chunked linear attention."""

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

CAUSAL_CHUNK = 128


def causal_gram_sweep(pair: Pair, sources: Sources, outs: tuple[Tensor, Tensor] | None) -> Tensor:
    """Squares of one group under the causal mask: diagonal blocks directly, the rest by Grams.

    The prefix of `R^T R` serves the loss and the query gradient, the suffix of `P^T P` the key
    gradient, as in chunked linear attention.
    """
    tokens = sources.query.shape[2]
    scales = (pair.scale, pair.target_scale, pair.difference)
    squares = sources.query.new_zeros(())
    chunks = [
        slice(start, min(start + CAUSAL_CHUNK, tokens)) for start in range(0, tokens, CAUSAL_CHUNK)
    ]
    prefix: Blocks | None = None
    for chunk in chunks:
        part = _cut(sources, chunk)
        key_out = None if outs is None else outs[1][:, chunk]
        query_out = None if outs is None else torch.empty_like(part.query)
        diagonal = None if query_out is None or key_out is None else (query_out, key_out)
        squares += tile_sweep(pair, part, True, diagonal)
        left, right = (
            query_form(part.query.flatten(1, 2), part.target_query.flatten(1, 2), pair),
            (key_form(part.key, part.target_key, pair)),
        )
        if prefix is not None:
            squares += squared_norm(gram_blocks(*left), prefix, *scales).sum()
            if query_out is not None:
                first, second = query_factors(prefix, *scales)
                query_out.flatten(1, 2).baddbmm_(left[0], first).baddbmm_(left[1], second)
        if outs is not None and query_out is not None:
            outs[0][:, :, chunk] = query_out
        prefix = _add(prefix, gram_blocks(*right))
    if outs is None:
        return squares
    suffix: Blocks | None = None
    for chunk in reversed(chunks):
        part = _cut(sources, chunk)
        if suffix is not None:
            first, second = key_factors(suffix, *scales)
            right = key_form(part.key, part.target_key, pair)
            outs[1][:, chunk].baddbmm_(right[0], first).baddbmm_(right[1], second)
        left = query_form(part.query.flatten(1, 2), part.target_query.flatten(1, 2), pair)
        suffix = _add(suffix, gram_blocks(*left))
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
