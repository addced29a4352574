"""Attention-score MSE on Triton: what CUDA tensors run. Same results as the PyTorch path.

Launch parameters are pure functions: blocks of the tile and the Gram kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.attention_call import Call, Heads, type_constants
from ..common.attention_columns import Masks
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
from ..common.rescale import waiting_dtype
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


# whose compiler fails at a single pass of two blocks with Hopper's products
_TRITON_3_6 = triton.__version__.startswith("3.6.")


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
    two &= blocks > 2 or not _TRITON_3_6
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


# squares, from what kernels read, the factor of gradients, and those to fill
Fill = Callable[[Heads, Tensor, list[Tensor]], Tensor]


def one_pass(
    pairs: list[Pair], masked: bool, causal: bool, algorithm: str, need_grad: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The plan of pairs like these, from columns, masks and `factor`, one number: squares
    `[pairs]`, and `factor c_s D K_s` and `factor c_s D^T Q_s`.

    "tiles" takes one launch where a program holds all keys of a head, or enough programs go over
    them in passes; two elsewhere. "gram" is for causal scores: tiles inside chunks of tokens, and
    Grams of the chunks for all that lies between them.
    """
    call = Call(pairs, masked)
    tokens = call.sizes["tokens"]
    chunk = causal_chunk(call.dims) if algorithm == "gram" else tokens
    dtype = gradient_dtype(call.dtypes[0], algorithm)
    gradients = call.gradients(pairs[0].query, pairs[0].key, dtype, need_grad)
    programs = call.count * call.sizes["batch"] * call.sizes["kv_heads"]
    # the sweep finds heads of a gradient by 32 bits
    near = call.sizes["heads"] * tokens * call.sizes["dim"] < 1 << 31
    if chunk == tokens and takes_short(tokens, call.dims, call.dtypes, platform()):
        fills = [_short(call, causal, need_grad)]
    elif near and chunk == tokens and takes_sweep(programs, call.dims, call.dtypes, platform()):
        fills = [_sweep(call, causal, need_grad)]
    else:
        fills = [_tiles(call, causal, chunk, need_grad)]
        if chunk < tokens:
            fills.append(_between_chunks(call, chunk, need_grad))

    def run(
        columns: Sequence[Sequence[Tensor]], masks: Masks, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, grads = call.heads(columns, masks), gradients()
        squares, *more = [fill(heads, factor, grads) for fill in fills]
        return sum(more, start=squares), grads[0], grads[1]

    return run


def gradient_dtype(dtype: torch.dtype, algorithm: str) -> torch.dtype:
    """Type of the gradients that `one_pass` returns; those of "gram" are sums of two launches."""
    wide = torch.promote_types(dtype, torch.float32)
    return wide if algorithm == "gram" else waiting_dtype(dtype)


def _short(call: Call, causal: bool, need_grad: bool) -> Fill:
    sizes = call.sizes
    program_heads = heads_of_program(sizes["heads"], sizes["kv_heads"], sizes["batch"] * call.count)
    programs = sizes["batch"] * sizes["heads"] // program_heads
    launch = short_launch(sizes["tokens"], call.dims, call.dtypes, SHORT_STAGES, platform())
    start = Quick(_short_kernel).bound(
        (programs, call.count),
        **sizes,
        program_heads=program_heads,
        **{**call.constants, **tile_types(*call.dtypes), **launch.constants},
        CAUSAL=causal,
        NEED_GRAD=need_grad,
        QUERY_TOKENS_FIRST=call.tokens_first[0],
        KEY_TOKENS_FIRST=call.tokens_first[1],
        **launch.options,
    )

    def fill(heads: Heads, factor: Tensor, grads: list[Tensor]) -> Tensor:
        partials = call.new(call.count, programs)
        start(*heads.read, factor, *grads, partials)
        return partials.sum(1)

    return fill


def _sweep(call: Call, causal: bool, need_grad: bool) -> Fill:
    sizes = call.sizes
    launch = sweep_launch(sizes["tokens"], call.dims, call.dtypes, platform())
    programs = sizes["batch"] * sizes["kv_heads"]
    rows = cdiv(sizes["tokens"], launch.block("BLOCK_QUERY")) * launch.block("BLOCK_QUERY")
    kept = (call.count, sizes["batch"], sizes["heads"], rows, launch.block("BLOCK_DIM"))
    keeps = need_grad and launch.block("PASSES") > 1
    start = Quick(_sweep_kernel).bound(
        (programs, call.count),
        **sizes,
        **{**call.constants, **tile_types(*call.dtypes), **launch.constants},
        CAUSAL=causal,
        NEED_GRAD=need_grad,
        QUERY_TOKENS_FIRST=call.tokens_first[0],
        KEY_TOKENS_FIRST=call.tokens_first[1],
        **launch.options,
    )

    def fill(heads: Heads, factor: Tensor, grads: list[Tensor]) -> Tensor:
        partials = call.new(call.count, programs)
        sums = call.new(*kept) if keeps else partials
        start(*heads.read, factor, *grads, sums, partials)
        return partials.sum(1)

    return fill


def _tiles(call: Call, causal: bool, chunk: int, need_grad: bool) -> Fill:
    """What launches the kernels on the entries inside chunks."""
    sizes, count = call.sizes, call.count
    by_key, by_query = (
        tile_launch(kernel, sizes["tokens"], call.dims, call.dtypes, platform(), large=is_large())
        for kernel in ("fwd", "dq")
    )
    key_blocks = cdiv(sizes["tokens"], by_key.block("BLOCK_KEY"))
    programs = key_blocks * sizes["batch"] * sizes["kv_heads"]
    shared = {**call.constants, **tile_types(*call.dtypes), "CAUSAL": causal, "chunk_tokens": chunk}
    of_keys = Quick(_tiles_fwd_kernel).bound(
        (programs, count),
        **sizes,
        **shared,
        **by_key.constants,
        WRITE_KEY=need_grad,
        KEY_TOKENS_FIRST=call.tokens_first[1],
        **by_key.options,
    )
    query_blocks = cdiv(sizes["tokens"], by_query.block("BLOCK_QUERY"))
    of_queries = Quick(_tiles_bwd_dq_kernel).bound(
        (query_blocks * sizes["batch"] * sizes["heads"], count),
        **sizes,
        **shared,
        **by_query.constants,
        QUERY_TOKENS_FIRST=call.tokens_first[0],
        **by_query.options,
    )

    def fill(heads: Heads, factor: Tensor, grads: list[Tensor]) -> Tensor:
        partials = call.new(count, programs)
        # what is not written is not read either
        of_keys(*heads.read, factor, grads[1] if need_grad else partials, partials)
        if need_grad:
            of_queries(*heads.read, factor, grads[0])
        return partials.sum(1)

    return fill


def _between_chunks(call: Call, chunk: int, need_grad: bool) -> Fill:
    """What launches the kernels on the entries whose key is in an earlier chunk; adds to the
    gradients."""
    of_queries, of_keys = (_grams(call, side, chunk) for side in (0, 1))
    to_queries, to_keys = (_apply(call, side, chunk, accumulate=True) for side in (0, 1))
    scale, teacher_scale = (column.view(-1, 1, 1, 1) for column in call.scales.unbind(1))
    difference = call.difference

    def fill(heads: Heads, factor: Tensor, grads: list[Tensor]) -> Tensor:
        prefix = _scanned(of_keys(heads), reverse=False)
        query_grams = of_queries(heads)
        squares = squared_norm(
            _split_grams(call, query_grams),
            _split_grams(call, prefix),
            scale,
            teacher_scale,
            difference,
        ).sum((1, 2, 3))
        if need_grad:
            scales = (scale[..., None, None], teacher_scale[..., None, None], difference)
            upstream = factor.repeat(call.count)
            before = query_factors(_split_grams(call, prefix), *scales)
            to_queries(heads, stack_factors(before), upstream, grads[0])
            after = key_factors(_split_grams(call, _scanned(query_grams, reverse=True)), *scales)
            to_keys(heads, stack_factors(after), upstream, grads[1])
        return squares

    return fill


def gram_forward(
    pairs: list[Pair], masked: bool, need_grad: bool
) -> Callable[[Sequence[Sequence[Tensor]], Masks], tuple[Tensor, Tensor, Tensor]]:
    """The plan of pairs like these, from columns and masks: squares `[pairs]` and the factors
    `[pairs, batch, groups, dim_s + dim_t, dim_s]`."""
    call = Call(pairs, masked)
    sides = [_grams(call, side, call.sizes["tokens"]) for side in (0, 1)]
    scale, teacher_scale = (column.view(-1, 1, 1) for column in call.scales.unbind(1))
    scales = (scale[..., None, None], teacher_scale[..., None, None], call.difference)

    def run(columns: Sequence[Sequence[Tensor]], masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
        heads = call.heads(columns, masks)
        query, key = (_split_grams(call, side(heads).squeeze(3)) for side in sides)
        squares = squared_norm(query, key, scale, teacher_scale, call.difference).sum((1, 2))
        if not need_grad:
            return squares, call.new(0), call.new(0)
        to_query = stack_factors(query_factors(key, *scales))
        return squares, to_query, stack_factors(key_factors(query, *scales))

    return run


def gram_backward(pairs: list[Pair], masked: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """The plan of pairs like these, from `factor` `[pairs]`, both factors of `gram_forward`,
    columns and masks: gradients `[pairs, batch, heads | kv_heads, tokens, dim_s]`."""
    call = Call(pairs, masked)
    gradients = call.gradients(pairs[0].query, pairs[0].key, call.dtypes[0], need_grad=True)
    sides = [_apply(call, side, call.sizes["tokens"], accumulate=False) for side in (0, 1)]

    def run(
        factor: Tensor,
        to_query: Tensor,
        to_key: Tensor,
        columns: Sequence[Sequence[Tensor]],
        masks: Masks,
    ) -> tuple[Tensor, Tensor]:
        heads, grads, upstream = call.heads(columns, masks), gradients(), factor.contiguous()
        for fill, factors, gradient in zip(sides, (to_query, to_key), grads, strict=True):
            fill(heads, factors, upstream, gradient)
        return grads[0], grads[1]

    return run


def _grams(call: Call, side: int, chunk: int) -> Callable[[Heads], Tensor]:
    """Grams `[pairs, batch, groups, chunks, width, width]` of each `chunk` tokens of one side."""
    sizes, groups, width = call.sizes, call.groups, sum(call.dims)
    constants, options = _gram_constants(call, "BLOCK")
    tiles = sum(cdiv(size, constants["BLOCK_COLUMN"]) for size in call.dims)
    chunks = cdiv(sizes["tokens"], chunk)
    start = Quick(_gram_kernel).bound(
        (tiles * tiles * sizes["batch"] * groups, call.count, chunks),
        groups=groups,
        chunk_tokens=chunk,
        SIDE=side,
        **sizes,
        **constants,
        **options,
    )

    def made(heads: Heads) -> Tensor:
        grams = call.new(call.count, sizes["batch"], groups, chunks, width, width)
        start(*heads.read, grams)
        return grams

    return made


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
    call: Call, side: int, chunk: int, *, accumulate: bool
) -> Callable[[Heads, Tensor, Tensor, Tensor], None]:
    """Fills a gradient from factors times upstream `[pairs]`, or adds that to it."""
    sizes = call.sizes
    constants, options = _gram_constants(call, "APPLY")
    row_blocks = cdiv(sizes["tokens"], constants["BLOCK_ROW"])
    columns = cdiv(sizes["dim"], constants["BLOCK_COLUMN"])
    blocks = columns * row_blocks * sizes["batch"] * sizes[("heads", "kv_heads")[side]]
    start = Quick(_gram_bwd_kernel).bound(
        (blocks, call.count),
        groups=call.groups,
        chunk_tokens=chunk,
        chunks=cdiv(sizes["tokens"], chunk),
        SIDE=side,
        ACCUMULATE=accumulate,
        TOKENS_FIRST=call.tokens_first[side],
        **sizes,
        **constants,
        **options,
    )

    def fill(heads: Heads, factors: Tensor, upstream: Tensor, gradient: Tensor) -> None:
        start(*heads.read, factors, upstream, gradient)

    return fill


def _gram_constants(call: Call, kernel: str) -> tuple[dict[str, Any], dict[str, int]]:
    launch = gram_launch(call.dims, call.dtypes, platform())
    constants = {
        **call.constants,
        **gram_types(*call.dtypes, call.difference),
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
