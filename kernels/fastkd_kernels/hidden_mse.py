"""Mean squared error of projected hidden states (TinyBERT, arXiv 1909.10351, eq. 8).

The projection, the difference and all gradients are made chunk by chunk, so the projected hidden
states never exist as a whole. The road not taken: the Gram form used for attention scores, whose
terms cancel once the projected student is close to the teacher.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import hidden_mse_torch as on_torch
from .checks import (
    check_device,
    check_frozen,
    check_mask,
    check_pairs,
    check_reduction,
    check_tensor,
    resolve_backend,
)
from .types import NAMESPACE, Backend, Reduction
from .unit_gradient import by_shape, inverse, scaled, value_of


def hidden_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
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
        reduction: "valid" divides by valid tokens times `teacher_width`, and masked tokens add
            nothing. "tinybert" averages over all tokens, padding included, as the official code.
        backend: "auto" runs Triton on CUDA and PyTorch on the CPU.

    Returns:
        `[pairs]` in fp32 (fp64 where the student is fp64). Gradients reach student, weight and
        bias. Without any valid token the loss and its gradients are 0.

    Raises:
        ValueError: shapes, devices, modes that do not fit, or a teacher that requires grad.
        TypeError: something that is no float tensor or no bool mask.
    """
    weights, biases = _check(student, teacher, weight, bias)
    batch, tokens, _ = student[0].shape
    device = student[0].device
    check_mask("mask", mask, batch, tokens, device)
    check_reduction(reduction)
    chosen = resolve_backend(backend, device)
    if reduction == "tinybert":
        mask = None

    def loss_of(members: list[int]) -> Tensor:
        own, target = [student[i] for i in members], [teacher[i] for i in members]
        matrices = [weights[i] for i in members] if len(weights) > 1 else weights
        offsets = [biases[i] for i in members] if len(biases) > 1 else biases
        trained = [*matrices, *offsets]
        grad = torch.is_grad_enabled()
        width = target[0].shape[-1]
        count = batch * tokens * width if mask is None else mask.sum() * width
        losses: Tensor = _hidden(
            own,
            target,
            matrices,
            offsets,
            mask,
            inverse(count, _accumulator([*own, *target, *trained]), device),
            grad and any(tensor.requires_grad for tensor in own),
            grad and any(tensor.requires_grad for tensor in trained),
            chosen,
        )[0]
        return losses

    keys = [
        (tuple(own.shape), own.dtype, tuple(target.shape), target.dtype)
        for own, target in zip(student, teacher, strict=True)
    ]
    loss = by_shape(keys, loss_of)
    return loss if student[0].dtype == torch.float64 else loss.float()


def _accumulator(tensors: Sequence[Tensor]) -> torch.dtype:
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _as_list(name: str, value: Tensor | Sequence[Tensor] | None, pairs: int) -> list[Tensor]:
    """No tensor, one for all pairs, or one a pair."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{name} must be a tensor, a list with one tensor a pair, or None, "
            f"got {type(value).__name__}"
        )
    if len(value) != pairs:
        raise ValueError(
            f"{name} has {len(value)} tensors for {pairs} pairs; give one a pair, "
            "or a single tensor for all"
        )
    return list(value)


def _check(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Everything fits; returns weight and bias as lists."""
    check_pairs(student, teacher)
    weights = _as_list("weight", weight, len(student))
    biases = _as_list("bias", bias, len(student))
    if biases and not weights:
        raise ValueError("bias is given without weight; give a weight or leave the bias out")
    for pair, (own, target) in enumerate(zip(student, teacher, strict=True)):
        check_tensor(f"student[{pair}]", own, "batch, tokens, student_width")
        check_tensor(f"teacher[{pair}]", target, "batch, tokens, teacher_width")
        check_device(f"student[{pair}]", own, student[0].device)
        check_device(f"teacher[{pair}]", target, student[0].device)
        check_frozen(f"teacher[{pair}]", target)
        first = tuple(student[0].shape[:2])
        for name, value in (("student", own), ("teacher", target)):
            if tuple(value.shape[:2]) != first:
                raise ValueError(
                    f"{name}[{pair}] has batch and tokens {tuple(value.shape[:2])}; expected "
                    f"those of student[0], {first}; run both models on the same batch"
                )
        widths = (target.shape[-1], own.shape[-1])
        if not weights and widths[0] != widths[1]:
            raise ValueError(
                f"pair {pair}: the student is {widths[1]} wide and the teacher {widths[0]}; "
                f"give a weight [{widths[0]}, {widths[1]}]"
            )
        _check_trained("weight", weights, pair, widths, student[0].device)
        _check_trained("bias", biases, pair, widths[:1], student[0].device)
    return weights, biases


def _check_trained(
    name: str, values: list[Tensor], pair: int, shape: tuple[int, ...], device: torch.device
) -> None:
    if not values:
        return
    index = pair % len(values)
    label = name if len(values) == 1 else f"{name}[{index}]"
    dims = "teacher_width, student_width" if len(shape) == 2 else "teacher_width"
    check_tensor(label, values[index], dims)
    check_device(label, values[index], device)
    if tuple(values[index].shape) != shape:
        raise ValueError(
            f"{label} has shape {tuple(values[index].shape)}; expected [{dims}] = "
            f"{list(shape)} for pair {pair}"
        )
    if values[index].dtype != values[0].dtype:
        raise TypeError(f"{label} is {values[index].dtype} and {name}[0] is {values[0].dtype}")


@torch.library.custom_op(f"{NAMESPACE}::hidden_mse", mutates_args=())
def _hidden(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mask: Tensor | None,
    inverse_count: Tensor,
    need_input_grad: bool,
    need_weight_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses `[pairs]` and stacked unit gradients of student, weight and bias."""
    if backend == "torch":
        forward = on_torch.hidden_forward
    else:
        # imported by the first call that needs Triton
        from .hidden_mse_triton import hidden_forward as forward
    squares, *grads = forward(
        student,
        teacher,
        weight,
        bias,
        mask,
        need_input_grad,
        need_weight_grad,
        inverse_count.dtype,
    )
    return value_of(squares, inverse_count), grads[0], grads[1], grads[2]


@_hidden.register_fake
def _hidden_fake(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mask: Tensor | None,
    inverse_count: Tensor,
    need_input_grad: bool,
    need_weight_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = len(student)
    return (
        inverse_count.new_empty(pairs),
        inverse_count.new_empty((pairs, *student[0].shape) if need_input_grad else (0,)),
        inverse_count.new_empty((pairs, *weight[0].shape) if need_weight_grad and weight else (0,)),
        inverse_count.new_empty((pairs, *bias[0].shape) if need_weight_grad and bias else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, weight, bias = inputs[:4]
    ctx.dtypes = [tensors[0].dtype if tensors else None for tensors in (student, weight, bias)]
    ctx.counts = [len(tensors) for tensors in (student, teacher, weight, bias)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], inputs[5])


def _gradient(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if upstream is None:
        return (*([None] * count for count in ctx.counts), *(None,) * 5)
    *units, inverse_count = ctx.saved_tensors
    factor = 2.0 * inverse_count * upstream
    students, teachers, weights, biases = ctx.counts
    grads: list[list[Tensor | None]] = []
    for unit, dtype, count in zip(units, ctx.dtypes, (students, weights, biases), strict=True):
        if unit.numel() == 0:
            grads.append([None] * count)
        elif count == students:
            grads.append(list(scaled(unit, factor, dtype).unbind()))
        else:
            shared = torch.tensordot(factor, unit, dims=1)  # one tensor serves all pairs
            grads.append([shared.to(dtype)])
    return (grads[0], [None] * teachers, grads[1], grads[2], *(None,) * 5)


_hidden.register_autograd(_gradient, setup_context=_save)
