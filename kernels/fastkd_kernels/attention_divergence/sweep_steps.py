# mypy: ignore-errors
"""Steps of the two sweeps: one block of keys for rows of queries, and the other way round.

Arguments are those of `sweep_kernels.py`. Steps that every row sees whole compare nothing.
"""

import triton
import triton.language as tl

from ..common.attention_jit import load_rows, valid_rows, visible
from ..common.divergences_jit import below, divergence_slopes, shift_of
from .sweep_jit import known_sums, moves, row_sums, slopes_and_weights
from .tile_jit import outcome_terms

# the log-sum-exp of a row that is not counted: no outcome has a share
NEVER: tl.constexpr = tl.constexpr(1e30)


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
def query_step(state, fixed, start, HOW: tl.constexpr, WHOLE: tl.constexpr, KNOWN: tl.constexpr):
    """`state` of `_rows_dq_kernel` with one more block of keys, at `start`.

    With WHOLE all are seen, and the maximum of the block at `first` stands for those of all. With
    KNOWN both log-sum-exps stand in the place of maxima, for "js". `fixed` and HOW are what all
    steps of a program share.
    """
    rows, keys, masks, first, o_query, dims, units = fixed
    GRAD_TYPE: tl.constexpr = HOW[0]
    KIND: tl.constexpr = HOW[1]
    BLOCK_KEY: tl.constexpr = HOW[2]
    BLOCK_DIM: tl.constexpr = HOW[3]
    BLOCK_TEACHER_DIM: tl.constexpr = HOW[4]
    SCORE_PRECISION: tl.constexpr = HOW[5]
    GRAD_PRECISION: tl.constexpr = HOW[6]
    ALIGN: tl.constexpr = HOW[7]
    TEACHER_ALIGN: tl.constexpr = HOW[8]
    HAS_MASK: tl.constexpr = HOW[9]
    CAUSAL: tl.constexpr = HOW[10]
    WINDOWED: tl.constexpr = HOW[11]
    max_student, max_teacher, sums, before, gradients = state
    b_slopes, b_second, b_third = gradients
    valid, item, batch, tokens, window = masks
    o_key = tl.arange(0, BLOCK_KEY)
    m_key = rows_there(valid, 1, item, batch, tokens, start + o_key, HAS_MASK, WHOLE)
    b_key = load_block(keys[0], start, o_key, m_key, dims[0], BLOCK_DIM, ALIGN)
    b_teacher_key = load_block(
        keys[1], start, o_key, m_key, dims[1], BLOCK_TEACHER_DIM, TEACHER_ALIGN
    )
    scores = tl.dot(rows[0], tl.trans(b_key), input_precision=SCORE_PRECISION)
    teacher_scores = tl.dot(rows[1], tl.trans(b_teacher_key), input_precision=SCORE_PRECISION)
    kept, teacher_kept, drift = 1.0, 1.0, 0.0
    if not WHOLE:
        seen = visible(
            o_query[:, None], start + o_key[None, :], m_key[None, :], window, CAUSAL, WINDOWED
        )
        scores = tl.where(seen, scores, float("-inf"))
        teacher_scores = tl.where(seen, teacher_scores, float("-inf"))
    if KNOWN:
        shift, teacher_shift = max_student, max_teacher
    elif WHOLE:
        if start == first:
            max_student = tl.max(scores, 1) * units[0]
            max_teacher = tl.max(teacher_scores, 1) * units[1]
        shift, teacher_shift = max_student, max_teacher
    else:
        new_student = tl.maximum(max_student, tl.max(scores, 1) * units[0])
        new_teacher = tl.maximum(max_teacher, tl.max(teacher_scores, 1) * units[1])
        shift, teacher_shift = shift_of(new_student), shift_of(new_teacher)
        kept, teacher_kept = tl.exp2(max_student - shift), tl.exp2(max_teacher - teacher_shift)
        drift = (teacher_shift - shift_of(max_teacher)) - (shift - shift_of(max_student))
        max_student, max_teacher = new_student, new_teacher
    log_p = below(scores, units[0], shift[:, None])
    log_t = below(teacher_scores, units[1], teacher_shift[:, None])
    if KNOWN:
        if not WHOLE:
            log_p, log_t = tl.where(seen, log_p, -NEVER), tl.where(seen, log_t, -NEVER)
        _, product, _, p = outcome_terms(log_p, log_t, KIND, True)
        # "js" takes p alone
        t = p
        sums, constants = known_sums(sums, p, product)
    else:
        p, t = tl.exp2(log_p), tl.exp2(log_t)
        log_ratio = log_p - log_t
        if not WHOLE:
            log_ratio = tl.where(seen, log_ratio, 0.0)
        product = p * log_ratio
        sums, constants = row_sums(sums, p, t, product, kept, teacher_kept, drift, KIND)
    if KNOWN or KIND != "js":
        slopes, weights, others = slopes_and_weights(p, t, product, constants, KIND)
        scale, moved = moves(before, constants, kept, teacher_kept, drift, KIND)
        b_values = b_key.to(GRAD_TYPE)
        if not (WHOLE or KNOWN):
            b_slopes *= scale[0][:, None]
        b_slopes += b_second * moved[0][:, None]
        if KIND == "mse":
            b_slopes += b_third * moved[1][:, None]
        if not (WHOLE or KNOWN):
            b_second *= scale[1][:, None]
            b_third *= scale[2][:, None]
        b_slopes = tl.dot(slopes.to(GRAD_TYPE), b_values, b_slopes, input_precision=GRAD_PRECISION)
        b_second = tl.dot(weights.to(GRAD_TYPE), b_values, b_second, input_precision=GRAD_PRECISION)
        if KIND == "mse":
            b_third = tl.dot(
                others.to(GRAD_TYPE), b_values, b_third, input_precision=GRAD_PRECISION
            )
    return max_student, max_teacher, sums, constants, (b_slopes, b_second, b_third)


@triton.jit
def key_step(
    b_gradient, value, fixed, queries, logs, start, HOW: tl.constexpr, WHOLE: tl.constexpr
):
    """Sums of `_dk_value_kernel` with one more block of query rows; all see all with WHOLE."""
    key_rows, masks, at, dims, units = fixed
    GRAD_TYPE: tl.constexpr = HOW[0]
    KIND: tl.constexpr = HOW[1]
    BLOCK_QUERY: tl.constexpr = HOW[2]
    BLOCK_DIM: tl.constexpr = HOW[3]
    BLOCK_TEACHER_DIM: tl.constexpr = HOW[4]
    SCORE_PRECISION: tl.constexpr = HOW[5]
    GRAD_PRECISION: tl.constexpr = HOW[6]
    ALIGN: tl.constexpr = HOW[7]
    TEACHER_ALIGN: tl.constexpr = HOW[8]
    HAS_MASK: tl.constexpr = HOW[9]
    CAUSAL: tl.constexpr = HOW[10]
    WINDOWED: tl.constexpr = HOW[11]
    STATS: tl.constexpr = HOW[12]
    valid, item, batch, tokens, window = masks
    o_query = tl.arange(0, BLOCK_QUERY)
    m_query = rows_there(valid, 0, item, batch, tokens, start + o_query, HAS_MASK, WHOLE)
    b_query = load_block(queries[0], start, o_query, m_query, dims[0], BLOCK_DIM, ALIGN)
    b_teacher_query = load_block(
        queries[1], start, o_query, m_query, dims[1], BLOCK_TEACHER_DIM, TEACHER_ALIGN
    )
    log_student = tl.load(logs[0] + start + o_query, mask=m_query, other=NEVER)
    log_teacher = tl.load(logs[1] + start + o_query, mask=m_query, other=NEVER)
    constant = log_student
    if STATS == 3:
        constant = tl.load(logs[2] + start + o_query, mask=m_query, other=0.0)
    scores = tl.dot(key_rows[0], tl.trans(b_query), input_precision=SCORE_PRECISION)
    teacher_scores = tl.dot(key_rows[1], tl.trans(b_teacher_query), input_precision=SCORE_PRECISION)
    log_p = below(scores, units[0], log_student[None, :])
    log_t = below(teacher_scores, units[1], log_teacher[None, :])
    if not WHOLE and (CAUSAL or WINDOWED):
        o_key, m_key = at
        seen = visible(
            start + o_query[None, :], o_key[:, None], m_key[:, None], window, CAUSAL, WINDOWED
        )
        log_p, log_t = tl.where(seen, log_p, -NEVER), tl.where(seen, log_t, -NEVER)
    terms, _, point, p = outcome_terms(log_p, log_t, KIND, True)
    value += tl.sum(terms, 1)
    slopes = divergence_slopes(p, point, constant[None, :], (0.5, 0.5), KIND)
    b_gradient = tl.dot(
        slopes.to(GRAD_TYPE), b_query.to(GRAD_TYPE), b_gradient, input_precision=GRAD_PRECISION
    )
    return b_gradient, value
