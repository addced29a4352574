"""Checks of what the ops on hidden states are given."""

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from .checks import (
    check_choice,
    check_device,
    check_frozen,
    check_mask,
    check_pairs,
    check_tensor,
    resolve_backend,
)
from .types import Tokens
from .unit_gradient import accumulator


class Checked(NamedTuple):
    """Arguments that fit together: the tokens to compare, weight and bias as lists, a back end."""

    student: list[Tensor]
    teacher: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]
    mask: Tensor | None
    backend: str


def check_hidden(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor] | None,
    mask: Tensor | None,
    tokens: str,
    backend: str,
) -> Checked:
    """Everything fits, or an error says what does not."""
    weights, biases = _check_pairs(student, teacher, weight, bias)
    batch, length, _ = student[0].shape
    device = student[0].device
    check_mask("mask", mask, batch, length, device)
    check_choice("tokens", tokens, get_args(Tokens))
    dtype = accumulator(*student, *teacher, *weights, *biases)
    chosen = resolve_backend(backend, device, dtype)
    if tokens == "cls":
        student, teacher = ([state[:, :1] for state in side] for side in (student, teacher))
        mask = None if mask is None else mask[:, :1]
    return Checked(list(student), list(teacher), weights, biases, mask, chosen)


def _check_pairs(
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
