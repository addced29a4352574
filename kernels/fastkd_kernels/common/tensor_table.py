"""Tables that carry many tensors to one launch: addresses and strides, no stacked copy.

A table is copied to the device once and found again by what it says: a table that says the same is
the same, whichever tensors lie there now.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import alignment
from .remembered import Recent, keeps, place


class Addressed(NamedTuple):
    """The table of a call's tensors, the alignment of each column, and what the table points at."""

    table: Tensor
    alignments: tuple[int, ...]
    tensors: list[Tensor]


_tables: Recent[Tensor] = Recent()
_addressed: Recent[tuple[Tensor, tuple[int, ...]]] = Recent()
# bytes of pinned memory taken at once
PINNED_BYTES = 1 << 18


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` with neighbours of the last dimension next to each other; a copy only if not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def to_device(rows: Sequence[Sequence[int | float]], dtype: torch.dtype, on: Tensor) -> Tensor:
    """Host numbers on the device of `on`; whoever gets them only reads them."""
    device = on.device
    if not keeps(device):
        return _copied(rows, dtype, device)
    key = (dtype, place(device), *map(tuple, rows))
    table = _tables.get(key)
    if table is None:
        table = _copied(rows, dtype, device)
        _tables.put(key, table)
    return table


def _copied(rows: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied from pinned memory, without waiting."""
    if device.type != "cuda":
        return torch.tensor(rows, dtype=dtype, device=device)
    if _lasting.is_empty() or torch.cuda.is_current_stream_capturing():
        return _lasting.copy(torch.tensor(rows, dtype=dtype, device="cpu")).to(
            device, non_blocking=True
        )
    table = torch.tensor(rows, dtype=dtype, device="cpu", pin_memory=True)
    return table.to(device, non_blocking=True)


class _Lasting:
    """Pinned memory that is never freed: a captured graph copies from it whenever it is replayed.

    It is taken before the first capture, which may not allocate.
    """

    def __init__(self) -> None:
        self.left: Tensor | None = None
        self.full: list[Tensor] = []

    def is_empty(self) -> bool:
        return self.left is None

    def copy(self, table: Tensor) -> Tensor:
        size = -(-table.nbytes // 16) * 16
        if self.left is None or self.left.numel() < size:
            # a view keeps the whole of its memory
            self.full += [] if self.left is None else [self.left]
            self.left = torch.empty(
                max(size, PINNED_BYTES), dtype=torch.uint8, device="cpu", pin_memory=True
            )
        place, self.left = self.left[: table.nbytes], self.left[size:]
        return place.view(table.dtype).view(table.shape).copy_(table)


_lasting = _Lasting()


def pointer_table(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """int64 `[pairs, entries]` from `columns[i][pair]`, whose last strides are 1.

    Each tensor takes its address and the strides of all dimensions but the last. The caller keeps
    the tensors alive until its kernels are launched.
    """
    return addressed([*zip(*columns, strict=True)]).table


def addressed(rows: Sequence[Sequence[Tensor]]) -> Addressed:
    """The table of `rows[pair][column]`; the tensors of a column share shape and dtype.

    A tensor whose neighbours of the last dimension are apart is copied. The caller keeps the result
    until its kernels are launched.
    """
    tensors = [tensor for row in rows for tensor in row]
    strides = [tensor.stride() for tensor in tensors]
    if not all([stride[-1] == 1 for stride in strides]):
        tensors = [unit_stride(tensor) for tensor in tensors]
        strides = [tensor.stride() for tensor in tensors]
    addresses = [tensor.data_ptr() for tensor in tensors]
    pairs, device = len(rows), tensors[0].device
    if not keeps(device):
        return Addressed(*_made(tensors, strides, addresses, pairs), tensors)
    kinds = [(tensor.shape, tensor.dtype) for tensor in rows[0]]
    key: Hashable = (place(device), pairs, *kinds, *addresses, *strides)
    found = _addressed.get(key)
    if found is None:
        found = _made(tensors, strides, addresses, pairs)
        _addressed.put(key, found)
    return Addressed(*found, tensors)


def _made(
    tensors: list[Tensor], strides: list[tuple[int, ...]], addresses: list[int], pairs: int
) -> tuple[Tensor, tuple[int, ...]]:
    entries: list[int] = []
    for address, stride in zip(addresses, strides, strict=True):
        entries += (address, *stride[:-1])
    columns = len(tensors) // pairs
    table = _copied(entries, torch.int64, tensors[0].device).view(pairs, -1)
    return table, tuple([alignment(tensors[column::columns]) for column in range(columns)])
