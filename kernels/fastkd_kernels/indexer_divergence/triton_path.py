"""The indexer's loss on Triton: what CUDA tensors run. Same results as the PyTorch path.

The teacher's log-sum-exps are made first, in one launch. Then the scores of one chunk of query rows
are written to a workspace of bounded size, turned into the loss and their slopes row by row, and
multiplied. Every launch covers all layer pairs through a table of addresses.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..common.attention_call import near_rows
from ..common.attention_columns import masks_to_read
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
from ..common.tensor_table import addressed, to_device
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
    """Tables and masks of one call, and the arguments that its kernels share."""

    def __init__(
        self,
        pairs: list[Pair],
        key_mask: Tensor | None,
        row_mask: Tensor | None,
        causal: bool,
        on: str,
    ) -> None:
        first = pairs[0]
        self.first, self.on = first, on
        # kept alive until the kernels are launched: a row of another stride is a copy
        rows = [(*pair[:2], *pair[3:5]) for pair in pairs]
        self.table, aligns, self.tensors = addressed(rows, near_rows)
        self.count = len(pairs)
        # by head, and as wide as a copy into shared memory takes single numbers
        self.weights = torch.stack([pair.weights.mT for pair in pairs]).to(first.dtype)
        self.scales = to_device([[pair.teacher_scale] for pair in pairs], first.dtype, first.query)
        # without a cap, scales stand where none is read
        caps = [[pair.teacher_softcap or 1.0] for pair in pairs]
        self.has_cap = first.teacher_softcap is not None
        self.caps = to_device(caps, first.dtype, first.query) if self.has_cap else self.scales
        batch, index_heads, tokens, dim = first.query.shape
        self.valid = masks_to_read((key_mask, row_mask), first.query.device)
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
        self.constants = {
            **type_constants(*self.dtypes, first.dtype),
            "ALIGN": math.gcd(*aligns[:2]),
            "TEACHER_ALIGN": math.gcd(*aligns[2:]),
            "HAS_MASK": key_mask is not None or row_mask is not None,
            "CAUSAL": causal,
            "CAP": self.has_cap,
        }

    def new(self, *shape: int, dtype: torch.dtype | None = None, fill: bool = False) -> Tensor:
        make = torch.zeros if fill else torch.empty
        return make(shape, dtype=dtype or self.first.dtype, device=self.first.query.device)

    def blocks(self, name: str) -> Launch:
        """Those of one kernel by its name."""
        return indexer_launch(name, self.dims, self.dtypes, self.on)

    def launch(
        self, kernel: Any, made: Launch, programs: int, *given: Any, **more: int | float
    ) -> None:
        """Start `kernel` with those of the shared arguments that it has."""
        known = {**self.sizes, **self.constants, **made.constants, **more}
        rest = kernel.arg_names[len(given) :]
        Quick(kernel)[(programs, self.count)](
            *given,
            **{word: known[word] for word in rest},
            **made.options,
        )


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
    pairs: list[Pair],
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    causal: bool,
    need_grad: bool,
) -> tuple[Tensor, Units]:
    """Sums over the counted query rows `[pairs]`, and their gradients.

    `row_mask` are the counted query rows, bool `[batch, tokens]`. One launch, then two a chunk of
    rows, or four with gradients.
    """
    call = Call(pairs, key_mask, row_mask, causal, platform())
    count, (batch, index_heads, tokens, dim) = len(pairs), pairs[0].query.shape
    sums = _log_sums(call, pairs)
    padded = cdiv(tokens, ROWS) * ROWS
    every = batch * padded
    size = chunk_size(every, 2 * count * padded * sums.element_size())
    workspace = call.new(count, 2, size, padded)
    values = call.new(count, batch, tokens)
    units = Units(*(call.new(0) for _ in range(3)))
    if need_grad:
        parts = cdiv(index_heads, HEADS)
        units = Units(
            call.new(count, batch, index_heads, tokens, dim, dtype=waiting_dtype(call.dtypes[0])),
            # chunks add to it
            call.new(count, parts, batch, tokens, dim, fill=True),
            call.new(count, batch, tokens, index_heads),
        )
    for first in range(0, every, size):
        rows = min(size, every - first)
        chunk = {"first": first, "rows": rows, "padded": padded}
        _score(call, sums, workspace, values, chunk, need_grad)
        if need_grad:
            _multiply(call, workspace, units, chunk)
    if need_grad:
        units = units._replace(key=units.key.sum(1)[:, :, None])
    return values.sum((1, 2)), units


def _log_sums(call: Call, pairs: list[Pair]) -> Tensor:
    """What to take off the logs of the teacher's scores, `[pairs, batch, heads, tokens]`.

    The log-sum-exp of a row and its sink, less a number that is the same for all heads of a row and
    so drops out of the target: the largest share of a head that its keys hold. Where sinks take all
    but 1e-40 of every head, probabilities would be no numbers of fp32.
    """
    sizes = call.sizes
    sums = call.new(len(pairs), sizes["batch"], sizes["heads"], sizes["tokens"])
    made = call.blocks("head_sums")
    blocks = cdiv(sizes["tokens"], made.block("BLOCK_QUERY"))
    given = (call.table, call.scales, call.caps, call.valid, sums)
    call.launch(_head_sums_kernel, made, blocks * sizes["batch"] * sizes["heads"], *given)
    if pairs[0].teacher_sinks is None:
        return sums
    sinks = torch.stack([pair.teacher_sinks for pair in pairs if pair.teacher_sinks is not None])
    # logs are in bits
    unit = math.log(2.0) if call.constants["BITS"] else 1.0
    share = -softplus(sinks[:, None, :, None] - sums * unit, threshold=40.0)
    return sums + (share.amax(2, keepdim=True) - share) / unit


def _score(
    call: Call,
    sums: Tensor,
    workspace: Tensor,
    values: Tensor,
    chunk: dict[str, int],
    need_grad: bool,
) -> None:
    """The values of a chunk's rows, and the slopes of its index scores."""
    given = (call.table, call.scales, call.caps, call.weights, call.valid, sums, workspace)
    made = call.blocks("scores")
    tiles = chunk["rows"] // ROWS * (chunk["padded"] // made.block("BLOCK_KEY"))
    call.launch(_scores_kernel, made, tiles, *given, **chunk)
    made = row_launch()
    programs = chunk["rows"] // made.block("BLOCK_ROW")
    more = {"SMALL": small(sums.dtype), "NEED_GRAD": need_grad}
    call.launch(_rows_kernel, made, programs, call.valid, workspace, values, **chunk, **more)


def _multiply(call: Call, workspace: Tensor, units: Units, chunk: dict[str, int]) -> None:
    """Gradients of a chunk's queries and weights, and what it adds to those of the keys."""
    sizes, rows, padded = call.sizes, chunk["rows"], chunk["padded"]
    made = call.blocks("bwd_dq")
    programs = rows // made.block("BLOCK_QUERY") * sizes["index_heads"]
    given = (call.table, call.weights, call.valid, workspace)
    call.launch(_bwd_dq_kernel, made, programs, *given, units.query, units.weights, **chunk)
    made = call.blocks("bwd_dk")
    parts = units.key.shape[1]
    last = chunk["first"] + rows - 1
    items = last // padded - chunk["first"] // padded + 1
    programs = cdiv(sizes["tokens"], made.block("BLOCK_KEY")) * parts * items
    call.launch(_bwd_dk_kernel, made, programs, *given, units.key, parts=parts, **chunk)
