"""Divergence of logits on Triton: what CUDA tensors run. Same results as the PyTorch path.

The logits of one chunk of tokens are written to a workspace of bounded size, turned into their
gradient row by row, and multiplied twice: at most five launches a chunk, and four products in all.
The road not taken: keeping no logits at all, which makes all of them twice more, because a row's
gradient needs its softmax and, for most kinds, its divergence first.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import library_products
from ..common.launch import (
    Launch,
    alignment,
    cdiv,
    dot_precision,
    platform,
    power_of_two,
    product_dtype,
)
from ..common.quick_launch import Quick
from ..common.remembered import remembered
from ..common.tensor_table import to_device, unit_stride
from ..common.tl_types import TYPES
from .torch_path import Divergence, Gradients, read_columns
from .triton_kernels import _matmul_kernel, _row_kernel

WORKSPACE_BYTES = 32 << 20

# the workspace grows with the gradient of the student's weight, which every chunk reads and writes
WORKSPACE_PART = 1

MOST_WORKSPACE_BYTES = 1 << 30

# programs of one product that keep a large GPU busy
PROGRAMS = 256

LEAST_STEPS = 8

# rows of a chunk are whole blocks of the largest product
BLOCK_ROWS = 128


def product_launch(dtype: torch.dtype, is_aligned: bool, on: str = "cuda") -> Launch:
    """Blocks of a product with operands of `dtype`: rows, columns, and the summed dimension.

    Rows that do not start at multiples of 16 bytes are read element by element, which takes a
    register for each address.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    wide = half and is_aligned
    constants: dict[str, int | str] = {
        "BLOCK_ROW": 128 if wide else 64,
        "BLOCK_COLUMN": 128 if wide else 64,
        "BLOCK_SUM": 64 if wide else 32,
        "PRECISION": dot_precision(True, on),
    }
    return Launch(constants, num_warps=8, num_stages=2 if on == "hip" or not half else 3)


def row_launch(columns: int) -> Launch:
    """The block of columns that a program reads of a row at once."""
    block = min(2048, power_of_two(columns))
    return Launch({"BLOCK": block}, num_warps=8 if block > 512 else 4, num_stages=2)


def logits_chunk(rows: int, row_bytes: int, weight_bytes: int) -> int:
    """Rows whose logits fit the workspace, in whole blocks."""
    space = max(WORKSPACE_BYTES, min(weight_bytes // WORKSPACE_PART, MOST_WORKSPACE_BYTES))
    return min(rows, max(1, space // (row_bytes * BLOCK_ROWS)) * BLOCK_ROWS)


def inner_parts(blocks: int, steps: int) -> tuple[int, int]:
    """Into how many parts the steps of a product's inner sum are cut, and how long a part is.

    A small product over a long dimension has too few blocks to fill a GPU.
    """
    parts = max(1, min(PROGRAMS // blocks, steps // LEAST_STEPS))
    length = -(-steps // parts)
    return -(-steps // length), length


def operand_dtype(left: torch.dtype, right: torch.dtype, total: torch.dtype) -> torch.dtype:
    """What two matrices are multiplied in: the dtype that they share, or the accumulator's."""
    return left if left == right and total != torch.float64 else total


def small(dtype: torch.dtype) -> float:
    """Up to where a series stands in for a difference that would cancel."""
    return 0.01 if dtype == torch.float64 else 0.3


def product_constants(launch: Launch, operand: torch.dtype, total: torch.dtype) -> dict[str, Any]:
    """`tl.constexpr` arguments of a product but for its alignments and flags."""
    return {**launch.constants, "OPERAND": TYPES[operand], "SUM_TYPE": TYPES[total]}


def _align(left: Tensor, right: Tensor, out: Tensor) -> int:
    """Elements that divide start and length of every row of all three."""
    return math.gcd(alignment([left]), alignment([right]), out.shape[1], out.stride(0))


def padded(columns: int) -> int:
    """The length of a row of a workspace, so that every row starts at a multiple of 16 bytes."""
    return -(-columns // 16) * 16


def _product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    operand: torch.dtype,
    *,
    left_transposed: bool = False,
    right_transposed: bool = False,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    add: bool = False,
) -> None:
    """`out` `[rows, columns]` is, or grows by, `left @ right + bias` with transposed operands."""
    if library_products.takes(left, right) and left.dtype == operand:
        if valid is not None:
            # what is in a row that does not count may be NaN, and its gradient is 0
            right = right.masked_fill(valid[:, None] == 0, 0.0)
        turned = (left.mT if left_transposed else left, right.mT if right_transposed else right)
        trimmed = turned[0][: out.shape[0], : turned[1].shape[0]]
        library_products.multiply(
            trimmed, turned[1], out[:, : turned[1].shape[1]], add=add, bias=bias
        )
        return
    rows, columns = out.shape
    inner = right.shape[1 if right_transposed else 0]
    align = _align(left, right, out)
    wide = align * max(left.element_size(), right.element_size()) >= 16
    launch = product_launch(operand, wide, platform())
    blocks = {name: size for name, size in launch.constants.items() if isinstance(size, int)}
    steps = cdiv(inner, blocks["BLOCK_SUM"])
    grid = cdiv(rows, blocks["BLOCK_ROW"]) * cdiv(columns, blocks["BLOCK_COLUMN"])
    parts, length = (1, steps) if add or bias is not None else inner_parts(grid, steps)
    made = out if parts == 1 else out.new_empty(parts, rows, columns)
    Quick(_matmul_kernel)[(grid, parts)](
        left,
        right,
        left if bias is None else bias,
        left if valid is None else valid,
        made,
        rows,
        columns,
        inner,
        *(left.shape[::-1] if left_transposed else left.shape),
        right.shape[0 if right_transposed else 1],
        length,
        left.stride(0),
        right.stride(0),
        made.stride(-2),
        **product_constants(launch, operand, out.dtype),
        ALIGN=align,
        LEFT_TRANSPOSED=left_transposed,
        RIGHT_TRANSPOSED=right_transposed,
        HAS_BIAS=bias is not None,
        HAS_MASK=valid is not None,
        ADD=add,
        **launch.options,
    )
    if parts > 1:
        torch.sum(made, 0, out=out)


def _bytes(mask: Tensor) -> Tensor:
    """uint8 `[rows]`."""
    return remembered((mask,), "flat", mask.device, lambda: mask.to(torch.uint8).flatten())


class _Side:
    """One model's logits: the caller's own, or made chunk by chunk from its head."""

    def __init__(self, side: Sequence[Tensor], columns: int, total: torch.dtype) -> None:
        self.stored = len(side) > 1
        self.columns, self.total = columns, total
        states = unit_stride(side[0])
        self.logits = states
        if self.stored:
            self.hidden = states.reshape(-1, states.shape[-1])
            self.weight = unit_stride(side[1])[:columns]
            self.bias = side[2][:columns].contiguous() if side[2:] else None

    def make(self, first: int, last: int, workspace: Tensor) -> Tensor:
        """Logits of rows `[first, last)` in `workspace`, or all of the caller's."""
        if not self.stored:
            return self.logits
        rows = self.hidden[first:last]
        operand = operand_dtype(rows.dtype, self.weight.dtype, self.total)
        out = workspace[: last - first]
        _product(rows, self.weight, out, operand, right_transposed=True, bias=self.bias)
        return out


def sweep(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None,
    labels: Tensor | None,
    factors: Tensor,
    how: Divergence,
    need_states: bool,
    need_weight: bool,
) -> tuple[Tensor, Gradients]:
    """Sums over valid rows and the gradients of `factors` times these sums.

    The arguments are those of `torch_path.sweep`.
    """
    total, states = factors.dtype, student[0]
    tokens = states.shape[1]
    rows = states.shape[0] * tokens
    columns = read_columns(student, labels, how)
    student_side, teacher_side = _Side(student, columns, total), _Side(teacher, how.shared, total)

    def new(*shape: int, of: torch.dtype = total) -> Tensor:
        return torch.empty(shape, dtype=of, device=states.device)

    wants_weight = need_weight and student_side.stored
    made = Gradients(
        new(*(states.shape if need_states else (0,))),
        new(*(student[1].shape if wants_weight else (0,))),
        new(*(student[2].shape if wants_weight and student[2:] else (0,))),
    )
    # columns that are not compared have a gradient of 0
    if student_side.stored:
        made.weight[columns:].zero_()
        made.bias[columns:].zero_()
    else:
        made.states[..., columns:].zero_()
    store = need_states or wants_weight
    # what the gradient of the logits is multiplied in
    kept = total
    if student_side.stored:
        kept = product_dtype(operand_dtype(states.dtype, student[1].dtype, total))
    launch = row_launch(columns)
    chunk = rows
    if student_side.stored or teacher_side.stored:
        row_bytes = (
            student_side.stored * columns + teacher_side.stored * how.shared
        ) * total.itemsize
        weight_bytes = student[1].numel() * total.itemsize if student_side.stored else 0
        chunk = logits_chunk(rows, row_bytes, weight_bytes)
    student_space = new(chunk if student_side.stored else 0, padded(columns))
    teacher_space = new(chunk if teacher_side.stored else 0, padded(how.shared))
    # in the accumulator's dtype the gradient takes the place of the logits
    space = student_space if kept == total or not store else new(chunk, padded(columns), of=kept)
    values = new(factors.numel(), rows)
    valid = None if mask is None else _bytes(mask)
    ids = None if labels is None else labels.flatten()
    shares = (how.teacher_share, 1.0 - how.teacher_share)
    numbers = [1 / how.temperature, *shares, how.scale, how.scale / how.temperature]
    scalars = to_device([numbers], total, states)
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        gradient = space if student_side.stored else made.states
        logits, teacher_logits = (
            side.make(first, last, workspace)
            for side, workspace in ((student_side, student_space), (teacher_side, teacher_space))
        )
        Quick(_row_kernel)[(last - first,)](
            logits,
            teacher_logits,
            values if ids is None else ids,
            values if valid is None else valid,
            scalars,
            factors,
            values,
            gradient,
            first,
            rows,
            tokens,
            columns,
            how.shared,
            logits.stride(0),
            logits.stride(-2),
            teacher_logits.stride(0),
            teacher_logits.stride(-2),
            first if student_side.stored else 0,
            padded(columns) if student_side.stored else columns,
            gradient.shape[-1],
            SUM_TYPE=TYPES[total],
            **launch.constants,
            KIND=how.kind,
            SMALL=small(total),
            EVEN=how.kind == "js" and how.teacher_share == 0.5,
            STUDENT_STORED=student_side.stored,
            TEACHER_STORED=teacher_side.stored,
            HAS_MASK=valid is not None,
            HAS_LABELS=ids is not None,
            STORE=store,
            **launch.options,
        )
        if student_side.stored and store:
            counted = None if valid is None else valid[first:last]
            _apply(space[: last - first], student_side, first, counted, made)
    return values.sum(1), made


def _apply(
    gradient: Tensor, student_side: _Side, first: int, valid: Tensor | None, made: Gradients
) -> None:
    """From the gradient of a chunk's logits to that of hidden states, weight and bias."""
    last = first + gradient.shape[0]
    if made.states.numel():
        out = made.states.view(-1, made.states.shape[-1])[first:last]
        _product(gradient, student_side.weight, out, gradient.dtype)
    if made.weight.numel():
        out = made.weight[: student_side.columns]
        rows = student_side.hidden[first:last]
        _product(
            gradient, rows, out, gradient.dtype, left_transposed=True, valid=valid, add=first > 0
        )
    if made.bias.numel():
        part = gradient[:, : student_side.columns].sum(0, dtype=made.bias.dtype)
        made.bias[: student_side.columns] = (
            part if first == 0 else made.bias[: student_side.columns] + part
        )
