"""The indexer's loss on Triton: what CUDA tensors run. Same results as the PyTorch path.

The teacher's log-sum-exps are made first, in one launch. Then the scores of one chunk of query rows
are written to a workspace of bounded size, turned into the loss and their slopes row by row, and
multiplied. Every launch covers all layer pairs through a table of addresses.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..common.attention_call import near_rows
from ..common.attention_columns import Masks, masks_to_read
from ..common.launch import (
    Launch,
    cdiv,
    dot_precision,
    platform,
    power_of_two,
    product_dtype,
)
from ..common.quick_launch import Quick
from ..common.rescale import waiting_dtype
from ..common.tensor_table import layout_of, to_device
from ..common.tl_types import TYPES
from .torch_path import Pair, Units
from .triton_kernels import (
    _bwd_dk_kernel,
    _bwd_dq_kernel,
    _head_sums_kernel,
    _rows_kernel,
    _scores_kernel,
)

# both scores of a chunk of rows
WORKSPACE_BYTES = 128 << 20

# query rows of a tile of scores; every other block of a chunk's rows or keys divides it
ROWS = 64

# index heads whose gradients of the key one program sums
HEADS = 8


def whole(dtype: torch.dtype, dim: int, on: str) -> bool:
    """Whether heads are multiplied whole; others in chunks of columns, which fit the registers."""
    return dtype in (torch.bfloat16, torch.float16) and dim <= 128 and on != "hip"


@cache
def indexer_launch(
    kernel: str,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    on: str = "cuda",
) -> Launch:
    """Blocks of "head_sums", "scores", "bwd_dq" or "bwd_dk"; `dims` and `dtypes` are those of the
    indexer and of the teacher.

    Those of half precision fill an SM of Hopper's with 8 warps or more; none was timed yet.
    """
    half = [dtype in (torch.bfloat16, torch.float16) for dtype in dtypes]
    is_whole = [whole(dtype, dim, on) for dtype, dim in zip(dtypes, dims, strict=True)]
    constants: dict[str, int | str] = {"SCORE_PRECISION": dot_precision(True, on)}
    wide_chunk = 32 if on == "hip" else 64
    if kernel == "head_sums":
        constants |= {
            "BLOCK_QUERY": 128 if half[1] else 64,
            "BLOCK_KEY": 64,
            "BLOCK_TEACHER_DIM": power_of_two(dims[1]),
            "CHUNK": 0 if is_whole[1] else wide_chunk if half[1] else 32,
        }
        return Launch(constants, num_warps=8, num_stages=2)
    if kernel == "scores":
        constants |= {
            "ROWS": ROWS,
            "BLOCK_KEY": 64,
            "BLOCK_DIM": power_of_two(dims[0]),
            "BLOCK_TEACHER_DIM": power_of_two(dims[1]),
            "CHUNK": 0 if all(is_whole) else wide_chunk if all(half) else 32,
        }
        return Launch(constants, num_warps=8, num_stages=2)
    by_rows = kernel == "bwd_dq"
    constants |= {
        "GRAD_PRECISION": dot_precision(dtypes[0] != torch.float16, on),
        "BLOCK_QUERY": 64 if half[0] and by_rows else 32,
        "BLOCK_KEY": 64 if half[0] else 32,
        "BLOCK_DIM": power_of_two(dims[0]),
        "CHUNK": 0 if is_whole[0] else 32 if half[0] else 16,
    }
    if not by_rows:
        constants["HEADS"] = HEADS
    return Launch(constants, num_warps=8 if half[0] == by_rows else 4, num_stages=2)


@cache
def row_launch() -> Launch:
    """Rows that a program reduces, and keys that it reads at once."""
    return Launch({"ROWS": ROWS, "BLOCK_ROW": 16, "BLOCK_KEY": 128}, num_warps=4, num_stages=2)


def chunk_size(total_rows: int, row_bytes: int) -> int:
    """Rows whose scores fit the workspace, in whole tiles."""
    return min(total_rows, max(1, WORKSPACE_BYTES // (row_bytes * ROWS)) * ROWS)


def small(dtype: torch.dtype) -> float:
    """Up to where a series stands in for a difference that would cancel."""
    return 0.01 if dtype == torch.float64 else 0.3


class Call:
    """What calls that look alike share: the table's layout, sizes and constants of all kernels.

    It keeps none of the tensors of `pairs`.
    """

    def __init__(self, pairs: list[Pair], masked: bool, causal: bool, on: str) -> None:
        first = pairs[0]
        self.on, self.dtype, self.device = on, first.dtype, first.query.device
        tensors = [tensor for pair in pairs for tensor in (*pair[:2], *pair[3:5])]
        self.layout = layout_of(tensors, len(pairs), near_rows)
        self.count = len(pairs)
        self.scales = to_device([[pair.teacher_scale] for pair in pairs], self.dtype, first.query)
        # without a cap, scales stand where none is read
        caps = [[pair.teacher_softcap or 1.0] for pair in pairs]
        has_cap = first.teacher_softcap is not None
        self.caps = to_device(caps, self.dtype, first.query) if has_cap else self.scales
        batch, index_heads, tokens, dim = first.query.shape
        self.dims = (dim, first.teacher_query.shape[-1])
        self.dtypes = (first.query.dtype, first.teacher_query.dtype)
        self.sizes = {
            "batch": batch,
            "index_heads": index_heads,
            "heads": first.teacher_query.shape[1],
            "kv_heads": first.teacher_key.shape[1],
            "tokens": tokens,
            "dim": dim,
            "teacher_dim": self.dims[1],
        }
        aligns = self.layout.alignments
        self.constants = {
            **type_constants(*self.dtypes, self.dtype),
            "ALIGN": math.gcd(*aligns[:2]),
            "TEACHER_ALIGN": math.gcd(*aligns[2:]),
            "HAS_MASK": masked,
            "CAUSAL": causal,
            "CAP": has_cap,
        }

    def read(self, columns: Sequence[Sequence[Tensor]], masks: Masks) -> "Given":
        """Addresses of queries, keys, weights, the teacher's queries and keys, each a list over
        pairs.

        Keys are `[batch, 1, tokens, dim]` or `[batch, tokens, dim]`, which lie alike.
        """
        query, key, weights, *teacher = columns
        if self.layout.copied is not None and key[0].ndim == 3:
            key = [one[:, None] for one in key]
        rows = zip(query, key, *teacher, strict=True)
        table, _, tensors = self.layout.addressed([tensor for row in rows for tensor in row])
        # by head, and as wide as a copy into shared memory takes single numbers
        stacked = torch.stack([*weights]).mT
        by_head = self.new(*stacked.shape).copy_(stacked)
        return Given(table, by_head, masks_to_read(masks, self.device), tensors)

    def new(self, *shape: int, dtype: torch.dtype | None = None, fill: bool = False) -> Tensor:
        make = torch.zeros if fill else torch.empty
        return make(shape, dtype=dtype or self.dtype, device=self.device)

    def blocks(self, name: str) -> Launch:
        """Those of one kernel by its name."""
        return indexer_launch(name, self.dims, self.dtypes, self.on)

    def bound(
        self, kernel: Any, made: Launch, programs: int, tensors: int, **more: int | float
    ) -> Callable[..., None]:
        """The launch of `kernel`, which takes so many `tensors` before what is shared."""
        known = {**self.sizes, **self.constants, **made.constants, **more}
        rest = {word: known[word] for word in kernel.arg_names[tensors:]}
        return Quick(kernel).bound((programs, self.count), **rest, **made.options)


class Given(NamedTuple):
    """What one call reads: addresses of heads, weights `[pairs, batch, index_heads, tokens]`,
    masks."""

    table: Tensor
    weights: Tensor
    valid: Tensor
    # kept alive until the kernels are launched: a row of another stride is a copy
    tensors: Sequence[Tensor]


# of a chunk's rows: what is given, log-sum-exps, the workspace, values, gradients
Step = Callable[[Given, Tensor, Tensor, Tensor, Units], None]


def type_constants(
    dtype: torch.dtype, teacher_dtype: torch.dtype, total: torch.dtype
) -> dict[str, Any]:
    """`tl.constexpr` types by name, and whether logs are in bits."""
    narrow = (torch.bfloat16, torch.float16)
    return {
        "BITS": dtype in narrow and teacher_dtype in narrow,
        "TYPE": TYPES[dtype],
        "TEACHER_TYPE": TYPES[teacher_dtype],
        "GRAD_TYPE": TYPES[product_dtype(dtype)],
        "SUM_TYPE": TYPES[total],
    }


def forward(
    pairs: list[Pair], masked: bool, causal: bool, need_grad: bool
) -> Callable[..., tuple[Tensor, Units]]:
    """The plan of pairs like these, from columns, stacked sinks or None, and masks.

    Makes sums over the counted query rows `[pairs]`, and their gradients. Masks are of keys and of
    the counted query rows, bool `[batch, tokens]`. One launch, then two a chunk of rows, or four
    with gradients.
    """
    call = Call(pairs, masked, causal, platform())
    count, (batch, index_heads, tokens, dim) = len(pairs), pairs[0].query.shape
    log_sums = _log_sums(call)
    padded = cdiv(tokens, ROWS) * ROWS
    every = batch * padded
    size = chunk_size(every, 2 * count * padded * call.dtype.itemsize)
    parts = cdiv(index_heads, HEADS)
    steps: list[Step] = []
    for first in range(0, every, size):
        chunk = {"first": first, "rows": min(size, every - first), "padded": padded}
        steps.append(_score(call, chunk, need_grad))
        if need_grad:
            steps.append(_multiply(call, chunk, parts))
    waiting = waiting_dtype(call.dtypes[0])

    def run(
        columns: Sequence[Sequence[Tensor]], sinks: Tensor | None, masks: Masks
    ) -> tuple[Tensor, Units]:
        given = call.read(columns, masks)
        sums = log_sums(given, sinks)
        workspace = call.new(count, 2, size, padded)
        values = call.new(count, batch, tokens)
        if not need_grad:
            units = Units(*(call.new(0) for _ in range(3)))
        else:
            units = Units(
                call.new(count, batch, index_heads, tokens, dim, dtype=waiting),
                # chunks add to it
                call.new(count, parts, batch, tokens, dim, fill=True),
                call.new(count, batch, tokens, index_heads),
            )
        for step in steps:
            step(given, sums, workspace, values, units)
        if need_grad:
            units = units._replace(key=units.key.sum(1)[:, :, None])
        return values.sum((1, 2)), units

    return run


def _log_sums(call: Call) -> Callable[[Given, Tensor | None], Tensor]:
    """Makes what to take off the logs of the teacher's scores, `[pairs, batch, heads, tokens]`.

    The log-sum-exp of a row and its sink, less a number that is the same for all heads of a row and
    so drops out of the target: the largest share of a head that its keys hold. Where sinks take all
    but 1e-40 of every head, probabilities would be no numbers of fp32.
    """
    shape = (call.count, *(call.sizes[name] for name in ("batch", "heads", "tokens")))
    made = call.blocks("head_sums")
    programs = cdiv(shape[3], made.block("BLOCK_QUERY")) * shape[1] * shape[2]
    start = call.bound(_head_sums_kernel, made, programs, 5)
    # logs are in bits
    unit = math.log(2.0) if call.constants["BITS"] else 1.0

    def run(given: Given, sinks: Tensor | None) -> Tensor:
        sums = call.new(*shape)
        start(given.table, call.scales, call.caps, given.valid, sums)
        if sinks is None:
            return sums
        share = -softplus(sinks[:, None, :, None] - sums * unit, threshold=40.0)
        return sums + (share.amax(2, keepdim=True) - share) / unit

    return run


def _score(call: Call, chunk: dict[str, int], need_grad: bool) -> Step:
    """The values of a chunk's rows, and the slopes of its index scores."""
    made = call.blocks("scores")
    tiles = chunk["rows"] // ROWS * (chunk["padded"] // made.block("BLOCK_KEY"))
    score = call.bound(_scores_kernel, made, tiles, 7, **chunk)
    made = row_launch()
    programs = chunk["rows"] // made.block("BLOCK_ROW")
    more = {"SMALL": small(call.dtype), "NEED_GRAD": need_grad}
    reduce = call.bound(_rows_kernel, made, programs, 3, **chunk, **more)

    def step(given: Given, sums: Tensor, workspace: Tensor, values: Tensor, units: Units) -> None:
        table, weights, valid, _ = given
        score(table, call.scales, call.caps, weights, valid, sums, workspace)
        reduce(valid, workspace, values)

    return step


def _multiply(call: Call, chunk: dict[str, int], parts: int) -> Step:
    """Gradients of a chunk's queries and weights, and what it adds to those of the keys."""
    rows, padded = chunk["rows"], chunk["padded"]
    made = call.blocks("bwd_dq")
    programs = rows // made.block("BLOCK_QUERY") * call.sizes["index_heads"]
    of_queries = call.bound(_bwd_dq_kernel, made, programs, 6, **chunk)
    made = call.blocks("bwd_dk")
    last = chunk["first"] + rows - 1
    items = last // padded - chunk["first"] // padded + 1
    programs = cdiv(call.sizes["tokens"], made.block("BLOCK_KEY")) * parts * items
    of_keys = call.bound(_bwd_dk_kernel, made, programs, 5, parts=parts, **chunk)

    def step(given: Given, sums: Tensor, workspace: Tensor, values: Tensor, units: Units) -> None:
        of_queries(*given[:3], workspace, units.query, units.weights)
        of_keys(*given[:3], workspace, units.key)

    return step
