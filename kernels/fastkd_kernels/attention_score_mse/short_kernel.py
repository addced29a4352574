# mypy: ignore-errors
"""Triton kernel of attention-score MSE of short sequences: every score once, in one launch.

Arguments are those of `triton_kernels.py`.
"""

import triton
import triton.language as tl

from ..common.attention_jit import head_rows, item_base, sizes_of, store_head, valid_rows


@triton.jit
def difference(left, right, ratio, SUM_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """`D / c_s` of one tile, grown in one accumulator.

    `left` `[rows, dim]` and `right` `[dim, columns]` are of student and teacher; `ratio` is
    `-c_t / c_s`.
    """
    tile = tl.dot(left[1], right[1], input_precision=PRECISION)
    tile = (tile * ratio).to(SUM_TYPE)
    return tl.dot(left[0], right[0], acc=tile, input_precision=PRECISION)


@triton.jit
def _short_kernel(
    table,
    scales,
    valid,
    factor,
    query_grad,
    key_grad,
    partials,
    batch,
    heads,
    kv_heads,
    teacher_kv_heads,
    tokens,
    dim,
    teacher_dim,
    program_heads,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
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
    NEED_GRAD: tl.constexpr,
    QUERY_TOKENS_FIRST: tl.constexpr,
    KEY_TOKENS_FIRST: tl.constexpr,
):
    """One program: `program_heads` query heads of one sequence, all that share their key heads.

    One block holds every key. Blocks of query rows of all heads follow each other in one loop, so
    that the next rows are on their way while these are multiplied.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair = tl.program_id(1).to(tl.int64)
    programs = heads // program_heads
    item = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs * program_heads
    row = table + pair * 16
    student, teacher = sizes_of(scales, pair, dim, teacher_dim)
    ratio = -teacher[1] / student[1]
    queries = item_base(row, 0, item, TYPE)
    keys = item_base(row, 1, item, TYPE)
    teacher_queries = item_base(row, 2, item, TEACHER_TYPE)
    teacher_keys = item_base(row, 3, item, TEACHER_TYPE)
    repeat = heads // kv_heads
    teacher_repeat = heads // teacher_kv_heads
    blocks = tl.cdiv(tokens, BLOCK_QUERY)
    o_key = tl.arange(0, BLOCK_KEY)
    key_at = (o_key, valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK))
    if NEED_GRAD:
        # dL/dA = factor D, dA/dQ_s = c_s K_s
        slope = student[1] * student[1] * tl.load(factor)
    b_key_grad = tl.zeros([BLOCK_KEY, BLOCK_DIM], dtype=SUM_TYPE)
    squares = tl.zeros([BLOCK_KEY], dtype=SUM_TYPE)
    for step in range(0, program_heads * blocks):
        head = first + step // blocks
        kv_head = head // repeat
        o_query = step % blocks * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
        query_at = (o_query, valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK))
        b_query = head_rows(queries, head, query_at, dim, BLOCK_DIM, ALIGN)
        b_key = head_rows(keys, kv_head, key_at, dim, BLOCK_DIM, ALIGN)
        b_teacher_query = head_rows(
            teacher_queries, head, query_at, teacher_dim, BLOCK_TEACHER_DIM, TEACHER_ALIGN
        )
        b_teacher_key = head_rows(
            teacher_keys,
            head // teacher_repeat,
            key_at,
            teacher_dim,
            BLOCK_TEACHER_DIM,
            TEACHER_ALIGN,
        )
        tile = difference(
            (b_key, b_teacher_key),
            (tl.trans(b_query), tl.trans(b_teacher_query)),
            ratio,
            SUM_TYPE,
            SCORE_PRECISION,
        )
        if CAUSAL:
            tile = tl.where(o_query[None, :] >= o_key[:, None], tile, 0.0)
        squares += tl.sum(tile * tile, 1)
        if NEED_GRAD:
            b_tile = tile.to(GRAD_TYPE)
            # dQ_s = D K_s
            b_query_grad = tl.dot(
                tl.trans(b_tile), b_key.to(GRAD_TYPE), input_precision=GRAD_PRECISION
            )
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
            # dK_s = D^T Q_s
            b_key_grad = tl.dot(
                b_tile, b_query.to(GRAD_TYPE), acc=b_key_grad, input_precision=GRAD_PRECISION
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
    total = tl.sum(squares, 0) * student[1] * student[1]
    tl.store(partials + pair * tl.num_programs(0) + tl.program_id(0), total)
