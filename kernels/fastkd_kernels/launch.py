"""Launch parameters: data and pure functions, so that a test can read them without a GPU.

Blocks were chosen so that every kernel compiles for sm_80, sm_90, sm_100 and gfx942 without a
register spill; `tests/test_kernels_compile.py` holds them to it.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

# shared memory that one program may use, in bytes: (backend, architecture) -> limit
SHARED_MEMORY = {
    ("cuda", 80): 166_912,
    ("cuda", 90): 232_448,
    ("cuda", 100): 232_448,
    ("hip", "gfx942"): 65_536,
}
MAX_HEAD_DIM = 256
WORKSPACE_BYTES = 32 << 20


class Launch(NamedTuple):
    """Block sizes and dot precisions (`tl.constexpr` by name), warps and pipeline stages."""

    constants: dict[str, int | str]
    num_warps: int
    num_stages: int


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def platform() -> str:
    return "hip" if torch.version.hip else "cuda"


def power_of_two(size: int) -> int:
    """The block that holds `size` columns; `tl.dot` needs at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def dot_precision(exact: bool, on: str) -> str:
    """How `tl.dot` reads fp32 operands: three tf32 products where one would lose the result.

    AMD's matrix cores multiply fp32 as it is.
    """
    if on == "hip":
        return "ieee"
    return "tf32x3" if exact else "tf32"


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a residual as an operand: fp16 could underflow, so it goes through fp32."""
    return torch.float32 if dtype == torch.float16 else dtype


def tile_launch(
    tokens: int,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    on: str = "cuda",
) -> Launch:
    """Blocks of the tile kernels. One key block covers short sequences, so one pass does all."""
    block_dim, block_target = (power_of_two(dim) for dim in dims)
    width = max(block_dim, block_target)
    narrow = all(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)
    block = 64 if narrow and width <= 64 else 32 if width <= 128 else 16
    block = min(block, power_of_two(tokens))
    constants: dict[str, int | str] = {
        "BLOCK_QUERY": block,
        "BLOCK_KEY": block,
        "BLOCK_DIM": block_dim,
        "BLOCK_TARGET_DIM": block_target,
        # columns of one product of scores; 0 takes the whole head
        "CHUNK": 0 if narrow and width <= 128 else 16,
        "SCORE_PRECISION": dot_precision(True, on),
        "GRAD_PRECISION": dot_precision(dtypes[0] != torch.float16, on),
    }
    return Launch(constants, num_warps=8, num_stages=1)


def gram_launch(
    dims: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], on: str = "cuda"
) -> Launch:
    """Blocks of the Gram kernels: tokens and columns of one tile."""
    half = all(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)
    constants: dict[str, int | str] = {
        "BLOCK_ROW": 64 if half else 32,
        "BLOCK_COLUMN": min(64, max(power_of_two(dim) for dim in dims)),
        # half inputs are exact in tf32, and in the difference form every product is small
        "BLOCK_PRECISION": dot_precision(not half, on),
        "APPLY_PRECISION": dot_precision(not half or dims[0] != dims[1], on),
    }
    return Launch(constants, num_warps=8, num_stages=1)


def hidden_launch(dtypes: Sequence[torch.dtype], on: str = "cuda") -> Launch:
    """Blocks of the three hidden-state products: rows, columns, and the summed dimension."""
    half = all(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)
    constants: dict[str, int | str] = {
        "BLOCK_ROW": 64,
        "BLOCK_COLUMN": 128 if half else 64,
        "BLOCK_SUM": 32,
        "PRECISION": dot_precision(True, on),
        "GRAD_PRECISION": dot_precision(dtypes[0] != torch.float16, on),
    }
    return Launch(constants, num_warps=8, num_stages=3 if half else 2)


def hidden_chunk(rows: int, row_bytes: int, block_row: int) -> int:
    """Rows whose residual fits the workspace, in whole blocks."""
    fits = max(1, WORKSPACE_BYTES // (row_bytes * block_row))
    return min(rows, fits * block_row)


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every row of every tensor starts at a multiple of 16 bytes."""
    return all(
        value % 16 == 0
        for tensor in tensors
        for value in (
            tensor.data_ptr(),
            *(stride * tensor.element_size() for stride in tensor.stride()[:-1]),
        )
    )
