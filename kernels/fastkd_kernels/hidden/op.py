"""Losses on projected hidden states: squared error, cosine distance, normalised squared error.

The projection, the difference and all gradients are made chunk by chunk, so the projected hidden
states never exist as a whole. The road not taken: the Gram form used for attention scores, whose
terms cancel once the projected student is close to the teacher.

Cosine distance and normalised squared error are one op: the squared distance of two unit vectors is
twice their cosine distance. That distance is summed, not one minus the cosine, which loses its
digits as the student nears the teacher.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..checks import as_list, check_hidden, check_reduction, look_at_hidden
from ..common.autograd import Named, accumulator, inverse, planned, register, scaled
from ..common.fp32_products import fp32_products, without_autocast
from ..common.plan import Plan, losses_in, plan_by_shape, plan_for
from ..common.remembered import remembered
from ..common.rescale import rescaled, waiting_dtype
from ..types import Backend, Reduction, Tokens
from . import torch_path

# pairs in one node of the CPU's autograd graph, which frees what it keeps once it is through: one
# each would cost time, all of them memory
SAVED_TOGETHER = 2

Kind = Literal["mse", "normalized_mse", "cosine"]


def hidden_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    tokens: Tokens = "all",
    reduction: Reduction = "valid",
    backend: Backend = "auto",
) -> Tensor:
    """Mean squared error of `student @ weight^T + bias` against the teacher, for each layer pair.

    Source: arXiv 1909.10351, eq. 8 (hidden states) and eq. 9 (embeddings).

    Args:
        student: One `[batch, tokens, student_width]` a pair, in bf16, fp16, fp32 or fp64.
        teacher: One `[batch, tokens, teacher_width]` a pair.
        weight: `[teacher_width, student_width]` as in `nn.Linear`: one tensor for all pairs or a
            sequence with one a pair. None compares hidden states as they are.
        bias: `[teacher_width]`, one for all pairs or a sequence with one a pair; needs `weight`.
        mask: Bool `[batch, tokens]`, True at valid tokens; None counts all. Not read by "tinybert".
        tokens: "all", or "cls" for the first token of every batch item alone.
        reduction: "valid" divides by valid tokens times `teacher_width`, and masked tokens add
            nothing. "tinybert" averages over all tokens, padding included, as the official code.
        backend: "auto" runs Triton on CUDA, PyTorch on the CPU and for fp64.

    Returns:
        `[pairs]` in fp32 (fp64 where the student is fp64). Gradients reach student, weight and
        bias. Without any valid token the loss and its gradients are 0.
        Tensors of inference mode may be read by the backward too, which can't tell whether they
        were written to meanwhile: leave them as they are until then.

    Raises:
        ValueError: shapes, devices, modes that do not fit, or a teacher that requires grad.
        TypeError: something that is no float tensor or no bool mask.
    """
    return _compared("mse", student, teacher, weight, bias, mask, tokens, reduction, backend)


def hidden_cosine(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    tokens: Tokens = "all",
    backend: Backend = "auto",
) -> Tensor:
    """Mean over tokens of `1 - cos(student @ weight^T + bias, teacher)`, for each layer pair.

    Source: DistilBERT, arXiv 1910.01108, section 3 (cosine embedding loss of hidden states).

    A vector whose norm is 1e-12 or less counts as a zero vector and gets no gradient: a token is
    worth 1/2 where one of its two vectors is zero, and 0 where both are.

    Args:
        student: One `[batch, tokens, student_width]` a pair, in bf16, fp16, fp32 or fp64.
        teacher: One `[batch, tokens, teacher_width]` a pair.
        weight: `[teacher_width, student_width]` as in `nn.Linear`: one tensor for all pairs or a
            sequence with one a pair. None compares hidden states as they are.
        bias: `[teacher_width]`, one for all pairs or a sequence with one a pair; needs `weight`.
        mask: Bool `[batch, tokens]`, True at valid tokens, the others add nothing; None counts all.
        tokens: "all", or "cls" for the first token of every batch item alone.
        backend: "auto" runs Triton on CUDA, PyTorch on the CPU and for fp64.

    Returns:
        `[pairs]` in fp32 (fp64 where the student is fp64). Gradients reach student, weight and
        bias. Without any valid token the loss and its gradients are 0.
        Tensors of inference mode may be read by the backward too, which can't tell whether they
        were written to meanwhile: leave them as they are until then.

    Raises:
        ValueError: shapes, devices, modes that do not fit, or a teacher that requires grad.
        TypeError: something that is no float tensor or no bool mask.
    """
    return _compared("cosine", student, teacher, weight, bias, mask, tokens, "valid", backend)


def hidden_normalized_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    tokens: Tokens = "all",
    backend: Backend = "auto",
) -> Tensor:
    """Mean over tokens of `|u / |u| - v / |v||^2`, for each layer pair: twice `hidden_cosine`.

    `u` is `student @ weight^T + bias`, `v` the teacher. Source: PKD, arXiv 1908.09355, eq. 7, which
    compares the first token (`tokens="cls"`). Arguments, results and errors are those of
    `hidden_cosine`; a token is worth 1 where one of its two vectors is zero, and 0 where both are.
    """
    return _compared(
        "normalized_mse", student, teacher, weight, bias, mask, tokens, "valid", backend
    )


class Columns(NamedTuple):
    """Hidden states of both sides as lists over pairs, and the places of the pairs in a call."""

    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    pairs: Sequence[int]


def _compared(
    kind: Kind,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor] | None,
    mask: Tensor | None,
    tokens: Tokens,
    reduction: Reduction,
    backend: Backend,
) -> Tensor:
    """Losses `[pairs]` by the plan of arguments that look like these."""
    given = (student, teacher, weight, bias, mask)
    options = (kind, tokens, reduction, backend)
    plan = plan_for(look_at_hidden(*given, *options), partial(_checked_plan, *given, *options))
    columns = Columns(student, teacher, range(len(student)))
    losses: Tensor = plan(columns, as_list(weight), as_list(bias), mask)
    return losses


def _checked_plan(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor] | None,
    mask: Tensor | None,
    kind: Kind,
    tokens: str,
    reduction: str,
    backend: str,
) -> Plan:
    """Losses `[pairs]` of what looks like these arguments, if all fits."""
    check_reduction(reduction)
    chosen = check_hidden(student, teacher, weight, bias, mask, tokens, backend)
    first_only, masked = tokens == "cls", reduction != "tinybert"
    # pairs in one call of the op
    few = SAVED_TOGETHER if chosen == "torch" else len(student)
    keys = [
        (pair // few, of_student.shape, of_student.dtype, of_teacher.shape, of_teacher.dtype)
        for pair, (of_student, of_teacher) in enumerate(zip(student, teacher, strict=True))
    ]

    def read(columns: Columns, mask: Tensor | None) -> tuple[Columns, Tensor | None]:
        """What of a call's tensors is compared."""
        mask = mask if masked else None
        if not first_only:
            return columns, mask
        student, teacher = ([state[:, :1] for state in side] for side in columns[:2])
        return Columns(student, teacher, columns.pairs), None if mask is None else mask[:, :1]

    columns, valid = read(Columns(student, teacher, range(len(student))), mask)
    plan_of = partial(_plan, kind, chosen)
    plan = plan_by_shape(keys, plan_of, columns, as_list(weight), as_list(bias), valid)

    def run(
        columns: Columns, weights: list[Tensor], biases: list[Tensor], mask: Tensor | None
    ) -> Tensor:
        columns, mask = read(columns, mask)
        losses: Tensor = plan(columns, weights, biases, mask)
        return losses

    return losses_in(run, student[0].dtype)


def _plan(
    kind: Kind,
    backend: str,
    columns: Columns,
    weights: list[Tensor],
    biases: list[Tensor],
    mask: Tensor | None,
) -> Plan:
    """Losses of pairs of one shape, whose weights and biases stand at their places, or are one."""
    student, teacher = columns.student[0], columns.teacher[0]
    device, (batch, tokens, width) = student.device, teacher.shape
    dtype = accumulator(student, teacher, *weights, *biases)

    def of_pairs(values: list[Tensor], columns: Columns) -> list[Tensor]:
        return values if len(values) < 2 else [values[pair] for pair in columns.pairs]

    trained = (*of_pairs(weights, columns), *of_pairs(biases, columns))
    grad = torch.is_grad_enabled()
    needs = [grad and any([one.requires_grad for one in of]) for of in (columns.student, trained)]
    # the squared distance of unit rows is twice the cosine distance
    entries = {"mse": width, "normalized_mse": 1, "cosine": 2}[kind]
    what = ("inverse rows", batch, tokens, entries, dtype)

    def divisor(mask: Tensor | None) -> Tensor:
        """One over the count."""

        def made() -> Tensor:
            rows = batch * tokens if mask is None else mask.sum()
            return inverse(rows * entries, dtype, device)

        return remembered((mask,), what, device, made)

    def arguments(
        columns: Columns, weights: list[Tensor], biases: list[Tensor], mask: Tensor | None
    ) -> tuple[Any, ...]:
        states = (columns.student, columns.teacher)
        trained = (of_pairs(weights, columns), of_pairs(biases, columns))
        return *states, *trained, mask, divisor(mask), kind != "mse", *needs, backend

    run = _rows.planned(arguments(columns, weights, biases, mask))
    return lambda *given: run(arguments(*given))[0]


def _keeps_rows(student: Tensor, weights: int, need_weight_grad: bool, backend: str) -> bool:
    batch, tokens, width = student.shape
    wants = need_weight_grad and weights > 0 and backend == "torch"
    return wants and torch_path.keeps_rows(batch * tokens, width)


@planned
def _forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mask: Tensor | None,
    inverse_count: Tensor,
    normalize: bool,
    need_input_grad: bool,
    need_weight_grad: bool,
    backend: str,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Losses `[pairs]`, gradients of student, weight and bias by pair, and row gradients.

    PyTorch's are unit gradients, Triton's those of the losses. `normalize` compares rows divided by
    their norms.
    """
    if backend == "torch":
        return _torch_forward
    # imported by the first call that needs Triton
    from .triton_path import hidden_forward

    states = (student, teacher, weight, bias)
    needs = (need_input_grad, need_weight_grad and bool(weight))
    plan = hidden_forward(*states, mask is not None, inverse_count.dtype, normalize, *needs)

    def run(
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Sequence[Tensor],
        mask: Tensor | None,
        inverse_count: Tensor,
        *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with without_autocast(inverse_count.device.type):
            twice = inverse_count + inverse_count
            squares, *grads = plan(student, teacher, weight, bias, mask, twice)
        return squares.mul_(inverse_count), grads[0], grads[1], grads[2], inverse_count.new_empty(0)

    return run


def _torch_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mask: Tensor | None,
    inverse_count: Tensor,
    normalize: bool,
    need_input_grad: bool,
    need_weight_grad: bool,
    _: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    squares, *grads = torch_path.hidden_forward(
        student,
        teacher,
        weight,
        bias,
        mask,
        normalize,
        need_input_grad,
        need_weight_grad,
        inverse_count.dtype,
    )
    return squares * inverse_count, grads[0], grads[1], grads[2], grads[3]


def _fake(given: Named) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student, weight, bias = given.student, given.weight, given.bias
    pairs, new = len(student), given.inverse_count.new_empty
    keeps = _keeps_rows(student[0], len(weight), given.need_weight_grad, given.backend)
    batch, tokens, teacher_width = given.teacher[0].shape
    wants_weight = given.need_weight_grad and bool(weight) and not keeps
    waiting = None if given.backend == "torch" else waiting_dtype(student[0].dtype)
    of_student = (pairs, *student[0].shape) if given.need_input_grad and not keeps else (0,)
    return (
        new(pairs),
        new(of_student, dtype=waiting),
        new((pairs, *weight[0].shape) if wants_weight else (0,)),
        new((pairs, *bias[0].shape) if wants_weight and bias else (0,)),
        new((pairs, batch * tokens, teacher_width) if keeps else (0,)),
    )


def _backward(
    row_grad: Tensor,
    student: Sequence[Tensor],
    weight: Sequence[Tensor],
    biases: int,
    mask: Tensor | None,
    factor: Tensor,
    need_input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of student, weight and bias, stacked, from kept row gradients."""
    with without_autocast(row_grad.device.type), fp32_products():
        return torch_path.hidden_backward(
            row_grad, student, weight, biases, mask, factor, need_input_grad
        )


def _backward_fake(given: Named) -> tuple[Tensor, Tensor, Tensor]:
    student, weight, biases = given.student, given.weight, given.biases
    new = given.row_grad.new_empty
    return (
        new((len(student), *student[0].shape) if given.need_input_grad else (0,)),
        new(len(weight), *weight[0].shape),
        new((biases, weight[0].shape[0]) if biases else (0,)),
    )


_rows_backward = register("hidden_rows_backward", _backward, _backward_fake)


def _keep(given: Named, made: tuple[Tensor, ...]) -> dict[str, Any]:
    """Row gradients and what they are multiplied with, or unit gradients."""
    groups = (given.student, given.weight, given.bias)
    kept: dict[str, Any] = {
        "inverse_count": given.inverse_count if given.backend == "torch" else None,
        "counts": [len(group) for group in groups],
        "dtypes": [group[0].dtype if group else None for group in groups],
    }
    if not _keeps_rows(given.student[0], len(given.weight), given.need_weight_grad, given.backend):
        return kept | {"row_grad": None, "units": made[1:4]}
    inputs = {word: getattr(given, word) for word in ("student", "weight", "mask")}
    return kept | inputs | {"row_grad": made[4], "need_input_grad": given.need_input_grad}


def _gradient(kept: Named, upstream: Tensor) -> dict[str, Any]:
    factor = upstream if kept.inverse_count is None else 2.0 * kept.inverse_count * upstream
    if kept.row_grad is not None:
        stacked = _rows_backward(
            kept.row_grad,
            kept.student,
            kept.weight,
            kept.counts[2],
            kept.mask,
            factor,
            kept.need_input_grad,
        )
    else:
        by_triton = kept.inverse_count is None
        with without_autocast(upstream.device.type), fp32_products():
            stacked = [
                _applied(unit, factor, dtype, count, by_triton) if dtype is not None else unit
                for unit, dtype, count in zip(kept.units, kept.dtypes, kept.counts, strict=True)
            ]
    return {
        word: (made if made.dtype == dtype else made.to(dtype)) if made.numel() else None
        for word, made, dtype in zip(
            ("student", "weight", "bias"), stacked, kept.dtypes, strict=True
        )
    }


_rows = register("hidden_rows", _forward, _fake, _keep, _gradient)


def _applied(
    unit: Tensor, factor: Tensor, dtype: torch.dtype, count: int, by_triton: bool
) -> Tensor:
    """Gradients by pair times `factor` `[pairs]`; their sum where `count` is 1."""
    if unit.numel() == 0:
        return unit
    if count == factor.numel() and by_triton:
        return rescaled(unit, unit.new_empty(0), factor, dtype)[0]
    if count == factor.numel():
        return scaled(unit, factor, dtype)
    total = torch.mm(factor.unsqueeze(0), unit.flatten(1))
    return total.view(1, *unit.shape[1:])
