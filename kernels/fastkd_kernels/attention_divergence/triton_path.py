"""Divergences of attention probabilities on Triton: what CUDA tensors run.

Every launch covers all layer pairs through a table of addresses.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..common.attention_call import Call, type_constants
from ..common.head_groups import Pair
from ..common.launch import Launch, dot_precision, platform, power_of_two, product_dtype
from ..common.tensor_table import to_device
from ..common.tl_types import TYPES
from .triton_kernels import _bwd_dk_kernel, _bwd_dq_kernel, _fwd_kernel

# kinds whose gradient needs a constant of each query row besides both softmax divisors
CONSTANT_KINDS = ("reverse_kl", "js", "mse", "cosine")
# kinds whose forward sweeps the keys twice
TWO_SWEEPS = ("js", "mse", "cosine")


def row_stats(kind: str) -> int:
    """Floats of each query row that the backward reads."""
    return 5 if kind in CONSTANT_KINDS else 4


def divergence_launch(
    kernel: str,
    kind: str,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    on: str = "cuda",
    *,
    capped: bool = False,
    sunk: bool = False,
) -> Launch:
    """Blocks of one kernel: "fwd", "bwd_dq" or "bwd_dk".

    A program holds one block, of keys for "bwd_dk" and of query rows otherwise, and moves along the
    other side in narrower ones. `capped` is of either side, and
    `sunk` is with attention sinks. Blocks for half precision and heads of up to 128 were the
    fastest of twelve on an H100.
    """
    block_dim, block_teacher = (power_of_two(dim) for dim in dims)
    width = max(block_dim, block_teacher)
    narrow = all(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)
    whole = narrow and width <= 128 and on != "hip"
    # 64 rows make Hopper's and Blackwell's tensor cores take a product
    held = (64 if narrow else 32) if width <= 128 else 16
    moving = 32 if width <= 64 or (width <= 128 and (narrow or kernel != "bwd_dk")) else 16
    constants: dict[str, int | str] = {
        "BLOCK_QUERY": moving if kernel == "bwd_dk" else held,
        "BLOCK_KEY": held if kernel == "bwd_dk" else moving,
        "BLOCK_DIM": block_dim,
        "BLOCK_TEACHER_DIM": block_teacher,
        # columns of one product of scores; 0 takes whole heads, which spill in fp32
        "CHUNK": 0 if whole else 32 if narrow else 16,
        "SCORE_PRECISION": dot_precision(True, on),
    }
    if kernel != "fwd":
        constants["GRAD_PRECISION"] = dot_precision(dtypes[0] != torch.float16, on)
    if whole:
        return Launch(
            constants, num_warps=4, num_stages=1 if kernel == "bwd_dk" and width > 64 else 2
        )
    if narrow:
        few = kernel == "bwd_dk" and row_stats(kind) == 4 and block_dim + block_teacher < 128
    else:
        few = width <= 64 and not (kernel == "fwd" and kind in TWO_SWEEPS)
    # with 8 warps, wide heads spill: capped in two sweeps on sm_90, with sinks on sm_80
    spills = (capped and kernel == "fwd" and kind in TWO_SWEEPS) or (sunk and kernel == "bwd_dq")
    few = few or (spills and width > 128)
    # a warp of AMD's has 64 threads
    return Launch(constants, num_warps=4 if few or on == "hip" else 8, num_stages=1)


def forward_types(dtype: torch.dtype, teacher_dtype: torch.dtype, kind: str) -> dict[str, Any]:
    return {**type_constants(dtype, teacher_dtype), "KIND": kind, "STATS": row_stats(kind)}


def backward_types(dtype: torch.dtype, teacher_dtype: torch.dtype, kind: str) -> dict[str, Any]:
    """Those of the forward, and the type in which slopes enter their product."""
    # the teacher's entropy has no gradient
    made = forward_types(dtype, teacher_dtype, "kl" if kind == "cross_entropy" else kind)
    return made | {"GRAD_TYPE": TYPES[product_dtype(dtype)]}


class _Softmax:
    """Soft caps `[pairs, 2]` and sinks `[pairs, 2, heads]` of a call, and which are there.

    What is not there is not read; `scales` stand in its place.
    """

    def __init__(self, call: Call, pairs: list[Pair]):
        first = pairs[0]
        self.caps = self.sinks = call.scales
        self.flags = {
            "STUDENT_CAP": first.student_softcap is not None,
            "TEACHER_CAP": first.teacher_softcap is not None,
        }
        self.has_sinks = first.student_sinks is not None
        if any(self.flags.values()):
            caps = [[pair.student_softcap or 1.0, pair.teacher_softcap or 1.0] for pair in pairs]
            self.caps = to_device(caps, call.dtype, first.query)
        if self.has_sinks:
            sides = [(pair.student_sinks, pair.teacher_sinks) for pair in pairs]
            self.sinks = torch.stack(
                [sinks for side in sides for sinks in side if sinks is not None]
            )


def forward(
    pairs: list[Pair],
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    kind: str,
    causal: bool,
    window: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Sums over rows `[pairs, batch]` and `stats` `[pairs, 4 or 5, batch, heads, tokens]`.

    One launch. `row_mask` are the counted query rows, bool `[batch, tokens]`; `window` 0 is none.
    """
    call = Call(pairs, key_mask, row_mask)
    sizes, count = call.sizes, len(pairs)
    softmax = _Softmax(call, pairs)
    constants, options = _constants(call, "fwd", kind, causal, window, softmax)
    query_blocks = triton.cdiv(sizes["tokens"], constants["BLOCK_QUERY"])
    programs = query_blocks * sizes["batch"] * sizes["heads"]
    shape = (count, row_stats(kind), sizes["batch"], sizes["heads"], sizes["tokens"])
    stats = call.new(*(shape if need_grad else (0,)))
    partials = call.new(count, programs)
    _fwd_kernel[(programs, count)](
        call.table,
        call.scales,
        softmax.caps,
        softmax.sinks,
        call.valid,
        stats,
        partials,
        **sizes,
        window=window,
        **constants,
        **forward_types(*call.dtypes, kind),
        SINK=softmax.has_sinks,
        WRITE_STATS=need_grad,
        **options,
    )
    # programs of one batch item follow each other
    return partials.view(count, sizes["batch"], -1).sum(2), stats


def backward(
    factor: Tensor,
    stats: Tensor,
    pairs: list[Pair],
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    kind: str,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `[pairs, batch, heads | kv_heads, tokens, dim_s]` for `factor` `[pairs, batch]`.

    And of the sinks, `[pairs, heads]`: empty where there are none.
    """
    call = Call(pairs, key_mask, row_mask)
    softmax = _Softmax(call, pairs)
    sizes, count = call.sizes, len(pairs)
    factor = factor.contiguous()
    made = []
    for name, kernel, block, like in (
        ("bwd_dq", _bwd_dq_kernel, "BLOCK_QUERY", call.first.query),
        ("bwd_dk", _bwd_dk_kernel, "BLOCK_KEY", call.first.key),
    ):
        constants, options = _constants(call, name, kind, causal, window, softmax)
        gradient = call.new(count, *like.shape, dtype=call.dtypes[0])
        blocks = triton.cdiv(sizes["tokens"], constants[block])
        programs = like.shape[0] * like.shape[1] * blocks
        sinks = {}
        if name == "bwd_dq":
            has_sinks = softmax.has_sinks
            sink_partials = call.new(count, programs if has_sinks else 0)
            sinks = {"sinks": softmax.sinks, "sink_partials": sink_partials, "SINK": has_sinks}
        kernel[(programs, count)](
            call.table,
            call.scales,
            softmax.caps,
            call.valid,
            stats,
            factor,
            gradient,
            **sizes,
            window=window,
            **constants,
            **backward_types(*call.dtypes, kind),
            **sinks,
            **options,
        )
        made.append(gradient)
    if not softmax.has_sinks:
        return made[0], made[1], call.new(0)
    of_blocks = sink_partials.view(count, sizes["batch"], sizes["heads"], -1)
    return made[0], made[1], of_blocks.sum((1, 3))


def _constants(
    call: Call, kernel: str, kind: str, causal: bool, window: int, softmax: _Softmax
) -> tuple[dict[str, Any], dict[str, int]]:
    form = {"capped": any(softmax.flags.values()), "sunk": softmax.has_sinks}
    launch = divergence_launch(kernel, kind, call.dims, call.dtypes, platform(), **form)
    shared = {name: call.constants[name] for name in ("ALIGN", "TEACHER_ALIGN", "HAS_MASK")}
    masks = {"CAUSAL": causal, "WINDOWED": window > 0}
    constants = {**shared, **launch.constants, **masks, **softmax.flags}
    return constants, {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
