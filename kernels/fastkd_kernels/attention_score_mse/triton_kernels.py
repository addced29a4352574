# mypy: ignore-errors
"""Triton kernels of attention-score MSE in tiles.

Sizes: `tokens`, `heads`, key heads `kv_heads` of the student and `teacher_kv_heads`, head sizes
`dim` of the student and `teacher_dim`. Prefixes: `o_` offsets, `m_` mask, `b_` block of values.

Row `pair` of `table` `[pairs, 16]` int64 holds, for the student's query and key and the teacher's
query and key: address, then strides of batch, head and token. `scales` is `[pairs, 2]`, student
and teacher. `valid` is uint8 `[2, batch, tokens]`: query rows, keys. With CAUSAL, a query row
sees the keys of its own `chunk_tokens` tokens only; `gram_kernels.py` does the others.
"""

import triton
import triton.language as tl

from ..common.attention_jit import chunked_product, head_base, load_rows, valid_rows


@triton.jit
def score_difference(
    b_query, b_key, b_teacher_query, b_teacher_key, scale, teacher_scale, PRECISION: tl.constexpr
):
    """`c_s Q_s K_s^T - c_t Q_t K_t^T` of one tile, `[queries, keys]`."""
    student_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
    teacher_scores = tl.dot(b_teacher_query, tl.trans(b_teacher_key), input_precision=PRECISION)
    return student_scores * scale - teacher_scores * teacher_scale


@triton.jit
def _tiles_fwd_kernel(
    table,
    scales,
    valid,
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
    WRITE_QUERY: tl.constexpr,
    WRITE_KEY: tl.constexpr,
):
    """One program: one block of keys of one student key head, against all its query rows.

    Writes `partials` `[pairs, programs]` and, with WRITE_KEY, `key_grad`
    `[pairs, batch, kv_heads, tokens, dim]`. WRITE_QUERY also writes `query_grad`
    `[pairs, batch, heads, tokens, dim]`, complete only where one block holds every key, and needs
    CHUNK 0.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair = tl.program_id(1).to(tl.int64)
    key_blocks = tl.cdiv(tokens, BLOCK_KEY)
    block = tl.program_id(0) % key_blocks
    item = (tl.program_id(0) // key_blocks // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // key_blocks % kv_heads).to(tl.int64)
    row = table + pair * 16
    scale = tl.load(scales + pair * 2)
    teacher_scale = tl.load(scales + pair * 2 + 1)
    o_dim = tl.arange(0, BLOCK_DIM)
    o_key = block * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
    key_base, key_stride = head_base(row, 1, item, kv_head, TYPE)
    if CHUNK == 0:
        b_key = load_rows(key_base, o_key, m_key, key_stride, dim, BLOCK_DIM, ALIGN)
    repeat = heads // kv_heads
    teacher_repeat = heads // teacher_kv_heads
    b_key_grad = tl.zeros([BLOCK_KEY, BLOCK_DIM], dtype=SUM_TYPE)
    # summed over the queries of a tile: over its keys, sm_90 would run out of registers
    squares = tl.zeros([BLOCK_KEY], dtype=SUM_TYPE)
    first = 0
    last = tokens
    if CAUSAL:
        # query blocks that end before this key block see none of it
        first = block * BLOCK_KEY // BLOCK_QUERY * BLOCK_QUERY
        last = min(tokens, (block * BLOCK_KEY // chunk_tokens + 1) * chunk_tokens)
    for turn in range(0, repeat):
        head = kv_head * repeat + turn
        teacher_key_base, teacher_key_stride = head_base(
            row, 3, item, head // teacher_repeat, TEACHER_TYPE
        )
        if CHUNK == 0:
            b_teacher_key = load_rows(
                teacher_key_base,
                o_key,
                m_key,
                teacher_key_stride,
                teacher_dim,
                BLOCK_TEACHER_DIM,
                TEACHER_ALIGN,
            )
        query_base, query_stride = head_base(row, 0, item, head, TYPE)
        teacher_query_base, teacher_query_stride = head_base(row, 2, item, head, TEACHER_TYPE)
        for start in range(first, last, BLOCK_QUERY):
            o_query = start + tl.arange(0, BLOCK_QUERY)
            m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
            if CHUNK > 0:
                student_scores = chunked_product(
                    query_base,
                    o_query,
                    m_query,
                    query_stride,
                    key_base,
                    o_key,
                    m_key,
                    key_stride,
                    dim,
                    BLOCK_QUERY,
                    BLOCK_KEY,
                    CHUNK,
                    SUM_TYPE,
                    ALIGN,
                    SCORE_PRECISION,
                )
                teacher_scores = chunked_product(
                    teacher_query_base,
                    o_query,
                    m_query,
                    teacher_query_stride,
                    teacher_key_base,
                    o_key,
                    m_key,
                    teacher_key_stride,
                    teacher_dim,
                    BLOCK_QUERY,
                    BLOCK_KEY,
                    CHUNK,
                    SUM_TYPE,
                    TEACHER_ALIGN,
                    SCORE_PRECISION,
                )
                tile = student_scores * scale - teacher_scores * teacher_scale
            else:
                b_query = load_rows(
                    query_base, o_query, m_query, query_stride, dim, BLOCK_DIM, ALIGN
                )
                b_teacher_query = load_rows(
                    teacher_query_base,
                    o_query,
                    m_query,
                    teacher_query_stride,
                    teacher_dim,
                    BLOCK_TEACHER_DIM,
                    TEACHER_ALIGN,
                )
                tile = score_difference(
                    b_query,
                    b_key,
                    b_teacher_query,
                    b_teacher_key,
                    scale,
                    teacher_scale,
                    SCORE_PRECISION,
                )
            if CAUSAL:
                tile = tl.where(o_query[:, None] >= o_key[None, :], tile, 0.0)
            squares += tl.sum(tile * tile, 0)
            b_tile = tile.to(GRAD_TYPE)
            if WRITE_KEY:
                if CHUNK > 0:
                    b_query = load_rows(
                        query_base, o_query, m_query, query_stride, dim, BLOCK_DIM, ALIGN
                    )
                # dK_s = D^T Q_s
                b_key_grad += tl.dot(
                    tl.trans(b_tile), b_query.to(GRAD_TYPE), input_precision=GRAD_PRECISION
                )
            if WRITE_QUERY:
                # dQ_s = D K_s
                b_out = tl.dot(b_tile, b_key.to(GRAD_TYPE), input_precision=GRAD_PRECISION) * scale
                out = query_grad + ((pair * batch + item) * heads + head) * tokens * dim
                o_out = o_query[:, None].to(tl.int64) * dim + o_dim[None, :]
                m_out = (o_query < tokens)[:, None] & (o_dim < dim)[None, :]
                tl.store(out + o_out, b_out, mask=m_out)
    if WRITE_KEY:
        out = key_grad + ((pair * batch + item) * kv_heads + kv_head) * tokens * dim
        o_out = o_key[:, None].to(tl.int64) * dim + o_dim[None, :]
        m_out = (o_key < tokens)[:, None] & (o_dim < dim)[None, :]
        tl.store(out + o_out, b_key_grad * scale, mask=m_out)
    tl.store(partials + pair * tl.num_programs(0) + tl.program_id(0), tl.sum(squares, 0))


@triton.jit
def _tiles_bwd_dq_kernel(
    table,
    scales,
    valid,
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
):
    """One program: one block of query rows of one head, against all keys that it sees.

    Writes `query_grad` `[pairs, batch, heads, tokens, dim]`.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair = tl.program_id(1).to(tl.int64)
    query_blocks = tl.cdiv(tokens, BLOCK_QUERY)
    block = tl.program_id(0) % query_blocks
    item = (tl.program_id(0) // query_blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // query_blocks % heads).to(tl.int64)
    row = table + pair * 16
    scale = tl.load(scales + pair * 2)
    teacher_scale = tl.load(scales + pair * 2 + 1)
    o_query = block * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
    query_base, query_stride = head_base(row, 0, item, head, TYPE)
    teacher_query_base, teacher_query_stride = head_base(row, 2, item, head, TEACHER_TYPE)
    if CHUNK == 0:
        b_query = load_rows(query_base, o_query, m_query, query_stride, dim, BLOCK_DIM, ALIGN)
        b_teacher_query = load_rows(
            teacher_query_base,
            o_query,
            m_query,
            teacher_query_stride,
            teacher_dim,
            BLOCK_TEACHER_DIM,
            TEACHER_ALIGN,
        )
    key_base, key_stride = head_base(row, 1, item, head // (heads // kv_heads), TYPE)
    teacher_key_base, teacher_key_stride = head_base(
        row, 3, item, head // (heads // teacher_kv_heads), TEACHER_TYPE
    )
    b_query_grad = tl.zeros([BLOCK_QUERY, BLOCK_DIM], dtype=SUM_TYPE)
    first = 0
    last = tokens
    if CAUSAL:
        first = block * BLOCK_QUERY // chunk_tokens * chunk_tokens
        last = min(tokens, (block + 1) * BLOCK_QUERY)
    for start in range(first, last, BLOCK_KEY):
        o_key = start + tl.arange(0, BLOCK_KEY)
        m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
        b_key = load_rows(key_base, o_key, m_key, key_stride, dim, BLOCK_DIM, ALIGN)
        if CHUNK > 0:
            student_scores = chunked_product(
                query_base,
                o_query,
                m_query,
                query_stride,
                key_base,
                o_key,
                m_key,
                key_stride,
                dim,
                BLOCK_QUERY,
                BLOCK_KEY,
                CHUNK,
                SUM_TYPE,
                ALIGN,
                SCORE_PRECISION,
            )
            teacher_scores = chunked_product(
                teacher_query_base,
                o_query,
                m_query,
                teacher_query_stride,
                teacher_key_base,
                o_key,
                m_key,
                teacher_key_stride,
                teacher_dim,
                BLOCK_QUERY,
                BLOCK_KEY,
                CHUNK,
                SUM_TYPE,
                TEACHER_ALIGN,
                SCORE_PRECISION,
            )
            tile = student_scores * scale - teacher_scores * teacher_scale
        else:
            b_teacher_key = load_rows(
                teacher_key_base,
                o_key,
                m_key,
                teacher_key_stride,
                teacher_dim,
                BLOCK_TEACHER_DIM,
                TEACHER_ALIGN,
            )
            tile = score_difference(
                b_query,
                b_key,
                b_teacher_query,
                b_teacher_key,
                scale,
                teacher_scale,
                SCORE_PRECISION,
            )
        if CAUSAL:
            tile = tl.where(o_query[:, None] >= o_key[None, :], tile, 0.0)
        # dQ_s = D K_s
        b_query_grad += tl.dot(
            tile.to(GRAD_TYPE), b_key.to(GRAD_TYPE), input_precision=GRAD_PRECISION
        )
    o_dim = tl.arange(0, BLOCK_DIM)
    out = query_grad + ((pair * batch + item) * heads + head) * tokens * dim
    o_out = o_query[:, None].to(tl.int64) * dim + o_dim[None, :]
    m_out = (o_query < tokens)[:, None] & (o_dim < dim)[None, :]
    tl.store(out + o_out, b_query_grad * scale, mask=m_out)
