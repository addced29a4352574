"""Losses on hidden states on Triton: what CUDA tensors run. Same results as the PyTorch path.

On an H100, where rows of the student's gradient fit the registers, one kernel projects rows, makes
their residual and multiplies it by the weight while it is there; it projects normalised rows twice.
Only the weight's gradient reads the residual again.

Elsewhere the residual of one chunk of tokens is written to a workspace of bounded size and
multiplied twice; normalised rows are projected into another such workspace first, because their
norms come first. The road not taken: recomputing the residual in the kernels of both gradients,
which multiplies its cost by the number of column blocks.
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
    is_hopper,
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
    _fwd_dx_kernel,
    _fwd_kernel,
    _unit_fwd_kernel,
)

WORKSPACE_BYTES = 64 << 20
# columns of the student's gradient that 128 rows of a program's registers hold
FUSED_WIDTH = 320


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


def width_blocks(width: int) -> tuple[int, int]:
    """Powers of two that hold `width` columns together; the second may be 0."""
    whole = power_of_two(width)
    first = whole // 2
    rest = power_of_two(width - first) if 16 <= first < width else whole
    return (whole, 0) if first + rest >= whole else (first, rest)


def fused_launch(width: int, dtypes: tuple[torch.dtype, ...]) -> Launch | None:
    """Blocks of `_fwd_dx_kernel`; None where it does not fit.

    It takes half precision, and an H100's shared memory and products: on an A100 its sums would not
    stay in registers, and on a B200 not every Triton fits its blocks into shared memory.
    """
    block_in, block_rest = width_blocks(width)
    holds = is_hopper() and block_in + block_rest <= FUSED_WIDTH
    if not (holds and is_half(*dtypes)):
        return None
    constants: dict[str, int | str] = {
        "BLOCK_ROW": 128,
        "BLOCK_COLUMN": 64,
        "BLOCK_IN": block_in,
        "BLOCK_REST": block_rest,
        # those of a warp in a product of four warps
        "ROWS_SUMMED": 16,
        "PRECISION": dot_precision(True, "cuda"),
        "GRAD_PRECISION": dot_precision(True, "cuda"),
    }
    return Launch(constants, num_warps=8, num_stages=2)


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


class _Call(NamedTuple):
    """What all launches of a call share, and the sizes of one pair."""

    student: Sequence[Tensor]
    weight: Sequence[Tensor]
    bias: Sequence[Tensor]
    mask: Tensor | None
    table: Tensor
    valid: Tensor
    factor: Tensor
    sizes: dict[str, int]
    """`rows`, `tokens`, `width`, `teacher_width`."""
    types: dict[str, Any]
    aligns: dict[str, int]
    grad_operand: Any
    """Triton's type of the residual as an operand."""
    kept: torch.dtype
    """The residual's."""

    def given(self, *names: str) -> dict[str, Any]:
        """Sizes, types and alignments by name."""
        every = {**self.sizes, **self.types, **self.aligns}
        return {name: every[name] for name in names}

    def new(self, *shape: int, of: torch.dtype | None = None) -> Tensor:
        """Empty, in the dtype of sums unless told."""
        return torch.empty(shape, dtype=of or self.factor.dtype, device=self.table.device)


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
    sums. Whatever the number of pairs, one launch a chunk of tokens where all is made at once, else
    up to three, four if normalised, one more for a bias; bf16 leaves products that stand alone to
    the library.
    """
    batch, tokens, width = student[0].shape
    # kept until the kernels are launched: a row of another stride is a copy
    table, alignments, _kept = addressed(_pairs(student, teacher, weight, bias))
    types, kept = hidden_types(
        student[0].dtype, teacher[0].dtype, weight[0].dtype if weight else None
    )
    grad_operand = types.pop("GRAD_OPERAND")
    teacher_width = teacher[0].shape[-1]
    call = _Call(
        *(student, weight, bias, mask, table, _bytes(mask, student[0].device), factor),
        sizes={
            "rows": batch * tokens,
            "tokens": tokens,
            "width": width,
            "teacher_width": teacher_width,
        },
        types=types,
        aligns=dict(zip(("ALIGN", "TEACHER_ALIGN", "WEIGHT_ALIGN"), alignments, strict=False)),
        grad_operand=grad_operand,
        kept=kept,
    )
    wants_weight = need_weight_grad and bool(weight)
    if need_input_grad and weight:
        fused = fused_launch(width, (student[0].dtype, weight[0].dtype, kept))
        if fused is not None:
            return _fused(call, fused, normalize, wants_weight)
    return _by_kernel(call, normalize, need_input_grad, wants_weight)


def _fused(
    call: _Call, launch: Launch, normalize: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`hidden_forward` by one kernel, and products for gradients of weights."""
    student, weight, bias = call.student, call.weight, call.bias
    pairs, (rows, teacher_width) = len(student), (call.sizes["rows"], call.sizes["teacher_width"])
    block_row = launch.block("BLOCK_ROW")
    row_blocks = cdiv(rows, block_row)
    sums = wants_weight and bool(bias)
    groups = row_blocks * (block_row // launch.block("ROWS_SUMMED"))
    partials = call.new(pairs, row_blocks)
    input_grad = call.new(pairs, *student[0].shape, of=waiting_dtype(student[0].dtype))
    weight_grad = call.new(*((pairs, *weight[0].shape) if wants_weight else (0,)))
    column_sums = call.new(pairs, groups, teacher_width) if sums else partials
    # whole blocks, so that no row of them needs a mask
    chunk = row_blocks * block_row
    residual = partials
    if wants_weight:
        chunk = hidden_chunk(chunk, pairs * teacher_width * call.kept.itemsize, block_row)
        residual = call.new(pairs, chunk, teacher_width, of=call.kept)
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        Quick(_fwd_dx_kernel)[(cdiv(last - first, block_row), pairs)](
            call.table,
            call.valid,
            call.factor,
            residual,
            input_grad,
            partials,
            column_sums,
            first=first,
            last=last,
            chunk=chunk,
            **call.sizes,
            **call.types,
            **call.aligns,
            **launch.constants,
            BIAS_TYPE=TYPES[bias[0].dtype] if bias else call.types["TYPE"],
            ZERO_NORM=ZERO_NORM,
            HAS_MASK=call.mask is not None,
            HAS_BIAS=bool(bias),
            NORMALIZE=normalize,
            STORE=wants_weight,
            SUM_COLUMNS=sums,
            **launch.options,
        )
        if wants_weight:
            part = _Chunk(residual[:, : last - first], first, last)
            _weight_gradient(call, part, chunk, weight_grad)
    bias_grad = column_sums.sum(1) if sums else call.new(0)
    return partials.sum(1), input_grad, weight_grad, bias_grad, call.new(0)


def _by_kernel(
    call: _Call, normalize: bool, need_input_grad: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`hidden_forward` by a kernel, or a product, for each thing that is made."""
    student, weight, bias = call.student, call.weight, call.bias
    pairs, dtype = len(student), call.factor.dtype
    batch, tokens, width = student[0].shape
    rows, teacher_width = call.sizes["rows"], call.sizes["teacher_width"]
    launch = product_launch(call)
    block_row, block_column = launch.block("BLOCK_ROW"), launch.block("BLOCK_COLUMN")
    shape = (pairs, batch, tokens, width) if need_input_grad else (0,)
    input_grad = call.new(*shape, of=waiting_dtype(student[0].dtype))
    weight_grad = call.new(*((pairs, teacher_width, width) if wants_weight else (0,)))
    bias_grad = call.new(*((pairs, teacher_width) if wants_weight and bias else (0,)))
    teacher_blocks = cdiv(teacher_width, block_column)
    unit = unit_launch(teacher_width)
    unit_rows = unit.block("BLOCK_ROW")
    programs = cdiv(rows, unit_rows) if normalize else cdiv(rows, block_row) * teacher_blocks
    partials = call.new(pairs, programs)
    store = need_input_grad or wants_weight
    # without a norm, no kernel reads projected rows
    chunk, residual, projected = rows, input_grad, partials
    if weight and (store or normalize):
        # without a projection the residual is the student's gradient
        value_bytes = store * call.kept.itemsize + normalize * dtype.itemsize
        chunk = hidden_chunk(rows, pairs * teacher_width * value_bytes, block_row)
        residual = call.new(*((pairs, chunk, teacher_width) if store else (0,)), of=call.kept)
        if normalize:
            projected = call.new(pairs, chunk, teacher_width)
    exact, _ = product_blocks(launch)
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        span = {"first": first, "last": last, "chunk": chunk}
        row_blocks = cdiv(last - first, block_row)
        if weight or not normalize:
            Quick(_fwd_kernel)[(row_blocks * teacher_blocks, pairs)](
                call.table,
                call.valid,
                call.factor,
                projected if normalize else residual,
                partials,
                **span,
                **call.sizes,
                **call.types,
                **exact,
                **call.aligns,
                BIAS_TYPE=TYPES[bias[0].dtype] if bias else call.types["TYPE"],
                HAS_MASK=call.mask is not None,
                HAS_WEIGHT=bool(weight),
                HAS_BIAS=bool(bias),
                HAS_TEACHER=not normalize,
                STORE=store or normalize,
                **launch.options,
            )
        if normalize:
            Quick(_unit_fwd_kernel)[(cdiv(last - first, unit_rows), pairs)](
                call.table,
                call.valid,
                call.factor,
                projected,
                residual,
                partials,
                **span,
                **call.given("rows", "tokens", "teacher_width"),
                **call.given("TYPE", "TEACHER_TYPE", "SUM_TYPE"),
                **unit.constants,
                **call.given("ALIGN", "TEACHER_ALIGN"),
                ZERO_NORM=ZERO_NORM,
                HAS_MASK=call.mask is not None,
                HAS_WEIGHT=bool(weight),
                STORE=store,
                **unit.options,
            )
        if not weight or not store:
            continue
        if wants_weight and bias:
            _sum_rows(residual, last - first, bias_grad, add=first > 0)
        part = _Chunk(residual[:, : last - first], first, last)
        if need_input_grad:
            _input_gradient(call, part, chunk, input_grad)
        if wants_weight:
            _weight_gradient(call, part, chunk, weight_grad)
    return partials.sum(1), input_grad, weight_grad, bias_grad, call.new(0)


def product_launch(call: _Call) -> Launch:
    """Blocks of `_fwd_kernel` and of both products."""
    dtypes = (call.student[0].dtype, call.kept)
    return hidden_launch(dtypes, platform(), wide=bool(call.weight) and is_large())


def product_blocks(launch: Launch) -> tuple[dict[str, int | str], dict[str, int | str]]:
    """Constants of `_fwd_kernel`, and of the products that make gradients."""
    names = ("BLOCK_ROW", "BLOCK_COLUMN", "BLOCK_SUM")
    blocks = {name: launch.constants[name] for name in names}
    exact = {**blocks, "PRECISION": launch.constants["PRECISION"]}
    return exact, {**blocks, "PRECISION": launch.constants["GRAD_PRECISION"]}


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


def _input_gradient(call: _Call, chunk: _Chunk, stride: int, gradient: Tensor) -> None:
    """Fill the chunk's rows of `gradient` `[pairs, batch, tokens, width]`.

    The residuals of two pairs are `stride` rows apart.
    """
    weight, span = call.weight, {"first": chunk.first, "last": chunk.last, "chunk": stride}
    if library_products.takes(chunk.residual, weight[0], call.student[0]):
        rows = gradient.flatten(1, 2)[:, chunk.first : chunk.last]
        if len(weight) == 1 and rows.is_contiguous():
            # dH_s = R W, of all pairs at once
            library_products.multiply(chunk.residual.flatten(0, 1), weight[0], rows.flatten(0, 1))
            return
        for pair, out in enumerate(rows):
            library_products.multiply(chunk.residual[pair], weight[pair % len(weight)], out)
        return
    launch = product_launch(call)
    _, made = product_blocks(launch)
    row_blocks = cdiv(chunk.last - chunk.first, launch.block("BLOCK_ROW"))
    column_blocks = cdiv(call.sizes["width"], launch.block("BLOCK_COLUMN"))
    Quick(_bwd_dx_kernel)[(row_blocks * column_blocks, gradient.shape[0])](
        call.table,
        chunk.residual,
        gradient,
        **span,
        **call.given("rows", "width", "teacher_width", "WEIGHT_TYPE"),
        OPERAND=call.grad_operand,
        **call.given("SUM_TYPE"),
        **made,
        **call.given("WEIGHT_ALIGN"),
        **launch.options,
    )


def _weight_gradient(call: _Call, chunk: _Chunk, stride: int, gradient: Tensor) -> None:
    """Fill `gradient` `[pairs, teacher_width, width]`, or add a later chunk.

    The residuals of two pairs are `stride` rows apart.
    """
    mask = call.mask
    if library_products.takes(chunk.residual, call.weight[0], call.student[0]):
        for pair, student_state in enumerate(call.student):
            rows = student_state.flatten(0, 1)[chunk.first : chunk.last]
            if mask is not None:
                # padding may hold NaN, and its residual is 0
                rows = rows.masked_fill(~mask.flatten()[chunk.first : chunk.last, None], 0.0)
            # dW = R^T H_s
            add = chunk.first > 0
            library_products.multiply(chunk.residual[pair].mT, rows, gradient[pair], add=add)
        return
    launch = product_launch(call)
    _, made = product_blocks(launch)
    row_blocks = cdiv(call.sizes["teacher_width"], launch.block("BLOCK_ROW"))
    column_blocks = cdiv(call.sizes["width"], launch.block("BLOCK_COLUMN"))
    Quick(_bwd_dw_kernel)[(row_blocks * column_blocks, gradient.shape[0])](
        call.table,
        call.valid,
        chunk.residual,
        gradient,
        first=chunk.first,
        last=chunk.last,
        chunk=stride,
        **call.given("tokens", "width", "teacher_width", "TYPE"),
        OPERAND=call.grad_operand,
        **call.given("SUM_TYPE"),
        **made,
        **call.given("ALIGN"),
        HAS_MASK=mask is not None,
        **launch.options,
    )


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
