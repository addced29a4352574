"""Definitions of the ops on hidden states and embeddings."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..types import Reduction, Tokens


def hidden_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    tokens: Tokens = "all",
    reduction: Reduction = "valid",
) -> Tensor:
    """Mean squared error of projected hidden states (arXiv 1909.10351, eq. 8), one value a pair."""
    if reduction == "tinybert":
        mask = None
    losses = []
    for projected, teacher_state, valid in _pairs(student, teacher, weight, bias, mask, tokens):
        losses.append(_mean(projected - teacher_state, valid, teacher_state.shape[-1]))
    return torch.stack(losses)


def hidden_normalized_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    tokens: Tokens = "all",
) -> Tensor:
    """Mean over tokens of `|u / |u| - v / |v||^2` (arXiv 1908.09355, eq. 7), one value a pair."""
    losses = []
    for projected, teacher_state, valid in _pairs(student, teacher, weight, bias, mask, tokens):
        losses.append(_mean(_unit(projected) - _unit(teacher_state), valid, 1))
    return torch.stack(losses)


def hidden_cosine(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    tokens: Tokens = "all",
) -> Tensor:
    """Mean over tokens of `1 - cos(u, v)` (arXiv 1910.01108), one value a pair.

    As `1 - cos = |u / |u| - v / |v||^2 / 2`, which keeps its digits where `u` is near `v`.
    """
    squares = hidden_normalized_mse(
        student, teacher, weight=weight, bias=bias, mask=mask, tokens=tokens
    )
    return 0.5 * squares


def _pairs(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor] | None,
    mask: Tensor | None,
    tokens: Tokens,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Projected student, teacher and valid tokens of each pair, first tokens alone for "cls"."""
    kept = slice(1) if tokens == "cls" else slice(None)
    for pair, (student_state, teacher_state) in enumerate(zip(student, teacher, strict=True)):
        matrix = weight if weight is None or isinstance(weight, Tensor) else weight[pair]
        offset = bias if bias is None or isinstance(bias, Tensor) else bias[pair]
        projected = student_state[:, kept] if matrix is None else student_state[:, kept] @ matrix.mT
        projected = projected if offset is None else projected + offset
        yield projected, teacher_state[:, kept], None if mask is None else mask[:, kept]


def _mean(difference: Tensor, valid: Tensor | None, entries: int) -> Tensor:
    """Sum of squares of valid rows, each of which counts `entries` times."""
    if valid is None:
        return _mean_square(difference, difference.shape[0] * difference.shape[1] * entries)
    return _mean_square(difference.masked_fill(~valid[..., None], 0.0), valid.sum() * entries)


def _unit(rows: Tensor) -> Tensor:
    """Rows over their norms, as torch's normalize; rows without a direction are 0.

    NaN where squares overflow.
    """
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    norm = norm.masked_fill(norm.isinf(), torch.nan)
    return rows * torch.where(norm <= 1e-12, 0.0, 1.0 / norm.clamp(min=1e-12))


def _mean_square(difference: Tensor, count: Tensor | int) -> Tensor:
    """Sum of squares over `count` in at least fp32; 0 where nothing is counted."""
    dtype = torch.promote_types(difference.dtype, torch.float32)
    divisor = torch.as_tensor(count, device=difference.device).clamp(min=1).to(dtype)
    return difference.square().sum(dtype=dtype) / divisor
