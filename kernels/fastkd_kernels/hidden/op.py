"""Losses on projected hidden states: squared error, cosine distance, normalised squared error.

The projection, the difference and all gradients are made chunk by chunk, so the projected hidden
states never exist as a whole. The road not taken: the Gram form used for attention scores, whose
terms cancel once the projected student is close to the teacher.

Cosine distance and normalised squared error are one op: the squared distance of two unit vectors is
twice their cosine distance. That distance is summed, not one minus the cosine, which loses its
digits as the student nears the teacher.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_hidden, check_reduction
from ..common.autograd import Named, accumulator, by_shape, inverse, register, scaled
from ..common.fp32_products import fp32_products
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

    Raises:
        ValueError: shapes, devices, modes that do not fit, or a teacher that requires grad.
        TypeError: something that is no float tensor or no bool mask.
    """
    check_reduction(reduction)
    checked = check_hidden(student, teacher, weight, bias, mask, tokens, backend)
    if reduction == "tinybert":
        checked = checked._replace(mask=None)
    return row_losses("mse", *checked)


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

    Raises:
        ValueError: shapes, devices, modes that do not fit, or a teacher that requires grad.
        TypeError: something that is no float tensor or no bool mask.
    """
    checked = check_hidden(student, teacher, weight, bias, mask, tokens, backend)
    return row_losses("cosine", *checked)


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
    checked = check_hidden(student, teacher, weight, bias, mask, tokens, backend)
    return row_losses("normalized_mse", *checked)


def row_losses(
    kind: Kind,
    student: list[Tensor],
    teacher: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    mask: Tensor | None,
    backend: str,
) -> Tensor:
    """Losses `[pairs]` of checked arguments."""
    pairs, (batch, tokens, _) = len(student), student[0].shape
    device = student[0].device
    grad = torch.is_grad_enabled()

    def divisor(width: int, dtype: torch.dtype) -> Tensor:
        """One over the count; the squared distance of unit rows is twice the cosine distance."""
        entries = {"mse": width, "normalized_mse": 1, "cosine": 2}[kind]

        def made() -> Tensor:
            rows = batch * tokens if mask is None else mask.sum()
            return inverse(rows * entries, dtype, device)

        return remembered((mask,), ("inverse rows", batch, tokens, entries, dtype), device, made)

    def loss_of(
        students: Sequence[Tensor], teachers: Sequence[Tensor], members: Sequence[int]
    ) -> Tensor:
        matrices = [weights[i] for i in members] if len(weights) > 1 else weights
        offsets = [biases[i] for i in members] if len(biases) > 1 else biases
        trained = [*matrices, *offsets]
        made = _rows(
            students,
            teachers,
            matrices,
            offsets,
            mask,
            divisor(teachers[0].shape[-1], accumulator(*students, *teachers, *trained)),
            kind != "mse",
            grad and any(tensor.requires_grad for tensor in students),
            grad and any(tensor.requires_grad for tensor in trained),
            backend,
        )
        losses: Tensor = made[0]
        return losses

    few = SAVED_TOGETHER if backend == "torch" else pairs
    keys = [
        (
            pair // few,
            student_state.shape,
            student_state.dtype,
            teacher_state.shape,
            teacher_state.dtype,
        )
        for pair, (student_state, teacher_state) in enumerate(zip(student, teacher, strict=True))
    ]
    loss = by_shape(keys, loss_of, student, teacher, range(pairs))
    return loss if student[0].dtype == torch.float64 else loss.float()


def _exact_products(tensor: Tensor) -> AbstractContextManager[Any]:
    """Products keep the precision of their accumulators, whatever autocast would make of them."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _keeps_rows(student: Tensor, weights: int, need_weight_grad: bool, backend: str) -> bool:
    batch, tokens, width = student.shape
    wants = need_weight_grad and weights > 0 and backend == "torch"
    return wants and torch_path.keeps_rows(batch * tokens, width)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses `[pairs]`, gradients of student, weight and bias by pair, and row gradients.

    PyTorch's are unit gradients, Triton's those of the losses. `normalize` compares rows divided by
    their norms.
    """
    tensors = (student, teacher, weight, bias, mask)
    wanted = (normalize, need_input_grad, need_weight_grad)
    with _exact_products(inverse_count):
        if backend == "torch":
            squares, *grads = torch_path.hidden_forward(*tensors, *wanted, inverse_count.dtype)
        else:
            # imported by the first call that needs Triton
            from .triton_path import hidden_forward

            squares, *grads = hidden_forward(*tensors, inverse_count + inverse_count, *wanted)
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
    with _exact_products(row_grad), fp32_products():
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
        stacked = [
            _applied(unit, factor, dtype, count, kept.inverse_count is None)
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
    with _exact_products(unit), fp32_products():
        total = torch.mm(factor.unsqueeze(0), unit.flatten(1))
    return total.view(1, *unit.shape[1:])
