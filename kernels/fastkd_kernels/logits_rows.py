"""Divergence of rows of logits and its gradient, in plain PyTorch, without large cancellations.

With `r = log p - log t` (student over teacher) and `e = expm1(-|r|)`, the difference `p - t` is
`-sign(r) max(p, t) e`, exact to a rounding of itself however close the models are. The values add
terms whose sum is 0 (`p - t`), so that every summand is of second order in the distance. With
`m = share t + (1 - share) p`, the larger probability over `m` is `1 / (1 + w e)`, where `w` is
`share` if `p` is the larger one and `1 - share` if `t` is.
"""

import torch
from torch import Tensor


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
