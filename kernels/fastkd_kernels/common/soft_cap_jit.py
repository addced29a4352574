# mypy: ignore-errors
"""The soft cap of scores and logits (Gemma 2, arXiv 2408.00118, section 2), in Triton."""

import triton
import triton.language as tl


@triton.jit
def soft_cap(score, cap, CAP: tl.constexpr):
    """`cap * tanh(score / cap)`; the scores as they are without CAP.

    Sums of products are spelled `tl.fma`: what the compiler fused on one side alone would stay in
    the difference of a student and a teacher that are close.
    """
    if CAP:
        x = score * (1.0 / cap)
        e = tl.exp(-2.0 * tl.abs(x))
        reached = cap * tl.fma(-2.0 * e, 1.0 / (1.0 + e), tl.full(x.shape, 1.0, x.dtype))
        # near 0 a small correction of the score, whose digits 1 - e would lose
        near = tl.fma(score, tanh_excess(x * x), score)
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
        term = tl.fma(q, -5.70498872745e-3, 2.06390887954e-2)
        term = tl.fma(q, term, -5.37397155531e-2)
        term = tl.fma(q, term, 1.33314422036e-1)
        return q * tl.fma(q, term, -3.33332819422e-1)


@triton.jit
def cap_slope(score, cap):
    """Derivative of `soft_cap`: `1 - tanh^2`, as `4 e / (1 + e)^2` with digits at any score."""
    e = tl.exp(-2.0 * tl.abs(score * (1.0 / cap)))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))
