"""Divergences of two softmax rows from their scores, and the slopes, in plain PyTorch.

With `p` and `t` the student's and the teacher's probabilities of one row, every slope is
`dL/da_j = p_j (g_j - sum_k p_k g_k)` with `g = dL/dp`. Where student and teacher are close, values
are sums of differences, never differences of sums.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor]


def row_divergence(scores: Tensor, target: Tensor, kind: str) -> Rows:
    """Values `[..., rows]` and `dL/dscores` `[..., rows, keys]`.

    Both score tensors are overwritten. A hidden key has the same, very low score in both.
    """
    return _FORMULAS[kind](scores, target)


def cap_scores(scores: Tensor, softcap: float, *, need_slope: bool) -> Tensor | None:
    """`softcap * tanh(scores / softcap)` in place of the scores; its derivative if needed."""
    scores.div_(softcap)
    # 1 / cosh^2, because 1 - tanh^2 has no digits left where the cap is reached
    slope = scores.cosh().square_().reciprocal_() if need_slope else None
    scores.tanh_().mul_(softcap)
    return slope


def _logs(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`p`, `t` in place of the scores, and `x = log p - log t`."""
    log_p, log_t = scores.log_softmax(-1), target.log_softmax(-1)
    torch.exp(log_p, out=scores)
    torch.exp(log_t, out=target)
    return scores, target, log_p.sub_(log_t)


def _kl(scores: Tensor, target: Tensor) -> Rows:
    p, t, x = _logs(scores, target)
    slope = p.sub_(t)
    # sum t (log t - log p) + sum (p - t): the second is 0 but for the roundings of the first
    return slope.sum(-1) - x.mul_(t).sum(-1), slope


def _reverse_kl(scores: Tensor, target: Tensor) -> Rows:
    p, t, x = _logs(scores, target)
    excess = t.sub_(p).sum(-1)
    slope = x.mul_(p)
    mean = slope.sum(-1)
    # sum p (log p - log t) + sum (t - p), as in `_kl`
    return mean + excess, slope.addcmul_(p, mean[..., None], value=-1)


def _js(scores: Tensor, target: Tensor) -> Rows:
    p, t, x = _logs(scores, target)
    # log of the larger probability over the mixture, 1 + tanh(|x| / 2)
    larger = x.abs().mul_(0.5).tanh_().log1p_()
    # each from `larger` itself: log p/m - x would be rounded by x, which may be hundreds
    to_teacher = torch.mul(larger - x.clamp(min=0), t, out=t).sum(-1)
    slope = larger.add_(x.clamp_(max=0)).mul_(p)
    mean = slope.sum(-1)
    value = (mean + to_teacher) / 2
    return value, slope.addcmul_(p, mean[..., None], value=-1).mul_(0.5)


def _mse(scores: Tensor, target: Tensor) -> Rows:
    p, t = scores.softmax(-1), target.softmax(-1)
    difference = torch.sub(p, t, out=scores)
    value = torch.mul(difference, difference, out=t).sum(-1)
    slope = difference.mul_(p)
    mean = torch.sum(slope, -1, keepdim=True)
    return value, slope.addcmul_(p, mean, value=-1).mul_(2.0)


def _cross_entropy(scores: Tensor, target: Tensor) -> Rows:
    log_p, t = scores.log_softmax(-1), target.softmax(-1)
    slope = torch.exp(log_p, out=scores).sub_(t)
    return -log_p.mul_(t).sum(-1), slope


def _cosine(scores: Tensor, target: Tensor) -> Rows:
    # the softmax's own divisor drops out of p / |p|
    p, t = (
        torch.nn.functional.normalize(side.softmax(-1), dim=-1, eps=0.0)
        for side in (scores, target)
    )
    direct = torch.mul(p, t, out=scores).sum(-1)
    difference = torch.sub(p, t, out=scores)
    # 1 - cos = |p / |p| - t / |t||^2 / 2
    value = difference.mul_(difference).sum(-1).mul_(0.5)
    # of both sums, the one that has the digits
    cosine = torch.where(value < 0.5, 1 - value, direct)
    return value, torch.mul(p, cosine[..., None], out=scores).sub_(t).mul_(p)


_FORMULAS: dict[str, Callable[[Tensor, Tensor], Rows]] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "mse": _mse,
    "cross_entropy": _cross_entropy,
    "cosine": _cosine,
}
