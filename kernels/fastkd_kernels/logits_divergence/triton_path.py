"""Divergence of logits on Triton: what CUDA tensors run. Same results as the PyTorch path.

The logits of one chunk of tokens are written to a workspace of bounded size, turned into their
gradient row by row, and multiplied twice: at most five launches a chunk, and four products in all.
The road not taken: keeping no logits at all, which makes all of them twice more, because a row's
gradient needs its softmax and, for most kinds, its divergence first.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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
from .torch_path import Divergence, Finish, Gradients, read_columns
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


def _fresh(*shape: int, of: torch.dtype) -> Tensor:
    """What plans look at in the place of a tensor that a call makes: its start divides by 16."""
    return torch.empty(shape, dtype=of, device="meta")


def _cut(tensor: Tensor, first: int, last: int) -> Tensor:
    """Rows `[first, last)`, which often are all."""
    return tensor if last - first == tensor.shape[0] else tensor[first:last]


# fills `out` from left, right, out, bias and valid
Product = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], None]


def _product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    operand: torch.dtype,
    on: torch.device,
    *,
    left_transposed: bool = False,
    right_transposed: bool = False,
    biased: bool = False,
    masked: bool = False,
    add: bool = False,
) -> Product:
    """The plan of products of matrices like these: `out` `[rows, columns]` is, or grows by,
    `left @ right + bias` with transposed operands, over the inner rows that are `valid`."""
    if library_products.takes(on, left.dtype, right.dtype) and left.dtype == operand:
        return partial(_by_library, left_transposed, right_transposed, add)
    rows, columns = out.shape
    inner = right.shape[1 if right_transposed else 0]
    align = _align(left, right, out)
    wide = align * max(left.element_size(), right.element_size()) >= 16
    launch = product_launch(operand, wide, platform())
    blocks = {name: size for name, size in launch.constants.items() if isinstance(size, int)}
    steps = cdiv(inner, blocks["BLOCK_SUM"])
    grid = cdiv(rows, blocks["BLOCK_ROW"]) * cdiv(columns, blocks["BLOCK_COLUMN"])
    parts, length = (1, steps) if add or biased else inner_parts(grid, steps)
    left_rows, left_inner = left.shape[::-1] if left_transposed else left.shape
    start = Quick(_matmul_kernel).bound(
        (grid, parts),
        rows=rows,
        columns=columns,
        inner=inner,
        left_rows=left_rows,
        left_inner=left_inner,
        right_columns=right.shape[0 if right_transposed else 1],
        part_steps=length,
        left_step=left.stride(0),
        right_step=right.stride(0),
        out_step=out.stride(0) if parts == 1 else columns,
        **product_constants(launch, operand, out.dtype),
        ALIGN=align,
        LEFT_TRANSPOSED=left_transposed,
        RIGHT_TRANSPOSED=right_transposed,
        HAS_BIAS=biased,
        HAS_MASK=masked,
        ADD=add,
        **launch.options,
    )

    def multiply(
        left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None, valid: Tensor | None
    ) -> None:
        made = out if parts == 1 else out.new_empty(parts, rows, columns)
        start(left, right, left if bias is None else bias, left if valid is None else valid, made)
        if parts > 1:
            torch.sum(made, 0, out=out)

    return multiply


def _by_library(
    left_transposed: bool,
    right_transposed: bool,
    add: bool,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
) -> None:
    if valid is not None:
        # what is in a row that does not count may be NaN, and its gradient is 0
        right = right.masked_fill(valid[:, None] == 0, 0.0)
    left, right = left.mT if left_transposed else left, right.mT if right_transposed else right
    inner, columns = right.shape
    trimmed = left[: out.shape[0], :inner]
    library_products.multiply(trimmed, right, out[:, :columns], add=add, bias=bias)


def _bytes(mask: Tensor) -> Tensor:
    """uint8 `[rows]`."""
    return remembered((mask,), "flat", mask.device, lambda: mask.to(torch.uint8).flatten())


class _Read(NamedTuple):
    """One model's tensors as kernels read them: the caller's logits, or a head."""

    logits: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class _Side:
    """One model's logits: the caller's own, or made chunk by chunk from its head.

    It keeps no tensor of `side`.
    """

    def __init__(self, side: Sequence[Tensor], columns: int, total: torch.dtype) -> None:
        self.stored = len(side) > 1
        self.columns, self.total = columns, total
        self.device, self.biased = side[0].device, len(side) > 2
        logits = unit_stride(side[0])
        # of items and tokens, where chunks are not made
        self.strides = (logits.stride(0), logits.stride(-2))
        if self.stored:
            self.strides = (padded(columns), padded(columns))

    def read(self, side: Sequence[Tensor]) -> _Read:
        states = unit_stride(side[0])
        if not self.stored:
            return _Read(states, states, states, None)
        hidden = states.reshape(-1, states.shape[-1])
        bias = _cut(side[2], 0, self.columns).contiguous() if self.biased else None
        return _Read(states, hidden, _cut(unit_stride(side[1]), 0, self.columns), bias)

    def maker(self, like: _Read, first: int, last: int) -> Callable[[_Read, Tensor], Tensor]:
        """Makes logits of rows `[first, last)` in a workspace, or gives all of the caller's."""
        if not self.stored:
            return lambda read, workspace: read.logits
        rows = like.hidden[first:last]
        multiply = _product(
            rows,
            like.weight,
            _fresh(last - first, padded(self.columns), of=self.total),
            operand_dtype(rows.dtype, like.weight.dtype, self.total),
            self.device,
            right_transposed=True,
            biased=self.biased,
        )

        def make(read: _Read, workspace: Tensor) -> Tensor:
            out = _cut(workspace, 0, last - first)
            multiply(_cut(read.hidden, first, last), read.weight, out, read.bias, None)
            return out

        return make


class _Given(NamedTuple):
    """What the steps of one call read and fill."""

    student: _Read
    teacher: _Read
    ids: Tensor | None
    valid: Tensor | None
    factors: Tensor
    student_space: Tensor
    teacher_space: Tensor
    # of the gradient of a chunk's logits
    space: Tensor
    values: Tensor
    made: Gradients


Step = Callable[[_Given], None]


class _Call(NamedTuple):
    """What calls that look alike share."""

    sides: tuple[_Side, _Side]
    like: tuple[_Read, _Read]
    how: Divergence
    tokens: int
    rows: int
    masked: bool
    labelled: bool
    need_states: bool
    wants_weight: bool
    total: torch.dtype
    # what the gradient of the logits is multiplied in
    kept: torch.dtype
    scalars: Tensor


def sweep(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    masked: bool,
    labelled: bool,
    total: torch.dtype,
    how: Divergence,
    need_states: bool,
    need_weight: bool,
) -> Callable[..., tuple[Tensor, Gradients]]:
    """The plan of sides like these, from student, teacher, mask, labels and factors.

    Makes sums over valid rows and the gradients of `factors`, in the dtype `total`, times these
    sums. The arguments are those of `torch_path.sweep`.
    """
    call = _call(
        student,
        teacher,
        masked,
        labelled,
        total,
        how,
        need_states,
        need_weight and bool(student[1:]),
    )
    rows, sides, wants_weight, kept = call.rows, call.sides, call.wants_weight, call.kept
    columns, stored, teacher_stored = sides[0].columns, sides[0].stored, sides[1].stored
    chunk = rows
    if stored or teacher_stored:
        row_bytes = (stored * columns + teacher_stored * how.shared) * total.itemsize
        chunk = logits_chunk(rows, row_bytes, student[1].numel() * total.itemsize if stored else 0)
    steps = [
        step
        for first in range(0, rows, chunk)
        for step in _steps(call, first, min(first + chunk, rows))
    ]
    student_space = (chunk if stored else 0, padded(columns))
    teacher_space = (chunk if teacher_stored else 0, padded(how.shared))
    # in the accumulator's dtype the gradient takes the place of the logits
    apart = kept != total and (need_states or wants_weight)
    shapes = [
        tuple(student[index].shape) if needed and student[index:] else (0,)
        for index, needed in enumerate((need_states, wants_weight, wants_weight))
    ]
    # columns that are not compared have a gradient of 0
    vocabulary = student[1].shape[0] if stored else student[0].shape[-1]
    rest = columns < vocabulary
    device, values = student[0].device, (1 + labelled, rows)

    def new(shape: tuple[int, ...], of: torch.dtype = total) -> Tensor:
        return torch.empty(shape, dtype=of, device=device)

    def run(
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        mask: Tensor | None,
        labels: Tensor | None,
        factors: Tensor,
    ) -> tuple[Tensor, Gradients]:
        made = Gradients(*[new(shape) for shape in shapes])
        if rest and stored:
            made.weight[columns:].zero_()
            made.bias[columns:].zero_()
        elif rest:
            made.states[..., columns:].zero_()
        workspace = new(student_space)
        given = _Given(
            sides[0].read(student),
            sides[1].read(teacher),
            None if labels is None else labels.flatten(),
            None if mask is None else _bytes(mask),
            factors,
            workspace,
            new(teacher_space),
            new(student_space, kept) if apart else workspace,
            new(values),
            made,
        )
        for step in steps:
            step(given)
        return given.values.sum(1), made

    return run


def _call(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    masked: bool,
    labelled: bool,
    total: torch.dtype,
    how: Divergence,
    need_states: bool,
    wants_weight: bool,
) -> _Call:
    """What calls of sides like these share."""
    states, columns = student[0], read_columns(student, labelled, how)
    sides = (_Side(student, columns, total), _Side(teacher, how.shared, total))
    kept = total
    if sides[0].stored:
        kept = product_dtype(operand_dtype(states.dtype, student[1].dtype, total))
    shares = (how.teacher_share, 1.0 - how.teacher_share)
    numbers = [1 / how.temperature, *shares, how.scale, how.scale / how.temperature]
    numbers += [*how.student, *how.teacher]
    return _Call(
        sides,
        (sides[0].read(student), sides[1].read(teacher)),
        how,
        tokens=states.shape[1],
        rows=states.shape[0] * states.shape[1],
        masked=masked,
        labelled=labelled,
        need_states=need_states,
        wants_weight=wants_weight,
        total=total,
        kept=kept,
        scalars=to_device([numbers], total, states),
    )


def _steps(call: _Call, first: int, last: int) -> list[Step]:
    """A chunk's logits, their loss and its gradient, and what that is multiplied to."""
    made = [_row_step(call, first, last)]
    if call.sides[0].stored:
        gradient = _fresh(last - first, padded(call.sides[0].columns), of=call.kept)
        if call.need_states:
            made.append(_states_step(call, gradient, first, last))
        if call.wants_weight:
            made.append(_weight_step(call, gradient, first, last))
        if call.wants_weight and call.sides[0].biased:
            made.append(_bias_step(call, first, last))
    return made


def _finish(finish: Finish) -> int:
    """The `FINISH` of a side, see `triton_kernels.read_logits`."""
    return 2 if finish.capped else int(finish.scale != 1.0)


def _row_step(call: _Call, first: int, last: int) -> Step:
    sides, how = call.sides, call.how
    stored, columns = sides[0].stored, sides[0].columns
    makers = [side.maker(like, first, last) for side, like in zip(sides, call.like, strict=True)]
    launch = row_launch(columns)
    step_size = padded(columns) if stored else call.like[0].logits.shape[-1]
    start = Quick(_row_kernel).bound(
        (last - first,),
        first=first,
        rows=call.rows,
        tokens=call.tokens,
        columns=columns,
        shared=how.shared,
        student_batch=sides[0].strides[0],
        student_token=sides[0].strides[1],
        teacher_batch=sides[1].strides[0],
        teacher_token=sides[1].strides[1],
        gradient_first=first if stored else 0,
        gradient_columns=padded(columns) if stored else columns,
        gradient_step=step_size if stored or call.need_states else 0,
        SUM_TYPE=TYPES[call.total],
        **launch.constants,
        KIND=how.kind,
        SMALL=small(call.total),
        EVEN=how.kind == "js" and how.teacher_share == 0.5,
        # series of fp32 stand in for what fp64 computes
        BITS=call.total != torch.float64,
        STUDENT_STORED=stored,
        TEACHER_STORED=sides[1].stored,
        STUDENT_FINISH=_finish(how.student),
        TEACHER_FINISH=_finish(how.teacher),
        HAS_MASK=call.masked,
        HAS_LABELS=call.labelled,
        STORE=call.need_states or call.wants_weight,
        **launch.options,
    )
    scalars = call.scalars

    def step(given: _Given) -> None:
        start(
            makers[0](given.student, given.student_space),
            makers[1](given.teacher, given.teacher_space),
            given.values if given.ids is None else given.ids,
            given.values if given.valid is None else given.valid,
            scalars,
            given.factors,
            given.values,
            given.space if stored else given.made.states,
        )

    return step


def _states_step(call: _Call, gradient: Tensor, first: int, last: int) -> Step:
    """Hidden states' rows of the gradient, from that of a chunk's logits."""
    weight, width = call.like[0].weight, call.like[0].hidden.shape[1]
    out = _fresh(last - first, width, of=call.total)
    multiply = _product(gradient, weight, out, gradient.dtype, call.sides[0].device)

    def step(given: _Given) -> None:
        rows = _cut(given.made.states.view(-1, width), first, last)
        multiply(_cut(given.space, 0, last - first), given.student.weight, rows, None, None)

    return step


def _weight_step(call: _Call, gradient: Tensor, first: int, last: int) -> Step:
    """The weight's gradient is, or grows by, that of a chunk."""
    side, hidden = call.sides[0], call.like[0].hidden
    multiply = _product(
        gradient,
        hidden[first:last],
        _fresh(side.columns, hidden.shape[1], of=call.total),
        gradient.dtype,
        side.device,
        left_transposed=True,
        masked=call.masked,
        add=first > 0,
    )

    def step(given: _Given) -> None:
        multiply(
            _cut(given.space, 0, last - first),
            _cut(given.student.hidden, first, last),
            _cut(given.made.weight, 0, side.columns),
            None,
            None if given.valid is None else _cut(given.valid, first, last),
        )

    return step


def _bias_step(call: _Call, first: int, last: int) -> Step:
    columns = call.sides[0].columns

    def step(given: _Given) -> None:
        gradient = _cut(given.space, 0, last - first)[:, :columns]
        out = _cut(given.made.bias, 0, columns)
        if first == 0:
            torch.sum(gradient, 0, dtype=out.dtype, out=out)
        else:
            out += gradient.sum(0, dtype=out.dtype)

    return step
