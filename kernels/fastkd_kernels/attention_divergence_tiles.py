# mypy: ignore-errors
"""Tiles of the divergence kernels: both scores, what is visible, statistics of rows."""

import triton
import triton.language as tl

from .attention_score_mse_kernels import chunked_product, load_rows


@triton.jit
def rows_at(
    base,
    stride,
    at,
    dim,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows `[rows, BLOCK]`; only their offsets where products read them by chunks of columns."""
    o_row, m_row = at
    if CHUNK == 0:
        return load_rows(base, o_row, m_row, stride, dim, BLOCK, ALIGN)
    else:
        return o_row


@triton.jit
def score_tile(
    held,
    moving,
    held_side,
    held_at,
    moving_side,
    moving_at,
    dim,
    scale,
    HELD: tl.constexpr,
    MOVING: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`scale * held @ moving^T`, `[HELD, MOVING]`, of two blocks from `rows_at`."""
    if CHUNK > 0:
        held_base, held_stride = held_side
        moving_base, moving_stride = moving_side
        o_held, m_held = held_at
        o_moving, m_moving = moving_at
        tile = chunked_product(
            held_base,
            o_held,
            m_held,
            held_stride,
            moving_base,
            o_moving,
            m_moving,
            moving_stride,
            dim,
            HELD,
            MOVING,
            CHUNK,
            SUM_TYPE,
            ALIGN,
            PRECISION,
        )
    else:
        tile = tl.dot(held, tl.trans(moving), input_precision=PRECISION)
    return (tile * scale).to(SUM_TYPE)


@triton.jit
def both_tiles(
    held,
    held_sides,
    moving_sides,
    held_at,
    moving_at,
    sizes,
    HELD: tl.constexpr,
    MOVING: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TARGET_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    TARGET_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of the student and of the teacher, `[HELD, MOVING]`, and the student's moving rows.

    Everything comes as a pair, student first: blocks of `held` rows, (base, stride) of the held and
    of the moving heads, and `sizes` (dim, scale). `held_at` and `moving_at` are offsets and mask.
    """
    b_held, b_other = held
    held_own, held_target = held_sides
    moving_own, moving_target = moving_sides
    own_size, target_size = sizes
    dim, scale = own_size
    target_dim, target_scale = target_size
    base, stride = moving_own
    b_moving = rows_at(base, stride, moving_at, dim, BLOCK_DIM, ALIGN, CHUNK)
    own = score_tile(
        b_held,
        b_moving,
        held_own,
        held_at,
        moving_own,
        moving_at,
        dim,
        scale,
        HELD,
        MOVING,
        CHUNK,
        SUM_TYPE,
        ALIGN,
        PRECISION,
    )
    base, stride = moving_target
    b_target = rows_at(base, stride, moving_at, target_dim, BLOCK_TARGET_DIM, TARGET_ALIGN, CHUNK)
    target = score_tile(
        b_other,
        b_target,
        held_target,
        held_at,
        moving_target,
        moving_at,
        target_dim,
        target_scale,
        HELD,
        MOVING,
        CHUNK,
        SUM_TYPE,
        TARGET_ALIGN,
        PRECISION,
    )
    return own, target, b_moving


@triton.jit
def load_cap(caps, pair, side: tl.constexpr, CAP: tl.constexpr):
    """The soft cap of one side of a pair, `side` 0 the student's; 1 where nothing is capped."""
    if CAP:
        return tl.load(caps + pair * 2 + side)
    else:
        return 1.0


@triton.jit
def load_sinks(sinks, pair, head, heads):
    """The sinks of student and teacher of one head in `[pairs, 2, heads]`."""
    base = sinks + pair * 2 * heads + head
    return tl.load(base), tl.load(base + heads)


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
    max_own = tl.load(base, mask=m_row, other=0.0)
    log_own = tl.load(base + step, mask=m_row, other=0.0)
    max_target = tl.load(base + 2 * step, mask=m_row, other=0.0)
    log_target = tl.load(base + 3 * step, mask=m_row, other=0.0)
    constant = max_own * 0.0
    if STATS == 5:
        constant = tl.load(base + 4 * step, mask=m_row, other=0.0)
    return max_own, log_own, max_target, log_target, constant


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
    first, last, tokens, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """Start and end of the keys that query rows `first` to `last` see, the start on a block."""
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
    first, last, tokens, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """Start and end of the query rows that see keys `first` to `last`, the start on a block."""
    start = 0
    stop = tokens
    if WINDOWED:
        start = max(0, first - window + 1) // BLOCK * BLOCK
        stop = min(tokens, last + window)
    if CAUSAL:
        start = first // BLOCK * BLOCK
    return start, stop
