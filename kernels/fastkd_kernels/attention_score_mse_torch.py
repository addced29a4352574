"""Attention-score MSE in plain PyTorch with linear memory: what CPU tensors run.

Works on small groups of heads (`head_groups.py`).
"""

import torch
from torch import Tensor

from .attention_score_mse_causal import causal_gram_sweep
from .attention_score_mse_tiles import tile_sweep, zeroed_sources
from .gram import (
    Blocks,
    gram_blocks,
    key_factors,
    key_form,
    query_factors,
    query_form,
    squared_norm,
    stack_factors,
)
from .head_groups import (
    Group,
    Pair,
    accumulator,
    fold_keys,
    head_groups,
    invalid_keys,
    invalid_rows,
    key_rows,
    query_rows,
    query_slot,
    stacked_like,
    store_groups,
    zeroed,
)


def gram_forward(
    pairs: list[Pair], key_mask: Tensor | None, query_mask: Tensor | None, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Squares `[pairs]` and the factors of both gradients.

    Factors are `[pairs, batch, groups, dim_s + dim_t, dim_s]`, or empty without `need_grad`.
    """
    first = pairs[0]
    dtype = accumulator(*first.tensors)
    dim = first.query.shape[-1]
    width = dim + first.target_query.shape[-1]
    shape = (len(pairs), first.query.shape[0], first.groups, width, dim) if need_grad else (0,)
    to_query = torch.empty(shape, dtype=dtype)
    to_key = torch.empty(shape, dtype=dtype)
    squares = torch.zeros(len(pairs), dtype=dtype)
    for index, pair in enumerate(pairs):
        scales = (pair.scale, pair.target_scale, pair.difference)
        for group in head_groups(pair, dtype):
            query = _blocks(_query_side(pair, group, dtype), invalid_rows(query_mask, group, pair))
            key = _blocks(_key_side(pair, group, dtype), invalid_keys(key_mask, group))
            squares[index] += squared_norm(query, key, *scales).sum()
            if need_grad:
                store_groups(to_query[index], group, stack_factors(query_factors(key, *scales)))
                store_groups(to_key[index], group, stack_factors(key_factors(query, *scales)))
    return squares, to_query, to_key


def gram_backward(
    factor: Tensor,
    to_query: Tensor,
    to_key: Tensor,
    pairs: list[Pair],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients `[pairs, batch, heads | kv_heads, tokens, dim_s]` for `factor` `[pairs]`."""
    dtype = to_query.dtype
    query_grad = stacked_like(pairs, pairs[0].query, pairs[0].query.dtype)
    key_grad = stacked_like(pairs, pairs[0].key, pairs[0].key.dtype)
    for index, pair in enumerate(pairs):
        for group in head_groups(pair, dtype):
            out = query_slot(query_grad[index], group, pair).flatten(1, 2)
            part = to_query[index][group.batch, group.heads].flatten(0, 1) * factor[index]
            _apply(
                _query_side(pair, group, dtype), part, invalid_rows(query_mask, group, pair), out
            )
            part = to_key[index][group.batch, group.heads].flatten(0, 1) * factor[index]
            sides = _key_side(pair, group, dtype)
            if pair.groups == pair.key.shape[1]:
                out = key_grad[index][group.batch, group.heads].flatten(0, 1)
                _apply(sides, part, invalid_keys(key_mask, group), out)
            else:
                out = torch.empty_like(sides[0], memory_format=torch.contiguous_format)
                _apply(sides, part, invalid_keys(key_mask, group), out)
                fold_keys(key_grad[index], group, out)
    return query_grad, key_grad


def one_pass(
    pairs: list[Pair],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    causal: bool,
    algorithm: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squares `[pairs]`, `c_s D K_s` and `c_s D^T Q_s`, in one sweep over the inputs.

    "tiles" forms `D` in blocks; "gram" is chunked linear attention, for causal scores.
    """
    dtype = accumulator(*pairs[0].tensors)
    squares = torch.zeros(len(pairs), dtype=dtype)
    query_grad, key_grad = torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype)
    if need_grad:
        query_grad = stacked_like(pairs, pairs[0].query, dtype)
        key_grad = stacked_like(pairs, pairs[0].key, dtype)
    for index, pair in enumerate(pairs):
        for group in head_groups(pair, dtype):
            sources = zeroed_sources(pair, group, dtype, key_mask, query_mask)
            outs = None
            if need_grad:
                query_out = query_slot(query_grad[index], group, pair)
                outs = (
                    query_out,
                    torch.zeros_like(sources.key, memory_format=torch.contiguous_format),
                )
            if algorithm == "tiles":
                squares[index] += tile_sweep(pair, sources, causal, outs)
            else:
                squares[index] += causal_gram_sweep(pair, sources, outs)
            if outs is not None:
                fold_keys(key_grad[index], group, outs[1])
    return squares, query_grad, key_grad


def _query_side(pair: Pair, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(P_0, P_1)`, each `[n, repeat * tokens, dim]`."""
    query = query_rows(pair.query, group, pair, dtype).flatten(1, 2)
    target = query_rows(pair.target_query, group, pair, dtype).flatten(1, 2)
    return query_form(query, target, pair)


def _key_side(pair: Pair, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(R_0, R_1)`, each `[n, tokens, dim]`."""
    key = key_rows(pair.key, group, pair, dtype)
    return key_form(key, key_rows(pair.target_key, group, pair, dtype), pair)


def _blocks(sides: tuple[Tensor, Tensor], invalid: Tensor | None) -> Blocks:
    own, other = sides
    return gram_blocks(zeroed(own, invalid), zeroed(other, invalid))


def _apply(
    sides: tuple[Tensor, Tensor], factors: Tensor, invalid: Tensor | None, out: Tensor
) -> None:
    """`out = side_0 F_0 + side_1 F_1`, invalid rows zero (cheaper than zeroing the inputs)."""
    dim = out.shape[-1]
    first, second = factors[:, :dim], factors[:, dim:]
    if out.dtype == factors.dtype:
        torch.bmm(sides[0], first, out=out)
        out.baddbmm_(sides[1], second)
    else:
        out.copy_(torch.bmm(sides[0], first).baddbmm_(sides[1], second))
    if invalid is not None:
        out.masked_fill_(invalid, 0.0)
