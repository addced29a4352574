# mypy: ignore-errors
"""Triton kernels of attention divergences: one streaming launch forward, two backward.

Sizes are those of `attention_score_mse/triton_kernels.py`, prefixes and the rows of `table` and
`valid` those of `common/attention_jit.py`; here `scales` are divided by the temperature, and valid
query rows are those that count. `stats` `[pairs, 4 or 5, batch, heads, tokens]` holds, for each
query row, the maximum of the student's scores and the log of their sum of exponentials below it,
the same of the teacher (cosine: half of both, of the doubled scores) and, where the gradient needs
one, the row's constant. Maximum and log are kept apart because their sum would be rounded.

`caps` `[pairs, 2]` are soft caps, student and teacher, and `sinks` `[pairs, 2, heads]` the logits
that join every row's softmax; both are divided by the temperature. STUDENT_CAP, TEACHER_CAP and
SINK say which are there; the others are not read.

The backward makes every tile once more, from `stats`. `upstream` `[pairs, batch]` is the gradient
of each batch item's sum over rows.
"""

import triton
import triton.language as tl

from ..common.attention_jit import (
    both_rows,
    both_tiles,
    cap_slope,
    head_base,
    key_sides,
    keys_seen,
    load_cap,
    load_sinks,
    load_stats,
    program_rows,
    queries_seeing,
    query_sides,
    rows_at,
    sizes_of,
    soft_cap,
    stat_base,
    stat_step,
    valid_rows,
    visible,
    whole_rows,
)
from ..common.divergences_jit import (
    add_divergence,
    add_expectation,
    add_two_sums,
    divergence_of,
    divergence_slopes,
    divergence_terms,
    log_sum,
    shift_of,
    state_of_sink,
)


@triton.jit
def row_terms(log_p, log_t, seen, KIND: tl.constexpr):
    """Parts of the value and of the row constant, summed over the keys of one tile."""
    log_p, log_t = tl.where(seen, log_p, 0.0), tl.where(seen, log_t, 0.0)
    value, weighted, _, _ = divergence_terms(log_p, log_t, (0.5, 0.5), KIND, 0, True)
    return tl.sum(tl.where(seen, value, 0.0), 1), tl.sum(tl.where(seen, weighted, 0.0), 1)


@triton.jit
def row_slopes(log_p, log_t, constant, seen, KIND: tl.constexpr):
    """`dL/da` of a tile, of either orientation; 0 where a key is hidden."""
    log_p, log_t = tl.where(seen, log_p, 0.0), tl.where(seen, log_t, 0.0)
    _, _, point, p = divergence_terms(log_p, log_t, (0.5, 0.5), KIND, 0, True)
    return tl.where(seen, divergence_slopes(p, point, constant, (0.5, 0.5), KIND), 0.0)


@triton.jit
def _fwd_kernel(
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
    teacher_kv_heads,
    tokens,
    dim,
    teacher_dim,
    window,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    KIND: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TEACHER_DIM: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
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
    pair, block, item, head = program_rows(heads, tokens, BLOCK_QUERY)
    row = table + pair * 16
    sizes = sizes_of(scales, pair, dim, teacher_dim)
    student_cap = load_cap(caps, pair, 0, STUDENT_CAP)
    teacher_cap = load_cap(caps, pair, 1, TEACHER_CAP)
    o_query = block * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
    query_at = (o_query, m_query)
    queries = query_sides(row, item, head, TYPE, TEACHER_TYPE)
    query_rows = both_rows(
        queries, query_at, sizes, BLOCK_DIM, BLOCK_TEACHER_DIM, ALIGN, TEACHER_ALIGN, CHUNK
    )
    keys = key_sides(row, item, head, heads, kv_heads, teacher_kv_heads, TYPE, TEACHER_TYPE)
    first, end = keys_seen(
        block * BLOCK_QUERY, BLOCK_QUERY, tokens, window, BLOCK_KEY, CAUSAL, WINDOWED
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
        key_at = (o_key, m_key)
        key_rows = both_rows(
            keys, key_at, sizes, BLOCK_DIM, BLOCK_TEACHER_DIM, ALIGN, TEACHER_ALIGN, CHUNK
        )
        student_scores, teacher_scores = both_tiles(
            query_rows, key_rows, sizes, CHUNK, SUM_TYPE, ALIGN, TEACHER_ALIGN, SCORE_PRECISION
        )
        student_scores = soft_cap(student_scores, student_cap, STUDENT_CAP)
        teacher_scores = soft_cap(teacher_scores, teacher_cap, TEACHER_CAP)
        if two_sweeps:
            state = add_two_sums(power * teacher_scores, power * student_scores, seen, state)
        elif KIND == "kl":
            state = add_divergence(teacher_scores, student_scores, seen, state)
        elif KIND == "reverse_kl":
            state = add_divergence(student_scores, teacher_scores, seen, state)
        else:
            state = add_expectation(teacher_scores, student_scores, seen, state)
    if KIND == "reverse_kl":
        max_student, sum_student, max_teacher, sum_teacher, mean, _excess = state
    else:
        max_teacher, sum_teacher, max_student, sum_student, mean, _excess = state
    max_student, log_student = shift_of(max_student) / power, log_sum(sum_student) / power
    max_teacher, log_teacher = shift_of(max_teacher) / power, log_sum(sum_teacher) / power
    value = divergence_of(state)
    constant = value
    if KIND == "cross_entropy":
        # lse(a) - E_t[a]
        value = max_student - mean + log_student
    if two_sweeps:
        value = nothing
        constant = nothing
        if SINK:
            value, constant = row_terms(
                (student_sink - max_student - log_student)[:, None],
                (teacher_sink - max_teacher - log_teacher)[:, None],
                (o_query >= 0)[:, None],
                KIND,
            )
        for start in range(first, end, BLOCK_KEY):
            o_key = start + tl.arange(0, BLOCK_KEY)
            m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
            seen = visible(
                o_query[:, None], o_key[None, :], m_key[None, :], window, CAUSAL, WINDOWED
            )
            key_at = (o_key, m_key)
            key_rows = both_rows(
                keys, key_at, sizes, BLOCK_DIM, BLOCK_TEACHER_DIM, ALIGN, TEACHER_ALIGN, CHUNK
            )
            student_scores, teacher_scores = both_tiles(
                query_rows, key_rows, sizes, CHUNK, SUM_TYPE, ALIGN, TEACHER_ALIGN, SCORE_PRECISION
            )
            student_scores = soft_cap(student_scores, student_cap, STUDENT_CAP)
            teacher_scores = soft_cap(teacher_scores, teacher_cap, TEACHER_CAP)
            tile_value, tile_constant = row_terms(
                student_scores - max_student[:, None] - log_student[:, None],
                teacher_scores - max_teacher[:, None] - log_teacher[:, None],
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
        tl.store(out, max_student, mask=m_row)
        tl.store(out + step, log_student, mask=m_row)
        tl.store(out + 2 * step, max_teacher, mask=m_row)
        tl.store(out + 3 * step, log_teacher, mask=m_row)
        if STATS == 5:
            tl.store(out + 4 * step, constant, mask=m_row)


@triton.jit
def _bwd_dq_kernel(
    table,
    scales,
    caps,
    valid,
    stats,
    upstream,
    gradient,
    sinks,
    sink_partials,
    batch,
    heads,
    kv_heads,
    teacher_kv_heads,
    tokens,
    dim,
    teacher_dim,
    window,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
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
    CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    SINK: tl.constexpr,
):
    """One program: one block of query rows of one head, against all keys that it sees.

    Writes `gradient` `[pairs, batch, heads, tokens, dim]` and, with SINK, `sink_partials`
    `[pairs, programs]`, the sum of the counted rows' slopes of the student's sink.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair, block, item, head = program_rows(heads, tokens, BLOCK_QUERY)
    row = table + pair * 16
    sizes = sizes_of(scales, pair, dim, teacher_dim)
    student_cap = load_cap(caps, pair, 0, STUDENT_CAP)
    teacher_cap = load_cap(caps, pair, 1, TEACHER_CAP)
    o_query = block * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
    query_at = (o_query, m_query)
    queries = query_sides(row, item, head, TYPE, TEACHER_TYPE)
    query_rows = both_rows(
        queries, query_at, sizes, BLOCK_DIM, BLOCK_TEACHER_DIM, ALIGN, TEACHER_ALIGN, CHUNK
    )
    keys = key_sides(row, item, head, heads, kv_heads, teacher_kv_heads, TYPE, TEACHER_TYPE)
    first, end = keys_seen(
        block * BLOCK_QUERY, BLOCK_QUERY, tokens, window, BLOCK_KEY, CAUSAL, WINDOWED
    )
    max_student, log_student, max_teacher, log_teacher, constant = load_stats(
        stats, pair, item, head, batch, heads, tokens, o_query, STATS
    )
    b_gradient = tl.zeros([BLOCK_QUERY, BLOCK_DIM], SUM_TYPE)
    for start in range(first, end, BLOCK_KEY):
        o_key = start + tl.arange(0, BLOCK_KEY)
        m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
        seen = visible(o_query[:, None], o_key[None, :], m_key[None, :], window, CAUSAL, WINDOWED)
        key_at = (o_key, m_key)
        key_rows = both_rows(
            keys, key_at, sizes, BLOCK_DIM, BLOCK_TEACHER_DIM, ALIGN, TEACHER_ALIGN, CHUNK
        )
        student_scores, teacher_scores = both_tiles(
            query_rows, key_rows, sizes, CHUNK, SUM_TYPE, ALIGN, TEACHER_ALIGN, SCORE_PRECISION
        )
        student_capped = soft_cap(student_scores, student_cap, STUDENT_CAP)
        teacher_capped = soft_cap(teacher_scores, teacher_cap, TEACHER_CAP)
        slopes = row_slopes(
            student_capped - max_student[:, None] - log_student[:, None],
            teacher_capped - max_teacher[:, None] - log_teacher[:, None],
            constant[:, None],
            seen,
            KIND,
        )
        if STUDENT_CAP:
            slopes *= cap_slope(student_scores, student_cap)
        b_key = whole_rows(key_rows[0], dim, BLOCK_DIM, ALIGN, CHUNK)
        # dQ_s = c_s (dL/dA) K_s
        b_gradient += tl.dot(
            slopes.to(GRAD_TYPE), b_key.to(GRAD_TYPE), input_precision=GRAD_PRECISION
        )
    factor = tl.load(upstream + pair * batch + item)
    if SINK:
        student_sink, teacher_sink = load_sinks(sinks, pair, head, heads)
        sink_slopes = row_slopes(
            student_sink - max_student - log_student,
            teacher_sink - max_teacher - log_teacher,
            constant,
            o_query >= 0,
            KIND,
        )
        tl.store(
            sink_partials + pair * tl.num_programs(0) + tl.program_id(0),
            tl.sum(tl.where(m_query, sink_slopes, 0.0), 0) * factor,
        )
        # queries of 0 on both sides meet sinks that differ
        b_gradient = tl.where(m_query[:, None], b_gradient, 0.0)
    # without sinks, rows that are not counted have queries of 0 on both sides, so no slope
    b_gradient *= sizes[0][1] * factor
    o_dim = tl.arange(0, BLOCK_DIM)
    out = gradient + ((pair * batch + item) * heads + head) * tokens * dim
    o_out = o_query[:, None].to(tl.int64) * dim + o_dim[None, :]
    m_out = (o_query < tokens)[:, None] & (o_dim < dim)[None, :]
    tl.store(out + o_out, b_gradient.to(TYPE), mask=m_out)


@triton.jit
def _bwd_dk_kernel(
    table,
    scales,
    caps,
    valid,
    stats,
    upstream,
    gradient,
    batch,
    heads,
    kv_heads,
    teacher_kv_heads,
    tokens,
    dim,
    teacher_dim,
    window,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
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
    CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
):
    """One program: one block of keys of one student key head, against all rows that see it.

    Tiles are `[keys, queries]`. Writes `gradient` `[pairs, batch, kv_heads, tokens, dim]`, summed
    over the query heads that share the key head.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair, block, item, kv_head = program_rows(kv_heads, tokens, BLOCK_KEY)
    row = table + pair * 16
    sizes = sizes_of(scales, pair, dim, teacher_dim)
    student_cap = load_cap(caps, pair, 0, STUDENT_CAP)
    teacher_cap = load_cap(caps, pair, 1, TEACHER_CAP)
    o_key = block * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
    key_at = (o_key, m_key)
    student_keys = rows_at(
        head_base(row, 1, item, kv_head, TYPE), key_at, dim, BLOCK_DIM, ALIGN, CHUNK
    )
    first, end = queries_seeing(
        block * BLOCK_KEY, BLOCK_KEY, tokens, window, BLOCK_QUERY, CAUSAL, WINDOWED
    )
    repeat = heads // kv_heads
    teacher_repeat = heads // teacher_kv_heads
    b_gradient = tl.zeros([BLOCK_KEY, BLOCK_DIM], SUM_TYPE)
    for turn in range(0, repeat):
        head = kv_head * repeat + turn
        teacher_side = head_base(row, 3, item, head // teacher_repeat, TEACHER_TYPE)
        teacher_keys = rows_at(
            teacher_side, key_at, teacher_dim, BLOCK_TEACHER_DIM, TEACHER_ALIGN, CHUNK
        )
        key_rows = (student_keys, teacher_keys)
        queries = query_sides(row, item, head, TYPE, TEACHER_TYPE)
        for start in range(first, end, BLOCK_QUERY):
            o_query = start + tl.arange(0, BLOCK_QUERY)
            m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
            seen = visible(
                o_query[None, :], o_key[:, None], m_key[:, None], window, CAUSAL, WINDOWED
            )
            query_at = (o_query, m_query)
            query_rows = both_rows(
                queries, query_at, sizes, BLOCK_DIM, BLOCK_TEACHER_DIM, ALIGN, TEACHER_ALIGN, CHUNK
            )
            student_scores, teacher_scores = both_tiles(
                key_rows, query_rows, sizes, CHUNK, SUM_TYPE, ALIGN, TEACHER_ALIGN, SCORE_PRECISION
            )
            max_student, log_student, max_teacher, log_teacher, constant = load_stats(
                stats, pair, item, head, batch, heads, tokens, o_query, STATS
            )
            student_capped = soft_cap(student_scores, student_cap, STUDENT_CAP)
            teacher_capped = soft_cap(teacher_scores, teacher_cap, TEACHER_CAP)
            slopes = row_slopes(
                student_capped - max_student[None, :] - log_student[None, :],
                teacher_capped - max_teacher[None, :] - log_teacher[None, :],
                constant[None, :],
                seen,
                KIND,
            )
            if STUDENT_CAP:
                slopes *= cap_slope(student_scores, student_cap)
            b_query = whole_rows(query_rows[0], dim, BLOCK_DIM, ALIGN, CHUNK)
            # dK_s = c_s (dL/dA)^T Q_s
            b_gradient += tl.dot(
                slopes.to(GRAD_TYPE), b_query.to(GRAD_TYPE), input_precision=GRAD_PRECISION
            )
    factor = sizes[0][1] * tl.load(upstream + pair * batch + item)
    o_dim = tl.arange(0, BLOCK_DIM)
    out = gradient + ((pair * batch + item) * kv_heads + kv_head) * tokens * dim
    o_out = o_key[:, None].to(tl.int64) * dim + o_dim[None, :]
    m_out = (o_key < tokens)[:, None] & (o_dim < dim)[None, :]
    tl.store(out + o_out, (b_gradient * factor).to(TYPE), mask=m_out)
