"""Divergence of logits in plain PyTorch, chunked over tokens: what CPU tensors run.

Both sides' logits exist for one chunk of tokens at a time, over the whole vocabulary, so that one
product a side serves loss and gradients. Padded tokens are left out by indexing. The road not
taken: chunks of the vocabulary, which know no softmax until they have seen all of it and so make
every logit twice.

With `r = log p - log t` (student over teacher) and `e = expm1(-|r|)`, the difference `p - t` is
`-sign(r) max(p, t) e`, exact to a rounding of itself however close the models are. The values add
terms whose sum is 0 (`p - t`), so that every summand is of second order in the distance. With
`m = share t + (1 - share) p`, the larger probability over `m` is `1 / (1 + w e)`, where `w` is
`share` if `p` is the larger one and `1 - share` if `t` is.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 23

# the logits of one chunk may also take this part of the gradient of the student's weight
CHUNK_PART = 8


class Divergence(NamedTuple):
    """What is computed of each row.

    `share` is the teacher's part of the mixture; `scale` multiplies the value, not the
    cross-entropy; `shared` columns are compared.
    """

    kind: str
    temperature: float
    share: float
    scale: float
    shared: int


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
    columns = read_columns(student, labels, how)
    # a row or column that no chunk reaches has a gradient of 0
    made = Gradients(
        factors.new_zeros(states.shape if need_states else (0,)),
        factors.new_zeros(student[1].shape if need_weight and student[1:] else (0,)),
        factors.new_zeros(student[2].shape if need_weight and student[2:] else (0,)),
    )
    own, target = _cast(student, columns, dtype), _cast(teacher, how.shared, dtype)
    sums = torch.zeros_like(factors)
    for rows in _chunks(student, mask, columns * dtype.itemsize):
        place = (rows // tokens, rows % tokens)
        values, gradient = _chunk(own, target, place, labels, factors, how)
        sums += values
        if need_states and not student[1:]:
            made.states[..., :columns].index_put_(place, gradient)
        elif need_states:
            made.states.index_put_(place, gradient @ own[1])
        if made.weight.numel():
            made.weight[:columns].addmm_(gradient.mT, states[place].to(dtype))
        if made.bias.numel():
            made.bias[:columns] += gradient.sum(0)
        # before the next chunk makes its own
        del gradient
    return sums, made


def read_columns(student: Sequence[Tensor], labels: Tensor | None, how: Divergence) -> int:
    """Columns of the student's vocabulary that are read: labels need all of them."""
    if labels is None:
        return how.shared
    return student[1].shape[0] if student[1:] else student[0].shape[-1]


def _cast(side: Sequence[Tensor], columns: int, dtype: torch.dtype) -> list[Tensor]:
    """`side` cut to its first columns, weight and bias in `dtype`."""
    if len(side) == 1:
        return [side[0][..., :columns]]
    return [side[0], *(tensor[:columns].to(dtype) for tensor in side[1:])]


def _logits(side: list[Tensor], place: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Logits `[rows, columns]` at `place`, in memory of their own."""
    rows = side[0][place].to(dtype)
    if len(side) == 1:
        return rows
    return torch.addmm(side[2], rows, side[1].mT) if side[2:] else rows @ side[1].mT


def _chunk(
    student: list[Tensor],
    teacher: list[Tensor],
    place: tuple[Tensor, Tensor],
    labels: Tensor | None,
    factors: Tensor,
    how: Divergence,
) -> tuple[Tensor, Tensor]:
    """Sums of one chunk, and the gradient of the student's logits."""
    dtype, factor = factors.dtype, factors[0] * (how.scale / how.temperature)
    if labels is None:
        values, gradient = divergence_rows(
            _logits(student, place, dtype).div_(how.temperature),
            _logits(teacher, place, dtype).div_(how.temperature),
            how.kind,
            how.share,
        )
        return (values.sum() * how.scale)[None], gradient.mul_(factor)
    logits = _logits(student, place, dtype)
    values, gradient = divergence_rows(
        logits[:, : how.shared] / how.temperature,
        _logits(teacher, place, dtype).div_(how.temperature),
        how.kind,
        how.share,
    )
    hard, total = _cross_entropy(logits, labels[place], factors[1])
    total[:, : how.shared] += gradient.mul_(factor)
    return torch.stack([values.sum() * how.scale, hard]), total


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


def _chunks(student: Sequence[Tensor], mask: Tensor | None, row_bytes: int) -> Iterator[Tensor]:
    """Numbers of the valid rows, in chunks whose logits take about `CHUNK_BYTES` a side."""
    rows = torch.arange(student[0][..., 0].numel(), device=student[0].device)
    if mask is not None:
        rows = rows[mask.flatten()]
    size = max(1, CHUNK_BYTES // row_bytes)
    if student[1:]:
        size = max(size, student[0].shape[-1] // CHUNK_PART)
    yield from torch.split(rows, size)


def divergence_rows(own: Tensor, target: Tensor, kind: str, share: float) -> tuple[Tensor, Tensor]:
    """Values `[rows]` and the gradient of `own` `[rows, vocab]`, logits over the temperature.

    `share` is the teacher's part of the mixture: beta of "js", alpha of "skew_kl". `own` and
    `target` may be overwritten.
    """
    if kind == "mse":
        own -= target
        vocabulary = own.shape[-1]
        values = torch.linalg.vector_norm(own, dim=-1).square() / vocabulary
        return values, own.mul_(2.0 / vocabulary)
    log_p, log_t = own.log_softmax(-1), target.log_softmax(-1)
    # the caller keeps neither
    del own, target
    ratio = log_p - log_t
    below = ratio.abs().neg_().expm1_()
    if kind in ("js", "skew_kl"):
        return _mixed(log_p, log_t, ratio, below, kind, share)
    difference = _difference(below, log_p, log_t, ratio)
    if kind == "reverse_kl":
        p = log_p.exp_()
        values = torch.addcmul(difference, p, ratio, value=-1.0).sum(-1).neg_()
        # p (log p - log t - KL(p | t))
        return values, ratio.sub_(values[:, None]).mul_(p)
    t = log_t.exp_()
    if kind == "kl":
        values = torch.addcmul(difference, t, ratio, value=-1.0).sum(-1)
    else:
        values = t.mul_(log_p).sum(-1).neg_()
    # p - t
    return values, difference


def _difference(below: Tensor, log_p: Tensor, log_t: Tensor, ratio: Tensor) -> Tensor:
    """`p - t`, in the place of `below`."""
    return below.mul_(torch.maximum(log_p, log_t).exp_()).copysign_(ratio)


def _mixed(
    log_p: Tensor, log_t: Tensor, ratio: Tensor, below: Tensor, kind: str, share: float
) -> tuple[Tensor, Tensor]:
    """The divergences from the mixture `m = share t + (1 - share) p`."""
    parts = ratio.new_tensor([share, 1.0 - share])
    weight, other = (torch.where(ratio > 0, parts[index], parts[1 - index]) for index in range(2))
    # m over the larger probability is 1 + mixed; far from 1 that is small, and made of its parts
    far = other.addcmul_(weight, ratio.abs().neg_().exp_())
    mixed = weight.mul_(below)
    is_near = mixed > -0.5
    larger = torch.where(is_near, mixed.log1p(), far.log()).neg_()
    # log t/m
    over_teacher = larger - ratio.clamp(min=0.0)
    if kind == "skew_kl":
        # 1 - t/m
        rest = torch.where(is_near, mixed.add_(1.0), far)
        point = rest.reciprocal_().mul_(below).mul_(1.0 - share).copysign_(ratio)
        difference = _difference(below, log_p, log_t, ratio)
        values = difference.mul_(1.0 - share).addcmul_(log_t.exp_(), over_teacher).sum(-1)
        p = log_p.exp_()
        mean = (p * point).sum(-1, keepdim=True)
        # (1 - share) p (sum of p t/m - t/m)
        return values, point.sub_(mean).mul_(p).mul_(1.0 - share)
    # log p/m
    over_student = larger.add_(ratio.clamp_(max=0.0))
    p = log_p.exp_()
    weighted = p * over_student
    mean = weighted.sum(-1, keepdim=True)
    values = weighted.mul_(1.0 - share).addcmul_(log_t.exp_(), over_teacher, value=share).sum(-1)
    # (1 - share) p (log p/m - KL(p | m))
    return values, over_student.sub_(mean).mul_(p).mul_(1.0 - share)
