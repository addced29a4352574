"""Launch parameters of the divergence of logits."""

import torch

from .launch import Launch, dot_precision, power_of_two

WORKSPACE_BYTES = 32 << 20
# the workspace grows with the gradient of the student's weight, which every chunk reads and writes
WORKSPACE_PART = 1
MOST_WORKSPACE_BYTES = 1 << 30
# programs of one product that keep a large GPU busy
PROGRAMS = 256
LEAST_STEPS = 8
# rows of a chunk are whole blocks of the largest product
BLOCK_ROWS = 128


def product_launch(dtype: torch.dtype, is_aligned: bool, on: str = "cuda") -> Launch:
    """Blocks of a product with operands of `dtype`: rows, columns, and the summed dimension.

    Rows that do not start at multiples of 16 bytes are read element by element, which takes a
    register for each address.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    wide = half and is_aligned
    constants: dict[str, int | str] = {
        "BLOCK_ROW": 128 if wide else 64,
        "BLOCK_COLUMN": 128 if wide else 64,
        "BLOCK_SUM": 64 if wide else 32,
        "PRECISION": dot_precision(True, on),
    }
    return Launch(constants, num_warps=8, num_stages=2 if on == "hip" or not half else 3)


def row_launch(columns: int) -> Launch:
    """The block of columns that a program reads of a row at once."""
    block = min(2048, power_of_two(columns))
    return Launch({"BLOCK": block}, num_warps=8 if block > 512 else 4, num_stages=2)


def logits_chunk(rows: int, row_bytes: int, weight_bytes: int) -> int:
    """Rows whose logits fit the workspace, in whole blocks."""
    space = max(WORKSPACE_BYTES, min(weight_bytes // WORKSPACE_PART, MOST_WORKSPACE_BYTES))
    return min(rows, max(1, space // (row_bytes * BLOCK_ROWS)) * BLOCK_ROWS)


def inner_parts(blocks: int, steps: int) -> tuple[int, int]:
    """Into how many parts the steps of a product's inner sum are cut, and how long a part is.

    A small product over a long dimension has too few blocks to fill a GPU.
    """
    parts = max(1, min(PROGRAMS // blocks, steps // LEAST_STEPS))
    length = -(-steps // parts)
    return -(-steps // length), length
