# mypy: ignore-errors
"""Triton kernels of attention-score MSE by Gram matrices (see `gram.py` for the algebra).

`table`, `scales`, `valid` and the prefixes are those of `triton_kernels.py`. Columns
of both parts stand side by side: `dim` of part 0, then `teacher_dim` of part 1; `width` is their
sum. Each part starts a new column tile. SIDE 0 is queries, 1 keys. A key group is a run of query
heads that share both key heads; `groups` of them make up the heads. Each of `chunks` runs of
`chunk_tokens` tokens has a Gram of its own; one holds every token where nothing is causal.
"""

import triton
import triton.language as tl

from ..common.attention_jit import gradient_rows, valid_rows
from ..common.wide_loads import load_wide


@triton.jit
def part_rows(
    row,
    item,
    head,
    teacher_head,
    part,
    o_row,
    m_row,
    o_column,
    scale,
    teacher_scale,
    dim,
    teacher_dim,
    SIDE: tl.constexpr,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    OPERAND: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
):
    """Rows `[rows, columns]` of `part` 0 or 1 of one side, in OPERAND precision."""
    entry = row + SIDE * 4
    student = tl.load(entry).to(tl.pointer_type(TYPE))
    student = student + item * tl.load(entry + 1) + head * tl.load(entry + 2)
    step = tl.load(entry + 3)
    teacher = tl.load(entry + 8).to(tl.pointer_type(TEACHER_TYPE))
    teacher = teacher + item * tl.load(entry + 9) + teacher_head * tl.load(entry + 10)
    teacher_step = tl.load(entry + 11)
    # columns to read; none of a side that the part leaves out
    student_columns = tl.where(part == 0, dim, 0)
    teacher_columns = tl.where(part == 1, teacher_dim, 0)
    if DIFFERENCE:
        if SIDE == 0:
            teacher_columns = teacher_dim
        else:
            student_columns = dim
    o_wide = o_row.to(tl.int64)
    b_student = load_wide(student + o_wide * step, m_row, o_column, student_columns, ALIGN).to(
        OPERAND
    )
    b_teacher = load_wide(
        teacher + o_wide * teacher_step, m_row, o_column, teacher_columns, TEACHER_ALIGN
    ).to(OPERAND)
    if DIFFERENCE:
        if SIDE == 0:
            # P_0 = c_s Q_s - c_t Q_t, P_1 = Q_t with b_own 0
            value = b_student * scale + b_teacher * tl.where(part == 0, -teacher_scale, 1.0)
        else:
            # R_0 = K_s with b_target 0, R_1 = c_t (K_s - K_t)
            value = (b_student - b_teacher) * tl.where(part == 0, 1.0, teacher_scale)
        return value.to(OPERAND)
    return b_student + b_teacher


@triton.jit
def _gram_kernel(
    table,
    scales,
    valid,
    grams,
    batch,
    heads,
    kv_heads,
    teacher_kv_heads,
    groups,
    tokens,
    dim,
    teacher_dim,
    chunk_tokens,
    SIDE: tl.constexpr,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """One program: one tile of one key group's Gram, over all rows that the group has in a chunk.

    Writes `grams` `[pairs, batch, groups, chunks, width, width]`; the block of part 1 by part 0 is
    the mirror of part 0 by part 1 and stays unwritten.
    """
    pair = tl.program_id(1).to(tl.int64)
    student_tiles = tl.cdiv(dim, BLOCK_COLUMN)
    tiles = student_tiles + tl.cdiv(teacher_dim, BLOCK_COLUMN)
    left = tl.program_id(0) // tiles % tiles
    right = tl.program_id(0) % tiles
    left_part = (left >= student_tiles).to(tl.int32)
    right_part = (right >= student_tiles).to(tl.int32)
    if left_part <= right_part:
        item = (tl.program_id(0) // (tiles * tiles) // groups).to(tl.int64)
        group = (tl.program_id(0) // (tiles * tiles) % groups).to(tl.int64)
        row = table + pair * 16
        scale = tl.load(scales + pair * 2)
        teacher_scale = tl.load(scales + pair * 2 + 1)
        o_left = (left - left_part * student_tiles) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
        o_right = (right - right_part * student_tiles) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
        total = tl.zeros([BLOCK_COLUMN, BLOCK_COLUMN], dtype=SUM_TYPE)
        first = tl.program_id(2) * chunk_tokens
        last = min(first + chunk_tokens, tokens)
        repeat = 1
        if SIDE == 0:
            repeat = heads // groups
        for turn in range(0, repeat):
            if SIDE == 0:
                head = group * repeat + turn
                teacher_head = head
            else:
                head = group // (groups // kv_heads)
                teacher_head = group // (groups // teacher_kv_heads)
            for start in range(first, last, BLOCK_ROW):
                o_row = start + tl.arange(0, BLOCK_ROW)
                m_row = valid_rows(valid, SIDE, item, batch, tokens, o_row, HAS_MASK)
                b_left = part_rows(
                    row,
                    item,
                    head,
                    teacher_head,
                    left_part,
                    o_row,
                    m_row,
                    o_left,
                    scale,
                    teacher_scale,
                    dim,
                    teacher_dim,
                    SIDE,
                    TYPE,
                    TEACHER_TYPE,
                    OPERAND,
                    DIFFERENCE,
                    ALIGN,
                    TEACHER_ALIGN,
                )
                b_right = part_rows(
                    row,
                    item,
                    head,
                    teacher_head,
                    right_part,
                    o_row,
                    m_row,
                    o_right,
                    scale,
                    teacher_scale,
                    dim,
                    teacher_dim,
                    SIDE,
                    TYPE,
                    TEACHER_TYPE,
                    OPERAND,
                    DIFFERENCE,
                    ALIGN,
                    TEACHER_ALIGN,
                )
                total += tl.dot(tl.trans(b_left), b_right, input_precision=PRECISION)
        width = dim + teacher_dim
        left_width = tl.where(left_part == 0, dim, teacher_dim)
        right_width = tl.where(right_part == 0, dim, teacher_dim)
        slot = ((pair * batch + item) * groups + group) * tl.num_programs(2) + tl.program_id(2)
        out = grams + slot * width * width
        o_out = (left_part * dim + o_left)[:, None] * width + (right_part * dim + o_right)[None, :]
        m_out = (o_left < left_width)[:, None] & (o_right < right_width)[None, :]
        tl.store(out + o_out, total, mask=m_out)


@triton.jit
def _gram_bwd_kernel(
    table,
    scales,
    valid,
    factors,
    upstream,
    gradient,
    batch,
    heads,
    kv_heads,
    teacher_kv_heads,
    groups,
    tokens,
    dim,
    teacher_dim,
    chunk_tokens,
    chunks,
    SIDE: tl.constexpr,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TOKENS_FIRST: tl.constexpr,
):
    """One program: a block of rows and of columns of one student head's gradient.

    Reads `factors` `[pairs, batch, groups, chunks, width, dim]`, of which each row takes its own
    chunk's, and `upstream` `[pairs]`; writes `gradient` `[pairs, batch, heads | kv_heads, tokens,
    dim]`, laid out as `store_head` says. ACCUMULATE adds to what it holds.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    dim = dim // ALIGN * ALIGN
    pair = tl.program_id(1).to(tl.int64)
    columns = tl.cdiv(dim, BLOCK_COLUMN)
    blocks = tl.cdiv(tokens, BLOCK_ROW)
    student_heads = heads
    repeat = 1
    if SIDE == 1:
        student_heads = kv_heads
        repeat = groups // kv_heads
    o_out = tl.program_id(0) % columns * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    block = tl.program_id(0) // columns % blocks
    head = (tl.program_id(0) // (columns * blocks) % student_heads).to(tl.int64)
    item = (tl.program_id(0) // (columns * blocks) // student_heads).to(tl.int64)
    row = table + pair * 16
    scale = tl.load(scales + pair * 2)
    teacher_scale = tl.load(scales + pair * 2 + 1)
    o_row = block * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    m_row = valid_rows(valid, SIDE, item, batch, tokens, o_row, HAS_MASK)
    student_tiles = tl.cdiv(dim, BLOCK_COLUMN)
    tiles = student_tiles + tl.cdiv(teacher_dim, BLOCK_COLUMN)
    out, stride = gradient_rows(
        gradient + (pair * batch + item) * student_heads * tokens * dim,
        head,
        student_heads,
        tokens,
        dim,
        TOKENS_FIRST,
    )
    o_where = o_row[:, None].to(tl.int64) * stride + o_out[None, :]
    m_where = (o_row < tokens)[:, None] & (o_out < dim)[None, :]
    if ACCUMULATE:
        total = tl.load(out + o_where, mask=m_where, other=0.0)
    else:
        total = tl.zeros([BLOCK_ROW, BLOCK_COLUMN], dtype=SUM_TYPE)
    factor = tl.load(upstream + pair)
    chunk = block * BLOCK_ROW // chunk_tokens
    for turn in range(0, repeat):
        if SIDE == 0:
            group = head // (heads // groups)
            teacher_head = head
        else:
            group = head * repeat + turn
            teacher_head = group // (groups // teacher_kv_heads)
        slot = ((pair * batch + item) * groups + group) * chunks + chunk
        base = factors + slot * (dim + teacher_dim) * dim
        for tile in range(0, tiles):
            part = (tile >= student_tiles).to(tl.int32)
            o_column = (tile - part * student_tiles) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
            b_rows = part_rows(
                row,
                item,
                head,
                teacher_head,
                part,
                o_row,
                m_row,
                o_column,
                scale,
                teacher_scale,
                dim,
                teacher_dim,
                SIDE,
                TYPE,
                TEACHER_TYPE,
                OPERAND,
                DIFFERENCE,
                ALIGN,
                TEACHER_ALIGN,
            )
            m_factor = (o_column < tl.where(part == 0, dim, teacher_dim))[:, None]
            m_factor = m_factor & (o_out < dim)[None, :]
            o_factor = (part * dim + o_column)[:, None] * dim + o_out[None, :]
            b_factor = tl.load(base + o_factor, mask=m_factor, other=0.0)
            b_factor = b_factor * factor
            # dQ_s = P_0 A_0 + P_1 A_1 (SIDE 0), dK_s = R_0 B_0 + R_1 B_1 (SIDE 1)
            total += tl.dot(b_rows.to(SUM_TYPE), b_factor, input_precision=PRECISION)
    tl.store(out + o_where, total, mask=m_where)


@triton.jit
def _scan_kernel(
    grams,
    chunks,
    entries,
    SUM_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """One program: BLOCK entries of one key group's Grams, in every chunk.

    Replaces `grams` `[programs, chunks, entries]` by the sum of the chunks before each one, or of
    those after it with REVERSE.
    """
    blocks = tl.cdiv(entries, BLOCK)
    o_entry = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_entry = o_entry < entries
    slot = (tl.program_id(0) // blocks).to(tl.int64) * chunks
    step = entries
    if REVERSE:
        slot += chunks - 1
        step = -entries
    where = grams + slot * entries + o_entry
    total = tl.zeros([BLOCK], dtype=SUM_TYPE)
    for _ in range(0, chunks):
        b_gram = tl.load(where, mask=m_entry, other=0.0)
        tl.store(where, total, mask=m_entry)
        total += b_gram
        where += step
