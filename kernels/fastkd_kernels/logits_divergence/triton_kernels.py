# mypy: ignore-errors
"""Triton kernels of the divergence of logits.

Sizes: `rows` (batch times tokens), `columns` of the student's vocabulary, of which the first
`shared` are compared. One chunk of rows starts at `first`. Logits are either stored, `[chunk,
columns]` with rows `token_step` apart, or the caller's own `[batch, tokens, columns]`. Prefixes:
`o_` offsets, `m_` mask, `b_` block of values.
"""

import triton
import triton.language as tl

from ..common.divergences_jit import (
    LN2,
    LOG2E,
    divergence_slopes,
    divergence_terms,
    log_sum,
    power_of,
)
from ..common.soft_cap_jit import cap_slope, soft_cap

# how far above the first block's maximum exponentials may lie in the mean, of which a log of their
# sum keeps the digits
ROOM: tl.constexpr = tl.constexpr(16.0)


@triton.jit
def matrix_block(matrix, o_row, m_row, o_column, m_column, step, TRANSPOSED: tl.constexpr):
    """Values `[rows, columns]` of a matrix whose rows (transposed: columns) are `step` apart."""
    o_row, o_column = o_row.to(tl.int64)[:, None], o_column.to(tl.int64)[None, :]
    where = o_column * step + o_row if TRANSPOSED else o_row * step + o_column
    return tl.load(matrix + where, mask=m_row[:, None] & m_column[None, :], other=0.0)


@triton.jit
def _matmul_kernel(
    left,
    right,
    bias,
    valid,
    out,
    rows,
    columns,
    inner,
    left_rows,
    left_inner,
    right_columns,
    part_steps,
    left_step,
    right_step,
    out_step,
    OPERAND: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    LEFT_TRANSPOSED: tl.constexpr,
    RIGHT_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program: a block of rows and of columns of `out`, over `part_steps` of the inner sum.

    `out` `[parts, rows, columns]` is `left` `[rows, inner]` times `right` `[inner, columns]`, plus
    `bias` `[columns]`, plus what `out` holds with ADD. A transposed operand is stored as
    `[inner, rows]` or `[columns, inner]`. `left` may be padded to `left_rows` and, with zeros, to
    `left_inner`; `out` has zeros beyond `right_columns`. HAS_MASK leaves out where `valid`
    `[inner]` is 0. ALIGN divides the steps and the sizes along which memory is contiguous. Programs
    of the same columns follow each other, so that a weight is read from memory once.
    """
    # what the compiler cannot see of an argument: it is a multiple of ALIGN
    left_step, right_step = left_step // ALIGN * ALIGN, right_step // ALIGN * ALIGN
    out_step, columns = out_step // ALIGN * ALIGN, columns // ALIGN * ALIGN
    if LEFT_TRANSPOSED:
        left_rows = left_rows // ALIGN * ALIGN
    else:
        left_inner = left_inner // ALIGN * ALIGN
    if RIGHT_TRANSPOSED:
        inner = inner // ALIGN * ALIGN
    else:
        right_columns = right_columns // ALIGN * ALIGN
    row_blocks = tl.cdiv(rows, BLOCK_ROW)
    o_row = tl.program_id(0) % row_blocks * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    o_column = tl.program_id(0) // row_blocks * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    m_column = o_column < right_columns
    begin = tl.program_id(1) * part_steps * BLOCK_SUM
    end = tl.minimum(begin + part_steps * BLOCK_SUM, inner)
    total = tl.zeros([BLOCK_ROW, BLOCK_COLUMN], dtype=SUM_TYPE)
    for start in range(begin, end, BLOCK_SUM):
        o_inner = start + tl.arange(0, BLOCK_SUM)
        m_left, m_right = o_inner < left_inner, o_inner < inner
        if HAS_MASK:
            m_valid = tl.load(valid + o_inner, mask=m_right, other=0) != 0
            m_left, m_right = m_left & m_valid, m_right & m_valid
        b_left = matrix_block(
            left, o_row, o_row < left_rows, o_inner, m_left, left_step, LEFT_TRANSPOSED
        )
        b_right = matrix_block(
            right, o_inner, m_right, o_column, m_column, right_step, RIGHT_TRANSPOSED
        )
        total += tl.dot(b_left.to(OPERAND), b_right.to(OPERAND), input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + o_column, mask=m_column, other=0.0).to(SUM_TYPE)[None, :]
    o_out = (tl.program_id(1).to(tl.int64) * rows + o_row)[:, None] * out_step + o_column[None, :]
    m_out = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    if ADD:
        total += tl.load(out + o_out, mask=m_out, other=0.0)
    tl.store(out + o_out, total, mask=m_out)


@triton.jit
def row_start(logits, row, first, tokens, batch_step, token_step, STORED: tl.constexpr):
    """Address of a row of logits, stored or the caller's."""
    if STORED:
        return logits + (row - first).to(tl.int64) * token_step
    row = row.to(tl.int64)
    return logits + row // tokens * batch_step + row % tokens * token_step


@triton.jit
def read_logits(
    start, o_column, m_column, other, finish, SUM_TYPE: tl.constexpr, FINISH: tl.constexpr
):
    """A block of a row of logits, finished; `other` is what masked ones are before that.

    `finish` is the factor on what the last layer gave and the soft cap. FINISH says which of them a
    model has: 0 neither, 1 the factor, 2 the cap and perhaps the factor.
    """
    b_logits = tl.load(start + o_column, mask=m_column, other=other).to(SUM_TYPE)
    if FINISH > 0:
        b_logits = b_logits * finish[0]
    return soft_cap(b_logits, finish[1], FINISH > 1)


@triton.jit
def logs_below(b_logits, base, unit, SUM_TYPE: tl.constexpr):
    """Logs of probabilities from logits and a `softmax_base`, but no lower than SUM_TYPE's lowest
    number, by which words are masked in both sides alike."""
    LOWEST: tl.constexpr = (
        -1.7976931348623157e308 if tl.float64 == SUM_TYPE else -3.4028234663852886e38
    )
    # large logits lose nothing where their maximum is subtracted first
    b_log = (b_logits - base[0]) * unit - base[1]
    return tl.maximum(b_log, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def softmax_base(
    start,
    columns,
    unit,
    finish,
    SUM_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    FINISH: tl.constexpr,
    BITS: tl.constexpr,
):
    """What to subtract from a row of logits, and the log of the sum of exponentials of what is left
    times `unit`, to base 2 with BITS.

    The first block's maximum stands for that of all, so that nothing is compared; where others lie
    far above it the row is swept once more.
    """
    # what is masked stays so where nothing is made of it
    OTHER: tl.constexpr = float("-inf") if FINISH == 0 else 0.0
    o_column = tl.arange(0, BLOCK)
    b_logits = read_logits(start, o_column, o_column < columns, OTHER, finish, SUM_TYPE, FINISH)
    maximum = tl.max(tl.where(o_column < columns, b_logits, float("-inf")))
    b_total = tl.zeros([BLOCK], SUM_TYPE)
    for begin in range(0, columns, BLOCK):
        m_column = begin + o_column < columns
        b_logits = read_logits(start, begin + o_column, m_column, OTHER, finish, SUM_TYPE, FINISH)
        b_terms = power_of((b_logits - maximum) * unit, BITS)
        b_total += b_terms if FINISH == 0 else tl.where(m_column, b_terms, 0.0)
    total = tl.sum(b_total)
    if total > ROOM * columns:
        maximum = tl.full([], float("-inf"), SUM_TYPE)
        total = tl.full([], 0.0, SUM_TYPE)
        for begin in range(0, columns, BLOCK):
            m_column = begin + o_column < columns
            b_logits = read_logits(
                start, begin + o_column, m_column, OTHER, finish, SUM_TYPE, FINISH
            )
            b_logits = tl.where(m_column, b_logits, float("-inf"))
            higher = tl.maximum(maximum, tl.max(b_logits))
            total *= power_of((maximum - higher) * unit, BITS)
            total += tl.sum(power_of((b_logits - higher) * unit, BITS))
            maximum = higher
    return maximum, log_sum(total, BITS)


@triton.jit
def block_terms(
    student_start,
    teacher_start,
    o_column,
    m_column,
    student_base,
    teacher_base,
    unit,
    shares,
    shared,
    student_finish,
    teacher_finish,
    SUM_TYPE: tl.constexpr,
    KIND: tl.constexpr,
    SMALL: tl.constexpr,
    EVEN: tl.constexpr,
    STUDENT_FINISH: tl.constexpr,
    TEACHER_FINISH: tl.constexpr,
    BITS: tl.constexpr,
):
    """`divergence_terms` of one block of a row; value and weighted are 0 where masked."""
    b_student = read_logits(
        student_start, o_column, m_column, 0.0, student_finish, SUM_TYPE, STUDENT_FINISH
    )
    b_teacher = read_logits(
        teacher_start, o_column, m_column, 0.0, teacher_finish, SUM_TYPE, TEACHER_FINISH
    )
    if KIND == "mse":
        difference = tl.where(m_column, b_student - b_teacher, 0.0)
        share = difference / shared
        return difference * share, difference, 2.0 * share, difference
    value, weighted, point, p = divergence_terms(
        logs_below(b_student, student_base, unit, SUM_TYPE),
        logs_below(b_teacher, teacher_base, unit, SUM_TYPE),
        shares,
        KIND,
        SMALL,
        EVEN,
        BITS,
    )
    return tl.where(m_column, value, 0.0), tl.where(m_column, weighted, 0.0), point, p


@triton.jit
def _row_kernel(
    student,
    teacher,
    labels,
    valid,
    scalars,
    factors,
    values,
    gradient,
    first,
    rows,
    tokens,
    columns,
    shared,
    student_batch,
    student_token,
    teacher_batch,
    teacher_token,
    gradient_first,
    gradient_columns,
    gradient_step,
    SUM_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    SMALL: tl.constexpr,
    EVEN: tl.constexpr,
    BITS: tl.constexpr,
    STUDENT_STORED: tl.constexpr,
    TEACHER_STORED: tl.constexpr,
    STUDENT_FINISH: tl.constexpr,
    TEACHER_FINISH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    STORE: tl.constexpr,
):
    """One program: one row of logits of both models.

    Writes `values` `[1 or 2, rows]` (divergence, cross-entropy) and, with STORE, the gradient of
    what the student's last layer gave for upstream gradients `factors` `[1 or 2]`, which may take
    the place of the logits and is 0 beyond them up to `gradient_columns`. `scalars` are
    1 / temperature, the shares of teacher and student in the mixture, the scales of the divergence
    and of its gradient, and the finishes (see `read_logits`) of student and teacher. With BITS logs
    are to base 2, which saves a product for every exponential.
    """
    row = first + tl.program_id(0)
    student_start = row_start(
        student, row, first, tokens, student_batch, student_token, STUDENT_STORED
    )
    teacher_start = row_start(
        teacher, row, first, tokens, teacher_batch, teacher_token, TEACHER_STORED
    )
    compared, read = shared, columns
    if HAS_MASK:
        # nothing is read of a row that does not count
        counts = tl.load(valid + row) != 0
        compared, read = tl.where(counts, shared, 0), tl.where(counts, columns, 0)
    scale, shares = tl.load(scalars), (tl.load(scalars + 1), tl.load(scalars + 2))
    student_finish = (tl.load(scalars + 5), tl.load(scalars + 6))
    teacher_finish = (tl.load(scalars + 7), tl.load(scalars + 8))
    nats: tl.constexpr = LOG2E if BITS else 1.0
    unit = scale * nats
    student_base = (unit, unit)
    teacher_base = (unit, unit)
    if KIND != "mse":
        student_base = softmax_base(
            student_start, compared, unit, student_finish, SUM_TYPE, BLOCK, STUDENT_FINISH, BITS
        )
        teacher_base = softmax_base(
            teacher_start, compared, unit, teacher_finish, SUM_TYPE, BLOCK, TEACHER_FINISH, BITS
        )
    CENTRED: tl.constexpr = KIND == "reverse_kl" or KIND == "js" or KIND == "skew_kl"
    value = tl.full([], 0.0, SUM_TYPE)
    mean = tl.full([], 0.0, SUM_TYPE)
    if CENTRED or not STORE:
        for begin in range(0, compared, BLOCK):
            o_column = begin + tl.arange(0, BLOCK)
            b_value, b_weighted, _, _ = block_terms(
                student_start,
                teacher_start,
                o_column,
                o_column < compared,
                student_base,
                teacher_base,
                unit,
                shares,
                shared,
                student_finish,
                teacher_finish,
                SUM_TYPE,
                KIND,
                SMALL,
                EVEN,
                STUDENT_FINISH,
                TEACHER_FINISH,
                BITS,
            )
            value += tl.sum(b_value)
            mean += tl.sum(b_weighted)
    if HAS_LABELS:
        label = tl.load(labels + row)
        counted = (label != -100) & (read > 0)
        inside = (label >= 0) & (label < read)
        hard_base = softmax_base(
            student_start, read, nats, student_finish, SUM_TYPE, BLOCK, STUDENT_FINISH, BITS
        )
        picked = read_logits(
            student_start, label, inside, 0.0, student_finish, SUM_TYPE, STUDENT_FINISH
        )
        picked = tl.where(inside, picked, float("nan"))
        hard = hard_base[0] - picked + hard_base[1] * (LN2 if BITS else 1.0)
        hard = tl.where(counted, hard, 0.0)
        tl.store(values + rows + row, hard)
        if STORE:
            # a label outside the vocabulary shows as NaN
            hard_factor = tl.where(inside, tl.load(factors + 1), float("nan"))
            hard_factor = tl.where(counted, hard_factor, 0.0)
    if STORE:
        factor = tl.load(factors) * tl.load(scalars + 4)
        out = gradient + (row - gradient_first).to(tl.int64) * gradient_step
        for begin in range(0, gradient_columns, BLOCK):
            o_column = begin + tl.arange(0, BLOCK)
            m_column = o_column < compared
            b_value, _, b_point, b_p = block_terms(
                student_start,
                teacher_start,
                o_column,
                m_column,
                student_base,
                teacher_base,
                unit,
                shares,
                shared,
                student_finish,
                teacher_finish,
                SUM_TYPE,
                KIND,
                SMALL,
                EVEN,
                STUDENT_FINISH,
                TEACHER_FINISH,
                BITS,
            )
            if not CENTRED:
                value += tl.sum(b_value)
            if KIND != "mse":
                b_point = divergence_slopes(b_p, b_point, mean, shares, KIND)
            b_gradient = tl.where(m_column, b_point * factor, 0.0)
            if HAS_LABELS:
                m_read = o_column < read
                b_student = read_logits(
                    student_start, o_column, m_read, 0.0, student_finish, SUM_TYPE, STUDENT_FINISH
                )
                b_hard = power_of((b_student - hard_base[0]) * nats - hard_base[1], BITS)
                b_hard = tl.where(o_column == label, b_hard - 1.0, b_hard)
                b_gradient += tl.where(m_read & counted, b_hard * hard_factor, 0.0)
            if STUDENT_FINISH > 1:
                b_given = read_logits(
                    student_start, o_column, o_column < read, 0.0, student_finish, SUM_TYPE, 1
                )
                b_gradient *= cap_slope(b_given, student_finish[1])
            if STUDENT_FINISH > 0:
                b_gradient *= student_finish[0]
            tl.store(out + o_column, b_gradient, mask=o_column < gradient_columns)
    tl.store(values + row, value * tl.load(scalars + 3))
