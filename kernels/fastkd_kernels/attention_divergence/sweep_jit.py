# mypy: ignore-errors
"""What the two sweeps of attention divergences share, and the sums that each kind keeps of a row.

`p` and `t` are exponentials of the student's and the teacher's scores below a shift of their row,
in bits. A first sweep keeps `sums` of these, made again for new shifts, and from them `constants`
of the slopes: with those so far, a slope is small where student and teacher are close, and so is
the sum of slopes times keys, the first of `gradients`. The others move it to new constants, by as
little as these change. What a kind does not keep stays 0.

| kind | `sums` of | constants | slope | weights of the other gradients |
|---|---|---|---|---|
| "kl", "cross_entropy" | p, t | r = sum p / sum t | p - r t | t |
| "reverse_kl" | p, t, p y | c = sum p y / sum p | p (y - c) | p |
| "mse" | p, t, p p, p t | r, c = sum p (p - r t) / sum p | p (p - r t - c) | p t, p |
| "cosine" | p p, t t, p t | g = sum p t / sum p p | p (g p - t) | p p |

with `y` the log of `p / t` in bits. Slopes lack what their row is divided by: `slope_divisor`.
"""

import triton
import triton.language as tl

from ..common.attention_jit import LN2, load_rows, valid_rows
from ..common.divergences_jit import log_sum


@triton.jit
def load_span(spans, side: tl.constexpr, item, batch, tokens, HAS_MASK: tl.constexpr):
    """The first run of valid rows of a batch item, from and to, and the end of the last row."""
    if HAS_MASK:
        entry = spans + (side * batch + item) * 3
        return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    else:
        return 0, tokens, tokens


@triton.jit
def split_blocks(first, end, whole_first, whole_end, BLOCK: tl.constexpr):
    """Which blocks from `first` to `end` lie between `whole_first` and `whole_end`, from and to,
    how many stand before these, and how many others there are in all."""
    whole_first = min(tl.cdiv(max(first, whole_first), BLOCK), tl.cdiv(end, BLOCK)) * BLOCK
    whole_end = max(whole_first, min(whole_end, end) // BLOCK * BLOCK)
    before = (whole_first - first) // BLOCK
    return whole_first, whole_end, before, before + tl.cdiv(max(end - whole_end, 0), BLOCK)


@triton.jit
def load_block(side, start, o_row, m_row, dim, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Rows `o_row` from `start` of one head, `[rows, BLOCK]`; a loop makes the offsets once."""
    base, stride = side
    return load_rows(base + start * stride, o_row, m_row, stride, dim, BLOCK, ALIGN)


@triton.jit
def rows_there(
    valid,
    side: tl.constexpr,
    item,
    batch,
    tokens,
    o_row,
    HAS_MASK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """`valid_rows`, which are all with WHOLE."""
    if WHOLE:
        return tl.full(o_row.shape, True, tl.int1)
    else:
        return valid_rows(valid, side, item, batch, tokens, o_row, HAS_MASK)


@triton.jit
def other_start(step, before, first, whole_end, BLOCK: tl.constexpr):
    """Where the other block number `step` of `split_blocks` starts."""
    later = whole_end + (step - before) * BLOCK
    return tl.where(step < before, first + step * BLOCK, later)


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
def row_sums(sums, p, t, log_ratio, kept, teacher_kept, drift, KIND: tl.constexpr):
    """`sums` with one more tile, and constants of the slopes.

    The sums so far were below other shifts: their `p` are to be multiplied by `kept`, their `t` by
    `teacher_kept`, and `drift` is to be added to their `log_ratio`.
    """
    first, second, third, fourth = sums
    if KIND == "cosine":
        first = first * (kept * kept) + tl.sum(p * p, 1)
        second = second * (teacher_kept * teacher_kept) + tl.sum(t * t, 1)
        third = third * (kept * teacher_kept) + tl.sum(p * t, 1)
        return (first, second, third, fourth), (quotient(third, first), fourth)
    else:
        if KIND == "reverse_kl":
            third = (third + first * drift) * kept + tl.sum(p * log_ratio, 1)
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
                constant = quotient(tl.fma(fourth, -ratio, third), first)
            return (first, second, third, fourth), (ratio, constant)


@triton.jit
def slopes_and_weights(p, t, log_ratio, constants, KIND: tl.constexpr):
    """Slopes of a tile, and what the keys of the other gradients are multiplied by."""
    first = constants[0][:, None]
    if KIND == "reverse_kl":
        return tl.fma(p, -first, p * log_ratio), p, p
    elif KIND == "mse":
        return p * (tl.fma(t, -first, p) - constants[1][:, None]), p * t, p
    elif KIND == "cosine":
        return p * tl.fma(p, first, -t), p * p, p
    else:
        return tl.fma(t, -first, p), t, p


@triton.jit
def moves(before, after, kept, teacher_kept, drift, KIND: tl.constexpr):
    """From the gradients so far to new constants and shifts.

    What to multiply each by, and then what of the second and third to add to the first, before
    they are multiplied.
    """
    if KIND == "reverse_kl":
        return (kept, kept, kept), (kept * (before[0] + drift - after[0]), kept)
    elif KIND == "mse":
        return (
            (kept * kept, kept * teacher_kept, kept),
            (
                kept * (kept * before[0] - teacher_kept * after[0]),
                kept * (kept * before[1] - after[1]),
            ),
        )
    elif KIND == "cosine":
        return (
            (kept * teacher_kept, kept * kept, kept),
            (kept * (kept * after[0] - teacher_kept * before[0]), kept),
        )
    else:
        return (
            (kept, teacher_kept, kept),
            (kept * before[0] - teacher_kept * after[0], kept),
        )


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
    else:
        return 1.0 / first


@triton.jit
def row_constant(sums, constants, KIND: tl.constexpr):
    """The constant of a row that `divergence_slopes` takes, of final sums."""
    if KIND == "reverse_kl":
        return (constants[0] - (log_sum(sums[0], True) - log_sum(sums[1], True))) * LN2
    elif KIND == "mse":
        return constants[1] / tl.where(sums[0] > 0.0, sums[0], 1.0)
    elif KIND == "cosine":
        return sums[2] * slope_divisor(sums, KIND)
    else:
        return sums[2]
