# mypy: ignore-errors
"""Triton kernel of attention divergences of short sequences: every score once, in one launch.

Arguments are those of `triton_kernels.py`.
"""

import triton
import triton.language as tl

from ..common.attention_jit import (
    head_rows,
    item_base,
    load_cap,
    load_sinks,
    store_head,
    valid_rows,
    visible,
)
from ..common.divergences_jit import add_exponentials, below, divergence_slopes
from ..common.soft_cap_jit import cap_slope
from .tile_jit import finished_constant, log_sums, outcome_terms, raw_sizes, seen_scores


@triton.jit
def _short_kernel(
    table,
    scales,
    caps,
    sinks,
    valid,
    weights,
    query_grad,
    key_grad,
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
    program_heads,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TEACHER_DIM: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    SINK: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    QUERY_TOKENS_FIRST: tl.constexpr,
    KEY_TOKENS_FIRST: tl.constexpr,
):
    """One program: `program_heads` query heads of one sequence, all that share their key heads.

    One block holds every key. Blocks of query rows of all heads follow each other in one loop, so
    that the next rows are on their way while these are compared. Writes `partials` and, with
    NEED_GRAD, both gradients and, with SINK, `sink_partials` `[pairs, batch, heads, blocks]`, the
    sum of the counted rows' slopes of the student's sink.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair = tl.program_id(1).to(tl.int64)
    programs = heads // program_heads
    item = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs * program_heads
    row = table + pair * 16
    sizes, units, hidden = raw_sizes(scales, pair, dim, teacher_dim, STUDENT_CAP, TEACHER_CAP, BITS)
    student_cap = load_cap(caps, pair, 0, STUDENT_CAP)
    teacher_cap = load_cap(caps, pair, 1, TEACHER_CAP)
    queries = item_base(row, 0, item, TYPE)
    keys = item_base(row, 1, item, TYPE)
    teacher_queries = item_base(row, 2, item, TEACHER_TYPE)
    teacher_keys = item_base(row, 3, item, TEACHER_TYPE)
    repeat = heads // kv_heads
    teacher_repeat = heads // teacher_kv_heads
    blocks = tl.cdiv(tokens, BLOCK_QUERY)
    o_key = tl.arange(0, BLOCK_KEY)
    m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
    # cosine needs the log of |e^a| alone: half the log-sum-exp of doubled scores
    power: tl.constexpr = 2.0 if KIND == "cosine" else 1.0
    weight = tl.load(weights + item)
    slope = tl.load(scales + pair * 2) * weight
    b_key_grad = tl.zeros([BLOCK_KEY, BLOCK_DIM], SUM_TYPE)
    total = tl.zeros([BLOCK_QUERY], SUM_TYPE)
    for step in range(0, program_heads * blocks):
        head = first + step // blocks
        kv_head = head // repeat
        o_query = step % blocks * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
        m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
        b_query = head_rows(queries, head, (o_query, m_query), dim, BLOCK_DIM, ALIGN)
        b_key = head_rows(keys, kv_head, (o_key, m_key), dim, BLOCK_DIM, ALIGN)
        b_teacher_query = head_rows(
            teacher_queries, head, (o_query, m_query), teacher_dim, BLOCK_TEACHER_DIM, TEACHER_ALIGN
        )
        b_teacher_key = head_rows(
            teacher_keys,
            head // teacher_repeat,
            (o_key, m_key),
            teacher_dim,
            BLOCK_TEACHER_DIM,
            TEACHER_ALIGN,
        )
        student_scores = tl.dot(b_query, tl.trans(b_key), input_precision=SCORE_PRECISION)
        teacher_scores = tl.dot(
            b_teacher_query, tl.trans(b_teacher_key), input_precision=SCORE_PRECISION
        )
        student_scores = (student_scores * sizes[0][1]).to(SUM_TYPE)
        teacher_scores = (teacher_scores * sizes[1][1]).to(SUM_TYPE)
        seen = visible(o_query[:, None], o_key[None, :], m_key[None, :], window, CAUSAL, WINDOWED)
        student_seen = seen_scores(
            student_scores, student_cap, seen, hidden[0], STUDENT_CAP, MASKED
        )
        teacher_seen = seen_scores(
            teacher_scores, teacher_cap, seen, hidden[1], TEACHER_CAP, MASKED
        )
        nothing = tl.zeros([BLOCK_QUERY], SUM_TYPE)
        lowest = tl.full([BLOCK_QUERY], float("-inf"), SUM_TYPE)
        max_student, sum_student, max_teacher, sum_teacher = lowest, nothing, lowest, nothing
        if SINK:
            student_sink, teacher_sink = load_sinks(sinks, pair, head, heads, BITS)
            max_student, sum_student = nothing + power * student_sink, nothing + 1.0
            max_teacher, sum_teacher = nothing + power * teacher_sink, nothing + 1.0
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
        log_p = below(student_seen, units[0], max_student[:, None]) - log_student[:, None]
        log_t = below(teacher_seen, units[1], max_teacher[:, None]) - log_teacher[:, None]
        terms, weighted, point, p = outcome_terms(log_p, log_t, KIND, BITS)
        value = tl.sum(terms, 1)
        constant = value
        if KIND != "kl" and KIND != "cross_entropy":
            constant = tl.sum(weighted, 1)
        if SINK:
            sink_value, sink_constant, sink_point, sink_share = outcome_terms(
                student_sink - max_student - log_student,
                teacher_sink - max_teacher - log_teacher,
                KIND,
                BITS,
            )
            value += sink_value
            constant += sink_constant
        constant = finished_constant(value, constant, KIND)
        total += tl.where(m_query, value, 0.0)
        if NEED_GRAD:
            slopes = divergence_slopes(p, point, constant[:, None], (0.5, 0.5), KIND)
            if STUDENT_CAP:
                slopes *= cap_slope(student_scores, student_cap)
            b_slopes = slopes.to(GRAD_TYPE)
            # dQ_s = c_s (dL/dA) K_s
            b_query_grad = tl.dot(b_slopes, b_key.to(GRAD_TYPE), input_precision=GRAD_PRECISION)
            if SINK:
                sink_slopes = divergence_slopes(sink_share, sink_point, constant, (0.5, 0.5), KIND)
                out = sink_partials + ((pair * batch + item) * heads + head) * blocks
                sums = tl.sum(tl.where(m_query, sink_slopes, 0.0), 0) * weight
                tl.store(out + step % blocks, sums)
                # queries of 0 on both sides meet sinks that differ
                b_query_grad = tl.where(m_query[:, None], b_query_grad, 0.0)
            # without sinks, rows that are not counted have queries of 0 on both sides
            store_head(
                query_grad + (pair * batch + item) * heads * tokens * dim,
                b_query_grad * slope,
                (o_query, o_query < tokens),
                head,
                heads,
                tokens,
                dim,
                BLOCK_DIM,
                ALIGN,
                QUERY_TOKENS_FIRST,
            )
            fresh = (step % (repeat * blocks)) == 0
            b_key_grad = tl.where(fresh, 0.0, b_key_grad)
            # dK_s = c_s (dL/dA)^T Q_s
            b_key_grad = tl.dot(
                tl.trans(b_slopes),
                b_query.to(GRAD_TYPE),
                acc=b_key_grad,
                out_dtype=SUM_TYPE,
                input_precision=GRAD_PRECISION,
            )
            if (step + 1) % (repeat * blocks) == 0:
                store_head(
                    key_grad + (pair * batch + item) * kv_heads * tokens * dim,
                    b_key_grad * slope,
                    (o_key, o_key < tokens),
                    kv_head,
                    kv_heads,
                    tokens,
                    dim,
                    BLOCK_DIM,
                    ALIGN,
                    KEY_TOKENS_FIRST,
                )
    tl.store(partials + pair * tl.num_programs(0) + tl.program_id(0), tl.sum(total, 0))
