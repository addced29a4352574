"""Launch parameters of attention_divergence: blocks of the forward and the backward kernels."""

import torch

from .launch import Launch, dot_precision, power_of_two

MAX_HEAD_DIM = 256
# kinds whose gradient needs a constant of each query row besides both log-sum-exps
CONSTANT_KINDS = ("reverse_kl", "js", "mse", "cosine")


def row_stats(kind: str) -> int:
    """Floats of each query row that the backward reads."""
    return 3 if kind in CONSTANT_KINDS else 2


def divergence_launch(
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    on: str = "cuda",
) -> Launch:
    """Blocks of all three kernels: rows of queries and keys, and columns of one product."""
    block_dim, block_target = (power_of_two(dim) for dim in dims)
    width = max(block_dim, block_target)
    narrow = all(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)
    # 64 rows or more make Hopper's and Blackwell's tensor cores take a product
    block = 64 if narrow and width <= 128 else 32 if width <= 128 else 16
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
    return Launch(constants, num_warps=8 if narrow else 4, num_stages=1)
