"""Gradients that a forward makes: laid out as their inputs, for an upstream gradient of 1.

The backward multiplies them by the upstream gradient of each pair, in one launch for queries and
keys. bf16 has the exponents of fp32, so they wait in their input's dtype; those of fp16 would
underflow, and wait in fp32.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .autograd import Named, planned, register
from .launch import FUSION

_BLOCK = 4096


def waiting_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient of an input of `dtype` waits for its backward."""
    return torch.float32 if dtype == torch.float16 else dtype


def tokens_first(like: Tensor) -> bool:
    """Whether heads `[batch, heads, tokens, dim]` are views of `[batch, tokens, heads, dim]`, in
    which 32-bit offsets reach all rows of a head."""
    return like.stride(2) > like.stride(1) and math.prod(like.shape[1:]) < 1 << 31


def gradient_maker(pairs: int, like: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Makes empty `[pairs, *like.shape]`, each laid out as heads `[batch, heads, tokens, dim]` are.

    It keeps nothing of `like`.
    """
    batch, heads, tokens, dim = like.shape
    item = heads * tokens * dim
    rows = (dim, heads * dim) if tokens_first(like) else (tokens * dim, dim)
    strides = (batch * item, item, *rows, 1)
    return partial(
        torch.empty_strided, (pairs, *like.shape), strides, dtype=dtype, device=like.device
    )


def stacked_gradient(pairs: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty `[pairs, *like.shape]`, each laid out as heads `[batch, heads, tokens, dim]` are."""
    return gradient_maker(pairs, like, dtype)()


def rescaled(
    first: Tensor, second: Tensor, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Two stacks `[pairs, ...]`, dense or empty, times `factor` `[pairs]`, in `dtype`: Triton."""
    made: tuple[Tensor, Tensor] = _registered(first, second, factor, dtype)
    return made


@planned
def _rescaled(
    first: Tensor, second: Tensor, factor: Tensor, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor]]:
    from .quick_launch import Quick
    from .rescale_kernel import _rescale_kernel

    pairs = factor.shape[0]
    sizes = [unit.numel() // pairs for unit in (first, second)]
    blocks = [-(-size // _BLOCK) for size in sizes]
    launch = Quick(_rescale_kernel).bound(
        (sum(blocks), pairs),
        first_size=sizes[0],
        second_size=sizes[1],
        BLOCK=_BLOCK,
        num_warps=8,
        **FUSION,
    )

    def run(
        first: Tensor, second: Tensor, factor: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        of_first, of_second = (torch.empty_like(unit, dtype=dtype) for unit in (first, second))
        launch(first, second, factor.contiguous(), of_first, of_second)
        return of_first, of_second

    return run


def _fake(given: Named) -> tuple[Tensor, Tensor]:
    first, second = (
        torch.empty_like(unit, dtype=given.dtype) for unit in (given.first, given.second)
    )
    return first, second


_registered = register("rescaled", _rescaled, _fake)
