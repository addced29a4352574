# mypy: ignore-errors
"""Loads and stores of several elements at once, at addresses that the compiler cannot see through.

It widens one where addresses and the mask's edge are multiples of the width. What is read from a
table of addresses it does not know, and a hint on an argument of a function is lost when that is
inlined, so the hint stands here, on the addresses themselves.
"""

import triton
import triton.language as tl


@triton.jit
def load_wide(starts, m_row, o_column, columns, ALIGN: tl.constexpr):
    """Values `[rows, columns]` of rows at the addresses `starts`, 0 beyond `columns` and where
    `m_row` is False.

    ALIGN elements divide every address, `columns`, and the first of `o_column`.
    """
    BYTES: tl.constexpr = starts.dtype.element_ty.primitive_bitwidth // 8
    where = tl.multiple_of(starts[:, None] + o_column[None, :], [1, ALIGN * BYTES])
    m_column = o_column < columns // ALIGN * ALIGN
    return tl.load(where, mask=m_row[:, None] & m_column[None, :], other=0.0)


@triton.jit
def store_wide(starts, m_row, o_column, columns, values, ALIGN: tl.constexpr):
    """Write `values` `[rows, columns]` where `load_wide` reads them, in the dtype of `starts`."""
    BYTES: tl.constexpr = starts.dtype.element_ty.primitive_bitwidth // 8
    where = tl.multiple_of(starts[:, None] + o_column[None, :], [1, ALIGN * BYTES])
    m_column = o_column < columns // ALIGN * ALIGN
    mask = m_row[:, None] & m_column[None, :]
    tl.store(where, values.to(starts.dtype.element_ty), mask=mask)
