# mypy: ignore-errors
"""Triton kernels of attention divergences: of sequences of any length, in up to three launches.

Sizes are those of `attention_score_mse/triton_kernels.py`, prefixes and the rows of `table` and
`valid` those of `common/attention_jit.py`; here `scales` are divided by the temperature, and valid
query rows are those that count. Logs are in bits with BITS. `stats`
`[pairs, 4 or 5, batch, heads, tokens]` holds, for each query row, the maximum of the student's
scores and the log of their sum of exponentials below it, the same of the teacher (cosine: half of
both, of the doubled scores) and, where the gradient needs one, the row's constant. Maximum and log
are kept apart because their sum would be rounded.

`caps` `[pairs, 2]` are soft caps, student and teacher, and `sinks` `[pairs, 2, heads]` the logits
that join every row's softmax; both are divided by the temperature. STUDENT_CAP, TEACHER_CAP and
SINK say which are there; the others are not read. MASKED says that a tile can have entries that no
row sees.

Gradients are those of the sum of all rows, each times `weights` `[batch]` of its batch item, and
laid out as `store_head` says: `[pairs, batch, heads, tokens, dim]` of queries, with `kv_heads` of
keys. `partials` `[pairs, programs]` are sums of rows' divergences, without weights.
"""

import triton
import triton.language as tl

from ..common.attention_jit import (
    both_rows,
    both_tiles,
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
    stat_base,
    stat_step,
    store_head,
    valid_rows,
    visible,
    whole_rows,
)
from ..common.divergences_jit import add_exponentials, below, divergence_slopes
from ..common.soft_cap_jit import cap_slope
from .tile_jit import (
    finished_constant,
    log_sums,
    outcome_terms,
    raw_sizes,
    seen_scores,
    slopes_of,
    sums_of,
)


@triton.jit
def _rows_kernel(
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
    BITS: tl.constexpr,
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
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    SINK: tl.constexpr,
    WRITE_STATS: tl.constexpr,
    WRITE_VALUES: tl.constexpr,
):
    """One program: one block of query rows of one head, against all keys that it sees.

    A sweep over the keys makes both log-sum-exps, `stats`. With WRITE_VALUES a second one makes
    sums that need the probabilities themselves: `partials` and the constants of the rows. A sink is
    seen before the first key.
    """
    pair, block, item, head = program_rows(heads, tokens, BLOCK_QUERY)
    row = table + pair * 16
    sizes, units, hidden = raw_sizes(scales, pair, dim, teacher_dim, STUDENT_CAP, TEACHER_CAP, BITS)
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
    # cosine needs the log of |e^a| alone: half the log-sum-exp of doubled scores
    power: tl.constexpr = 2.0 if KIND == "cosine" else 1.0
    nothing = tl.zeros([BLOCK_QUERY], SUM_TYPE)
    lowest = tl.full([BLOCK_QUERY], float("-inf"), SUM_TYPE)
    max_student, sum_student, max_teacher, sum_teacher = lowest, nothing, lowest, nothing
    if SINK:
        student_sink, teacher_sink = load_sinks(sinks, pair, head, heads, BITS)
        max_student, sum_student = nothing + power * student_sink, nothing + 1.0
        max_teacher, sum_teacher = nothing + power * teacher_sink, nothing + 1.0
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
        student_seen = seen_scores(
            student_scores, student_cap, seen, hidden[0], STUDENT_CAP, MASKED
        )
        teacher_seen = seen_scores(
            teacher_scores, teacher_cap, seen, hidden[1], TEACHER_CAP, MASKED
        )
        max_student, sum_student = add_exponentials(
            student_seen, power * units[0], hidden[0], max_student, sum_student, BITS
        )
        max_teacher, sum_teacher = add_exponentials(
            teacher_seen, power * units[1], hidden[1], max_teacher, sum_teacher, BITS
        )
    max_student, log_student = log_sums(
        max_student, sum_student, power * units[0], hidden[0], power, BITS
    )
    max_teacher, log_teacher = log_sums(
        max_teacher, sum_teacher, power * units[1], hidden[1], power, BITS
    )
    value = nothing
    constant = nothing
    if WRITE_VALUES:
        if SINK:
            value, constant, _, _ = outcome_terms(
                student_sink - max_student - log_student,
                teacher_sink - max_teacher - log_teacher,
                KIND,
                BITS,
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
            student_seen = seen_scores(
                student_scores, student_cap, seen, hidden[0], STUDENT_CAP, MASKED
            )
            teacher_seen = seen_scores(
                teacher_scores, teacher_cap, seen, hidden[1], TEACHER_CAP, MASKED
            )
            tile_value, tile_constant = sums_of(
                below(student_seen, units[0], max_student[:, None]) - log_student[:, None],
                below(teacher_seen, units[1], max_teacher[:, None]) - log_teacher[:, None],
                KIND,
                BITS,
            )
            value += tile_value
            constant += tile_constant
        constant = finished_constant(value, constant, KIND)
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
def _dq_kernel(
    table,
    scales,
    caps,
    sinks,
    valid,
    stats,
    weights,
    query_grad,
    sink_partials,
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
    GRAD_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
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
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    SINK: tl.constexpr,
    QUERY_TOKENS_FIRST: tl.constexpr,
):
    """One program: one block of query rows of one head, against all keys that it sees.

    Writes `query_grad`, with SINK `sink_partials` `[pairs, programs]`, the sum of the counted rows'
    slopes of the student's sink, and, of kinds whose rows have no constant, `partials`.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair, block, item, head = program_rows(heads, tokens, BLOCK_QUERY)
    row = table + pair * 16
    sizes, units, hidden = raw_sizes(scales, pair, dim, teacher_dim, STUDENT_CAP, TEACHER_CAP, BITS)
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
    value = tl.zeros([BLOCK_QUERY], SUM_TYPE)
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
        student_seen = seen_scores(
            student_scores, student_cap, seen, hidden[0], STUDENT_CAP, MASKED
        )
        teacher_seen = seen_scores(
            teacher_scores, teacher_cap, seen, hidden[1], TEACHER_CAP, MASKED
        )
        terms, _, point, p = outcome_terms(
            below(student_seen, units[0], max_student[:, None]) - log_student[:, None],
            below(teacher_seen, units[1], max_teacher[:, None]) - log_teacher[:, None],
            KIND,
            BITS,
        )
        if STATS == 4:
            value += tl.sum(terms, 1)
        slopes = divergence_slopes(p, point, constant[:, None], (0.5, 0.5), KIND)
        if STUDENT_CAP:
            slopes *= cap_slope(student_scores, student_cap)
        b_key = whole_rows(key_rows[0], dim, BLOCK_DIM, ALIGN, CHUNK)
        # dQ_s = c_s (dL/dA) K_s
        b_gradient += tl.dot(
            slopes.to(GRAD_TYPE), b_key.to(GRAD_TYPE), input_precision=GRAD_PRECISION
        )
    weight = tl.load(weights + item)
    program = pair * tl.num_programs(0) + tl.program_id(0)
    if SINK:
        student_sink, teacher_sink = load_sinks(sinks, pair, head, heads, BITS)
        sink_value, _, sink_point, sink_share = outcome_terms(
            student_sink - max_student - log_student,
            teacher_sink - max_teacher - log_teacher,
            KIND,
            BITS,
        )
        value += sink_value
        sink_slopes = divergence_slopes(sink_share, sink_point, constant, (0.5, 0.5), KIND)
        tl.store(sink_partials + program, tl.sum(tl.where(m_query, sink_slopes, 0.0), 0) * weight)
        # queries of 0 on both sides meet sinks that differ
        b_gradient = tl.where(m_query[:, None], b_gradient, 0.0)
    if STATS == 4:
        tl.store(partials + program, tl.sum(tl.where(m_query, value, 0.0), 0))
    # without sinks, rows that are not counted have queries of 0 on both sides, so no slope
    store_head(
        query_grad + (pair * batch + item) * heads * tokens * dim,
        b_gradient * (tl.load(scales + pair * 2) * weight),
        (o_query, o_query < tokens),
        head,
        heads,
        tokens,
        dim,
        BLOCK_DIM,
        ALIGN,
        QUERY_TOKENS_FIRST,
    )


@triton.jit
def _dk_kernel(
    table,
    scales,
    caps,
    valid,
    stats,
    weights,
    key_grad,
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
    BITS: tl.constexpr,
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
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    KEY_TOKENS_FIRST: tl.constexpr,
):
    """One program: one block of keys of one student key head, against all rows that see it.

    Tiles are `[keys, queries]`. Writes `key_grad`, summed over the query heads that share the key
    head.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair, block, item, kv_head = program_rows(kv_heads, tokens, BLOCK_KEY)
    row = table + pair * 16
    sizes, units, hidden = raw_sizes(scales, pair, dim, teacher_dim, STUDENT_CAP, TEACHER_CAP, BITS)
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
            student_seen = seen_scores(
                student_scores, student_cap, seen, hidden[0], STUDENT_CAP, MASKED
            )
            teacher_seen = seen_scores(
                teacher_scores, teacher_cap, seen, hidden[1], TEACHER_CAP, MASKED
            )
            slopes = slopes_of(
                below(student_seen, units[0], max_student[None, :]) - log_student[None, :],
                below(teacher_seen, units[1], max_teacher[None, :]) - log_teacher[None, :],
                constant[None, :],
                KIND,
                BITS,
            )
            if STUDENT_CAP:
                slopes *= cap_slope(student_scores, student_cap)
            b_query = whole_rows(query_rows[0], dim, BLOCK_DIM, ALIGN, CHUNK)
            # dK_s = c_s (dL/dA)^T Q_s
            b_gradient += tl.dot(
                slopes.to(GRAD_TYPE), b_query.to(GRAD_TYPE), input_precision=GRAD_PRECISION
            )
    store_head(
        key_grad + (pair * batch + item) * kv_heads * tokens * dim,
        b_gradient * (tl.load(scales + pair * 2) * tl.load(weights + item)),
        (o_key, o_key < tokens),
        kv_head,
        kv_heads,
        tokens,
        dim,
        BLOCK_DIM,
        ALIGN,
        KEY_TOKENS_FIRST,
    )
