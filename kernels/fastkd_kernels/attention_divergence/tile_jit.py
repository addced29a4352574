# mypy: ignore-errors
"""Tiles of attention divergences: logs of probabilities, what outcomes add, and slopes.

A product of a score and its scale is rounded in one place and not in another, as the compiler
chooses, and rows of large scores would not add up to 1: each is a `tl.fma` of the score itself.
With BITS, logs are to base 2, which saves a product for every exponential; scales in bits are
rounded once more, which half precision does not notice.

MASKED says that a tile can have entries that no row sees. Nothing here reads or writes memory but
`raw_sizes`.
"""

import triton
import triton.language as tl

from ..common.attention_jit import sizes_of
from ..common.divergences_jit import (
    LOG2E,
    divergence_slopes,
    divergence_terms,
    hidden_score,
    log_sum,
    shift_of,
)
from ..common.soft_cap_jit import soft_cap


@triton.jit
def raw_sizes(
    scales,
    pair,
    dim,
    teacher_dim,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    BITS: tl.constexpr,
):
    """`sizes_of` for scores as they are, before a scale; what makes logs of them; hidden scores.

    Scores of a capped side are scaled, since their cap is in their unit.
    """
    student, teacher = sizes_of(scales, pair, dim, teacher_dim)
    unit = student[1]
    teacher_unit = teacher[1]
    scale = 1.0
    teacher_scale = 1.0
    if STUDENT_CAP:
        scale = student[1]
        unit = tl.full([], 1.0, unit.dtype)
    if TEACHER_CAP:
        teacher_scale = teacher[1]
        teacher_unit = tl.full([], 1.0, teacher_unit.dtype)
    if BITS:
        unit *= LOG2E
        teacher_unit *= LOG2E
    hidden = (hidden_score(unit), hidden_score(teacher_unit))
    return ((dim, scale), (teacher_dim, teacher_scale)), (unit, teacher_unit), hidden


@triton.jit
def seen_scores(scores, cap, seen, hidden, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Capped scores, and `hidden` where a key is not seen, of which nothing is left in any sum."""
    scores = soft_cap(scores, cap, CAPPED)
    if MASKED:
        scores = tl.where(seen, scores, hidden)
    return scores


@triton.jit
def log_sums(maximum, total, unit, hidden, power: tl.constexpr, BITS: tl.constexpr):
    """Maximum and log-sum-exp below it of `add_exponentials`, both over `power`."""
    return shift_of(maximum, hidden * unit) / power, log_sum(total, BITS) / power


@triton.jit
def outcome_terms(log_p, log_t, KIND: tl.constexpr, BITS: tl.constexpr):
    """`divergence_terms` of the keys of a tile."""
    return divergence_terms(log_p, log_t, (0.5, 0.5), KIND, 0, True, BITS)


@triton.jit
def slopes_of(log_p, log_t, constant, KIND: tl.constexpr, BITS: tl.constexpr):
    """`dL/da` of a tile, of either orientation."""
    _, _, point, p = outcome_terms(log_p, log_t, KIND, BITS)
    return divergence_slopes(p, point, constant, (0.5, 0.5), KIND)


@triton.jit
def sums_of(log_p, log_t, KIND: tl.constexpr, BITS: tl.constexpr):
    """Parts of the value and of the row constant, summed over the keys of one tile."""
    value, weighted, _, _ = outcome_terms(log_p, log_t, KIND, BITS)
    return tl.sum(value, 1), tl.sum(weighted, 1)


@triton.jit
def finished_constant(value, constant, KIND: tl.constexpr):
    if KIND == "cosine":
        # of both sums, the one that has the digits
        constant = tl.where(value < 0.5, 1.0 - value, constant)
    return constant
