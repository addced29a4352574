# mypy: ignore-errors
"""Triton kernel of the forward of attention divergences: one streaming launch.

Sizes, prefixes and the rows of `table`, `scales` and `valid` are those of
`attention_score_mse_kernels.py`; here scales are divided by the temperature, and valid query rows
are those that count. `stats` `[pairs, 4 or 5, batch, heads, tokens]` holds, for each query row, the
maximum of the student's scores and the log of their sum of exponentials below it, the same of the
teacher (cosine: half of both, of the doubled scores) and, where the gradient needs one, the row's
constant. Maximum and log are kept apart because their sum would be rounded.

`caps` `[pairs, 2]` are soft caps, student and teacher, and `sinks` `[pairs, 2, heads]` the logits
that join every row's softmax; both are divided by the temperature. STUDENT_CAP, TEACHER_CAP and
SINK say which are there; the others are not read.
"""

import triton
import triton.language as tl

from .attention_divergence_formulas import (
    add_divergence,
    add_expectation,
    add_two_sums,
    divergence_of,
    log_sum,
    row_terms,
    shift_of,
    soft_cap,
    state_of_sink,
)
from .attention_divergence_tiles import (
    both_tiles,
    keys_seen,
    load_cap,
    load_sinks,
    rows_at,
    stat_base,
    stat_step,
    visible,
)
from .attention_score_mse_kernels import head_base, valid_rows


@triton.jit
def stream_rows(
    table,
    scales,
    caps,
    sinks,
    valid,
    stats,
    partials,
    batch,
    heads,
    kv_heads,
    target_kv_heads,
    tokens,
    dim,
    target_dim,
    window,
    TYPE: tl.constexpr,
    TARGET_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    KIND: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TARGET_DIM: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TARGET_ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    SINK: tl.constexpr,
    WRITE_STATS: tl.constexpr,
):
    """One program: one block of query rows of one head, against all keys that it sees.

    Writes `partials` `[pairs, programs]`, the sum of the rows' divergences, and `stats`. One sweep
    over the keys for KL, reverse KL and cross-entropy. The others sweep twice: first for both
    log-sum-exps, then for sums that need the probabilities themselves. A sink is seen before the
    first key.
    """
    pair = tl.program_id(1).to(tl.int64)
    query_blocks = tl.cdiv(tokens, BLOCK_QUERY)
    block = tl.program_id(0) % query_blocks
    item = (tl.program_id(0) // query_blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // query_blocks % heads).to(tl.int64)
    row = table + pair * 16
    scale = tl.load(scales + pair * 2)
    target_scale = tl.load(scales + pair * 2 + 1)
    sizes = ((dim, scale), (target_dim, target_scale))
    student_cap = load_cap(caps, pair, 0, STUDENT_CAP)
    teacher_cap = load_cap(caps, pair, 1, TEACHER_CAP)
    o_query = block * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
    query_at = (o_query, m_query)
    query_base, query_stride = head_base(row, 0, item, head, TYPE)
    key_base, key_stride = head_base(row, 1, item, head // (heads // kv_heads), TYPE)
    other_base, other_stride = head_base(row, 2, item, head, TARGET_TYPE)
    target_base, target_stride = head_base(
        row, 3, item, head // (heads // target_kv_heads), TARGET_TYPE
    )
    held_sides = ((query_base, query_stride), (other_base, other_stride))
    moving_sides = ((key_base, key_stride), (target_base, target_stride))
    held = (
        rows_at(query_base, query_stride, query_at, dim, BLOCK_DIM, ALIGN, CHUNK),
        rows_at(
            other_base, other_stride, query_at, target_dim, BLOCK_TARGET_DIM, TARGET_ALIGN, CHUNK
        ),
    )
    block_start = block * BLOCK_QUERY
    first, end = keys_seen(
        block_start,
        block_start + BLOCK_QUERY - 1,
        tokens,
        window,
        BLOCK_KEY,
        CAUSAL,
        WINDOWED,
    )
    two_sweeps: tl.constexpr = KIND == "js" or KIND == "mse" or KIND == "cosine"
    # cosine needs the log of |e^a| alone: half the log-sum-exp of doubled scores
    power: tl.constexpr = 2.0 if KIND == "cosine" else 1.0
    nothing = tl.zeros([BLOCK_QUERY], SUM_TYPE)
    lowest = tl.full([BLOCK_QUERY], float("-inf"), SUM_TYPE)
    # running maximum and sum of the weighing side, then of the other; mean and excess
    state = (lowest, nothing, lowest, nothing, nothing, nothing)
    if SINK:
        student_sink, teacher_sink = load_sinks(sinks, pair, head, heads)
        state = state_of_sink(power * student_sink, power * teacher_sink, nothing, KIND)
    for start in range(first, end, BLOCK_KEY):
        o_key = start + tl.arange(0, BLOCK_KEY)
        m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
        seen = visible(o_query[:, None], o_key[None, :], m_key[None, :], window, CAUSAL, WINDOWED)
        own, target, _b_key = both_tiles(
            held,
            held_sides,
            moving_sides,
            query_at,
            (o_key, m_key),
            sizes,
            BLOCK_QUERY,
            BLOCK_KEY,
            BLOCK_DIM,
            BLOCK_TARGET_DIM,
            CHUNK,
            SUM_TYPE,
            ALIGN,
            TARGET_ALIGN,
            SCORE_PRECISION,
        )
        own = soft_cap(own, student_cap, STUDENT_CAP)
        target = soft_cap(target, teacher_cap, TEACHER_CAP)
        if two_sweeps:
            state = add_two_sums(power * target, power * own, seen, state)
        elif KIND == "kl":
            state = add_divergence(target, own, seen, state)
        elif KIND == "reverse_kl":
            state = add_divergence(own, target, seen, state)
        else:
            state = add_expectation(target, own, seen, state)
    if KIND == "reverse_kl":
        max_own, sum_own, max_target, sum_target, mean, _excess = state
    else:
        max_target, sum_target, max_own, sum_own, mean, _excess = state
    max_own, log_own = shift_of(max_own) / power, log_sum(sum_own) / power
    max_target, log_target = shift_of(max_target) / power, log_sum(sum_target) / power
    value = divergence_of(state)
    constant = value
    if KIND == "cross_entropy":
        # lse(a) - E_t[a]
        value = max_own - mean + log_own
    if two_sweeps:
        value = nothing
        constant = nothing
        if SINK:
            value, constant = row_terms(
                (student_sink - max_own - log_own)[:, None],
                (teacher_sink - max_target - log_target)[:, None],
                (o_query >= 0)[:, None],
                KIND,
            )
        for start in range(first, end, BLOCK_KEY):
            o_key = start + tl.arange(0, BLOCK_KEY)
            m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
            seen = visible(
                o_query[:, None], o_key[None, :], m_key[None, :], window, CAUSAL, WINDOWED
            )
            own, target, _b_key = both_tiles(
                held,
                held_sides,
                moving_sides,
                query_at,
                (o_key, m_key),
                sizes,
                BLOCK_QUERY,
                BLOCK_KEY,
                BLOCK_DIM,
                BLOCK_TARGET_DIM,
                CHUNK,
                SUM_TYPE,
                ALIGN,
                TARGET_ALIGN,
                SCORE_PRECISION,
            )
            own = soft_cap(own, student_cap, STUDENT_CAP)
            target = soft_cap(target, teacher_cap, TEACHER_CAP)
            tile_value, tile_constant = row_terms(
                own - max_own[:, None] - log_own[:, None],
                target - max_target[:, None] - log_target[:, None],
                seen,
                KIND,
            )
            value += tile_value
            constant += tile_constant
        if KIND == "cosine":
            # of both sums, the one that has the digits
            constant = tl.where(value < 0.5, 1.0 - value, constant)
    tl.store(
        partials + pair * tl.num_programs(0) + tl.program_id(0),
        tl.sum(tl.where(m_query, value, 0.0), 0),
    )
    if WRITE_STATS:
        m_row = o_query < tokens
        out = stat_base(stats, pair, item, head, batch, heads, tokens, STATS) + o_query
        step = stat_step(batch, heads, tokens)
        tl.store(out, max_own, mask=m_row)
        tl.store(out + step, log_own, mask=m_row)
        tl.store(out + 2 * step, max_target, mask=m_row)
        tl.store(out + 3 * step, log_target, mask=m_row)
        if STATS == 5:
            tl.store(out + 4 * step, constant, mask=m_row)
