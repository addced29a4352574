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
from collections.abc import Callable, Sequence
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
from ..common.tensor_table import layout_of
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


class _Given(NamedTuple):
    """What one call reads: the table, bytes of the mask, the factor, and what products take."""

    table: Tensor
    valid: Tensor
    factor: Tensor
    student: Sequence[Tensor]
    weight: Sequence[Tensor]
    mask: Tensor | None
    # kept alive until the kernels are launched: a row of another stride is a copy
    tensors: Sequence[Tensor]


class _Made(NamedTuple):
    """What one call fills: sums of programs, workspaces, gradients by pair."""

    partials: Tensor
    residual: Tensor
    projected: Tensor
    """Or what the fused kernel sums of columns."""
    input_grad: Tensor
    weight_grad: Tensor
    bias_grad: Tensor


# a part of what a call does
Step = Callable[[_Given, _Made], None]
# squares, gradients of student, weight and bias
Plan = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


class _Call:
    """What calls that look alike share: sizes of a pair, types, alignments, the table's layout.

    It keeps none of the tensors that it is made of.
    """

    def __init__(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Sequence[Tensor],
        masked: bool,
        dtype: torch.dtype,
    ) -> None:
        batch, tokens, width = self.shape = student[0].shape
        rows, teacher_width = batch * tokens, teacher[0].shape[-1]
        self.pairs, self.weights, self.biases = len(student), len(weight), len(bias)
        self.masked, self.dtype, self.device = masked, dtype, student[0].device
        self.layout = layout_of(_by_pair(student, teacher, weight, bias), self.pairs)
        self.student_dtype = student[0].dtype
        self.weight_dtype = weight[0].dtype if weight else None
        types, self.kept = hidden_types(self.student_dtype, teacher[0].dtype, self.weight_dtype)
        # the residual as an operand
        self.grad_operand = types.pop("GRAD_OPERAND")
        self.sizes = dict(rows=rows, tokens=tokens, width=width, teacher_width=teacher_width)
        self.types = types
        self.bias_type = TYPES[bias[0].dtype] if bias else types["TYPE"]
        names = ("ALIGN", "TEACHER_ALIGN", "WEIGHT_ALIGN")
        self.aligns = dict(zip(names, self.layout.alignments, strict=False))
        self.every = {**self.sizes, **self.types, **self.aligns}
        # blocks of `_fwd_kernel` and of both products, which the library may take
        dtypes = (self.student_dtype, self.kept)
        self.launch = hidden_launch(dtypes, platform(), wide=bool(weight) and is_large())
        self.to_library = self.weight_dtype is not None and library_products.takes(
            self.device, self.kept, self.weight_dtype, self.student_dtype
        )

    def given(self, *names: str) -> dict[str, Any]:
        """Sizes, types and alignments by name."""
        return {name: self.every[name] for name in names}

    def new(self, *shape: int, of: torch.dtype | None = None) -> Tensor:
        """Empty, in the dtype of sums unless told."""
        return torch.empty(shape, dtype=of or self.dtype, device=self.device)

    def read(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Sequence[Tensor],
        mask: Tensor | None,
        factor: Tensor,
    ) -> _Given:
        table, _, tensors = self.layout.addressed(_by_pair(student, teacher, weight, bias))
        valid = _bytes(mask, self.device)
        return _Given(table, valid, factor, student, weight, mask, tensors)


def hidden_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    masked: bool,
    dtype: torch.dtype,
    normalize: bool,
    need_input_grad: bool,
    wants_weight: bool,
) -> Plan:
    """The plan of tensors like these, from student, teacher, weight, bias, mask and `factor`.

    Makes squares `[pairs]` and gradients of student, weight and bias by pair, those of half the
    squares times `factor`, a number on the device in `dtype`, that of sums. Whatever the number of
    pairs, one launch a chunk of tokens where all is made at once, else up to three, four if
    normalised, one more for a bias; bf16 leaves products that stand alone to the library.
    """
    call = _Call(student, teacher, weight, bias, masked, dtype)
    fused = None
    if need_input_grad and weight:
        fused = fused_launch(call.sizes["width"], (call.student_dtype, weight[0].dtype, call.kept))
    if fused is not None:
        plan = _fused(call, fused, normalize, wants_weight)
    else:
        plan = _by_kernel(call, normalize, need_input_grad, wants_weight)
    return lambda *arguments: plan(call.read(*arguments))


def _fused(call: _Call, launch: Launch, normalize: bool, wants_weight: bool) -> Plan:
    """`hidden_forward` by one kernel, and products for gradients of weights."""
    pairs, rows, teacher_width = call.pairs, call.sizes["rows"], call.sizes["teacher_width"]
    block_row = launch.block("BLOCK_ROW")
    row_blocks = cdiv(rows, block_row)
    sums = wants_weight and call.biases > 0
    groups = row_blocks * (block_row // launch.block("ROWS_SUMMED"))
    # whole blocks, so that no row of them needs a mask
    chunk = row_blocks * block_row
    if wants_weight:
        chunk = hidden_chunk(chunk, pairs * teacher_width * call.kept.itemsize, block_row)
    constants = {
        **call.every,
        **launch.constants,
        "BIAS_TYPE": call.bias_type,
        "ZERO_NORM": ZERO_NORM,
        "HAS_MASK": call.masked,
        "HAS_BIAS": call.biases > 0,
        "NORMALIZE": normalize,
        "STORE": wants_weight,
        "SUM_COLUMNS": sums,
    }
    steps: list[Step] = []
    for part in _chunks(rows, chunk):
        grid = (cdiv(part.last - part.first, block_row), pairs)
        steps.append(_fused_step(grid, {**part._asdict(), **constants, **launch.options}))
        if wants_weight:
            steps.append(_weight_gradient(call, part))
    waiting = waiting_dtype(call.student_dtype)
    weight_shape = (pairs, teacher_width, call.sizes["width"])

    def plan(given: _Given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        partials = call.new(pairs, row_blocks)
        made = _Made(
            partials,
            call.new(pairs, chunk, teacher_width, of=call.kept) if wants_weight else partials,
            call.new(pairs, groups, teacher_width) if sums else partials,
            call.new(pairs, *call.shape, of=waiting),
            call.new(*(weight_shape if wants_weight else (0,))),
            partials,
        )
        for step in steps:
            step(given, made)
        bias_grad = made.projected.sum(1) if sums else call.new(0)
        return partials.sum(1), made.input_grad, made.weight_grad, bias_grad

    return plan


def _fused_step(grid: tuple[int, int], rest: dict[str, Any]) -> Step:
    start = Quick(_fwd_dx_kernel).bound(grid, **rest)

    def step(given: _Given, made: _Made) -> None:
        start(*given[:3], made.residual, made.input_grad, made.partials, made.projected)

    return step


def _by_kernel(call: _Call, normalize: bool, need_input_grad: bool, wants_weight: bool) -> Plan:
    """`hidden_forward` by a kernel, or a product, for each thing that is made."""
    pairs, rows, teacher_width = call.pairs, call.sizes["rows"], call.sizes["teacher_width"]
    store = need_input_grad or wants_weight
    wants_bias = wants_weight and call.biases > 0
    # without a norm, no kernel reads projected rows
    projects = call.weights > 0 and normalize
    # without a projection the residual is the student's gradient
    apart = call.weights > 0 and (store or normalize)
    chunk = rows
    if apart:
        value_bytes = store * call.kept.itemsize + normalize * call.dtype.itemsize
        row_bytes = pairs * teacher_width * value_bytes
        chunk = hidden_chunk(rows, row_bytes, call.launch.block("BLOCK_ROW"))
    steps: list[Step] = []
    for part in _chunks(rows, chunk):
        if call.weights or not normalize:
            steps.append(_residuals(call, part, normalize, store))
        if normalize:
            steps.append(_unit_residuals(call, part, store))
        if call.weights and wants_bias:
            steps.append(_bias_gradient(call, part))
        if call.weights and need_input_grad:
            steps.append(_input_gradient(call, part))
        if call.weights and wants_weight:
            steps.append(_weight_gradient(call, part))
    programs = _programs(call, rows, normalize)
    waiting = waiting_dtype(call.student_dtype)
    residual = (pairs, chunk, teacher_width) if store else (0,)

    def plan(given: _Given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        partials = call.new(pairs, programs)
        input_grad = call.new(*((pairs, *call.shape) if need_input_grad else (0,)), of=waiting)
        weight_shape = (pairs, teacher_width, call.sizes["width"]) if wants_weight else (0,)
        made = _Made(
            partials,
            call.new(*residual, of=call.kept) if apart else input_grad,
            call.new(pairs, chunk, teacher_width) if projects else partials,
            input_grad,
            call.new(*weight_shape),
            call.new(*((pairs, teacher_width) if wants_bias else (0,))),
        )
        for step in steps:
            step(given, made)
        return partials.sum(1), input_grad, made.weight_grad, made.bias_grad

    return plan


class _Chunk(NamedTuple):
    """Rows of one chunk, and how many the residuals of two pairs are apart."""

    first: int
    last: int
    chunk: int


def _chunks(rows: int, chunk: int) -> list[_Chunk]:
    return [_Chunk(first, min(first + chunk, rows), chunk) for first in range(0, rows, chunk)]


def _programs(call: _Call, rows: int, normalize: bool) -> int:
    """Programs of the kernel that sums squares, over the rows of a pair."""
    if normalize:
        return cdiv(rows, unit_launch(call.sizes["teacher_width"]).block("BLOCK_ROW"))
    columns = cdiv(call.sizes["teacher_width"], call.launch.block("BLOCK_COLUMN"))
    return cdiv(rows, call.launch.block("BLOCK_ROW")) * columns


def _residuals(call: _Call, part: _Chunk, normalize: bool, store: bool) -> Step:
    """Residuals of a chunk, or its projected rows where they are normalised."""
    exact, _ = product_blocks(call.launch)
    start = Quick(_fwd_kernel).bound(
        (_programs(call, part.last - part.first, False), call.pairs),
        **part._asdict(),
        **call.sizes,
        **call.types,
        **exact,
        **call.aligns,
        BIAS_TYPE=call.bias_type,
        HAS_MASK=call.masked,
        HAS_WEIGHT=call.weights > 0,
        HAS_BIAS=call.biases > 0,
        HAS_TEACHER=not normalize,
        STORE=store or normalize,
        **call.launch.options,
    )

    def step(given: _Given, made: _Made) -> None:
        start(*given[:3], made.projected if normalize else made.residual, made.partials)

    return step


def _unit_residuals(call: _Call, part: _Chunk, store: bool) -> Step:
    launch = unit_launch(call.sizes["teacher_width"])
    start = Quick(_unit_fwd_kernel).bound(
        (_programs(call, part.last - part.first, True), call.pairs),
        **part._asdict(),
        **call.given("rows", "tokens", "teacher_width"),
        **call.given("TYPE", "TEACHER_TYPE", "SUM_TYPE"),
        **launch.constants,
        **call.given("ALIGN", "TEACHER_ALIGN"),
        ZERO_NORM=ZERO_NORM,
        HAS_MASK=call.masked,
        HAS_WEIGHT=call.weights > 0,
        STORE=store,
        **launch.options,
    )
    return lambda given, made: start(*given[:3], made.projected, made.residual, made.partials)


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


def _bias_gradient(call: _Call, part: _Chunk) -> Step:
    """Fill bias gradients `[pairs, teacher_width]` from a chunk, or add a later chunk."""
    columns, rows, launch = call.sizes["teacher_width"], part.last - part.first, sum_launch()
    row_blocks = cdiv(rows, launch.block("BLOCK_ROW") * launch.block("STEPS"))
    start = Quick(_bwd_db_kernel).bound(
        (cdiv(columns, launch.block("BLOCK_COLUMN")), row_blocks, call.pairs),
        rows=rows,
        chunk=part.chunk,
        teacher_width=columns,
        SUM_TYPE=call.types["SUM_TYPE"],
        **launch.constants,
        ALIGN=math.gcd(columns, 16 // call.kept.itemsize),
        **launch.options,
    )

    def step(given: _Given, made: _Made) -> None:
        partials = call.new(call.pairs, row_blocks, columns)
        start(made.residual, partials)
        if part.first:
            made.bias_grad.add_(partials.sum(1))
        else:
            torch.sum(partials, 1, out=made.bias_grad)

    return step


def _input_gradient(call: _Call, part: _Chunk) -> Step:
    """Fill the chunk's rows of the student's gradient `[pairs, batch, tokens, width]`."""
    count = part.last - part.first
    if call.to_library:

        def multiply(given: _Given, made: _Made) -> None:
            rows = made.input_grad.flatten(1, 2)[:, part.first : part.last]
            residual = made.residual[:, :count]
            if call.weights == 1 and rows.is_contiguous():
                # dH_s = R W, of all pairs at once
                residual, rows = residual.flatten(0, 1), rows.flatten(0, 1)
                library_products.multiply(residual, given.weight[0], rows)
                return
            for pair, out in enumerate(rows):
                weight = given.weight[pair % call.weights]
                library_products.multiply(residual[pair], weight, out)

        return multiply
    _, blocks = product_blocks(call.launch)
    row_blocks = cdiv(count, call.launch.block("BLOCK_ROW"))
    column_blocks = cdiv(call.sizes["width"], call.launch.block("BLOCK_COLUMN"))
    start = Quick(_bwd_dx_kernel).bound(
        (row_blocks * column_blocks, call.pairs),
        **part._asdict(),
        **call.given("rows", "width", "teacher_width", "WEIGHT_TYPE"),
        OPERAND=call.grad_operand,
        **call.given("SUM_TYPE"),
        **blocks,
        **call.given("WEIGHT_ALIGN"),
        **call.launch.options,
    )
    return lambda given, made: start(given.table, made.residual, made.input_grad)


def _weight_gradient(call: _Call, part: _Chunk) -> Step:
    """Fill the weight's gradient `[pairs, teacher_width, width]`, or add a later chunk."""
    if call.to_library:

        def multiply(given: _Given, made: _Made) -> None:
            span = slice(part.first, part.last)
            padding = None if given.mask is None else ~given.mask.flatten()[span, None]
            for pair, state in enumerate(given.student):
                rows = state.flatten(0, 1)[span]
                if padding is not None:
                    # padding may hold NaN, and its residual is 0
                    rows = rows.masked_fill(padding, 0.0)
                # dW = R^T H_s
                residual = made.residual[pair, : part.last - part.first].mT
                add = part.first > 0
                library_products.multiply(residual, rows, made.weight_grad[pair], add=add)

        return multiply
    _, blocks = product_blocks(call.launch)
    row_blocks = cdiv(call.sizes["teacher_width"], call.launch.block("BLOCK_ROW"))
    column_blocks = cdiv(call.sizes["width"], call.launch.block("BLOCK_COLUMN"))
    start = Quick(_bwd_dw_kernel).bound(
        (row_blocks * column_blocks, call.pairs),
        **part._asdict(),
        **call.given("tokens", "width", "teacher_width", "TYPE"),
        OPERAND=call.grad_operand,
        **call.given("SUM_TYPE"),
        **blocks,
        **call.given("ALIGN"),
        HAS_MASK=call.masked,
        **call.launch.options,
    )
    return lambda given, made: start(given.table, given.valid, made.residual, made.weight_grad)


def _by_pair(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> list[Tensor]:
    """Student, teacher, weight, bias, one a pair; what is missing is not read, and a student's row
    stands there."""
    pairs = len(student)
    weight = weight or [student[0][0]]
    bias = bias or [student[0][0, 0]]
    columns = (student, teacher, *([*of] * (pairs // len(of)) for of in (weight, bias)))
    return [tensor for row in zip(*columns, strict=True) for tensor in row]
