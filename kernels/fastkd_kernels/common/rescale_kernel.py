# mypy: ignore-errors
"""Triton kernel that multiplies gradients by a number a pair."""

import triton
import triton.language as tl


@triton.jit
def _rescale_kernel(
    first,
    second,
    factor,
    first_out,
    second_out,
    first_size,
    second_size,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of a pair, of `first` `[pairs, first_size]` or of `second`.

    Writes them times `factor` `[pairs]` to `first_out` and `second_out`.
    """
    pair = tl.program_id(1).to(tl.int64)
    value = tl.load(factor + pair)
    block = tl.program_id(0).to(tl.int64)
    first_blocks = tl.cdiv(first_size, BLOCK)
    if block < first_blocks:
        o_one = block * BLOCK + tl.arange(0, BLOCK)
        m_one = o_one < first_size
        b_one = tl.load(first + pair * first_size + o_one, mask=m_one) * value
        tl.store(first_out + pair * first_size + o_one, b_one, mask=m_one)
    else:
        o_one = (block - first_blocks) * BLOCK + tl.arange(0, BLOCK)
        m_one = o_one < second_size
        b_one = tl.load(second + pair * second_size + o_one, mask=m_one) * value
        tl.store(second_out + pair * second_size + o_one, b_one, mask=m_one)
