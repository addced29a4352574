"""Launch parameters of the ops on hidden states."""

from collections.abc import Sequence

import torch

from .launch import Launch, dot_precision, power_of_two

WORKSPACE_BYTES = 32 << 20


def hidden_launch(dtypes: Sequence[torch.dtype], on: str = "cuda") -> Launch:
    """Blocks of the three hidden-state products: rows, columns, and the summed dimension."""
    half = all(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)
    constants: dict[str, int | str] = {
        "BLOCK_ROW": 128 if half else 64,
        "BLOCK_COLUMN": 128 if half else 64,
        "BLOCK_SUM": 64 if half else 32,
        "PRECISION": dot_precision(True, on),
        "GRAD_PRECISION": dot_precision(dtypes[0] != torch.float16, on),
    }
    return Launch(constants, num_warps=8, num_stages=3 if half else 2)


def unit_launch(target_width: int) -> Launch:
    """Blocks of `unit_residuals`: a few whole rows, so that each value is read once."""
    columns = power_of_two(target_width)
    rows = min(64, max(1, 4096 // columns))
    constants: dict[str, int | str] = {"BLOCK_ROW": rows, "BLOCK_COLUMN": columns}
    return Launch(constants, num_warps=min(16, max(4, rows * columns // 512)), num_stages=1)


def hidden_chunk(rows: int, row_bytes: int, block_row: int) -> int:
    """Rows whose residual fits the workspace, in whole blocks."""
    fits = max(1, WORKSPACE_BYTES // (row_bytes * block_row))
    return min(rows, fits * block_row)
