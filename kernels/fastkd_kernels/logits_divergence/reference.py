"""Definition of the divergence between the logits of two models."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..types import LogitsHead, LogitsKind


def logits_divergence(
    student: LogitsHead | Tensor,
    teacher: LogitsHead | Tensor,
    *,
    kind: LogitsKind = "kl",
    temperature: float = 1.0,
    scale_by_temperature: bool = False,
    beta: float = 0.5,
    skew: float = 0.1,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean divergence of the student's logits from the teacher's over valid rows.

    With `labels`, a pair: the divergence, and the cross-entropy of the student's whole vocabulary
    at temperature 1.
    """
    own, target = logits_of(student), logits_of(teacher)
    shared = min(own.shape[-1], target.shape[-1])
    value = row_divergence(
        own[..., :shared] / temperature,
        target[..., :shared] / temperature,
        kind,
        skew if kind == "skew_kl" else beta,
    )
    if scale_by_temperature:
        value = value * temperature**2
    valid = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
    divergence = _mean(value, valid)
    if labels is None:
        return divergence
    hard = cross_entropy(own.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100)
    return divergence, _mean(hard.view(labels.shape), valid & (labels != -100))


def logits_of(side: LogitsHead | Tensor) -> Tensor:
    """`hidden @ weight^T + bias`, or the logits themselves."""
    if isinstance(side, Tensor):
        return side
    logits = side.hidden @ side.weight.mT
    return logits if side.bias is None else logits + side.bias


def row_divergence(own: Tensor, target: Tensor, kind: str, share: float) -> Tensor:
    """Divergence `[...]` of student logits from teacher logits `[..., vocab]`.

    `share` is the teacher's part of the mixture: beta of "js", alpha of "skew_kl". Without the
    teacher in it `js / share` is KL, without the student `js / (1 - share)` reverse KL, as in GKD.
    """
    if kind == "mse":
        return (own - target).square().mean(-1)
    if kind in ("js", "skew_kl") and share == 0:
        kind = "kl"
    if kind == "js" and share == 1:
        kind = "reverse_kl"
    log_p, log_t = own.log_softmax(-1), target.log_softmax(-1)
    p, t = log_p.exp(), log_t.exp()
    if kind == "kl":
        return (t * (log_t - log_p)).sum(-1)
    if kind == "soft_ce":
        return -(t * log_p).sum(-1)
    if kind == "reverse_kl":
        return (p * (log_p - log_t)).sum(-1)
    log_m = torch.logaddexp(log_t + math.log(share), log_p + math.log1p(-share))
    if kind == "skew_kl":
        return (t * (log_t - log_m)).sum(-1)
    if kind == "js":
        to_teacher = (t * (log_t - log_m)).sum(-1)
        return share * to_teacher + (1 - share) * (p * (log_p - log_m)).sum(-1)
    raise ValueError(f"kind={kind!r} has no definition")


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of valid rows in at least fp32; 0 where there is none."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.masked_fill(~valid, 0.0).sum(dtype=dtype) / valid.sum().clamp(min=1)
