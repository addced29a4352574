"""Losses on hidden states on Triton: what CUDA tensors run. Same results as the PyTorch path.

The residual of one chunk of tokens is written to a workspace of bounded size and multiplied twice;
normalised rows are projected into another such workspace first, because their norms come first. The
road not taken: recomputing the residual in the kernels of both gradients, which multiplies its
cost by the number of column blocks.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import library_products
from ..common.launch import (
    Launch,
    cdiv,
    dot_precision,
    is_half,
    is_large,
    platform,
    power_of_two,
    product_dtype,
)
from ..common.quick_launch import Quick
from ..common.remembered import remembered
from ..common.rescale import waiting_dtype
from ..common.tensor_table import addressed
from ..common.tl_types import TYPES
from .torch_path import ZERO_NORM
from .triton_kernels import (
    _bwd_db_kernel,
    _bwd_dw_kernel,
    _bwd_dx_kernel,
    _fwd_kernel,
    _unit_fwd_kernel,
)

WORKSPACE_BYTES = 64 << 20


@cache
def hidden_launch(
    dtypes: tuple[torch.dtype, ...], on: str = "cuda", *, wide: bool = True
) -> Launch:
    """Blocks of the three hidden-state products: rows, columns, and the summed dimension.

    `wide` is for projections and large shared memory. Blocks for half precision were the fastest of
    fourteen on an H100.
    """
    half = is_half(*dtypes)
    constants: dict[str, int | str] = {
        "BLOCK_ROW": 128 if half else 64,
        "BLOCK_COLUMN": 256 if half and wide and on != "hip" else 128 if half else 64,
        "BLOCK_SUM": 64 if half else 32,
        "PRECISION": dot_precision(True, on),
        "GRAD_PRECISION": dot_precision(dtypes[0] != torch.float16, on),
    }
    return Launch(constants, num_warps=8, num_stages=3 if half else 2)


@cache
def sum_launch() -> Launch:
    """Blocks of `_bwd_db_kernel`."""
    constants: dict[str, int | str] = {"BLOCK_ROW": 32, "BLOCK_COLUMN": 128, "STEPS": 8}
    return Launch(constants, num_warps=4, num_stages=1)


@cache
def unit_launch(teacher_width: int) -> Launch:
    """Blocks of `_unit_fwd_kernel`: a few whole rows, so that each value is read once."""
    columns = power_of_two(teacher_width)
    rows = min(64, max(1, 4096 // columns))
    constants: dict[str, int | str] = {"BLOCK_ROW": rows, "BLOCK_COLUMN": columns}
    return Launch(constants, num_warps=min(16, max(4, rows * columns // 512)), num_stages=1)


def hidden_chunk(rows: int, row_bytes: int, block_row: int) -> int:
    """Rows whose residual fits the workspace, in whole blocks."""
    fits = max(1, WORKSPACE_BYTES // (row_bytes * block_row))
    return min(rows, fits * block_row)


def hidden_types(
    dtype: torch.dtype, teacher_dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> tuple[dict[str, Any], torch.dtype]:
    """`tl.constexpr` types of the products, and the dtype of the residual's workspace."""
    wide = torch.float64 in (dtype, teacher_dtype, weight_dtype)
    total = torch.float64 if wide else torch.float32
    operand = dtype if weight_dtype in (None, dtype) and not wide else total
    kept = total if wide else product_dtype(operand)
    types = {
        "TYPE": TYPES[dtype],
        "TEACHER_TYPE": TYPES[teacher_dtype],
        "WEIGHT_TYPE": TYPES[weight_dtype or dtype],
        "OPERAND": TYPES[operand],
        "GRAD_OPERAND": TYPES[kept],
        "SUM_TYPE": TYPES[total],
    }
    return types, kept


def hidden_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mask: Tensor | None,
    factor: Tensor,
    normalize: bool,
    need_input_grad: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Squares `[pairs]`, gradients of student, weight and bias by pair, no row gradients.

    Gradients are those of half the squares times `factor`, a number on the device in the dtype of
    sums. Up to three launches a chunk of tokens, four if normalised, one more for a bias, whatever
    the number of pairs; bf16 leaves both gradients of a projection to the library.
    """
    pairs, dtype = len(student), factor.dtype
    batch, tokens, width = student[0].shape
    teacher_width, rows = teacher[0].shape[-1], batch * tokens
    # kept until the kernels are launched: a row of another stride is a copy
    table, alignments, _kept = addressed(_pairs(student, teacher, weight, bias))
    types, kept = hidden_types(
        student[0].dtype, teacher[0].dtype, weight[0].dtype if weight else None
    )
    grad_operand = types.pop("GRAD_OPERAND")
    launch = hidden_launch((student[0].dtype, kept), platform(), wide=bool(weight) and is_large())
    blocks = {name: size for name, size in launch.constants.items() if isinstance(size, int)}
    block_row, block_column = blocks["BLOCK_ROW"], blocks["BLOCK_COLUMN"]
    options = launch.options

    def new(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device=student[0].device)

    wants_weight = need_weight_grad and bool(weight)
    shape = (pairs, batch, tokens, width) if need_input_grad else (0,)
    input_grad = new(*shape, of=waiting_dtype(student[0].dtype))
    weight_grad = new(*((pairs, teacher_width, width) if wants_weight else (0,)))
    bias_grad = new(*((pairs, teacher_width) if wants_weight and bias else (0,)))
    teacher_blocks = cdiv(teacher_width, block_column)
    unit = unit_launch(teacher_width)
    unit_rows = int(unit.constants["BLOCK_ROW"])
    programs = cdiv(rows, unit_rows) if normalize else cdiv(rows, block_row) * teacher_blocks
    partials = new(pairs, programs)
    store = need_input_grad or wants_weight
    # without a norm, no kernel reads projected rows
    chunk, residual, projected = rows, input_grad, partials
    if weight and (store or normalize):
        # without a projection the residual is the student's gradient
        value_bytes = store * kept.itemsize + normalize * dtype.itemsize
        chunk = hidden_chunk(rows, pairs * teacher_width * value_bytes, block_row)
        residual = new(*((pairs, chunk, teacher_width) if store else (0,)), of=kept)
        if normalize:
            projected = new(pairs, chunk, teacher_width)
    valid = _bytes(mask, student[0].device)
    aligns = dict(zip(("ALIGN", "TEACHER_ALIGN", "WEIGHT_ALIGN"), alignments, strict=False))
    # both gradients of a projection, from the residual
    library = bool(weight) and store and library_products.takes(residual, weight[0], student[0])
    exact = {**blocks, "PRECISION": launch.constants["PRECISION"]}
    made = {**blocks, "PRECISION": launch.constants["GRAD_PRECISION"]}
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        span = {"first": first, "last": last, "chunk": chunk}
        row_blocks = cdiv(last - first, block_row)
        if weight or not normalize:
            Quick(_fwd_kernel)[(row_blocks * teacher_blocks, pairs)](
                table,
                valid,
                factor,
                projected if normalize else residual,
                partials,
                **span,
                rows=rows,
                tokens=tokens,
                width=width,
                teacher_width=teacher_width,
                **types,
                **exact,
                **aligns,
                BIAS_TYPE=TYPES[bias[0].dtype] if bias else types["TYPE"],
                HAS_MASK=mask is not None,
                HAS_WEIGHT=bool(weight),
                HAS_BIAS=bool(bias),
                HAS_TEACHER=not normalize,
                STORE=store or normalize,
                **options,
            )
        if normalize:
            Quick(_unit_fwd_kernel)[(cdiv(last - first, unit_rows), pairs)](
                table,
                valid,
                factor,
                projected,
                residual,
                partials,
                **span,
                rows=rows,
                tokens=tokens,
                teacher_width=teacher_width,
                TYPE=types["TYPE"],
                TEACHER_TYPE=types["TEACHER_TYPE"],
                SUM_TYPE=types["SUM_TYPE"],
                **unit.constants,
                ALIGN=aligns["ALIGN"],
                TEACHER_ALIGN=aligns["TEACHER_ALIGN"],
                ZERO_NORM=ZERO_NORM,
                HAS_MASK=mask is not None,
                HAS_WEIGHT=bool(weight),
                STORE=store,
                **unit.options,
            )
        if wants_weight and bias:
            _sum_rows(residual, last - first, bias_grad, add=first > 0)
        if library:
            part = _Chunk(residual[:, : last - first], first, last)
            if need_input_grad:
                _library_input_gradient(part, weight, input_grad)
            if wants_weight:
                _library_weight_gradient(part, student, mask, weight_grad)
            continue
        if need_input_grad and weight:
            Quick(_bwd_dx_kernel)[(row_blocks * cdiv(width, block_column), pairs)](
                table,
                residual,
                input_grad,
                **span,
                rows=rows,
                width=width,
                teacher_width=teacher_width,
                WEIGHT_TYPE=types["WEIGHT_TYPE"],
                OPERAND=grad_operand,
                SUM_TYPE=types["SUM_TYPE"],
                **made,
                WEIGHT_ALIGN=aligns["WEIGHT_ALIGN"],
                **options,
            )
        if wants_weight:
            tiles = cdiv(teacher_width, block_row) * cdiv(width, block_column)
            Quick(_bwd_dw_kernel)[(tiles, pairs)](
                table,
                valid,
                residual,
                weight_grad,
                **span,
                tokens=tokens,
                width=width,
                teacher_width=teacher_width,
                TYPE=types["TYPE"],
                OPERAND=grad_operand,
                SUM_TYPE=types["SUM_TYPE"],
                **made,
                ALIGN=aligns["ALIGN"],
                HAS_MASK=mask is not None,
                **options,
            )
    return partials.sum(1), input_grad, weight_grad, bias_grad, new(0)


def _bytes(mask: Tensor | None, device: torch.device) -> Tensor:
    """uint8 `[batch, tokens]`, a placeholder without a mask."""

    def made() -> Tensor:
        if mask is None:
            return torch.empty(0, dtype=torch.uint8, device=device)
        return mask.to(torch.uint8).contiguous()

    return remembered((mask,), "bytes", device, made)


class _Chunk(NamedTuple):
    """Residuals `[pairs, last - first, teacher_width]` of one chunk of rows."""

    residual: Tensor
    first: int
    last: int


def _sum_rows(residual: Tensor, rows: int, gradient: Tensor, *, add: bool) -> None:
    """Fill bias gradients `[pairs, teacher_width]` from `rows` of a chunk, or add a later chunk."""
    pairs, chunk, columns = residual.shape
    launch = sum_launch()
    row_blocks = cdiv(rows, launch.block("BLOCK_ROW") * launch.block("STEPS"))
    partials = gradient.new_empty(pairs, row_blocks, columns)
    Quick(_bwd_db_kernel)[(cdiv(columns, launch.block("BLOCK_COLUMN")), row_blocks, pairs)](
        residual,
        partials,
        rows=rows,
        chunk=chunk,
        teacher_width=columns,
        SUM_TYPE=TYPES[gradient.dtype],
        **launch.constants,
        ALIGN=math.gcd(columns, 16 // residual.itemsize),
        **launch.options,
    )
    if add:
        gradient += partials.sum(1)
    else:
        torch.sum(partials, 1, out=gradient)


def _library_input_gradient(chunk: _Chunk, weight: Sequence[Tensor], gradient: Tensor) -> None:
    """Fill the chunk's rows of `gradient` `[pairs, batch, tokens, width]`."""
    rows = gradient.flatten(1, 2)[:, chunk.first : chunk.last]
    if len(weight) == 1 and rows.is_contiguous():
        # dH_s = R W, of all pairs at once
        library_products.multiply(chunk.residual.flatten(0, 1), weight[0], rows.flatten(0, 1))
        return
    for pair, out in enumerate(rows):
        library_products.multiply(chunk.residual[pair], weight[pair % len(weight)], out)


def _library_weight_gradient(
    chunk: _Chunk, student: Sequence[Tensor], mask: Tensor | None, gradient: Tensor
) -> None:
    """Fill `gradient` `[pairs, teacher_width, width]`, or add a later chunk."""
    for pair, student_state in enumerate(student):
        rows = student_state.flatten(0, 1)[chunk.first : chunk.last]
        if mask is not None:
            # padding may hold NaN, and its residual is 0
            rows = rows.masked_fill(~mask.flatten()[chunk.first : chunk.last, None], 0.0)
        # dW = R^T H_s
        add = chunk.first > 0
        library_products.multiply(chunk.residual[pair].mT, rows, gradient[pair], add=add)


def _pairs(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> list[tuple[Tensor, ...]]:
    """Student, teacher, weight and bias, one a pair; the student stands in for what is missing."""
    pairs = len(student)
    matrices = [state[0] for state in student] if not weight else [*weight] * (pairs // len(weight))
    offsets = [state[0, 0] for state in student] if not bias else [*bias] * (pairs // len(bias))
    return [*zip(student, teacher, matrices, offsets, strict=True)]
