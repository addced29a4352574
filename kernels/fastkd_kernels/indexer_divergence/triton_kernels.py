# mypy: ignore-errors
"""Triton kernels of the indexer's loss: the rows of a chunk are scored, reduced and multiplied.

Row `pair` of `table` `[pairs, 16]`, `valid` and prefixes are those of `common/attention_jit.py`,
with the indexer as the student; valid query rows are those that count. `weights` `[pairs, batch,
index_heads, tokens]` are the indexer's, in SUM_TYPE. `scales` `[pairs]` are the teacher's, `caps`
`[pairs]` its soft caps, which are read with CAP alone. `sums` `[pairs, batch, heads, tokens]` are
the log-sum-exps of the teacher's rows. Logs are in bits with BITS.

Rows of all items are numbered through, with `padded` for each, a multiple of ROWS; a chunk are
`rows` of them from `first`, also multiples of ROWS. `workspace` `[pairs, 2, rows, padded]` holds
the target's logs and the indexer's scores; then, in the place of the latter, their slopes.

Sizes: `heads` and `kv_heads` are the teacher's.
"""

import triton
import triton.language as tl

from ..common.attention_jit import (
    head_base,
    item_base,
    keys_seen,
    program_rows,
    rows_at,
    score_tile,
    store_head,
    valid_rows,
    visible,
    whole_rows,
)
from ..common.divergences_jit import (
    LN2,
    LOG2E,
    add_exponentials,
    below,
    hidden_score,
    log_sum,
    power_of,
    shift_of,
    terms_of,
)
from ..common.soft_cap_jit import soft_cap
from ..common.wide_loads import load_wide, store_wide


@triton.jit
def chunk_rows(first, local, padded):
    """Item, and row inside it, of row `local` of a chunk."""
    at = tl.cast(first, tl.int64) + local
    return at // padded, (at % padded).to(tl.int32)


@triton.jit
def workspace_rows(workspace, side: tl.constexpr, pair, rows, padded, o_local):
    """Addresses of rows of a chunk; `side` 0 is the target, 1 the indexer."""
    return workspace + ((pair * 2 + side) * rows + o_local.to(tl.int64)) * padded


@triton.jit
def head_at(side, head):
    """Address of one head of what `item_base` gave, and its stride between tokens."""
    return side[0] + head * side[1], side[2]


@triton.jit
def weights_at(weights, pair, item, batch, index_heads, tokens):
    """Address of the weights of an item's first index head."""
    return weights + (pair * batch + item) * index_heads * tokens


@triton.jit
def teacher_scale(scales, pair, CAP: tl.constexpr, BITS: tl.constexpr):
    """What multiplies the teacher's products, and what makes logs of them then.

    Capped ones are scaled first, since their cap is in their unit.
    """
    unit = tl.load(scales + pair)
    scale = 1.0
    if CAP:
        scale = unit
        unit = tl.full([], 1.0, unit.dtype)
    if BITS:
        unit *= LOG2E
    return scale, unit


@triton.jit
def _head_sums_kernel(
    table,
    scales,
    caps,
    valid,
    sums,
    batch,
    heads,
    kv_heads,
    tokens,
    teacher_dim,
    TEACHER_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_TEACHER_DIM: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAP: tl.constexpr,
):
    """One program: one block of query rows of one teacher head, against all keys that it sees.

    Writes `sums`.
    """
    pair, block, item, head = program_rows(heads, tokens, BLOCK_QUERY)
    row = table + pair * 16
    scale, unit = teacher_scale(scales, pair, CAP, BITS)
    hidden = hidden_score(unit)
    cap = tl.load(caps + pair)
    o_query = block * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
    query_side = head_base(row, 2, item, head, TEACHER_TYPE)
    key_side = head_base(row, 3, item, head // (heads // kv_heads), TEACHER_TYPE)
    queries = rows_at(
        query_side, (o_query, m_query), teacher_dim, BLOCK_TEACHER_DIM, TEACHER_ALIGN, CHUNK
    )
    maximum = tl.full([BLOCK_QUERY], float("-inf"), SUM_TYPE)
    total = tl.zeros([BLOCK_QUERY], SUM_TYPE)
    _first, end = keys_seen(block * BLOCK_QUERY, BLOCK_QUERY, tokens, 0, BLOCK_KEY, CAUSAL, False)
    for start in range(0, end, BLOCK_KEY):
        o_key = start + tl.arange(0, BLOCK_KEY)
        m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
        keys = rows_at(
            key_side, (o_key, m_key), teacher_dim, BLOCK_TEACHER_DIM, TEACHER_ALIGN, CHUNK
        )
        tile = score_tile(
            queries, keys, teacher_dim, scale, CHUNK, SUM_TYPE, TEACHER_ALIGN, SCORE_PRECISION
        )
        seen = visible(o_query[:, None], o_key[None, :], m_key[None, :], 0, CAUSAL, False)
        tile = tl.where(seen, soft_cap(tile, cap, CAP), hidden)
        maximum, total = add_exponentials(tile, unit, hidden, maximum, total, BITS)
    out = sums + ((pair * batch + item) * heads + head) * tokens + o_query
    shift = shift_of(maximum, hidden * unit)
    tl.store(out, shift + log_sum(total, BITS), mask=o_query < tokens)


@triton.jit
def _scores_kernel(
    table,
    scales,
    caps,
    weights,
    valid,
    sums,
    workspace,
    batch,
    index_heads,
    heads,
    kv_heads,
    tokens,
    dim,
    teacher_dim,
    padded,
    first,
    rows,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TEACHER_DIM: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAP: tl.constexpr,
):
    """One program: one tile of ROWS query rows and BLOCK_KEY keys, over all heads of both sides.

    Writes both halves of `workspace`. Tiles that no row sees stay as they are.
    """
    pair = tl.program_id(1).to(tl.int64)
    blocks = padded // BLOCK_KEY
    local = tl.program_id(0) // blocks * ROWS
    item, start = chunk_rows(first, local, padded)
    first_key = tl.program_id(0) % blocks * BLOCK_KEY
    row = table + pair * 16
    o_query = start + tl.arange(0, ROWS)
    o_key = first_key + tl.arange(0, BLOCK_KEY)
    m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
    m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
    is_seen = first_key < tokens
    if CAUSAL:
        is_seen = first_key < start + ROWS
    if is_seen:
        o_local = local + tl.arange(0, ROWS)
        scale, unit = teacher_scale(scales, pair, CAP, BITS)
        cap = tl.load(caps + pair)
        query_side = item_base(row, 2, item, TEACHER_TYPE)
        key_side = item_base(row, 3, item, TEACHER_TYPE)
        b_target = tl.zeros([ROWS, BLOCK_KEY], SUM_TYPE)
        repeat = heads // kv_heads
        of_item = sums + (pair * batch + item) * heads * tokens
        for head in range(0, heads):
            queries = rows_at(
                head_at(query_side, head),
                (o_query, m_query),
                teacher_dim,
                BLOCK_TEACHER_DIM,
                TEACHER_ALIGN,
                CHUNK,
            )
            keys = rows_at(
                head_at(key_side, head // repeat),
                (o_key, m_key),
                teacher_dim,
                BLOCK_TEACHER_DIM,
                TEACHER_ALIGN,
                CHUNK,
            )
            tile = score_tile(
                queries, keys, teacher_dim, scale, CHUNK, SUM_TYPE, TEACHER_ALIGN, SCORE_PRECISION
            )
            log_sums = tl.load(of_item + head * tokens + o_query, mask=o_query < tokens, other=0.0)
            capped = soft_cap(tile, cap, CAP)
            b_target += power_of(below(capped, unit, log_sums[:, None]), BITS)
        # a key that no head looks at has the least probability, not none
        b_target = tl.maximum(b_target, 1.17549435e-38, propagate_nan=tl.PropagateNan.ALL)
        b_target = tl.log2(b_target) if BITS else tl.log(b_target)
        out = workspace_rows(workspace, 0, pair, rows, padded, o_local)
        tl.store(out[:, None] + o_key[None, :], b_target)
        keys = rows_at(
            head_base(row, 1, item, 0, TYPE), (o_key, m_key), dim, BLOCK_DIM, ALIGN, CHUNK
        )
        b_scores = tl.zeros([ROWS, BLOCK_KEY], SUM_TYPE)
        index_side = item_base(row, 0, item, TYPE)
        of_heads = weights_at(weights, pair, item, batch, index_heads, tokens) + o_query
        for head in range(0, index_heads):
            side = head_at(index_side, head)
            queries = rows_at(side, (o_query, m_query), dim, BLOCK_DIM, ALIGN, CHUNK)
            tile = score_tile(queries, keys, dim, 1.0, CHUNK, SUM_TYPE, ALIGN, SCORE_PRECISION)
            b_weights = tl.load(of_heads + head * tokens, mask=m_query, other=0.0)
            # I = sum of w relu(q k)
            positive = tl.maximum(tile, 0.0, propagate_nan=tl.PropagateNan.ALL)
            b_scores += positive * b_weights[:, None]
        out = workspace_rows(workspace, 1, pair, rows, padded, o_local)
        tl.store(out[:, None] + o_key[None, :], b_scores)


@triton.jit
def _rows_kernel(
    valid,
    workspace,
    values,
    batch,
    tokens,
    padded,
    first,
    rows,
    SUM_TYPE: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    SMALL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    NEED_GRAD: tl.constexpr,
):
    """One program: BLOCK_ROW rows of a chunk, read twice: for both softmax divisors, then for KL.

    Writes `values` `[pairs, batch, tokens]`, 0 where a row does not count, and, with NEED_GRAD,
    `dL/dI` in the place of the indexer's scores, 0 where a key is hidden. A row that does not count
    has queries of 0 for what multiplies its slopes.
    """
    pair = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * BLOCK_ROW
    item, start = chunk_rows(first, local, padded)
    o_query = start + tl.arange(0, BLOCK_ROW)
    o_local = local + tl.arange(0, BLOCK_ROW)
    m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
    m_every = o_local < rows
    target_at = workspace_rows(workspace, 0, pair, rows, padded, o_local)
    scores_at = workspace_rows(workspace, 1, pair, rows, padded, o_local)
    end = padded
    if CAUSAL:
        end = (start // ROWS + 1) * ROWS
    # rows and columns of a workspace start at multiples of 16 numbers
    wide: tl.constexpr = 16 // (SUM_TYPE.primitive_bitwidth // 8)
    lowest = tl.full([BLOCK_ROW], float("-inf"), SUM_TYPE)
    nothing = tl.zeros([BLOCK_ROW], SUM_TYPE)
    max_t, sum_t, max_p, sum_p = lowest, nothing, lowest, nothing
    one = tl.full([], 1.0, SUM_TYPE)
    unit = one * LOG2E if BITS else one
    hidden = hidden_score(unit)
    for start_key in range(0, end, BLOCK_KEY):
        o_key = start_key + tl.arange(0, BLOCK_KEY)
        m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
        seen = visible(o_query[:, None], o_key[None, :], m_key[None, :], 0, CAUSAL, False)
        b_target = load_wide(target_at, m_every, o_key, end, wide)
        b_scores = load_wide(scores_at, m_every, o_key, end, wide)
        b_target, b_scores = tl.where(seen, b_target, hidden), tl.where(seen, b_scores, hidden)
        max_t, sum_t = add_exponentials(b_target, one, hidden, max_t, sum_t, BITS)
        max_p, sum_p = add_exponentials(b_scores, unit, hidden, max_p, sum_p, BITS)
    max_t, log_t_sum = shift_of(max_t, hidden), log_sum(sum_t, BITS)
    max_p, log_p_sum = shift_of(max_p, hidden * unit), log_sum(sum_p, BITS)
    value = nothing
    for start_key in range(0, end, BLOCK_KEY):
        o_key = start_key + tl.arange(0, BLOCK_KEY)
        m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
        seen = visible(o_query[:, None], o_key[None, :], m_key[None, :], 0, CAUSAL, False)
        b_target = load_wide(target_at, m_every, o_key, end, wide)
        b_scores = load_wide(scores_at, m_every, o_key, end, wide)
        log_t = below(b_target, one, max_t[:, None]) - log_t_sum[:, None]
        log_p = below(b_scores, unit, max_p[:, None]) - log_p_sum[:, None]
        # of hidden keys two equal logs, whose terms are 0
        log_t, log_p = tl.where(seen, log_t, 0.0), tl.where(seen, log_p, 0.0)
        # (p - t) - t log(p / t), which is small with the result, and p - t
        p, t = power_of(log_p, BITS), power_of(log_t, BITS)
        ratio = log_p - log_t
        if BITS:
            ratio *= LN2
        terms, _weighted, slopes, _p = terms_of(p, t, log_p, ratio, (0.5, 0.5), "kl", SMALL)
        value += tl.sum(terms, 1)
        if NEED_GRAD:
            m_out = m_every[:, None] & (o_key < end)[None, :]
            tl.store(scores_at[:, None] + o_key[None, :], slopes, mask=m_out)
    out = values + (pair * batch + item) * tokens + o_query
    tl.store(out, tl.where(m_query, value, 0.0), mask=m_every & (o_query < tokens))


@triton.jit
def _bwd_dq_kernel(
    table,
    weights,
    valid,
    workspace,
    to_query,
    to_weights,
    batch,
    index_heads,
    tokens,
    dim,
    padded,
    first,
    rows,
    TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program: one block of query rows of one index head, against all keys that it sees.

    Writes `to_query` `[pairs, batch, index_heads, tokens, dim]` and `to_weights` `[pairs, batch,
    tokens, index_heads]`.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair = tl.program_id(1).to(tl.int64)
    # neighbours share slopes and keys
    head = (tl.program_id(0) % index_heads).to(tl.int64)
    local = tl.program_id(0) // index_heads * BLOCK_QUERY
    item, start = chunk_rows(first, local, padded)
    row = table + pair * 16
    o_query = start + tl.arange(0, BLOCK_QUERY)
    m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
    query_side = head_base(row, 0, item, head, TYPE)
    key_side = head_base(row, 1, item, 0, TYPE)
    queries = rows_at(query_side, (o_query, m_query), dim, BLOCK_DIM, ALIGN, CHUNK)
    of_head = weights_at(weights, pair, item, batch, index_heads, tokens) + head * tokens
    b_weights = tl.load(of_head + o_query, mask=m_query, other=0.0)
    o_local = local + tl.arange(0, BLOCK_QUERY)
    slopes_at = workspace_rows(workspace, 1, pair, rows, padded, o_local)
    wide: tl.constexpr = 16 // (SUM_TYPE.primitive_bitwidth // 8)
    b_query = tl.zeros([BLOCK_QUERY, BLOCK_DIM], SUM_TYPE)
    weights_grad = tl.zeros([BLOCK_QUERY], SUM_TYPE)
    _first, end = keys_seen(start, BLOCK_QUERY, tokens, 0, BLOCK_KEY, CAUSAL, False)
    for start_key in range(0, end, BLOCK_KEY):
        o_key = start_key + tl.arange(0, BLOCK_KEY)
        m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
        keys = rows_at(key_side, (o_key, m_key), dim, BLOCK_DIM, ALIGN, CHUNK)
        tile = score_tile(queries, keys, dim, 1.0, CHUNK, SUM_TYPE, ALIGN, SCORE_PRECISION)
        slopes = load_wide(slopes_at, o_local < rows, o_key, padded, wide)
        slopes = tl.where(tile > 0.0, slopes, 0.0)
        # dL/dw = sum of dL/dI relu(q k)
        weights_grad += tl.sum(slopes * tile, 1)
        b_key = whole_rows(keys, dim, BLOCK_DIM, ALIGN, CHUNK)
        # dL/dq = w sum of dL/dI k where q k > 0
        b_query += tl.dot(slopes.to(GRAD_TYPE), b_key.to(GRAD_TYPE), input_precision=GRAD_PRECISION)
    m_row = o_query < tokens
    o_row = (pair * batch + item) * tokens + o_query
    tl.store(to_weights + o_row * index_heads + head, weights_grad, mask=m_row)
    store_head(
        to_query + (pair * batch + item) * index_heads * tokens * dim,
        b_query * b_weights[:, None],
        (o_query, m_row),
        head,
        index_heads,
        tokens,
        dim,
        BLOCK_DIM,
        ALIGN,
        False,
    )


@triton.jit
def _bwd_dk_kernel(
    table,
    weights,
    valid,
    workspace,
    partials,
    batch,
    index_heads,
    tokens,
    dim,
    padded,
    first,
    rows,
    parts,
    TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program: one block of keys of one item, against the chunk's rows of HEADS index heads.

    Tiles are `[keys, queries]`. Adds to `partials` `[pairs, parts, batch, tokens, dim]`.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(tokens, BLOCK_KEY)
    first_key = tl.program_id(0) % blocks * BLOCK_KEY
    part = tl.program_id(0) // blocks % parts
    before = first // padded
    item = (before + tl.program_id(0) // blocks // parts).to(tl.int64)
    # rows of this item that are in the chunk
    behind = (item * padded - first).to(tl.int32)
    begin, end = tl.maximum(-behind, 0), tl.minimum(rows - behind, tokens)
    if CAUSAL:
        begin = tl.maximum(begin, first_key // BLOCK_QUERY * BLOCK_QUERY)
    row = table + pair * 16
    o_key = first_key + tl.arange(0, BLOCK_KEY)
    m_key = valid_rows(valid, 1, item, batch, tokens, o_key, HAS_MASK)
    key_side = head_base(row, 1, item, 0, TYPE)
    query_side = item_base(row, 0, item, TYPE)
    of_heads = weights_at(weights, pair, item, batch, index_heads, tokens)
    keys = rows_at(key_side, (o_key, m_key), dim, BLOCK_DIM, ALIGN, CHUNK)
    wide: tl.constexpr = 16 // (SUM_TYPE.primitive_bitwidth // 8)
    b_gradient = tl.zeros([BLOCK_KEY, BLOCK_DIM], SUM_TYPE)
    for start in range(begin, end, BLOCK_QUERY):
        o_query = start + tl.arange(0, BLOCK_QUERY)
        m_query = valid_rows(valid, 0, item, batch, tokens, o_query, HAS_MASK)
        slopes_at = workspace_rows(workspace, 1, pair, rows, padded, o_query + behind)
        slopes = tl.trans(load_wide(slopes_at, o_query >= 0, o_key, padded, wide))
        for head in range(part * HEADS, tl.minimum(part * HEADS + HEADS, index_heads)):
            side = head_at(query_side, head)
            queries = rows_at(side, (o_query, m_query), dim, BLOCK_DIM, ALIGN, CHUNK)
            tile = score_tile(keys, queries, dim, 1.0, CHUNK, SUM_TYPE, ALIGN, SCORE_PRECISION)
            b_weights = tl.load(of_heads + head * tokens + o_query, mask=m_query, other=0.0)
            made = tl.where(tile > 0.0, slopes * b_weights[None, :], 0.0)
            b_query = whole_rows(queries, dim, BLOCK_DIM, ALIGN, CHUNK)
            # dL/dk = sum of w dL/dI q where q k > 0
            b_gradient += tl.dot(
                made.to(GRAD_TYPE), b_query.to(GRAD_TYPE), input_precision=GRAD_PRECISION
            )
    o_dim, m_out = tl.arange(0, BLOCK_DIM), o_key < tokens
    starts = partials + ((pair * parts + part) * batch + item) * tokens * dim + o_key * dim
    b_gradient += load_wide(starts, m_out, o_dim, dim, ALIGN)
    store_wide(starts, m_out, o_dim, dim, b_gradient, ALIGN)
