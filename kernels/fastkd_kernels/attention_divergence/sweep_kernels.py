# mypy: ignore-errors
"""Triton kernels of divergences of long sequences in half precision: two sweeps.

Slopes are combinations of the softmaxes and of few numbers of a row (`sweep_jit.py`), so that `dQ`
comes out of the sweep that makes the log-sum-exps; `dK` and the value come out of the second.
Arguments are those of `triton_kernels.py`, but all logs are in bits, `repeat` and `teacher_repeat`
query heads share a key head, `stats` `[pairs, 2 or 3, batch, heads, tokens]` holds the student's
and the teacher's log-sum-exp (cosine: half of that of doubled scores) and, where the gradient needs
one, the row's constant, and `spans` int32 `[2, batch, 3]`, of query rows and of keys, the first
valid one, the hidden one after it and the end of the last. Blocks without a hidden entry take a
loop of their own, which compares nothing; UNEVEN says that the last block has rows beyond the
sequence.
"""

import triton
import triton.language as tl

from ..common.attention_jit import (
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
)
from ..common.divergences_jit import LOG2E, log_sum, shift_of
from .sweep_jit import row_constant, slope_divisor
from .sweep_steps import key_step, load_span, other_start, query_step, split_blocks

# sums of exponentials above the first block's maximum that leave room for their products
LARGEST_SUM: tl.constexpr = tl.constexpr(2.0**64)


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

    Writes `stats` and `query_grad`, from the sums of `sweep_jit.py`. Where a score lies so far
    above those of the first block that a sum may overflow, the keys are swept once more. "js" takes
    its slopes from a sweep of their own.
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
    fixed = (rows, keys, masks, whole_first, o_query, (dim, teacher_dim), units)
    HOW: tl.constexpr = (
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
    )
    for start in range(whole_first, whole_end, BLOCK_KEY):
        state = query_step(state, fixed, start, HOW, WHOLE=True, KNOWN=False)
    sums = state[2]
    # squares are summed too
    room: tl.constexpr = LARGEST_SUM**0.5 if KIND == "mse" else LARGEST_SUM
    swept, swept_before = others, before
    if tl.max(tl.maximum(sums[0], sums[1]), 0) > room:
        swept = tl.cdiv(end - first, BLOCK_KEY)
        swept_before = swept
        state = begun
    for step in tl.range(0, swept, num_stages=1):
        other = other_start(step, swept_before, first, whole_end, BLOCK_KEY)
        state = query_step(state, fixed, other, HOW, WHOLE=False, KNOWN=False)
    max_student, max_teacher, sums, constants, gradients = state
    power: tl.constexpr = 0.5 if KIND == "cosine" else 1.0
    log_student = shift_of(max_student) + power * log_sum(sums[0], True)
    log_teacher = shift_of(max_teacher) + power * log_sum(sums[1], True)
    if KIND == "js":
        state = (log_student, log_teacher, sums, constants, gradients)
        for start in range(whole_first, whole_end, BLOCK_KEY):
            state = query_step(state, fixed, start, HOW, WHOLE=True, KNOWN=True)
        for step in tl.range(0, others, num_stages=1):
            other = other_start(step, before, first, whole_end, BLOCK_KEY)
            state = query_step(state, fixed, other, HOW, WHOLE=False, KNOWN=True)
        _, _, sums, constants, gradients = state
    constant = row_constant(sums, constants, KIND)
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
    tl.store(out, log_student, mask=m_row)
    tl.store(out + step, log_teacher, mask=m_row)
    if STATS == 3:
        tl.store(out + 2 * step, constant, mask=m_row)


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
    HOW: tl.constexpr = (
        GRAD_TYPE,
        KIND,
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
        STATS,
    )
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
        fixed = ((b_key, b_teacher_key), masks, (o_key, m_key), (dim, teacher_dim), units)
        for start in range(whole_first, whole_end, BLOCK_QUERY):
            b_gradient, value = key_step(
                b_gradient, value, fixed, queries, logs, start, HOW, WHOLE=True
            )
        if HAS_MASK or UNEVEN or CAUSAL or WINDOWED:
            for number in tl.range(0, others, num_stages=1):
                other = other_start(number, before, first, whole_end, BLOCK_QUERY)
                b_gradient, value = key_step(
                    b_gradient, value, fixed, queries, logs, other, HOW, WHOLE=False
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
