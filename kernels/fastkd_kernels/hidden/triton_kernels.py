# mypy: ignore-errors
"""Triton kernels of the losses on hidden states: projection, residual, both products.

Sizes: `tokens`, `rows` (batch times tokens), `width` of the student, `teacher_width`. One chunk of
rows is `[first, last)`; its residual `R = H_s W^T + b - H_t` is `[pairs, chunk, teacher_width]`.
Prefixes: `o_` offsets, `m_` mask, `b_` block of values.

Row `pair` of `table` `[pairs, 9]` int64 holds the address and strides of batch and token of the
student and of the teacher, address and row stride of the weight, and the address of the bias.
`valid` is uint8 `[rows]`.

Normalised rows are whole in one program's registers. The road not taken: rows in blocks of columns,
which reads both sides three times, for norms, for the residual's part along the row, and for
gradients.
"""

import triton
import triton.language as tl

from ..common.wide_loads import load_wide, store_wide


@triton.jit
def row_starts(entry, o_row, tokens, TYPE: tl.constexpr):
    """Addresses `[rows]` of rows of a `[batch, tokens, width]` tensor."""
    base = tl.load(entry).to(tl.pointer_type(TYPE))
    o_wide = o_row.to(tl.int64)
    return base + (o_wide // tokens * tl.load(entry + 1) + o_wide % tokens * tl.load(entry + 2))


@triton.jit
def token_rows(
    entry, o_row, m_row, tokens, o_column, columns, TYPE: tl.constexpr, ALIGN: tl.constexpr
):
    """Values `[rows, columns]` of a `[batch, tokens, width]` tensor, 0 where masked."""
    starts = row_starts(entry, o_row, tokens, TYPE)
    return load_wide(starts, m_row, o_column, columns, ALIGN)


@triton.jit
def weight_tile(row, o_out, teacher_width, o_in, width, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Values `[out, in]` of the pair's weight."""
    base = tl.load(row + 6).to(tl.pointer_type(TYPE))
    starts = base + o_out.to(tl.int64) * tl.load(row + 7)
    return load_wide(starts, o_out < teacher_width, o_in, width, ALIGN)


@triton.jit
def valid_rows(valid, o_row, last, HAS_MASK: tl.constexpr):
    """Which of `o_row` lie in the chunk and are valid."""
    m_row = o_row < last
    if HAS_MASK:
        m_row = m_row & (tl.load(valid + o_row, mask=m_row, other=0) != 0)
    return m_row


@triton.jit
def _fwd_kernel(
    table,
    valid,
    factor,
    residual,
    partials,
    first,
    last,
    chunk,
    rows,
    tokens,
    width,
    teacher_width,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    BIAS_TYPE: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    STORE: tl.constexpr,
):
    """One program: a block of the chunk's rows and of the teacher's columns.

    Writes `partials` `[pairs, row blocks, column blocks]` and, with STORE, `residual` times
    `factor`, a number on the device, `[pairs, chunk, teacher_width]`, where masked rows are 0.
    Without HAS_TEACHER, `residual` gets the projected rows as they are and `partials` nothing.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    teacher_width = teacher_width // TEACHER_ALIGN * TEACHER_ALIGN
    pair = tl.program_id(1).to(tl.int64)
    column_blocks = tl.cdiv(teacher_width, BLOCK_COLUMN)
    row_block = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    row = table + pair * 9
    o_row = first + row_block * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    o_column = column_block * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    m_row = valid_rows(valid, o_row, last, HAS_MASK)
    if HAS_TEACHER:
        # on its way while the products are made
        b_teacher = token_rows(
            row + 3, o_row, m_row, tokens, o_column, teacher_width, TEACHER_TYPE, TEACHER_ALIGN
        )
    if HAS_WEIGHT:
        total = tl.zeros([BLOCK_ROW, BLOCK_COLUMN], dtype=SUM_TYPE)
        for start in range(0, width, BLOCK_SUM):
            o_in = start + tl.arange(0, BLOCK_SUM)
            b_rows = token_rows(row, o_row, m_row, tokens, o_in, width, TYPE, ALIGN)
            b_weight = weight_tile(
                row, o_column, teacher_width, o_in, width, WEIGHT_TYPE, WEIGHT_ALIGN
            )
            total += tl.dot(
                b_rows.to(OPERAND), tl.trans(b_weight.to(OPERAND)), input_precision=PRECISION
            )
    else:
        total = token_rows(row, o_row, m_row, tokens, o_column, width, TYPE, ALIGN).to(SUM_TYPE)
    if HAS_BIAS:
        bias = tl.load(row + 8).to(tl.pointer_type(BIAS_TYPE))
        b_bias = tl.load(bias + o_column, mask=o_column < teacher_width, other=0.0)
        total += b_bias.to(SUM_TYPE)[None, :]
    if HAS_TEACHER:
        # R = H_s W^T + b - H_t
        m_tile = m_row[:, None] & (o_column < teacher_width)[None, :]
        total = tl.where(m_tile, total - b_teacher.to(SUM_TYPE), 0.0)
        all_blocks = tl.cdiv(rows, BLOCK_ROW)
        index = (pair * all_blocks + first // BLOCK_ROW + row_block) * column_blocks + column_block
        tl.store(partials + index, tl.sum(total * total))
        if STORE:
            total *= tl.load(factor)
    if STORE:
        starts = residual + (pair * chunk + o_row - first) * teacher_width
        store_wide(starts, o_row < last, o_column, teacher_width, total, TEACHER_ALIGN)


@triton.jit
def _bwd_dx_kernel(
    table,
    residual,
    gradient,
    first,
    last,
    chunk,
    rows,
    width,
    teacher_width,
    WEIGHT_TYPE: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
):
    """One program: a block of the chunk's rows and of the student's columns.

    Reads `residual` `[pairs, chunk, teacher_width]`, writes `gradient` `[pairs, rows, width]`.
    """
    pair = tl.program_id(1).to(tl.int64)
    column_blocks = tl.cdiv(width, BLOCK_COLUMN)
    o_row = first + tl.program_id(0) // column_blocks * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    o_column = tl.program_id(0) % column_blocks * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    m_row = o_row < last
    row = table + pair * 9
    b_base = residual + (pair * chunk + o_row - first)[:, None] * teacher_width
    total = tl.zeros([BLOCK_ROW, BLOCK_COLUMN], dtype=SUM_TYPE)
    for start in range(0, teacher_width, BLOCK_SUM):
        o_out = start + tl.arange(0, BLOCK_SUM)
        m_residual = m_row[:, None] & (o_out < teacher_width)[None, :]
        b_residual = tl.load(b_base + o_out[None, :], mask=m_residual, other=0.0)
        b_weight = weight_tile(
            row, o_out, teacher_width, o_column, width, WEIGHT_TYPE, WEIGHT_ALIGN
        )
        # dH_s = R W
        total += tl.dot(b_residual.to(OPERAND), b_weight.to(OPERAND), input_precision=PRECISION)
    where = gradient + (pair * rows + o_row)[:, None] * width + o_column[None, :]
    tl.store(where, total, mask=m_row[:, None] & (o_column < width)[None, :])


@triton.jit
def _bwd_dw_kernel(
    table,
    valid,
    residual,
    gradient,
    first,
    last,
    chunk,
    tokens,
    width,
    teacher_width,
    TYPE: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """One program: a tile of `gradient` `[pairs, teacher_width, width]` over the chunk's rows.

    Adds to what earlier chunks wrote.
    """
    pair = tl.program_id(1).to(tl.int64)
    column_blocks = tl.cdiv(width, BLOCK_COLUMN)
    column_block = tl.program_id(0) % column_blocks
    o_out = tl.program_id(0) // column_blocks * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    o_column = column_block * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    m_out = o_out < teacher_width
    row = table + pair * 9
    total = tl.zeros([BLOCK_ROW, BLOCK_COLUMN], dtype=SUM_TYPE)
    for start in range(first, last, BLOCK_SUM):
        o_row = start + tl.arange(0, BLOCK_SUM)
        m_row = valid_rows(valid, o_row, last, HAS_MASK)
        where = residual + (pair * chunk + o_row - first)[:, None] * teacher_width + o_out[None, :]
        b_residual = tl.load(where, mask=m_row[:, None] & m_out[None, :], other=0.0)
        b_rows = token_rows(row, o_row, m_row, tokens, o_column, width, TYPE, ALIGN)
        # dW = R^T H_s
        total += tl.dot(
            tl.trans(b_residual.to(OPERAND)), b_rows.to(OPERAND), input_precision=PRECISION
        )
    where = gradient + (pair * teacher_width + o_out)[:, None] * width + o_column[None, :]
    mask = m_out[:, None] & (o_column < width)[None, :]
    if first > 0:
        total += tl.load(where, mask=mask, other=0.0)
    tl.store(where, total, mask=mask)


@triton.jit
def _bwd_db_kernel(
    residual,
    partials,
    rows,
    chunk,
    teacher_width,
    SUM_TYPE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One program: columns of `STEPS * BLOCK_ROW` of the chunk's `rows`, summed.

    Reads `residual` `[pairs, chunk, teacher_width]`, writes `partials`
    `[pairs, row blocks, teacher_width]`.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    teacher_width = teacher_width // ALIGN * ALIGN
    pair = tl.program_id(2).to(tl.int64)
    o_column = tl.program_id(0) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    o_row = tl.program_id(1) * STEPS * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    base = residual + pair * chunk * teacher_width
    sums = tl.zeros([BLOCK_ROW, BLOCK_COLUMN], dtype=SUM_TYPE)
    for step in tl.static_range(STEPS):
        at = o_row + step * BLOCK_ROW
        starts = base + at.to(tl.int64) * teacher_width
        sums += load_wide(starts, at < rows, o_column, teacher_width, ALIGN).to(SUM_TYPE)
    # db = R^T 1
    out = partials + (pair * tl.num_programs(1) + tl.program_id(1)) * teacher_width + o_column
    tl.store(out, tl.sum(sums, 0), mask=o_column < teacher_width)


@triton.jit
def whole_rows(
    starts,
    m_row,
    width,
    ALIGN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Values `[rows, BLOCK_IN]` and `[rows, BLOCK_REST]` of whole rows at the addresses `starts`.

    Widths are seldom powers of two: 312 is 256 and 64. Without a rest, the first block twice.
    """
    b_first = load_wide(starts, m_row, tl.arange(0, BLOCK_IN), width, ALIGN)
    if BLOCK_REST:
        b_rest = load_wide(starts, m_row, BLOCK_IN + tl.arange(0, BLOCK_REST), width, ALIGN)
    else:
        b_rest = b_first
    return b_first, b_rest


@triton.jit
def projected_tile(
    b_rows,
    b_rows_rest,
    b_weight,
    b_weight_rest,
    bias,
    o_out,
    m_out,
    SUM_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    """`H_s W^T + b` `[rows, out]`, of whole rows of states and weight; masked rows are the bias."""
    SHAPE: tl.constexpr = [b_rows.shape[0], b_weight.shape[0]]
    if HAS_BIAS:
        # read before the products, which start from it
        b_bias = tl.load(bias + o_out, mask=m_out, other=0.0).to(SUM_TYPE)
        total = tl.broadcast_to(b_bias[None, :], SHAPE)
    else:
        total = tl.zeros(SHAPE, dtype=SUM_TYPE)
    total = tl.dot(b_rows, tl.trans(b_weight), total, out_dtype=SUM_TYPE, input_precision=PRECISION)
    if HAS_REST:
        total = tl.dot(
            b_rows_rest,
            tl.trans(b_weight_rest),
            total,
            out_dtype=SUM_TYPE,
            input_precision=PRECISION,
        )
    return total


@triton.jit
def _fwd_dx_kernel(
    table,
    valid,
    factor,
    residual,
    gradient,
    partials,
    column_sums,
    first,
    last,
    chunk,
    rows,
    tokens,
    width,
    teacher_width,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    BIAS_TYPE: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    ROWS_SUMMED: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
    ZERO_NORM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STORE: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
):
    """One program: a block of the chunk's rows, all columns of the teacher, a block at a time.

    Writes `partials` `[pairs, row blocks]` and `gradient` `[pairs, rows, width]`; with STORE
    `residual` times `factor` `[pairs, chunk, teacher_width]`, where masked rows are 0 (`chunk` is
    whole blocks), and with SUM_COLUMNS that residual, every ROWS_SUMMED rows together,
    `column_sums` `[pairs, row blocks * BLOCK_ROW / ROWS_SUMMED, teacher_width]`.

    With NORMALIZE `residual` is `G`, the gradient of the normalised losses by the projected rows,
    `(cos(u, v) u - v) / |H_s W^T + b|` of unit rows, which are projected twice: first for norms and
    cosines.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    teacher_width = teacher_width // TEACHER_ALIGN * TEACHER_ALIGN
    pair = tl.program_id(1).to(tl.int64)
    index = pair * tl.cdiv(rows, BLOCK_ROW) + first // BLOCK_ROW + tl.program_id(0)
    row = table + pair * 9
    block_start = tl.program_id(0) * BLOCK_ROW
    o_block = tl.arange(0, BLOCK_ROW)
    o_row = first + block_start + o_block
    m_row = valid_rows(valid, o_row, last, HAS_MASK)
    teacher_starts = row_starts(row + 3, o_row, tokens, TEACHER_TYPE)
    weight = tl.load(row + 6).to(tl.pointer_type(WEIGHT_TYPE))
    weight_stride = tl.load(row + 7)
    bias = tl.load(row + 8).to(tl.pointer_type(BIAS_TYPE))
    HAS_REST: tl.constexpr = BLOCK_REST > 0
    student_starts = row_starts(row, o_row, tokens, TYPE)
    b_rows, b_rows_rest = whole_rows(student_starts, m_row, width, ALIGN, BLOCK_IN, BLOCK_REST)
    b_rows, b_rows_rest = b_rows.to(OPERAND), b_rows_rest.to(OPERAND)
    b_scale = tl.where(m_row, tl.load(factor), 0.0).to(SUM_TYPE)
    if NORMALIZE:
        b_student_squares = tl.zeros([BLOCK_ROW], dtype=SUM_TYPE)
        b_teacher_squares = tl.zeros([BLOCK_ROW], dtype=SUM_TYPE)
        b_products = tl.zeros([BLOCK_ROW], dtype=SUM_TYPE)
        # stages of its own: those of a launch are for loads that products wait for
        for start in tl.range(0, teacher_width, BLOCK_COLUMN, num_stages=2):
            o_out = start + tl.arange(0, BLOCK_COLUMN)
            m_out = o_out < teacher_width
            weight_starts = weight + o_out.to(tl.int64) * weight_stride
            b_weight, b_weight_rest = whole_rows(
                weight_starts, m_out, width, WEIGHT_ALIGN, BLOCK_IN, BLOCK_REST
            )
            total = projected_tile(
                b_rows,
                b_rows_rest,
                b_weight.to(OPERAND),
                b_weight_rest.to(OPERAND),
                bias,
                o_out,
                m_out,
                SUM_TYPE,
                PRECISION,
                HAS_BIAS,
                HAS_REST,
            )
            b_teacher = load_wide(teacher_starts, m_row, o_out, teacher_width, TEACHER_ALIGN)
            b_teacher = b_teacher.to(SUM_TYPE)
            b_student_squares += tl.sum(total * total, 1)
            b_teacher_squares += tl.sum(b_teacher * b_teacher, 1)
            b_products += tl.sum(total * b_teacher, 1)
        b_student_inverse = inverse_of_norm(b_student_squares, ZERO_NORM)
        b_teacher_inverse = inverse_of_norm(b_teacher_squares, ZERO_NORM)
        b_cosine = b_products * b_student_inverse * b_teacher_inverse
        b_student_scale = b_cosine * b_student_inverse
        b_scale *= b_student_inverse
    b_squares = tl.zeros([BLOCK_ROW], dtype=SUM_TYPE)
    b_gradient = tl.zeros([BLOCK_ROW, BLOCK_IN], dtype=SUM_TYPE)
    if HAS_REST:
        b_gradient_rest = tl.zeros([BLOCK_ROW, BLOCK_REST], dtype=SUM_TYPE)
    for start in range(0, teacher_width, BLOCK_COLUMN):
        o_out = start + tl.arange(0, BLOCK_COLUMN)
        m_out = o_out < teacher_width
        weight_starts = weight + o_out.to(tl.int64) * weight_stride
        b_weight, b_weight_rest = whole_rows(
            weight_starts, m_out, width, WEIGHT_ALIGN, BLOCK_IN, BLOCK_REST
        )
        b_weight, b_weight_rest = b_weight.to(OPERAND), b_weight_rest.to(OPERAND)
        total = projected_tile(
            b_rows,
            b_rows_rest,
            b_weight,
            b_weight_rest,
            bias,
            o_out,
            m_out,
            SUM_TYPE,
            PRECISION,
            HAS_BIAS,
            HAS_REST,
        )
        # read behind the products: their registers are not needed until here
        b_teacher = load_wide(teacher_starts, m_row, o_out, teacher_width, TEACHER_ALIGN)
        b_teacher = b_teacher.to(SUM_TYPE)
        if NORMALIZE:
            # cos(u, v) u - v, of unit rows
            b_residual = total * b_student_scale[:, None] - b_teacher * b_teacher_inverse[:, None]
        else:
            # R = H_s W^T + b - H_t
            b_residual = total - b_teacher
        b_squares += tl.sum(b_residual * b_residual, 1)
        made = b_residual * b_scale[:, None]
        if SUM_COLUMNS:
            # db = R^T 1, of rows that one warp holds: no other has to be waited for
            GROUPS: tl.constexpr = BLOCK_ROW // ROWS_SUMMED
            sums = tl.sum(tl.reshape(made, [GROUPS, ROWS_SUMMED, BLOCK_COLUMN]), 1)
            o_group = index * GROUPS + tl.arange(0, GROUPS)
            where = column_sums + o_group[:, None] * teacher_width + o_out[None, :]
            tl.store(where, sums, mask=m_out[None, :])
        b_made = made.to(OPERAND)
        if STORE:
            # 32 bits hold the offsets in a block
            base = residual + (pair * chunk + block_start) * teacher_width
            where = tl.multiple_of(o_block[:, None] * teacher_width + o_out, [1, TEACHER_ALIGN])
            tl.store(base + where, b_made, mask=m_out[None, :])
        # dH_s = R W
        b_gradient = tl.dot(
            b_made, b_weight, b_gradient, out_dtype=SUM_TYPE, input_precision=GRAD_PRECISION
        )
        if HAS_REST:
            b_gradient_rest = tl.dot(
                b_made,
                b_weight_rest,
                b_gradient_rest,
                out_dtype=SUM_TYPE,
                input_precision=GRAD_PRECISION,
            )
    if NORMALIZE:
        b_squares = unit_distance(b_squares, b_cosine, b_student_inverse, b_teacher_inverse)
    tl.store(partials + index, tl.sum(tl.where(m_row, b_squares, 0.0)))
    # scalars first: addresses of rows that are kept through the loop would spill
    starts = gradient + (pair * rows + first + block_start) * width + o_block * width
    m_block = o_block < last - first - block_start
    store_wide(starts, m_block, tl.arange(0, BLOCK_IN), width, b_gradient, ALIGN)
    if HAS_REST:
        o_rest = BLOCK_IN + tl.arange(0, BLOCK_REST)
        store_wide(starts, m_block, o_rest, width, b_gradient_rest, ALIGN)


@triton.jit
def unit_distance(b_squares, b_cosine, b_student_inverse, b_teacher_inverse):
    """`|u - v|^2` `[rows]` of unit rows from `|cos(u, v) u - v|^2`, their cosines and `1 / |row|`.

    `1 - cos` is `(1 - cos^2) / (1 + cos)`: by subtraction it loses its digits as `u` nears `v`.
    """
    m_student, m_teacher = b_student_inverse != 0, b_teacher_inverse != 0
    near = 2.0 * b_squares / (1.0 + tl.maximum(b_cosine, 0.0))
    b_made = tl.where(b_cosine > 0, near, 2.0 - 2.0 * b_cosine)
    # a row without a direction is 0, and has a distance of 1 from one that has
    b_alone = tl.where(m_student | m_teacher, 1.0, 0.0)
    return tl.where(m_student & m_teacher, b_made, b_alone)


@triton.jit
def inverse_of_norm(squares, ZERO_NORM: tl.constexpr):
    """`1 / |row|` from a row's sum of squares, 0 for rows without a direction.

    NaN where the sum is infinite or NaN.
    """
    norms = tl.sqrt(squares)
    # inf - inf is NaN
    inverse = 1.0 / tl.maximum(norms, ZERO_NORM) + (norms - norms)
    return tl.where(norms <= ZERO_NORM, 0.0, inverse)


@triton.jit
def inverse_norms(b_rows, ZERO_NORM: tl.constexpr):
    """`1 / |row|`, 0 for rows without a direction."""
    return inverse_of_norm(tl.sum(b_rows * b_rows, 1), ZERO_NORM)


@triton.jit
def _unit_fwd_kernel(
    table,
    valid,
    factor,
    projected,
    gradient,
    partials,
    first,
    last,
    chunk,
    rows,
    tokens,
    teacher_width,
    TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    ZERO_NORM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    STORE: tl.constexpr,
):
    """One program: a few whole rows of the chunk.

    Reads `projected` `[pairs, chunk, teacher_width]`, or the student without HAS_WEIGHT. Writes
    `partials` `[pairs, row blocks]` and, with STORE, row gradients times `factor`, `gradient`
    `[pairs, chunk, teacher_width]`, where masked rows are 0.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    teacher_width = teacher_width // TEACHER_ALIGN * TEACHER_ALIGN
    pair = tl.program_id(1).to(tl.int64)
    row = table + pair * 9
    o_row = first + tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    o_column = tl.arange(0, BLOCK_COLUMN)
    m_row = valid_rows(valid, o_row, last, HAS_MASK)
    m_column = o_column < teacher_width
    where = (pair * chunk + o_row - first)[:, None] * teacher_width + o_column[None, :]
    if HAS_WEIGHT:
        b_student = tl.load(projected + where, mask=m_row[:, None] & m_column[None, :], other=0.0)
    else:
        b_student = token_rows(row, o_row, m_row, tokens, o_column, teacher_width, TYPE, ALIGN)
    b_student = b_student.to(SUM_TYPE)
    b_teacher = token_rows(
        row + 3, o_row, m_row, tokens, o_column, teacher_width, TEACHER_TYPE, TEACHER_ALIGN
    ).to(SUM_TYPE)
    inverse = inverse_norms(b_student, ZERO_NORM)[:, None]
    unit = b_student * inverse
    # R = u - v with unit rows u, v, so that nothing cancels but what student and teacher share
    residual = unit - b_teacher * inverse_norms(b_teacher, ZERO_NORM)[:, None]
    index = pair * tl.cdiv(rows, BLOCK_ROW) + first // BLOCK_ROW + tl.program_id(0)
    tl.store(partials + index, tl.sum(residual * residual))
    if STORE:
        # G = (R - (R u^T) u) / |H_s W^T + b|
        along = tl.sum(residual * unit, 1)[:, None]
        made = (residual - along * unit) * (inverse * tl.load(factor))
        tl.store(gradient + where, made, mask=(o_row < last)[:, None] & m_column[None, :])
