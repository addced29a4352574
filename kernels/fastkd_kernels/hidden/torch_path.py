"""Losses on hidden states in plain PyTorch, chunked over tokens: what CPU tensors run.

Padded tokens are left out by indexing, so they cost nothing and their values are never read. A row
gradient is the gradient of one token's undivided loss over two with respect to its projected state:
the residual for MSE. Gradients of the weight take it times the pair's upstream gradient, which only
the backward knows; what is kept until then is the smaller of row gradients and their products.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..common.autograd import squared_sum

CHUNK_BYTES = 1 << 22
# rows of this norm and below are normalised to 0, as by torch.nn.functional.normalize
ZERO_NORM = 1e-12


def keeps_rows(rows: int, width: int) -> bool:
    """Whether row gradients are kept for the backward, not their products with student and weight.

    With fewer rows than student columns, row gradients `[rows, teacher_width]` take less memory
    than one gradient of the weight `[teacher_width, width]`, and products are made once, scaled.
    """
    return rows < width


def hidden_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mask: Tensor | None,
    normalize: bool,
    need_input_grad: bool,
    need_weight_grad: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Squares `[pairs]`, unit gradients of student, weight and bias, and row gradients, by pair.

    `weight` and `bias` hold no tensor (identity, no bias), one for all pairs, or one a pair. What
    is not needed is empty: row gradients take the place of the others where `keeps_rows`. With a
    mask they are those of the valid rows, followed by zeros.
    """
    pairs, (batch, tokens, width) = len(student), student[0].shape
    rows, teacher_width = batch * tokens, teacher[0].shape[-1]
    wants_weight = need_weight_grad and bool(weight)
    keep = wants_weight and keeps_rows(rows, width)
    need_input_grad, wants_weight = need_input_grad and not keep, wants_weight and not keep
    like = student[0].new_empty(0, dtype=dtype)
    new = like.new_empty if mask is None else like.new_zeros
    input_grad = new((pairs, rows, width) if need_input_grad else (0,))
    row_grad = new((pairs, rows, teacher_width) if keep else (0,))
    weight_grad = like.new_empty((pairs, *weight[0].shape) if wants_weight else (0,))
    bias_grad = like.new_zeros((pairs, *bias[0].shape) if wants_weight and bias else (0,))
    squares = []
    row_loss = _unit_difference if normalize else _difference
    for pair, (student_state, teacher_state) in enumerate(zip(student, teacher, strict=True)):
        matrix = weight[pair % len(weight)].to(dtype) if weight else None
        offset = bias[pair % len(bias)].to(dtype) if bias else None
        # without a projection the row gradient is the student's, and is made where that goes
        in_place = need_input_grad and matrix is None and mask is None
        total = like.new_zeros(())
        kept = 0
        for chunk, first, last in _chunks(teacher_state, dtype):
            valid = None if mask is None else mask[chunk]
            source = _rows(student_state[chunk], valid).to(dtype)
            out = None
            if keep:
                out = row_grad[pair, kept : kept + source.shape[0]]
                kept += source.shape[0]
            elif in_place:
                out = input_grad[pair, first:last]
            made = source if matrix is None else _projected(source, matrix, offset, out)
            if out is None:
                out = torch.empty_like(made) if matrix is None else made
            total += row_loss(made, _rows(teacher_state[chunk], valid), out)
            if need_input_grad and not in_place:
                _write(input_grad[pair, first:last], out, matrix, valid)
            if wants_weight:
                _add_product(weight_grad[pair], out, source, first == 0)
                if bias:
                    bias_grad[pair] += out.sum(0)
        squares.append(total)
    if need_input_grad:
        input_grad = input_grad.view(pairs, batch, tokens, width)
    return torch.stack(squares), input_grad, weight_grad, bias_grad, row_grad


def hidden_backward(
    row_grad: Tensor,
    student: Sequence[Tensor],
    weight: Sequence[Tensor],
    biases: int,
    mask: Tensor | None,
    factor: Tensor,
    need_input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of student `[pairs, ...]`, weight and bias from kept row gradients.

    `factor` `[pairs]` multiplies those of a pair. There are as many gradients of the weight as
    weights, one for all pairs or one a pair, and `biases` of the bias.
    """
    pairs, dtype, (batch, tokens, width) = len(student), row_grad.dtype, student[0].shape
    weight_grad = row_grad.new_empty(len(weight), *weight[0].shape)
    bias_grad = row_grad.new_zeros((biases, row_grad.shape[-1]) if biases else (0,))
    valid_rows = []
    for pair, student_state in enumerate(student):
        source = _rows(student_state, mask).to(dtype)
        rows = row_grad[pair, : source.shape[0]]
        valid_rows.append(rows)
        index = pair % len(weight)
        # dW = G^T H_s, db = G^T 1
        _add_product(weight_grad[index], rows, source * factor[pair], pair == index)
        if biases:
            bias_grad[pair % biases] += factor[pair] * rows.sum(0)
    if not need_input_grad:
        return row_grad.new_empty(0), weight_grad, bias_grad
    new = row_grad.new_empty if mask is None else row_grad.new_zeros
    input_grad = new((pairs, batch * tokens, width))
    for pair, rows in enumerate(valid_rows):
        _write(input_grad[pair], rows, weight[pair % len(weight)].to(dtype), mask)
        input_grad[pair] *= factor[pair]
    return input_grad.view(pairs, batch, tokens, width), weight_grad, bias_grad


def _difference(source: Tensor, teacher_state: Tensor, out: Tensor) -> Tensor:
    # R = H_s W^T + b - H_t
    torch.sub(source, teacher_state, out=out)
    return squared_sum(out)


def _unit_difference(source: Tensor, teacher_state: Tensor, out: Tensor) -> Tensor:
    teacher_state = teacher_state.to(source.dtype)
    inverse = _inverse_norm(source)
    unit = torch.mul(source, inverse, out=out)
    # R = u - v with unit rows u, v, so that nothing cancels but what student and teacher share
    residual = torch.addcmul(unit, teacher_state, _inverse_norm(teacher_state), value=-1)
    total = squared_sum(residual)
    # G = (R - (R u^T) u) / |H_s W^T + b|
    along = torch.linalg.vecdot(residual, unit).unsqueeze(-1)
    torch.addcmul(residual, unit, along, value=-1, out=out)
    out *= inverse
    return total


def _inverse_norm(rows: Tensor) -> Tensor:
    """`1 / |row|` as `[rows, 1]`, 0 for rows without a direction, NaN where that is infinite."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    # inf - inf is NaN
    inverse: Tensor = norm.reciprocal().add_(norm - norm).masked_fill_(norm <= ZERO_NORM, 0.0)
    return inverse


def _projected(source: Tensor, matrix: Tensor, offset: Tensor | None, out: Tensor | None) -> Tensor:
    if offset is None:
        return torch.mm(source, matrix.mT, out=out)
    return torch.addmm(offset, source, matrix.mT, out=out)


def _write(slot: Tensor, rows: Tensor, matrix: Tensor | None, valid: Tensor | None) -> None:
    """Gradients of the student's valid rows into `slot` `[all rows, width]`."""
    if valid is None and matrix is not None:
        torch.mm(rows, matrix, out=slot)
    else:
        index = slice(None) if valid is None else valid.flatten()
        slot[index] = rows if matrix is None else rows @ matrix


def _add_product(total: Tensor, rows: Tensor, source: Tensor, first: bool) -> None:
    """`rows^T source` into `total`, which `first` overwrites."""
    if first:
        torch.mm(rows.mT, source, out=total)
    else:
        total.addmm_(rows.mT, source)


def _rows(part: Tensor, valid: Tensor | None) -> Tensor:
    """Token rows `[rows, width]`, valid ones only; a view where there is no mask to apply."""
    return part.reshape(-1, part.shape[-1]) if valid is None else part[valid]


def _chunks(
    teacher_state: Tensor, dtype: torch.dtype
) -> Iterator[tuple[tuple[slice, slice], int, int]]:
    """Slices of batch and tokens whose rows take about `CHUNK_BYTES`; their first and end row."""
    batch, tokens, width = teacher_state.shape
    rows = max(1, CHUNK_BYTES // (width * torch.finfo(dtype).bits // 8))
    if rows >= tokens:
        step = rows // tokens
        for start in range(0, batch, step):
            end = min(start + step, batch)
            yield (slice(start, end), slice(0, tokens)), start * tokens, end * tokens
        return
    for item in range(batch):
        for start in range(0, tokens, rows):
            end = min(start + rows, tokens)
            first = item * tokens
            yield (slice(item, item + 1), slice(start, end)), first + start, first + end
