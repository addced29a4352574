"""Calls of an op on attention heads: sizes and constants of its plan, and tables of one call.

Every launch covers all layer pairs through a table of addresses.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_columns import Masks, masks_to_read
from .autograd import accumulator
from .head_groups import Pair
from .remembered import remembered
from .rescale import gradient_maker, tokens_first
from .tensor_table import layout_of, to_device, unit_stride
from .tl_types import TYPES


class Heads(NamedTuple):
    """What the kernels of one call read: addresses of heads, both scales of each pair, masks."""

    table: Tensor
    scales: Tensor
    valid: Tensor
    # kept alive until the kernels are launched: a row of another stride is a copy
    tensors: Sequence[Tensor]
    masks: Masks

    @property
    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """As every kernel takes them."""
        return self.table, self.scales, self.valid

    def spans(self) -> Tensor:
        """int32 `[2, batch, 3]`, of query rows and keys: the first run of valid ones, from and to,
        and the end of the last. A placeholder where nothing is masked."""
        return remembered(
            self.masks, "spans", self.valid.device, lambda: valid_spans(self.valid.bool())
        )


class Call:
    """What calls that look alike share: sizes that all kernels take, constants, layouts.

    It keeps none of the tensors of `pairs`, whose tables `heads` makes.
    """

    def __init__(self, pairs: list[Pair], masked: bool):
        first = pairs[0]
        tensors = [tensor for pair in pairs for tensor in pair[:4]]
        self.layout = layout_of(tensors, len(pairs), near_rows)
        self.device = first.query.device
        self.count = len(pairs)
        self.dtype = accumulator(*first.tensors)
        scales = [[pair.scale, pair.teacher_scale] for pair in pairs]
        self.scales = to_device(scales, self.dtype, first.query)
        batch, heads, tokens, dim = first.query.shape
        self.sizes = {
            "batch": batch,
            "heads": heads,
            "kv_heads": first.key.shape[1],
            "teacher_kv_heads": first.teacher_key.shape[1],
            "tokens": tokens,
            "dim": dim,
            "teacher_dim": first.teacher_query.shape[-1],
        }
        self.groups, self.difference = first.groups, first.difference
        self.dims = (dim, first.teacher_query.shape[-1])
        self.dtypes = (first.query.dtype, first.teacher_query.dtype)
        # of queries and keys
        self.tokens_first = (tokens_first(first.query), tokens_first(first.key))
        aligns = self.layout.alignments
        self.constants = {
            **type_constants(*self.dtypes),
            "ALIGN": math.gcd(*aligns[:2]),
            "TEACHER_ALIGN": math.gcd(*aligns[2:]),
            "HAS_MASK": masked,
        }

    def heads(self, columns: Sequence[Sequence[Tensor]], masks: Masks) -> Heads:
        """Addresses of queries, keys, the teacher's queries and keys, each a list over pairs."""
        table, _, tensors = self.layout.addressed(
            [tensor for row in zip(*columns, strict=True) for tensor in row]
        )
        valid = masks_to_read(masks, self.device)
        return Heads(table, self.scales, valid, tensors, masks)

    def gradients(
        self, query: Tensor, key: Tensor, dtype: torch.dtype, need_grad: bool
    ) -> Callable[[], list[Tensor]]:
        """Makes empty gradients of queries and keys, of no size without `need_grad`."""
        if not need_grad:
            return lambda: [self.new(0), self.new(0)]
        of_query, of_key = (gradient_maker(self.count, of, dtype) for of in (query, key))
        return lambda: [of_query(), of_key()]

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


def near_rows(heads: Tensor) -> Tensor:
    """As `unit_stride`, and rows of one head, found by 32-bit offsets, lie near each other."""
    heads = unit_stride(heads)
    return heads if heads.stride(2) * heads.shape[2] < 1 << 31 else heads.contiguous()


@cache
def type_constants(dtype: torch.dtype, teacher_dtype: torch.dtype) -> dict[str, Any]:
    """The `tl.constexpr` types of a student and a teacher dtype."""
    wide = torch.float64 in (dtype, teacher_dtype)
    return {
        "TYPE": TYPES[dtype],
        "TEACHER_TYPE": TYPES[teacher_dtype],
        "SUM_TYPE": TYPES[torch.float64 if wide else torch.float32],
    }


def valid_spans(valid: Tensor) -> Tensor:
    """int32 `[..., 3]` of bool `[..., tokens]`: first True, the False after it, end of the last.

    All 0 where nothing is True.
    """
    tokens = valid.shape[-1]
    if tokens == 0:
        return valid.new_empty(0, dtype=torch.int32)
    place = torch.arange(tokens, dtype=torch.int32, device=valid.device)
    end = torch.where(valid, place + 1, 0).amax(-1)
    first = torch.minimum(torch.where(valid, place, tokens).amin(-1), end)
    hidden = torch.where(valid | (place < first[..., None]), tokens, place).amin(-1)
    return torch.stack([first, torch.minimum(hidden, end), end], -1).to(torch.int32)
