"""Attention-score MSE in plain PyTorch with linear memory: what CPU tensors run.

Works on small groups of heads (`head_groups.py`).
"""

import torch
from torch import Tensor

from .attention_score_mse_causal import CHUNK, causal_gram_sweep
from .attention_score_mse_tiles import Sources, tile_sweep, zeroed_sources
from .gram import gram_blocks, key_factors, key_form, query_factors, query_form, squared_norm
from .head_groups import Pair, fold_keys, head_groups, query_slot, stacked_like
from .unit_gradient import accumulator


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
        own_heads = pair.groups == pair.key.shape[1]
        for group in head_groups(pair, dtype, rows):
            sources = zeroed_sources(pair, group, dtype, key_mask, query_mask)
            outs = None
            if need_grad:
                if own_heads:
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
            if outs is not None and not own_heads:
                fold_keys(key_grad[index], group, outs[1])
    return squares, query_grad, key_grad


def _gram_sweep(pair: Pair, sources: Sources, outs: tuple[Tensor, Tensor] | None) -> Tensor:
    """Squares of one group by the Grams of all its rows.

    Gradients are made at once, while the rows are in the caches.
    """
    scales = (pair.scale, pair.target_scale, pair.difference)
    left = query_form(sources.query.flatten(1, 2), sources.target_query.flatten(1, 2), pair)
    right = key_form(sources.key, sources.target_key, pair)
    query, key = gram_blocks(*left), gram_blocks(*right)
    if outs is not None:
        _apply(left, query_factors(key, *scales), outs[0].flatten(1, 2))
        _apply(right, key_factors(query, *scales), outs[1])
    return squared_norm(query, key, *scales).sum()


def _apply(sides: tuple[Tensor, Tensor], factors: tuple[Tensor, Tensor], out: Tensor) -> None:
    """`out = side_0 F_0 + side_1 F_1`."""
    torch.bmm(sides[0], factors[0], out=out)
    out.baddbmm_(sides[1], factors[1])
