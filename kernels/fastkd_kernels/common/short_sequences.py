"""Short sequences: one program takes several heads of one, whole, in half precision."""

import torch

from .launch import Launch, is_half, power_of_two, stages_that_fit, whole_head_blocks

# the longest sequence that one program holds
SHORT_TOKENS = 128
# about two programs for each multiprocessor of the largest GPUs
FEWEST_PROGRAMS = 256


def takes_short(
    tokens: int, dims: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], on: str = "cuda"
) -> bool:
    """Whether a short kernel takes sequences of this length."""
    return tokens <= SHORT_TOKENS and takes_whole(dims, dtypes, on)


def takes_whole(
    dims: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], on: str = "cuda"
) -> bool:
    """Whether registers hold all that a program makes of blocks of whole heads."""
    return is_half(*dtypes) and max(dims) <= 64 and on != "hip"


def short_launch(
    tokens: int,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    stages: int,
    on: str = "cuda",
) -> Launch:
    """Blocks of a short kernel: all keys and query rows, loaded up to `stages` ahead, as fits."""
    block, width = power_of_two(tokens), sum(power_of_two(dim) for dim in dims)
    fitting = stages_that_fit(stages, 2 * block * width * 2, block * block * 2)
    constants = whole_head_blocks(block, block, dims, dtypes[0], on)
    return Launch(constants, num_warps=8 if block > 64 else 4, num_stages=fitting)


def heads_of_program(heads: int, kv_heads: int, sequences: int) -> int:
    """Query heads that one program of a short kernel takes, with their key heads whole.

    As many as leave `FEWEST_PROGRAMS`, so that what starts and ends a program is rarely paid.
    """
    repeat = heads // kv_heads
    fits = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    enough = [n for n in fits if kv_heads // n * sequences >= FEWEST_PROGRAMS]
    return repeat * max(enough, default=1)
