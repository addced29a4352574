"""Attention-score MSE on Triton: what CUDA tensors run. Same results as the PyTorch path.

Launch parameters are pure functions: blocks of the tile and the Gram kernels.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..common.attention_call import Call, type_constants
from ..common.head_groups import Pair
from ..common.launch import (
    Launch,
    cdiv,
    dot_precision,
    is_half,
    is_large,
    platform,
    power_of_two,
    product_dtype,
    stages_that_fit,
    whole_head_blocks,
)
from ..common.quick_launch import Quick
from ..common.rescale import stacked_gradient, tokens_first, waiting_dtype
from ..common.short_sequences import (
    FEWEST_PROGRAMS,
    heads_of_program,
    short_launch,
    takes_short,
    takes_whole,
)
from ..common.tl_types import TYPES
from .gram import Gram, key_factors, query_factors, squared_norm, stack_factors
from .gram_kernels import _gram_bwd_kernel, _gram_kernel, _scan_kernel
from .short_kernel import _short_kernel
from .sweep_kernel import _sweep_kernel
from .triton_kernels import _tiles_bwd_dq_kernel, _tiles_fwd_kernel

# how far ahead the short kernel loads, the fastest on an H100
SHORT_STAGES = 3


@cache
def tile_launch(
    kernel: str,
    tokens: int,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    on: str = "cuda",
    *,
    large: bool = True,
) -> Launch:
    """Blocks of one tile kernel: "fwd", which holds keys, or "dq", which holds query rows; `large`
    is the shared memory.

    Wide heads are read in pieces, so that only the student's width, of its gradient, counts. Blocks
    for half precision and heads of up to 128 were the fastest of fourteen on an H100.
    """
    block_dim, block_teacher = (power_of_two(dim) for dim in dims)
    width = max(block_dim, block_teacher)
    narrow = is_half(*dtypes)
    whole = narrow and width <= (128 if on != "hip" else 64)
    # 64 rows or more make Hopper's and Blackwell's tensor cores take a product
    block = 64 if narrow and block_dim <= 128 else 32 if block_dim <= 128 else 16
    held = 2 * block if whole and large and kernel == "fwd" and on != "hip" else block
    held, moving = (min(size, power_of_two(tokens)) for size in (held, block))
    constants: dict[str, int | str] = {
        "BLOCK_QUERY": held if kernel == "dq" else moving,
        "BLOCK_KEY": held if kernel == "fwd" else moving,
        "BLOCK_DIM": block_dim,
        "BLOCK_TEACHER_DIM": block_teacher,
        # columns of one product of scores; 0 takes the whole head
        "CHUNK": 0 if whole else 16,
        "SCORE_PRECISION": dot_precision(True, on),
        "GRAD_PRECISION": dot_precision(dtypes[0] != torch.float16, on),
    }
    if not whole or on == "hip":
        return Launch(constants, num_warps=8, num_stages=1)
    wide = width > 64
    if not large:
        return Launch(constants, num_warps=8 if wide else 4, num_stages=1)
    warps = 8 if wide and kernel == "fwd" else 4
    return Launch(constants, num_warps=warps, num_stages=2 if wide else 3)


def takes_sweep(
    programs: int,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    on: str = "cuda",
) -> bool:
    """Whether one sweep takes sequences that no short kernel does, a key head a program.

    With fewer programs than multiprocessors, two launches of many are done sooner.
    """
    return programs >= FEWEST_PROGRAMS // 2 and takes_whole(dims, dtypes, on)


def sweep_launch(
    tokens: int,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    on: str = "cuda",
) -> Launch:
    """Blocks of the sweep: as many of keys in one pass as registers hold gradients of."""
    block, held = 64, 128
    widths = [power_of_two(dim) for dim in dims]
    blocks = cdiv(tokens, held)
    # three blocks would leave half of a second pass empty; fp16 has wider operands
    two = blocks not in (1, 3) and widths[0] <= 32 and torch.float16 not in dtypes
    constants = whole_head_blocks(block, held, dims, dtypes[0], on)
    constants |= {"KEY_BLOCKS": 1 + two, "PASSES": cdiv(blocks, 1 + two)}
    wide = product_dtype(dtypes[0]).itemsize
    keys = (1 + two) * held * 2 * sum(widths)
    # a tile and the student's rows as the gradients' products read them
    exchanged = block * (held + widths[0]) * wide
    stages = stages_that_fit(2, block * 2 * sum(widths), keys + exchanged)
    return Launch(constants, num_warps=4, num_stages=stages)


def causal_chunk(dims: tuple[int, int]) -> int:
    """Tokens that share a Gram under the causal mask: a multiple of every block.

    Four times the wider head keeps all Grams of a layer near the size of its queries and keys, and
    leaves as much arithmetic to the tiles inside chunks as to the Grams between them.
    """
    return max(128, 4 * power_of_two(max(dims)))


@cache
def scan_launch() -> Launch:
    """Entries of one program of the scan over chunks."""
    return Launch({"BLOCK": 1024}, num_warps=4, num_stages=1)


@cache
def gram_launch(
    dims: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], on: str = "cuda"
) -> Launch:
    """Blocks of the Gram kernels: tokens, columns of one tile, and those of a gradient."""
    half = is_half(*dtypes)
    columns = min(64, max(32 if half else 16, *(power_of_two(dim) for dim in dims)))
    constants: dict[str, int | str] = {
        "BLOCK_ROW": 64 if half else 32,
        "BLOCK_COLUMN": columns,
        "APPLY_COLUMN": min(columns, max(32, power_of_two(dims[0]))) if half else columns,
        # bf16 is exact in tf32 and its difference nearly so; that of fp16 has as many bits as tf32
        "BLOCK_PRECISION": dot_precision(not half or torch.float16 in dtypes, on),
        "APPLY_PRECISION": dot_precision(not half or dims[0] != dims[1], on),
    }
    few = half and on != "hip"
    return Launch(constants, num_warps=8 if columns == 64 and not few else 4, num_stages=1)


def tile_types(dtype: torch.dtype, teacher_dtype: torch.dtype) -> dict[str, Any]:
    """The type in which the difference of scores enters its second product."""
    made = type_constants(dtype, teacher_dtype)
    return made | {"GRAD_TYPE": TYPES[product_dtype(dtype)]}


def gram_types(dtype: torch.dtype, teacher_dtype: torch.dtype, difference: bool) -> dict[str, Any]:
    """Rows enter the Gram products as they are, or wide where they are made or mixed."""
    made = type_constants(dtype, teacher_dtype)
    plain = not difference and dtype == teacher_dtype
    return made | {"OPERAND": TYPES[dtype] if plain else made["SUM_TYPE"], "DIFFERENCE": difference}


def one_pass(
    pairs: list[Pair],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    factor: Tensor,
    causal: bool,
    algorithm: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squares `[pairs]`, and `factor c_s D K_s` and `factor c_s D^T Q_s`, `factor` one number.

    "tiles" takes one launch where a program holds all keys of a head, or enough programs go over
    them in passes; two elsewhere. "gram" is for causal scores: tiles inside chunks of tokens, and
    Grams of the chunks for all that lies between them.
    """
    call = Call(pairs, key_mask, query_mask)
    tokens = call.sizes["tokens"]
    chunk = causal_chunk(call.dims) if algorithm == "gram" else tokens
    like = (call.first.query, call.first.key)
    dtype = gradient_dtype(call.dtypes[0], algorithm)
    grads = [stacked_gradient(call.count, of, dtype) if need_grad else call.new(0) for of in like]
    if chunk == tokens and takes_short(tokens, call.dims, call.dtypes, platform()):
        return _short(call, factor, causal, grads, need_grad), grads[0], grads[1]
    programs = call.count * call.sizes["batch"] * call.sizes["kv_heads"]
    if chunk == tokens and takes_sweep(programs, call.dims, call.dtypes, platform()):
        return _sweep(call, factor, causal, grads, need_grad), grads[0], grads[1]
    squares = _tiles(call, factor, causal, chunk, grads if need_grad else None)
    if chunk < tokens:
        squares = squares + _between_chunks(call, chunk, factor, grads if need_grad else None)
    return squares, grads[0], grads[1]


def gradient_dtype(dtype: torch.dtype, algorithm: str) -> torch.dtype:
    """Of what `one_pass` returns; gradients of "gram" are sums of two launches."""
    wide = torch.promote_types(dtype, torch.float32)
    return wide if algorithm == "gram" else waiting_dtype(dtype)


def _short(
    call: Call, factor: Tensor, causal: bool, grads: list[Tensor], need_grad: bool
) -> Tensor:
    """Squares; fills `grads`, of queries and keys."""
    sizes = call.sizes
    program_heads = heads_of_program(sizes["heads"], sizes["kv_heads"], sizes["batch"] * call.count)
    programs = sizes["batch"] * sizes["heads"] // program_heads
    partials = call.new(call.count, programs)
    launch = short_launch(sizes["tokens"], call.dims, call.dtypes, SHORT_STAGES, platform())
    Quick(_short_kernel)[(programs, call.count)](
        call.table,
        call.scales,
        call.valid,
        factor,
        *grads,
        partials,
        **sizes,
        program_heads=program_heads,
        **{**call.constants, **tile_types(*call.dtypes), **launch.constants},
        CAUSAL=causal,
        NEED_GRAD=need_grad,
        QUERY_TOKENS_FIRST=tokens_first(call.first.query),
        KEY_TOKENS_FIRST=tokens_first(call.first.key),
        **launch.options,
    )
    return partials.sum(1)


def _sweep(
    call: Call, factor: Tensor, causal: bool, grads: list[Tensor], need_grad: bool
) -> Tensor:
    """Squares; fills `grads`, of queries and keys."""
    sizes = call.sizes
    launch = sweep_launch(sizes["tokens"], call.dims, call.dtypes, platform())
    programs = sizes["batch"] * sizes["kv_heads"]
    partials = call.new(call.count, programs)
    rows = cdiv(sizes["tokens"], launch.block("BLOCK_QUERY")) * launch.block("BLOCK_QUERY")
    kept = (call.count, sizes["batch"], sizes["heads"], rows, launch.block("BLOCK_DIM"))
    sums = call.new(*kept) if need_grad and launch.block("PASSES") > 1 else partials
    Quick(_sweep_kernel)[(programs, call.count)](
        call.table,
        call.scales,
        call.valid,
        factor,
        *grads,
        sums,
        partials,
        **sizes,
        **{**call.constants, **tile_types(*call.dtypes), **launch.constants},
        CAUSAL=causal,
        NEED_GRAD=need_grad,
        QUERY_TOKENS_FIRST=tokens_first(call.first.query),
        KEY_TOKENS_FIRST=tokens_first(call.first.key),
        **launch.options,
    )
    return partials.sum(1)


def _tiles(
    call: Call, factor: Tensor, causal: bool, chunk: int, grads: list[Tensor] | None
) -> Tensor:
    """Squares of the entries inside chunks; fills `grads`, of queries and keys."""
    sizes, count = call.sizes, call.count
    by_key, by_query = (
        tile_launch(kernel, sizes["tokens"], call.dims, call.dtypes, platform(), large=is_large())
        for kernel in ("fwd", "dq")
    )
    key_blocks = cdiv(sizes["tokens"], by_key.block("BLOCK_KEY"))
    programs = key_blocks * sizes["batch"] * sizes["kv_heads"]
    partials = call.new(count, programs)
    shared = {**call.constants, **tile_types(*call.dtypes), "CAUSAL": causal}
    # what is not written is not read either
    query_grad, key_grad = grads or (partials, partials)
    Quick(_tiles_fwd_kernel)[(programs, count)](
        call.table,
        call.scales,
        call.valid,
        factor,
        key_grad,
        partials,
        **sizes,
        **shared,
        **by_key.constants,
        chunk_tokens=chunk,
        WRITE_KEY=grads is not None,
        KEY_TOKENS_FIRST=tokens_first(call.first.key),
        **by_key.options,
    )
    if grads is not None:
        query_blocks = cdiv(sizes["tokens"], by_query.block("BLOCK_QUERY"))
        Quick(_tiles_bwd_dq_kernel)[(query_blocks * sizes["batch"] * sizes["heads"], count)](
            call.table,
            call.scales,
            call.valid,
            factor,
            query_grad,
            **sizes,
            **shared,
            **by_query.constants,
            chunk_tokens=chunk,
            QUERY_TOKENS_FIRST=tokens_first(call.first.query),
            **by_query.options,
        )
    return partials.sum(1)


def _between_chunks(call: Call, chunk: int, factor: Tensor, grads: list[Tensor] | None) -> Tensor:
    """Squares of the entries whose key is in an earlier chunk; adds to `grads`."""
    scale, teacher_scale = (column.view(-1, 1, 1, 1) for column in call.scales.unbind(1))
    difference = call.first.difference
    prefix = _scanned(_grams(call, 1, chunk), reverse=False)
    query_grams = _grams(call, 0, chunk)
    squares = squared_norm(
        _split_grams(call, query_grams),
        _split_grams(call, prefix),
        scale,
        teacher_scale,
        difference,
    ).sum((1, 2, 3))
    if grads is not None:
        scales = (scale[..., None, None], teacher_scale[..., None, None], difference)
        upstream = factor.repeat(call.count)
        before = query_factors(_split_grams(call, prefix), *scales)
        _apply(call, 0, chunk, stack_factors(before), upstream, grads[0], accumulate=True)
        after = key_factors(_split_grams(call, _scanned(query_grams, reverse=True)), *scales)
        _apply(call, 1, chunk, stack_factors(after), upstream, grads[1], accumulate=True)
    return squares


def gram_forward(
    pairs: list[Pair], key_mask: Tensor | None, query_mask: Tensor | None, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Squares `[pairs]` and the factors `[pairs, batch, groups, dim_s + dim_t, dim_s]`."""
    call = Call(pairs, key_mask, query_mask)
    tokens = call.sizes["tokens"]
    query, key = (_split_grams(call, _grams(call, side, tokens).squeeze(3)) for side in (0, 1))
    scale, teacher_scale = (column.view(-1, 1, 1) for column in call.scales.unbind(1))
    difference = call.first.difference
    squares = squared_norm(query, key, scale, teacher_scale, difference).sum((1, 2))
    if not need_grad:
        return squares, call.new(0), call.new(0)
    scales = (scale[..., None, None], teacher_scale[..., None, None], difference)
    to_query = stack_factors(query_factors(key, *scales))
    return squares, to_query, stack_factors(key_factors(query, *scales))


def gram_backward(
    factor: Tensor,
    to_query: Tensor,
    to_key: Tensor,
    pairs: list[Pair],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients `[pairs, batch, heads | kv_heads, tokens, dim_s]` for `factor` `[pairs]`."""
    call = Call(pairs, key_mask, query_mask)
    upstream, tokens = factor.contiguous(), call.sizes["tokens"]
    query_grad = stacked_gradient(call.count, call.first.query, call.dtypes[0])
    _apply(call, 0, tokens, to_query, upstream, query_grad, accumulate=False)
    key_grad = stacked_gradient(call.count, call.first.key, call.dtypes[0])
    _apply(call, 1, tokens, to_key, upstream, key_grad, accumulate=False)
    return query_grad, key_grad


def _grams(call: Call, side: int, chunk: int) -> Tensor:
    """Grams `[pairs, batch, groups, chunks, width, width]` of each `chunk` tokens of one side."""
    sizes, groups, width = call.sizes, call.first.groups, sum(call.dims)
    constants, options = _gram_constants(call, "BLOCK")
    tiles = sum(cdiv(size, constants["BLOCK_COLUMN"]) for size in call.dims)
    chunks = cdiv(sizes["tokens"], chunk)
    grams = call.new(call.count, sizes["batch"], groups, chunks, width, width)
    Quick(_gram_kernel)[(tiles * tiles * sizes["batch"] * groups, call.count, chunks)](
        call.table,
        call.scales,
        call.valid,
        grams,
        groups=groups,
        chunk_tokens=chunk,
        SIDE=side,
        **sizes,
        **constants,
        **options,
    )
    return grams


def _split_grams(call: Call, grams: Tensor) -> Gram:
    first, second = slice(0, call.dims[0]), slice(call.dims[0], sum(call.dims))
    return Gram(grams[..., first, first], grams[..., first, second], grams[..., second, second])


def _scanned(grams: Tensor, *, reverse: bool) -> Tensor:
    """`grams` in place: the sum of the chunks before each one, or after it."""
    chunks, entries = grams.shape[3], grams.shape[4] * grams.shape[5]
    launch = scan_launch()
    programs = grams[:, :, :, 0, 0, 0].numel() * cdiv(entries, launch.block("BLOCK"))
    Quick(_scan_kernel)[(programs,)](
        grams,
        chunks,
        entries,
        SUM_TYPE=TYPES[grams.dtype],
        **launch.constants,
        REVERSE=reverse,
        **launch.options,
    )
    return grams


def _apply(
    call: Call,
    side: int,
    chunk: int,
    factors: Tensor,
    upstream: Tensor,
    gradient: Tensor,
    *,
    accumulate: bool,
) -> None:
    """Fill `gradient` from factors times `upstream` `[pairs]`, or add that to it."""
    sizes = call.sizes
    constants, options = _gram_constants(call, "APPLY")
    row_blocks = cdiv(sizes["tokens"], constants["BLOCK_ROW"])
    columns = cdiv(sizes["dim"], constants["BLOCK_COLUMN"])
    heads = gradient.shape[2]
    Quick(_gram_bwd_kernel)[(columns * row_blocks * sizes["batch"] * heads, call.count)](
        call.table,
        call.scales,
        call.valid,
        factors,
        upstream,
        gradient,
        groups=call.first.groups,
        chunk_tokens=chunk,
        chunks=cdiv(sizes["tokens"], chunk),
        SIDE=side,
        ACCUMULATE=accumulate,
        TOKENS_FIRST=tokens_first((call.first.query, call.first.key)[side]),
        **sizes,
        **constants,
        **options,
    )


def _gram_constants(call: Call, kernel: str) -> tuple[dict[str, Any], dict[str, int]]:
    launch = gram_launch(call.dims, call.dtypes, platform())
    constants = {
        **call.constants,
        **gram_types(*call.dtypes, call.first.difference),
        **gram_constants(launch.constants, kernel),
    }
    return constants, launch.options


def gram_constants(constants: Mapping[str, int | str], kernel: str) -> dict[str, Any]:
    """Blocks and precision of one of the two kernels, "BLOCK" (the Grams) or "APPLY"."""
    return {
        "BLOCK_ROW": constants["BLOCK_ROW"],
        "BLOCK_COLUMN": constants[f"{kernel}_COLUMN"],
        "PRECISION": constants[f"{kernel}_PRECISION"],
    }
