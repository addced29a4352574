"""The difference of scores of one group of heads, block by block, in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from .head_groups import (
    GROUP_BYTES,
    Group,
    Pair,
    invalid_keys,
    invalid_rows,
    key_rows,
    query_rows,
    zeroed,
)
from .unit_gradient import squared_sum


class Sources(NamedTuple):
    """Inputs of one group with masked rows zeroed: queries `[n, repeat, tokens, dim]`,
    keys `[n, tokens, dim]`."""

    query: Tensor
    key: Tensor
    target_query: Tensor
    target_key: Tensor


def zeroed_sources(
    pair: Pair,
    group: Group,
    dtype: torch.dtype,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> Sources:
    rows, keys = invalid_rows(query_mask, group, pair), invalid_keys(key_mask, group)
    queries = [
        zeroed(query_rows(tensor, group, pair, dtype).flatten(1, 2), rows)
        for tensor in (pair.query, pair.target_query)
    ]
    repeat = pair.query.shape[1] // pair.groups
    own, target = (query.reshape(query.shape[0], repeat, -1, query.shape[-1]) for query in queries)
    key = zeroed(key_rows(pair.key, group, pair, dtype), keys)
    return Sources(own, key, target, zeroed(key_rows(pair.target_key, group, pair, dtype), keys))


def tile_sweep(
    pair: Pair,
    sources: Sources,
    causal: bool,
    outs: tuple[Tensor, Tensor] | None,
    rows: int | None = None,
) -> Tensor:
    """Squares of one group; fills `outs`: query `[n, repeat, tokens, dim]`, key summed into.

    One block takes `rows` query rows, or as many as fit `GROUP_BYTES`.
    """
    query, key, target_query, target_key = sources
    count, repeat, tokens, dim = query.shape
    step = rows or max(16, GROUP_BYTES // (count * repeat * tokens * query.element_size()))
    squares = query.new_zeros(())
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        seen = stop if causal else tokens
        own = query[:, :, start:stop].reshape(count, -1, dim)
        target = target_query[:, :, start:stop].reshape(count, repeat * (stop - start), -1)
        # D = c_s Q_s K_s^T - c_t Q_t K_t^T
        tile = own @ key[:, :seen].mT
        tile.baddbmm_(target, target_key[:, :seen].mT, beta=pair.scale, alpha=-pair.target_scale)
        if causal:
            tile.view(count, repeat, stop - start, seen).tril_(start)
        squares += squared_sum(tile)
        if outs is not None:
            part = torch.bmm(tile, key[:, :seen]).mul_(pair.scale)
            outs[0][:, :, start:stop] = part.view(count, repeat, stop - start, dim)
            outs[1][:, :seen].baddbmm_(tile.mT, own, alpha=pair.scale)
    return squares
