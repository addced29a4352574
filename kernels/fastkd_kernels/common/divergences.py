"""Softmax divergences of rows and their gradients, in PyTorch: once, for attention and logits.

With `p` and `t` the student's and the teacher's probabilities of one row, the gradient of a score
is `dL/da_j = p_j (g_j - sum_k p_k g_k)`, `g = dL/dp`. Where student and teacher are close, a
difference of sums has no digits left, so every value is a sum of terms that are small with it: to
each term of KL `p - t` is added, whose sum over the row is 0. With `r = log p - log t` and
`e = expm1(-|r|)`, that difference is `-sign(r) max(p, t) e`, exact to a rounding of itself. With
`m = share t + (1 - share) p`, the larger probability over `m` is `1 / (1 + w e)`, where `w` is
`teacher_share` if `p` is the larger one and `1 - share` if `t` is.
"""

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor]


def row_divergence(
    student: Tensor, teacher: Tensor, kind: str, *, teacher_share: float = 0.5, exact: bool = True
) -> Rows:
    """Values `[..., rows]` and their gradients for the student's scores `[..., rows, outcomes]`.

    `student` and `teacher` are scores over the temperature; both are overwritten. An outcome that a
    row does not have has the same, very low score in both. `teacher_share` is the teacher's part of
    the mixture of "js" and "skew_kl". "mse" is the sum over outcomes of `(p - t)^2`.

    Without `exact`, KL and cross-entropy subtract `t` from `p`: half the time where rows are in the
    caches, and the digits that scores leave which are products themselves.
    """
    if kind == "mse":
        return _mse(student, teacher)
    if kind == "cosine":
        return _cosine(student, teacher)
    log_p, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    p, t = torch.exp(log_p, out=student), torch.exp(log_t, out=teacher)
    ratio = torch.sub(log_p, log_t, out=log_t)
    if kind == "js":
        return _js(p, t, ratio, teacher_share)
    if kind == "skew_kl":
        return _skew_kl(p, t, ratio, teacher_share)
    if kind == "reverse_kl":
        # sum of p r - (p - t)
        terms = _difference(p, t, ratio, exact, log_p, t).addcmul_(p, ratio, value=-1.0)
        values = terms.sum(-1).neg_()
        # p (r - KL(p | t))
        return values, ratio.sub_(values[..., None]).mul_(p)
    if kind == "cross_entropy":
        values = log_p.mul_(t).sum(-1).neg_()
        return values, _difference(p, t, ratio, exact, log_p, p)
    difference = _difference(p, t, ratio, exact, log_p, p)
    # sum of (p - t) - t r
    return torch.addcmul(difference, t, ratio, value=-1.0, out=t).sum(-1), difference


def _below(ratio: Tensor, out: Tensor | None = None) -> Tensor:
    """`expm1(-|r|)`: the smaller probability over the larger one, minus 1."""
    return torch.abs(ratio, out=out).neg_().expm1_()


def _difference(
    p: Tensor, t: Tensor, ratio: Tensor, exact: bool, out: Tensor, spare: Tensor
) -> Tensor:
    """`p - t` in `out`; `spare` may be overwritten, and be `p` or `t`."""
    if not exact:
        return torch.sub(p, t, out=out)
    return _below(ratio, out).mul_(torch.maximum(p, t, out=spare)).copysign_(ratio)


def _over_mixture(ratio: Tensor, below: Tensor, teacher_share: float) -> tuple[Tensor, Tensor]:
    """Log of the larger probability over the mixture, and the mixture over that probability."""
    parts = ratio.new_tensor([teacher_share, 1.0 - teacher_share])
    weight, rest_weight = (
        torch.where(ratio > 0, parts[index], parts[1 - index]) for index in range(2)
    )
    # 1 + mixed; far from 1 that is small, and made of its parts
    far = rest_weight.addcmul_(weight, ratio.abs().neg_().exp_())
    mixed = weight.mul_(below)
    is_near = mixed > -0.5
    larger = torch.where(is_near, mixed.log1p(), far.log()).neg_()
    return larger, torch.where(is_near, mixed.add_(1.0), far)


def _js(p: Tensor, t: Tensor, ratio: Tensor, teacher_share: float) -> Rows:
    if teacher_share == 0.5:
        # the larger probability over the even mixture is 1 + tanh(|r| / 2)
        larger = ratio.abs().mul_(0.5).tanh_().log1p_()
    else:
        larger, _ = _over_mixture(ratio, _below(ratio), teacher_share)
    # each from `larger` itself: log p/m - r would be rounded by r, which may be hundreds
    over_teacher = larger - ratio.clamp(min=0.0)
    over_student = larger.add_(ratio.clamp_(max=0.0))
    weighted = torch.mul(p, over_student, out=ratio)
    mean = weighted.sum(-1, keepdim=True)
    values = (
        weighted.mul_(1.0 - teacher_share).addcmul_(t, over_teacher, value=teacher_share).sum(-1)
    )
    # (1 - share) p (log p/m - KL(p | m))
    return values, over_student.sub_(mean).mul_(p).mul_(1.0 - teacher_share)


def _skew_kl(p: Tensor, t: Tensor, ratio: Tensor, teacher_share: float) -> Rows:
    below = _below(ratio)
    larger, rest = _over_mixture(ratio, below, teacher_share)
    # log t/m
    over_teacher = larger.sub_(ratio.clamp(min=0.0))
    # 1 - t/m
    point = rest.reciprocal_().mul_(below).mul_(1.0 - teacher_share).copysign_(ratio)
    difference = below.mul_(torch.maximum(p, t)).copysign_(ratio)
    values = difference.mul_(1.0 - teacher_share).addcmul_(t, over_teacher).sum(-1)
    mean = torch.mul(p, point, out=t).sum(-1, keepdim=True)
    # (1 - share) p (sum of p t/m - t/m)
    return values, point.sub_(mean).mul_(p).mul_(1.0 - teacher_share)


def _mse(student: Tensor, teacher: Tensor) -> Rows:
    p, t = student.softmax(-1), teacher.softmax(-1)
    difference = torch.sub(p, t, out=student)
    values = torch.mul(difference, difference, out=t).sum(-1)
    gradient = difference.mul_(p)
    mean = torch.sum(gradient, -1, keepdim=True)
    # 2 p (p - t - sum of p (p - t))
    return values, gradient.addcmul_(p, mean, value=-1).mul_(2.0)


def _cosine(student: Tensor, teacher: Tensor) -> Rows:
    # the softmax's own divisor drops out of p / |p|
    p, t = (
        torch.nn.functional.normalize(side.softmax(-1), dim=-1, eps=0.0)
        for side in (student, teacher)
    )
    direct = torch.mul(p, t, out=student).sum(-1)
    difference = torch.sub(p, t, out=student)
    # 1 - cos = |p / |p| - t / |t||^2 / 2
    values = difference.mul_(difference).sum(-1).mul_(0.5)
    # of both sums, the one that has the digits
    cosine = torch.where(values < 0.5, 1 - values, direct)
    return values, torch.mul(p, cosine[..., None], out=student).sub_(t).mul_(p)
