# mypy: ignore-errors
"""What the attention kernels share: loads of heads, masks, tiles of scores, statistics of rows.

Row `pair` of `table` `[pairs, 16]` int64 holds, for the student's query and key and the teacher's
query and key: address, then strides of batch, head and token. `valid` is uint8 `[2, batch,
tokens]`: query rows, keys. Prefixes: `o_` offsets, `m_` mask, `b_` block of values.
"""

import triton
import triton.language as tl

from .divergences_jit import LOG2E
from .wide_loads import load_wide, store_wide


@triton.jit
def load_rows(base, o_row, m_row, stride, dim, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Rows `[rows, BLOCK]` at `base`, 0 beyond `dim` and where `m_row` is False.

    ALIGN elements divide every row's start, and `dim`.
    """
    return load_wide(base + o_row * stride, m_row, tl.arange(0, BLOCK), dim, ALIGN)


@triton.jit
def gradient_rows(gradient, head, heads, tokens, dim, TOKENS_FIRST: tl.constexpr):
    """Address of one head in `[heads, tokens, dim]`, with TOKENS_FIRST in `[tokens, heads, dim]`,
    and its stride between tokens."""
    if TOKENS_FIRST:
        return gradient + head * dim, heads * dim
    else:
        return gradient + head * tokens * dim, dim


@triton.jit
def store_head(
    gradient,
    values,
    at,
    head,
    heads,
    tokens,
    dim,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    TOKENS_FIRST: tl.constexpr,
):
    """Write `[rows, BLOCK]` to the rows `at` of one head, laid out as `gradient_rows` says."""
    o_row, m_row = at
    base, stride = gradient_rows(gradient, head, heads, tokens, dim, TOKENS_FIRST)
    starts = base + o_row * stride
    store_wide(starts, m_row, tl.arange(0, BLOCK), dim, values, ALIGN)


@triton.jit
def item_base(row, slot: tl.constexpr, item, TYPE: tl.constexpr):
    """Address of one batch item of tensor `slot`, and its strides between heads and tokens."""
    entry = row + slot * 4
    address = tl.load(entry).to(tl.pointer_type(TYPE)) + item * tl.load(entry + 1)
    # `Call` copies tensors whose rows lie further apart
    return address, tl.load(entry + 2), tl.load(entry + 3).to(tl.int32)


@triton.jit
def head_base(row, slot: tl.constexpr, item, head, TYPE: tl.constexpr):
    """Address of one head of tensor `slot`, and its stride between tokens."""
    side = item_base(row, slot, item, TYPE)
    return side[0] + head * side[1], side[2]


@triton.jit
def head_rows(side, head, at, dim, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Rows `[rows, BLOCK]` of one head of what `item_base` gave."""
    return load_rows(side[0] + head * side[1], at[0], at[1], side[2], dim, BLOCK, ALIGN)


@triton.jit
def valid_rows(valid, side: tl.constexpr, item, batch, tokens, o_row, HAS_MASK: tl.constexpr):
    """Which of `o_row` exist and are valid; `side` 0 is queries, 1 keys."""
    m_row = o_row < tokens
    if HAS_MASK:
        base = valid + (side * batch + item) * tokens
        m_row = m_row & (tl.load(base + o_row, mask=m_row, other=0) != 0)
    return m_row


@triton.jit
def rows_at(side, at, dim, BLOCK: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr):
    """Rows of a head for `score_tile`: `[rows, BLOCK]`, (base, stride), (offsets, mask).

    With CHUNK nothing is read yet, and offsets stand for the first.
    """
    o_row, m_row = at
    if CHUNK == 0:
        return load_rows(side[0], o_row, m_row, side[1], dim, BLOCK, ALIGN), side, at
    else:
        return o_row, side, at


@triton.jit
def whole_rows(rows, dim, BLOCK: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr):
    """`[rows, BLOCK]` of what `rows_at` gave, read now where it was not."""
    b_row, side, at = rows
    if CHUNK > 0:
        b_row = load_rows(side[0], at[0], at[1], side[1], dim, BLOCK, ALIGN)
    return b_row


@triton.jit
def chunked_product(
    left,
    right,
    dim,
    CHUNK: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`left @ right^T` of one tile, `CHUNK` columns of the head at a time.

    Wide operands do not fit the registers whole: `tl.dot` holds all of its summed dimension.
    """
    _, left_side, left_at = left
    _, right_side, right_at = right
    left_base, left_stride = left_side
    right_base, right_stride = right_side
    o_left, m_left = left_at
    o_right, m_right = right_at
    total = tl.zeros([o_left.shape[0], o_right.shape[0]], dtype=SUM_TYPE)
    for first in range(0, dim, CHUNK):
        b_left = load_rows(
            left_base + first, o_left, m_left, left_stride, dim - first, CHUNK, ALIGN
        )
        b_right = load_rows(
            right_base + first, o_right, m_right, right_stride, dim - first, CHUNK, ALIGN
        )
        total += tl.dot(b_left, tl.trans(b_right), input_precision=PRECISION)
    return total


@triton.jit
def score_tile(
    left,
    right,
    dim,
    scale,
    CHUNK: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`scale * left @ right^T` of rows from `rows_at`."""
    if CHUNK > 0:
        tile = chunked_product(left, right, dim, CHUNK, SUM_TYPE, ALIGN, PRECISION)
    else:
        tile = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
    return (tile * scale).to(SUM_TYPE)


@triton.jit
def both_rows(
    sides,
    at,
    sizes,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TEACHER_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`rows_at` of the student and of the teacher, from (base, stride) of both."""
    return (
        rows_at(sides[0], at, sizes[0][0], BLOCK_DIM, ALIGN, CHUNK),
        rows_at(sides[1], at, sizes[1][0], BLOCK_TEACHER_DIM, TEACHER_ALIGN, CHUNK),
    )


@triton.jit
def both_tiles(
    left,
    right,
    sizes,
    CHUNK: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`score_tile` of the student and of the teacher, from `both_rows`."""
    dim, scale = sizes[0]
    teacher_dim, teacher_scale = sizes[1]
    return (
        score_tile(left[0], right[0], dim, scale, CHUNK, SUM_TYPE, ALIGN, PRECISION),
        score_tile(
            left[1],
            right[1],
            teacher_dim,
            teacher_scale,
            CHUNK,
            SUM_TYPE,
            TEACHER_ALIGN,
            PRECISION,
        ),
    )


@triton.jit
def program_rows(heads, tokens, BLOCK: tl.constexpr):
    """Pair, block of rows, batch item and head of this program; blocks of a head are neighbours."""
    blocks = tl.cdiv(tokens, BLOCK)
    program = tl.program_id(0)
    item = (program // blocks // heads).to(tl.int64)
    head = (program // blocks % heads).to(tl.int64)
    return tl.program_id(1).to(tl.int64), program % blocks, item, head


@triton.jit
def sizes_of(scales, pair, dim, teacher_dim):
    """Head size and scale of the scores, of the student and of the teacher."""
    return (
        (dim, tl.load(scales + pair * 2)),
        (teacher_dim, tl.load(scales + pair * 2 + 1)),
    )


@triton.jit
def query_sides(row, item, head, TYPE: tl.constexpr, TEACHER_TYPE: tl.constexpr):
    """(base, stride) of the queries of a head, of the student and of the teacher."""
    return head_base(row, 0, item, head, TYPE), head_base(row, 2, item, head, TEACHER_TYPE)


@triton.jit
def key_sides(
    row,
    item,
    head,
    heads,
    kv_heads,
    teacher_kv_heads,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
):
    """(base, stride) of the keys that a query head sees, of the student and of the teacher."""
    return (
        head_base(row, 1, item, head // (heads // kv_heads), TYPE),
        head_base(row, 3, item, head // (heads // teacher_kv_heads), TEACHER_TYPE),
    )


@triton.jit
def load_cap(caps, pair, side: tl.constexpr, CAP: tl.constexpr):
    """The soft cap of one side of a pair, `side` 0 the student's; 1 where nothing is capped."""
    if CAP:
        return tl.load(caps + pair * 2 + side)
    else:
        return 1.0


@triton.jit
def load_sinks(sinks, pair, head, heads, BITS: tl.constexpr):
    """The sinks of student and teacher of one head in `[pairs, 2, heads]`, with BITS in bits."""
    base = sinks + pair * 2 * heads + head
    student = tl.load(base)
    teacher = tl.load(base + heads)
    if BITS:
        student *= LOG2E
        teacher *= LOG2E
    return student, teacher


@triton.jit
def stat_base(stats, pair, item, head, batch, heads, tokens, STATS: tl.constexpr):
    """Address of the first statistic of one head in `[pairs, STATS, batch, heads, tokens]`."""
    return stats + ((pair * STATS * batch + item) * heads + head) * tokens


@triton.jit
def stat_step(batch, heads, tokens):
    """From one statistic to the next of the same row."""
    return tl.cast(batch, tl.int64) * heads * tokens


@triton.jit
def load_stats(stats, pair, item, head, batch, heads, tokens, o_query, STATS: tl.constexpr):
    """What the forward kept of rows `o_query`; the constant is 0 where none is kept."""
    m_row = o_query < tokens
    base = stat_base(stats, pair, item, head, batch, heads, tokens, STATS) + o_query
    step = stat_step(batch, heads, tokens)
    max_student = tl.load(base, mask=m_row, other=0.0)
    log_student = tl.load(base + step, mask=m_row, other=0.0)
    max_teacher = tl.load(base + 2 * step, mask=m_row, other=0.0)
    log_teacher = tl.load(base + 3 * step, mask=m_row, other=0.0)
    constant = max_student * 0.0
    if STATS == 5:
        constant = tl.load(base + 4 * step, mask=m_row, other=0.0)
    return max_student, log_student, max_teacher, log_teacher, constant


@triton.jit
def visible(o_query, o_key, m_key, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Which keys a query sees; the three blocks broadcast to one tile in either orientation."""
    ahead = o_key - o_query
    seen = m_key & (ahead == ahead)
    if CAUSAL:
        seen = seen & (ahead <= 0)
    if WINDOWED:
        seen = seen & (ahead < window) & (ahead > -window)
    return seen


@triton.jit
def keys_seen(
    first, rows, tokens, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """Start and end of the keys that `rows` query rows from `first` see, the start on a block."""
    last = first + rows - 1
    start = 0
    stop = tokens
    if WINDOWED:
        start = max(0, first - window + 1) // BLOCK * BLOCK
        stop = min(tokens, last + window)
    if CAUSAL:
        stop = min(tokens, last + 1)
    return start, stop


@triton.jit
def queries_seeing(
    first, keys, tokens, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """Start and end of the query rows that see `keys` keys from `first`, the start on a block."""
    last = first + keys - 1
    start = 0
    stop = tokens
    if WINDOWED:
        start = max(0, first - window + 1) // BLOCK * BLOCK
        stop = min(tokens, last + window)
    if CAUSAL:
        start = first // BLOCK * BLOCK
    return start, stop
