"""Definition of the divergence between the logits of two models."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..common.reference import row_divergence
from ..types import LogitsDivergenceKind, LogitsHead


def logits_divergence(
    student: LogitsHead | Tensor,
    teacher: LogitsHead | Tensor,
    *,
    kind: LogitsDivergenceKind = "kl",
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
    student_logits, teacher_logits = logits_of(student), logits_of(teacher)
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student_shared, teacher_shared = (
        student_logits[..., :shared] / temperature,
        teacher_logits[..., :shared] / temperature,
    )
    if kind == "mse":
        value = (student_shared - teacher_shared).square().mean(-1)
    else:
        log_p, log_t = student_shared.log_softmax(-1), teacher_shared.log_softmax(-1)
        value = row_divergence(log_p, log_t, kind, skew if kind == "skew_kl" else beta)
    if scale_by_temperature:
        value = value * temperature**2
    valid = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
    divergence = _mean(value, valid)
    if labels is None:
        return divergence
    hard = cross_entropy(
        student_logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100
    )
    return divergence, _mean(hard.view(labels.shape), valid & (labels != -100))


def logits_of(side: LogitsHead | Tensor) -> Tensor:
    """`scale * (hidden @ weight^T + bias)`, soft-capped if need be, or the logits themselves."""
    if isinstance(side, Tensor):
        return side
    logits = side.hidden @ side.weight.mT
    if side.bias is not None:
        logits = logits + side.bias
    if side.scale != 1.0:
        logits = side.scale * logits
    return logits if side.softcap is None else side.softcap * torch.tanh(logits / side.softcap)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of valid rows in at least fp32; 0 where there is none."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.masked_fill(~valid, 0.0).sum(dtype=dtype) / valid.sum().clamp(min=1)
