"""Checks of what a caller hands to the ops on logits."""

from typing import get_args

import torch
from torch import Tensor

from .checks import check_choice, check_device, check_frozen, check_temperature, check_tensor
from .types import LogitsHead, LogitsKind

# of a mixture: the logarithm of the rest keeps four digits in fp32
LEAST_SHARE = 1e-4


def check_options(kind: str, temperature: float, beta: float, skew: float) -> None:
    check_choice("kind", kind, get_args(LogitsKind))
    check_temperature(temperature)
    if kind == "mse" and temperature != 1.0:
        raise ValueError(
            f"kind='mse' compares raw logits, got temperature={temperature}; leave it at 1 and "
            "weight the loss instead"
        )
    _check_share("beta", beta, (0.0, 1.0))
    # all of the mixture the teacher's would leave nothing to learn
    _check_share("skew", skew, (0.0,))


def _check_share(name: str, share: float, ends: tuple[float, ...]) -> None:
    """The teacher's part of a mixture: one of `ends`, or far enough from both."""
    if not isinstance(share, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(share).__name__}")
    if share not in ends and not LEAST_SHARE <= share <= 1.0 - LEAST_SHARE:
        allowed = " or ".join(f"{end:g}" for end in ends)
        raise ValueError(
            f"{name} is {share}; expected {allowed}, or a part of the mixture from {LEAST_SHARE:g} "
            f"to {1.0 - LEAST_SHARE:g}, whose rest fp32 does not lose"
        )


def mixed_kind(kind: str, beta: float, skew: float) -> str:
    """`kind`, or the divergence that it becomes where one model has no part in the mixture."""
    if kind == "js" and beta in (0.0, 1.0):
        return "reverse_kl" if beta else "kl"
    return "kl" if kind == "skew_kl" and skew == 0.0 else kind


def check_logits(
    student: LogitsHead | Tensor,
    teacher: LogitsHead | Tensor,
    kind: str,
    mask: Tensor | None,
    labels: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Everything fits; returns `[logits]`, `[hidden, weight]` or `[hidden, weight, bias]` a side.

    Logits and hidden states get three dimensions.
    """
    own, target = _side("student", student), _side("teacher", teacher)
    device, lead = own[0].device, own[0].shape[:-1]
    for side, tensors in (("student", own), ("teacher", target)):
        for name, tensor in _named(side, tensors):
            check_device(name, tensor, device)
            if side == "teacher":
                check_frozen(name, tensor)
    if target[0].shape[:-1] != lead:
        raise ValueError(
            f"teacher has leading dimensions {tuple(target[0].shape[:-1])}; expected those of the "
            f"student, {tuple(lead)}; run both models on the same batch"
        )
    _check_rows("mask", mask, torch.bool, "a bool tensor, True at valid rows", lead, device)
    _check_rows(
        "labels", labels, torch.int64, "an int64 tensor of token or class ids", lead, device
    )
    shared = min(side[1].shape[0] if side[1:] else side[0].shape[-1] for side in (own, target))
    if shared == 1 and kind != "mse":
        raise ValueError(
            f"kind={kind!r} needs at least two shared columns, got 1, whose softmax is always 1; "
            "use kind='mse' for regression"
        )
    own[0], target[0] = (t if t.ndim == 3 else t[None] for t in (own[0], target[0]))
    return own, target


def _named(side: str, tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors of a side under the names that messages use."""
    if len(tensors) == 1:
        return [(side, tensors[0])]
    names = [f"{side}.{field}" for field in LogitsHead._fields]
    return list(zip(names, tensors, strict=False))


def _side(name: str, side: object) -> list[Tensor]:
    if isinstance(side, Tensor):
        _check_states(name, side, "vocab")
        return [side]
    if not isinstance(side, LogitsHead):
        raise TypeError(
            f"{name} must be a LogitsHead(hidden, weight, bias) or a tensor of logits, "
            f"got {type(side).__name__}"
        )
    _check_states(f"{name}.hidden", side.hidden, "width")
    check_tensor(f"{name}.weight", side.weight, "vocab, width")
    if side.weight.shape[1] != side.hidden.shape[-1]:
        raise ValueError(
            f"{name}.weight has shape {tuple(side.weight.shape)} and {name}.hidden is "
            f"{side.hidden.shape[-1]} wide; expected [vocab, {side.hidden.shape[-1]}]"
        )
    if side.bias is None:
        return [side.hidden, side.weight]
    check_tensor(f"{name}.bias", side.bias, "vocab")
    if side.bias.shape[0] != side.weight.shape[0]:
        raise ValueError(
            f"{name}.bias has {side.bias.shape[0]} entries and {name}.weight "
            f"{side.weight.shape[0]} rows; give one entry for each row"
        )
    return [side.hidden, side.weight, side.bias]


def _check_states(name: str, value: object, last: str) -> None:
    """Floats `[rows, last]` or `[batch, tokens, last]`."""
    if isinstance(value, Tensor) and value.ndim == 2:
        check_tensor(name, value, f"rows, {last}")
    else:
        check_tensor(name, value, f"batch, tokens, {last}")


def _check_rows(
    name: str,
    value: object,
    dtype: torch.dtype,
    expected: str,
    lead: torch.Size,
    device: torch.device,
) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != dtype:
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is {given}; expected {expected}, so convert it first")
    if value.shape != lead:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected one entry a row, {tuple(lead)}"
        )
    check_device(name, value, device)
