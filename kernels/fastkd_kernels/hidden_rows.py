"""The registered op of hidden states and what its public functions share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import hidden_torch as on_torch
from .types import NAMESPACE
from .unit_gradient import by_shape, inverse, scaled, value_of


def row_losses(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    mask: Tensor | None,
    backend: str,
) -> Tensor:
    """Losses `[pairs]` of checked arguments."""
    batch, tokens, _ = student[0].shape
    device = student[0].device

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
            backend,
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
        from .hidden_triton import hidden_forward as forward
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
