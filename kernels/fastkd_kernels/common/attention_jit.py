# mypy: ignore-errors
"""What the attention kernels share: loads of heads, masks, tiles of scores, statistics of rows.

Row `pair` of `table` `[pairs, 16]` int64 holds, for the student's query and key and the teacher's
query and key: address, then strides of batch, head and token. `valid` is uint8 `[2, batch,
tokens]`: query rows, keys. Prefixes: `o_` offsets, `m_` mask, `b_` block of values.
"""

import triton
import triton.language as tl

from .wide_loads import load_wide


@triton.jit
def load_rows(base, o_row, m_row, stride, dim, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Rows `[rows, BLOCK]` at `base`, 0 beyond `dim` and where `m_row` is False.

    ALIGN elements divide every row's start, and `dim`.
    """
    return load_wide(base + o_row.to(tl.int64) * stride, m_row, tl.arange(0, BLOCK), dim, ALIGN)


@triton.jit
def head_base(row, slot: tl.constexpr, item, head, TYPE: tl.constexpr):
    """Address of one head of tensor `slot`, and its stride between tokens."""
    entry = row + slot * 4
    address = tl.load(entry).to(tl.pointer_type(TYPE))
    return address + item * tl.load(entry + 1) + head * tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def valid_rows(valid, side: tl.constexpr, item, batch, tokens, o_row, HAS_MASK: tl.constexpr):
    """Which of `o_row` exist and are valid; `side` 0 is queries, 1 keys."""
    m_row = o_row < tokens
    if HAS_MASK:
        base = valid + (side * batch + item) * tokens
        m_row = m_row & (tl.load(base + o_row, mask=m_row, other=0) != 0)
    return m_row


@triton.jit
def chunked_product(
    left_base,
    o_left,
    m_left,
    left_stride,
    right_base,
    o_right,
    m_right,
    right_stride,
    dim,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`left @ right^T` of one tile, `CHUNK` columns of the head at a time.

    Wide operands do not fit the registers whole: `tl.dot` holds all of its summed dimension.
    """
    total = tl.zeros([ROWS, COLUMNS], dtype=SUM_TYPE)
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
    BLOCK_TEACHER_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of the student and of the teacher, `[HELD, MOVING]`, and the student's moving rows.

    Everything comes as a pair, student first: blocks of `held` rows, (base, stride) of the held and
    of the moving heads, and `sizes` (dim, scale). `held_at` and `moving_at` are offsets and mask.
    """
    b_held_student, b_held_teacher = held
    held_student, held_teacher = held_sides
    moving_student, moving_teacher = moving_sides
    student_size, teacher_size = sizes
    dim, scale = student_size
    teacher_dim, teacher_scale = teacher_size
    base, stride = moving_student
    b_moving_student = rows_at(base, stride, moving_at, dim, BLOCK_DIM, ALIGN, CHUNK)
    student_scores = score_tile(
        b_held_student,
        b_moving_student,
        held_student,
        held_at,
        moving_student,
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
    base, stride = moving_teacher
    b_moving_teacher = rows_at(
        base, stride, moving_at, teacher_dim, BLOCK_TEACHER_DIM, TEACHER_ALIGN, CHUNK
    )
    teacher_scores = score_tile(
        b_held_teacher,
        b_moving_teacher,
        held_teacher,
        held_at,
        moving_teacher,
        moving_at,
        teacher_dim,
        teacher_scale,
        HELD,
        MOVING,
        CHUNK,
        SUM_TYPE,
        TEACHER_ALIGN,
        PRECISION,
    )
    return student_scores, teacher_scores, b_moving_student


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


@triton.jit
def soft_cap(score, cap, CAP: tl.constexpr):
    """`cap * tanh(score / cap)`; the scores as they are without CAP."""
    if CAP:
        x = score * (1.0 / cap)
        e = tl.exp(-2.0 * tl.abs(x))
        reached = cap * (1.0 - 2.0 * e / (1.0 + e))
        # near 0 a small correction of the score, whose digits 1 - e would lose
        near = score + score * tanh_excess(x * x)
        return tl.where(tl.abs(x) < 0.625, near, tl.where(score < 0.0, -reached, reached))
    else:
        return score


@triton.jit
def tanh_excess(q):
    """`tanh(x) / x - 1` for `q = x^2` with |x| < 0.625: the fits of Cephes' `tanh` and `tanhf`."""
    if q.dtype == tl.float64:
        top = -9.64399179425052238628e-1 * q - 9.92877231001918586564e1
        top = top * q - 1.61468768441708447952e3
        bottom = (q + 1.12811678491632931402e2) * q + 2.23548839060100448583e3
        return q * top / (bottom * q + 4.84406305325125486048e3)
    else:
        term = 2.06390887954e-2 + q * -5.70498872745e-3
        return q * (-3.33332819422e-1 + q * (1.33314422036e-1 + q * (-5.37397155531e-2 + q * term)))


@triton.jit
def cap_slope(score, cap):
    """Derivative of `soft_cap`: `1 - tanh^2`, as `4 e / (1 + e)^2` with digits at any score."""
    e = tl.exp(-2.0 * tl.abs(score * (1.0 / cap)))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))
