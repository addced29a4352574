# mypy: ignore-errors
"""Triton kernels of KL and cross-entropy of long sequences in half precision: two sweeps.

The slope of either is `p - t`, linear in both softmaxes, so that `dQ` comes out of the sweep that
makes the log-sum-exps; `dK` and the value come out of the second. Arguments are those of
`triton_kernels.py`, but all logs are in bits, `repeat` and `teacher_repeat` query heads share a key
head, `stats` `[pairs, 2, batch, heads, tokens]` holds the student's and the teacher's log-sum-exp,
and `spans` int32 `[2, batch, 3]`, of query rows and of keys, the first valid one, the hidden one
after it and the end of the last. Blocks without a hidden entry take a loop of their own, which
compares nothing; UNEVEN says that the last block has rows beyond the sequence.
"""

import triton
import triton.language as tl

from ..common.attention_jit import (
    LOG2E,
    head_base,
    keys_seen,
    load_rows,
    program_rows,
    queries_seeing,
    query_sides,
    sizes_of,
    stat_base,
    stat_step,
    store_head,
    valid_rows,
    visible,
)
from ..common.divergences_jit import below, divergence_slopes, log_sum, shift_of
from .sweep_jit import (
    load_block,
    load_span,
    moves,
    other_start,
    row_constant,
    row_sums,
    rows_there,
    slope_divisor,
    slopes_and_weights,
    split_blocks,
)
from .tile_jit import outcome_terms

# the log-sum-exp of a row that is not counted: no outcome has a share
NEVER: tl.constexpr = tl.constexpr(1e30)
# sums of exponentials above the first block's maximum that leave room for their products
LARGEST_SUM: tl.constexpr = tl.constexpr(2.0**64)


@triton.jit
def _query_step(
    state,
    rows,
    keys,
    masks,
    start,
    first,
    o_query,
    dims,
    units,
    GRAD_TYPE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TEACHER_DIM: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """`state` of `_rows_dq_kernel` with one more block of keys, at `start`.

    With WHOLE all are seen, and the maximum of the block at `first` stands for those of all.
    """
    max_student, max_teacher, sums, constants, gradients = state
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
    if WHOLE:
        if start == first:
            max_student = tl.max(scores, 1) * units[0]
            max_teacher = tl.max(teacher_scores, 1) * units[1]
        shift, teacher_shift = max_student, max_teacher
    else:
        seen = visible(
            o_query[:, None], start + o_key[None, :], m_key[None, :], window, CAUSAL, WINDOWED
        )
        scores = tl.where(seen, scores, float("-inf"))
        teacher_scores = tl.where(seen, teacher_scores, float("-inf"))
        new_student = tl.maximum(max_student, tl.max(scores, 1) * units[0])
        new_teacher = tl.maximum(max_teacher, tl.max(teacher_scores, 1) * units[1])
        shift, teacher_shift = shift_of(new_student), shift_of(new_teacher)
        kept, teacher_kept = tl.exp2(max_student - shift), tl.exp2(max_teacher - teacher_shift)
        drift = (teacher_shift - shift_of(max_teacher)) - (shift - shift_of(max_student))
        max_student, max_teacher = new_student, new_teacher
    log_p = below(scores, units[0], shift[:, None])
    log_t = below(teacher_scores, units[1], teacher_shift[:, None])
    p, t = tl.exp2(log_p), tl.exp2(log_t)
    log_ratio = log_p - log_t
    if not WHOLE:
        log_ratio = tl.where(seen, log_ratio, 0.0)
    sums, new_constants = row_sums(sums, p, t, log_ratio, kept, teacher_kept, drift, KIND)
    slopes, weights, others = slopes_and_weights(p, t, log_ratio, new_constants, KIND)
    scale, moved = moves(constants, new_constants, kept, teacher_kept, drift, KIND)
    b_slopes, b_second, b_third = gradients
    b_values = b_key.to(GRAD_TYPE)
    if not WHOLE:
        b_slopes *= scale[0][:, None]
    b_slopes += b_second * moved[0][:, None]
    if KIND == "mse":
        b_slopes += b_third * moved[1][:, None]
        if not WHOLE:
            b_third *= scale[2][:, None]
        b_third = tl.dot(others.to(GRAD_TYPE), b_values, b_third, input_precision=GRAD_PRECISION)
    if not WHOLE:
        b_second *= scale[1][:, None]
    b_slopes = tl.dot(slopes.to(GRAD_TYPE), b_values, b_slopes, input_precision=GRAD_PRECISION)
    b_second = tl.dot(weights.to(GRAD_TYPE), b_values, b_second, input_precision=GRAD_PRECISION)
    return max_student, max_teacher, sums, new_constants, (b_slopes, b_second, b_third)


@triton.jit
def _rows_dq_kernel(
    table,
    scales,
    valid,
    spans,
    stats,
    weights,
    query_grad,
    batch,
    heads,
    repeat,
    teacher_repeat,
    tokens,
    dim,
    teacher_dim,
    window,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    KIND: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TEACHER_DIM: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    QUERY_TOKENS_FIRST: tl.constexpr,
):
    """One program: one block of query rows of one head, against all keys that it sees.

    Writes `stats` and `query_grad`, from the sums of `sweep_jit.py`. Where a score lies so far above
    those of the first block that a sum may overflow, the keys are swept once more.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair, block, item, head = program_rows(heads, tokens, BLOCK_QUERY)
    row = table + pair * 16
    sizes = sizes_of(scales, pair, dim, teacher_dim)
    units = (sizes[0][1] * LOG2E, sizes[1][1] * LOG2E)
    block_start = block * BLOCK_QUERY
    o_query = block_start + tl.arange(0, BLOCK_QUERY)
    m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
    side, teacher_side = query_sides(row, item, head, TYPE, TEACHER_TYPE)
    rows = (
        load_rows(side[0], o_query, m_query, side[1], dim, BLOCK_DIM, ALIGN),
        load_rows(
            teacher_side[0],
            o_query,
            m_query,
            teacher_side[1],
            teacher_dim,
            BLOCK_TEACHER_DIM,
            TEACHER_ALIGN,
        ),
    )
    keys = (
        head_base(row, 1, item, head // repeat, TYPE),
        head_base(row, 3, item, head // teacher_repeat, TEACHER_TYPE),
    )
    first, end = keys_seen(block_start, BLOCK_QUERY, tokens, window, BLOCK_KEY, CAUSAL, WINDOWED)
    rows_first, _, rows_end = load_span(spans, 0, item, batch, tokens, HAS_MASK)
    keys_first, whole_end, keys_end = load_span(spans, 1, item, batch, tokens, HAS_MASK)
    first = max(first, keys_first // BLOCK_KEY * BLOCK_KEY)
    # rows that are not counted need no sweep
    counted = (block_start < rows_end) & (block_start + BLOCK_QUERY > rows_first)
    end = tl.where(counted, max(first, min(end, keys_end)), first)
    if CAUSAL:
        whole_end = min(whole_end, block_start + 1)
    if WINDOWED:
        whole_end = first
    whole_first, whole_end, before, others = split_blocks(
        first, end, keys_first, whole_end, BLOCK_KEY
    )
    nothing = tl.zeros([BLOCK_QUERY], tl.float32)
    lowest = tl.full([BLOCK_QUERY], float("-inf"), tl.float32)
    empty = tl.zeros([BLOCK_QUERY, BLOCK_DIM], tl.float32)
    begun = (
        lowest,
        lowest,
        (nothing, nothing, nothing, nothing),
        (nothing, nothing),
        (empty, empty, empty),
    )
    state = begun
    masks = (valid, item, batch, tokens, window)
    for start in range(whole_first, whole_end, BLOCK_KEY):
        state = _query_step(
            state,
            rows,
            keys,
            masks,
            start,
            whole_first,
            o_query,
            (dim, teacher_dim),
            units,
            GRAD_TYPE,
            KIND,
            BLOCK_KEY,
            BLOCK_DIM,
            BLOCK_TEACHER_DIM,
            SCORE_PRECISION,
            GRAD_PRECISION,
            ALIGN,
            TEACHER_ALIGN,
            HAS_MASK,
            CAUSAL,
            WINDOWED,
            WHOLE=True,
        )
    sums = state[2]
    room: tl.constexpr = LARGEST_SUM**0.5 if KIND == "mse" else LARGEST_SUM
    if tl.max(tl.maximum(sums[0], sums[1]), 0) > room:
        before = tl.cdiv(end - first, BLOCK_KEY)
        others = before
        state = begun
    for step in tl.range(0, others, num_stages=1):
        state = _query_step(
            state,
            rows,
            keys,
            masks,
            other_start(step, before, first, whole_end, BLOCK_KEY),
            whole_first,
            o_query,
            (dim, teacher_dim),
            units,
            GRAD_TYPE,
            KIND,
            BLOCK_KEY,
            BLOCK_DIM,
            BLOCK_TEACHER_DIM,
            SCORE_PRECISION,
            GRAD_PRECISION,
            ALIGN,
            TEACHER_ALIGN,
            HAS_MASK,
            CAUSAL,
            WINDOWED,
            WHOLE=False,
        )
    max_student, max_teacher, sums, constants, gradients = state
    scale = sizes[0][1] * tl.load(weights + item) * slope_divisor(sums, KIND)
    m_row = o_query < tokens
    # rows that are not counted have queries of 0 on both sides, so no slope
    store_head(
        query_grad + (pair * batch + item) * heads * tokens * dim,
        gradients[0] * scale[:, None],
        (o_query, m_row),
        head,
        heads,
        tokens,
        dim,
        BLOCK_DIM,
        ALIGN,
        QUERY_TOKENS_FIRST,
    )
    out = stat_base(stats, pair, item, head, batch, heads, tokens, STATS) + o_query
    step = stat_step(batch, heads, tokens)
    power: tl.constexpr = 0.5 if KIND == "cosine" else 1.0
    tl.store(out, shift_of(max_student) + power * log_sum(sums[0], True), mask=m_row)
    tl.store(out + step, shift_of(max_teacher) + power * log_sum(sums[1], True), mask=m_row)
    if STATS == 3:
        tl.store(out + 2 * step, row_constant(sums, constants, KIND), mask=m_row)


@triton.jit
def _key_step(
    b_gradient,
    value,
    key_rows,
    queries,
    logs,
    masks,
    start,
    at,
    dims,
    units,
    GRAD_TYPE: tl.constexpr,
    KIND: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TEACHER_DIM: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Sums of `_dk_value_kernel` with one more block of query rows; all see all with WHOLE."""
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


@triton.jit
def _dk_value_kernel(
    table,
    scales,
    valid,
    spans,
    stats,
    weights,
    key_grad,
    partials,
    batch,
    heads,
    repeat,
    teacher_repeat,
    tokens,
    dim,
    teacher_dim,
    window,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    KIND: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TEACHER_DIM: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UNEVEN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    KEY_TOKENS_FIRST: tl.constexpr,
):
    """One program: one block of keys of one student key head, against all rows that see it.

    Tiles are `[keys, queries]`. Writes `key_grad`, summed over the query heads that share the key
    head, and `partials` `[pairs, programs]`, sums of the rows' divergences without weights.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    kv_heads = heads // repeat
    pair, block, item, kv_head = program_rows(kv_heads, tokens, BLOCK_KEY)
    row = table + pair * 16
    sizes = sizes_of(scales, pair, dim, teacher_dim)
    units = (sizes[0][1] * LOG2E, sizes[1][1] * LOG2E)
    block_start = block * BLOCK_KEY
    o_key = block_start + tl.arange(0, BLOCK_KEY)
    m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
    side = head_base(row, 1, item, kv_head, TYPE)
    b_key = load_rows(side[0], o_key, m_key, side[1], dim, BLOCK_DIM, ALIGN)
    first, end = queries_seeing(
        block_start, BLOCK_KEY, tokens, window, BLOCK_QUERY, CAUSAL, WINDOWED
    )
    rows_first, whole_end, rows_end = load_span(spans, 0, item, batch, tokens, HAS_MASK)
    keys_first, _, keys_end = load_span(spans, 1, item, batch, tokens, HAS_MASK)
    first = max(first, rows_first // BLOCK_QUERY * BLOCK_QUERY)
    # keys that are hidden are seen by nobody
    there = (block_start < keys_end) & (block_start + BLOCK_KEY > keys_first)
    end = tl.where(there, max(first, min(end, rows_end)), first)
    whole_first = rows_first
    if CAUSAL:
        whole_first = max(whole_first, block_start + BLOCK_KEY - 1)
    if WINDOWED:
        whole_end = first
    whole_first, whole_end, before, others = split_blocks(
        first, end, whole_first, whole_end, BLOCK_QUERY
    )
    masks = (valid, item, batch, tokens, window)
    b_gradient = tl.zeros([BLOCK_KEY, BLOCK_DIM], tl.float32)
    value = tl.zeros([BLOCK_KEY], tl.float32)
    for turn in range(0, repeat):
        head = kv_head * repeat + turn
        teacher_side = head_base(row, 3, item, head // teacher_repeat, TEACHER_TYPE)
        b_teacher_key = load_rows(
            teacher_side[0],
            o_key,
            m_key,
            teacher_side[1],
            teacher_dim,
            BLOCK_TEACHER_DIM,
            TEACHER_ALIGN,
        )
        queries = query_sides(row, item, head, TYPE, TEACHER_TYPE)
        log_base = stat_base(stats, pair, item, head, batch, heads, tokens, STATS)
        step = stat_step(batch, heads, tokens)
        logs = (log_base, log_base + step, log_base + 2 * step)
        for start in range(whole_first, whole_end, BLOCK_QUERY):
            b_gradient, value = _key_step(
                b_gradient,
                value,
                (b_key, b_teacher_key),
                queries,
                logs,
                masks,
                start,
                (o_key, m_key),
                (dim, teacher_dim),
                units,
                GRAD_TYPE,
                KIND,
                STATS,
                BLOCK_QUERY,
                BLOCK_DIM,
                BLOCK_TEACHER_DIM,
                SCORE_PRECISION,
                GRAD_PRECISION,
                ALIGN,
                TEACHER_ALIGN,
                HAS_MASK,
                CAUSAL,
                WINDOWED,
                WHOLE=True,
            )
        if HAS_MASK or UNEVEN or CAUSAL or WINDOWED:
            for other in tl.range(0, others, num_stages=1):
                b_gradient, value = _key_step(
                    b_gradient,
                    value,
                    (b_key, b_teacher_key),
                    queries,
                    logs,
                    masks,
                    other_start(other, before, first, whole_end, BLOCK_QUERY),
                    (o_key, m_key),
                    (dim, teacher_dim),
                    units,
                    GRAD_TYPE,
                    KIND,
                    STATS,
                    BLOCK_QUERY,
                    BLOCK_DIM,
                    BLOCK_TEACHER_DIM,
                    SCORE_PRECISION,
                    GRAD_PRECISION,
                    ALIGN,
                    TEACHER_ALIGN,
                    HAS_MASK,
                    CAUSAL,
                    WINDOWED,
                    WHOLE=False,
                )
    # scores of hidden keys were 0, and what came of them stayed in their rows
    b_gradient = tl.where(m_key[:, None], b_gradient, 0.0)
    value = tl.sum(tl.where(m_key, value, 0.0), 0)
    tl.store(partials + pair * tl.num_programs(0) + tl.program_id(0), value)
    store_head(
        key_grad + (pair * batch + item) * kv_heads * tokens * dim,
        b_gradient * (sizes[0][1] * tl.load(weights + item)),
        (o_key, o_key < tokens),
        kv_head,
        kv_heads,
        tokens,
        dim,
        BLOCK_DIM,
        ALIGN,
        KEY_TOKENS_FIRST,
    )
