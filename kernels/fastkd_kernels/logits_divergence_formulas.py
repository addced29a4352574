# mypy: ignore-errors
"""The formulas of `logits_rows.py` as Triton functions: nothing here reads or writes memory."""

import triton
import triton.language as tl


@triton.jit
def exp_minus_one(x, SMALL: tl.constexpr):
    """`exp(x) - 1` for `x <= 0`: a series within SMALL of 0, where the difference would cancel."""
    series = x * (
        1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7)))))
    )
    return tl.where(x > -SMALL, series, tl.exp(x) - 1.0)


@triton.jit
def log_one_plus(x, above, SMALL: tl.constexpr):
    """`log(1 + x)` for `-1 < x <= 0`: `2 atanh(x / (2 + x))` as a series within SMALL of 0.

    `above` is `1 + x`, which has its digits where `x` is near -1.
    """
    s = x / (2.0 + x)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q / 9))))
    return tl.where(x > -SMALL, series, tl.log(above))


@triton.jit
def divergence_terms(log_p, log_t, shares, KIND: tl.constexpr, SMALL: tl.constexpr):
    """What one column adds: `value`, `weighted`, `point`, `p`.

    The divergence is the sum of `value`. With `mean` the sum of `weighted`, the gradient of the
    logits is `p (point - mean)` for "reverse_kl", that times `1 - share` for "js" and "skew_kl",
    and `point` for "kl" and "soft_ce". `shares` are the parts of teacher and student in the
    mixture: one minus the other would not have its digits in fp32.
    """
    share, own_share = shares
    ratio = log_p - log_t
    below = exp_minus_one(-tl.abs(ratio), SMALL)
    student_larger = ratio > 0
    # p - t
    difference = tl.exp(tl.maximum(log_p, log_t)) * below
    difference = tl.where(student_larger, -difference, difference)
    p = tl.exp(log_p)
    if KIND == "reverse_kl":
        value = p * ratio - difference
        return value, value, ratio, p
    t = tl.exp(log_t)
    if KIND == "kl":
        return difference - t * ratio, difference, difference, p
    if KIND == "soft_ce":
        return -t * log_p, difference, difference, p
    # the mixture over the larger probability is 1 + mixed; far from 1 it is made of its parts
    weight = tl.where(student_larger, share, own_share)
    other = tl.where(student_larger, own_share, share)
    mixed = weight * below
    far = other + weight * tl.exp(-tl.abs(ratio))
    larger = -log_one_plus(mixed, far, SMALL)
    over_teacher = larger - tl.maximum(ratio, 0.0)
    if KIND == "js":
        over_student = larger + tl.minimum(ratio, 0.0)
        weighted = p * over_student
        value = share * t * over_teacher + own_share * weighted
        return value, weighted, over_student, p
    # 1 - t/m
    point = own_share * below / tl.where(mixed > -0.5, 1.0 + mixed, far)
    point = tl.where(student_larger, -point, point)
    return t * over_teacher + own_share * difference, p * point, point, p
