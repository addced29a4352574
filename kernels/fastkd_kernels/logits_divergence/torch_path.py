"""Divergence of logits in plain PyTorch, chunked over tokens: what CPU tensors run.

Both sides' logits exist for one chunk of tokens at a time, over the whole vocabulary, so that one
product a side serves loss and gradients. Padded tokens are left out by indexing. The road not
taken: chunks of the vocabulary, which know no softmax until they have seen all of it and so make
every logit twice.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.divergences import Rows, row_divergence
from ..common.soft_cap import cap_scores

CHUNK_BYTES = 1 << 23

# the logits of one chunk may also take this part of the gradient of the student's weight
CHUNK_PART = 8


class Finish(NamedTuple):
    """What a model makes of its last layer's output z: `softcap * tanh(scale * z / softcap)`, or
    `scale * z` where the cap is infinite."""

    scale: float = 1.0
    softcap: float = math.inf

    @property
    def capped(self) -> bool:
        return self.softcap != math.inf


class Divergence(NamedTuple):
    """What is computed of each row.

    `teacher_share` is the teacher's part of the mixture; `scale` multiplies the value, not the
    cross-entropy; `shared` columns are compared.
    """

    kind: str
    temperature: float
    teacher_share: float
    scale: float
    shared: int
    student: Finish = Finish()
    teacher: Finish = Finish()


class Gradients(NamedTuple):
    """Gradients of the student's hidden states (or logits), weight and bias; empty if not made."""

    states: Tensor
    weight: Tensor
    bias: Tensor


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

    A side is `[logits]`, `[hidden, weight]` or `[hidden, weight, bias]`, with three dimensions of
    logits or hidden states. Sums and `factors`: the divergence and, with `labels`, the
    cross-entropy.
    """
    dtype = factors.dtype
    states, tokens = student[0], student[0].shape[1]
    columns = read_columns(student, labels is not None, how)
    # a row or column that no chunk reaches has a gradient of 0
    made = Gradients(
        factors.new_zeros(states.shape if need_states else (0,)),
        factors.new_zeros(student[1].shape if need_weight and student[1:] else (0,)),
        factors.new_zeros(student[2].shape if need_weight and student[2:] else (0,)),
    )
    student_side, teacher_side = _cast(student, columns, dtype), _cast(teacher, how.shared, dtype)
    sums = torch.zeros_like(factors)
    for rows in _chunks(student, mask, columns * dtype.itemsize):
        at = (rows // tokens, rows % tokens)
        values, gradient = _chunk(student_side, teacher_side, at, labels, factors, how)
        sums += values
        if need_states and not student[1:]:
            made.states[..., :columns].index_put_(at, gradient)
        elif need_states:
            made.states.index_put_(at, gradient @ student_side[1])
        if made.weight.numel():
            made.weight[:columns].addmm_(gradient.mT, states[at].to(dtype))
        if made.bias.numel():
            made.bias[:columns] += gradient.sum(0)
        # before the next chunk makes its own
        del gradient
    return sums, made


def read_columns(student: Sequence[Tensor], labelled: bool, how: Divergence) -> int:
    """Columns of the student's vocabulary that are read: labels need all of them."""
    if not labelled:
        return how.shared
    return student[1].shape[0] if student[1:] else student[0].shape[-1]


def _cast(side: Sequence[Tensor], columns: int, dtype: torch.dtype) -> list[Tensor]:
    """`side` cut to its first columns, weight and bias in `dtype`."""
    if len(side) == 1:
        return [side[0][..., :columns]]
    return [side[0], *(tensor[:columns].to(dtype) for tensor in side[1:])]


def _logits(
    side: list[Tensor],
    at: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    finish: Finish,
    *,
    slope: bool,
) -> tuple[Tensor, Tensor | float]:
    """Logits `[rows, columns]` at `at`, in memory of their own, and with `slope` what they grow by
    as the last layer's output does."""
    rows = side[0][at].to(dtype)
    if len(side) == 1:
        return rows, 1.0
    logits = torch.addmm(side[2], rows, side[1].mT) if side[2:] else rows @ side[1].mT
    if finish.scale != 1.0:
        logits *= finish.scale
    slopes = cap_scores(logits, finish.softcap, need_slope=slope) if finish.capped else None
    return logits, finish.scale if slopes is None else slopes.mul_(finish.scale)


def _chunk(
    student: list[Tensor],
    teacher: list[Tensor],
    at: tuple[Tensor, Tensor],
    labels: Tensor | None,
    factors: Tensor,
    how: Divergence,
) -> tuple[Tensor, Tensor]:
    """Sums of one chunk, and the gradient of what the student's last layer gives."""
    dtype, factor = factors.dtype, factors[0] * (how.scale / how.temperature)
    logits, slope = _logits(student, at, dtype, how.student, slope=True)
    target, _ = _logits(teacher, at, dtype, how.teacher, slope=False)
    warm = logits[:, : how.shared]
    # labels are predicted from the logits as they are
    warm = warm.div_(how.temperature) if labels is None else warm / how.temperature
    values, gradient = _row_divergence(
        _bounded(warm, how.temperature),
        _bounded(target.div_(how.temperature), how.temperature),
        how.kind,
        how.teacher_share,
    )
    sums, gradient = (values.sum() * how.scale)[None], gradient.mul_(factor)
    if labels is not None:
        hard, total = _cross_entropy(logits, labels[at], factors[1])
        total[:, : how.shared] += gradient
        sums, gradient = torch.cat([sums, hard[None]]), total
    return sums, gradient if isinstance(slope, float) and slope == 1.0 else gradient.mul_(slope)


def _bounded(scores: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, with the dtype's lowest number where they overflow below.

    That is how words are masked, in both sides alike, and `inf - inf` is no number.
    """
    return scores if temperature >= 1.0 else scores.clamp_(min=torch.finfo(scores.dtype).min)


def _cross_entropy(logits: Tensor, labels: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies and its gradient times `factor`; a label outside gives NaN."""
    counted = labels != -100
    inside = (labels >= 0) & (labels < logits.shape[-1])
    picked = torch.where(inside, labels, 0)[:, None]
    log_p = logits.log_softmax(-1)
    values = torch.where(inside, -log_p.gather(1, picked)[:, 0], torch.nan)
    gradient = log_p.exp_()
    gradient.scatter_add_(1, picked, torch.full_like(gradient[:, :1], -1.0))
    factors = torch.where(counted, torch.where(inside, factor, torch.nan), 0.0)
    return values.masked_fill(~counted, 0.0).sum(), gradient.mul_(factors[:, None])


def _row_divergence(student: Tensor, teacher: Tensor, kind: str, teacher_share: float) -> Rows:
    """`row_divergence` of logits over the temperature; "mse" is of these, a mean over columns."""
    if kind != "mse":
        return row_divergence(student, teacher, kind, teacher_share=teacher_share)
    student -= teacher
    values = torch.linalg.vector_norm(student, dim=-1).square() / student.shape[-1]
    return values, student.mul_(2.0 / student.shape[-1])


def _chunks(student: Sequence[Tensor], mask: Tensor | None, row_bytes: int) -> Iterator[Tensor]:
    """Numbers of the valid rows, in chunks whose logits take about `CHUNK_BYTES` a side."""
    rows = torch.arange(student[0][..., 0].numel(), device=student[0].device)
    if mask is not None:
        rows = rows[mask.flatten()]
    size = max(1, CHUNK_BYTES // row_bytes)
    if student[1:]:
        size = max(size, student[0].shape[-1] // CHUNK_PART)
    yield from torch.split(rows, size)
