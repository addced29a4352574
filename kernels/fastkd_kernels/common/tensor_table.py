"""Tables that carry many tensors to one launch: addresses and strides, no stacked copy."""

from collections.abc import Sequence

import torch
from torch import Tensor


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` with neighbours of the last dimension next to each other; a copy only if not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def to_device(rows: Sequence[Sequence[int | float]], dtype: torch.dtype, on: Tensor) -> Tensor:
    """Host numbers on the device of `on`, copied from pinned memory without waiting."""
    table = torch.tensor(rows, dtype=dtype, pin_memory=on.is_cuda)
    return table.to(on.device, non_blocking=True)


def pointer_table(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """int64 `[pairs, entries]` from `columns[i][pair]`.

    Each tensor takes its address and the strides of all dimensions but the last. The caller keeps
    the tensors alive until its kernels are launched.
    """
    rows = [
        [entry for tensor in row for entry in (tensor.data_ptr(), *tensor.stride()[:-1])]
        for row in zip(*columns, strict=True)
    ]
    return to_device(rows, torch.int64, columns[0][0])
