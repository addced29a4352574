"""Divergences of attention probabilities on Triton: what CUDA tensors run.

Every launch covers all layer pairs through a table of addresses.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from .attention_divergence_backward_kernels import key_slopes, query_slopes
from .attention_divergence_kernels import stream_rows
from .attention_divergence_launch import divergence_launch, row_stats
from .attention_score_mse_triton import Call, type_constants
from .head_groups import Pair
from .launch import platform, product_dtype
from .tl_types import TYPES


def forward_types(dtype: torch.dtype, target_dtype: torch.dtype, kind: str) -> dict[str, Any]:
    return {**type_constants(dtype, target_dtype), "KIND": kind, "STATS": row_stats(kind)}


def backward_types(dtype: torch.dtype, target_dtype: torch.dtype, kind: str) -> dict[str, Any]:
    """Those of the forward, and the type in which slopes enter their product."""
    # the teacher's entropy has no gradient
    made = forward_types(dtype, target_dtype, "kl" if kind == "cross_entropy" else kind)
    return made | {"GRAD_TYPE": TYPES[product_dtype(dtype)]}


def stream(
    pairs: list[Pair],
    key_mask: Tensor | None,
    rows: Tensor | None,
    kind: str,
    causal: bool,
    window: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Sums over rows `[pairs]` and `stats` `[pairs, 4 or 5, batch, heads, tokens]` in one launch.

    `rows` are the counted query rows, bool `[batch, tokens]`; `window` 0 is none.
    """
    call = Call(pairs, key_mask, rows)
    sizes, count = call.sizes, len(pairs)
    constants, options = _constants(call, "rows", kind, causal, window)
    query_blocks = triton.cdiv(sizes["tokens"], constants["BLOCK_QUERY"])
    programs = query_blocks * sizes["batch"] * sizes["heads"]
    shape = (count, row_stats(kind), sizes["batch"], sizes["heads"], sizes["tokens"])
    stats = call.new(*(shape if need_grad else (0,)))
    partials = call.new(count, programs)
    stream_rows[(programs, count)](
        call.table,
        call.scales,
        call.valid,
        stats,
        partials,
        **sizes,
        window=window,
        **constants,
        **forward_types(*call.dtypes, kind),
        WRITE_STATS=need_grad,
        **options,
    )
    return partials.sum(1), stats


def stream_backward(
    factor: Tensor,
    stats: Tensor,
    pairs: list[Pair],
    key_mask: Tensor | None,
    rows: Tensor | None,
    kind: str,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Gradients `[pairs, batch, heads | kv_heads, tokens, dim_s]` for `factor` `[pairs]`."""
    call = Call(pairs, key_mask, rows)
    sizes, count = call.sizes, len(pairs)
    factor = factor.contiguous()
    made = []
    for kernel, part, block, like in (
        (query_slopes, "query", "BLOCK_QUERY", call.first.query),
        (key_slopes, "key", "BLOCK_KEY", call.first.key),
    ):
        constants, options = _constants(call, part, kind, causal, window)
        gradient = call.new(count, *like.shape, dtype=call.dtypes[0])
        blocks = triton.cdiv(sizes["tokens"], constants[block])
        kernel[(blocks * like.shape[0] * like.shape[1], count)](
            call.table,
            call.scales,
            call.valid,
            stats,
            factor,
            gradient,
            **sizes,
            window=window,
            **constants,
            **backward_types(*call.dtypes, kind),
            **options,
        )
        made.append(gradient)
    return made[0], made[1]


def _constants(
    call: Call, part: str, kind: str, causal: bool, window: int
) -> tuple[dict[str, Any], dict[str, int]]:
    launch = divergence_launch(part, kind, call.dims, call.dtypes, platform())
    shared = {name: call.constants[name] for name in ("ALIGN", "TARGET_ALIGN", "HAS_MASK")}
    constants = {**shared, **launch.constants, "CAUSAL": causal, "WINDOWED": window > 0}
    return constants, {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
