# mypy: ignore-errors
"""Triton kernels of attention-score MSE in tiles.

Sizes: `tokens`, `heads`, key heads `kv_heads` of the student and `teacher_kv_heads`, head sizes
`dim` of the student and `teacher_dim`. Prefixes: `o_` offsets, `m_` mask, `b_` block of values.

Row `pair` of `table` `[pairs, 16]` int64 holds, for the student's query and key and the teacher's
query and key: address, then strides of batch, head and token. `scales` is `[pairs, 2]`, student
and teacher. `valid` is uint8 `[2, batch, tokens]`: query rows, keys. With CAUSAL, a query row
sees the keys of its own `chunk_tokens` tokens only; `gram_kernels.py` does the others.

Gradients are those of the sum of squares times `factor`, a number on the device, and laid out as
`store_head` says: `[pairs, batch, heads, tokens, dim]` of queries, with `kv_heads` of keys.
"""

import triton
import triton.language as tl

from ..common.attention_jit import (
    both_rows,
    both_tiles,
    head_base,
    key_sides,
    program_rows,
    query_sides,
    rows_at,
    sizes_of,
    store_head,
    valid_rows,
    whole_rows,
)


@triton.jit
def _tiles_fwd_kernel(
    table,
    scales,
    valid,
    factor,
    key_grad,
    partials,
    batch,
    heads,
    kv_heads,
    teacher_kv_heads,
    tokens,
    dim,
    teacher_dim,
    chunk_tokens,
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
    CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WRITE_KEY: tl.constexpr,
    KEY_TOKENS_FIRST: tl.constexpr,
):
    """One program: one block of keys of one student key head, against all its query rows.

    Tiles are `[keys, queries]`, so that sums over queries and `D^T Q_s` stay in registers. Writes
    `partials` `[pairs, programs]` and, with WRITE_KEY, `key_grad`.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair, block, item, kv_head = program_rows(kv_heads, tokens, BLOCK_KEY)
    row = table + pair * 16
    sizes = sizes_of(scales, pair, dim, teacher_dim)
    o_key = block * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
    key_at = (o_key, m_key)
    student_keys = rows_at(
        head_base(row, 1, item, kv_head, TYPE), key_at, dim, BLOCK_DIM, ALIGN, CHUNK
    )
    repeat = heads // kv_heads
    teacher_repeat = heads // teacher_kv_heads
    b_key_grad = tl.zeros([BLOCK_KEY, BLOCK_DIM], dtype=SUM_TYPE)
    squares = tl.zeros([BLOCK_KEY], dtype=SUM_TYPE)
    if WRITE_KEY:
        # dL/dA = factor D, dA/dQ_s = c_s K_s
        slope = sizes[0][1] * tl.load(factor)
    first = 0
    last = tokens
    if CAUSAL:
        # query blocks that end before this key block see none of it
        first = block * BLOCK_KEY // BLOCK_QUERY * BLOCK_QUERY
        last = min(tokens, (block * BLOCK_KEY // chunk_tokens + 1) * chunk_tokens)
    for turn in range(0, repeat):
        head = kv_head * repeat + turn
        teacher_side = head_base(row, 3, item, head // teacher_repeat, TEACHER_TYPE)
        teacher_keys = rows_at(
            teacher_side, key_at, teacher_dim, BLOCK_TEACHER_DIM, TEACHER_ALIGN, CHUNK
        )
        key_rows = (student_keys, teacher_keys)
        queries = query_sides(row, item, head, TYPE, TEACHER_TYPE)
        for start in range(first, last, BLOCK_QUERY):
            o_query = start + tl.arange(0, BLOCK_QUERY)
            m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
            query_at = (o_query, m_query)
            query_rows = both_rows(
                queries, query_at, sizes, BLOCK_DIM, BLOCK_TEACHER_DIM, ALIGN, TEACHER_ALIGN, CHUNK
            )
            student_scores, teacher_scores = both_tiles(
                key_rows, query_rows, sizes, CHUNK, SUM_TYPE, ALIGN, TEACHER_ALIGN, SCORE_PRECISION
            )
            tile = student_scores - teacher_scores
            if CAUSAL:
                tile = tl.where(o_query[None, :] >= o_key[:, None], tile, 0.0)
            squares += tl.sum(tile * tile, 1)
            b_tile = tile.to(GRAD_TYPE)
            if WRITE_KEY:
                b_query = whole_rows(query_rows[0], dim, BLOCK_DIM, ALIGN, CHUNK)
                # dK_s = D^T Q_s
                b_key_grad += tl.dot(b_tile, b_query.to(GRAD_TYPE), input_precision=GRAD_PRECISION)
    if WRITE_KEY:
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
    tl.store(partials + pair * tl.num_programs(0) + tl.program_id(0), tl.sum(squares, 0))


@triton.jit
def _tiles_bwd_dq_kernel(
    table,
    scales,
    valid,
    factor,
    query_grad,
    batch,
    heads,
    kv_heads,
    teacher_kv_heads,
    tokens,
    dim,
    teacher_dim,
    chunk_tokens,
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
    CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERY_TOKENS_FIRST: tl.constexpr,
):
    """One program: one block of query rows of one head, against all keys that it sees.

    Writes `query_grad`.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair, block, item, head = program_rows(heads, tokens, BLOCK_QUERY)
    row = table + pair * 16
    sizes = sizes_of(scales, pair, dim, teacher_dim)
    o_query = block * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
    query_at = (o_query, m_query)
    queries = query_sides(row, item, head, TYPE, TEACHER_TYPE)
    query_rows = both_rows(
        queries, query_at, sizes, BLOCK_DIM, BLOCK_TEACHER_DIM, ALIGN, TEACHER_ALIGN, CHUNK
    )
    keys = key_sides(row, item, head, heads, kv_heads, teacher_kv_heads, TYPE, TEACHER_TYPE)
    b_query_grad = tl.zeros([BLOCK_QUERY, BLOCK_DIM], dtype=SUM_TYPE)
    first = 0
    last = tokens
    if CAUSAL:
        first = block * BLOCK_QUERY // chunk_tokens * chunk_tokens
        last = min(tokens, (block + 1) * BLOCK_QUERY)
    for start in range(first, last, BLOCK_KEY):
        o_key = start + tl.arange(0, BLOCK_KEY)
        m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
        key_at = (o_key, m_key)
        key_rows = both_rows(
            keys, key_at, sizes, BLOCK_DIM, BLOCK_TEACHER_DIM, ALIGN, TEACHER_ALIGN, CHUNK
        )
        student_scores, teacher_scores = both_tiles(
            query_rows, key_rows, sizes, CHUNK, SUM_TYPE, ALIGN, TEACHER_ALIGN, SCORE_PRECISION
        )
        tile = student_scores - teacher_scores
        if CAUSAL:
            tile = tl.where(o_query[:, None] >= o_key[None, :], tile, 0.0)
        b_key = whole_rows(key_rows[0], dim, BLOCK_DIM, ALIGN, CHUNK)
        # dQ_s = D K_s
        b_query_grad += tl.dot(
            tile.to(GRAD_TYPE), b_key.to(GRAD_TYPE), input_precision=GRAD_PRECISION
        )
    store_head(
        query_grad + (pair * batch + item) * heads * tokens * dim,
        b_query_grad * (sizes[0][1] * tl.load(factor)),
        (o_query, o_query < tokens),
        head,
        heads,
        tokens,
        dim,
        BLOCK_DIM,
        ALIGN,
        QUERY_TOKENS_FIRST,
    )
