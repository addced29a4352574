"""Divergences of attention probabilities on Triton: what CUDA tensors run.

Every launch covers all layer pairs through a table of addresses.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.attention_call import Call, Heads, type_constants
from ..common.attention_columns import Masks
from ..common.head_groups import Pair
from ..common.launch import (
    Launch,
    cdiv,
    dot_precision,
    holds_products,
    is_half,
    is_hopper,
    is_large,
    platform,
    power_of_two,
    product_dtype,
    whole_head_blocks,
)
from ..common.quick_launch import Quick
from ..common.rescale import waiting_dtype
from ..common.short_sequences import heads_of_program, short_launch, takes_short
from ..common.tensor_table import to_device
from ..common.tl_types import TYPES
from .short_kernel import _short_kernel
from .sweep_kernels import _dk_value_kernel, _rows_dq_kernel
from .triton_kernels import _dk_kernel, _dq_kernel, _rows_kernel

# kinds whose gradient needs a constant of each query row besides both softmax divisors
CONSTANT_KINDS = ("reverse_kl", "js", "mse", "cosine")
# how far ahead the short kernel loads, the fastest on an H100
SHORT_STAGES = 2


def row_stats(kind: str) -> int:
    """Floats of each query row that the gradient kernels read."""
    return 5 if kind in CONSTANT_KINDS else 4


@cache
def divergence_launch(
    kernel: str,
    kind: str,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    on: str = "cuda",
    *,
    capped: bool = False,
    sunk: bool = False,
    large: bool = True,
) -> Launch:
    """Blocks of one kernel: "rows", "dq" or "dk".

    A program holds one block, of keys for "dk" and of query rows otherwise, and moves along the
    other side in narrower ones. `capped` is of either side, and `sunk` is with attention sinks;
    `large` is the shared memory.
    Blocks for half precision and heads of up to 128 were the fastest of seventeen on an H100.
    """
    block_dim, block_teacher = (power_of_two(dim) for dim in dims)
    width = max(block_dim, block_teacher)
    narrow = is_half(*dtypes)
    whole = narrow and width <= 128 and on != "hip"
    # 64 rows make Hopper's and Blackwell's tensor cores take a product
    held = (64 if narrow else 32) if width <= 128 else 16
    moving = 32 if width <= 64 or (width <= 128 and (narrow or kernel != "dk")) else 16
    if whole and large:
        held = 128 if kernel == "dk" else 64
        moving = 64 if kernel == "rows" or width > 64 else 32
    constants: dict[str, int | str] = {
        "BLOCK_QUERY": moving if kernel == "dk" else held,
        "BLOCK_KEY": held if kernel == "dk" else moving,
        "BLOCK_DIM": block_dim,
        "BLOCK_TEACHER_DIM": block_teacher,
        # columns of one product of scores; 0 takes whole heads, which spill in fp32
        "CHUNK": 0 if whole else 32 if narrow else 16,
        "SCORE_PRECISION": dot_precision(True, on),
    }
    if kernel != "rows":
        constants["GRAD_PRECISION"] = dot_precision(dtypes[0] != torch.float16, on)
    if whole and not large:
        return Launch(constants, num_warps=4, num_stages=1 if width > 64 else 2)
    if whole:
        warps = 8 if kernel == "dk" and width > 64 else 4
        return Launch(constants, warps, 2 if kernel == "rows" or width > 64 else 3)
    if narrow:
        few = kernel == "dk" and row_stats(kind) == 4 and block_dim + block_teacher < 128
    else:
        few = width <= 64 and kernel != "rows"
    # with 8 warps, wide heads spill: capped in two sweeps on sm_90, with sinks on sm_80
    spills = (capped and kernel == "rows") or (sunk and kernel == "dq")
    few = few or (spills and width > 128)
    # a warp of AMD's has 64 threads
    return Launch(constants, num_warps=4 if few or on == "hip" else 8, num_stages=1)


def takes_two_sweeps(kind: str, dims: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether the kernels of `sweep_kernels.py` take a call, without soft caps and sinks."""
    # of three wide gradients, most would leave the registers of an A100
    fits = is_hopper() or kind != "mse" or dims[0] <= 64
    return is_half(*dtypes) and max(dims) <= 128 and holds_products() and fits


def sweep_launch(
    kernel: str, kind: str, dims: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> Launch:
    """Blocks of the two sweeps, "rows_dq" or "dk_value": the largest that hardly spill."""
    wide = max(dims) > 64
    if kernel == "rows_dq" and is_hopper():
        query, key, warps = 128, 64 if wide else 128, 8
        if kind == "mse":
            # its third gradient takes the registers of the tiles
            key = min(key, 4096 // power_of_two(dims[0]))
    elif kernel == "rows_dq":
        query, key, warps = (128, 32, 8) if wide else (64, 64, 4)
    else:
        # terms of kinds with a constant take registers too
        few = not is_hopper() or (kind in CONSTANT_KINDS and not wide)
        query, key, warps = 32 if few else 64, 128, 8 if wide else 4
    return Launch(whole_head_blocks(query, key, dims, dtypes[0], "cuda"), warps, num_stages=2)


def kernel_types(dtype: torch.dtype, teacher_dtype: torch.dtype) -> dict[str, Any]:
    """And the type in which slopes enter their product, and whether logs are in bits."""
    made = type_constants(dtype, teacher_dtype)
    bits = is_half(dtype, teacher_dtype)
    return made | {"GRAD_TYPE": TYPES[product_dtype(dtype)], "BITS": bits}


class _Softmax:
    """Soft caps `[pairs, 2]` of calls that look alike, and whether there are caps and sinks."""

    def __init__(self, call: Call, pairs: list[Pair]):
        first = pairs[0]
        self.flags = {
            "STUDENT_CAP": first.student_softcap is not None,
            "TEACHER_CAP": first.teacher_softcap is not None,
        }
        self.has_sinks = first.student_sinks is not None
        # what is not there is not read; scales stand in its place
        self.caps = call.scales
        if any(self.flags.values()):
            caps = [[pair.student_softcap or 1.0, pair.teacher_softcap or 1.0] for pair in pairs]
            self.caps = to_device(caps, call.dtype, first.query)


class _Masks(NamedTuple):
    """What a row sees."""

    causal: bool
    window: int


class _Given(NamedTuple):
    """What the kernels of one call take: heads, sinks `[pairs, 2, heads]`, weights `[batch]`."""

    heads: Heads
    sinks: Tensor
    weights: Tensor


# partial sums and those of the sinks' gradients, from what is given and gradients to fill
Fill = Callable[[_Given, list[Tensor]], tuple[Tensor, Tensor]]


def forward(
    pairs: list[Pair], masked: bool, kind: str, causal: bool, window: int, need_grad: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The plan of pairs like these, from columns, sinks of both sides, masks and `weights`.

    Makes sums over rows `[pairs, batch]`, and gradients of those sums times `weights` `[batch]`.
    Of queries and keys `[pairs, batch, heads | kv_heads, tokens, dim_s]`, and of the student's
    sinks `[pairs, heads]`; empty without `need_grad`, and where there are no sinks. Masks are of
    keys and of the counted query rows, bool `[batch, tokens]`; `window` 0 is none.
    """
    call = Call(pairs, masked)
    masks, softmax = _Masks(causal, window), _Softmax(call, pairs)
    dtype = waiting_dtype(call.dtypes[0])
    gradients = call.gradients(pairs[0].query, pairs[0].key, dtype, need_grad)
    if takes_short(call.sizes["tokens"], call.dims, call.dtypes, platform()):
        made_by = _short
    elif (
        need_grad
        and takes_two_sweeps(kind, call.dims, call.dtypes)
        and not (softmax.has_sinks or any(softmax.flags.values()))
        # the largest scaled score is that of the largest score
        and all(min(pair.scale, pair.teacher_scale) > 0 for pair in pairs)
    ):
        made_by = _two_sweeps
    else:
        made_by = _long
    fill = made_by(call, masks, softmax, kind, need_grad)
    batch, heads = call.sizes["batch"], call.sizes["heads"]

    def run(
        columns: Sequence[Sequence[Tensor]],
        sinks: tuple[Tensor | None, Tensor | None],
        sides: Masks,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stacked = [of_pairs for of_pairs in sinks if of_pairs is not None]
        given = _Given(
            call.heads(columns, sides), torch.stack(stacked, 1) if stacked else call.scales, weights
        )
        grads = gradients()
        partials, sink_partials = fill(given, grads)
        # programs of one batch item follow each other
        sums = partials.view(call.count, batch, -1).sum(2)
        of_sinks = call.new(0)
        if need_grad and softmax.has_sinks:
            of_sinks = sink_partials.view(call.count, batch, heads, -1).sum((1, 3))
        return sums, grads[0], grads[1], of_sinks

    return run


def _short(call: Call, masks: _Masks, softmax: _Softmax, kind: str, need_grad: bool) -> Fill:
    sizes = call.sizes
    program_heads = heads_of_program(sizes["heads"], sizes["kv_heads"], sizes["batch"] * call.count)
    programs = sizes["batch"] * sizes["heads"] // program_heads
    launch = short_launch(sizes["tokens"], call.dims, call.dtypes, SHORT_STAGES, platform())
    blocks = cdiv(sizes["tokens"], launch.block("BLOCK_QUERY"))
    sunk = need_grad and softmax.has_sinks
    sink_programs = sizes["batch"] * sizes["heads"] * blocks if sunk else 0
    start = Quick(_short_kernel).bound(
        (programs, call.count),
        **sizes,
        window=masks.window,
        program_heads=program_heads,
        **_constants(call, masks, softmax, launch, kind),
        **kernel_types(*call.dtypes),
        SINK=softmax.has_sinks,
        NEED_GRAD=need_grad,
        QUERY_TOKENS_FIRST=call.tokens_first[0],
        KEY_TOKENS_FIRST=call.tokens_first[1],
        **launch.options,
    )

    def fill(given: _Given, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        partials = call.new(call.count, programs)
        sink_partials = call.new(call.count, sink_programs)
        table, scales, valid = given.heads.read
        start(
            table,
            scales,
            softmax.caps,
            given.sinks,
            valid,
            given.weights,
            *grads,
            sink_partials,
            partials,
        )
        return partials, sink_partials

    return fill


def _long(call: Call, masks: _Masks, softmax: _Softmax, kind: str, need_grad: bool) -> Fill:
    """Log-sum-exps of the rows, then each gradient, then none."""
    sizes, count = call.sizes, call.count
    form = {"capped": any(softmax.flags.values()), "sunk": softmax.has_sinks, "large": is_large()}
    launches = {
        kernel: divergence_launch(kernel, kind, call.dims, call.dtypes, platform(), **form)
        for kernel in ("rows", "dq", "dk")
    }
    types = kernel_types(*call.dtypes)
    # kinds without a constant get their values where their slopes are made
    late = need_grad and row_stats(kind) == 4
    programs = {
        kernel: cdiv(sizes["tokens"], launches[kernel].block(block)) * sizes["batch"] * sizes[heads]
        for kernel, block, heads in (
            ("rows", "BLOCK_QUERY", "heads"),
            ("dq", "BLOCK_QUERY", "heads"),
            ("dk", "BLOCK_KEY", "kv_heads"),
        )
    }
    shape = (count, row_stats(kind), sizes["batch"], sizes["heads"], sizes["tokens"])
    shared = {**sizes, "window": masks.window, "STATS": row_stats(kind)}
    of_rows = Quick(_rows_kernel).bound(
        (programs["rows"], count),
        **shared,
        **_constants(call, masks, softmax, launches["rows"], kind),
        **{name: value for name, value in types.items() if name != "GRAD_TYPE"},
        SINK=softmax.has_sinks,
        WRITE_STATS=need_grad,
        WRITE_VALUES=not late,
        **launches["rows"].options,
    )
    of_queries = Quick(_dq_kernel).bound(
        (programs["dq"], count),
        **shared,
        **_constants(call, masks, softmax, launches["dq"], kind),
        **types,
        SINK=softmax.has_sinks,
        QUERY_TOKENS_FIRST=call.tokens_first[0],
        **launches["dq"].options,
    )
    of_keys = Quick(_dk_kernel).bound(
        (programs["dk"], count),
        **shared,
        # the teacher's entropy has no gradient
        **_constants(
            call, masks, softmax, launches["dk"], "kl" if kind == "cross_entropy" else kind
        ),
        **types,
        KEY_TOKENS_FIRST=call.tokens_first[1],
        **launches["dk"].options,
    )

    def fill(given: _Given, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        table, scales, valid = given.heads.read
        heads, weights = (table, scales, softmax.caps), given.weights
        stats = call.new(*(shape if need_grad else (0,)))
        partials = call.new(count, programs["dq" if late else "rows"])
        of_rows(*heads, given.sinks, valid, stats, partials)
        sink_partials = call.new(count, programs["dq"] if need_grad and softmax.has_sinks else 0)
        if need_grad:
            read = (given.sinks, valid, stats, weights)
            of_queries(*heads, *read, grads[0], sink_partials, partials)
            of_keys(*heads, *read[1:], grads[1])
        return partials, sink_partials

    return fill


def _two_sweeps(call: Call, masks: _Masks, softmax: _Softmax, kind: str, need_grad: bool) -> Fill:
    """Half precision without caps and sinks: each gradient in one sweep."""
    sizes, count = call.sizes, call.count
    tokens, heads = sizes["tokens"], sizes["heads"]
    shared = {
        "batch": sizes["batch"],
        "heads": heads,
        "repeat": heads // sizes["kv_heads"],
        "teacher_repeat": heads // sizes["teacher_kv_heads"],
        **{name: sizes[name] for name in ("tokens", "dim", "teacher_dim")},
        "window": masks.window,
        "CAUSAL": masks.causal,
        "WINDOWED": masks.window > 0,
        **{name: call.constants[name] for name in ("ALIGN", "TEACHER_ALIGN", "HAS_MASK")},
    }
    types = kernel_types(*call.dtypes)
    shared |= {name: types[name] for name in ("TYPE", "TEACHER_TYPE", "GRAD_TYPE")}
    # of both sides one number stands for maximum and log
    kept = row_stats(kind) - 2
    launch = sweep_launch("rows_dq", kind, call.dims, call.dtypes)
    programs = cdiv(tokens, launch.block("BLOCK_QUERY")) * sizes["batch"] * heads
    of_queries = Quick(_rows_dq_kernel).bound(
        (programs, count),
        **shared,
        **launch.constants,
        KIND=kind,
        STATS=kept,
        QUERY_TOKENS_FIRST=call.tokens_first[0],
        **launch.options,
    )
    launch = sweep_launch("dk_value", kind, call.dims, call.dtypes)
    key_programs = cdiv(tokens, launch.block("BLOCK_KEY")) * sizes["batch"] * sizes["kv_heads"]
    of_keys = Quick(_dk_value_kernel).bound(
        (key_programs, count),
        **shared,
        **launch.constants,
        KIND=kind,
        STATS=kept,
        UNEVEN=tokens % launch.block("BLOCK_QUERY") > 0,
        KEY_TOKENS_FIRST=call.tokens_first[1],
        **launch.options,
    )

    def fill(given: _Given, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        stats = call.new(count, kept, sizes["batch"], heads, tokens)
        partials = call.new(count, key_programs)
        read = (*given.heads.read, given.heads.spans(), stats, given.weights)
        of_queries(*read, grads[0])
        of_keys(*read, grads[1], partials)
        return partials, call.new(0)

    return fill


def _constants(
    call: Call, masks: _Masks, softmax: _Softmax, launch: Launch, kind: str
) -> dict[str, Any]:
    """What all kernels take but types and layouts."""
    shared = {name: call.constants[name] for name in ("ALIGN", "TEACHER_ALIGN", "HAS_MASK")}
    sees = {"CAUSAL": masks.causal, "WINDOWED": masks.window > 0}
    tokens, blocks = call.sizes["tokens"], launch.constants
    uneven = any(tokens % int(blocks[name]) for name in ("BLOCK_QUERY", "BLOCK_KEY"))
    masked = uneven or shared["HAS_MASK"] or any(sees.values())
    return {**shared, **blocks, **sees, **softmax.flags, "MASKED": masked, "KIND": kind}
