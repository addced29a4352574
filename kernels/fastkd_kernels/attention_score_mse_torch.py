"""Attention-score MSE in plain PyTorch with linear memory: what CPU tensors run.

Works on small groups of heads whose temporaries stay near `GROUP_BYTES`. A key group is a run of
query heads that share one student and one teacher key head (GQA), so their rows are stacked.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .gram import Blocks, gram_blocks, key_factors, query_factors, squared_norm, stack_factors
from .unit_gradient import squared_sum

GROUP_BYTES = 1 << 20
CAUSAL_CHUNK = 128


class Pair(NamedTuple):
    """One layer pair: `[batch, heads | kv_heads, tokens, dim]`, and both scales."""

    query: Tensor
    key: Tensor
    target_query: Tensor
    target_key: Tensor
    scale: float
    target_scale: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.target_query, self.target_key

    @property
    def groups(self) -> int:
        return math.lcm(self.key.shape[1], self.target_key.shape[1])

    @property
    def difference(self) -> bool:
        """Whether the difference form of the Gram algebra applies."""
        return self.query.shape[-1] == self.target_query.shape[-1]


class Group(NamedTuple):
    """Heads worked on at once: a slice of the batch and one of the key groups."""

    batch: slice
    heads: slice


class Sources(NamedTuple):
    """Inputs of one group with masked rows zeroed: queries `[n, repeat, tokens, dim]`,
    keys `[n, tokens, dim]`."""

    query: Tensor
    key: Tensor
    target_query: Tensor
    target_key: Tensor


def accumulator(*tensors: Tensor) -> torch.dtype:
    """fp64 where an input is fp64, fp32 otherwise."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


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
        for group in _groups(pair, dtype):
            query = _blocks(_query_side(pair, group, dtype), _rows_of(query_mask, group, pair))
            key = _blocks(_key_side(pair, group, dtype), _keys_of(key_mask, group))
            squares[index] += squared_norm(query, key, *scales).sum()
            if need_grad:
                _store(to_query[index], group, stack_factors(query_factors(key, *scales)))
                _store(to_key[index], group, stack_factors(key_factors(query, *scales)))
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
    query_grad = _gradient(pairs, pairs[0].query, pairs[0].query.dtype)
    key_grad = _gradient(pairs, pairs[0].key, pairs[0].key.dtype)
    for index, pair in enumerate(pairs):
        for group in _groups(pair, dtype):
            out = _query_slot(query_grad[index], group, pair).flatten(1, 2)
            part = to_query[index][group.batch, group.heads].flatten(0, 1) * factor[index]
            _apply(_query_side(pair, group, dtype), part, _rows_of(query_mask, group, pair), out)
            part = to_key[index][group.batch, group.heads].flatten(0, 1) * factor[index]
            sides = _key_side(pair, group, dtype)
            if pair.groups == pair.key.shape[1]:
                out = key_grad[index][group.batch, group.heads].flatten(0, 1)
                _apply(sides, part, _keys_of(key_mask, group), out)
            else:
                out = torch.empty_like(sides[0], memory_format=torch.contiguous_format)
                _apply(sides, part, _keys_of(key_mask, group), out)
                _fold_keys(key_grad[index], group, out)
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
        query_grad = _gradient(pairs, pairs[0].query, dtype)
        key_grad = _gradient(pairs, pairs[0].key, dtype)
    for index, pair in enumerate(pairs):
        for group in _groups(pair, dtype):
            sources = _sources(pair, group, dtype, key_mask, query_mask)
            outs = None
            if need_grad:
                query_out = _query_slot(query_grad[index], group, pair)
                outs = (
                    query_out,
                    torch.zeros_like(sources.key, memory_format=torch.contiguous_format),
                )
            if algorithm == "tiles":
                squares[index] += _tile_sweep(pair, sources, causal, outs)
            else:
                squares[index] += _causal_gram_sweep(pair, sources, outs)
            if outs is not None:
                _fold_keys(key_grad[index], group, outs[1])
    return squares, query_grad, key_grad


def _tile_sweep(
    pair: Pair, sources: Sources, causal: bool, outs: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Squares of one group; fills `outs`: query `[n, repeat, tokens, dim]`, key summed into."""
    query, key, target_query, target_key = sources
    count, repeat, tokens, dim = query.shape
    row_bytes = count * repeat * tokens * query.element_size()
    step = max(16, GROUP_BYTES // row_bytes)
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


def _causal_gram_sweep(pair: Pair, sources: Sources, outs: tuple[Tensor, Tensor] | None) -> Tensor:
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
        squares += _tile_sweep(pair, part, True, diagonal)
        left, right = (
            _forms(part.query.flatten(1, 2), part.target_query.flatten(1, 2), pair),
            (_key_forms(part.key, part.target_key, pair)),
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
            right = _key_forms(part.key, part.target_key, pair)
            outs[1][:, chunk].baddbmm_(right[0], first).baddbmm_(right[1], second)
        left = _forms(part.query.flatten(1, 2), part.target_query.flatten(1, 2), pair)
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


def _forms(query: Tensor, target: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """`(P_0, P_1)`."""
    if not pair.difference:
        return query, target
    return (query * pair.scale).sub_(target, alpha=pair.target_scale), target


def _key_forms(key: Tensor, target: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """`(R_0, R_1)`."""
    return key, (key - target).mul_(pair.target_scale) if pair.difference else target


def _query_side(pair: Pair, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(P_0, P_1)`, each `[n, repeat * tokens, dim]`."""
    query = _query_rows(pair.query, group, pair, dtype).flatten(1, 2)
    target = _query_rows(pair.target_query, group, pair, dtype).flatten(1, 2)
    return _forms(query, target, pair)


def _key_side(pair: Pair, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(R_0, R_1)`, each `[n, tokens, dim]`."""
    key = _key_rows(pair.key, group, pair, dtype)
    return _key_forms(key, _key_rows(pair.target_key, group, pair, dtype), pair)


def _sources(
    pair: Pair,
    group: Group,
    dtype: torch.dtype,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> Sources:
    rows, keys = _rows_of(query_mask, group, pair), _keys_of(key_mask, group)
    queries = [
        _zero(_query_rows(tensor, group, pair, dtype).flatten(1, 2), rows)
        for tensor in (pair.query, pair.target_query)
    ]
    repeat = pair.query.shape[1] // pair.groups
    own, target = (query.reshape(query.shape[0], repeat, -1, query.shape[-1]) for query in queries)
    key = _zero(_key_rows(pair.key, group, pair, dtype), keys)
    return Sources(own, key, target, _zero(_key_rows(pair.target_key, group, pair, dtype), keys))


def _zero(rows: Tensor, invalid: Tensor | None) -> Tensor:
    return rows if invalid is None else rows.masked_fill(invalid, 0.0)


def _blocks(sides: tuple[Tensor, Tensor], invalid: Tensor | None) -> Blocks:
    own, other = sides
    return gram_blocks(_zero(own, invalid), _zero(other, invalid))


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


def _groups(pair: Pair, dtype: torch.dtype) -> Iterator[Group]:
    """Cut the batch, or one batch item's heads, so that one temporary takes `GROUP_BYTES`."""
    batch, heads, tokens, dim = pair.query.shape
    groups = pair.groups
    row = max(dim, pair.target_query.shape[-1]) * torch.finfo(dtype).bits // 8
    fits = max(1, GROUP_BYTES // (heads // groups * tokens * row))
    # groups that add into one student key head stay together
    if fits >= groups or groups != pair.key.shape[1]:
        step = max(1, fits // groups)
        for start in range(0, batch, step):
            yield Group(slice(start, min(start + step, batch)), slice(0, groups))
        return
    for item in range(batch):
        for start in range(0, groups, fits):
            yield Group(slice(item, item + 1), slice(start, min(start + fits, groups)))


def _query_rows(tensor: Tensor, group: Group, pair: Pair, dtype: torch.dtype) -> Tensor:
    """`[n, repeat, tokens, dim]`, a view where the strides allow one."""
    repeat = tensor.shape[1] // pair.groups
    heads = slice(group.heads.start * repeat, group.heads.stop * repeat)
    part = tensor[group.batch, heads]
    return part.reshape(-1, repeat, *part.shape[2:]).to(dtype)


def _key_rows(tensor: Tensor, group: Group, pair: Pair, dtype: torch.dtype) -> Tensor:
    """`[n, tokens, dim]`, a view where the strides allow one."""
    repeat = pair.groups // tensor.shape[1]
    if repeat == 1:
        part = tensor[group.batch, group.heads]
    else:
        heads = [head // repeat for head in range(group.heads.start, group.heads.stop)]
        part = tensor[group.batch, heads]
    return part.reshape(-1, *part.shape[2:]).to(dtype)


def _query_slot(out: Tensor, group: Group, pair: Pair) -> Tensor:
    """The group's part of a contiguous `[batch, heads, tokens, dim]` as `_query_rows` lays it."""
    repeat = out.shape[1] // pair.groups
    part = out[group.batch, group.heads.start * repeat : group.heads.stop * repeat]
    return part.view(-1, repeat, *part.shape[2:])


def _rows_of(mask: Tensor | None, group: Group, pair: Pair) -> Tensor | None:
    """Invalid query rows `[n, repeat * tokens, 1]`."""
    if mask is None:
        return None
    invalid = ~mask[group.batch]
    repeat = pair.query.shape[1] // pair.groups
    shape = (-1, group.heads.stop - group.heads.start, repeat, -1)
    return invalid[:, None, None, :].expand(shape).flatten(0, 1).flatten(1, 2)[..., None]


def _keys_of(mask: Tensor | None, group: Group) -> Tensor | None:
    """Invalid keys `[n, tokens, 1]`."""
    if mask is None:
        return None
    invalid = ~mask[group.batch]
    heads = group.heads.stop - group.heads.start
    return invalid[:, None, :].expand(-1, heads, -1).flatten(0, 1)[..., None]


def _store(out: Tensor, group: Group, value: Tensor) -> None:
    slot = out[group.batch, group.heads]
    slot.copy_(value.view(slot.shape))


def _fold_keys(out: Tensor, group: Group, value: Tensor) -> None:
    """Sum key groups `[n, tokens, dim]` into the student's `[batch, kv_heads, tokens, dim]`."""
    groups = group.heads.stop - group.heads.start
    if groups == 0:
        return
    parts = value.view(-1, groups, *value.shape[1:])
    kv_heads = out.shape[1]
    if groups > kv_heads:
        parts = parts.view(parts.shape[0], kv_heads, -1, *parts.shape[2:]).sum(2)
        out[group.batch].copy_(parts)
    else:
        out[group.batch, group.heads].copy_(parts)


def _gradient(pairs: list[Pair], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((len(pairs), *like.shape), dtype=dtype)
