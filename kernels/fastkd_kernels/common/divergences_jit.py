# mypy: ignore-errors
"""Softmax divergences of rows and their gradients, in Triton: once, for attention and logits.

The formulas of `divergences.py`, outcome by outcome, and log-sum-exps of rows whose scores stream
past. Nothing here reads or writes memory. `p` and `t` are the student's and the teacher's
probabilities; where both are close, plain formulas subtract large numbers, and series keep the
digits that they lose.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# below this log-ratio in bits, the difference of a term has fewer digits than its series
NEAR: tl.constexpr = tl.constexpr(0.25)


@triton.jit
def exp_minus_one(x, SMALL: tl.constexpr):
    """`exp(x) - 1` for `x <= 0`: a series within SMALL of 0, where the difference would cancel."""
    term = 1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040)))
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * term)))
    return tl.where(x > -SMALL, series, tl.exp(x) - 1.0)


@triton.jit
def log_one_plus(x, above, SMALL: tl.constexpr):
    """`log(1 + x)` for `-1 < x <= 0`: `2 atanh(x / (2 + x))` as a series within SMALL of 0.

    `above` is `1 + x`, which has its digits where `x` is near -1.
    """
    s = x / (2.0 + x)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9)))))
    return tl.where(x > -SMALL, series, tl.log(above))


@triton.jit
def log_of_half(w):
    """`-log2(1 - w / 2)` for 0 <= w <= 1, to 3e-7 of it: a minimax fit of its quotient by `w`."""
    if w.dtype == tl.float64:
        return -tl.log2(1.0 - 0.5 * w)
    else:
        term = tl.fma(w, 6.677708122879267e-3, -1.2190078385174274e-2)
        term = tl.fma(w, term, 1.7705244943499565e-2)
        term = tl.fma(w, term, 1.714034122414887e-3)
        term = tl.fma(w, term, 2.4548400193452835e-2)
        term = tl.fma(w, term, 5.984707176685333e-2)
        term = tl.fma(w, term, 0.18035006523132324)
        return w * tl.fma(w, term, 0.7213473916053772)


@triton.jit
def divergence_terms(
    log_p,
    log_t,
    shares,
    KIND: tl.constexpr,
    SMALL: tl.constexpr,
    EVEN: tl.constexpr,
    BITS: tl.constexpr,
):
    """What one outcome adds: `value`, `weighted`, `point`, `p`.

    The divergence is the sum of `value`, and `weighted` adds up to the constant of the row that
    `divergence_slopes` takes with the others. All but `point` are 0 where neither has a share.
    Logs are to base 2 with BITS. `shares` are the parts of teacher and student in the mixture of
    "js" and "skew_kl" (one minus the other would not have its digits in fp32), halves with EVEN.
    SMALL is up to where a series stands in for a difference that cancels, where it is read; with 0,
    which "skew_kl" and an uneven "js" do not take, `t` is subtracted from `p`. "cosine" takes the
    logs of probabilities that are scaled to rows of length 1.
    """
    if KIND == "js" and EVEN:
        return even_js_terms(log_p, log_t, BITS)
    else:
        p, t = power_of(log_p, BITS), power_of(log_t, BITS)
        if BITS and (KIND == "kl" or KIND == "reverse_kl"):
            difference, ratio = p - t, log_p - log_t
            if KIND == "kl":
                return kl_terms(p, t, difference, ratio), difference, difference, p
            else:
                value = kl_terms(t, p, -difference, -ratio)
                return value, value, ratio * LN2, p
        else:
            nats: tl.constexpr = LN2 if BITS else 1.0
            ratio = (log_p - log_t) * nats
            return terms_of(p, t, log_p * nats, ratio, shares, KIND, SMALL)


@triton.jit
def kl_terms(p, t, difference, ratio):
    """`t log(t / p) + p - t`, whose sum is the divergence, for `ratio` `log2(p / t)`.

    Near 0 as `(p - t) x R(x)` with the series of `R(x) = 1/x - 1/(e^x - 1)`: no digits are lost,
    and no term is negative.
    """
    near = difference * ratio * tl.fma(ratio, -LN2 * LN2 / 12, LN2 / 2)
    far = tl.fma(t * -LN2, ratio, difference)
    return tl.where(tl.abs(ratio) < NEAR, near, far)


@triton.jit
def terms_of(p, t, log_p, ratio, shares, KIND: tl.constexpr, SMALL: tl.constexpr):
    """`divergence_terms` of all but the even "js" from what it makes first; `ratio` is
    `log p - log t`."""
    if KIND == "mse" or KIND == "cosine":
        difference = p - t
        squares = difference * difference
        # cosine: 1 - cos = |p - t|^2 / 2
        return (
            squares if KIND == "mse" else 0.5 * squares,
            p * difference if KIND == "mse" else p * t,
            difference if KIND == "mse" else t,
            p,
        )
    else:
        if SMALL == 0 or KIND == "cross_entropy":
            difference = p - t
        else:
            difference = exp_minus_one(-tl.abs(ratio), SMALL) * tl.maximum(p, t)
            difference = tl.where(ratio > 0, -difference, difference)
        if KIND == "reverse_kl":
            value = p * ratio - difference
            if SMALL == 0:
                value = excess(p, -ratio, value)
            return value, value, ratio, p
        elif KIND == "kl":
            value = difference - t * ratio
            if SMALL == 0:
                value = excess(t, ratio, value)
            return value, difference, difference, p
        elif KIND == "cross_entropy":
            return -t * log_p, difference, difference, p
        else:
            return mixture_terms(p, t, ratio, difference, shares, KIND, SMALL)


@triton.jit
def even_js_terms(log_p, log_t, BITS: tl.constexpr):
    """`divergence_terms` of "js" with the even mixture, without a division or a logarithm of the
    library; logs are to base 2 with BITS.

    With `r = log(p / t)` of nats, a value is `(p - t) r / 8` times an even series in `r` near 0,
    and `p - t` has as many digits there as the difference of the logs.
    """
    # nats a unit of the logs has, and such units a bit
    NATS: tl.constexpr = LN2 if BITS else 1.0
    UNITS: tl.constexpr = 1.0 if BITS else LN2
    ratio = log_p - log_t
    smaller = power_of(-tl.abs(ratio), BITS)
    at_most = power_of(tl.maximum(log_p, log_t), BITS)
    at_least = at_most * smaller
    p = tl.where(ratio > 0.0, at_most, at_least)
    t = tl.where(ratio > 0.0, at_least, at_most)
    # log of the larger probability over the mixture
    larger = log_of_half(1.0 - smaller) * UNITS
    over_student = larger + tl.minimum(ratio, 0.0)
    weighted = p * over_student
    # not over_student - ratio, which would be rounded by the ratio
    value = (weighted + t * (larger - tl.maximum(ratio, 0.0))) * (0.5 * NATS)
    if ratio.dtype != tl.float64:
        square = ratio * ratio
        series = tl.fma(square, NATS**5 / 3840, -(NATS**3) / 192)
        near = (p - t) * ratio * tl.fma(square, series, NATS / 8)
        value = tl.where(tl.abs(ratio) < 0.35 / NATS, near, value)
    return value, weighted * NATS, over_student * NATS, p


@triton.jit
def mixture_terms(p, t, ratio, difference, shares, KIND: tl.constexpr, SMALL: tl.constexpr):
    """`divergence_terms` of "js" and "skew_kl" with any mixture."""
    teacher_share, student_share = shares
    student_larger = ratio > 0
    below = exp_minus_one(-tl.abs(ratio), SMALL)
    # the mixture over the larger probability is 1 + mixed; far from 1 it is made of its parts
    weight = tl.where(student_larger, teacher_share, student_share)
    rest_weight = tl.where(student_larger, student_share, teacher_share)
    mixed = weight * below
    far = rest_weight + weight * tl.exp(-tl.abs(ratio))
    larger = -log_one_plus(mixed, far, SMALL)
    over_teacher = larger - tl.maximum(ratio, 0.0)
    if KIND == "js":
        over_student = larger + tl.minimum(ratio, 0.0)
        weighted = p * over_student
        return (
            teacher_share * t * over_teacher + student_share * weighted,
            weighted,
            over_student,
            p,
        )
    else:
        # 1 - t/m
        point = student_share * below / tl.where(mixed > -0.5, 1.0 + mixed, far)
        point = tl.where(student_larger, -point, point)
        return t * over_teacher + student_share * difference, p * point, point, p


@triton.jit
def divergence_slopes(p, point, constant, shares, KIND: tl.constexpr):
    """Gradient of the student's score, from `divergence_terms` and the row's constant."""
    if KIND == "kl" or KIND == "cross_entropy":
        return point
    elif KIND == "reverse_kl":
        return p * (point - constant)
    elif KIND == "mse":
        return 2.0 * p * (point - constant)
    elif KIND == "cosine":
        return p * (constant * p - point)
    else:
        return shares[1] * p * (point - constant)


@triton.jit
def excess(weight, x, direct):
    """`weight (e^x - 1 - x)`, never negative: near 0 a series, where `direct` has no digits."""
    if x.dtype == tl.float64:
        return direct
    else:
        return tl.where(tl.abs(x) < 0.5, weight * exp_excess_series(x), direct)


@triton.jit
def exp_excess_series(x):
    """`x^2/2! + x^3/3! + ... + x^8/8!`, exact in fp32 for |x| < 0.5."""
    term = 1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320))
    return x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * term))))


@triton.jit
def hidden_score(unit):
    """What stands for the score of a hidden key: times `unit` finite, and its exponential 0."""
    size = tl.minimum(2.0**120 / tl.abs(unit), 2.0**126)
    return tl.where(unit > 0.0, -size, size)


@triton.jit
def shift_of(maximum, lowest=float("-inf")):
    """What to subtract before `exp`: the maximum, and 0 where nothing above `lowest` was seen."""
    return tl.where(maximum <= lowest, 0.0, maximum)


@triton.jit
def below(scores, unit, shift):
    """`scores unit - shift`, rounded once."""
    return tl.fma(scores, unit, -shift)


@triton.jit
def power_of(x, BITS: tl.constexpr):
    """`2^x` with BITS, `e^x` without; the first is what the hardware has."""
    if BITS:
        return tl.exp2(x)
    else:
        return tl.exp(x)


@triton.jit
def add_exponentials(scores, unit, hidden, maximum, total, BITS: tl.constexpr):
    """Online log-sum-exp: maximum and sum of each row with one more tile of `scores unit`.

    `hidden` stands in the place of scores that are not seen.
    """
    new = tl.maximum(maximum, tl.max(scores * unit, 1))
    shift = shift_of(new, hidden * unit)
    exponentials = power_of(below(scores, unit, shift[:, None]), BITS)
    return new, total * power_of(maximum - shift, BITS) + tl.sum(exponentials, 1)


@triton.jit
def log_sum(total, BITS: tl.constexpr):
    """Log of a row's sum of exponentials; 0 for a row that saw nothing."""
    total = tl.where(total > 0.0, total, 1.0)
    if BITS:
        return tl.log2(total)
    else:
        return tl.log(total)
