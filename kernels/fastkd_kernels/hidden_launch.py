"""Launch parameters of the ops on hidden states."""

from collections.abc import Sequence

import torch

from .launch import Launch, dot_precision

WORKSPACE_BYTES = 32 << 20


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
