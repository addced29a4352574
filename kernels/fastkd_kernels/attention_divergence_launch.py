"""Launch parameters of attention_divergence: blocks of the forward and the backward kernels."""

import torch

from .launch import Launch, dot_precision, power_of_two

MAX_HEAD_DIM = 256
# kinds whose gradient needs a constant of each query row besides both softmax divisors
CONSTANT_KINDS = ("reverse_kl", "js", "mse", "cosine")

# kinds whose forward sweeps the keys twice
TWO_SWEEPS = ("js", "mse", "cosine")


def row_stats(kind: str) -> int:
    """Floats of each query row that the backward reads."""
    return 5 if kind in CONSTANT_KINDS else 4


def divergence_launch(
    part: str,
    kind: str,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    on: str = "cuda",
    *,
    capped: bool = False,
    sunk: bool = False,
) -> Launch:
    """Blocks of one kernel: "rows" (forward), "query" or "key" (the gradients).

    A program holds one block, of keys for "key" and of query rows otherwise, and moves along the
    other side in narrower ones. `capped` is of either side, and
    `sunk` is with attention sinks. Blocks for half precision and heads of up to 128 were the
    fastest of twelve on an H100.
    """
    block_dim, block_target = (power_of_two(dim) for dim in dims)
    width = max(block_dim, block_target)
    narrow = all(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)
    whole = narrow and width <= 128 and on != "hip"
    # 64 rows make Hopper's and Blackwell's tensor cores take a product
    held = (64 if narrow else 32) if width <= 128 else 16
    moving = 32 if width <= 64 or (width <= 128 and (narrow or part != "key")) else 16
    constants: dict[str, int | str] = {
        "BLOCK_QUERY": moving if part == "key" else held,
        "BLOCK_KEY": held if part == "key" else moving,
        "BLOCK_DIM": block_dim,
        "BLOCK_TARGET_DIM": block_target,
        # columns of one product of scores; 0 takes whole heads, which spill in fp32
        "CHUNK": 0 if whole else 32 if narrow else 16,
        "SCORE_PRECISION": dot_precision(True, on),
    }
    if part != "rows":
        constants["GRAD_PRECISION"] = dot_precision(dtypes[0] != torch.float16, on)
    if whole:
        return Launch(constants, num_warps=4, num_stages=1 if part == "key" and width > 64 else 2)
    if narrow:
        few = part == "key" and row_stats(kind) == 4 and block_dim + block_target < 128
    else:
        few = width <= 64 and not (part == "rows" and kind in TWO_SWEEPS)
    # with 8 warps, wide heads spill: capped in two sweeps on sm_90, with sinks on sm_80
    spills = (capped and part == "rows" and kind in TWO_SWEEPS) or (sunk and part == "query")
    few = few or (spills and width > 128)
    # a warp of AMD's has 64 threads
    return Launch(constants, num_warps=4 if few or on == "hip" else 8, num_stages=1)
