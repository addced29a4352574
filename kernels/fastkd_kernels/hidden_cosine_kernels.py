# mypy: ignore-errors
"""Triton kernel of the losses on normalised hidden states: rows that fit one program's registers.

Sizes and prefixes are those of `hidden_kernels.py`. The road not taken: rows in blocks of columns,
which reads both sides three times, for norms, for the residual's part along the row, and for
gradients.
"""

import triton
import triton.language as tl

from .hidden_kernels import token_rows, valid_rows


@triton.jit
def inverse_norms(b_rows, ZERO_NORM: tl.constexpr):
    """`1 / |row|`, 0 for rows without a direction."""
    norms = tl.sqrt(tl.sum(b_rows * b_rows, 1))
    return tl.where(norms > ZERO_NORM, 1.0 / tl.maximum(norms, ZERO_NORM), 0.0)


@triton.jit
def unit_residuals(
    table,
    valid,
    projected,
    gradient,
    partials,
    first,
    last,
    chunk,
    rows,
    tokens,
    target_width,
    TYPE: tl.constexpr,
    TARGET_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    ALIGN: tl.constexpr,
    TARGET_ALIGN: tl.constexpr,
    ZERO_NORM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    STORE: tl.constexpr,
):
    """One program: a few whole rows of the chunk.

    Reads `projected` `[pairs, chunk, target_width]`, or the student without HAS_WEIGHT. Writes
    `partials` `[pairs, row blocks]` and, with STORE, row gradients `gradient`
    `[pairs, chunk, target_width]`, where masked rows are 0.
    """
    # what the compiler cannot see of an argument: it is a multiple of this
    target_width = target_width // TARGET_ALIGN * TARGET_ALIGN
    pair = tl.program_id(1).to(tl.int64)
    row = table + pair * 9
    o_row = first + tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    o_column = tl.arange(0, BLOCK_COLUMN)
    m_row = valid_rows(valid, o_row, last, HAS_MASK)
    m_column = o_column < target_width
    where = (pair * chunk + o_row - first)[:, None] * target_width + o_column[None, :]
    if HAS_WEIGHT:
        b_own = tl.load(projected + where, mask=m_row[:, None] & m_column[None, :], other=0.0)
    else:
        b_own = token_rows(row, o_row, m_row, tokens, o_column, target_width, TYPE, ALIGN)
    b_own = b_own.to(SUM_TYPE)
    b_target = token_rows(
        row + 3, o_row, m_row, tokens, o_column, target_width, TARGET_TYPE, TARGET_ALIGN
    ).to(SUM_TYPE)
    inverse = inverse_norms(b_own, ZERO_NORM)[:, None]
    unit = b_own * inverse
    # R = u - v with unit rows u, v, so that nothing cancels but what student and teacher share
    residual = unit - b_target * inverse_norms(b_target, ZERO_NORM)[:, None]
    index = pair * tl.cdiv(rows, BLOCK_ROW) + first // BLOCK_ROW + tl.program_id(0)
    tl.store(partials + index, tl.sum(residual * residual))
    if STORE:
        # G = (R - (R u^T) u) / |H_s W^T + b|
        along = tl.sum(residual * unit, 1)[:, None]
        made = (residual - along * unit) * inverse
        tl.store(gradient + where, made, mask=(o_row < last)[:, None] & m_column[None, :])
