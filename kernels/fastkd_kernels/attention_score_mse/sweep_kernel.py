# mypy: ignore-errors
"""Triton kernel of attention-score MSE that forms every score once, of sequences of any length.

Arguments are those of `triton_kernels.py`.
"""

import triton
import triton.language as tl

from ..common.attention_jit import head_base, load_rows, sizes_of, store_head, valid_rows
from .short_kernel import difference


@triton.jit
def _sweep_kernel(
    table,
    scales,
    valid,
    factor,
    query_grad,
    key_grad,
    sums,
    partials,
    batch,
    heads,
    kv_heads,
    teacher_kv_heads,
    tokens,
    dim,
    teacher_dim,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TEACHER_DIM: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    PASSES: tl.constexpr,
    QUERY_TOKENS_FIRST: tl.constexpr,
    KEY_TOKENS_FIRST: tl.constexpr,
):
    """One program: a student key head of one sequence, against all query rows of its heads.

    A pass holds KEY_BLOCKS blocks of keys, each with its gradient, while blocks of query rows go
    by. The gradient of these grows over the passes, in `sums` `[pairs, batch, heads, blocks of
    rows, BLOCK_QUERY, BLOCK_DIM]`, where there is more than one.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair = tl.program_id(1).to(tl.int64)
    item = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % kv_heads
    row = table + pair * 16
    student, teacher = sizes_of(scales, pair, dim, teacher_dim)
    # D / c_s grows in one accumulator
    ratio = -teacher[1] / student[1]
    repeat = heads // kv_heads
    teacher_repeat = heads // teacher_kv_heads
    key_base, key_stride = head_base(row, 1, item, kv_head, TYPE)
    if NEED_GRAD:
        # dL/dA = factor D, dA/dQ_s = c_s K_s
        slope = student[1] * student[1] * tl.load(factor)
    squares = tl.zeros([BLOCK_QUERY], dtype=SUM_TYPE)
    query_blocks = tl.cdiv(tokens, BLOCK_QUERY)
    o_sum = tl.arange(0, BLOCK_QUERY)[:, None] * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]
    for first in range(0, tokens if PASSES > 1 else 1, KEY_BLOCKS * BLOCK_KEY):
        stop = first + KEY_BLOCKS * BLOCK_KEY
        b_keys = ()
        key_grads = ()
        for n in tl.static_range(KEY_BLOCKS):
            o_key = first + n * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
            m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
            b_key = load_rows(key_base, o_key, m_key, key_stride, dim, BLOCK_DIM, ALIGN)
            b_keys += (b_key,)
            key_grads += (tl.zeros([BLOCK_KEY, BLOCK_DIM], dtype=SUM_TYPE),)
        for head in range(kv_head * repeat, (kv_head + 1) * repeat):
            query_base, query_stride = head_base(row, 0, item, head, TYPE)
            teacher_base, teacher_stride = head_base(row, 2, item, head, TEACHER_TYPE)
            teacher_side = head_base(row, 3, item, head // teacher_repeat, TEACHER_TYPE)
            # transposed here, they stay in shared memory while the inner loop turns
            b_teacher_keys = ()
            for n in tl.static_range(KEY_BLOCKS):
                o_key = first + n * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
                m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
                b_teacher_key = load_rows(
                    teacher_side[0],
                    o_key,
                    m_key,
                    teacher_side[1],
                    teacher_dim,
                    BLOCK_TEACHER_DIM,
                    TEACHER_ALIGN,
                )
                b_teacher_keys += (tl.trans(b_teacher_key),)
            head_rows = ((pair * batch + item) * heads + head) * query_blocks * BLOCK_QUERY
            # blocks of rows before these keys see none of them
            start = first // BLOCK_QUERY if CAUSAL else 0
            for block in range(start, query_blocks):
                o_query = block * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
                m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
                b_query = load_rows(
                    query_base, o_query, m_query, query_stride, dim, BLOCK_DIM, ALIGN
                )
                b_teacher_query = load_rows(
                    teacher_base,
                    o_query,
                    m_query,
                    teacher_stride,
                    teacher_dim,
                    BLOCK_TEACHER_DIM,
                    TEACHER_ALIGN,
                )
                b_query_grad = tl.zeros([BLOCK_QUERY, BLOCK_DIM], dtype=SUM_TYPE)
                grown = ()
                for n in tl.static_range(KEY_BLOCKS):
                    tile = difference(
                        (b_query, b_teacher_query),
                        (tl.trans(b_keys[n]), b_teacher_keys[n]),
                        ratio,
                        SUM_TYPE,
                        SCORE_PRECISION,
                    )
                    if CAUSAL:
                        o_key = first + n * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
                        tile = tl.where(o_query[:, None] >= o_key[None, :], tile, 0.0)
                    squares += tl.sum(tile * tile, 1)
                    if NEED_GRAD:
                        b_tile = tile.to(GRAD_TYPE)
                        # dQ_s = D K_s
                        b_query_grad = tl.dot(
                            b_tile,
                            b_keys[n].to(GRAD_TYPE),
                            acc=b_query_grad,
                            input_precision=GRAD_PRECISION,
                        )
                        # dK_s = D^T Q_s
                        b_key_grad = tl.dot(
                            tl.trans(b_tile),
                            b_query.to(GRAD_TYPE),
                            acc=key_grads[n],
                            input_precision=GRAD_PRECISION,
                        )
                        grown += (b_key_grad,)
                if NEED_GRAD:
                    key_grads = grown
                    seen = min(tokens, (block + 1) * BLOCK_QUERY) if CAUSAL else tokens
                    if PASSES > 1:
                        where = sums + (head_rows + block * BLOCK_QUERY) * BLOCK_DIM + o_sum
                        if first > 0:
                            b_query_grad += tl.load(where)
                        if stop < seen:
                            tl.store(where, b_query_grad)
                    if stop >= seen:
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
        if NEED_GRAD:
            for n in tl.static_range(KEY_BLOCKS):
                o_key = first + n * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
                store_head(
                    key_grad + (pair * batch + item) * kv_heads * tokens * dim,
                    key_grads[n] * slope,
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
