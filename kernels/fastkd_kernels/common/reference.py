"""Definition of the softmax divergences of a row: independent of the formulas that are tested."""

import math

import torch
from torch import Tensor


def row_divergence(log_p: Tensor, log_t: Tensor, kind: str, teacher_share: float = 0.5) -> Tensor:
    """Divergence `[...]` of student `p` from teacher `t`, from logs `[..., outcomes]`.

    An outcome that a row does not have has -inf in both. `teacher_share` is the teacher's part of
    the mixture: beta of "js", alpha of "skew_kl". Without the teacher in it `js / share` is KL,
    without the student `js / (1 - share)` reverse KL, as in GKD (arXiv 2306.13649).
    """
    p, t = log_p.exp(), log_t.exp()
    # a missing outcome has probability 0, and 0 log 0 is 0
    log_p, log_t = (log.masked_fill(log == -torch.inf, 0.0) for log in (log_p, log_t))
    if kind in ("js", "skew_kl") and teacher_share == 0:
        kind = "kl"
    if kind == "js" and teacher_share == 1:
        kind = "reverse_kl"
    if kind == "kl":
        return (t * (log_t - log_p)).sum(-1)
    if kind == "reverse_kl":
        return (p * (log_p - log_t)).sum(-1)
    if kind == "cross_entropy":
        return -(t * log_p).sum(-1)
    if kind == "mse":
        return (p - t).square().sum(-1)
    if kind == "cosine":
        return 1 - torch.cosine_similarity(p, t, dim=-1)
    log_m = torch.logaddexp(log_t + math.log(teacher_share), log_p + math.log1p(-teacher_share))
    to_teacher = (t * (log_t - log_m)).sum(-1)
    if kind == "skew_kl":
        return to_teacher
    if kind == "js":
        to_student = (p * (log_p - log_m)).sum(-1)
        return teacher_share * to_teacher + (1 - teacher_share) * to_student
    raise ValueError(f"kind={kind!r} has no definition")
