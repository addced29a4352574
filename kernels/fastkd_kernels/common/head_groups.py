"""Heads worked on at once by the CPU paths: small groups whose temporaries stay in the caches.

A key group is a run of query heads that share one student and one teacher key head (GQA), so their
rows are stacked and no key head is repeated in memory.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import AttentionState

# of a core's second cache for a thread; more of them at once would gain nothing
THREAD_BYTES, MOST_BYTES = 1 << 19, 1 << 22


def group_bytes() -> int:
    """What one temporary of a group takes, about."""
    return min(torch.get_num_threads() * THREAD_BYTES, MOST_BYTES)


class Pair(NamedTuple):
    """One layer pair: `[batch, heads | kv_heads, tokens, dim]`, both scales, caps, sinks `[heads]`.

    Sinks come in the dtype of `accumulator`.
    """

    query: Tensor
    key: Tensor
    teacher_query: Tensor
    teacher_key: Tensor
    scale: float
    teacher_scale: float
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    student_sinks: Tensor | None = None
    teacher_sinks: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.teacher_query, self.teacher_key

    @property
    def groups(self) -> int:
        return math.lcm(self.key.shape[1], self.teacher_key.shape[1])

    @property
    def difference(self) -> bool:
        """Whether the difference form of the Gram algebra applies."""
        return self.query.shape[-1] == self.teacher_query.shape[-1]


def state_shapes(student: AttentionState, teacher: AttentionState) -> tuple[object, ...]:
    """What pairs must share to run in one call: shapes and dtypes of queries and keys."""
    tensors = (student.query, student.key, teacher.query, teacher.key)
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def pairs_of(*columns: Sequence[Any]) -> list[Pair]:
    """Pairs from the lists of a registered op, in the order of `Pair`'s fields."""
    return [Pair(*row) for row in zip(*columns, strict=True)]


class Group(NamedTuple):
    """Heads worked on at once: a slice of the batch and one of the key groups."""

    batch: slice
    heads: slice


def head_groups(pair: Pair, dtype: torch.dtype, rows: int | None = None) -> Iterator[Group]:
    """Cut the batch, or one batch item's heads, so that one temporary takes `group_bytes`.

    A temporary holds `rows` tokens of every head of the group; None is all of them.
    """
    batch, heads, tokens, dim = pair.query.shape
    tokens = min(tokens, rows or tokens)
    groups = pair.groups
    row = max(dim, pair.teacher_query.shape[-1]) * torch.finfo(dtype).bits // 8
    size = heads // groups * tokens * row
    # a product a thread, where so many fit
    fits = max(1, group_bytes() // size, min(torch.get_num_threads(), MOST_BYTES // size))
    # groups that add into one student key head stay together
    if fits >= groups or groups != pair.key.shape[1]:
        step = max(1, fits // groups)
        for start in range(0, batch, step):
            yield Group(slice(start, min(start + step, batch)), slice(0, groups))
        return
    for item in range(batch):
        for start in range(0, groups, fits):
            yield Group(slice(item, item + 1), slice(start, min(start + fits, groups)))


def query_rows(tensor: Tensor, group: Group, pair: Pair, dtype: torch.dtype) -> Tensor:
    """`[n, repeat, tokens, dim]`, a view where the strides allow one."""
    repeat = tensor.shape[1] // pair.groups
    heads = slice(group.heads.start * repeat, group.heads.stop * repeat)
    part = tensor[group.batch, heads]
    return part.reshape(-1, repeat, *part.shape[2:]).to(dtype)


def key_rows(tensor: Tensor, group: Group, pair: Pair, dtype: torch.dtype) -> Tensor:
    """`[n, tokens, dim]`, a view where the strides allow one."""
    repeat = pair.groups // tensor.shape[1]
    if repeat == 1:
        part = tensor[group.batch, group.heads]
    else:
        heads = [head // repeat for head in range(group.heads.start, group.heads.stop)]
        part = tensor[group.batch, heads]
    return part.reshape(-1, *part.shape[2:]).to(dtype)


def group_heads(group: Group, pair: Pair) -> slice:
    """The query heads of a group."""
    repeat = pair.query.shape[1] // pair.groups
    return slice(group.heads.start * repeat, group.heads.stop * repeat)


def query_slot(out: Tensor, group: Group, pair: Pair) -> Tensor:
    """The group's part of a contiguous `[batch, heads, tokens, dim]` as `query_rows` lays it."""
    repeat = out.shape[1] // pair.groups
    part = out[group.batch, group.heads.start * repeat : group.heads.stop * repeat]
    return part.view(-1, repeat, *part.shape[2:])


def invalid_rows(mask: Tensor | None, group: Group, pair: Pair) -> Tensor | None:
    """Invalid query rows `[n, repeat * tokens, 1]`."""
    if mask is None:
        return None
    invalid = ~mask[group.batch]
    repeat = pair.query.shape[1] // pair.groups
    shape = (-1, group.heads.stop - group.heads.start, repeat, -1)
    return invalid[:, None, None, :].expand(shape).flatten(0, 1).flatten(1, 2)[..., None]


def invalid_keys(mask: Tensor | None, group: Group) -> Tensor | None:
    """Invalid keys `[n, tokens, 1]`."""
    if mask is None:
        return None
    invalid = ~mask[group.batch]
    heads = group.heads.stop - group.heads.start
    return invalid[:, None, :].expand(-1, heads, -1).flatten(0, 1)[..., None]


def zeroed(rows: Tensor, invalid: Tensor | None) -> Tensor:
    return rows if invalid is None else rows.masked_fill(invalid, 0.0)


class Sources(NamedTuple):
    """Inputs of one group with masked rows zeroed: queries `[n, repeat, tokens, dim]`,
    keys `[n, tokens, dim]`."""

    query: Tensor
    key: Tensor
    teacher_query: Tensor
    teacher_key: Tensor


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
        for tensor in (pair.query, pair.teacher_query)
    ]
    repeat = pair.query.shape[1] // pair.groups
    student_query, teacher_query = (
        query.reshape(query.shape[0], repeat, -1, query.shape[-1]) for query in queries
    )
    key = zeroed(key_rows(pair.key, group, pair, dtype), keys)
    return Sources(
        student_query,
        key,
        teacher_query,
        zeroed(key_rows(pair.teacher_key, group, pair, dtype), keys),
    )


def fold_keys(out: Tensor, group: Group, value: Tensor) -> None:
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


def stacked_like(pairs: list[Pair], like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((len(pairs), *like.shape), dtype=dtype)
