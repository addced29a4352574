"""Hidden-state MSE in plain PyTorch, chunked over tokens: what CPU tensors run.

Padded tokens are left out by indexing, so they cost nothing and their values are never read.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .unit_gradient import squared_sum

CHUNK_BYTES = 1 << 22


def hidden_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mask: Tensor | None,
    need_input_grad: bool,
    need_weight_grad: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squares `[pairs]` and the unit gradients of student, weight and bias, stacked over pairs.

    `weight` and `bias` hold no tensor (identity, no bias), one for all pairs, or one a pair. A
    gradient that is not needed is empty.
    """
    pairs = len(student)
    squares = torch.zeros(pairs, dtype=dtype)
    input_shape = (pairs, *student[0].shape) if need_input_grad else (0,)
    input_grad = torch.empty(input_shape, dtype=dtype)
    if mask is not None:
        input_grad.zero_()
    weight_shape = (pairs, *weight[0].shape) if need_weight_grad and weight else (0,)
    weight_grad = torch.zeros(weight_shape, dtype=dtype)
    bias_shape = (pairs, *bias[0].shape) if need_weight_grad and bias else (0,)
    bias_grad = torch.zeros(bias_shape, dtype=dtype)
    for pair, (own, target) in enumerate(zip(student, teacher, strict=True)):
        matrix = weight[pair % len(weight)].to(dtype) if weight else None
        offset = bias[pair % len(bias)].to(dtype) if bias else None
        # without a projection the residual is the gradient, and is made where that goes
        in_place = matrix is None and mask is None and need_input_grad
        for chunk in _chunks(target, dtype):
            valid = None if mask is None else mask[chunk]
            rows = _rows(own[chunk], valid).to(dtype)
            # R = H_s W^T + b - H_t
            if matrix is None:
                place = input_grad[pair][chunk].view(rows.shape) if in_place else None
                residual = torch.sub(rows, _rows(target[chunk], valid), out=place)
            else:
                residual = rows @ matrix.mT
                if offset is not None:
                    residual += offset
                residual -= _rows(target[chunk], valid)
            squares[pair] += squared_sum(residual)
            if need_input_grad and not in_place:
                made = residual if matrix is None else residual @ matrix
                slot = input_grad[pair][chunk]
                if valid is None:
                    slot.copy_(made.view(slot.shape))
                else:
                    slot[valid] = made
            if weight_grad.numel():
                weight_grad[pair].addmm_(residual.mT, rows)
            if bias_grad.numel():
                bias_grad[pair] += residual.sum(0)
    return squares, input_grad, weight_grad, bias_grad


def _rows(part: Tensor, valid: Tensor | None) -> Tensor:
    """Token rows `[rows, width]`, valid ones only; a view where there is no mask to apply."""
    return part.reshape(-1, part.shape[-1]) if valid is None else part[valid]


def _chunks(target: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Slices of batch and tokens whose residual takes about `CHUNK_BYTES`."""
    batch, tokens, width = target.shape
    rows = max(1, CHUNK_BYTES // (width * torch.finfo(dtype).bits // 8))
    if rows >= tokens:
        step = rows // tokens
        for start in range(0, batch, step):
            yield slice(start, min(start + step, batch)), slice(0, tokens)
        return
    for item in range(batch):
        for start in range(0, tokens, rows):
            yield slice(item, item + 1), slice(start, min(start + rows, tokens))
