"""Tables that carry many tensors to one launch: addresses and strides, no stacked copy.

A table is copied to the device once and found again by what it says: a table that says the same is
the same, whichever tensors lie there now.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import alignment
from .remembered import Recent, keeps, place


class Addressed(NamedTuple):
    """The table of a call's tensors, and the alignment of each of its columns."""

    table: Tensor
    alignments: tuple[int, ...]


_tables: Recent[Tensor] = Recent()
_addressed: Recent[Addressed] = Recent()
# what a captured CUDA graph copies again whenever it is replayed, so it stays for good
_captured: list[Tensor] = []


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


def _copied(
    rows: Sequence[Sequence[int | float]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Copied from pinned memory, without waiting."""
    on_gpu = device.type == "cuda"
    table = torch.tensor(rows, dtype=dtype, device="cpu", pin_memory=on_gpu)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        _captured.append(table)
    return table.to(device, non_blocking=True)


def pointer_table(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """int64 `[pairs, entries]` from `columns[i][pair]`.

    Each tensor takes its address and the strides of all dimensions but the last. The caller keeps
    the tensors alive until its kernels are launched.
    """
    return addressed(columns).table


def addressed(columns: Sequence[Sequence[Tensor]]) -> Addressed:
    """The table of `columns[i][pair]`, tensors of one shape and dtype a column, and alignments."""
    first = columns[0][0]
    rows = tuple(
        tuple([entry for tensor in row for entry in (tensor.data_ptr(), *tensor.stride()[:-1])])
        for row in zip(*columns, strict=True)
    )
    if not keeps(first.device):
        return _made(columns, rows)
    kinds = tuple([(column[0].shape, column[0].dtype) for column in columns])
    key: Hashable = (place(first.device), kinds, rows)
    found = _addressed.get(key)
    if found is None:
        found = _made(columns, rows)
        _addressed.put(key, found)
    return found


def _made(columns: Sequence[Sequence[Tensor]], rows: Sequence[Sequence[int]]) -> Addressed:
    table = _copied(rows, torch.int64, columns[0][0].device)
    return Addressed(table, tuple(alignment(column) for column in columns))
