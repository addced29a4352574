"""One call of an op on attention heads: its pairs, their tables, and the sizes all kernels take.

Every launch covers all layer pairs through a table of addresses.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .autograd import accumulator
from .head_groups import Pair
from .remembered import remembered
from .tensor_table import addressed, to_device, unit_stride
from .tl_types import TYPES


class Call:
    """One op call: pairs with unit strides, their tables, and the sizes all kernels take."""

    def __init__(self, pairs: list[Pair], key_mask: Tensor | None, query_mask: Tensor | None):
        # kept alive until the kernels are launched: a row of another stride is a copy
        rows = [pair[:4] for pair in pairs]
        self.table, aligns, self.tensors = addressed(rows, near_rows)
        first = pairs[0]
        self.first = first
        self.count = len(pairs)
        self.dtype = accumulator(*first.tensors)
        scales = [[pair.scale, pair.teacher_scale] for pair in pairs]
        self.scales = to_device(scales, self.dtype, first.query)
        self.masks = (query_mask, key_mask)
        self.valid = stacked_masks(first.query, key_mask, query_mask)
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
        self.dims = (dim, first.teacher_query.shape[-1])
        self.dtypes = (first.query.dtype, first.teacher_query.dtype)
        self.constants = {
            **type_constants(*self.dtypes),
            "ALIGN": math.gcd(*aligns[:2]),
            "TEACHER_ALIGN": math.gcd(*aligns[2:]),
            "HAS_MASK": key_mask is not None or query_mask is not None,
        }

    def spans(self) -> Tensor:
        """int32 `[2, batch, 3]`, of query rows and keys: the first run of valid ones, from and to,
        and the end of the last. A placeholder where nothing is masked."""
        return remembered(
            self.masks, "spans", self.valid.device, lambda: valid_spans(self.valid.bool())
        )

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.first.query.device)


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


def stacked_masks(query: Tensor, key_mask: Tensor | None, query_mask: Tensor | None) -> Tensor:
    """uint8 `[2, batch, tokens]`: query rows, keys. A placeholder where nothing is masked."""
    device = query.device
    sides = (query_mask, key_mask)

    def stacked() -> Tensor:
        if key_mask is None and query_mask is None:
            return torch.empty(0, dtype=torch.uint8, device=device)
        shape = (query.shape[0], query.shape[2])
        every = torch.ones(shape, dtype=torch.uint8, device=device)
        return torch.stack([every if mask is None else mask.to(torch.uint8) for mask in sides])

    return remembered(sides, "stacked masks", device, stacked)


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
