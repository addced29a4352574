"""Attention-score MSE in plain PyTorch with linear memory: what CPU tensors run.

Works on small groups of heads (`head_groups.py`). Under the causal mask "gram" is chunked linear
attention.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.autograd import accumulator, squared_sum
from ..common.head_groups import (
    Pair,
    Sources,
    fold_keys,
    group_bytes,
    head_groups,
    query_slot,
    stacked_like,
    zeroed_sources,
)
from .gram import (
    Gram,
    gram_of,
    key_factors,
    key_form,
    query_factors,
    query_form,
    squared_norm,
)

# tokens of one chunk, and of the blocks of query rows on its diagonal
CHUNK = 128

DIAGONAL_ROWS = 64


def one_pass(
    pairs: list[Pair],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    causal: bool,
    algorithm: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squares `[pairs]`, `c_s D K_s` and `c_s D^T Q_s`, in one sweep over the inputs.

    "tiles" forms `D` in blocks; "gram" never forms it, or only near the diagonal where `causal`.
    """
    dtype = accumulator(*pairs[0].tensors)
    squares = pairs[0].query.new_zeros(len(pairs), dtype=dtype)
    query_grad, key_grad = squares.new_empty(0), squares.new_empty(0)
    if need_grad:
        query_grad = stacked_like(pairs, pairs[0].query, dtype)
        key_grad = stacked_like(pairs, pairs[0].key, dtype)
    rows = CHUNK if causal and algorithm == "gram" else None
    # these sweeps add key gradients up, block by block
    adds_up = causal or algorithm == "tiles"
    for index, pair in enumerate(pairs):
        # whether each key group is one of the student's key heads
        by_student_heads = pair.groups == pair.key.shape[1]
        for group in head_groups(pair, dtype, rows):
            sources = zeroed_sources(pair, group, dtype, key_mask, query_mask)
            outs = None
            if need_grad:
                if by_student_heads:
                    key_out = key_grad[index][group.batch, group.heads].flatten(0, 1)
                else:
                    key_out = sources.key.new_empty(sources.key.shape)
                if adds_up:
                    key_out.zero_()
                outs = (query_slot(query_grad[index], group, pair), key_out)
            if algorithm == "tiles":
                squares[index] += tile_sweep(pair, sources, causal, outs)
            elif causal:
                squares[index] += causal_gram_sweep(pair, sources, outs)
            else:
                squares[index] += _gram_sweep(pair, sources, outs)
            if outs is not None and not by_student_heads:
                fold_keys(key_grad[index], group, outs[1])
    return squares, query_grad, key_grad


def _gram_sweep(pair: Pair, sources: Sources, outs: tuple[Tensor, Tensor] | None) -> Tensor:
    """Squares of one group by the Grams of all its rows.

    Gradients are made at once, while the rows are in the caches.
    """
    scales = (pair.scale, pair.teacher_scale, pair.difference)
    left = query_form(sources.query.flatten(1, 2), sources.teacher_query.flatten(1, 2), pair)
    right = key_form(sources.key, sources.teacher_key, pair)
    query, key = gram_of(*left), gram_of(*right)
    if outs is not None:
        _apply(left, query_factors(key, *scales), outs[0].flatten(1, 2))
        _apply(right, key_factors(query, *scales), outs[1])
    return squared_norm(query, key, *scales).sum()


def _apply(sides: tuple[Tensor, Tensor], factors: tuple[Tensor, Tensor], out: Tensor) -> None:
    """`out = side_0 F_0 + side_1 F_1`."""
    torch.bmm(sides[0], factors[0], out=out)
    out.baddbmm_(sides[1], factors[1])


def tile_sweep(
    pair: Pair,
    sources: Sources,
    causal: bool,
    outs: tuple[Tensor, Tensor] | None,
    rows: int | None = None,
) -> Tensor:
    """Squares of one group; fills `outs`: query `[n, repeat, tokens, dim]`, key summed into.

    One block takes `rows` query rows, or as many as fit `group_bytes`.
    """
    query, key, teacher_query, teacher_key = sources
    count, repeat, tokens, dim = query.shape
    step = rows or max(16, group_bytes() // (count * repeat * tokens * query.element_size()))
    squares = query.new_zeros(())
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        seen = stop if causal else tokens
        student_rows = query[:, :, start:stop].reshape(count, -1, dim)
        teacher_rows = teacher_query[:, :, start:stop].reshape(count, repeat * (stop - start), -1)
        # D = c_s Q_s K_s^T - c_t Q_t K_t^T
        tile = student_rows @ key[:, :seen].mT
        tile.baddbmm_(
            teacher_rows, teacher_key[:, :seen].mT, beta=pair.scale, alpha=-pair.teacher_scale
        )
        if causal:
            tile.view(count, repeat, stop - start, seen).tril_(start)
        squares += squared_sum(tile)
        if outs is not None:
            query_grad = torch.bmm(tile, key[:, :seen]).mul_(pair.scale)
            outs[0][:, :, start:stop] = query_grad.view(count, repeat, stop - start, dim)
            outs[1][:, :seen].baddbmm_(tile.mT, student_rows, alpha=pair.scale)
    return squares


class _Kept(NamedTuple):
    """What the way back needs of one chunk: `(R_0, R_1)` and the Gram of `P`."""

    chunk: slice
    right: tuple[Tensor, Tensor]
    left_gram: Gram


def causal_gram_sweep(pair: Pair, sources: Sources, outs: tuple[Tensor, Tensor] | None) -> Tensor:
    """Squares of one group under the causal mask: diagonal blocks directly, the rest by Grams.

    The prefix of `R^T R` serves the loss and the query gradient, the suffix of `P^T P` the key
    gradient, as in chunked linear attention.
    """
    tokens = sources.query.shape[2]
    scales = (pair.scale, pair.teacher_scale, pair.difference)
    squares = sources.query.new_zeros(())
    kept: list[_Kept] = []
    prefix: Gram | None = None
    for start in range(0, tokens, CHUNK):
        chunk = slice(start, min(start + CHUNK, tokens))
        part = _cut(sources, chunk)
        query_out = torch.empty_like(part.query)
        diagonal = None if outs is None else (query_out, outs[1][:, chunk])
        squares += tile_sweep(pair, part, True, diagonal, DIAGONAL_ROWS)
        left = query_form(part.query.flatten(1, 2), part.teacher_query.flatten(1, 2), pair)
        right = key_form(part.key, part.teacher_key, pair)
        left_gram = gram_of(*left)
        if prefix is not None:
            squares += squared_norm(left_gram, prefix, *scales).sum()
        if outs is not None:
            if prefix is not None:
                first, second = query_factors(prefix, *scales)
                query_out.flatten(1, 2).baddbmm_(left[0], first).baddbmm_(left[1], second)
            outs[0][:, :, chunk] = query_out
            kept.append(_Kept(chunk, right, left_gram))
        if chunk.stop < tokens:
            prefix = _add(prefix, gram_of(*right))
    suffix: Gram | None = None
    for chunk, right, left_gram in reversed(kept):
        if suffix is not None and outs is not None:
            first, second = key_factors(suffix, *scales)
            outs[1][:, chunk].baddbmm_(right[0], first).baddbmm_(right[1], second)
        suffix = _add(suffix, left_gram)
    return squares


def _cut(sources: Sources, chunk: slice) -> Sources:
    return Sources(
        sources.query[:, :, chunk].contiguous(),
        sources.key[:, chunk],
        sources.teacher_query[:, :, chunk].contiguous(),
        sources.teacher_key[:, chunk],
    )


def _add(total: Gram | None, part: Gram) -> Gram:
    return part if total is None else Gram(*(a.add_(b) for a, b in zip(total, part, strict=True)))
