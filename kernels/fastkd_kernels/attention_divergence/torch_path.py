"""Divergences of attention probabilities in plain PyTorch with linear memory: what the CPU runs.

One sweep over blocks of query rows against all keys that they see, for a group of heads
(`head_groups.py`); loss and unit gradients come from the same block, so nothing is made twice.
"""

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.divergences import row_divergence
from ..common.head_groups import (
    Group,
    Pair,
    Sources,
    fold_keys,
    group_heads,
    head_groups,
    invalid_keys,
    invalid_rows,
    query_slot,
    stacked_like,
    zeroed_sources,
)
from ..common.soft_cap import cap_scores

# one block of scores takes about this much; a formula holds four of them at once
BLOCK_BYTES = 1 << 18


def forward(
    pairs: list[Pair],
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    kind: str,
    causal: bool,
    window: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over rows `[pairs, batch]`, their gradients for the student's queries, keys and sinks.

    Sinks get theirs by batch item, `[pairs, batch, heads]`.

    `row_mask` are the counted query rows, bool `[batch, tokens]`; `window` 0 is none.
    """
    dtype = accumulator(*pairs[0].tensors)
    batch, heads = pairs[0].query.shape[:2]
    sums = pairs[0].query.new_zeros((len(pairs), batch), dtype=dtype)
    query_grad, key_grad, sink_grad = (sums.new_empty(0) for _ in range(3))
    if need_grad and pairs[0].student_sinks is not None:
        sink_grad = sums.new_zeros((len(pairs), batch, heads))
    if need_grad:
        query_grad = stacked_like(pairs, pairs[0].query, dtype)
        key_grad = stacked_like(pairs, pairs[0].key, dtype)
    for index, pair in enumerate(pairs):
        for group in head_groups(pair, dtype):
            sources = zeroed_sources(pair, group, dtype, key_mask, row_mask)
            masks = (invalid_rows(row_mask, group, pair), invalid_keys(key_mask, group))
            sinks = _sink_rows(pair, group, sources.query)
            outs = None
            if need_grad:
                key_out = torch.zeros_like(sources.key, memory_format=torch.contiguous_format)
                sink_out = sources.query.new_zeros(0 if sinks is None else sinks[0].shape)
                outs = (query_slot(query_grad[index], group, pair), key_out, sink_out)
            of_groups = _group_sweep(pair, sources, masks, sinks, kind, causal, window, outs)
            items = group.batch.stop - group.batch.start
            sums[index, group.batch] += of_groups.view(items, -1).sum(1)
            if outs is not None:
                fold_keys(key_grad[index], group, outs[1])
            if outs is not None and sinks is not None:
                slot = sink_grad[index, group.batch, group_heads(group, pair)]
                slot += outs[2].view(slot.shape)
    return sums, query_grad, key_grad, sink_grad


def _sink_rows(pair: Pair, group: Group, query: Tensor) -> tuple[Tensor, Tensor] | None:
    """Sinks of student and teacher `[n, repeat, 1]` for queries `[n, repeat, tokens, dim]`."""
    if pair.student_sinks is None or pair.teacher_sinks is None:
        return None
    count, repeat, _, _ = query.shape
    heads = group_heads(group, pair)
    items = count * repeat // (heads.stop - heads.start)
    student, teacher = (
        sinks[heads].repeat(items).view(count, repeat, 1)
        for sinks in (pair.student_sinks, pair.teacher_sinks)
    )
    return student, teacher


def _group_sweep(
    pair: Pair,
    sources: Sources,
    masks: tuple[Tensor | None, Tensor | None],
    sinks: tuple[Tensor, Tensor] | None,
    kind: str,
    causal: bool,
    window: int,
    outs: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """Sums `[n]` of one group; fills `outs`.

    The query's `[n, repeat, tokens, dim]` is written, key and sinks are added to.
    """
    query, key, teacher_query, teacher_key = sources
    count, repeat, tokens, dim = query.shape
    invalid, hidden_keys = masks
    span = min(tokens, 4 * window) if window else tokens
    step = max(16, BLOCK_BYTES // (count * repeat * span * query.element_size()))
    if window:
        step = min(step, max(16, 2 * window))
    # exp() of it is exactly 0, and it may be subtracted from itself
    low = torch.finfo(query.dtype).min / 4
    total = query.new_zeros(count)
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        first, last = key_range(start, stop, tokens, causal, window)
        student_rows = query[:, :, start:stop].reshape(count, -1, dim) * pair.scale
        teacher_rows = teacher_query[:, :, start:stop].reshape(count, student_rows.shape[1], -1)
        student_scores = student_rows @ key[:, first:last].mT
        teacher_scores = (teacher_rows * pair.teacher_scale) @ teacher_key[:, first:last].mT
        cap_slope = None
        if pair.student_softcap is not None:
            cap_slope = cap_scores(
                student_scores, pair.student_softcap, need_slope=outs is not None
            )
        if pair.teacher_softcap is not None:
            cap_scores(teacher_scores, pair.teacher_softcap, need_slope=False)
        for tile in (student_scores, teacher_scores):
            _hide(tile, hidden_keys, (start, stop, first, last), causal, window, low)
        if sinks is not None:
            student_scores, teacher_scores = (
                _with_sinks(tile, column)
                for tile, column in zip((student_scores, teacher_scores), sinks, strict=True)
            )
        values, slope = row_divergence(student_scores, teacher_scores, kind, exact=False)
        values = values.view(count, repeat, stop - start)
        if invalid is not None:
            skipped = invalid.view(count, repeat, tokens)[:, :, start:stop]
            values = values.masked_fill(skipped, 0.0)
        total += values.sum((1, 2))
        if outs is None:
            continue
        if sinks is not None:
            slope, sink_slope = slope[..., :-1], slope[..., -1].view(values.shape)
            if invalid is not None:
                sink_slope = sink_slope.masked_fill(skipped, 0.0)
            outs[2].add_(sink_slope.sum(-1, keepdim=True))
        if cap_slope is not None:
            slope = cap_slope.mul_(slope)
        query_grad = (
            (slope @ key[:, first:last]).mul_(pair.scale).view(count, repeat, stop - start, dim)
        )
        # without sinks the slopes of rows that are not counted are 0 but for roundings
        outs[0][:, :, start:stop] = (
            query_grad if invalid is None else query_grad.masked_fill_(skipped[..., None], 0.0)
        )
        # and their queries are 0
        outs[1][:, first:last].baddbmm_(slope.mT, student_rows)
    return total


def _with_sinks(tile: Tensor, sinks: Tensor) -> Tensor:
    """`[n, repeat * rows, keys + 1]`: the sinks `[n, repeat, 1]` as the last column."""
    rows = tile.shape[1] // sinks.shape[1]
    return torch.cat([tile, sinks.repeat_interleave(rows, dim=1)], dim=-1)


def key_range(start: int, stop: int, tokens: int, causal: bool, window: int) -> tuple[int, int]:
    """The keys that query rows `start` to `stop` can see."""
    first = max(0, start - window + 1) if window else 0
    last = stop if causal else min(tokens, stop - 1 + window) if window else tokens
    return first, last


def _hide(
    tile: Tensor,
    hidden_keys: Tensor | None,
    ranges: tuple[int, int, int, int],
    causal: bool,
    window: int,
    low: float,
) -> None:
    """Give hidden entries of `[n, repeat * rows, keys]` the score `low`."""
    start, stop, first, last = ranges
    if hidden_keys is not None:
        tile.masked_fill_(hidden_keys[:, first:last].mT, low)
    if not (causal or window):
        return
    # without a window, only the last block's keys can lie ahead
    seen_by_all = 0 if window else start - first
    queries = torch.arange(start, stop, device=tile.device)[:, None]
    keys = torch.arange(first + seen_by_all, last, device=tile.device)
    ahead = keys[None, :] - queries
    hidden = ahead > 0 if causal else ahead >= window
    if window:
        hidden |= ahead <= -window
    tile.view(tile.shape[0], -1, stop - start, last - first)[..., seen_by_all:].masked_fill_(
        hidden, low
    )
