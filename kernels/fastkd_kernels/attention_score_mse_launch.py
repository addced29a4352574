"""Launch parameters of attention_score_mse: blocks of the tile and the Gram kernels."""

import torch

from .launch import Launch, dot_precision, power_of_two

# the widest student head whose gradient the tile kernels hold
MAX_HEAD_DIM = 256


def tile_launch(
    tokens: int,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    on: str = "cuda",
) -> Launch:
    """Blocks of the tile kernels. One key block covers short sequences, so one pass does all.

    Wide heads are read in pieces, so that only the student's width, of its gradient, counts. Blocks
    for half precision and heads of up to 128 were the fastest of eleven on an H100.
    """
    block_dim, block_target = (power_of_two(dim) for dim in dims)
    width = max(block_dim, block_target)
    narrow = all(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)
    # 64 rows or more make Hopper's and Blackwell's tensor cores take a product
    block = 64 if narrow and block_dim <= 128 else 32 if block_dim <= 128 else 16
    block = min(block, power_of_two(tokens))
    whole = narrow and width <= (128 if on != "hip" else 64)
    # wide heads need the registers of twice the warps, and these twice the rows
    wide = whole and width > 64
    constants: dict[str, int | str] = {
        "BLOCK_QUERY": 2 * block if wide else block,
        "BLOCK_KEY": block,
        "BLOCK_DIM": block_dim,
        "BLOCK_TARGET_DIM": block_target,
        # columns of one product of scores; 0 takes the whole head
        "CHUNK": 0 if whole else 16,
        "SCORE_PRECISION": dot_precision(True, on),
        "GRAD_PRECISION": dot_precision(dtypes[0] != torch.float16, on),
    }
    return Launch(constants, num_warps=4 if whole and not wide and on != "hip" else 8, num_stages=1)


def one_launch(tokens: int, launch: Launch) -> bool:
    """Whether one block holds every key, whole, so that one launch makes both gradients."""
    block = launch.constants["BLOCK_KEY"]
    assert isinstance(block, int)
    return tokens <= block and launch.constants["CHUNK"] == 0


def causal_chunk(dims: tuple[int, int]) -> int:
    """Tokens that share a Gram under the causal mask: a multiple of every block.

    Four times the wider head keeps all Grams of a layer near the size of its queries and keys, and
    leaves as much arithmetic to the tiles inside chunks as to the Grams between them.
    """
    return max(128, 4 * power_of_two(max(dims)))


def scan_launch() -> Launch:
    """Entries of one program of the scan over chunks."""
    return Launch({"BLOCK": 1024}, num_warps=4, num_stages=1)


def gram_launch(
    dims: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], on: str = "cuda"
) -> Launch:
    """Blocks of the Gram kernels: tokens, columns of one tile, and those of a gradient."""
    half = all(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)
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
