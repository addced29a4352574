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

from ..common.attention_jit import LN2, LOG2E, sizes_of
from ..common.divergences_jit import divergence_slopes, power_of, terms_of


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
    """`sizes_of` for scores as they are, before a scale, and what makes logs of them.

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
    return ((dim, scale), (teacher_dim, teacher_scale)), (unit, teacher_unit)


@triton.jit
def outcome_terms(log_p, log_t, seen, KIND: tl.constexpr, MASKED: tl.constexpr, BITS: tl.constexpr):
    """`divergence_terms` of outcomes; of hidden ones, those of two equal logs."""
    if MASKED:
        log_p, log_t = tl.where(seen, log_p, 0.0), tl.where(seen, log_t, 0.0)
    # in this order the compiler needs the fewest registers
    unit: tl.constexpr = LN2 if BITS else 1.0
    ratio = (log_p - log_t) * unit
    p, t = power_of(log_p, BITS), power_of(log_t, BITS)
    return terms_of(p, t, log_p * unit, ratio, (0.5, 0.5), KIND, 0, True)


@triton.jit
def without_hidden(terms, seen, KIND: tl.constexpr, MASKED: tl.constexpr):
    """0 where a key is hidden; terms of KL are 0 there, as those of any two equal logs."""
    if MASKED and KIND != "kl" and KIND != "cross_entropy":
        terms = tl.where(seen, terms, 0.0)
    return terms


@triton.jit
def slopes_of(
    log_p, log_t, constant, seen, KIND: tl.constexpr, MASKED: tl.constexpr, BITS: tl.constexpr
):
    """`dL/da` of a tile, of either orientation; 0 where a key is hidden."""
    _, _, point, p = outcome_terms(log_p, log_t, seen, KIND, MASKED, BITS)
    slopes = divergence_slopes(p, point, constant, (0.5, 0.5), KIND)
    return without_hidden(slopes, seen, KIND, MASKED)


@triton.jit
def sums_of(log_p, log_t, seen, KIND: tl.constexpr, MASKED: tl.constexpr, BITS: tl.constexpr):
    """Parts of the value and of the row constant, summed over the keys of one tile."""
    value, weighted, _, _ = outcome_terms(log_p, log_t, seen, KIND, MASKED, BITS)
    value = without_hidden(value, seen, KIND, MASKED)
    return tl.sum(value, 1), tl.sum(without_hidden(weighted, seen, KIND, MASKED), 1)


@triton.jit
def finished_constant(value, constant, KIND: tl.constexpr):
    if KIND == "cosine":
        # of both sums, the one that has the digits
        constant = tl.where(value < 0.5, 1.0 - value, constant)
    return constant
