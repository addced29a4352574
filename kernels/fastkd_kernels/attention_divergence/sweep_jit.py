# mypy: ignore-errors
"""What the two sweeps of attention divergences share, and the sums that each kind keeps of a row.

`p` and `t` are exponentials of the student's and the teacher's scores below a shift of their row,
in bits. A first sweep keeps `sums` of these and from them `constants` of the slopes: with those of
the keys so far, a slope is small where student and teacher are close, and so is the sum of slopes
times keys, the first of `gradients`. The others move it to the next constants, by as little as
these change; without, half precision would leave a difference of rounded numbers. What a kind does
not keep stays 0.

| kind | `sums` of | `constants` | slope | weights of the other gradients |
|---|---|---|---|---|
| "kl", "cross_entropy" | p, t | r = sum p / sum t | p - r t | t |
| "reverse_kl" | p, t, p y | c = sum p y / sum p | p (y - c) | p |
| "mse" | p, t, p p, p t | r, c = sum p (p - r t) / sum p | p (p - r t - c) | p t, p |
| "cosine" | p p, t t, p t | g = sum p t / sum p p | p (g p - t) | p p |
| "js" | p, t, then p l, p | c = sum p l / sum p | p (l - c) | p |

with `y` the log of `p / t` in bits, and `l` that of `2 p / (p + t)` of probabilities: "js" sweeps
the keys again, once it has both log-sum-exps. Slopes lack what their row is divided by
(`slope_divisor`).
"""

import triton
import triton.language as tl

from ..common.divergences_jit import LN2, log_sum


@triton.jit
def ratio_of(student, teacher):
    """`student / teacher` of sums, exactly 1 where they are equal; 1 where nothing was seen."""
    return tl.exp2(log_sum(student, True) - log_sum(teacher, True))


@triton.jit
def quotient(total, of):
    """`total / of` of sums, exactly 1 where they are equal."""
    # the hardware's division may miss 1
    return tl.where(total == of, 1.0, total / tl.where(of > 0.0, of, 1.0))


@triton.jit
def row_sums(sums, p, t, product, kept, teacher_kept, drift, KIND: tl.constexpr):
    """`sums` with one more tile, and `constants` of the slopes.

    The sums so far were below other shifts: their `p` are to be multiplied by `kept`, their `t` by
    `teacher_kept`, and `drift` is to be added to their `y`. `product` is `p y`.
    """
    first, second, third, fourth = sums
    if KIND == "cosine":
        first = first * (kept * kept) + tl.sum(p * p, 1)
        second = second * (teacher_kept * teacher_kept) + tl.sum(t * t, 1)
        third = third * (kept * teacher_kept) + tl.sum(p * t, 1)
        return (first, second, third, fourth), (quotient(third, first), fourth)
    else:
        if KIND == "reverse_kl":
            third = (third + first * drift) * kept + tl.sum(product, 1)
        if KIND == "mse":
            third = third * (kept * kept) + tl.sum(p * p, 1)
            fourth = fourth * (kept * teacher_kept) + tl.sum(p * t, 1)
        first = first * kept + tl.sum(p, 1)
        second = second * teacher_kept + tl.sum(t, 1)
        if KIND == "reverse_kl":
            return (first, second, third, fourth), (quotient(third, first), fourth)
        else:
            ratio = ratio_of(first, second)
            constant = fourth
            if KIND == "mse":
                constant = tl.fma(fourth, -ratio, third) / tl.where(first > 0.0, first, 1.0)
            return (first, second, third, fourth), (ratio, constant)


@triton.jit
def known_sums(sums, p, weighted):
    """`sums` of "js" with one more tile of its second sweep, and `constants` of the slopes."""
    third, fourth = sums[2] + tl.sum(weighted, 1), sums[3] + tl.sum(p, 1)
    return (sums[0], sums[1], third, fourth), (quotient(third, fourth), fourth)


@triton.jit
def slopes_and_weights(p, t, product, constants, KIND: tl.constexpr):
    """Slopes of a tile, and what the keys of the other gradients are multiplied by.

    `product` is `p y` or `p l`, of kinds that have one.
    """
    first = constants[0][:, None]
    if KIND == "reverse_kl" or KIND == "js":
        return tl.fma(p, -first, product), p, p
    elif KIND == "mse":
        return p * (tl.fma(t, -first, p) - constants[1][:, None]), p * t, p
    elif KIND == "cosine":
        return p * tl.fma(p, first, -t), p * p, p
    else:
        return tl.fma(t, -first, p), t, p


@triton.jit
def moves(before, after, kept, teacher_kept, drift, KIND: tl.constexpr):
    """From gradients so far to new constants and shifts: what to multiply each by, and before
    that, how much of the others to add to the first once that is multiplied."""
    if KIND == "reverse_kl" or KIND == "js":
        return (kept, kept, kept), (kept * (before[0] + drift - after[0]), kept)
    elif KIND == "mse":
        ratio = kept * (kept * before[0] - teacher_kept * after[0])
        constant = kept * (kept * before[1] - after[1])
        return (kept * kept, kept * teacher_kept, kept), (ratio, constant)
    elif KIND == "cosine":
        scale = kept * teacher_kept
        return (scale, kept * kept, kept), (
            kept * (kept * after[0] - teacher_kept * before[0]),
            kept,
        )
    else:
        return (kept, teacher_kept, kept), (kept * before[0] - teacher_kept * after[0], kept)


@triton.jit
def slope_divisor(sums, KIND: tl.constexpr):
    """What gradients of rows are multiplied by: one over the sums that their slopes lack."""
    first = tl.where(sums[0] > 0.0, sums[0], 1.0)
    if KIND == "cosine":
        second = tl.where(sums[1] > 0.0, sums[1], 1.0)
        return tl.rsqrt(first) * tl.rsqrt(second)
    elif KIND == "mse":
        return 2.0 / first / first
    elif KIND == "reverse_kl":
        return 1.0 / first * LN2
    elif KIND == "js":
        return tl.full(first.shape, 0.5, first.dtype)
    else:
        return 1.0 / first


@triton.jit
def row_constant(sums, constants, KIND: tl.constexpr):
    """The constant that `divergence_slopes` takes, of final sums; 0 where a kind has none."""
    if KIND == "reverse_kl":
        return (constants[0] - (log_sum(sums[0], True) - log_sum(sums[1], True))) * LN2
    elif KIND == "mse":
        return constants[1] / tl.where(sums[0] > 0.0, sums[0], 1.0)
    elif KIND == "cosine":
        # exactly 1 where all three are equal
        lengths = 0.5 * (log_sum(sums[0], True) + log_sum(sums[1], True))
        return tl.where(sums[2] > 0.0, tl.exp2(log_sum(sums[2], True) - lengths), 0.0)
    else:
        return sums[2]
